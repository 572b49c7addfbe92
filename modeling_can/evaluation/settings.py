"""What an evaluation is asked for: every setting is a flag."""

import argparse
import dataclasses
import re
from dataclasses import dataclass

from huggingface_hub.constants import HF_HOME

from ..data.arrays import check_pixel_range
from ..data.decoding import DECODING, HIGH_BIT_DEPTH, check_color
from ..fields import check, expand_paths, option, parse_values, read_flags
from .encoders import POOLINGS
from .entries import BASELINES
from .few_shot import SHOTS
from .finetuning import FineTuning
from .linear_sgd import BASE_LEARNING_RATES
from .robustness import GROUPS
from .sets import HELD_OUT
from .tasks import ALONE, TASKS


__all__ = ["Settings", "make_settings", "parse", "prefixed"]


@dataclass
class Settings:
    """Everything but the settings of the two tasks that train, which have a class of their own."""

    model_name_or_path: tuple[str, ...] = option(
        (), "folders or Hub ids of the models to measure, side by side", required=True, path=True
    )
    task: tuple[str, ...] = option(("knn", "linear_probe"), f"any of {', '.join(TASKS)}", choices=TASKS)
    output_dir: str = option("out/eval", "folder for results.json, figures and fine-tuned models", path=True)

    # Data
    dataset_name: str | None = option(
        None, "labeled set: a Hub id, a folder of parquet shards or of class folders", path=True
    )
    dataset_config_name: str | None = option(None, "its configuration, where it has several")
    train_split: str = option("train", "split to learn from, or a slice: train[:80%]")
    test_split: str = option("test", "split to be tested on")
    test_size: float | None = option(
        None,
        f"fraction of the training split to be tested on; {HELD_OUT} where that is the only split",
        minimum=0,
        below=1,
    )
    image_column: str = option("image", "column that holds the images")
    label_column: str | None = option(None, "column that holds the classes (label); of embed, one to carry along")

    mask_column: str = option("mask", "segmentation: column that holds the masks, PNGs of class indices")
    ignore_index: int = option(
        255, "segmentation: value of the mask's pixels that do not count; -1 for none", minimum=-1
    )

    # Models
    processor_name_or_path: str | None = option(None, "where the image processor is, if not with the model", path=True)
    image_size: tuple[int, ...] | None = option(
        None, "height,width of the model's input, instead of the processor's", num_values=(1, 2)
    )
    transparent_background: str | None = option(None, "color behind transparent pixels; by default as pre-trained")
    high_bit_depth: str | None = option(
        None, "16-bit grayscale to 8: full_range, stretch, skip; as pre-trained", choices=HIGH_BIT_DEPTH
    )
    pixel_range: tuple[float, ...] | None = option(
        None, "values that become 0 and 1 of images read as arrays; as pre-trained", num_values=(2,), ascending=True
    )
    pooling: str = option("mean", "features: mean of the patch tokens, cls token, or both", choices=POOLINGS)
    baselines: tuple[str, ...] | None = option(
        BASELINES,
        "to compare with: pixels, untrained, start (the model that the run began from); or none",
        choices=BASELINES,
    )
    trust_remote_code: bool = option(False, "run code that comes with a model from the Hub")

    # Work
    batch_size: int = option(256, "images at a time on one process", minimum=1)
    dataloader_num_workers: int = option(0, "loader processes for each process", minimum=0)
    mixed_precision: str = option(
        "auto", "no, bf16, or auto: bf16 on GPUs that have it, never on CPU", choices=("auto", "no", "bf16")
    )
    feature_cache: str | None = option(
        f"{HF_HOME}/modeling-can/features", "folder of extracted features, or none", path=True
    )
    seed: int = option(0, "of splits, draws, intervals, noise and training", minimum=0)
    export_classifier: str | None = option(
        None, "new folder for the probe or fine-tuned model, to classify with", path=True
    )
    update_card: bool = option(False, "merge the results into the README.md of each model folder")

    # linear_probe_sgd
    sgd_num_epochs: int = option(10, "linear_probe_sgd: passes over the training images", minimum=1)
    sgd_batch_size: int = option(256, "linear_probe_sgd: images of one step, of all processes together", minimum=1)
    sgd_base_learning_rates: tuple[float, ...] = option(
        BASE_LEARNING_RATES, "linear_probe_sgd: for 256 images a step", above=0, required=True
    )
    sgd_layers: tuple[int, ...] = option(
        (1, 4), "linear_probe_sgd: how many of the last blocks, side by side", minimum=1, required=True
    )

    # few_shot, robustness
    shots: tuple[str, ...] = option(SHOTS, "labeled images of every class, or their share")
    num_draws: int = option(5, "draws of the labeled images, for mean and spread", minimum=1)
    corruptions: tuple[str, ...] = option(GROUPS, "groups of common corruptions", choices=GROUPS)
    reference_model: str | None = option(
        None, "model or baseline to compare with: corruption errors, segmentation", path=True
    )
    further_sets: str | None = option(
        None, "YAML of further labeled sets with some of the classes; see docs/evaluation.md", path=True
    )

    # embed: the source is dataset_name, data_dir or data_files
    data_dir: str | None = option(None, "embed: any folder of images", path=True)
    data_files: str | None = option(
        None, "embed: paths, globs or URLs of parquet, WebDataset tar, arrow, jsonl", path=True
    )
    dataset_split: str = option("train", "embed: split of dataset_name")
    streaming: bool = option(True, "embed: read while embedding; false: download all of it first")
    id_column: str | None = option(None, "embed: column of unique ids; else the path or shard:row")
    embedding_dtype: str = option("float16", "embed: float16 or float32", choices=("float16", "float32"))
    rows_per_file: int = option(
        100_000, "embed: most rows of a file, which is what a kill can cost a process", minimum=1
    )
    max_bad_fraction: float = option(0.01, "embed: fraction of bad images above which it stops", minimum=0, maximum=1)

    def __post_init__(self):
        expand_paths(self)
        check(self)
        if self.transparent_background:
            check_color(self.transparent_background)
        if self.pixel_range:
            check_pixel_range(self.pixel_range)
        for shots in self.shots:
            if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?%", shots):
                raise ValueError(f"shots={shots!r} must be a number of images, such as 5, or a share, such as 10%")
        for task in ALONE:
            if task in self.task and len(self.task) > 1:
                raise ValueError(f"{task} stands alone; got task={','.join(self.task)}")
        if "embed" in self.task and len(self.model_name_or_path) > 1:
            raise ValueError(f"embed takes one model; got {', '.join(self.model_name_or_path)}")
        if self.export_classifier:
            if not {"linear_probe", "finetune"} & set(self.task):
                raise ValueError(f"export_classifier needs --task linear_probe or finetune; got {','.join(self.task)}")
            if len(self.model_name_or_path) > 1:
                raise ValueError("export_classifier takes one model; give one --model_name_or_path")
        if "embed" not in self.task and not self.dataset_name:
            raise ValueError("give --dataset_name: Hub id, folder of parquet shards or class folders, or sample_data")

    @property
    def decoding(self) -> dict:
        """What `data.decoding.decode` is told other than the model's processor says."""
        return {name: getattr(self, name) for name in DECODING if getattr(self, name)}

    @property
    def image_shape(self) -> tuple[int, int] | None:
        return self.image_size and (self.image_size[0], self.image_size[-1])


def prefixed(kind: type, prefix: str) -> list[dataclasses.Field]:
    """The fields of a class of settings, under the names of their flags."""
    renamed = []
    for f in dataclasses.fields(kind):
        copy = dataclasses.field(default=f.default, metadata=f.metadata)
        copy.name, copy.type = f"{prefix}_{f.name}", f.type
        renamed.append(copy)
    return renamed


def parse(
    argv: list[str] | None, description: str | None = None, program: str | None = None
) -> tuple[Settings, FineTuning]:
    """The settings of a command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--key value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _, values = read_flags(parser, _groups(), argv)
    return make_settings(values)


def _groups() -> dict[str, list[dataclasses.Field]]:
    return {"evaluation": list(dataclasses.fields(Settings)), "finetune": prefixed(FineTuning, "finetune")}


def make_settings(values: dict) -> tuple[Settings, FineTuning]:
    """The settings of values by the names of the flags. Raises ValueError as the classes do, and for unknown names."""
    values = parse_values(values, [f for fields in _groups().values() for f in fields])
    training = {name.removeprefix("finetune_"): v for name, v in values.items() if name.startswith("finetune_")}
    settings = {name: value for name, value in values.items() if not name.startswith("finetune_")}
    return Settings(**settings), FineTuning(**training)
