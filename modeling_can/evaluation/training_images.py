"""Images to train on: their order, crops, flips, RandAugment and mixing are the same on any number of processes."""

import logging
import math
from collections.abc import Iterator

import numpy as np
import torch

from ..data.augmentations import RandAugment, random_boxes
from ..data.crops import RandomCrops
from ..data.loading import Patient, worker_options
from .features import Images
from .preprocessors import Preprocessor
from .sets import Split


__all__ = [
    "AUGMENTATION", "Augmentation", "MIXING", "STEP", "Share", "crop_loader", "epochs", "fitting_batch_size",
    "mix",
]  # fmt: skip

logger = logging.getLogger(__name__)

# What random numbers are for, so that no two purposes share theirs
AUGMENTATION, MIXING, STEP = range(1, 4)


def epochs(num_images: int, batch_size: int, num_epochs: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """The epoch and the images of every step: consecutive ones of the epoch's permutation, full batches only."""
    for epoch in range(num_epochs):
        order = np.random.default_rng((seed, epoch)).permutation(num_images)
        for start in range(0, num_images - batch_size + 1, batch_size):
            yield epoch, order[start : start + batch_size]


def fitting_batch_size(num_images: int, batch_size: int, unit: int, why: str) -> int:
    """
    The batch size, or of a smaller set all of it, cut to a multiple of `unit`.

    Raises:
        ValueError: if the batch size is no such multiple, or the set has fewer images than that.
    """
    if batch_size % unit:
        nearest = max(1, round(batch_size / unit)) * unit
        raise ValueError(f"batch_size={batch_size} is not a multiple of {unit} ({why}); use {nearest}")
    if num_images < unit:
        raise ValueError(f"{num_images} images to train on are fewer than a step needs, {unit} ({why}); give more")
    if num_images < batch_size:
        batch_size = num_images // unit * unit
        logger.warning("a step takes %d images: there are no more than %d to train on", batch_size, num_images)
    return batch_size


class _Crops(Images):
    """Random crops of the images of a split, by (epoch, index)."""

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[torch.Tensor]:
        images = self.split.images[[index for _, index in keys]]["image"]
        return [self._prepare(image, index, epoch) for image, (epoch, index) in zip(images, keys, strict=True)]


class Share:
    """The share of a process in every step, as a sampler of batches; the loader's workers live as long as it does."""

    def __init__(self, mine: slice, *arguments):
        self.mine, self.arguments = mine, arguments

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, rows in epochs(*self.arguments):
            yield [(epoch, int(row)) for row in rows[self.mine]]


def crop_loader(train: Split, preprocessor: Preprocessor, share: Share, seed: int, num_workers: int):
    """`(share of the batch, 1, C, H, W)` for every step: uint8, or arrays in [0, 1]."""
    resample = "bicubic" if preprocessor.processor.resample == 3 else "bilinear"  # as the images of the test will be
    view = RandomCrops(
        preprocessor.image_size, preprocessor.num_channels, (0.08, 1.0), resample=resample, seed=seed, num_views=1,
        **preprocessor.decoding,
    )  # fmt: skip
    options = {"pin_memory": torch.cuda.is_available(), **worker_options(num_workers)}
    return Patient(torch.utils.data.DataLoader(_Crops(train, view), batch_sampler=share, **options))


class Augmentation:
    """
    Crops -> flipped, RandAugmented, normalized, erased pixel values, on their device. Flips and RandAugment
    depend on the seed, the step and the image's place in the batch of all processes; erasing draws from torch's
    global generator.

    Raises:
        ValueError: if the processor cannot be applied in two steps.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        batch_size: int,
        seed: int,
        flip_probability: float,
        randaugment_magnitude: float = 0.0,
        random_erasing_probability: float = 0.0,
    ):
        if not preprocessor.in_two_steps:
            raise ValueError(
                f"the image processor, a {type(preprocessor.processor).__name__}, does more than resize, crop, "
                "rescale and normalize, so that crops cannot be augmented in between; give one that does not, e.g. "
                "that of a ViT (--processor_name_or_path)"
            )
        self.preprocessor, self.batch_size, self.seed = preprocessor, batch_size, seed
        self.flip_probability, self.randaugment = flip_probability, None
        self.random_erasing_probability = random_erasing_probability
        if randaugment_magnitude > 0:
            fill = preprocessor.processor.image_mean or [0.5] * preprocessor.num_channels
            self.randaugment = RandAugment(randaugment_magnitude, fill)

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor, step: int, first: int) -> torch.Tensor:
        """`(b, C, H, W)`, the images from place `first` of the batch."""
        here = slice(first, first + len(crops))
        rng = np.random.default_rng((self.seed, step, AUGMENTATION))
        flipped = torch.from_numpy(rng.random(self.batch_size) < self.flip_probability)[here].to(crops.device)
        crops = torch.where(flipped[:, None, None, None], crops.flip(-1), crops)
        if self.randaugment:
            operations, levels = self.randaugment.draw(self.batch_size, rng)
            white = 255 if crops.dtype == torch.uint8 else 1
            crops = white * self.randaugment(crops.float() / white, operations[here], levels[here])
        pixel_values = self.preprocessor.normalize(crops)
        if self.random_erasing_probability > 0:
            erased = random_boxes(
                len(crops), *crops.shape[-2:], self.random_erasing_probability, device=crops.device
            )  # fmt: skip
            pixel_values = torch.where(erased, torch.randn_like(pixel_values), pixel_values)
        return pixel_values


def mix(
    images: torch.Tensor,
    targets: torch.Tensor,
    mixup_alpha: float,
    cutmix_alpha: float,
    seed: int = 0,
    step: int = 0,
    first_pair: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mixes images 2i and 2i + 1 with each other, both ways: by mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899),
    each for one half of the pairs where both are on. What is drawn depends on the seed, the step and the number of
    the pair.

    Args:
        images (`torch.Tensor` of shape `(2 * n, C, H, W)`), targets (`torch.Tensor` of shape `(2 * n, num_classes)`):
            Of n pairs; shares of the classes.
        mixup_alpha, cutmix_alpha (`float`): Beta(alpha, alpha) is the fraction an image keeps of itself; 0 is off.
        first_pair (`int`): Number of the first pair among those of all processes.
    """
    height, width = images.shape[-2:]
    shares, boxes = [], []  # of each pair, what an image keeps outside of a box; rows and columns of the box
    for pair in range(len(images) // 2):
        rng = np.random.default_rng((seed, step, MIXING, first_pair + pair))
        cut = cutmix_alpha > 0 and (mixup_alpha == 0 or rng.random() < 0.5)
        share = rng.beta(*2 * [cutmix_alpha if cut else mixup_alpha])
        shares.append(1.0 if cut else share)
        box = []
        for side in (height, width):
            center, half = rng.integers(side), int(side * math.sqrt(1 - share)) // 2 if cut else 0
            box += [max(0, center - half), min(side, center + half)]
        boxes.append(box)
    shares = torch.tensor(shares, dtype=torch.float32, device=images.device)[:, None, None]
    top, bottom, left, right = torch.tensor(boxes, device=images.device)[..., None, None].unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    in_box = (rows[:, None] >= top) & (rows[:, None] < bottom) & (columns >= left) & (columns < right)
    kept = torch.where(in_box, 0.0, shares)[:, None, None]  # (n, 1, 1, H, W)
    share = kept.mean((2, 3, 4))[:, :, None]  # of the pixels there are: boxes end at the border
    images, targets = images.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2))
    images = kept * images + (1 - kept) * images.flip(1)
    return images.flatten(0, 1), (share * targets + (1 - share) * targets.flip(1)).flatten(0, 1)
