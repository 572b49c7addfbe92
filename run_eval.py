"""
Measures vision encoders: any that transformers can load, on any labelled set that `datasets.load_dataset` reads.

    python run_eval.py --model_name_or_path out/can-quickstart --dataset_name sample_data --output_dir out/eval
    python run_eval.py --model_name_or_path MINE OTHERS --task knn,linear_probe,few_shot --dataset_name FOLDER ...
    accelerate launch run_eval.py --model_name_or_path MINE --task finetune --dataset_name FOLDER ...
    python run_eval.py --model_name_or_path MINE --task linear_probe --dataset_name FOLDER --export_classifier DIR
    accelerate launch run_eval.py --model_name_or_path MINE --task embed --data_files 'shards/*.parquet' ...

Tasks: knn, linear_probe, linear_probe_sgd, few_shot, finetune, robustness, reconstruction, retrieval; and embed, which
needs no labels and stands alone. Every setting is a flag; `--help` lists them all.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from datasets import ClassLabel, ReadInstruction, Value, load_dataset
from huggingface_hub import EvalResult
from huggingface_hub.constants import HF_HOME
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, AutoModelForPreTraining
from transformers.utils import is_peft_available

from modeling_can import CANConfig
from modeling_can.conversion import accept_colours, can_config, check_dinov2, to_can, to_dinov2
from modeling_can.data import ImageSource
from modeling_can.evaluation.classifier import class_predictions
from modeling_can.evaluation.embedding import embed, totals
from modeling_can.evaluation.encoders import (
    POOLINGS,
    Encoder,
    Preprocessor,
    classifier_class,
    load_encoder,
    load_model,
    pooled,
    untrained,
)
from modeling_can.evaluation.features import Pictures, Processes, cached, extract, raw_pixels
from modeling_can.evaluation.few_shot import SHOTS, draw_shots, few_shot_predictions
from modeling_can.evaluation.finetuning import FineTuning, finetune
from modeling_can.evaluation.knn import knn_predictions, nearest_neighbours
from modeling_can.evaluation.linear import LinearClassifier, linear_probe
from modeling_can.evaluation.linear_sgd import BASE_LEARNING_RATES, linear_probe_sgd
from modeling_can.evaluation.robustness import (
    GROUPS,
    SEVERITIES,
    Corrupted,
    accuracy_by_corruption,
    corrupted_predictions,
    corruption_error,
    corruptions_by_group,
    load_further_sets,
)
from modeling_can.evaluation.scores import bootstrap_interval
from modeling_can.evaluation.sets import LabelledSet, Split, load_labelled
from modeling_can.files import write
from modeling_can.folders import expand_user, load_arguments, resolve_name
from modeling_can.hub import check_new_folder, classifier_card, new_folder, run_facts, short_name, update_card
from modeling_can.metrics import Accuracy
from modeling_can.progress import quiet, report_errors
from modeling_can.recipe import INSTALL, load_yaml, option, parse_value, read_flags
from modeling_can.rendezvous import INIT_METHOD
from modeling_can.training import mixed_precision
from modeling_can.views import DECODING, check_decoding, decode
from modeling_can.visualization import (
    evaluation_figure,
    reconstruction_errors,
    reconstruction_sheet,
    retrieval_sheet,
)


TASKS = ("knn", "linear_probe", "linear_probe_sgd", "few_shot", "finetune", "robustness", "reconstruction",
         "retrieval", "embed")  # fmt: skip
FROZEN = ("knn", "linear_probe", "few_shot")  # which the baselines take
ON_FEATURES = (*FROZEN, "retrieval")  # of the frozen encoder, extracted once
BASELINES = ("pixels", "untrained")
PATHS = ("model_name_or_path", "output_dir", "dataset_name", "processor_name_or_path", "feature_cache",
         "export_classifier", "reference_model", "further_sets", "data_dir", "data_files")  # fmt: skip
CAPTION = "in % or dB; ± half the 95 % interval over the test images, of labels a class the deviation of the draws"
NUM_EXAMPLES = 3  # pictures beside an exported classifier
QUERIES, SHOWN = 8, 7  # of the retrieval sheet: rows, and neighbours in each


@dataclass
class Settings:
    """Everything but the settings of the two tasks that train, which have a class of their own."""

    model_name_or_path: tuple[str, ...] = option((), "folders or Hub ids of the models to measure, side by side")
    task: tuple[str, ...] = option(("knn", "linear_probe"), f"any of {', '.join(TASKS)}")
    output_dir: str = option("out/eval", "folder for results.json, figures and fine-tuned models")

    # Data
    dataset_name: str | None = option(None, "labelled set: a Hub id, a folder of parquet shards or of class folders")
    dataset_config_name: str | None = option(None, "its configuration, where it has several")
    train_split: str = option("train", "split to learn from, or a slice: train[:80%]")
    test_split: str = option("test", "split to be tested on")
    test_size: float = option(0.0, "without a test split, the share of the training split to hold out")
    image_column: str = option("image", "column that holds the images")
    label_column: str | None = option(None, "column that holds the classes (label); of embed, one to carry along")

    # Models
    processor_name_or_path: str | None = option(None, "where the image processor is, if not with the model")
    image_size: tuple[int, ...] | None = option(None, "height,width of the model's input, instead of the processor's")
    transparent_background: str | None = option(None, "colour behind transparent pixels; by default as pre-trained")
    high_bit_depth: str | None = option(None, "16-bit greyscale to 8: full_range, stretch, skip; as pre-trained")
    pooling: str = option("mean", "features: mean of the patch tokens, cls token, or both")
    baselines: tuple[str, ...] | None = option(BASELINES, "to compare with: pixels, untrained; or none")
    trust_remote_code: bool = option(False, "run code that comes with a model from the Hub")

    # Work
    batch_size: int = option(256, "images at a time on one process")
    dataloader_num_workers: int = option(0, "loader processes for each process")
    mixed_precision: str = option("auto", "no, bf16, or auto: bf16 on GPUs that have it, never on CPU")
    feature_cache: str | None = option(f"{HF_HOME}/modeling-can/features", "folder of extracted features, or none")
    seed: int = option(0, "of splits, draws, intervals, noise and training")
    export_classifier: str | None = option(None, "new folder for the probe or fine-tuned model, to classify with")
    update_card: bool = option(False, "merge the results into the README.md of each model folder")

    # linear_probe_sgd
    sgd_num_epochs: int = option(10, "linear_probe_sgd: passes over the training images")
    sgd_batch_size: int = option(256, "linear_probe_sgd: images of one step, of all processes together")
    sgd_base_learning_rates: tuple[float, ...] = option(BASE_LEARNING_RATES, "linear_probe_sgd: for 256 images a step")
    sgd_layers: tuple[int, ...] = option((1, 4), "linear_probe_sgd: how many of the last blocks, side by side")

    # few_shot, robustness
    shots: tuple[str, ...] = option(SHOTS, "labelled images of every class, or their share")
    num_draws: int = option(5, "draws of the labelled images, for mean and spread")
    corruptions: tuple[str, ...] = option(GROUPS, "groups of common corruptions")
    reference_model: str | None = option(None, "model or baseline that corruption errors are relative to")
    further_sets: str | None = option(None, "YAML of further labelled sets with some of the classes; see README")

    # embed: the source is dataset_name, data_dir or data_files
    data_dir: str | None = option(None, "embed: any folder of images")
    data_files: str | None = option(None, "embed: paths, globs or URLs of parquet, WebDataset tar, arrow, jsonl")
    dataset_split: str = option("train", "embed: split of dataset_name")
    streaming: bool = option(True, "embed: read while embedding; false: download all of it first")
    id_column: str | None = option(None, "embed: column of unique ids; else the path or shard:row")
    embedding_dtype: str = option("float16", "embed: float16 or float32")
    rows_per_file: int = option(100_000, "embed: most rows of a file, which is what a kill can cost a process")
    max_bad_fraction: float = option(0.01, "embed: share of bad images above which it stops")

    def __post_init__(self):
        for name in PATHS:
            setattr(self, name, expand_user(getattr(self, name)))
        if not self.model_name_or_path:
            raise ValueError("give --model_name_or_path: folders or Hub ids")
        known = {"task": TASKS, "baselines": BASELINES, "corruptions": GROUPS}
        for name, choices in known.items():
            for value in getattr(self, name) or ():
                if value not in choices:
                    raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
        for name, choices in {"pooling": POOLINGS, "embedding_dtype": ("float16", "float32")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("batch_size", "num_draws", "rows_per_file", "sgd_num_epochs", "sgd_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_decoding(**self.decoding)
        if not 0 <= self.test_size < 1:
            raise ValueError(f"test_size={self.test_size} is outside [0, 1)")
        if not self.sgd_layers or min(self.sgd_layers) < 1:
            raise ValueError(f"sgd_layers={self.sgd_layers} must be numbers of blocks, at least 1")
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise ValueError(f"image_size={self.image_size} must be one number, or height,width")
        for shots in self.shots:
            if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?%", shots):
                raise ValueError(f"shots={shots!r} must be a number of images, such as 5, or a share, such as 10%")
        if "embed" in self.task:
            if len(self.task) > 1 or len(self.model_name_or_path) > 1:
                raise ValueError(f"embed stands alone, with one model; got task={','.join(self.task)}")
        if self.export_classifier:
            if not {"linear_probe", "finetune"} & set(self.task):
                raise ValueError(f"export_classifier needs --task linear_probe or finetune; got {','.join(self.task)}")
            if len(self.model_name_or_path) > 1:
                raise ValueError("export_classifier takes one model; give one --model_name_or_path")
        if "embed" not in self.task and not self.dataset_name:
            raise ValueError("give --dataset_name: Hub id, folder of parquet shards or class folders, or sample_data")

    @property
    def decoding(self) -> dict:
        """What `views.decode` is told other than the model's processor says."""
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


