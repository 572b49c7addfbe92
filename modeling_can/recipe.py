"""
A recipe: one flat YAML of training fields and `CANConfig` fields, each of which is also a `--flag`.

A `Recipe` is the exact input of a run. It is checked when it is made, so that a run fails in its first second.
"""

import argparse
import dataclasses
import difflib
import glob
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .configuration_can import CANConfig
from .data.decoding import DECODING, check_decoding
from .data.folders import expand_user, literal_pattern


__all__ = [
    "INSTALL", "LENGTH", "Recipe", "SOURCE", "at_commas", "load_yaml", "model_fields", "option", "parse_arguments",
    "parse_value", "read_flags", "training_fields",
]  # fmt: skip


INSTALL = 'pip install -e ".[{}]" -c constraints.txt'  # of an extra, from a checkout
ALIASES = {"batch_size": "per_device_train_batch_size", "lr": "base_learning_rate", "resume": "resume_from_checkpoint",
           "workers": "dataloader_num_workers", "num_workers": "dataloader_num_workers",
           "epochs": "num_train_epochs"}  # fmt: skip
SOURCE = ("dataset_name", "dataset_config_name", "data_dir", "data_files")
PATHS = ("dataset_name", "data_dir", "data_files", "probe_dataset_name", "model_name_or_path", "output_dir",
         "resume_from_checkpoint")  # fmt: skip
