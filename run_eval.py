"""
Measures vision encoders: any that transformers can load, on any labelled set that `datasets.load_dataset` reads.

    python run_eval.py --model_name_or_path out/can-quickstart --dataset_name sample_data --output_dir out/eval
    python run_eval.py --model_name_or_path MINE OTHERS --task knn,linear_probe,few_shot --dataset_name FOLDER ...
    accelerate launch run_eval.py --model_name_or_path MINE --task finetune --dataset_name FOLDER ...
    accelerate launch run_eval.py --model_name_or_path MINE --task embed --data_files 'shards/*.parquet' ...

Tasks: knn, linear_probe, linear_probe_sgd, few_shot, finetune, robustness, reconstruction, retrieval; and embed, which
needs no labels and stands alone. Every setting is a flag; `--help` lists them all.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from huggingface_hub import EvalResult
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm
from transformers import AutoModelForPreTraining

import modeling_can  # noqa: F401  registers CAN with the Auto classes
from modeling_can.data import ImageSource
from modeling_can.embedding import embed, totals
from modeling_can.encoders import (
    POOLINGS,
    Encoder,
    Preprocessor,
    classifier_class,
    load_encoder,
    load_model,
    pooled,
    untrained,
)
from modeling_can.evaluation import (
    SHOTS,
    LabelledSet,
    LinearClassifier,
    Pictures,
    Processes,
    Split,
    bootstrap_interval,
    cached,
    draw_shots,
    extract,
    few_shot_predictions,
    knn_predictions,
    linear_probe,
    load_labelled,
    nearest_neighbours,
    raw_pixels,
)
from modeling_can.finetuning import (
    BASE_LEARNING_RATES,
    FineTuning,
    class_predictions,
    finetune,
    linear_probe_sgd,
)
from modeling_can.hub import run_facts, update_card, write
from modeling_can.metrics import Accuracy
from modeling_can.recipe import option, parse_value, read_flags
from modeling_can.rendezvous import INIT_METHOD
from modeling_can.robustness import (
    GROUPS,
    SEVERITIES,
    Corrupted,
    accuracy_by_corruption,
    corrupted_predictions,
    corruption_error,
    corruptions_by_group,
    load_further_sets,
)
from modeling_can.training import mixed_precision
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
    pooling: str = option("mean", "features: mean of the patch tokens, cls token, or both")
    baselines: tuple[str, ...] | None = option(("pixels", "untrained"), "to compare with: pixels, untrained; or none")
    trust_remote_code: bool = option(False, "run code that comes with a model from the Hub")

    # Work
    batch_size: int = option(256, "images at a time on one process")
    dataloader_num_workers: int = option(0, "loader processes for each process")
    mixed_precision: str = option("auto", "no, bf16, or auto: bf16 on GPUs that have it, never on CPU")
    feature_cache: str | None = option(f"{HF_HOME}/modeling-can/features", "folder of extracted features, or none")
    seed: int = option(0, "of splits, draws, intervals, noise and training")
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
        if not self.model_name_or_path:
            raise ValueError("give --model_name_or_path: folders or Hub ids")
        known = {"task": TASKS, "baselines": ("pixels", "untrained"), "corruptions": GROUPS}
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
        if not 0 <= self.test_size < 1:
            raise ValueError(f"test_size={self.test_size} is outside [0, 1)")
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise ValueError(f"image_size={self.image_size} must be one number, or height,width")
        for shots in self.shots:
            if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?%", shots):
                raise ValueError(f"shots={shots!r} must be a number of images, such as 5, or a share, such as 10%")
        if "embed" in self.task:
            if len(self.task) > 1 or len(self.model_name_or_path) > 1:
                raise ValueError(f"embed stands alone, with one model; got task={','.join(self.task)}")
        elif not self.dataset_name:
            raise ValueError("give --dataset_name: Hub id, folder of parquet shards or class folders, or sample_data")

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

    # --- Entries -----------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """The baselines, then the models."""
        settings, baselines, models = self.settings, [], []
        paths = list(settings.model_name_or_path)
        if settings.reference_model and settings.reference_model not in (*paths, *(settings.baselines or ())):
            paths.append(settings.reference_model)
        names = [Path(path).resolve().name if Path(path).is_dir() else path for path in paths]
        for path, name in zip(paths, names, strict=True):
            with self.accelerator.local_main_process_first():  # which downloads it
                encoder = load_encoder(
                    path, settings.processor_name_or_path, settings.image_shape, settings.trust_remote_code
                )
            models.append(self.entry(encoder, name if names.count(name) == 1 else path, path))
            fresh = untrained(encoder, settings.seed)
            if "untrained" in (settings.baselines or ()) and fresh.digest() not in [b.digest for b in baselines]:
                number = "" if len(baselines) == 0 else f" {len(baselines) + 1}"
                baselines.append(self.entry(fresh, f"untrained{number}"))
        if "pixels" in (settings.baselines or ()):
            preprocessor = models[0].preprocessor
            encode = lambda pictures: {"mean": raw_pixels(preprocessor.normalise(pictures))}  # noqa: E731
            baselines.insert(0, Entry("pixels", preprocessor, encode, "pixels"))
        return baselines + models

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
        probe = self.fit_probe(train)
        return {
            **self.score(probe.predict(test)),
            "weight_decay": probe.weight_decay,
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
        draw = lambda split, row: entry.preprocessor.decode(split.read(row))  # noqa: E731
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

    # --- Robustness --------------------------------------------------------------------------------------------------

    def classifier(self, entry: Entry, train: np.ndarray | None) -> tuple[Callable, str]:
        """Pictures -> logits `(B, num_classes)`, of the model's own classifier or, if it has none, a linear probe."""
        if has_classifier(entry):
            model = load_model(entry.path, classifier_class(entry.path), self.settings.trust_remote_code)
            order = class_order(entry.name, model.config.id2label, self.data.class_names)
            model, order = model.eval().to(self.device), torch.tensor(order, device=self.device)

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
        further = load_further_sets(settings.further_sets, self.data.class_names) if settings.further_sets else {}
        further = {name: (logits(other.split), other) for name, other in further.items()}
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
        if config.model_type != "can" or not config.uses_decoder:
            raise ValueError(
                f"the reconstruction task needs a CAN that was trained to reconstruct or to denoise, and {entry.name} "
                f"is {'one that was not' if config.model_type == 'can' else f'a {config.model_type}'}"
            )
        if preprocessor.image_size != config.image_shape or not preprocessor.in_two_steps:
            raise ValueError(
                f"the reconstruction task needs the size that {entry.name} was trained at, {config.image_shape}, and "
                f"not {preprocessor.image_size}; leave out --image_size"
            )
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
            figures["mean_colour"] = below(1.0, made["mean_colour"])
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


