"""
A recipe: one flat YAML of training fields and `CANConfig` fields, each of which is also a `--flag`.

A `Recipe` is the exact input of a run. It is checked when it is made, so that a run fails in its first second.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..configuration_can import CANConfig
from ..conversion.names import ENCODER_FIELDS
from ..data.arrays import check_pixel_range, reads_arrays
from ..data.decoding import DECODING, HIGH_BIT_DEPTH, check_color
from ..fields import check, expand_paths, option, parse_values, read_flags
from ..former_names import current_names
from .presets import LENGTH, begun, merged, output_dir, presets, recipe_for
from .sizes import OF_START, rate_of, sizes_of_start


__all__ = ["Recipe", "make_recipe", "model_fields", "parse_arguments", "training_fields"]

_FIRST_OF_GROUP = {  # of `--help`
    "dataset_name": "data",
    "num_views": "views",
    "max_steps": "length",
    "model_name_or_path": "start",
    "per_device_train_batch_size": "optimization",
    "output_dir": "output",
    "push_to_hub": "the Hub",
}


@dataclass
class Recipe:
    """The training half of a recipe; the fields of the model are those of `CANConfig`, in `config`."""

    config: CANConfig

    # Where no recipe is named: what the user set, by key, while the rest is open; then what was chosen, in words
    given: dict | None = None
    chosen: tuple[str, ...] = ()

    # Data: exactly one of the first three
    dataset_name: str | None = option(
        None, "Hub id, local folder that datasets.load_dataset reads, or sample_data", path=True
    )
    data_dir: str | None = option(None, "any folder of images, nested or flat", path=True)
    data_files: str | list[str] | None = option(
        None, "paths, globs or URLs of parquet, WebDataset tar, arrow, jsonl", path=True
    )
    streaming: bool = option(True, "read while training; false: download all of it first")
    dataset_config_name: str | None = option(None, "configuration of dataset_name, where it has several")
    dataset_split: str = option("train", "split of dataset_name; parts such as train[:10%] only with streaming: false")
    image_column: str = option("image", "column that holds the images; else all columns of type Image")
    max_bad_fraction: float = option(0.01, "fraction of bad images above which the run stops", minimum=0, maximum=1)
    transparent_background: str = option("white", "color behind transparent pixels: a name or #rrggbb")
    high_bit_depth: str = option(
        "full_range", "16-bit grayscale to 8: full_range, stretch (each image's own) or skip", choices=HIGH_BIT_DEPTH
    )
    pixel_range: tuple[float, ...] | None = option(
        None,
        "of images read as arrays, the values that become 0 and 1, as 0,4095; by default those of uint8 and uint16",
        num_values=(2,),
        ascending=True,
    )
    display_channels: tuple[int, ...] | None = option(
        None, "of figures: three channels as red, green, blue, or one as gray, from 0", minimum=0, num_values=(1, 3)
    )
    probe_dataset_name: str | None = option(None, "labeled set with two splits, to measure the features", path=True)
    probe_dataset_config_name: str | None = option(None, "its configuration, where it has several")
    probe_train_split: str = option("train", "its split to learn from")
    probe_test_split: str = option("test", "its split to be tested on")
    probe_label_column: str = option("label", "its column of class indices")
    probe_image_column: str | None = option(None, "its column of images; image_column if none")
    probe_every: int = option(
        0, "steps between k-NN tests on it; 0 measures before and after training only", minimum=0
    )
    dataloader_num_workers: int = option(0, "loader processes for each training process", minimum=0)
    shuffle_block_size: int = option(1024, "encoded images that a worker holds and shuffles at a time", minimum=1)

    data_on_device: bool | str = option(
        "auto", "decode all images once and keep them there; auto: if they fit a GPU", choices=("auto", True, False)
    )

    # Views
    num_views: int = option(2, "random crops of an image; 1 only without contrastive term", minimum=1)
    crop_scale: tuple[float, ...] = option(
        (0.2, 1.0),
        "range of the fraction of the image area that a crop covers",
        above=0,
        maximum=1,
        num_values=(2,),
        ascending=True,
    )
    crop_ratio: tuple[float, ...] = option(
        (0.75, 4 / 3), "range of a crop's width / height", above=0, num_values=(2,), ascending=True
    )
    resample: str = option("bilinear", "bilinear or bicubic", choices=("bilinear", "bicubic"))
    flip_probability: float = option(0.5, "of a horizontal flip", minimum=0, maximum=1)
    vertical_flip_probability: float = option(0.0, "of a vertical flip", minimum=0, maximum=1)
    quarter_turn_probability: float = option(0.0, "of a turn by 90 degrees, of square views", minimum=0, maximum=1)
    color_jitter: tuple[float, ...] = option(
        (0.4, 0.4, 0.4, 0.1), "strength: brightness,contrast,saturation,hue", minimum=0, num_values=(4,)
    )
    color_jitter_probability: float = option(0.8, "of color jitter", minimum=0, maximum=1)
    grayscale_probability: float = option(0.2, "of losing the color", minimum=0, maximum=1)
    blur_probability: float = option(0.5, "of Gaussian blur", minimum=0, maximum=1)
    blur_sigma: tuple[float, ...] = option(
        (0.1, 2.0), "range of the blur's width in pixels", above=0, num_values=(2,), ascending=True
    )
    solarize_probability: float = option(0.0, "of inverting what is brighter than one half", minimum=0, maximum=1)
    measure_mean_std: bool = option(False, "measure image_mean and image_std on 1,000 images before training")
    image_mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "of the pixels in [0, 1], a number a channel")
    image_std: tuple[float, ...] = option(
        (0.229, 0.224, 0.225), "of the pixels in [0, 1], a number a channel", above=0
    )

    # Length: the first that is set counts
    max_steps: int | None = option(None, "optimizer updates", minimum=1)
    num_train_epochs: float | None = option(None, "passes over the data, where the number of images is known", above=0)
    num_train_samples: int | None = option(None, "images to see", minimum=1)

    # Start
    model_name_or_path: str | None = option(
        None, "weights to begin with: CAN, ViT-MAE, ViT, DINOv2, DINOv3, timm, .pth", path=True
    )
    layer_decay: float = option(
        1.0, "learning rate of an encoder block by that of the next; below 1 early ones stay near", above=0, maximum=1
    )
    frozen_encoder_ratio: float = option(
        0.0, "fraction of the steps, the first, in which only decoder and heads learn", minimum=0, below=1
    )

    # Optimization
    per_device_train_batch_size: int | str = option(
        128, "images of one step on one process; auto: what fits into a GPU", minimum=1
    )
    gradient_accumulation_steps: int = option(1, "batches of an optimizer step, one after the other", minimum=1)
    gradient_caching: bool = option(True, "accumulate with the contrastive loss over all of the step's images")
    base_learning_rate: float = option(2.5e-4, "for 256 images a step; scaled linearly with the global batch", above=0)
    warmup_ratio: float = option(0.05, "fraction of the steps with linear warm-up", minimum=0, maximum=1)
    weight_decay: float = option(0.05, "AdamW, on matrices only", minimum=0)
    adam_beta1: float = option(0.9, "AdamW", minimum=0, below=1)
    adam_beta2: float = option(0.95, "AdamW", minimum=0, below=1)
    max_grad_norm: float = option(0.0, "clip the gradient norm; 0 does not clip", minimum=0)
    on_nonfinite: str = option(
        "stop", "stop or skip: what follows a gradient that is not finite; no update does", choices=("stop", "skip")
    )
    mixed_precision: str = option(
        "auto", "no, bf16, or auto: bf16 on GPUs that have it, never on CPU", choices=("auto", "no", "bf16")
    )
    tf32: bool = option(True, "products of what is left in fp32 in TF32, on GPUs that have it")
    gradient_checkpointing: bool = option(False, "compute each block's activations twice instead of keeping them")
    torch_compile: bool | str = option(
        "auto",
        "true: the blocks; model; cudagraph; auto: the blocks on a GPU",
        choices=("auto", True, False, "model", "cudagraph"),
    )
    seed: int = option(0, "of weights, order, crops, noise and masks", minimum=0)

    # Output
    output_dir: str = option("out", "folder for weights, card, figures and results", path=True)
    overwrite_output_dir: bool = option(False, "replace a finished run in output_dir")
    save_steps: int = option(1000, "steps between checkpoints", minimum=1)
    save_total_limit: int = option(2, "checkpoints to keep, the newest; with probe_every also the best", minimum=1)
    resume_from_checkpoint: str | None = option(
        None, "a folder checkpoints/step-N, or latest: that of output_dir", path=True
    )
    logging_steps: int = option(20, "steps between lines of metrics.jsonl", minimum=1)
    log_with: str | None = option("tensorboard", "trackers, by accelerate's names, comma-separated; or none")
    license: str | None = option(None, "of the weights, for the card: apache-2.0, cc-by-nc-4.0, other, ...")
    preflight: bool = option(False, "check data, model and machine in a minute instead of training")

    # The Hub, under transformers' names where it has one
    push_to_hub: bool = option(False, "upload the output folder to the Hub, with the token of `hf auth login`")
    hub_model_id: str | None = option(None, "repository, NAME or ORGANIZATION/NAME; the output folder's name if none")
    hub_private: bool = option(False, "the repository is, or is made, private")
    hub_strategy: str = option(
        "every_save",
        "end, every_save, or checkpoint: with it also the newest checkpoint",
        choices=("end", "every_save", "checkpoint"),
    )

    @property
    def length(self) -> str | None:
        """The field that says how long the run is."""
        return next((name for name in LENGTH if getattr(self, name) is not None), None)

    @property
    def decoding(self) -> dict:
        """What `data.decoding.decode` is told other than it does by default."""
        return {name: getattr(self, name) for name, usual in DECODING.items() if getattr(self, name) != usual}

    @property
    def reads_arrays(self) -> bool:
        """Whether the images are read as arrays (`data.arrays`)."""
        return reads_arrays((self.given or {}).get("num_channels", self.config.num_channels), self.pixel_range)

    def __post_init__(self):
        expand_paths(self)
        check(self)
        check_color(self.transparent_background)
        if sum(map(bool, (self.dataset_name, self.data_dir, self.data_files))) > 1:
            raise ValueError(
                "give one source: dataset_name, data_dir or data_files "
                f"(got {self.dataset_name!r}, {self.data_dir!r}, {self.data_files!r})"
            )
        if self.frozen_encoder_ratio and not self.model_name_or_path:
            raise ValueError(
                f"frozen_encoder_ratio={self.frozen_encoder_ratio}, but there are no weights to keep: set "
                "model_name_or_path, or frozen_encoder_ratio 0"
            )
        if self.given is not None:
            return
        if self.length is None:
            raise ValueError("the length is open; set max_steps, num_train_epochs or num_train_samples")
        if self.probe_every and not self.probe_dataset_name:
            raise ValueError(f"probe_every={self.probe_every} needs a labeled set; give probe_dataset_name")
        if isinstance(self.per_device_train_batch_size, str) and self.per_device_train_batch_size != "auto":
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size!r} is neither a number nor auto"
            )
        if self.frozen_encoder_ratio and self.frozen_encoder_ratio + self.warmup_ratio >= 1:
            raise ValueError(
                f"frozen_encoder_ratio={self.frozen_encoder_ratio} and warmup_ratio={self.warmup_ratio} take all "
                "steps, so that the encoder never has its learning rate; lower one of them"
            )
        self._check_views()
        self._check_compilation()
        self._check_hub()

    def _check_views(self):
        if self.num_views == 1 and self.config.contrastive_loss_weight > 0:
            raise ValueError("num_views=1 must be at least 2, or contrastive_loss_weight 0: views are contrasted")
        self._check_arrays()
        if self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter={self.color_jitter} turns the hue by more than 0.5, half a circle")
        height, width = self.config.image_shape
        if self.quarter_turn_probability > 0 and height != width:
            raise ValueError(
                f"quarter_turn_probability={self.quarter_turn_probability} turns square views, and "
                f"image_size={height},{width} is not square; set image_size to one number, or "
                "quarter_turn_probability to 0"
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != self.config.num_channels and not self.measure_mean_std:
                raise ValueError(
                    f"{name}={values} must have {self.config.num_channels} values, one for each channel; "
                    "--measure_mean_std finds them"
                )

    def _check_arrays(self):
        num_channels = self.config.num_channels
        if self.pixel_range:
            check_pixel_range(self.pixel_range)
        for channel in self.display_channels or ():
            if channel >= num_channels:
                raise ValueError(
                    f"display_channels={self.display_channels} has a {channel}, and num_channels={num_channels}; "
                    f"use 0 to {num_channels - 1}"
                )
        for name in ("transparent_background", "high_bit_depth"):
            if self.reads_arrays and getattr(self, name) != DECODING[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for RGB and gray images of 8 bits, and with num_channels="
                    f"{num_channels} and pixel_range={self.pixel_range} they are read as arrays; leave it out"
                )

    def _check_compilation(self):
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

    def _check_hub(self):
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
                    f"hub_model_id={self.repo_id!r}; give --hub_model_id NAME or ORGANIZATION/NAME: {error}"
                ) from error

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
        if self.model_name_or_path and Path(self.model_name_or_path).exists():
            # An evaluation in another place would take a relative path for a repository on the Hub
            values["model_name_or_path"] = str(Path(self.model_name_or_path).absolute())
        values |= {f.name: getattr(self.config, f.name) for f in model_fields()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_yaml(self) -> str:
        """`to_dict` as a recipe file; what was chosen, and why, as comments at its top."""
        comments = "".join(f"# {line}\n" for line in self.chosen)
        return comments + yaml.safe_dump(self.to_dict(), sort_keys=False, width=119)

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """
        Raises:
            ValueError: for a key that is neither a training nor a model field (the nearest one is named), or a value
                of the wrong type.
        """
        parsed = parse_values(values, [*training_fields(), *model_fields()])
        model_names = {f.name for f in model_fields()}
        config = CANConfig(**{key: value for key, value in parsed.items() if key in model_names})
        return cls(config=config, **{key: value for key, value in parsed.items() if key not in model_names})


def training_fields() -> list[dataclasses.Field]:
    """The fields of `Recipe` that are keys: all but its own bookkeeping."""
    return [f for f in dataclasses.fields(Recipe) if "option" in f.metadata]


def model_fields() -> list[dataclasses.Field]:
    """The fields that `CANConfig` itself declares, without those of every transformers configuration."""
    return [f for f in dataclasses.fields(CANConfig) if f.name in CANConfig.__annotations__ and f.name != "model_type"]


def parse_arguments(
    argv: list[str] | None, description: str, program: str | None = None, has_dataset: bool = False
) -> Recipe:
    """
    `[RECIPE] [--key value ...]` -> Recipe, as `make_recipe`; the command line counts last. A flag without a value is
    `true`.

    Raises:
        ValueError: as `make_recipe`.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [RECIPE] [--key value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = f"a YAML file, or one of {', '.join(presets())}; without one, settings are chosen for your images"
    parser.add_argument("recipe", nargs="?", help=text)
    arguments, overrides = read_flags(parser, _groups(), argv)
    return make_recipe(arguments.recipe, overrides, has_dataset)


def make_recipe(recipe: str | Path | dict | None, overrides: dict, has_dataset: bool = False) -> Recipe:
    """
    What `presets.merged` gives, checked; where the settings are to be chosen (`presets.recipe_for`), a recipe in which
    they are open. A recipe that begins with weights and says nothing of the encoder gets the encoder of the weights.

    Raises:
        ValueError: as `Recipe.from_dict` and `presets.merged`.
    """
    recipe = recipe_for(recipe, overrides, has_dataset)
    if recipe is None:
        return _open_recipe(overrides)
    values = merged(recipe, overrides)
    says_nothing = not any(name in merged(recipe, {}) for name in ENCODER_FIELDS if name != "num_channels")
    if says_nothing and values.get("model_name_or_path") not in (None, "none"):
        values = {**_of_start(values), **values}
    return Recipe.from_dict(values)


def _of_start(values: dict) -> dict:
    """
    Encoder, decoder, heads and normalization of the weights, and the learning rate for that width; or those of the run
    that goes on, which began with them.
    """
    known = begun(values.get("resume_from_checkpoint"), values.get("output_dir", "out"))
    if known:
        return {name: value for name, value in merged(known, {}).items() if name in OF_START}
    values = parse_values(values, [*training_fields(), *model_fields()])
    found = sizes_of_start(str(Path(values["model_name_or_path"]).expanduser()), values)
    rate, _ = rate_of(values.get("hidden_size", found["hidden_size"]))
    return {**found, "base_learning_rate": rate}


def _open_recipe(overrides: dict) -> Recipe:
    given = parse_values(current_names(overrides), [*training_fields(), *model_fields()])
    given["output_dir"] = output_dir(overrides)
    names = {f.name for f in training_fields()}
    return Recipe(config=CANConfig(), given=given, **{name: value for name, value in given.items() if name in names})


def _groups() -> dict[str, list[dataclasses.Field]]:
    """The fields as `--help` shows them, a group after the other."""
    groups, group = {}, None
    for f in training_fields():
        group = _FIRST_OF_GROUP.get(f.name, group)
        groups.setdefault(group, []).append(f)
    return groups | {"model": model_fields()}
