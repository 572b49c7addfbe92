"""
Augmentation in batch, on the device that trains: of uint8 views in pre-training (SimCLR, arXiv 2002.05709, app. A),
and RandAugment for fine-tuning.
"""

import logging
import math

import kornia.augmentation as K
import numpy as np
import torch
from kornia.enhance import equalize
from torch import nn


logger = logging.getLogger(__name__)


class Augmentation(nn.Module):
    """
    uint8 views -> flipped, colour-jittered, greyscaled, blurred, solarised, normalised fp32 views. Each view of each
    image draws its own numbers, from torch's global generator. Where there are not three channels, the two colour
    steps are left out, with a message.

    Args:
        mean, std (`tuple[float]`): Of the pixels in [0, 1], one entry a channel.
        flip_probability (`float`): Of a horizontal flip.
        color_jitter (`tuple[float]`): Strengths of brightness, contrast, saturation and hue.
        color_jitter_probability, greyscale_probability, blur_probability, solarize_probability (`float`): Of each.
        blur_sigma (`(float, float)`): Range of the Gaussian's width in pixels.
        blur_kernel_size (`int`): Odd; about a tenth of the image side in SimCLR.
    """

    def __init__(
        self,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip_probability=0.5,
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_probability=0.8,
        greyscale_probability=0.2,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
        blur_kernel_size=23,
        solarize_probability=0.0,
    ):
        super().__init__()
        if len(mean) != 3 and (color_jitter_probability > 0 or greyscale_probability > 0):
            logger.warning(
                "colour jitter and greyscale are left out: they need 3 channels, these images have %d", len(mean)
            )
            color_jitter_probability = greyscale_probability = 0
        steps = []
        if flip_probability > 0:
            steps.append(K.RandomHorizontalFlip(p=flip_probability))
        if color_jitter_probability > 0:
            steps.append(K.ColorJitter(*color_jitter, p=color_jitter_probability))
        if greyscale_probability > 0:
            steps.append(K.RandomGrayscale(p=greyscale_probability))
        if blur_probability > 0:
            steps.append(K.RandomGaussianBlur((blur_kernel_size, blur_kernel_size), blur_sigma, p=blur_probability))
        if solarize_probability > 0:  # inverts what is brighter than one half (BYOL, arXiv 2006.07733)
            steps.append(K.RandomSolarize(thresholds=0.0, additions=0.0, p=solarize_probability))
        steps.append(K.Normalize(torch.tensor(mean), torch.tensor(std)))
        self.steps = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 `(batch_size, num_views, num_channels, height, width)` -> fp32 of the same shape, normalised."""
        return self.steps(views.flatten(0, 1).float() / 255).unflatten(0, views.shape[:2])


# --- RandAugment -----------------------------------------------------------------------------------------------------


def _grey(images):
    weights = (0.299, 0.587, 0.114) if images.shape[1] == 3 else (1.0,)
    return (images * images.new_tensor(weights)[:, None, None]).sum(dim=1, keepdim=True)


def _stretch(images):
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _smooth(images):
    """Pillow's filter of that name, which leaves the border as it is."""
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth, channels = images.clone(), images.shape[1]
    inner = nn.functional.conv2d(images, kernel.expand(channels, 1, 3, 3), groups=channels)
    smooth[:, :, 1:-1, 1:-1] = inner
    return smooth


def _blend(dull, images, level):
    """Away from the dull version of the images, or towards it."""
    return (dull + (1 + 0.9 * level) * (images - dull)).clamp(0, 1)


def _posterize(images, level):
    step = 2.0 ** (4 + (4 * level.abs()).floor())  # keeps 4 bits, or fewer
    return ((255 * images).round() / step).floor() * step / 255


def _warp(images, fill, xx=1.0, xy=0.0, x=0.0, yx=0.0, yy=1.0, y=0.0):
    """Pixels from (xx * column + xy * row, yx * column + yy * row), and x, y halves of the image further."""
    (num_images, *_, height, width), ones = images.shape, images.new_ones(len(images))
    entries = (xx, xy * height / width, x, yx * width / height, yy, y)
    matrices = torch.stack([entry * ones for entry in entries], dim=1).view(num_images, 2, 3)
    grid = nn.functional.affine_grid(matrices, images.shape, align_corners=False)
    return nn.functional.grid_sample(images - fill, grid, align_corners=False) + fill