LENGTH = ("max_steps", "num_train_epochs", "num_train_samples")  # the first that is set counts


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Recipe:
    """The training half of a recipe; the fields of the model are those of `CANConfig`, in `config`."""

    config: CANConfig

    # Data: exactly one of the first three
    dataset_name: str | None = option(None, "Hub id, local folder that datasets.load_dataset reads, or sample_data")
    data_dir: str | None = option(None, "any folder of images, nested or flat")
    data_files: str | list[str] | None = option(None, "paths, globs or URLs of parquet, WebDataset tar, arrow, jsonl")
    streaming: bool = option(True, "read while training; false: download all of it first")
    dataset_config_name: str | None = option(None, "configuration of dataset_name, where it has several")
    dataset_split: str = option("train", "split of dataset_name; parts such as train[:10%] only with streaming: false")
    image_column: str = option("image", "column that holds the images; else all columns of type Image")
    max_bad_fraction: float = option(0.01, "share of bad images above which the run stops")
    transparent_background: str = option("white", "colour behind transparent pixels: a name or #rrggbb")
    high_bit_depth: str = option("full_range", "16-bit greyscale to 8: full_range, stretch (each image's own) or skip")
    probe_dataset_name: str | None = option(None, "labelled set with two splits, to measure the features")
    probe_dataset_config_name: str | None = option(None, "its configuration, where it has several")
    probe_train_split: str = option("train", "its split to learn from")
    probe_test_split: str = option("test", "its split to be tested on")
    probe_label_column: str = option("label", "its column of class indices")
    probe_image_column: str | None = option(None, "its column of images; image_column if none")
    probe_every: int = option(0, "steps between k-NN tests on it; 0 measures before and after training only")
    dataloader_num_workers: int = option(0, "loader processes for each training process")
    shuffle_block_size: int = option(1024, "encoded images that a reader holds and shuffles at a time")

    data_on_device: bool | str = option("auto", "decode all images once and keep them there; auto: if they fit a GPU")

    # Views
    num_views: int = option(2, "random crops of an image; 1 only without contrastive term")
    crop_scale: tuple[float, ...] = option((0.2, 1.0), "range of a crop's share of the image area")
    crop_ratio: tuple[float, ...] = option((0.75, 4 / 3), "range of a crop's width / height")
    resample: str = option("bilinear", "bilinear or bicubic")
    flip_probability: float = option(0.5, "of a horizontal flip")
    color_jitter: tuple[float, ...] = option((0.4, 0.4, 0.4, 0.1), "strength: brightness,contrast,saturation,hue")
    color_jitter_probability: float = option(0.8, "of colour jitter")
    greyscale_probability: float = option(0.2, "of losing the colour")
    blur_probability: float = option(0.5, "of Gaussian blur")
    blur_sigma: tuple[float, ...] = option((0.1, 2.0), "range of the blur's width in pixels")
    solarize_probability: float = option(0.0, "of inverting what is brighter than one half")
    measure_mean_std: bool = option(False, "measure image_mean and image_std on 1,000 images before training")
    image_mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "of the pixels in [0, 1], a number a channel")
    image_std: tuple[float, ...] = option((0.229, 0.224, 0.225), "of the pixels in [0, 1], a number a channel")

    # Length: the first that is set counts
    max_steps: int | None = option(None, "optimiser updates")
    num_train_epochs: float | None = option(None, "passes over the data, where the number of images is known")
    num_train_samples: int | None = option(None, "images to see")

    # Start
    model_name_or_path: str | None = option(None, "weights to begin with: CAN, ViT-MAE, ViT, DINOv2, timm, .pth")

    # Optimisation
    per_device_train_batch_size: int = option(128, "images of one step on one process")
    gradient_accumulation_steps: int = option(1, "batches of an optimiser step, one after the other")
    gradient_caching: bool = option(True, "accumulate with the contrastive loss over all of the step's images")
    base_learning_rate: float = option(2.5e-4, "for 256 images a step; scaled linearly with the global batch")
    warmup_ratio: float = option(0.05, "share of the steps with linear warm-up")
    weight_decay: float = option(0.05, "AdamW, on matrices only")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.95, "AdamW")
    max_grad_norm: float = option(0.0, "clip the gradient norm; 0 does not clip")
    on_nonfinite: str = option("stop", "stop or skip: what follows a gradient that is not finite; no update does")
    mixed_precision: str = option("auto", "no, bf16, or auto: bf16 on GPUs that have it, never on CPU")
    tf32: bool = option(True, "products of what is left in fp32 in TF32, on GPUs that have it")
    gradient_checkpointing: bool = option(False, "compute each block's activations twice instead of keeping them")
    torch_compile: bool | str = option("auto", "true: the blocks; model; cudagraph; auto: the blocks on a GPU")
    seed: int = option(0, "of weights, order, crops, noise and masks")

    # Output
    output_dir: str = option("out", "folder for weights, card, figures and results")
    overwrite_output_dir: bool = option(False, "replace a finished run in output_dir")
    save_steps: int = option(1000, "steps between checkpoints")
    save_total_limit: int = option(2, "checkpoints to keep, the newest; with probe_every also the best")
    resume_from_checkpoint: str | None = option(None, "a folder checkpoints/step-N, or latest: that of output_dir")
    logging_steps: int = option(20, "steps between lines of metrics.jsonl")
    log_with: str | None = option("tensorboard", "trackers, by accelerate's names, comma-separated; or none")
    preflight: bool = option(False, "check data, model and machine in a minute instead of training")

    # The Hub, under transformers' names where it has one
    push_to_hub: bool = option(False, "upload the output folder to the Hub, with the token of `hf auth login`")
    hub_model_id: str | None = option(None, "repository, NAME or ORGANISATION/NAME; the output folder's name if none")
    hub_private: bool = option(False, "the repository is, or is made, private")
    hub_strategy: str = option("every_save", "end, every_save, or checkpoint: with it also the newest checkpoint")

    @property
    def length(self) -> str | None:
        """The field that says how long the run is."""
        return next((name for name in LENGTH if getattr(self, name) is not None), None)

    @property
    def decoding(self) -> dict:
        """What `views.decode` is told other than it does by default."""
        return {name: getattr(self, name) for name, usual in DECODING.items() if getattr(self, name) != usual}

    def __post_init__(self):
        for name in PATHS:  # no shell expands the ~ of a recipe, or behind a =
            setattr(self, name, expand_user(getattr(self, name)))
        if sum(map(bool, (self.dataset_name, self.data_dir, self.data_files))) > 1:
            raise ValueError(
                "give one source: dataset_name, data_dir or data_files "
                f"(got {self.dataset_name!r}, {self.data_dir!r}, {self.data_files!r})"
            )
        if self.length is None:
            raise ValueError("the length is open; set max_steps, num_train_epochs or num_train_samples")
        positive = ("max_steps", "num_train_epochs", "num_train_samples", "per_device_train_batch_size")
        for name in (
            *positive,
            "gradient_accumulation_steps",
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "shuffle_block_size",
            "base_learning_rate",
        ):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and greater than 0")
        for name in ("max_grad_norm", "weight_decay", "seed", "dataloader_num_workers", "probe_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        if len(self.color_jitter) != 4 or not all(0 <= strength < math.inf for strength in self.color_jitter):
            raise ValueError(
                f"color_jitter={self.color_jitter} must be four strengths >= 0: brightness,contrast,saturation,hue"
            )
        if self.num_views not in (1, 2) or (self.num_views == 1 and self.config.contrastive_loss_weight > 0):
            raise ValueError(
                f"num_views={self.num_views} must be 2, or 1 with contrastive_loss_weight=0: two views are contrasted"
            )
        if self.probe_every and not self.probe_dataset_name:
            raise ValueError(f"probe_every={self.probe_every} needs a labelled set; give probe_dataset_name")
        if self.torch_compile == "cudagraph" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} with torch_compile=cudagraph: the "
                "graph would overwrite the gradients of the batch before; set torch_compile to model or auto"
            )
        if self.torch_compile in (True, "model", "cudagraph") and self.config.drop_path_rate > 0:
            # Beyond its limit of recompilations torch runs some passes uncompiled, which draw other random numbers:
            # the two passes of gradient caching would no longer be alike.
            raise ValueError(
                f"drop_path_rate={self.config.drop_path_rate} with torch_compile={self.torch_compile} compiles every "
                "block anew for its own rate; set drop_path_rate to 0, or torch_compile to false or auto"
            )
        if self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter={self.color_jitter} turns the hue by more than 0.5, half a circle")
        shares = [f.name for f in dataclasses.fields(self) if f.name.endswith("_probability")]
        for name in [*shares, "warmup_ratio", "max_bad_fraction"]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1]:
                raise ValueError(f"{name}={values} must be two numbers, 0 < low <= high")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale={self.crop_scale} ends above 1, the whole image")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not all(map(math.isfinite, values)) or (
                len(values) != self.config.num_channels and not self.measure_mean_std
            ):
                raise ValueError(
                    f"{name}={values} must be {self.config.num_channels} finite numbers, one a channel; "
                    "--measure_mean_std finds them"
                )
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} must be greater than 0; it divides the pixels")
        choices = {
            "resample": ("bilinear", "bicubic"),
            "torch_compile": ("auto", True, False, "model", "cudagraph"),
            "data_on_device": ("auto", True, False),
            "mixed_precision": ("auto", "no", "bf16"),
            "on_nonfinite": ("stop", "skip"),
            "hub_strategy": ("end", "every_save", "checkpoint"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, known)).lower()}")
        for name in ("hub_model_id", "hub_private"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(
                    f"{name}={getattr(self, name)} without push_to_hub uploads nothing; add --push_to_hub"
                )
        if self.push_to_hub:
            try:
                validate_repo_id(self.repo_id)
            except HFValidationError as error:
                raise ValueError(
                    f"hub_model_id={self.repo_id!r}; give --hub_model_id NAME or ORGANISATION/NAME: {error}"
                ) from error
        check_decoding(**self.decoding)

    @property
    def repo_id(self) -> str:
        """The repository on the Hub that `push_to_hub` means."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def to_dict(self) -> dict:
        """
        All fields, flat, in a form that `Recipe.from_dict` reads back; but `overwrite_output_dir`, or repeating a run
        would destroy it, `resume_from_checkpoint`, or it would not begin at the beginning, `preflight`, and those of
        the Hub, or who repeats it would upload to the same repository.
        """
        once = ("overwrite_output_dir", "resume_from_checkpoint", "preflight", "push_to_hub", "hub_model_id",
                "hub_private", "hub_strategy")  # fmt: skip
        values = {f.name: getattr(self, f.name) for f in training_fields() if f.name not in once}
        values |= {f.name: getattr(self.config, f.name) for f in model_fields()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_yaml(self) -> str:
        """`to_dict` as a recipe file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=119)

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """
        Raises:
            ValueError: for a key that is neither a training nor a model field (the nearest one is named), or a value
                of the wrong type.
        """
        known = {f.name: f for f in [*training_fields(), *model_fields()]}
        _refuse_unknown(values, list(known))
        parsed = {key: parse_value(key, value, known[key].type) for key, value in values.items()}
        model_names = {f.name for f in model_fields()}
        config = CANConfig(**{key: value for key, value in parsed.items() if key in model_names})
        return cls(config=config, **{key: value for key, value in parsed.items() if key not in model_names})


