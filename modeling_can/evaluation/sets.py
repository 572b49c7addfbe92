"""Labeled sets: images to learn from, images to be tested on, and the names of the classes."""

import collections
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
from datasets.exceptions import DatasetGenerationError

from ..data import located, read_bytes
from ..data.arrays import dtype_of, encode_array
from ..data.faults import (
    builder_of,
    configurations_in,
    load,
    refuse_other_than_images,
    refuse_unwritable_cache,
    refused_arrays,
)
from ..data.folders import (
    images_below,
    left_out_of_split,
    load_arguments,
    refuse_misread_folders,
    resolve_name,
    say_that_listing_is_slow,
)


__all__ = ["HELD_OUT", "LabeledSet", "Split", "by_class", "hold_out", "load_labeled", "load_rows", "load_split"]

logger = logging.getLogger(__name__)


@dataclass
class Split:
    """
    Some labeled images.

    Args:
        name (`str`): For messages.
        images (`datasets.Dataset`): One column, `image`, of encoded images.
        labels (`np.ndarray` of shape `(N,)`): Class indices.
        folder (`str`, *optional*): Where images with relative paths are looked for before the working directory.
        rows (`np.ndarray` of shape `(N,)`, *optional*):
            Their numbers in the split that was loaded, for messages; by default 0 to N - 1.
    """

    name: str
    images: datasets.Dataset
    labels: np.ndarray
    folder: str | None = None  # that relative paths begin at
    rows: np.ndarray | None = None

    def __post_init__(self):
        if self.rows is None:
            self.rows = np.arange(len(self))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many occur."""
        return len(np.unique(self.labels))

    def select(self, indices: np.ndarray) -> "Split":
        return Split(
            self.name, self.images.select(indices), self.labels[indices], self.folder, rows=self.rows[indices]
        )

    def read(self, index: int) -> bytes:
        return read_bytes(located(self.images[int(index)]["image"], self.folder))


_SPLIT_FLAGS = "--train_split and --test_split (while pre-training, --probe_train_split and --probe_test_split)"
HELD_OUT = 0.2  # of every class, where a set has no test split


class LabeledSet(NamedTuple):
    """
    Images to learn from, images to be tested on, the names of the classes, and which fraction of the training split
    the test images are; 0 where they have a split of their own.
    """

    train: Split
    test: Split
    class_names: list[str]
    test_size: float = 0.0


def load_rows(dataset_name: str, config_name: str | None, split: str) -> datasets.Dataset:
    """One split of a set, whatever its columns; raises ValueError if it cannot be found or read, or is empty."""
    name = f"{dataset_name}, {split}"
    path = resolve_name(dataset_name)
    if os.path.isdir(path):
        refuse_misread_folders(Path(path))
    try:
        arguments = load_arguments(dataset_name, config_name)
        if os.path.isdir(path):
            say_that_listing_is_slow(path)
            files = builder_of(arguments).config.data_files or {}
            _, line = left_out_of_split(path, "+".join(map(str, files)), files, labeled=True)
            _warn_once(line)
        rows = load(arguments, split, dataset_name)
    except (DatasetGenerationError, pyarrow.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (OSError, RuntimeError) as error:  # no such folder or set, no network, or one that is a script
        refuse_unwritable_cache(error)
        raise ValueError(
            f"dataset_name={dataset_name} cannot be loaded: {error}. Give a Hub id, or a folder of parquet shards "
            "(train-*.parquet, test-*.parquet) or of class folders (train/CLASS/*.jpg, test/CLASS/*.jpg)"
        ) from error
    except ValueError as error:
        advice = ""
        if found := configurations_in(error):
            raise ValueError(
                f"{dataset_name} has the configurations {found}; set dataset_config_name (while pre-training, "
                "probe_dataset_config_name) to one of them"
            ) from error
        if "split" in str(error).lower():
            advice = f" Name others with {_SPLIT_FLAGS}; --test_size 0.2 of modeling-can eval holds out a fraction"
        raise ValueError(f"{name}: {error}{advice}") from error
    if not len(rows):
        raise ValueError(f"{name} is empty")
    return rows


def load_split(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    arrays: bool = False,
) -> tuple[Split, list[str]]:
    """
    One split of a set that `datasets.load_dataset` reads, and the names of its classes: those of a `ClassLabel`
    column, or the sorted values of any other. With `arrays`, as of `ImageSource`, the images may be a column of arrays
    or of nested lists.

    Raises:
        ValueError: if it cannot be found, is empty, lacks a column, or has rows without a label.
    """
    name, path = f"{dataset_name}, {split}", resolve_name(dataset_name)
    rows = load_rows(dataset_name, config_name, split)
    for field, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            others = [other for other in rows.column_names if other != image_column or field == "image_column"]
            fix = (
                f"set {field} to one of {', '.join(others)}"
                if others
                else f"class folders make one, where every image lies at the same depth{_uneven(Path(path))}"
            )
            raise ValueError(f"{name}: no column {column!r}; {fix}")

    labels, kind = rows.with_format(None)[label_column][:], rows.features[label_column]
    labels = np.asarray(labels) if isinstance(kind, datasets.Value | datasets.ClassLabel) else np.empty((0, 0))
    if labels.ndim != 1 or labels.dtype.kind not in "iubUO":
        raise ValueError(f"{name}: {label_column!r} must hold one class for each image, not {kind}")
    dtype = dtype_of(rows.features[image_column]) if arrays else None
    if dtype is None:
        refuse_other_than_images(name, image_column, rows.features)
    is_class = isinstance(kind, datasets.ClassLabel)
    missing = [row for row, label in enumerate(labels) if label is None or (is_class and label < 0)]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} rows have no label, the first is row {missing[0]}; remove them, or name a "
            f"labeled split with {_SPLIT_FLAGS}"
        )
    values, indices = np.unique(labels, return_inverse=True)
    names, indices = (list(kind.names), labels) if is_class else ([str(value) for value in values], indices)
    try:
        images = rows.select_columns([image_column])
        if dtype is None:
            images = images.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        if dtype_of(rows.features[image_column]):  # lists whose shape their type does not tell
            raise refused_arrays(name, image_column, rows.features[image_column]) from error
        raise ValueError(
            f"{name}: image_column={image_column!r} holds {rows.features[image_column]} and no images; set it to one "
            f"of {', '.join(rows.column_names)}"
        ) from error
    images = images if image_column == "image" else images.rename_column(image_column, "image")
    images = images.with_transform(functools.partial(_as_files, dtype=dtype)) if dtype else images
    return Split(name, images, indices.astype(np.int64), path if os.path.isdir(path) else None), names


def _as_files(rows: dict, dtype: str) -> dict:
    images = (
        None if array is None else {"bytes": encode_array(array, dtype), "path": None} for array in rows["image"]
    )
    return {"image": list(images)}


def _uneven(folder: Path) -> str:
    """Of class folders, which image lies at another depth than most; nothing where there is none."""
    images = images_below(folder)
    depths = collections.Counter(len(image.parts) for image in images)
    if len(depths) < 2:
        return " in two classes or more: train/CLASS/*.jpg, test/CLASS/*.jpg"
    usual = depths.most_common(1)[0][0]
    other = next(image for image in images if len(image.parts) != usual)
    return f" (train/CLASS/*.jpg, test/CLASS/*.jpg): move or remove {other}, whose depth is another than most have"


@functools.cache
def _warn_once(line: str):
    """Training and test images are mostly of one folder."""
    if line:
        logger.warning(line)


def load_labeled(
    dataset_name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
    test_size: float | None = 0.0,
    seed: int = 0,
    arrays: bool = False,
) -> LabeledSet:
    """
    A set with a part to learn from and one to be tested on.

    Args:
        dataset_name (`str`): Hub id, folder of parquet shards or of class folders, or `"sample_data"`.
        train_split, test_split (`str`): Names, or slices such as `train[:80%]`.
        test_size (`float`, *optional*):
            For a set without a test split, the fraction of every class of the training split to hold out. `None`
            holds out `HELD_OUT` where train is the only split, as of class folders that are in no folder of a split.
        arrays (`bool`): As of `load_split`.

    Raises:
        ValueError: as `load_split`; if there is a single class, or a test label that no training image has.
    """
    columns = {"image_column": image_column, "label_column": label_column, "arrays": arrays}
    train, names = load_split(dataset_name, config_name, train_split, **columns)
    known = np.unique(train.labels)
    if len(known) < 2:
        raise ValueError(f"{train.name} has a single class, {names[known[0]]!r}; a test needs two or more")
    if test_size is None:
        test_size = HELD_OUT if set(train.images.info.splits or ()) == {"train"} and test_split == "test" else 0.0
    if test_size:
        held_out, rest = hold_out(train.labels, test_size, seed)
        if not len(held_out):
            raise ValueError(f"test_size={test_size} of {train.name} is no image of any class; raise it")
        return LabeledSet(train.select(rest), train.select(held_out), names, test_size)
    test, test_names = load_split(dataset_name, config_name, test_split, **columns)
    unseen = [
        test_names[label] for label in np.unique(test.labels) if test_names[label] not in {names[k] for k in known}
    ]
    if unseen:
        raise ValueError(
            f"{len(unseen)} labels of {test.name} have no image in {train.name}: {', '.join(unseen[:10])}; remove "
            f"those rows, or name other splits with {_SPLIT_FLAGS}"
        )
    ours = np.array([names.index(name) if name in names else -1 for name in test_names])
    return LabeledSet(train, Split(test.name, test.images, ours[test.labels], test.folder), names)


def by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The indices of every class, each in random order."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Random indices of `share` of every class, rounded to whole images but never all of them, and those of the rest;
    both sorted.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for own in by_class(labels, np.random.default_rng(seed)):
        chosen[own[: min(round(share * len(own)), len(own) - 1)]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