def parse(argv: list[str] | None) -> tuple[Settings, FineTuning]:
    groups = {"evaluation": list(dataclasses.fields(Settings)), "finetune": prefixed(FineTuning, "finetune")}
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, values = read_flags(parser, groups, argv)
    types = {f.name: f.type for fields in groups.values() for f in fields}
    values = {name: parse_value(name, value, types[name]) for name, value in values.items()}
    training = {name.removeprefix("finetune_"): v for name, v in values.items() if name.startswith("finetune_")}
    settings = {name: value for name, value in values.items() if not name.startswith("finetune_")}
    return Settings(**settings), FineTuning(**training)


@dataclass
class Entry:
    """
    A column of the results: a model or a baseline.

    Args:
        name (`str`): Its heading.
        preprocessor (`Preprocessor`): Makes its pictures.
        encode (callable): Prepared pictures -> pooled features by name, as `Encoder` returns them.
        digest (`str`): What `encode` depends on.
        path (`str`, *optional*): Of a model, where it came from.
        encoder (`Encoder`, *optional*): All but the raw pixels have one.
    """

    name: str
    preprocessor: Preprocessor
    encode: Callable
    digest: str
    path: str | None = None
    encoder: Encoder | None = None


class Evaluation:
    """
    The tasks. Each is called by all processes, and returns its figures on the first one.

    Args:
        settings (`Settings`), fine_tuning (`FineTuning`): What to do.
        accelerator (`Accelerator`): The processes and the device.
        data (`LabelledSet`): What to measure on.
    """

    def __init__(self, settings: Settings, fine_tuning: FineTuning, accelerator: Accelerator, data: LabelledSet):
        self.settings, self.fine_tuning, self.accelerator, self.data = settings, fine_tuning, accelerator, data
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self.processes = Processes(accelerator.process_index, accelerator.num_processes, gather_object)
        self.output_dir, self.num_classes = Path(settings.output_dir), len(data.class_names)
        self.accuracy = Accuracy() if self.is_main else None
        self.probes: dict[str, LinearClassifier] = {}  # by the name of the entry
        with accelerator.local_main_process_first():
            further = settings.further_sets if "robustness" in settings.task else None
            self.further_sets = load_further_sets(further, data.class_names) if further else {}

    # --- Entries -----------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """The baselines, then the models."""
        settings, baselines, models = self.settings, [], []
        wanted_baselines = {*(settings.baselines or ()), settings.reference_model}
        paths = [os.path.normpath(path) for path in settings.model_name_or_path]
        if settings.reference_model not in (None, *BASELINES):
            paths.append(os.path.normpath(settings.reference_model))
        paths = list(dict.fromkeys(paths))
        names = [Path(path).resolve().name if Path(path).is_dir() else path for path in paths]
        for path, name in zip(paths, names, strict=True):
            with self.accelerator.local_main_process_first():  # which downloads it
                encoder = load(path, settings)
            models.append(self.entry(encoder, path if names.count(name) > 1 or name in BASELINES else name, path))
            fresh = untrained(encoder, settings.seed)
            if "untrained" in wanted_baselines and fresh.digest() not in [b.digest for b in baselines]:
                baselines.append(self.entry(fresh, f"untrained ({name})"))
        if len(baselines) == 1:
            baselines[0].name = "untrained"
        if "pixels" in wanted_baselines:
            preprocessor = models[0].preprocessor
            encode = lambda pictures: {"mean": raw_pixels(preprocessor.normalise(pictures))}  # noqa: E731
            baselines.insert(0, Entry("pixels", preprocessor, encode, "pixels"))
        return baselines + models

    def check(self, entry: Entry, tasks: list[str]):
        """Raises ValueError for what a task would refuse, before anything takes time."""
        if "reconstruction" in tasks:
            config, size = entry.encoder.model.config, entry.preprocessor.image_size
            if config.model_type != "can" or not config.uses_decoder:
                raise ValueError(
                    "the reconstruction task needs a CAN that was trained to reconstruct or to denoise, and "
                    f"{entry.name} is {'one that was not' if config.model_type == 'can' else f'a {config.model_type}'}"
                )
            if size != config.image_shape or not entry.preprocessor.in_two_steps:
                raise ValueError(
                    f"the reconstruction task needs the size that {entry.name} was trained at, {config.image_shape}, "
                    f"and not {size}; leave out --image_size"
                )
        if "finetune" in tasks:
            folder = self.finetuned(entry.name)
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"{folder} is not empty; give another --output_dir, or remove it")
            if self.fine_tuning.lora_rank and not is_peft_available():
                raise ValueError(f"lora_rank needs a package that is not installed: {INSTALL.format('lora')}")
        if self.settings.export_classifier and self.is_exported(entry):
            self.check_export(entry)
        if "robustness" in tasks:
            names = [name for names in corruptions_by_group(self.settings.corruptions).values() for name in names]
            Corrupted(entry.preprocessor, names)
        is_ours = entry.path and is_listed(entry.path, self.settings)
        if self.settings.update_card and is_ours and not Path(entry.path).is_dir():
            raise ValueError(
                f"update_card: {entry.path} is no folder; download the model (hf download {entry.path} --local-dir "
                "FOLDER), measure that, and upload its README.md"
            )

    def entry(self, encoder: Encoder, name: str, path: str | None = None) -> Entry:
        digest = encoder.digest()
        encoder.to(self.device)

        def encode(pictures):
            with self.accelerator.autocast():
                return encoder(encoder.preprocessor.normalise(pictures.to(self.device, non_blocking=True)))

        return Entry(name, encoder.preprocessor, encode, digest, path, encoder)

    # --- What the tasks share ----------------------------------------------------------------------------------------

    def features(self, entry: Entry, split: Split) -> np.ndarray | None:
        """Pooled features of a split, from the cache where they are."""
        facts = {
            "weights": entry.digest,
            "preprocessing": entry.preprocessor.facts(),
            "data": (split.pictures._fingerprint, len(split)),
            "precision": (self.device.type, self.accelerator.mixed_precision),
        }
        pictures = Pictures(split, entry.preprocessor.decode)
        make = partial(self.extract, entry.encode, pictures, f"{entry.name}: {split.name}")
        made = cached(self.settings.feature_cache, facts, make, self.processes)
        if made is None:
            return None
        features = pooled(made, self.settings.pooling if entry.encoder else "mean", entry.name)
        if not np.isfinite(features).all():
            raise ValueError(f"{entry.name} gives features that are not finite; try --mixed_precision no")
        return features

    def extract(self, encode, pictures: Pictures, description: str) -> dict[str, np.ndarray] | None:
        settings = self.settings
        bar = partial(self.progress, description=description)
        return extract(encode, pictures, settings.batch_size, settings.dataloader_num_workers, self.processes, bar)

    def progress(self, rounds, description: str, unit: str = "batch"):
        """A bar, or where there is no terminal a line every half minute."""
        bar = tqdm(
            rounds, description, unit=unit, dynamic_ncols=True, disable=not self.is_main or not sys.stderr.isatty()
        )
        told = time.monotonic()
        for index, item in enumerate(bar):
            yield item
            if self.is_main and bar.disable and time.monotonic() - told > 30:
                told = time.monotonic()
                print(f"{description}: {index + 1} of {len(rounds)}", flush=True)

    def score(self, predictions: np.ndarray, labels: np.ndarray | None = None) -> dict:
        """Accuracy and its interval."""
        labels = self.data.test.labels if labels is None else labels
        interval = bootstrap_interval(predictions == labels, self.settings.seed)
        return {**self.accuracy.compute(predictions=predictions, references=labels), "interval": interval}

    # --- Tasks on features -------------------------------------------------------------------------------------------

    def knn(self, entry: Entry, train: np.ndarray, test: np.ndarray) -> dict:
        labels = self.data.train.labels
        predictions = knn_predictions(train, labels, test, self.num_classes, device=self.device)
        return {str(k): self.score(predicted) for k, predicted in predictions.items()}

    def linear_probe(self, entry: Entry, train: np.ndarray, test: np.ndarray) -> dict:
        self.probes[entry.name] = probe = self.fit_probe(train)
        return {
            **self.score(probe.predict(test)),
            "C": probe.inverse_penalty,
            "held_out_accuracy": probe.held_out_accuracy,
        }

    def fit_probe(self, train: np.ndarray) -> LinearClassifier:
        return linear_probe(train, self.data.train.labels, self.num_classes, self.settings.seed, self.device)

    def few_shot(self, entry: Entry, train: np.ndarray, test: np.ndarray) -> dict:
        settings, labels, figures = self.settings, self.data.train.labels, {}
        for shots in settings.shots:
            draws = few_shot_predictions(
                train, labels, test, self.num_classes, shots, settings.num_draws, settings.seed, self.device
            )
            right = np.stack([predictions == self.data.test.labels for predictions in draws])
            accuracies = right.mean(axis=1)
            figures[shots] = {
                "accuracy": float(accuracies.mean()),
                "std": float(accuracies.std(ddof=1)) if len(draws) > 1 else None,
                "interval": bootstrap_interval(right.mean(axis=0), settings.seed),
                "draws": accuracies.tolist(),
            }
        return figures

    def retrieval(self, entry: Entry, train: np.ndarray, test: np.ndarray) -> dict:
        """The sheet, and the share of the neighbours that are of the query's class."""
        labels, (_, nearest) = self.data.test.labels, nearest_neighbours(train, test, SHOWN, self.device)
        right = self.data.train.labels[nearest] == labels[:, None]
        rows = np.random.default_rng(self.settings.seed).permutation(len(labels))[:QUERIES]
        draw = lambda split, row: entry.preprocessor.shown(split.read(row))  # noqa: E731
        path = self.output_dir / "figures" / f"retrieval-{file_name(entry.name)}.png"
        retrieval_sheet(
            torch.stack([draw(self.data.test, row) for row in rows]),
            torch.stack([torch.stack([draw(self.data.train, row) for row in nearest[query]]) for query in rows]),
            right[rows],
            [self.data.class_names[label] for label in labels[rows]],
            path,
        )
        share = right.mean(axis=1)
        interval = bootstrap_interval(share, self.settings.seed)
        return {"precision": float(share.mean()), "interval": interval, "neighbours": SHOWN, "picture": str(path)}

    # --- Tasks that train on pictures --------------------------------------------------------------------------------

    def linear_probe_sgd(self, entry: Entry) -> dict | None:
        settings, description = self.settings, f"{entry.name}: linear probe, SGD"
        loading = {"num_workers": settings.dataloader_num_workers, "processes": self.processes}
        with self.accelerator.autocast():
            probe = linear_probe_sgd(
                entry.encoder,
                self.data.train,
                self.num_classes,
                settings.sgd_num_epochs,
                settings.sgd_batch_size,
                settings.sgd_base_learning_rates,
                settings.sgd_layers,
                seed=settings.seed,
                gather=self.accelerator.gather,
                progress=partial(self.progress, description=description, unit="step"),
                **loading,
            )
            progress = partial(self.progress, description=description)
            predictions = probe.predict(self.data.test, batch_size=settings.batch_size, progress=progress, **loading)
        if predictions is None:
            return None
        return {**self.score(predictions), **probe.table[probe.chosen], "heads": probe.table}

    def finetune(self, entry: Entry) -> dict | None:
        settings, folder = self.settings, self.finetuned(entry.name)
        model, facts = finetune(
            entry.path,
            self.data.train,
            self.data.class_names,
            entry.preprocessor,
            self.accelerator,
            folder,
            self.fine_tuning,
            settings.seed,
            settings.dataloader_num_workers,
            settings.trust_remote_code,
        )
        with self.accelerator.autocast():
            predictions = class_predictions(
                model,
                entry.preprocessor,
                self.data.test,
                settings.batch_size,
                settings.dataloader_num_workers,
                self.processes,
                partial(self.progress, description=f"{entry.name}: fine-tuned"),
            )
        return None if predictions is None else {**self.score(predictions), "folder": str(folder), **facts}

    def finetuned(self, name: str) -> Path:
        """Where the fine-tuned model goes."""
        return self.output_dir / "finetuned" / file_name(name)

    # --- A classifier to use -----------------------------------------------------------------------------------------

    def is_exported(self, entry: Entry) -> bool:
        return entry.path == os.path.normpath(self.settings.model_name_or_path[0])

    def check_export(self, entry: Entry):
        folder, config = Path(self.settings.export_classifier).resolve(), entry.encoder.model.config
        if folder in (self.output_dir.resolve(), *self.output_dir.resolve().parents):
            raise ValueError(f"export_classifier={folder} is or holds output_dir; give a folder of its own")
        check_new_folder(folder)
        if "finetune" not in self.settings.task:
            check_dinov2(can_config(entry.path))
        elif config.model_type == "can":  # it is fine-tuned at this size
            check_dinov2(
                CANConfig(**{**can_config(entry.path).to_dict(), "image_size": entry.preprocessor.image_size})
            )
        elif "auto_map" in config.to_dict():
            raise ValueError(
                f"export_classifier: {entry.name} has code of its own, without which it could not be loaded; export a "
                "probe instead (--task linear_probe), or use what --task finetune leaves"
            )

    def export(self, entry: Entry, results: dict) -> dict:
        """
        Writes the fine-tuned model, or else the encoder with the probe on it, as a model that transformers loads by
        itself, with processor, card and example pictures; all or nothing. Returns what it scores on the test images.
        """
        settings, data, folder = self.settings, self.data, Path(self.settings.export_classifier)
        is_tuned = "finetune" in settings.task
        with quiet():
            if is_tuned:
                path = str(self.finetuned(entry.name))
                is_ours = entry.encoder.model.config.model_type == "can"
                model = to_dinov2(to_can(path)) if is_ours else load_model(path, AutoModelForImageClassification)
            else:
                encoder, probe = to_can(entry.path).base_model, self.probes[entry.name]
                encoder.config.id2label = dict(enumerate(data.class_names))
                encoder.config.label2id = {name: index for index, name in enumerate(data.class_names)}
                model = to_dinov2(encoder, on_class_token_and_mean(probe, settings.pooling))
            preprocessor = entry.preprocessor
            if preprocessor.num_channels == 1:  # pipelines and widgets give pictures in colour
                model, preprocessor = accept_colours(model), preprocessor.in_colour()
        predictions = class_predictions(model.to(self.device), preprocessor, data.test, settings.batch_size,
                                        settings.dataloader_num_workers)  # fmt: skip
        head = "fine-tuned" if is_tuned else "linear probe"
        figures = {**self.score(predictions), "folder": str(folder), "source": entry.path, "head": head}
        figures["model_type"] = entry.encoder.model.config.model_type
        with new_folder(folder) as partial:
            (partial / "examples").mkdir()
            model.save_pretrained(partial)
            preprocessor.save_pretrained(partial)
            examples = {}
            for number, label in enumerate(np.unique(data.test.labels)[:NUM_EXAMPLES], start=1):
                row = int(np.flatnonzero(data.test.labels == label)[0])
                picture = Image.fromarray(decode(data.test.read(row), num_channels=3, **preprocessor.decoding))
                examples[f"examples/{number}.jpg"] = data.class_names[label]
                picture.save(partial / f"examples/{number}.jpg", quality=95)
            entries = card_results(results, {"exported": figures}, entry.name)
            figures["test_images_seen_without_labels"] = results["models"][entry.name][
                "test_images_seen_without_labels"
            ]
            card = classifier_card(folder.resolve().name, results, figures, examples, entries)
            write(partial / "README.md", card)
        return figures

    # --- Robustness --------------------------------------------------------------------------------------------------

    def own_classes(self, entry: Entry) -> list[int] | None:
        """Of a model that was saved with a classifier of our classes, its index of each."""
        if entry.path is None:
            return None
        config = entry.encoder.model.config
        if not any("ForImageClassification" in name for name in config.architectures or []):
            return None
        return class_order(config.id2label, self.data.class_names)

    def classifier(self, entry: Entry, train: np.ndarray | None) -> tuple[Callable, str]:
        """Pictures -> logits `(B, num_classes)`, of the model's own classifier of these classes, or a linear probe."""
        order = self.own_classes(entry)
        if order is not None:
            trust = self.settings.trust_remote_code
            model = load_model(entry.path, classifier_class(entry.path, trust), trust).eval().to(self.device)
            order = torch.tensor(order, device=self.device)

            def classify(pictures):
                with self.accelerator.autocast():
                    pixels = entry.preprocessor.normalise(pictures.to(self.device))
                    return model(pixel_values=pixels, **entry.encoder.options).logits.float()[:, order]

            return classify, "its own classifier"
        probe = self.processes.gather([self.fit_probe(train) if self.is_main else None])[0]
        weight, bias = (torch.from_numpy(x).to(self.device) for x in (probe.weight, probe.bias))
        pooling = self.settings.pooling if entry.encoder else "mean"

        def classify(pictures):
            return pooled(entry.encode(pictures), pooling, entry.name).float().to(self.device) @ weight.T + bias

        return classify, "linear probe"

    def robustness(self, entry: Entry, train: np.ndarray | None) -> dict | None:
        settings, test = self.settings, self.data.test
        groups = corruptions_by_group(settings.corruptions)
        classify, head = self.classifier(entry, train)
        logits = partial(self.logits, classify, entry)
        clean = logits(test)
        corrupted = Corrupted(entry.preprocessor, [name for names in groups.values() for name in names], SEVERITIES,
                              settings.seed)  # fmt: skip
        bar = partial(self.progress, description=f"{entry.name}: corrupted")
        predictions = corrupted_predictions(
            classify, test, corrupted, settings.batch_size, settings.dataloader_num_workers, self.processes, bar
        )
        further = {name: (logits(other.split), other) for name, other in self.further_sets.items()}
        if not self.is_main:
            return None
        right = predictions == test.labels[:, None]
        table, seed = accuracy_by_corruption(right, corrupted.versions), settings.seed
        on_clean, severities = self.score(clean.argmax(axis=1)), np.array([s for _, s in corrupted.versions])

        def mean(where) -> dict:
            return {
                "accuracy": float(right[:, where].mean()),
                "interval": bootstrap_interval(right[:, where].mean(1), seed),
            }

        figures = {
            "head": head,
            "clean": on_clean,
            **mean(slice(None)),
            "by_severity": {str(severity): mean(severities == severity) for severity in SEVERITIES},
            "by_group": {
                group: float(np.mean([list(table[name].values()) for name in names]))
                for group, names in groups.items()
            },
            "by_corruption": table,
        }
        figures["relative_drop"] = 1 - figures["accuracy"] / on_clean["accuracy"] if on_clean["accuracy"] else None
        if further:
            figures["further_sets"] = {
                name: {
                    **self.score(other.classes[theirs[:, other.classes].argmax(axis=1)], other.split.labels),
                    "num_images": len(other.split),
                    "num_classes": len(other.classes),
                }
                for name, (theirs, other) in further.items()
            }
        return figures

    def logits(self, classify: Callable, entry: Entry, split: Split) -> np.ndarray | None:
        pictures = Pictures(split, entry.preprocessor.decode)
        made = self.extract(lambda batch: {"logits": classify(batch)}, pictures, f"{entry.name}: {split.name}")
        return None if made is None else made["logits"]

    # --- Tasks on pixels ---------------------------------------------------------------------------------------------

    def reconstruction(self, entry: Entry) -> dict | None:
        """In decibels: the error on hidden patches below the full range, and by how much the noise gets weaker."""
        config, preprocessor, seed = entry.encoder.model.config, entry.preprocessor, self.settings.seed
        model = load_model(entry.path, AutoModelForPreTraining, self.settings.trust_remote_code)
        model.eval().to(self.device)
        mean, std = preprocessor.processor.image_mean, preprocessor.processor.image_std

        def errors(batch):
            pictures, indices = batch
            pixels = preprocessor.normalise(pictures.to(self.device))
            return reconstruction_errors(model, pixels, indices.tolist(), std, seed)

        pictures = Pictures(self.data.test, partial(with_index, preprocessor))
        made = self.extract(errors, pictures, f"{entry.name}: reconstruction")
        if not self.is_main:
            return None
        figures = {"mask_ratio": config.mask_ratio, "noise_level": config.noise_std_max}
        figures["norm_pix_loss"] = config.norm_pix_loss

        def below(signal, error: np.ndarray) -> dict:
            """Decibels from a mean square down to another, and the interval of that."""
            low, high = bootstrap_interval(error, seed)
            decibels = [10 * math.log10(signal / max(x, 1e-20)) for x in (error.mean(), high, low)]
            return {"db": decibels[0], "interval": decibels[1:]}

        if "hidden" in made:
            figures["hidden_patches"] = below(1.0, made["hidden"])
            figures["plain"] = below(1.0, made["plain"])
        if "noise" in made:
            figures["noise_reduction"] = below(made["noise"].mean(), made["residual"])
        path = self.output_dir / "figures" / f"reconstruction-{file_name(entry.name)}.png"
        few = torch.stack(
            [preprocessor.decode(self.data.test.read(row)) for row in range(min(6, len(self.data.test)))]
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reconstruction_sheet(model, preprocessor.normalise(few).to(self.device), mean, std, path)
        return {**figures, "picture": str(path)}


def with_index(preprocessor: Preprocessor, encoded: bytes, index: int) -> tuple[torch.Tensor, int]:
    return preprocessor.decode(encoded), index


def class_order(id2label: dict[int, str], class_names: list[str]) -> list[int] | None:
    """
    For each of our classes the model's own index: by name, or as they are if nearly all names agree one by one (in
    ImageNet there are two cranes); `None` if its classes are others.
    """
    theirs = [id2label[index] for index in sorted(id2label)]
    if len(theirs) == len(class_names) and np.mean([a == b for a, b in zip(theirs, class_names, strict=True)]) > 0.95:
        return list(range(len(theirs)))
    if len(set(theirs)) == len(theirs) and set(class_names) <= set(theirs):
        return [theirs.index(name) for name in class_names]
    return None


def on_class_token_and_mean(probe: LinearClassifier, pooling: str) -> torch.nn.Linear:
    """A probe of either or both as a layer on the class token and, beside it, the mean of the patch tokens."""
    weight = torch.from_numpy(probe.weight).float()
    width = weight.shape[1]
    padding = {"mean": (width, 0), "cls": (0, width), "both": (0, 0)}[pooling]
    weight = torch.nn.functional.pad(weight, padding)
    head = torch.nn.Linear(weight.shape[1], len(weight))
    # A class without training images has a bias of minus infinity, which half precision and formats do not bear.
    head.load_state_dict({"weight": weight, "bias": torch.from_numpy(probe.bias).float().clamp(min=-1e4)})
    return head


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


# --- The run ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> dict:
    """
    Runs the tasks of a command line; returns what `results.json` holds. Raises ValueError for what the user can mend.
    """
    started = time.perf_counter()
    settings, fine_tuning = parse(argv)
    accelerator = Accelerator(
        mixed_precision=mixed_precision(settings.mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(days=30))],  # they wait
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and each takes itself for the only one; on a CPU "
            "set ACCELERATE_USE_CPU=true"
        )
    results = {
        "command": [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)],
        **run_facts(
            accelerator.device, ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "evaluate")
        ),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "seed": settings.seed,
    }
    output_dir = Path(settings.output_dir)
    if (output_dir / "recipe.yaml").exists():
        raise ValueError(
            f"output_dir={output_dir} holds a pre-training run, whose results.json this would replace; give another"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    if "embed" in settings.task:
        return run_embed(settings, accelerator, results)

    with accelerator.local_main_process_first():
        data = load_labelled(
            settings.dataset_name,
            settings.dataset_config_name,
            settings.train_split,
            settings.test_split,
            settings.image_column,
            settings.label_column or "label",
            settings.test_size,
            settings.seed,
        )
    if "few_shot" in settings.task:
        for shots in settings.shots:  # before anything takes time
            draw_shots(data.train.labels, shots, np.random.default_rng(0), data.class_names)
    evaluation = Evaluation(settings, fine_tuning, accelerator, data)
    entries = evaluation.entries()
    names = {entry.path: entry.name for entry in entries if entry.path}
    for entry in reversed(entries):  # of several untrained ones the first
        if entry.path is None:
            names["untrained" if entry.encoder else "pixels"] = entry.name
    reference = (
        settings.reference_model
        and names[
            settings.reference_model
            if settings.reference_model in names
            else os.path.normpath(settings.reference_model)
        ]
    )
    plan = {entry.name: planned(entry, settings, reference) for entry in entries}
    for entry in entries:
        evaluation.check(entry, plan[entry.name])
    held_out = f"{settings.test_size:g} of {settings.train_split}"
    results["data"] = {
        "dataset_name": settings.dataset_name,
        "config_name": settings.dataset_config_name,
        "train_split": settings.train_split,
        "test_split": held_out if settings.test_size else settings.test_split,
        "num_train": len(data.train),
        "num_test": len(data.test),
        "class_names": data.class_names,
    }
    results["models"] = {
        entry.name: {
            "path": entry.path,
            "sha256": entry.digest,
            "test_images_seen_without_labels": seen_in_pretraining(entry.path, settings),
        }
        for entry in entries
        if entry.path
    }
    results |= {"pooling": settings.pooling, "results": {}, "seconds": {}}
    if accelerator.is_main_process:
        print(
            f"{len(data.train):,} images of {len(np.unique(data.train.labels))} classes to learn from, "
            f"{len(data.test):,} to be tested on ({settings.dataset_name}); "
            f"{', '.join(name for name in plan if plan[name])}; {accelerator.num_processes} process(es), "
            f"{accelerator.device}"
        )

    for entry in entries:
        train = test = None  # only the main process has them
        tasks, seconds = plan[entry.name], {}
        if set(tasks) & set(ON_FEATURES) or ("robustness" in tasks and evaluation.own_classes(entry) is None):
            began = time.perf_counter()
            train, test = (evaluation.features(entry, split) for split in (data.train, data.test))
            seconds["features"] = time.perf_counter() - began
        for task in tasks:
            began = time.perf_counter()
            if task in ON_FEATURES:
                figures = getattr(evaluation, task)(entry, train, test) if accelerator.is_main_process else None
            else:
                arguments = (train,) if task == "robustness" else ()
                figures = getattr(evaluation, task)(entry, *arguments)
            seconds[task] = time.perf_counter() - began
            if accelerator.is_main_process:
                print(f"{entry.name}: {task} in {seconds[task]:.1f} s", flush=True)
                results["results"].setdefault(entry.name, {})[task] = figures
                results["seconds"][entry.name] = seconds
                results["total_seconds"] = time.perf_counter() - started
                write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")  # a fault costs one task
    if accelerator.is_main_process:
        if settings.export_classifier:
            (entry,) = filter(evaluation.is_exported, entries)
            results["results"][entry.name]["exported"] = evaluation.export(entry, results)
        if reference and "robustness" in settings.task:
            compare_corruption(results["results"], reference)
        results["total_seconds"] = time.perf_counter() - started
        write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
        drawn = evaluation_figure(results["results"], output_dir / "figures" / "evaluation.png")
        print(f"\n{CAPTION}\n\n{table(results['results'])}\n\nFigures: {output_dir}/results.json" + (
            f", {output_dir}/figures/evaluation.png" if drawn else ""
        ))  # fmt: skip
        for line in remarks(results):
            print(f"Note: {line}")
        if settings.export_classifier:
            folder = settings.export_classifier
            print(
                f"A classifier for the image-classification pipeline: {folder}. Of the test images, {folder}/examples "
                f"holds up to {NUM_EXAMPLES}: remove those that are not yours to show before you publish it"
            )
        if settings.update_card:
            for name, model in results["models"].items():
                if not is_listed(model["path"], settings):  # no more than the reference
                    continue
                update_card(model["path"], card_results(results, results["results"][name], name))
                print(f"Updated: {model['path']}/README.md")
    accelerator.end_training()
    return results


def recipe_of(path: str) -> dict:
    """The recipe beside a model that `run_pretraining.py` made; empty for any other."""
    file = Path(path) / "recipe.yaml"
    recipe = load_yaml(file) if file.exists() else {}
    return recipe if isinstance(recipe, dict) else {}


def load(path: str, settings: Settings) -> Encoder:
    return load_encoder(
        path,
        settings.processor_name_or_path,
        settings.image_shape,
        settings.trust_remote_code,
        settings.decoding,
    )


def seen_in_pretraining(path: str, settings: Settings) -> bool | None:
    """
    Whether the recipe beside a model says that it was pre-trained on test images too, without their labels; `None`
    where it names a part of the tested folder that may hold some, or a split that is gone. Copies are not found out.
    """
    recipe, tested = recipe_of(path), Path(resolve_name(settings.dataset_name))
    tested_split = settings.train_split if settings.test_size > 0 else settings.test_split
    name, config_name = recipe.get("dataset_name"), recipe.get("dataset_config_name")
    source = Path(resolve_name(name or recipe.get("data_dir") or "")).resolve()
    if name and (name == settings.dataset_name or source == tested):
        if config_name and settings.dataset_config_name and config_name != settings.dataset_config_name:
            return False
        try:
            return have_common_rows(recipe.get("dataset_split", "train"), tested_split, num_rows(settings))
        except ValueError:  # the set has no such split any more
            return None
    if source.exists() and (name or recipe.get("data_dir")):
        if source == tested or source in tested.parents:
            return True
        if tested not in source.parents:
            return False
        splits, parts = num_rows(settings).keys(), set(source.relative_to(tested).parts)
        tested_splits = re.sub(r"\[.*?\]", "", tested_split).split("+")
        if parts.intersection(tested_splits) or len(splits) == 1:
            return True
        return False if parts & splits else None
    files = recipe.get("data_files") or []
    folders = {Path(file).resolve().parent for file in ([files] if isinstance(files, str) else files)}
    return None if any(folder == tested or tested in folder.parents for folder in folders) else False


def num_rows(settings: Settings) -> dict[str, int]:
    """Of every split of the set."""
    splits = load_dataset(**load_arguments(settings.dataset_name, settings.dataset_config_name))
    return {name: len(rows) for name, rows in splits.items()}


def have_common_rows(split: str, other: str, lengths: dict[str, int]) -> bool:
    """Of two splits of a set, such as `train[:80%]` and `train+test`."""
    ours, theirs = (ReadInstruction.from_spec(spec).to_absolute(lengths) for spec in (split, other))
    return any(
        a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to)
        for a, b in itertools.product(ours, theirs)
    )


