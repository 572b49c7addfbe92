"""Sets with masks: images, and the class of each of their pixels."""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from PIL import Image

from ..data import located, read_bytes
from ..data.bad_samples import BadImage
from ..data.decoding import upright_size
from ..data.folders import images_below, resolve_name
from ..data.formats import describe
from ..progress import progress_bar
from .sets import HELD_OUT, LabeledSet, hold_out, load_rows


__all__ = ["MaskedSplit", "load_masked"]

logger = logging.getLogger(__name__)

_MAX_CLASSES = 4096  # above, masks hold instances or colors
_MODES = ("1", "L", "P", "I")  # besides those of 16 bits, I;16 and the like


@dataclass
class MaskedSplit:
    """
    Some images with masks.

    Args:
        name (`str`): For messages.
        images, masks (`datasets.Dataset`): One column each, `image` and `mask`, of encoded images.
        folder (`str`, *optional*): Where relative paths are looked for before the working directory.
        ignore_index (`int`): Value of the pixels that do not count.
        values (`np.ndarray` of shape `(num_classes,)`): Of the classes in the masks, ascending.
        rows (`np.ndarray` of shape `(N,)`, *optional*): As of `Split`.
    """

    name: str
    images: datasets.Dataset
    masks: datasets.Dataset
    folder: str | None
    ignore_index: int
    values: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __post_init__(self):
        if self.rows is None:
            self.rows = np.arange(len(self))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.values)

    def select(self, indices: np.ndarray) -> "MaskedSplit":
        parts = {"images": self.images.select(indices), "masks": self.masks.select(indices)}
        return replace(self, **parts, rows=self.rows[indices])

    def read(self, index: int) -> bytes:
        return read_bytes(located(self.images[int(index)]["image"], self.folder))

    def mask(self, index: int) -> np.ndarray:
        """Class indices `(height, width)`, -1 where a pixel does not count."""
        pixels = self._pixels(index)
        places = np.searchsorted(self.values, pixels).clip(max=len(self.values) - 1)
        return np.where(self.values[places] == pixels, places, -1)

    def mask_name(self, index: int) -> str:
        row = self.masks[int(index)]["mask"]
        return f"{self.name}: the mask {row['path'] if row and row['path'] else f'of row {self.rows[index]}'}"

    def _pixels(self, index: int) -> np.ndarray:
        name = self.mask_name(index)
        try:
            encoded = read_bytes(located(self.masks[int(index)]["mask"], self.folder))
            image = Image.open(io.BytesIO(encoded))
            image.load()
        except (BadImage, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = describe(encoded) if isinstance(error, Image.UnidentifiedImageError) else error
            raise ValueError(f"{name} cannot be read ({reason}); fix it, or remove it and its image") from error
        fix = "save class indices as a grayscale or palette PNG, of 8 or 16 bits"
        if image.format in ("JPEG", "MPO"):
            raise ValueError(f"{name} is a JPEG, which changes the values of its pixels; {fix}")
        if image.mode not in _MODES and not image.mode.startswith("I;16"):
            raise ValueError(f"{name} has pixels of type {image.mode}, and no class for each; {fix}")
        return np.asarray(image).astype(np.int32)

    def occurring(self, index: int) -> np.ndarray:
        """The values in a mask that count; raises ValueError if it cannot be read or has not the image's size."""
        pixels = self._pixels(index)
        try:
            size = upright_size(self.read(index))
        except BadImage as error:
            raise ValueError(
                f"{self.name}: the image of row {self.rows[index]} is {error.reason} ({error}); fix it"
            ) from error
        if pixels.shape != size:
            raise ValueError(
                f"{self.mask_name(index)} has {pixels.shape[0]} x {pixels.shape[1]} pixels, and its image {size[0]} x "
                f"{size[1]} (height x width, upright as its EXIF data say); make both of one size"
            )
        values = np.unique(pixels)
        return values[values != self.ignore_index]


def load_masked(
    dataset_name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    mask_column: str = "mask",
    test_size: float | None = 0.0,
    ignore_index: int = 255,
    seed: int = 0,
    is_shown: bool = True,
) -> LabeledSet:
    """
    A set of images and masks, each of one size, with a part to learn from and one to be tested on, both `MaskedSplit`.
    The classes are the values in the masks to learn from.

    Args:
        dataset_name (`str`):
            A folder with `train/images/*` and `train/masks/*`, files of one name but for the ending, and the same
            under `test/`; a folder with `images/` and `masks/`; or what `load_labeled` takes, with a column of images
            and one of masks.
        test_size (`float`, *optional*):
            The fraction of the training images to be tested on, where there is no test split. `None` is `HELD_OUT`
            where train is the only split.
        ignore_index (`int`): Value of the pixels that do not count; -1 for none.
        is_shown (`bool`): Whether a bar is, while all masks are read once.

    Raises:
        ValueError: if it cannot be found or read; if a mask is missing, is no map of classes, has not its image's size
            or, to be tested on, has a class that no mask to learn from has; if there is a single class, or nothing
            to be tested on.
    """
    root = Path(resolve_name(dataset_name))
    load: Callable[[str], tuple[MaskedSplit, set[str]]]
    if root.is_dir() and any((folder / "masks").is_dir() for folder in (root, *root.iterdir())):
        load = partial(_from_folders, root, ignore_index=ignore_index)
    else:
        columns = {"image_column": image_column, "mask_column": mask_column}
        load = partial(_from_columns, dataset_name, config_name, **columns, ignore_index=ignore_index)
    train, splits = load(train_split)
    if test_size is None:
        test_size = HELD_OUT if splits == {"train"} and test_split == "test" else 0.0
    occurring = _occurring(train, is_shown)
    if test_size:
        held_out, rest = hold_out(np.zeros(len(train)), test_size, seed)
        if not len(held_out):
            raise ValueError(f"test_size={test_size} of {train.name}, {len(train)} images, is no image; raise it")
        train, test = train.select(rest), train.select(held_out)
        occurring, tested = ([occurring[index] for index in part] for part in (rest, held_out))
    else:
        test, _ = load(test_split)
        tested = _occurring(test, is_shown)
    train.values = test.values = _classes(train, occurring, ignore_index)
    _refuse_unknown(test, tested, is_held_out=bool(test_size))
    return LabeledSet(train, test, [str(value) for value in train.values], test_size)


def _occurring(split: MaskedSplit, is_shown: bool) -> list[np.ndarray]:
    rows = progress_bar(range(len(split)), f"{split.name}: masks", unit="masks", is_shown=is_shown, lines=True)
    return [split.occurring(index) for index in rows]


def _classes(train: MaskedSplit, occurring: list[np.ndarray], ignore_index: int) -> np.ndarray:
    values = np.unique(np.concatenate(occurring))
    if len(values) > _MAX_CLASSES:
        raise ValueError(
            f"{train.name}: the masks have {len(values):,} values, as if each were an instance or a color; save the "
            f"index of its class for every pixel, of at most {_MAX_CLASSES:,}"
        )
    if len(values) < 2:
        found = f"a single class, {values[0]}" if len(values) else "no class"
        raise ValueError(
            f"{train.name}: the masks have {found}, besides ignore_index={ignore_index}; a test needs two or more. If "
            f"{ignore_index} is a class too: --ignore_index -1"
        )
    return values


def _refuse_unknown(test: MaskedSplit, occurring: list[np.ndarray], is_held_out: bool):
    for index, values in enumerate(occurring):
        unknown = np.setdiff1d(values, test.values)
        if len(unknown):
            fix = "another --seed or --test_size" if is_held_out else "remove the image, or add some to learn it from"
            raise ValueError(
                f"{test.mask_name(index)} has pixels of class {unknown[0]}, which no mask to learn from has; {fix}; "
                f"or, if {unknown[0]} marks pixels that do not count, --ignore_index {unknown[0]}"
            )
    if not any(map(len, occurring)):
        raise ValueError(f"{test.name}: no pixel of its masks counts; all are ignore_index={test.ignore_index}")


# --- Where the files are ---------------------------------------------------------------------------------------------


def _from_folders(root: Path, split: str, ignore_index: int) -> tuple[MaskedSplit, set[str]]:
    """A split, and the names of all splits."""
    is_flat = (root / "masks").is_dir()
    folder = root if is_flat else root / split
    splits = {"train"} if is_flat else {path.name for path in root.iterdir() if (path / "images").is_dir()}
    if is_flat and split != "train":
        raise ValueError(
            f"dataset_name={root} has no split {split!r}, as images/ and masks/ lie in it; give --test_size 0.2, or "
            f"make train/images, train/masks, {split}/images and {split}/masks"
        )
    name = f"{root}, {split}"
    for kind in ("images", "masks"):
        if not (folder / kind).is_dir():
            raise ValueError(
                f"{name}: no folder {folder / kind}; make it, or name other splits (train_split, test_split)"
            )
    images, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    if not images:
        raise ValueError(f"{name}: no image in {folder / 'images'}; put some there")
    missing = [stem for stem in images if stem not in masks]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} images have no mask, the first is {images[missing[0]]}; put its mask at "
            f"{folder / 'masks' / missing[0]}.png, or remove the image"
        )
    if len(masks) > len(images):
        logger.warning("%s: %d masks have no image, and are left out", name, len(masks) - len(images))
    made = [
        datasets.Dataset.from_dict(
            {column: [{"bytes": None, "path": str(paths[stem])} for stem in images]},
            features=datasets.Features({column: datasets.Image(decode=False)}),
        )
        for column, paths in (("image", images), ("mask", masks))
    ]
    return MaskedSplit(name, *made, folder=None, ignore_index=ignore_index), splits


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder by their relative path without the ending."""
    paths = {}
    for path in images_below(folder):
        stem = str(path.with_suffix(""))
        if stem in paths:
            raise ValueError(f"{folder} has {paths[stem].name} and {path.name}, of one name; remove one of them")
        paths[stem] = folder / path
    return paths


def _from_columns(
    dataset_name: str, config_name: str | None, split: str, image_column: str, mask_column: str, ignore_index: int
) -> tuple[MaskedSplit, set[str]]:
    """A split, and the names of all splits."""
    rows, name = load_rows(dataset_name, config_name, split), f"{dataset_name}, {split}"
    made = []
    for field, column, ours in (("image_column", image_column, "image"), ("mask_column", mask_column, "mask")):
        others = ", ".join(rows.column_names)
        if column not in rows.column_names:
            raise ValueError(
                f"{name}: no column {column!r}; set {field} to one of {others}, or give a folder with images/ and "
                "masks/, or with train/images, train/masks, test/images and test/masks"
            )
        try:
            own = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{name}: {field}={column!r} holds {rows.features[column]} and no images; set it to one of {others}"
            ) from error
        made.append(own if column == ours else own.rename_column(column, ours))
    path = resolve_name(dataset_name)
    folder = path if os.path.isdir(path) else None
    return MaskedSplit(name, *made, folder=folder, ignore_index=ignore_index), set(rows.info.splits or ())
