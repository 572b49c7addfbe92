"""
Accuracy where the pictures are not those of the training set: under common corruptions (Hendrycks and Dietterich,
arXiv 1903.12261) and on further labelled sets with some of its classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from ..recipe import INSTALL, load_yaml
from .features import ALONE, Pictures, Processes, extract
from .sets import Split, load_split


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
    An encoded picture -> all its corrupted versions `(corruptions * severities, C, H, W)` uint8, corrupted after
    resize and crop, as in ImageNet-C. What is drawn depends on the seed, the picture's index and the version alone.

    Raises:
        ValueError: for pictures below 32 x 32 pixels, the least that the corruptions are made for.
    """

    def __init__(self, preprocessor, names: list[str], severities: tuple[int, ...] = SEVERITIES, seed: int = 0):
        if not preprocessor.in_two_steps:
            raise ValueError(
                f"{type(preprocessor.processor).__name__} does more than resize, crop, rescale and normalise, so that "
                "its pictures cannot be corrupted in between; give another (--processor_name_or_path)"
            )
        if min(preprocessor.image_size) < 32:
            raise ValueError(
                f"image_size={preprocessor.image_size}: the corruptions need 32 x 32 pixels or more (--image_size)"
            )
        self.preprocessor, self.seed = preprocessor, seed
        self.versions = [(name, severity) for name in names for severity in severities]

    def __call__(self, encoded: bytes, index: int) -> torch.Tensor:
        from imagecorruptions import corrupt

        picture = self.preprocessor.decode(encoded).permute(1, 2, 0).numpy()
        before, versions = np.random.get_state(), []  # the corruptions draw from numpy's global generator
        for version, (name, severity) in enumerate(self.versions):
            number = int(np.random.default_rng((self.seed, index, version)).integers(2**31))
            np.random.seed(number)
            # These two have generators of their own.
            own = {"seed": number} if name in ("impulse_noise", "glass_blur") else {}
            corrupted = corrupt(picture, severity, name, **own)
            versions.append(torch.tensor(corrupted[:, :, : picture.shape[2]]).permute(2, 0, 1))
        np.random.set_state(before)
        return torch.stack(versions)


def corrupted_predictions(
    classify: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    corrupted: Corrupted,
    batch_size: int,
    num_workers: int = 0,
    processes: Processes = ALONE,
    progress=iter,
) -> np.ndarray | None:
    """
    What `classify` (uint8 pictures `(B, C, H, W)` -> logits) says of all versions of all pictures, `(N, versions)`; on
    the first process, elsewhere `None`.
    """

    def predict(versions):  # (pictures, versions, C, H, W)
        logits = torch.cat([classify(part) for part in versions.flatten(0, 1).split(batch_size)])
        return {"predictions": logits.argmax(dim=1).unflatten(0, versions.shape[:2])}

    pictures = Pictures(split, corrupted)
    made = extract(predict, pictures, max(1, batch_size // len(corrupted.versions)), num_workers, processes, progress)
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
    """A labelled set with some of the classes; predictions are then made among these alone, `classes`, sorted."""

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
    split = Split(split.name, split.pictures, classes[split.labels], split.folder).select(kept)
    return FurtherSet(split, np.unique(classes[classes >= 0]))