def training_fields() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Recipe) if f.name != "config"]


def model_fields() -> list[dataclasses.Field]:
    """The fields that `CANConfig` itself declares, without those of every transformers configuration."""
    return [f for f in dataclasses.fields(CANConfig) if f.name in CANConfig.__annotations__ and f.name != "model_type"]


def _refuse_unknown(keys, known: list[str]):
    for key in keys:
        if key not in known:
            alias = difflib.get_close_matches(
                key, [name for name in ALIASES if ALIASES[name] in known], n=1, cutoff=0.8
            )
            near = [ALIASES[alias[0]]] if alias else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise ValueError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def parse_value(name: str, value, annotation):
    """
    A YAML value or command-line word as the type of its field. YAML reads 1e-3 as a string and 0 as an int; the
    command line gives strings only.
    """
    if isinstance(annotation, types.UnionType):
        options = list(typing.get_args(annotation))
    else:
        options = [annotation]
    if value is None or (value in ("none", "None", "null") and type(None) in options):
        if type(None) in options:
            return None
        raise ValueError(f"{name} needs a value")
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    if bool in options and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if isinstance(value, bool):  # which Python takes for a number, and YAML for a word
        raise ValueError(f"{name}={value} is not of type {wanted}{'; put words in quotes' * (str in options)}")
    sequence = next((option for option in options if typing.get_origin(option) in (tuple, list)), None)
    items = at_commas(value) if sequence and isinstance(value, str) else value
    if isinstance(items, list | tuple) and sequence and items != [value]:
        return tuple(parse_value(name, item, typing.get_args(sequence)[0]) for item in items)
    if sequence and not set(options) - {sequence, type(None)}:
        return (parse_value(name, value, typing.get_args(sequence)[0]),)
    try:
        if int in options and float(value) == int(float(value)) and (float not in options or isinstance(value, int)):
            return int(float(value))
        if float in options:
            return float(value)
        if str in options and not isinstance(value, dict | list | tuple):
            return str(value)
    except (OverflowError, TypeError, ValueError):
        pass
    raise ValueError(f"{name}={value!r} is not of type {wanted}")


