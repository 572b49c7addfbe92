"""The first second of a command, before PyTorch is imported: what it was asked for, and what it must refuse."""

import argparse
import dataclasses
import os
import sys
import typing
from pathlib import Path

from .fields import parse_values, read_flags
from .files import expand_user, refuse_missing_files, refuse_missing_folder, refuse_missing_path
from .former_names import current_names
from .keywords import Evaluation, Pretraining
from .pretraining.presets import merged, output_dir, recipe_for
from .progress import tell


__all__ = ["ENVIRONMENT", "OUTPUT_DIRS", "look_at_evaluation", "look_at_pretraining", "set_environment"]

ENVIRONMENT = {
    # Threads that spin while they wait take the time of other processes, and of this one's workers: PyTorch's, and
    # those of scikit-learn's matrix products (which spin for 2^4 cycles instead of 2^26).
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_THREAD_TIMEOUT": "4",
    # An operation that Apple's GPUs lack runs on the CPU, and PyTorch says so; else it ends the run.
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",
}
OUTPUT_DIRS = {Pretraining: "out", Evaluation: "out/eval"}  # the defaults of output_dir; a test compares


def set_environment():
    """
    Sets what PyTorch and NumPy read when they are imported; what the user has set stays. Workers and other child
    processes get it too. Nothing happens where PyTorch is imported already.
    """
    if "torch" not in sys.modules:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def look_at_pretraining(argv: list[str], program: str, is_given: bool = False):
    """
    Says what is asked for.

    Args:
        is_given (`bool`): Whether the images are a data set in memory.

    Raises:
        ValueError: for unknown flags and keys, values of a wrong type, a recipe that cannot be read, and a folder
            that does not exist.
    """
    if _asks_for_help(argv):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?")
    fields = _fields(Pretraining)
    arguments, overrides = read_flags(parser, {"": fields}, argv)
    recipe = recipe_for(arguments.recipe, overrides, is_given)
    if recipe is None:
        start, values = "settings chosen for these images", {**overrides, "output_dir": output_dir(overrides)}
    else:
        start, values = f"recipe {recipe}", merged(recipe, overrides)
    values = parse_values(current_names(values), fields)
    images = "a data set in memory" if is_given else _images(values)
    _say(program, start, images, values.get("output_dir") or OUTPUT_DIRS[Pretraining])


def look_at_evaluation(argv: list[str], program: str):
    """Says what is asked for. Raises ValueError for unknown flags, values of a wrong type, and no such folder."""
    if _asks_for_help(argv):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    fields = _fields(Evaluation)
    values = parse_values(read_flags(parser, {"": fields}, argv)[1], fields)
    models = f"models {_listed(values.get('model_name_or_path'))}"
    _say(program, models, _images(values), values.get("output_dir") or OUTPUT_DIRS[Evaluation])


def _asks_for_help(argv: list[str]) -> bool:
    return bool({"-h", "--help"} & set(argv))


def _fields(keywords: type) -> tuple[dataclasses.Field, ...]:
    """The fields of the settings by name and type; they themselves need PyTorch."""
    return dataclasses.fields(dataclasses.make_dataclass("Fields", typing.get_type_hints(keywords).items()))


def _images(values: dict) -> str:
    """What they are; raises ValueError for places that are not there, unless a run goes on, which may be finished."""
    named = values.get("dataset_name") or values.get("data_dir") or values.get("data_files")
    if values.get("resume_from_checkpoint"):
        return f"images of {_listed(named)}"
    if values.get("data_dir"):
        refuse_missing_folder("data_dir", Path(expand_user(values["data_dir"])))
    refuse_missing_files(expand_user(_several(values.get("data_files"))))
    for name in ("dataset_name", "probe_dataset_name", "model_name_or_path"):
        for value in _several(values.get(name)):
            refuse_missing_path(name, value)
    return f"images of {_listed(named)}"


def _several(value: str | tuple[str, ...] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _listed(value: str | tuple[str, ...] | None) -> str:
    return ", ".join(_several(value)) or "nothing"


def _say(program: str, start: str, images: str, output_dir: str):
    if os.environ.get("RANK", "0") == "0":
        tell(f"{program}: {start}; {images}; output folder {output_dir}. Importing PyTorch ...")
