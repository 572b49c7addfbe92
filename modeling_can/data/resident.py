"""
A data set that is decoded once and stays on the device that trains, as uint8 or, of arrays, fp32. Random resized
crops are computed there, in the boxes that `crops.RandomCrops` draws for the same image, epoch and seed.

For small images: a GPU trains on 32 x 32 pixels several times faster than worker processes decode and crop them.
"""

import functools
import itertools
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets.distributed import split_dataset_by_node
from torch.nn.functional import interpolate

from ..progress import progress_bar
from .bad_samples import BadImage, append_line, bad_sample_line, bad_sample_lines, refuse_bad
from .crops import RandomCrops
from .decoding import decode
from .loading import Patient, approximate_position, outlive_stop_signals, worker_options, worker_states
from .reading import image_name
from .sources import ImageSource


__all__ = [
    "MEMORY_FRACTION",
    "CropPlan",
    "ResidentImages",
    "ResidentLoader",
    "crop",
    "read_images",
    "resident_images",
    "resize_weights",
]


logger = logging.getLogger(__name__)

MEMORY_FRACTION = 0.25  # of the device's free memory, which the images may take; twice as much while they are sorted
_MARGIN = 256 / 224  # images that are brought to one size keep this much more than a view has
_SEVERAL_SIZES = "the images have several sizes"


@dataclass
class ResidentImages:
    """
    Args:
        pixels (`torch.Tensor` of shape `(num_images, num_channels, height, width)`):
            uint8, of arrays fp32 in [0, 1]; on the device.
        checksums (`np.ndarray` of shape `(num_images,)`): CRC-32 of the encoded bytes, which decides on the boxes.
        names (`list[str]`): Of the images, for messages.
        bad (`list[tuple[str, str]]`): Reason, and line of the bad-sample log, of each image that cannot be used.
    """

    pixels: torch.Tensor
    checksums: np.ndarray
    names: list[str]
    bad: list[tuple[str, str]]

    def log_bad(self, source_name: str, max_bad_fraction: float, log: Path | None):
        """Appends the bad images to the log, but for those that are there. ValueError if they are too many."""
        known = set(bad_sample_lines(log))
        for _, line in self.bad:
            if line not in known:
                append_line(log, line)
        if self.bad:
            num_seen = len(self.names) + len(self.bad)
            refuse_bad(
                source_name=source_name,
                num_bad=len(self.bad),
                num_seen=num_seen,
                max_bad_fraction=max_bad_fraction,
                last=self.bad[-1][1],
                log=log,
            )


def resident_images(
    choice: bool | str, source: ImageSource, crops: RandomCrops, device: torch.device, num_workers: int
) -> tuple[ResidentImages | None, str | None]:
    """
    The images for the recipe's `data_on_device`, or None where they are to be streamed; and a remark for the user.
    `"auto"` takes a local source whose images have one size and fit into a quarter of a GPU's memory. `True` brings
    images of several sizes to one.

    Raises:
        ValueError: for `True`, if the images take too much memory; or if no image can be used.
        OSError: if the source cannot be read.
    """
    is_gpu = device.type == "cuda"
    if not choice or (choice == "auto" and (not is_gpu or source.is_remote or source.num_images() is None)):
        return None, None
    memory = torch.cuda.mem_get_info(device)[0] if is_gpu else psutil.virtual_memory().available
    read = functools.partial(
        read_images,
        source=source,
        crops=crops,
        device=device,
        num_workers=num_workers,
        max_bytes=MEMORY_FRACTION * memory,
    )
    images, remark = read(), None
    if images == _SEVERAL_SIZES and choice is True:
        images = read(same_size=True)
        remark = f"{_SEVERAL_SIZES}: each was resized and cropped to {' x '.join(map(str, _one_size(crops)))} pixels"
    if isinstance(images, str):
        if choice is True:
            raise ValueError(f"data_on_device=true, but {images}; set data_on_device to false")
        return None, f"the images stay off the device: {images}"
    size = images.pixels.nbytes / 1e9
    return images, f"{remark + '; ' if remark else ''}{len(images.names)} images stay on the device, {size:.2g} GB"


# --- Decoding --------------------------------------------------------------------------------------------------------


