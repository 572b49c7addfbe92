"""Whether an encoder saw the test images in pre-training, without their labels."""

import itertools
import re
from pathlib import Path

from datasets import ReadInstruction, load_dataset

from ..data.faults import without_bars
from ..data.folders import load_arguments, resolve_name
from ..fields import load_yaml
from ..former_names import current_names


__all__ = ["recipe_of", "seen_in_pretraining"]


def seen_in_pretraining(path: str, settings) -> bool | None:
    """
    Whether the recipe beside a model says that it was pre-trained on test images too, without their labels; `None`
    where it names a part of the tested folder that may hold some, or a split that is gone. Copies are not found out.
    """
    recipe, tested = recipe_of(path), Path(resolve_name(settings.dataset_name))
    tested_split = settings.train_split if settings.test_size else settings.test_split
    name, config_name = recipe.get("dataset_name"), recipe.get("dataset_config_name")
    source = Path(resolve_name(name or recipe.get("data_dir") or "")).resolve()
    if name and (name == settings.dataset_name or source == tested):
        if config_name and settings.dataset_config_name and config_name != settings.dataset_config_name:
            return False
        try:
            return _have_common_rows(recipe.get("dataset_split", "train"), tested_split, _num_rows(settings))
        except ValueError:  # the set has no such split any more
            return None
    if source.exists() and (name or recipe.get("data_dir")):
        if source == tested or source in tested.parents:
            return True
        if tested not in source.parents:
            return False
        splits, parts = _num_rows(settings).keys(), set(source.relative_to(tested).parts)
        tested_splits = re.sub(r"\[.*?\]", "", tested_split).split("+")
        if parts.intersection(tested_splits) or len(splits) == 1:
            return True
        return False if parts & splits else None
    files = recipe.get("data_files") or []
    folders = {Path(file).resolve().parent for file in ([files] if isinstance(files, str) else files)}
    return None if any(folder == tested or tested in folder.parents for folder in folders) else False


def recipe_of(path: str) -> dict:
    """The recipe beside a model that `run_pretraining.py` made; empty for any other."""
    file = Path(path) / "recipe.yaml"
    recipe = load_yaml(file) if file.exists() else {}
    return current_names(recipe) if isinstance(recipe, dict) else {}


def _num_rows(settings) -> dict[str, int]:
    """Of every split of the set."""
    arguments = load_arguments(settings.dataset_name, settings.dataset_config_name)
    with without_bars(arguments):
        splits = load_dataset(**arguments)
    return {name: len(rows) for name, rows in splits.items()}


def _have_common_rows(split: str, other: str, lengths: dict[str, int]) -> bool:
    """Of two splits of a set, such as `train[:80%]` and `train+test`."""
    ours, theirs = (ReadInstruction.from_spec(spec).to_absolute(lengths) for spec in (split, other))
    return any(
        a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to)
        for a, b in itertools.product(ours, theirs)
    )
