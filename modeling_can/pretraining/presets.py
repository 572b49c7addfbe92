"""Recipes as values by key: the presets that come with the package, files, and what replaces their values."""

import difflib
from pathlib import Path

from ..fields import load_yaml, parse_value
from ..former_names import current_names


__all__ = ["LENGTH", "QUICKSTART", "SOURCE", "begun", "merged", "output_dir", "presets", "recipe_for"]

QUICKSTART = "can-quickstart"

SOURCE = ("dataset_name", "dataset_config_name", "data_dir", "data_files")
LENGTH = ("max_steps", "num_train_epochs", "num_train_samples")  # the first that is set counts


def recipe_for(
    recipe: str | Path | dict | None, overrides: dict, has_dataset: bool = False
) -> str | Path | dict | None:
    """
    The recipe that is meant: the named one. Without one it is the quickstart; or, where `overrides` name images of the
    user's own or there is a data set, that of the run that they go on with or have finished; else `None`: the settings
    are to be chosen.
    """
    if recipe is not None:
        return recipe
    if not has_dataset and not _own_source(overrides):
        return QUICKSTART
    known = begun(overrides.get("resume_from_checkpoint"), output_dir(overrides))
    finished = Path(output_dir(overrides)).expanduser() / "recipe.yaml"
    is_replaced = parse_value("overwrite_output_dir", overrides.get("overwrite_output_dir", False), bool)
    if not known and not is_replaced and finished.exists() and finished.with_name("results.json").exists():
        known = finished
    if known and not overrides.get("output_dir"):
        _refuse_other_source(known, overrides)
    return known


def begun(resume_from_checkpoint: str | Path | None, output_dir: str | Path) -> Path | None:
    """The `recipe.yaml` of the run that goes on from a checkpoint; `None` where there is no such checkpoint yet."""
    if resume_from_checkpoint in (None, "none"):
        return None
    folder = Path(output_dir).expanduser()
    if resume_from_checkpoint != "latest":
        checkpoint = Path(resume_from_checkpoint).expanduser().resolve()
        folder = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    elif not any(folder.glob("checkpoints/step-*")):
        return None
    return folder / "recipe.yaml" if (folder / "recipe.yaml").exists() else None


def output_dir(overrides: dict) -> str:
    """Where the settings are to be chosen: the user's, or one that is called like the folder or set of images."""
    source = Path(_own_source(overrides) or "mine").expanduser()
    name = "mine" if overrides.get("data_files") else (source.resolve() if source.exists() else source).name
    return str(overrides.get("output_dir") or f"out/{name or 'mine'}")


def _refuse_other_source(known: Path, overrides: dict):
    """An output folder that nobody named may be that of another set of images with the same last name."""
    before, now = _own_source(_read(known)), _own_source(overrides)
    if before and now and Path(before).expanduser().resolve() != Path(now).expanduser().resolve():
        raise ValueError(f"output_dir={known.parent} holds a run on {before}, not on {now}; give another --output_dir")


def _own_source(overrides: dict) -> str | None:
    """The user's own images; the bundled ones are the quickstart's."""
    given = (overrides.get(key) for key in ("data_dir", "data_files", "dataset_name"))
    source = next((value for value in given if value not in (None, "none", [], ())), None)
    source = source[0] if isinstance(source, list | tuple) else source
    return None if source in (None, _read(_find(QUICKSTART))["dataset_name"]) else str(source)


def merged(recipe: str | Path | dict, overrides: dict) -> dict:
    """
    The values of a recipe (the name of a preset, a YAML file, or values by key), with `overrides` in place of its own.
    Another source or length replaces all that the recipe says of source or length.

    Raises:
        ValueError: for a recipe that does not exist or is no YAML mapping.
    """
    values = current_names(recipe if isinstance(recipe, dict) else _read(_find(recipe)))
    overrides = current_names(overrides)
    if any(key in overrides for key in SOURCE if key != "dataset_config_name"):
        if values.get("probe_dataset_name") == values.get("dataset_name"):
            values.pop("probe_dataset_name", None)  # of the data that are replaced, it says nothing about the new ones
        values = {key: value for key, value in values.items() if key not in SOURCE}
    if any(key in overrides for key in LENGTH):
        values = {k: v for k, v in values.items() if k not in LENGTH}
    return {**values, **overrides}


def presets() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "model_cards")  # installed, or in a checkout
    folder = next((folder for folder in folders if folder.is_dir()), package)
    return {path.parent.name: path for path in sorted(folder.glob("*/recipe.yaml"))}


def _find(recipe: str | Path) -> Path:
    path, known = Path(recipe).expanduser(), presets()
    if path.is_file():
        return path
    if str(recipe) in known:
        return known[str(recipe)]
    near = difflib.get_close_matches(str(recipe), known, n=1)
    raise ValueError(
        f"there is no recipe {recipe}"
        + (f"; did you mean {near[0]}?" if near else f"; give a YAML file, or one of {', '.join(known)}")
    )


def _read(path: Path) -> dict:
    """The keys of a recipe file; `ValueError` for what is no recipe."""
    values = load_yaml(path)
    if values is None:  # a copy that failed, more often than a wish for nothing but defaults
        raise ValueError(f"{path} is empty; write `key: value` lines, as in model_cards/*/recipe.yaml")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"the single value {values!r}"
        raise ValueError(f"{path}, line 1: this is {kind}; write `key: value` lines instead")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{path}: the key {key!r} is not a word; see --help for the keys")
    return values
