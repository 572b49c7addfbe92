"""
Settings as dataclass fields. A field declares its default, its help and which values it takes with `option`; its type
says how the words of a command line or of a YAML file are read.
"""

import argparse
import dataclasses
import difflib
import glob
import math
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from .files import expand_user, literal_pattern
from .former_names import FORMER_NAMES, current_names


__all__ = ["Option", "check", "expand_paths", "load_yaml", "option", "parse_value", "parse_values", "read_flags"]


# --- What a field declares -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What a field says of its values. Limits and choices hold for every value of a field that takes several."""

    help: str
    minimum: float = -math.inf
    above: float = -math.inf  # the exclusive minimum
    maximum: float = math.inf
    below: float = math.inf  # the exclusive maximum
    choices: tuple = ()  # the only values; () does not restrict them
    num_values: tuple[int, ...] = ()  # how many values a sequence may have; () does not restrict them
    ascending: bool = False  # whether the values of a sequence must not decrease
    required: bool = False  # whether it must not be empty
    path: bool = False  # whether ~ stands for the home folder

    def problem(self, value) -> str | None:
        """What is wrong with a single value, as a message says it."""
        if self.choices and value not in self.choices:
            known = (str(choice).lower() if isinstance(choice, bool) else choice for choice in self.choices)
            return f"is not one of {', '.join(map(str, known))}"
        if not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return f"must be finite ({self.help})"
        if self.minimum <= value <= self.maximum and self.above < value < self.below:
            return None
        low, high = max(self.minimum, self.above), min(self.maximum, self.below)
        if high == math.inf:
            return f"must be {'at least' if low == self.minimum else 'greater than'} {low} ({self.help})"
        interval = f"{'[' if low == self.minimum else '('}{low}, {high}{']' if high == self.maximum else ')'}"
        return f"is outside {interval} ({self.help})"