def at_commas(text: str) -> list[str]:
    """The parts of a list on the command line; a path that exists is one, whatever its name."""
    return [text] if "," not in text or glob.glob(literal_pattern(expand_user(text))) else text.split(",")


def read_flags(
    parser: argparse.ArgumentParser, groups: dict[str, list[dataclasses.Field]], argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """
    Everything on the command line, and the `--key value` of those fields that are given, a flag without a value as
    `true`, several values as a list.

    Raises:
        ValueError: for an unknown flag (the nearest one is named), or a word that belongs to none.
    """
    several = {"nargs": "*", "action": _Joined}
    for group, group_fields in groups.items():
        arguments = parser.add_argument_group(group)
        for f in group_fields:
            text = f.metadata.get("help", "see CANConfig") + f" (default {f.default})"
            number = several if typing.get_origin(f.type) is tuple else {"nargs": "?", "const": "true"}
            arguments.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **number)
    argv = sys.argv[1:] if argv is None else argv
    known = [f.name for group_fields in groups.values() for f in group_fields]
    _refuse_unknown((word[2:].split("=")[0] for word in argv if word.startswith("--") and word != "--help"), known)
    arguments, stray = parser.parse_known_args(argv)
    if stray:
        raise ValueError(f"unexpected {stray[0]!r}; write --key value")
    return arguments, {name: value for name, value in vars(arguments).items() if name in known}


class _Joined(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        values = [part for value in values for part in at_commas(value)]
        setattr(namespace, self.dest, values if values[1:] else "".join(values))


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


def parse_arguments(argv: list[str] | None, default_recipe: Path, description: str) -> Recipe:
    """
    `[RECIPE.yaml] [--key value ...]` -> Recipe; the command line counts last. A flag without a value is `true`.

    Raises:
        ValueError: as `Recipe`; also for a recipe file that does not exist.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", type=Path, default=default_recipe, help=f"YAML; default {default_recipe}")
    arguments, overrides = read_flags(parser, {"training": training_fields(), "model": model_fields()}, argv)
    arguments.recipe = arguments.recipe.expanduser()
    if not arguments.recipe.is_file():
        raise ValueError(f"there is no recipe {arguments.recipe}; the presets are model_cards/*/recipe.yaml")
    values = load_yaml(arguments.recipe)
    if values is None:  # a copy that failed, more often than a wish for nothing but defaults
        raise ValueError(f"{arguments.recipe} is empty; write `key: value` lines, as in model_cards/*/recipe.yaml")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"the single value {values!r}"
        raise ValueError(f"{arguments.recipe}, line 1: this is {kind}; write `key: value` lines instead")
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{arguments.recipe}: the key {key!r} is not a word; see --help for the keys")
    if any(overrides.get(key) for key in SOURCE if key != "dataset_config_name"):
        if values.get("probe_dataset_name") == values.get("dataset_name"):
            values.pop("probe_dataset_name", None)  # of the data that are replaced, it says nothing about the new ones
        values = {key: value for key, value in values.items() if key not in SOURCE}
    if any(key in overrides for key in LENGTH):
        values = {k: v for k, v in values.items() if k not in LENGTH}
    return Recipe.from_dict({**values, **overrides})