def remarks(results: dict) -> list[str]:
    """What else a reader of the figures has to know."""
    lines = []
    for name, model in results["models"].items():
        if model["test_images_seen_without_labels"]:
            lines.append(f"{name} was pre-trained on test images too, without their labels")
        if model["test_images_seen_without_labels"] is None:
            lines.append(f"{name} was pre-trained on a part of this set; whether on test images, is not known")
        ours = results["results"].get(name, {})
        for other, theirs in results["results"].items():
            if not other.startswith("untrained") or "linear_probe" not in ours or "linear_probe" not in theirs:
                continue
            accuracy, fresh = (100 * figures["linear_probe"]["accuracy"] for figures in (ours, theirs))
            if accuracy <= fresh:
                lines.append(
                    f"{name} is no better than {other} in the linear probe: {accuracy:.1f} against {fresh:.1f} %; "
                    "pre-train longer, or on more images"
                )
    return lines


def is_listed(path: str, settings: Settings) -> bool:
    """Whether a model is one to be measured, and not only the reference."""
    return path in map(os.path.normpath, settings.model_name_or_path)


def planned(entry: Entry, settings: Settings, reference: str | None) -> list[str]:
    """
    The tasks of an entry: baselines take those on features; a model or a baseline that was named as the reference
    takes robustness, and a model no more than that, if it is named nowhere else.
    """
    if entry.path is None:
        kind = "untrained" if entry.encoder else "pixels"
        tasks = [task for task in settings.task if task in FROZEN and kind in (settings.baselines or ())]
    else:
        tasks = list(settings.task) if is_listed(entry.path, settings) else []
    is_reference = entry.name == reference and "robustness" in settings.task
    return tasks + (["robustness"] if is_reference and "robustness" not in tasks else [])


