"""Features of the images of a split, on any number of processes, and their cache."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import nn

from ..data import located, read_bytes
from ..data.bad_samples import BadImage
from ..data.loading import Patient, worker_options
from ..files import new_file
from .sets import Split


__all__ = ["ALONE", "Extractor", "Images", "KeptImages", "Processes", "cached", "raw_patches", "raw_pixels"]

logger = logging.getLogger(__name__)


class Processes(NamedTuple):
    """
    This process among those that work together. `gather` hands the list of each to all, joined in the order of their
    index.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[list], list] = list


ALONE = Processes()


class Images(torch.utils.data.Dataset):
    """
    The images of a split, each prepared in the loader's workers by `prepare(encoded bytes, index)`.

    Raises:
        ValueError: for an image that cannot be used: an evaluation leaves nothing out.
    """

    def __init__(self, split: Split, prepare: Callable):
        self.split, self.prepare = split, prepare

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        images = self.split.images[indices]["image"]
        return [self._prepare(image, index, index) for image, index in zip(images, indices, strict=True)]

    def _prepare(self, image: dict, index: int, argument: int) -> torch.Tensor:
        try:
            return self.prepare(read_bytes(located(image, self.split.folder)), argument)
        except BadImage as error:
            path = f", {image['path']}," if image and image["path"] else ""
            raise ValueError(
                f"{self.split.name}: the image of row {self.split.rows[index]}{path} cannot be used ({error.reason}: "
                f"{error.fault}); fix or remove it, as an evaluation leaves no image out"
            ) from error


class KeptImages(Images):
    """Images that are prepared once and kept, up to a gigabyte of them, for a set that is seen again and again."""

    def __init__(self, split: Split, prepare: Callable):
        super().__init__(split, prepare)
        self.kept, self.num_bytes = {}, 0

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if all(index in self.kept for index in indices):
            return [self.kept[index] for index in indices]
        images = super().__getitems__(indices)
        if self.num_bytes < 2**30:
            self.kept.update(zip(indices, images, strict=True))
            self.num_bytes += sum(image.nbytes for image in images)
        return images


def _silent(rounds: Iterable, description: str) -> Iterable:
    return rounds


@dataclass(frozen=True)
class Extractor:
    """
    Calls a function on all images, batch by batch. The set is cut into the same batches on any number of processes,
    which take turns, so that the result is the same.

    Args:
        batch_size (`int`): Images at a time on one process.
        num_workers (`int`): Loader processes for each process.
        progress (callable): Iterable of rounds, description -> an iterable of the same, e.g. a bar.
    """

    batch_size: int = 256
    num_workers: int = 0
    processes: Processes = ALONE
    progress: Callable[[Iterable, str], Iterable] = _silent

    @torch.no_grad()
    def __call__(
        self, encode: Callable[[torch.Tensor], dict[str, torch.Tensor]], images: Images, description: str = ""
    ) -> dict[str, np.ndarray] | None:
        """
        What `encode` (a batch of prepared images -> named tensors with as many rows) makes of all images, in their
        order, in fp32; on the first process, elsewhere `None`.
        """
        starts, processes = range(0, len(images), self.batch_size), self.processes
        own = [
            list(range(start, min(start + self.batch_size, len(images))))
            for start in starts[processes.index :: processes.count]
        ]
        loader = Patient(
            torch.utils.data.DataLoader(
                images,
                batch_sampler=own,
                **worker_options(self.num_workers),
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # or starting it would draw a number from the global one
            )
        )
        arrays, num_rows = {}, 0
        for _ in self.progress(range(-(-len(starts) // processes.count)), description):
            batch = next(loader, None)  # there may be one round more on the first processes
            made = None if batch is None else {name: x.float().cpu().numpy() for name, x in encode(batch).items()}
            gathered = processes.gather([made])
            for part in gathered if processes.index == 0 else []:
                for name, rows in (part or {}).items():
                    if name not in arrays:
                        arrays[name] = np.empty((len(images), *rows.shape[1:]), dtype=np.float32)
                    arrays[name][num_rows : num_rows + len(rows)] = rows
                num_rows += len(rows) if part else 0
        return arrays if processes.index == 0 else None


def cached(folder: Path | None, facts: dict, make: Callable[[], dict | None], processes: Processes = ALONE):
    """
    Arrays by name from the cache, or made and put there.

    Args:
        folder (`Path`, *optional*): `None` makes them anew.
        facts (`dict`): All that they depend on; its hash is the file's name.
        make (callable): Returns them on the first process; called by all.
    """
    if folder is None:
        return make()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = Path(folder) / f"{key}.safetensors"
    arrays = None
    if processes.index == 0 and path.exists():
        try:
            arrays = safetensors.numpy.load_file(path)
        except SafetensorError as error:  # damaged: made anew
            logger.warning("%s: %s", path, error)
    if processes.gather([arrays is not None])[0]:
        return arrays
    arrays = make()
    if arrays is not None:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial:
                safetensors.numpy.save_file(contiguous, partial, {"facts": json.dumps(facts, default=str)})
        except (OSError, SafetensorError) as error:  # a full disk costs the cache, not the evaluation
            logger.warning("features are not cached: %s", error)
    return arrays


def raw_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """The baseline features `(B, C * h * w)`: the pixels themselves, images above 32 x 32 reduced to that."""
    height, width = pixel_values.shape[-2:]
    small = nn.functional.adaptive_avg_pool2d(pixel_values, (min(32, height), min(32, width)))
    return small.flatten(1)


def raw_patches(pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The pixels of every patch, `(B, C * p * q, h, w)`, patches above 16 x 16 reduced to that."""
    (height, width), (rows, columns) = pixel_values.shape[-2:], grid
    size = (rows * max(1, min(16, height // rows)), columns * max(1, min(16, width // columns)))
    small = nn.functional.adaptive_avg_pool2d(pixel_values, size)
    return small.unflatten(2, (rows, -1)).unflatten(4, (columns, -1)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
