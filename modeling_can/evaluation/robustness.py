"""
Accuracy where the images are not those of the training set: under common corruptions (Hendrycks and Dietterich,
arXiv 1903.12261) and on further labeled sets with some of its classes.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from ..conversion.importing import has_classifier
from ..fields import load_yaml
from ..progress import INSTALL, tell
from .encoders import classifier_class, load_config, load_model, pooled
from .features import Extractor, Images
from .linear import fit_probe
from .protocol import Entry, Features, Measure, Panel, Protocol, Setup
from .sets import Split, load_split


__all__ = [
    "Corrupted",
    "FurtherSet",
    "GROUPS",
    "Robustness",
    "SEVERITIES",
    "accuracy_by_corruption",
    "class_order",
    "compare_corruption",
    "corrupted_predictions",
    "corruption_error",
    "corruptions_by_group",
    "load_further_sets",
]

SEVERITIES = (1, 2, 3, 4, 5)
GROUPS = ("noise", "blur", "weather", "digital")


def corruptions_by_group(groups: tuple[str, ...] = GROUPS) -> dict[str, list[str]]:
    """
    The names of the corruptions in each group, as the package `imagecorruptions` has them.

    Raises:
        ValueError: if it is not installed, or has no such group.
    """
    try:
        from imagecorruptions import get_corruption_names
    except ImportError as error:
        raise ValueError(
            f"the robustness task needs a package that is not installed ({error}): {INSTALL.format('robustness')}"
        ) from error
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"corruptions={group}: known are {', '.join(GROUPS)}")
    return {group: get_corruption_names(group) for group in groups}


class Corrupted:
    """
    An encoded image -> all its corrupted versions `(corruptions * severities, C, H, W)` uint8, corrupted after
    resize and crop, as in ImageNet-C. What is drawn depends on the seed, the image's index and the version alone.

    Raises:
        ValueError: for images below 32 x 32 pixels, the least that the corruptions are made for.
    """

    def __init__(self, preprocessor, names: list[str], severities: tuple[int, ...] = SEVERITIES, seed: int = 0):
        if not preprocessor.in_two_steps:
            raise ValueError(
                f"{type(preprocessor.processor).__name__} does more than resize, crop, rescale and normalize, so that "
                "its images cannot be corrupted in between; give another (--processor_name_or_path)"
            )
        if min(preprocessor.image_size) < 32:
            raise ValueError(
                f"image_size={preprocessor.image_size}: the corruptions need 32 x 32 pixels or more (--image_size)"
            )
        self.preprocessor, self.seed = preprocessor, seed
        self.versions = [(name, severity) for name in names for severity in severities]

    def __call__(self, encoded: bytes, index: int) -> torch.Tensor:
        from imagecorruptions import corrupt

        image = self.preprocessor.decode(encoded).permute(1, 2, 0).numpy()
        before, versions = np.random.get_state(), []  # the corruptions draw from numpy's global generator
        for version, (name, severity) in enumerate(self.versions):
            number = int(np.random.default_rng((self.seed, index, version)).integers(2**31))
            np.random.seed(number)
            # These two have generators of their own.
            own = {"seed": number} if name in ("impulse_noise", "glass_blur") else {}
            corrupted = corrupt(image, severity, name, **own)
            versions.append(torch.tensor(corrupted[:, :, : image.shape[2]]).permute(2, 0, 1))
        np.random.set_state(before)
        return torch.stack(versions)


def corrupted_predictions(
    classify: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    corrupted: Corrupted,
    extractor: Extractor = Extractor(),  # noqa: B008  frozen
    description: str = "",
) -> np.ndarray | None:
    """
    What `classify` (uint8 images `(B, C, H, W)` -> logits) says of all versions of all images, `(N, versions)`; on
    the first process, elsewhere `None`.
    """

    def predict(versions):  # (images, versions, C, H, W)
        logits = torch.cat([classify(part) for part in versions.flatten(0, 1).split(extractor.batch_size)])
        return {"predictions": logits.argmax(dim=1).unflatten(0, versions.shape[:2])}

    at_once = max(1, extractor.batch_size // len(corrupted.versions))
    made = replace(extractor, batch_size=at_once)(predict, Images(split, corrupted), description)
    return None if made is None else made["predictions"].astype(np.int64)


def accuracy_by_corruption(right: np.ndarray, versions: list[tuple[str, int]]) -> dict[str, dict[str, float]]:
    """Accuracy for each corruption and severity of `right`, `(N, versions)` booleans."""
    table = {}
    for (name, severity), accuracy in zip(versions, right.mean(axis=0), strict=True):
        table.setdefault(name, {})[str(severity)] = float(accuracy)
    return table


def corruption_error(accuracies: dict, reference: dict) -> dict[str, float]:
    """
    For each corruption the sum of the errors over the severities, divided by that of a reference model, and `"mean"`,
    the mCE (arXiv 1903.12261, section 4); 1 is as good as the reference.

    Raises:
        ValueError: if the reference makes no error.
    """
    errors = {}
    for name, by_severity in accuracies.items():
        theirs = sum(1 - accuracy for accuracy in reference[name].values())
        if theirs == 0:
            raise ValueError(f"reference_model makes no error under {name}; name one that does")
        errors[name] = sum(1 - accuracy for accuracy in by_severity.values()) / theirs
    return {"mean": float(np.mean(list(errors.values()))), **errors}


# --- Further sets ----------------------------------------------------------------------------------------------------


class FurtherSet(NamedTuple):
    """A labeled set with some of the classes; predictions are then made among these alone, `classes`, sorted."""

    split: Split
    classes: np.ndarray


def load_further_sets(path: str, class_names: list[str]) -> dict[str, FurtherSet]:
    """
    Sets described in a YAML file, a mapping of names to:

        imagenet-r:
          dataset_name: HUB_ID_OR_FOLDER
          split: test                 # config_name, image_column, label_column as for the main set
          class_map: classes.json     # or a mapping: label of that set -> our class (name or index), null: left out

    Without a `class_map`, labels are our classes by name.

    Raises:
        ValueError: for a file or a set that cannot be read, or a label that has no class.
    """
    try:
        entries = load_yaml(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"further_sets={path} cannot be read: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"further_sets={path} must map names to dataset_name, split, class_map ...")
    return {
        name: _load_further_set(name, dict(entry), Path(path).parent, class_names) for name, entry in entries.items()
    }


def _load_further_set(name: str, entry: dict, folder: Path, class_names: list[str]) -> FurtherSet:
    class_map = entry.pop("class_map", None)
    known = {"dataset_name", "config_name", "split", "image_column", "label_column"}
    if not set(entry) <= known or "dataset_name" not in entry:
        raise ValueError(f"further set {name} needs dataset_name and knows {', '.join(sorted(known))}, class_map")
    if isinstance(class_map, str):
        try:
            text = (folder / Path(class_map).expanduser()).read_text()
            class_map = json.loads(text) if class_map.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"further set {name}: class_map={class_map} cannot be read: {error}") from error
    if class_map is not None and not isinstance(class_map, dict):
        raise ValueError(f"further set {name}: class_map must map labels to classes, not be {class_map!r}")
    split, names = load_split(**{"split": "test", **entry})
    position = {class_name: index for index, class_name in enumerate(class_names)}
    classes = np.full(len(names), -1)
    for index, label in enumerate(names):
        ours = label
        if class_map is not None:
            entry_of = {str(key): value for key, value in class_map.items()}
            if label not in entry_of and str(index) not in entry_of:
                raise ValueError(f"further set {name}: class_map has no entry for {label!r} (null leaves it out)")
            ours = entry_of.get(label, entry_of.get(str(index)))
            if ours is None:
                continue
        classes[index] = ours if isinstance(ours, int) else position.get(ours, -1)
        if not 0 <= classes[index] < len(class_names):
            raise ValueError(
                f"further set {name}: {ours!r} is none of our {len(class_names)} classes; give a class_map from its "
                "labels to them"
            )
    kept = np.flatnonzero(classes[split.labels] >= 0)
    if not len(kept):
        raise ValueError(f"further set {name}: class_map leaves all rows out")
    split = Split(split.name, split.images, classes[split.labels], split.folder).select(kept)
    return FurtherSet(split, np.unique(classes[classes >= 0]))


# --- The protocol ----------------------------------------------------------------------------------------------------


class Robustness(Protocol):
    """Accuracy under corruptions and on further sets, of a model's own classifier of these classes, or of a probe."""

    name, rank, for_reference = "robustness", 2, True
    panel = Panel("corrupted", "severity", key="by_severity")

    def prepare(self, setup: Setup) -> dict[str, FurtherSet]:
        path = setup.settings.further_sets
        with setup.accelerator.local_main_process_first():
            return load_further_sets(path, setup.data.class_names) if path else {}

    def check(self, setup: Setup, entry: Entry):
        if entry.preprocessor.reads_arrays:
            raise ValueError(
                f"the robustness task corrupts RGB and gray images, and {entry.name} takes arrays of "
                f"{entry.preprocessor.num_channels} channels; leave it out"
            )
        names = [name for names in corruptions_by_group(setup.settings.corruptions).values() for name in names]
        Corrupted(entry.preprocessor, names)

    def needs_features(self, setup: Setup, entry: Entry) -> bool:
        return _own_classes(setup, entry) is None

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        settings, test = setup.settings, setup.data.test
        groups = corruptions_by_group(settings.corruptions)
        classify, head = _classifier(setup, entry, features.train)
        clean = _logits(setup, entry, classify, test)
        corrupted = Corrupted(entry.preprocessor, [name for names in groups.values() for name in names], SEVERITIES,
                              settings.seed)  # fmt: skip
        predictions = corrupted_predictions(
            classify=classify,
            split=test,
            corrupted=corrupted,
            extractor=setup.extractor,
            description=f"{entry.name}: corrupted",
        )
        further = {
            name: (_logits(setup, entry, classify, other.split), other)
            for name, other in setup.prepared[self.name].items()
        }
        if not setup.is_main:
            return None
        right = predictions == test.labels[:, None]
        on_clean = setup.score(clean.argmax(axis=1))
        figures = {"head": head, "clean": on_clean, **self._corrupted(setup, right, corrupted.versions, groups)}
        figures["relative_drop"] = 1 - figures["accuracy"] / on_clean["accuracy"] if on_clean["accuracy"] else None
        if further:
            figures["further_sets"] = {
                name: {
                    **setup.score(other.classes[theirs[:, other.classes].argmax(axis=1)], other.split.labels),
                    "num_images": len(other.split),
                    "num_classes": len(other.classes),
                }
                for name, (theirs, other) in further.items()
            }
        return figures

    @staticmethod
    def _corrupted(setup: Setup, right: np.ndarray, versions: list[tuple[str, int]], groups: dict) -> dict:
        """Accuracy over everything, and by severity, group and corruption, of `right`, `(N, versions)` booleans."""
        table, severities = accuracy_by_corruption(right, versions), np.array([s for _, s in versions])

        def mean(where) -> dict:
            return {"accuracy": float(right[:, where].mean()), "interval": setup.interval(right[:, where].mean(1))}

        return {
            **mean(slice(None)),
            "by_severity": {str(severity): mean(severities == severity) for severity in SEVERITIES},
            "by_group": {
                group: float(np.mean([list(table[name].values()) for name in names]))
                for group, names in groups.items()
            },
            "by_corruption": table,
        }

    def compare(self, results: dict[str, dict], reference: str):
        compare_corruption(results, reference)

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        of = {"pooling": pooling if figures["head"] == "linear probe" else "mean"}
        clean = figures["clean"]
        rows = {
            "corrupted": Measure(figures["accuracy"], figures["interval"], **of),
            "clean, same classifier": Measure(clean["accuracy"], clean["interval"], **of),
        }
        if "corruption_error" in figures:
            rows["mean corruption error"] = Measure(figures["corruption_error"]["mean"], None, "mce", **of)
        for name, other in figures.get("further_sets", {}).items():
            rows[name] = Measure(other["accuracy"], other["interval"], **of)
        return rows