def has_classifier(entry: Entry) -> bool:
    """Whether the model was saved with a classifier."""
    if entry.path is None:
        return False
    return any("ForImageClassification" in name for name in entry.encoder.model.config.architectures or [])


def class_order(name: str, id2label: dict[int, str], class_names: list[str]) -> list[int]:
    """For each of our classes the model's own index; raises ValueError if they are others."""
    theirs = {label: index for index, label in id2label.items()}
    if set(class_names) <= set(theirs):
        return [theirs[label] for label in class_names]
    raise ValueError(
        f"the classifier of {name} knows {', '.join(list(theirs)[:5])} ..., and the set has "
        f"{', '.join(class_names[:5])} ...; give a model without classifier, which gets a linear "
        "probe, or one whose id2label has these names"
    )


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
    names = {entry.path: entry.name for entry in entries if entry.path} | {entry.name: entry.name for entry in entries}
    reference = names[settings.reference_model] if settings.reference_model else None
    tables, seconds = {entry.name: {} for entry in entries}, {entry.name: {} for entry in entries}
    if accelerator.is_main_process:
        print(
            f"{len(data.train):,} images of {len(np.unique(data.train.labels))} classes to learn from, "
            f"{len(data.test):,} to be tested on ({settings.dataset_name}); {', '.join(tables)}; "
            f"{accelerator.num_processes} process(es), {accelerator.device}"
        )
    for entry in entries:
        tasks = [task for task in settings.task if wanted(task, entry, settings, reference)]
        train = test = None  # only the main process has them
        if set(tasks) & set(ON_FEATURES) or ("robustness" in tasks and not has_classifier(entry)):
            began = time.perf_counter()
            train, test = (evaluation.features(entry, split) for split in (data.train, data.test))
            seconds[entry.name]["features"] = time.perf_counter() - began
        for task in tasks:
            began = time.perf_counter()
            if task in ON_FEATURES:
                figures = getattr(evaluation, task)(entry, train, test) if accelerator.is_main_process else None
            else:
                arguments = (train,) if task == "robustness" else ()
                figures = getattr(evaluation, task)(entry, *arguments)
            seconds[entry.name][task] = time.perf_counter() - began
            if accelerator.is_main_process:
                tables[entry.name][task] = figures
                print(f"{entry.name}: {task} in {seconds[entry.name][task]:.1f} s", flush=True)
    if not accelerator.is_main_process:
        accelerator.end_training()
        return {}
    if reference and "robustness" in settings.task:
        theirs = tables[reference]["robustness"]["by_corruption"]
        for figures in tables.values():
            if "robustness" in figures:
                error = corruption_error(figures["robustness"]["by_corruption"], theirs)
                figures["robustness"]["corruption_error"] = {"reference": reference, **error}
    results["data"] = {
        "dataset_name": settings.dataset_name,
        "config_name": settings.dataset_config_name,
        "train_split": settings.train_split,
        "test_split": settings.test_split
        if not settings.test_size
        else f"{settings.test_size:g} of {settings.train_split}",
        "num_train": len(data.train),
        "num_test": len(data.test),
        "class_names": data.class_names,
    }
    results["models"] = {entry.name: {"path": entry.path, "sha256": entry.digest} for entry in entries if entry.path}
    results |= {"pooling": settings.pooling, "results": {name: figures for name, figures in tables.items() if figures}}
    results |= {"seconds": seconds, "total_seconds": time.perf_counter() - started}
    write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    drawn = evaluation_figure(results["results"], output_dir / "figures" / "evaluation.png")
    print(f"\n{table(results['results'])}\n\nFigures: {output_dir}/results.json" + (
        f", {output_dir}/figures/evaluation.png" if drawn else ""
    ))  # fmt: skip
    if settings.update_card:
        for entry in entries:
            if entry.path:
                update_card(entry.path, card_results(results, entry.name))
    accelerator.end_training()
    return results