def compare_corruption(results: dict[str, dict], reference: str):
    """Adds the corruption errors relative to the reference; says why, where there can be none."""
    theirs = results[reference]["robustness"]["by_corruption"]
    for figures in results.values():
        if "robustness" in figures:
            try:
                errors = corruption_error(figures["robustness"]["by_corruption"], theirs)
            except ValueError as error:
                print(f"no corruption errors: {error}")
                return
            figures["robustness"]["corruption_error"] = {"reference": reference, **errors}


def run_embed(settings: Settings, accelerator: Accelerator, results: dict) -> dict:
    """The task that writes embeddings; each process does its share, and waits for no other."""
    with accelerator.local_main_process_first():
        encoder = load(settings.model_name_or_path[0], settings)
    digest = encoder.digest()
    encoder.to(accelerator.device)

    @torch.no_grad()
    def encode(pictures):
        with accelerator.autocast():
            pixels = encoder.preprocessor.normalise(pictures.to(accelerator.device, non_blocking=True))
            return pooled(encoder(pixels), settings.pooling, encoder.name)

    def source_with(label_column: str | None) -> ImageSource:
        return ImageSource(
            settings.dataset_name,
            settings.data_dir,
            settings.data_files,
            settings.dataset_split,
            settings.image_column,
            settings.streaming,
            extra_columns=tuple(filter(None, (settings.id_column, label_column))),
            config_name=settings.dataset_config_name,
        )

    label_column, source = settings.label_column, source_with(settings.label_column)
    if label_column is None and isinstance(source.features.get("label"), Value | ClassLabel):
        label_column, source = "label", source_with("label")
    if source.left_out_line and accelerator.is_main_process:
        print(source.left_out_line)
    facts = {
        "weights": digest,
        "pooling": settings.pooling,
        "preprocessing": encoder.preprocessor.facts(),
        "mixed_precision": accelerator.mixed_precision,
    }
    figures = embed(
        source,
        encoder.preprocessor.decode,
        encode,
        settings.output_dir,
        facts,
        batch_size=min(settings.batch_size, settings.rows_per_file),
        num_workers=settings.dataloader_num_workers,
        dtype=settings.embedding_dtype,
        rows_per_file=settings.rows_per_file,
        id_column=settings.id_column,
        label_column=label_column,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_bad_fraction=settings.max_bad_fraction,
    )
    own = gather_object([(figures["new_images"], figures["images_per_second"])])
    new_images, speed = map(sum, zip(*own, strict=True))
    results["model"] = {"path": settings.model_name_or_path[0], "sha256": digest}
    results["left_out"] = source.left_out
    results["embed"] = {**totals(settings.output_dir), "new_images": new_images, "images_per_second": speed}
    if accelerator.is_main_process:
        write(Path(settings.output_dir) / "results.json", json.dumps(results, indent=2) + "\n")
        bad = ", ".join(f"{count} {reason}" for reason, count in results["embed"]["bad"].items())
        of = f" of split {source.split}" if settings.dataset_name else ""
        print(
            f"{results['embed']['num_images']:,} embeddings{of} in {results['embed']['files']} files, "
            f"{new_images:,} of them new at {speed:.0f} images/s; bad images: {bad or 'none'}. "
            f"results.json, and for load_dataset('parquet', data_files=...): {settings.output_dir}/part-*.parquet"
        )
    accelerator.end_training()
    return results