def option(default, help: str, **declared):
    """A dataclass field with a default; `declared` are the fields of `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **declared)})


def check(settings):
    """
    Checks a dataclass instance against what its fields declare. `None` stands for an open value and is not checked;
    numbers must be finite.

    Raises:
        ValueError: for the first value that its field does not take; it names the field, the value, what is taken, and
            what the field means.
    """
    for f in dataclasses.fields(settings):
        value, declared = getattr(settings, f.name), f.metadata.get("option")
        if declared is None:
            continue
        if declared.required and not value:
            raise ValueError(f"give --{f.name}: {declared.help}")
        values = value if isinstance(value, list | tuple) else [value]
        if declared.num_values and value is not None and len(values) not in declared.num_values:
            counts = " or ".join(map(str, declared.num_values))
            raise ValueError(f"{f.name}={value} must have {counts} values, not {len(values)} ({declared.help})")
        for one in values:
            if problem := None if one is None else declared.problem(one):
                raise ValueError(f"{f.name}={one!r} {problem}")
        if declared.ascending and list(values) != sorted(values):
            raise ValueError(f"{f.name}={value} must not decrease ({declared.help})")


def expand_paths(settings):
    """Sets the fields that are paths to those with ~ expanded: no shell does it in a YAML file, or behind a =."""
    for f in dataclasses.fields(settings):
        if "option" in f.metadata and f.metadata["option"].path:
            setattr(settings, f.name, expand_user(getattr(settings, f.name)))


# --- Words as values -------------------------------------------------------------------------------------------------

_ALIASES = {  # names in other trainers, which are refused, and what they are called here
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "base_learning_rate",
    "num_workers": "dataloader_num_workers",
    "resume": "resume_from_checkpoint",
    "workers": "dataloader_num_workers",
}


def parse_values(values: dict, fields: list[dataclasses.Field]) -> dict:
    """
    Words of a YAML file or a command line as the values of fields, by name.

    Raises:
        ValueError: for a key that is none of the fields (the nearest one is named) or is given under its former name
            too, or a value of the wrong type.
    """
    values = current_names(values)
    _refuse_unknown(values, fields)
    annotations = {f.name: f.type for f in fields}
    return {name: parse_value(name, value, annotations[name]) for name, value in values.items()}


def _refuse_unknown(keys: Iterable[str], fields: list[dataclasses.Field]):
    """Raises ValueError for a key that is none of the fields; it names the nearest one."""
    known = [f.name for f in fields]
    aliases = {alias: name for alias, name in _ALIASES.items() if name in known}
    for key in keys:
        if key not in known:
            alias = difflib.get_close_matches(key, aliases, n=1, cutoff=0.8)
            near = [aliases[alias[0]]] if alias else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise ValueError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def parse_value(name: str, value, annotation):
    """
    A YAML value or command-line word as the type of its field. YAML reads 1e-3 as a string and 0 as an int; the
    command line gives strings only.
    """
    if isinstance(annotation, types.UnionType):
        kinds = list(typing.get_args(annotation))
    else:
        kinds = [annotation]
    if value is None or (value in ("none", "None", "null") and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise ValueError(f"{name} needs a value")
    wanted = _in_words(kinds)
    if bool in kinds and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if isinstance(value, bool):  # which Python takes for a number, and YAML for a word
        raise ValueError(f"{name}={value} must be {wanted}{'; put words in quotes' * (str in kinds)}")
    sequence = next((kind for kind in kinds if typing.get_origin(kind) in (tuple, list)), None)
    items = _at_commas(value) if sequence and isinstance(value, str) else value
    if isinstance(items, list | tuple) and sequence and items != [value]:
        return tuple(parse_value(name, item, typing.get_args(sequence)[0]) for item in items)
    if sequence and not set(kinds) - {sequence, type(None)}:
        return (parse_value(name, value, typing.get_args(sequence)[0]),)
    try:
        if int in kinds and float(value) == int(float(value)) and (float not in kinds or isinstance(value, int)):
            return int(float(value))
        if float in kinds:
            return float(value)
    except (OverflowError, TypeError, ValueError):
        pass
    if str in kinds and not isinstance(value, dict | list | tuple):
        return str(value)
    raise ValueError(f"{name}={value!r} must be {wanted}")


def _in_words(kinds: list) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kinds = [kind for kind in kinds if kind is not int or float not in kinds]
    named = [words.get(kind, "values with commas between") for kind in kinds if kind is not type(None)]
    return " or ".join(dict.fromkeys(named))


def _at_commas(text: str) -> list[str]:
    """The parts of a list on the command line; a path that exists is one, whatever its name."""
    return [text] if "," not in text or glob.glob(literal_pattern(expand_user(text))) else text.split(",")


# --- The command line ------------------------------------------------------------------------------------------------


def read_flags(
    parser: argparse.ArgumentParser, groups: dict[str, list[dataclasses.Field]], argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """
    Everything on the command line, and the `--key value` of those fields that are given, a flag without a value as
    `true`, several values as a list.

    Raises:
        ValueError: for an unknown flag (the nearest one is named), one that is given under its former name too, or a
            word that belongs to none.
    """
    several = {"nargs": "*", "action": _Joined}
    for group, group_fields in groups.items():
        arguments = parser.add_argument_group(group)
        for f in group_fields:
            text = f.metadata["option"].help if "option" in f.metadata else "see CANConfig"
            text = f"{text} (default {f.default})"
            number = several if _takes_several(f.type) else {"nargs": "?", "const": "true"}
            arguments.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **number)
            for former in (former for former, name in FORMER_NAMES.items() if name == f.name):
                arguments.add_argument(f"--{former}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **number)
    argv = sys.argv[1:] if argv is None else argv
    known = [f for group_fields in groups.values() for f in group_fields]
    flags = (word[2:].split("=")[0] for word in argv if word.startswith("--") and word != "--help")
    _refuse_unknown((FORMER_NAMES.get(flag, flag) for flag in flags), known)
    arguments, stray = parser.parse_known_args(argv)
    if stray:
        raise ValueError(f"unexpected {stray[0]!r}; write --key value")
    given = current_names(vars(arguments))
    return arguments, {f.name: given[f.name] for f in known if f.name in given}


def _takes_several(annotation) -> bool:
    """Whether a tuple is the type, or one of a union."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return any(typing.get_origin(kind) is tuple for kind in kinds)


class _Joined(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        values = [part for value in values for part in _at_commas(value)]
        setattr(namespace, self.dest, values if values[1:] else "".join(values))


# --- Files -----------------------------------------------------------------------------------------------------------


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path):
    """What a YAML file holds; `ValueError` with file, line and fix for what is no YAML, or gives a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.load(text, _UniqueKeys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        is_open = any(word in (error.context or "") for word in ("flow", "quoted"))  # and was noticed further down
        number = (error.context_mark if is_open else error.problem_mark).line
        line = text.splitlines()[number]
        value = line.partition(":")[2].strip()
        if "\t" in line:
            fix = "replace the tab by spaces"
        elif "twice" in error.problem:
            fix = "remove one of them"
        elif "another document" in error.problem:
            fix = "a recipe is one document; remove the line ---"
        elif value[:1] in ("'", '"', "[", "{"):
            fix = f"check that what begins with {value[0]} ends"
        else:
            fix = f"put the value in quotes, {line.partition(':')[0].strip()}: '{value}'"
        raise ValueError(f"{path}, line {number + 1}: {line.strip()!r}: {error.problem}; {fix}") from error
    except yaml.YAMLError as error:  # a character that no text has
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}; write it anew as text") from error