def run_embed(settings: Settings, accelerator: Accelerator, results: dict) -> dict:
    """The task that writes embeddings; each process does its share, and waits for no other."""
    with accelerator.local_main_process_first():
        encoder = load_encoder(
            settings.model_name_or_path[0],
            settings.processor_name_or_path,
            settings.image_shape,
            settings.trust_remote_code,
        )
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
        )

    label_column, source = settings.label_column, source_with(settings.label_column)
    if label_column is None and "label" in source.column_names:
        label_column, source = "label", source_with("label")
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
        batch_size=settings.batch_size,
        num_workers=settings.dataloader_num_workers,
        dtype=settings.embedding_dtype,
        rows_per_file=settings.rows_per_file,
        id_column=settings.id_column,
        label_column=label_column,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_bad_fraction=settings.max_bad_fraction,
    )
    own = torch.tensor([figures["new_images"], figures["images_per_second"]], device=accelerator.device)
    new_images, speed = accelerator.reduce(own, "sum").tolist()
    results["model"] = {"path": settings.model_name_or_path[0], "sha256": digest}
    results["embed"] = {**totals(settings.output_dir), "new_images": int(new_images), "images_per_second": speed}
    if accelerator.is_main_process:
        write(Path(settings.output_dir) / "results.json", json.dumps(results, indent=2) + "\n")
        bad = ", ".join(f"{count} {reason}" for reason, count in results["embed"]["bad"].items())
        print(
            f"{results['embed']['num_images']:,} embeddings in {results['embed']['files']} files, "
            f"{new_images:,.0f} of them new at {speed:.0f} images/s; bad images: {bad or 'none'}. "
            f"{settings.output_dir}: part-*.parquet, results.json"
        )
    accelerator.end_training()
    return results