class Measure(NamedTuple):
    """
    A figure to be shown.

    Args:
        value (`float`): In [0, 1], or in decibels.
        interval (`(float, float)`, *optional*): 95 %.
        metric (`str`): As the Hub calls it.
        spread (`float`, *optional*): What to show behind the value; half the width of the interval, if `None`.
        pooling (`str`): Of the features that it is about.
    """

    value: float
    interval: tuple[float, float] | None
    metric: str = "accuracy"
    spread: float | None = None
    pooling: str = "mean"


def measures(figures: dict, pooling: str = "mean") -> dict[str, Measure]:
    """A model's figures by their headings; `pooling` is that of the frozen features."""
    rows = {}
    titles = {"linear_probe": "linear probe", "linear_probe_sgd": "linear probe, SGD", "finetune": "fine-tuned",
              "exported": "exported classifier"}  # fmt: skip
    for task, title in titles.items():
        if task in figures:
            score = figures[task]
            is_pooled = task == "linear_probe" or score.get("head") == "linear probe"
            own = pooling if is_pooled else score.get("pooling", "mean")
            rows[title] = Measure(score["accuracy"], score["interval"], pooling=own)
    for k, score in figures.get("knn", {}).items():
        rows[f"k-NN, k = {k}"] = Measure(score["accuracy"], score["interval"], pooling=pooling)
    for shots, score in figures.get("few_shot", {}).items():
        title = f"{shots} of the labels" if "%" in shots else f"{shots} a class"
        rows[title] = Measure(score["accuracy"], score["interval"], spread=score["std"] or 0.0, pooling=pooling)
    if "retrieval" in figures:
        score = figures["retrieval"]
        rows[f"of {score['neighbours']} neighbours right"] = Measure(
            score["precision"], score["interval"], "precision", pooling=pooling
        )
    if "robustness" in figures:
        score = figures["robustness"]
        of = {"pooling": pooling if score["head"] == "linear probe" else "mean"}
        rows["corrupted"] = Measure(score["accuracy"], score["interval"], **of)
        rows["clean, same classifier"] = Measure(score["clean"]["accuracy"], score["clean"]["interval"], **of)
        if "corruption_error" in score:
            rows["mean corruption error"] = Measure(score["corruption_error"]["mean"], None, "mce", **of)
        for name, other in score.get("further_sets", {}).items():
            rows[name] = Measure(other["accuracy"], other["interval"], **of)
    if "reconstruction" in figures:
        score = figures["reconstruction"]
        plain = "their own mean" if score["norm_pix_loss"] else "mean colour of the visible"
        decibels = {"hidden_patches": ("hidden patches", "psnr"), "plain": (f"... {plain}", "psnr"),
                    "noise_reduction": ("noise weaker by", "noise_reduction")}  # fmt: skip
        for name, (title, metric) in decibels.items():
            if name in score:
                rows[f"{title}, dB"] = Measure(score[name]["db"], score[name]["interval"], metric)
    return rows