class _DecodeOnce(torch.utils.data.IterableDataset):
    """
    One pass over a source, its rows assigned to the workers: `(pixels (C, H, W), checksum, name)` of each image, or
    `(reason, line)` of a bad one. With `shape`, images of another size are brought to it.
    """

    def __init__(self, source: ImageSource, decoding: dict, shape: tuple[int, int] | None):
        self.source, self.decoding, self.shape = source, decoding, shape

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rank, world_size = (worker.id, worker.num_workers) if worker else (0, 1)
        strategy = "shards" if self.source.num_shards >= world_size else "examples"
        rows = split_dataset_by_node(self.source.dataset, rank=rank, world_size=world_size, strategy=strategy)
        for block, _ in self.source.blocks(rows):
            for image in self.source.images(block):
                try:
                    encoded = self.source.fetch(image)
                    pixels = torch.from_numpy(decode(encoded, **self.decoding)).permute(2, 0, 1)
                except BadImage as error:
                    yield error.reason, bad_sample_line(self.source.name, image, error)
                    continue
                name = image_name({**image, "bytes": encoded})
                yield pixels if self.shape is None else _fit(pixels, self.shape), zlib.crc32(encoded), name


def _fit(pixels: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """An image `(C, H, W)` of this shape: resized until one side fits, the other cropped around the center."""
    scale = max(wanted / side for wanted, side in zip(shape, pixels.shape[1:], strict=True))
    size = [max(wanted, round(side * scale)) for wanted, side in zip(shape, pixels.shape[1:], strict=True)]
    if size != list(pixels.shape[1:]):
        resized = interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
        pixels = resized if pixels.dtype == torch.uint8 else resized.clamp_(0, 1)
    top, left = ((side - wanted) // 2 for side, wanted in zip(size, shape, strict=True))
    return pixels[:, top : top + shape[0], left : left + shape[1]]


def _one_size(crops: RandomCrops) -> tuple[int, int]:
    """What images of several sizes are brought to, (height, width)."""
    return tuple(round(_MARGIN * side) for side in crops.image_shape)


def read_images(
    source: ImageSource,
    crops: RandomCrops,
    device: torch.device,
    num_workers: int = 0,
    max_bytes: float = float("inf"),
    same_size: bool = False,
) -> ResidentImages | str:
    """
    Decodes a whole source onto the device.

    Args:
        source (`ImageSource`): Where the images come from.
        crops (`RandomCrops`): Says how to decode, and the size of a view.
        num_workers (`int`): Processes that decode.
        max_bytes (`float`): That the images may take.
        same_size (`bool`): Bring all images to one size, 256/224 of a view's, instead of giving up where they differ.

    Returns:
        The images, in an order that does not depend on the workers. Or a sentence, if they have several sizes or take
        too much memory.

    Raises:
        ValueError: if no image can be used.
        OSError: if the source cannot be read.
    """
    shape = _one_size(crops) if same_size else None
    decoder = _DecodeOnce(source, crops.decoding, shape)
    options = {"collate_fn": list, "worker_init_fn": outlive_stop_signals, **worker_options(num_workers)}
    loader = torch.utils.data.DataLoader(decoder, batch_size=128, **options)
    first = list(itertools.islice(decoder, 16))  # which often tells that it is in vain, before workers decode hundreds
    num_images, pixels, keys, bad = source.num_images() or 0, [], [], []
    for samples in itertools.chain([first], progress_bar(Patient(loader), "decoding", unit="batches")):
        good = [sample for sample in samples if len(sample) == 3]
        shape = shape or (good[0][0].shape[1:] if good else None)
        if any(image.shape[1:] != shape for image, *_ in good):
            return _SEVERAL_SIZES
        needed = max(num_images, len(keys)) * sum(image.nbytes for image, *_ in good[:1])
        if needed > max_bytes:
            return f"the decoded images take {needed / 1e9:.3g} GB, more than the {max_bytes / 1e9:.3g} GB set apart"
        if samples is first:
            continue
        bad += [sample for sample in samples if len(sample) == 2]
        keys += [key for _, *key in good]
        if good:
            pixels.append(torch.stack([image for image, *_ in good]).to(device))
    if not pixels:
        raise ValueError(f"{source.name} has no usable image; the last bad one: {bad[-1][1]}")
    order = sorted(range(len(keys)), key=keys.__getitem__)
    checksums, names = zip(*(keys[index] for index in order), strict=True)
    place = torch.tensor(order, device=device).argsort()  # of each image, among the sorted ones
    images = torch.empty(len(order), *pixels[0].shape[1:], dtype=pixels[0].dtype, device=device)
    while pixels:  # each batch is let go of when it is copied
        batch = pixels.pop(0)
        images[place[: len(batch)]] = batch
        place = place[len(batch) :]
    return ResidentImages(images, np.array(checksums), list(names), sorted(bad))


# --- Cropping --------------------------------------------------------------------------------------------------------


def resize_weights(low: torch.Tensor, high: torch.Tensor, size: int, new_size: int, resample: str) -> torch.Tensor:
    """
    What every pixel of a resized crop takes of every pixel of the image, along one axis: Pillow's filters, which widen
    when the image shrinks (antialiasing).

    Args:
        low, high (`torch.Tensor` of shape `(n,)`): The pixels from `low` up to `high` are resized.
        size, new_size (`int`): Pixels of the image, and of the crop after resizing.
        resample (`str`): `"bilinear"` or `"bicubic"`.

    Returns:
        `(n, new_size, size)`, fp32; the rows sum to 1.
    """
    device = low.device
    if device.type == "mps":  # which has no double precision
        low, high = low.cpu(), high.cpu()
    low, high = low[:, None, None].double(), high[:, None, None].double()
    scale = (high - low) / new_size
    pixels = torch.arange(size, device=low.device) + 0.5
    centers = low + (torch.arange(new_size, device=low.device)[:, None] + 0.5) * scale
    distance = ((pixels - centers) / scale.clamp(min=1)).abs()
    if resample == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:  # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = weights * ((pixels > low) & (pixels < high))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    # To the 16 bits of torch's own filter for uint8
    step = 2.0 ** (weights.amax(dim=(1, 2), keepdim=True).log2().floor() - 14)
    return ((weights / step).round() * step).float().to(device)


def _halves(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of so few bits that their products with pixels are exact in TF32, which a GPU may be set to."""
    coarse = (128 * weights).round() / 128
    return coarse, weights - coarse


def crop(images: torch.Tensor, boxes: torch.Tensor, image_shape: tuple[int, int], resample: str) -> torch.Tensor:
    """
    Resized crops as two products per view, first along the rows, then along the columns, each rounded as Pillow does.
    They are those of `RandomCrops`, but for a large JPEG, which that decodes at a smaller scale. Arrays are not
    rounded; in TF32, where that is allowed, they are off by less than 1e-3.

    Args:
        images (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): uint8, or fp32 in [0, 1].
        boxes (`torch.Tensor` of shape `(batch_size, num_views, 4)`): left, upper, right, lower, in pixels.
        image_shape (`(int, int)`): Height and width of a view.
        resample (`str`): `"bilinear"` or `"bicubic"`.

    Returns:
        Of the type of the images and shape `(batch_size, num_views, num_channels, *image_shape)`.
    """
    is_array = images.dtype != torch.uint8
    left, upper, right, lower = boxes.flatten(0, 1).unbind(1)
    across = resize_weights(
        low=left, high=right, size=images.shape[3], new_size=image_shape[1], resample=resample
    ).unflatten(0, boxes.shape[:2])
    down = resize_weights(
        low=upper, high=lower, size=images.shape[2], new_size=image_shape[0], resample=resample
    ).unflatten(0, boxes.shape[:2])
    rows = sum(
        images.float()[:, None] @ part.mT[:, :, None] for part in _halves(across)
    )  # (B, V, C, height, new width)
    if not is_array:
        rows = (rows + 0.5).floor().clamp(0, 255)
    views = sum(part[:, :, None] @ rows for part in _halves(down))
    if is_array:
        return views.clamp(0, 1)
    return (views + 0.5).floor().clamp(0, 255).to(torch.uint8)


# --- The loader ------------------------------------------------------------------------------------------------------


class CropPlan(torch.utils.data.Dataset):
    """
    Which images one process sees in its n-th batch, and the boxes of their views. The images are shuffled anew in each
    epoch; epochs follow each other without a gap, and all batches are full.
    """

    def __init__(self, checksums, size, crops, batch_size, process_index=0, num_processes=1):
        self.checksums, self.size, self.crops, self.batch_size = checksums, size, crops, batch_size
        self.process_index, self.num_processes = process_index, num_processes

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices `(batch_size,)` and boxes `(batch_size, num_views, 4)`."""
        first = (index * self.num_processes + self.process_index) * self.batch_size
        indices, boxes = [], []
        for place in range(first, first + self.batch_size):
            epoch, place = divmod(place, len(self.checksums))
            image = _shuffled(len(self.checksums), self.crops.seed, epoch)[place]
            indices.append(image)
            boxes.append(self.crops.boxes(self.size, epoch, int(self.checksums[image])))
        return torch.tensor(indices), torch.tensor(boxes, dtype=torch.int32)


@functools.lru_cache(maxsize=2)  # a batch lies in two epochs at most, unless the set is tiny
def _shuffled(num_images: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(num_images).tolist()


class ResidentLoader:
    """
    Endless batches of one process, like `data.view_loader`: `{"images": [name], "bad": [], "indices", "boxes"}`, which
    `views` turns into pixels. Worker processes draw the boxes ahead.

    Args:
        images (`ResidentImages`): The same ones on all processes.
        crops (`RandomCrops`): Draws the boxes.
        batch_size, num_workers, process_index, num_processes (`int`): As of `data.ViewStream` and its loader.
    """

    def __init__(self, images, crops, batch_size, num_workers=0, process_index=0, num_processes=1):
        self.images, self.crops, self.num_workers, self.next_batch = images, crops, num_workers, 0
        size = images.pixels.shape[3], images.pixels.shape[2]
        self.plan = CropPlan(
            checksums=images.checksums,
            size=size,
            crops=crops,
            batch_size=batch_size,
            process_index=process_index,
            num_processes=num_processes,
        )

    def __iter__(self):
        loader = torch.utils.data.DataLoader(
            self.plan,
            batch_size=None,
            sampler=itertools.count(self.next_batch),
            **worker_options(self.num_workers),
            prefetch_factor=8 if self.num_workers else None,
            pin_memory=self.images.pixels.is_cuda,
            worker_init_fn=outlive_stop_signals,
        )
        return self._batches(Patient(loader))  # starts the workers now, which draws a random number

    def _batches(self, batches):
        for indices, boxes in batches:
            self.next_batch += 1
            names = [self.images.names[index] for index in indices.tolist()]
            yield {"images": names, "bad": [], "indices": indices, "boxes": boxes}

    def views(self, batch: dict) -> torch.Tensor:
        """`(batch_size, num_views, num_channels, height, width)` on the device, as `crop` returns it."""
        pixels = self.images.pixels
        indices, boxes = (batch[name].to(pixels.device, non_blocking=True) for name in ("indices", "boxes"))
        return crop(pixels[indices], boxes, self.crops.image_shape, self.crops.resample)

    def state_dict(self) -> dict:
        """Where this process is, after the batch that it gave last; `data.resume` can read it too."""
        plan, num_images = self.plan, len(self.images.names)
        order = ("resident", plan.crops.seed, zlib.crc32(self.images.checksums.tobytes()))
        order += (plan.batch_size, plan.num_processes)
        epoch, num_rows = divmod(self.next_batch * plan.batch_size * plan.num_processes, num_images)
        state = {"epoch": epoch, "num_rows": num_rows / plan.num_processes, "offset": 0}
        return {**state, "pass_length": num_images / plan.num_processes, "order": order, "batch": self.next_batch}

    def resume(self, states: list[dict]) -> bool:
        """As `data.resume`, with the `state_dict` of all processes; exact for the same images, seed and batches."""
        workers, own = [worker for state in states for worker in worker_states(state)], self.state_dict()
        if all(worker["order"] == own["order"] for worker in workers):
            self.next_batch = workers[self.plan.process_index]["batch"]
            return True
        epoch, num_rows = approximate_position(workers)
        num_seen = epoch * len(self.images.names) + num_rows
        self.next_batch = round(num_seen / (self.plan.batch_size * self.plan.num_processes))
        logger.warning("the images, the seed or the way of reading changed: epoch %d goes on approximately", epoch)
        return False