def _rotate(images, level, fill):
    angle = level.flatten() * math.radians(30)
    return _warp(images, fill, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


# Each takes images (n, C, H, W) in [0, 1], levels (n, 1, 1, 1) in [-1, 1]: which way and how strong; and the colour of
# what comes into the picture.
OPERATIONS = {
    "auto_contrast": lambda images, level, fill: _stretch(images),
    "equalize": lambda images, level, fill: equalize(images),
    "invert": lambda images, level, fill: 1 - images,
    "posterize": lambda images, level, fill: _posterize(images, level),
    "solarize": lambda images, level, fill: torch.where(images < 1 - level.abs(), images, 1 - images),
    "solarize_add": lambda images, level, fill: torch.where(
        images < 0.5, images + 110 / 255 * level.abs(), images
    ).clamp(max=1),
    "color": lambda images, level, fill: _blend(_grey(images), images, level),
    "contrast": lambda images, level, fill: _blend(_grey(images).mean((2, 3), keepdim=True), images, level),
    "brightness": lambda images, level, fill: _blend(0.0, images, level),
    "sharpness": lambda images, level, fill: _blend(_smooth(images), images, level),
    "rotate": _rotate,
    "shear_x": lambda images, level, fill: _warp(images, fill, xy=0.3 * level.flatten()),
    "shear_y": lambda images, level, fill: _warp(images, fill, yx=0.3 * level.flatten()),
    "translate_x": lambda images, level, fill: _warp(images, fill, x=2 * 0.45 * level.flatten()),
    "translate_y": lambda images, level, fill: _warp(images, fill, y=2 * 0.45 * level.flatten()),
}


class RandAugment:
    """
    RandAugment (arXiv 1909.13719) with the operations and strengths of MAE's fine-tuning, `rand-m9-mstd0.5-inc1` of
    timm: two operations for each image, each left out with probability one half. kornia's draws two for the whole
    batch, and of brightness, contrast and colour only one direction. Where there are not three channels, `color` is
    left out, with a message.

    Args:
        magnitude (`float`): Mean of the level, of 10; its standard deviation is 0.5.
        fill (`tuple[float]`): Colour in [0, 1] of what comes into the picture, an entry a channel.
    """

    def __init__(self, magnitude: float = 9.0, fill=(0.485, 0.456, 0.406)):
        self.magnitude, self.fill, self.operations = magnitude, torch.tensor(fill)[:, None, None], dict(OPERATIONS)
        if len(fill) != 3:
            del self.operations["color"]
            logger.warning("RandAugment leaves out colour: it needs 3 channels, these images have %d", len(fill))

    def draw(self, num_images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which operations, -1 for none, and their levels in [-1, 1]; each `(num_images, 2)`."""
        shape = (num_images, 2)
        operations = np.where(rng.random(shape) < 0.5, rng.integers(len(self.operations), size=shape), -1)
        levels = rng.normal(self.magnitude, 0.5, shape).clip(0, 10) / 10 * rng.choice((-1, 1), shape)
        return operations, levels.astype(np.float32)

    def __call__(self, images: torch.Tensor, operations: np.ndarray, levels: np.ndarray) -> torch.Tensor:
        """Applies to `(n, C, H, W)` in [0, 1] what `draw` gave for these images."""
        images, fill = images.clone(), self.fill.to(images.device)
        for chosen, level in zip(operations.T, levels.T, strict=True):
            for index, operation in enumerate(self.operations.values()):
                rows = torch.from_numpy(np.flatnonzero(chosen == index))
                if len(rows):
                    strength = torch.from_numpy(level)[rows, None, None, None].to(images.device)
                    rows = rows.to(images.device)
                    images[rows] = operation(images[rows], strength, fill)
        return images
