"""What a protocol is, and what all of them are given: the setup, the entries to measure, their features."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..metrics import Accuracy
from ..progress import progress_bar
from .encoders import Encoder, pooled
from .features import Extractor, Images, Processes, cached
from .preprocessors import Preprocessor
from .scores import bootstrap_interval
from .sets import LabeledSet, Split


__all__ = ["Entry", "Features", "Measure", "Panel", "Protocol", "Setup", "file_name"]


@dataclass
class Entry:
    """
    A column of the results: a model or a baseline.

    Args:
        name (`str`): Its heading.
        preprocessor (`Preprocessor`): Makes its images.
        encode (callable): Prepared images -> pooled features by name, as `Encoder` returns them.
        patch_tokens (callable): Prepared images -> `(B, d, h, w)`, a feature for each patch; of the raw pixels, those
            of the patch.
        digest (`str`): What `encode` depends on.
        path (`str`, *optional*): Of a model, where it came from.
        encoder (`Encoder`, *optional*): All but the raw pixels have one.
        probe (`linear.LinearClassifier`, *optional*): What the linear probe fitted, once it has run.
        kind (`str`): `"model"`, which takes all tasks; `"reference"`, which others are compared with; or a baseline.
        rivals (`dict[str, Entry]`): Of a model, the baselines that it should be better than, by their kind.
        correct (`dict[str, np.ndarray]`): Task -> which test images it got right, bool `(N,)`; on the first process.
    """

    name: str
    preprocessor: Preprocessor
    encode: Callable
    patch_tokens: Callable
    digest: str
    path: str | None = None
    encoder: Encoder | None = None
    probe: tuple | None = None
    kind: str = "model"
    rivals: dict[str, "Entry"] = field(default_factory=dict)
    correct: dict[str, np.ndarray] = field(default_factory=dict)


class Features(NamedTuple):
    """Of the training and the test images, each `(N, d)`; on the first process, elsewhere `None`."""

    train: np.ndarray | None = None
    test: np.ndarray | None = None


class Measure(NamedTuple):
    """
    A figure to be shown.

    Args:
        value (`float`): In [0, 1], or in decibels.
        interval (`(float, float)`, *optional*): 95 %.
        metric (`str`): As the Hub calls it.
        spread (`float`, *optional*): What to show behind the value; half the width of the interval, if `None`.
        pooling (`str`): Of the features that it is about.
        task_type (`str`): As the Hub calls it.
    """

    value: float
    interval: tuple[float, float] | None
    metric: str = "accuracy"
    spread: float | None = None
    pooling: str = "mean"
    task_type: str = "image-classification"


class Panel(NamedTuple):
    """
    A panel of the figure: accuracy over the keys of a protocol's figures.

    Args:
        title (`str`), label (`str`): Of the panel and of what is below it.
        key (`str`, *optional*): Under which of a protocol's figures the points are; they are the figures if `None`.
        is_line (`bool`): Whether numbers follow each other, and points are joined.
    """

    title: str
    label: str
    key: str | None = None
    is_line: bool = True


class Setup:
    """
    What the protocols share.

    Args:
        settings (`Settings`), fine_tuning (`FineTuning`): What to do.
        accelerator (`Accelerator`): The processes and the device.
        data (`LabeledSet`): What to measure on.
    """

    def __init__(self, settings, fine_tuning, accelerator: Accelerator, data: LabeledSet):
        self.settings, self.fine_tuning, self.accelerator, self.data = settings, fine_tuning, accelerator, data
        self.device, self.is_main = accelerator.device, accelerator.is_main_process
        self.processes = Processes(accelerator.process_index, accelerator.num_processes, gather_object)
        self.output_dir, self.num_classes = Path(settings.output_dir), len(data.class_names)
        self.extractor = Extractor(settings.batch_size, settings.dataloader_num_workers, self.processes, self.progress)
        self.prepared: dict = {}  # what `Protocol.prepare` returned, by the protocol's name
        self._accuracy = Accuracy() if self.is_main else None

    def features(self, entry: Entry, split: Split) -> np.ndarray | None:
        """Pooled features of a split, from the cache where they are; on the first process, elsewhere `None`."""
        facts = {
            "weights": entry.digest,
            "preprocessing": entry.preprocessor.facts(),
            "data": (split.images._fingerprint, len(split)),
            "precision": (self.device.type, self.accelerator.mixed_precision),
        }
        images = Images(split, entry.preprocessor.decode)
        make = partial(self.extractor, entry.encode, images, f"{entry.name}: {split.name}")
        made = cached(self.settings.feature_cache, facts, make, self.processes)
        if made is None:
            return None
        features = pooled(made, self.pooling(entry), entry.name)
        if not np.isfinite(features).all():
            raise ValueError(f"{entry.name} gives features that are not finite; try --mixed_precision no")
        return features

    def pooling(self, entry: Entry) -> str:
        """The raw pixels have one kind of features."""
        return self.settings.pooling if entry.encoder else "mean"

    def progress(self, rounds, description: str, unit: str = "batches") -> Iterable:
        return progress_bar(rounds, description, unit=unit, is_shown=self.is_main, lines=True)

    def score(self, predictions: np.ndarray, labels: np.ndarray | None = None) -> dict:
        """Accuracy and its interval."""
        labels = self.data.test.labels if labels is None else labels
        interval = self.interval(predictions == labels)
        return {**self._accuracy.compute(predictions=predictions, references=labels), "interval": interval}

    def interval(self, scores: np.ndarray) -> tuple[float, float]:
        return bootstrap_interval(scores, self.settings.seed)


class Protocol:
    """
    A task: what it refuses, how it runs, how its figures are shown. A new one is a class in a file of its own and an
    item of `tasks.PROTOCOLS`; a flag that it needs is a field of `settings.Settings`.

    - `name`: of the task, and the key of its figures.
    - `on_features`: it is given features of the frozen encoder, and `run` is called on the first process alone.
    - `for_baselines`: raw pixels, untrained encoders and the weights that a run began with take it too.
    - `for_reference`: `reference_model` takes it too.
    - `rank`: of its rows in the table: 0 for classifiers of all training images, 1 for what else tests features as
      they are, 2 for other images and other questions; of one rank in the order of `PROTOCOLS`.
    - `panel`: of the figure, where there is one.
    """

    name: str
    on_features = False
    for_baselines = False
    for_reference = False
    rank = 1
    panel: Panel | None = None

    def prepare(self, setup: Setup):
        """Before a model is loaded: raises ValueError for data that do not do; returns what `run` has use for."""

    def check(self, setup: Setup, entry: Entry):
        """Raises ValueError for what the protocol would refuse, before anything takes time."""

    def needs_features(self, setup: Setup, entry: Entry) -> bool:
        return self.on_features

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        """The figures, on the first process; elsewhere `None`."""
        raise NotImplementedError

    def compare(self, results: dict[str, dict], reference: str):
        """Adds to the figures of all entries what is relative to those of the reference."""

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        """The figures by their headings; `pooling` is that of the frozen features."""
        raise NotImplementedError


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