def compare_corruption(results: dict[str, dict], reference: str):
    """Adds the corruption errors relative to the reference; says why, where there can be none."""
    theirs = results[reference]["robustness"]["by_corruption"]
    for figures in results.values():
        if "robustness" in figures:
            try:
                errors = corruption_error(figures["robustness"]["by_corruption"], theirs)
            except ValueError as error:
                tell(f"no corruption errors: {error}")
                return
            figures["robustness"]["corruption_error"] = {"reference": reference, **errors}


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


def _own_classes(setup: Setup, entry: Entry) -> list[int] | None:
    """Of a model that was saved with a classifier of our classes, its index of each."""
    if entry.path is None:
        return None
    config = load_config(entry.path, setup.settings.trust_remote_code)  # of the whole, which may be a pair
    return class_order(config.id2label, setup.data.class_names) if has_classifier(config) else None


def _classifier(setup: Setup, entry: Entry, train: np.ndarray | None) -> tuple[Callable, str]:
    """Images -> logits `(B, num_classes)`, of the model's own classifier of these classes, or a linear probe."""
    order = _own_classes(setup, entry)
    if order is not None:
        trust = setup.settings.trust_remote_code
        model = load_model(entry.path, classifier_class(entry.path, trust), trust).eval().to(setup.device)
        order = torch.tensor(order, device=setup.device)

        def classify(images):
            with setup.accelerator.autocast():
                pixels = entry.preprocessor.normalize(images.to(setup.device))
                return model(pixel_values=pixels, **entry.encoder.options).logits.float()[:, order]

        return classify, "its own classifier"
    probe = setup.processes.gather([fit_probe(setup, train) if setup.is_main else None])[0]
    weight, bias = (torch.from_numpy(x).to(setup.device) for x in (probe.weight, probe.bias))
    pooling = setup.pooling(entry)

    def classify(images):
        return pooled(entry.encode(images), pooling, entry.name).float().to(setup.device) @ weight.T + bias

    return classify, "linear probe"


def _logits(setup: Setup, entry: Entry, classify: Callable, split: Split) -> np.ndarray | None:
    images = Images(split, entry.preprocessor.decode)
    made = setup.extractor(lambda batch: {"logits": classify(batch)}, images, f"{entry.name}: {split.name}")
    return None if made is None else made["logits"]