def card_results(results: dict, figures: dict, name: str) -> list[EvalResult]:
    """A model's figures as entries of the Hub's `model-index`; accuracies in [0, 1]."""
    seen = (
        {"test_images_seen_without_labels": True} if results["models"][name]["test_images_seen_without_labels"] else {}
    )
    data, where = results["data"], short_name(results["data"]["dataset_name"])
    return [
        EvalResult(
            task_type="image-to-image" if heading.endswith("dB") else "image-classification",
            dataset_type=where,
            dataset_name=where,
            dataset_config=data["config_name"],
            dataset_split=data["test_split"],
            metric_type=measure.metric,
            metric_name=heading if measure.pooling == "mean" else f"{heading} ({measure.pooling})",
            metric_value=round(measure.value, 4),
            metric_args=({"interval_95": [round(end, 4) for end in measure.interval]} if measure.interval else {})
            | seen
            or None,
        )
        for heading, measure in measures(figures, results["pooling"]).items()
        if not heading.startswith("...")  # of a plain guess
    ]


def table(results: dict[str, dict]) -> str:
    """The models side by side, shares in %, each with half the width of its interval (few-shot: its deviation)."""
    columns = {name: measures(figures) for name, figures in results.items()}
    headings = list(dict.fromkeys(heading for column in columns.values() for heading in column))

    def cell(heading: str, measure: Measure | None) -> str:
        if measure is None:
            return ""
        factor, spread = 1 if heading.endswith("dB") else 100, measure.spread
        if spread is None and measure.interval:
            spread = (measure.interval[1] - measure.interval[0]) / 2
        return f"{factor * measure.value:.1f}" + (f" ±{factor * spread:.1f}" if spread is not None else "")

    rows = [["", *columns]]
    rows += [[heading, *(cell(heading, column.get(heading)) for column in columns.values())] for heading in headings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:{'<' if not i else '>'}{widths[i]}}" for i, text in enumerate(row)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors("run_eval.py"):
        main()