def wanted(task: str, entry: Entry, settings: Settings, reference: str | None) -> bool:
    """Baselines take the tasks on features; a model that is named as reference alone, and a baseline, robustness."""
    is_reference = task == "robustness" and entry.name == reference
    if entry.path is None:
        return task in FROZEN or is_reference
    return entry.path in settings.model_name_or_path or is_reference


def measures(figures: dict) -> dict[str, tuple[float, tuple[float, float] | None, str]]:
    """What to show of a model's figures: heading -> value, interval, unit."""
    rows = {}
    for task, title in {
        "linear_probe": "linear probe",
        "linear_probe_sgd": "linear probe, SGD",
        "finetune": "fine-tuned",
    }.items():
        if task in figures:
            rows[title] = (figures[task]["accuracy"], figures[task]["interval"], "%")
    for k, score in figures.get("knn", {}).items():
        rows[f"k-NN, k = {k}"] = (score["accuracy"], score["interval"], "%")
    for shots, score in figures.get("few_shot", {}).items():
        spread = score["std"] or 0.0
        interval = (score["accuracy"] - spread, score["accuracy"] + spread)
        rows[f"{shots} of the labels" if "%" in shots else f"{shots} a class"] = (score["accuracy"], interval, "%")
    if "retrieval" in figures:
        score = figures["retrieval"]
        rows[f"of {score['neighbours']} neighbours right"] = (score["precision"], score["interval"], "%")
    if "robustness" in figures:
        score = figures["robustness"]
        rows["corrupted"] = (score["accuracy"], score["interval"], "%")
        rows["clean, same classifier"] = (score["clean"]["accuracy"], score["clean"]["interval"], "%")
        if "corruption_error" in score:
            rows["mean corruption error"] = (score["corruption_error"]["mean"], None, "%")
        for name, other in score.get("further_sets", {}).items():
            rows[name] = (other["accuracy"], other["interval"], "%")
    for name, title in {"hidden_patches": "hidden patches", "mean_colour": "... of their mean colour",
                        "noise_reduction": "noise weaker by"}.items():  # fmt: skip
        if name in figures.get("reconstruction", {}):
            score = figures["reconstruction"][name]
            rows[f"{title}, dB"] = (score["db"], score["interval"], "dB")
    return rows


def card_results(results: dict, name: str) -> list[EvalResult]:
    """A model's figures as entries of the Hub's `model-index`; accuracies in [0, 1]."""
    data = results["data"]
    where = Path(data["dataset_name"]).name if Path(data["dataset_name"]).exists() else data["dataset_name"]
    return [
        EvalResult(
            task_type="image-classification" if unit == "%" else "image-to-image",
            dataset_type=where,
            dataset_name=where,
            dataset_config=data["config_name"],
            dataset_split=data["test_split"],
            metric_type="accuracy" if unit == "%" else "psnr",
            metric_name=heading,
            metric_value=round(value, 4),
            metric_args={"interval_95": [round(end, 4) for end in interval]} if interval else None,
        )
        for heading, (value, interval, unit) in measures(results["results"][name]).items()
    ]


def table(results: dict[str, dict]) -> str:
    """The models side by side, accuracies in %, each with half the width of its interval (few-shot: its deviation)."""
    columns = {name: measures(figures) for name, figures in results.items()}
    headings = list(dict.fromkeys(heading for column in columns.values() for heading in column))

    def cell(measure) -> str:
        if measure is None:
            return ""
        value, interval, unit = measure
        factor = 100 if unit == "%" else 1
        return f"{factor * value:.1f}" + (f" ±{factor * (interval[1] - interval[0]) / 2:.1f}" if interval else "")

    rows = [["", *columns]]
    rows += [[heading, *(cell(column.get(heading)) for column in columns.values())] for heading in headings]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:{'<' if not i else '>'}{widths[i]}}" for i, text in enumerate(row)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        # Of an error in a loader's worker, what it says, without the traceback that torch puts around it.
        sys.exit(f"run_eval.py: {re.split(r'^[A-Za-z]*Error: ', str(error), flags=re.MULTILINE)[-1].strip()}")
    except RuntimeError as error:
        if not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        sys.exit(f"run_eval.py: another process died, or cannot be reached: {error}")
