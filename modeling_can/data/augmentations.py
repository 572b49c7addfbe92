"""
Augmentation in batch, on the device that trains: of the views in pre-training (SimCLR, arXiv 2002.05709, app. A),
and RandAugment and random erasing for fine-tuning.

Images are `(n, C, H, W)` in [0, 1] and what is drawn for them is `(n, 1, 1, 1)`, so that each image has its own.
"""

import logging
import math

import numpy as np
import torch
from torch import nn


__all__ = [
    "ADJUSTMENTS",
    "OPERATIONS",
    "Augmentation",
    "RandAugment",
    "blur_with_convolutions",
    "blur_with_products",
    "equalize",
    "grayscale",
    "random_boxes",
    "solarize",
]


logger = logging.getLogger(__name__)

# --- Operations ------------------------------------------------------------------------------------------------------


def grayscale(images: torch.Tensor) -> torch.Tensor:
    """`(n, 1, H, W)`: the luma of ITU-R BT.601."""
    red, green, blue = images.unbind(-3)
    return torch.add(0.299 * red, green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(-3)


def _blend(dull: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Factor 0 gives the dull version, 1 the images; above 1 the difference grows. Clamped to [0, 1]."""
    return torch.lerp(dull, images, factor).clamp_(0, 1)


def _adjust_brightness(images, factor):
    return (images * factor).clamp_(0, 1)


def _adjust_contrast(images, factor):
    means = images.mean((2, 3), keepdim=True)  # the mean of the gray is the gray of the means: one pass less
    return _blend(grayscale(means) if images.shape[1] == 3 else means, images, factor)


def _adjust_saturation(images, factor):
    return _blend(grayscale(images), images, factor)


def _shift_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """
    Adds to the hue of HSV, a whole turn being 1. With the value V = max, the chroma C = max - min and the hue h in
    sixths of a turn, each channel is V - C * clamp(2 - |d|, 0, 1), where d is the distance of h on the circle from
    the middle of the colors that have nothing of this channel: 3 for red, 5 for green, 7 = 1 for blue.

    A gray pixel has no hue. C = 0 makes it come out as it was, whatever h is.
    """
    red, green, blue = images.unbind(-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    hue = torch.where(
        red == value,
        green - blue,
        torch.where(green == value, torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4)),
    )
    hue = (hue / chroma.clamp(min=1e-12)).unsqueeze(-3)
    middle = 3 + 2 * torch.arange(3, device=images.device)[:, None, None]  # made there: no copy from the host
    distance = hue + (6 * turns - middle)
    distance = (distance - 6 * (distance / 6).round()).abs()
    return value.unsqueeze(-3) - chroma.unsqueeze(-3) * (2 - distance).clamp(0, 1)


def solarize(images: torch.Tensor) -> torch.Tensor:
    """Inverts what is brighter than one half (BYOL, arXiv 2006.07733)."""
    return torch.where(images < 0.5, images, 1 - images)


def _gaussian(sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """
    Weights `(n, radius + 1)` of the distances 0 to radius, such that the whole kernel sums to 1. A sigma below 0.05,
    and so 0, is exactly the identity: exp(-1 / (2 * 0.05 ** 2)) is 0 in fp32.
    """
    distance = torch.arange(radius + 1, device=sigma.device)
    weights = torch.exp(-distance.square() / (2 * sigma.flatten()[:, None].clamp(min=0.05).square()))
    return weights / (2 * weights.sum(1, keepdim=True) - 1)  # all but distance 0 occur twice


def blur_with_convolutions(images: torch.Tensor, sigma: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gaussian blur with reflected borders."""
    radius = kernel_size // 2
    weights = _gaussian(sigma, radius)
    kernels = torch.cat([weights.flip(1), weights[:, 1:]], dim=1).repeat_interleave(images.shape[1], dim=0)
    padded = nn.functional.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # (1, n * C, H, W)
    padded = nn.functional.conv2d(padded, kernels[:, None, None, :], groups=len(kernels))
    return nn.functional.conv2d(padded, kernels[:, None, :, None], groups=len(kernels)).view_as(images)


def blur_with_products(images: torch.Tensor, sigma: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """
    The same blur as two products with banded matrices, (H, H) @ image @ (W, W). In TF32, where that is allowed, it is
    off by less than 5e-4, an eighth of a level of 8 bits, also for an image that is not blurred.
    """
    height, width = images.shape[-2:]
    weights = nn.functional.pad(_gaussian(sigma, kernel_size // 2), (0, 1))  # the last one, 0, is of all that is far
    far = weights.shape[1] - 1

    def matrix(size):
        to, of = torch.arange(size, device=images.device)[:, None], torch.arange(size, device=images.device)
        distances = [
            (to - of).abs(),
            torch.where(of > 0, to + of, far),  # reflected at the first pixel, which is not itself repeated
            torch.where(of < size - 1, 2 * (size - 1) - to - of, far),  # and at the last
        ]
        return sum(weights[:, distance.clamp(max=far)] for distance in distances)  # (n, size, size)

    images = (images.flatten(1, 2) @ matrix(width).mT).view_as(images)
    return matrix(height)[:, None] @ images


# --- Pre-training ----------------------------------------------------------------------------------------------------

# In this order for every image. kornia draws one order for each batch, torchvision one for each image, which computes
# each adjustment in each place: four times the passes over the pixels.
ADJUSTMENTS = {
    "brightness": _adjust_brightness,
    "contrast": _adjust_contrast,
    "saturation": _adjust_saturation,
    "hue": _shift_hue,
}


class Augmentation(nn.Module):
    """
    Views -> flipped, turned, color-jittered, grayscaled, blurred, solarized, normalized fp32 views. Each view of
    each image draws its own numbers, from torch's generator of the device.

    With other than three channels, color jitter is brightness and contrast alone, with a factor of its own for each
    channel, and contrast about its own mean; saturation, hue and grayscale are skipped, with a message. As in RGB, the
    balance of the channels then does not tell that two crops are of one image (SimCLR, arXiv 2002.05709, section 3.1).

    Nothing waits for the device, and no shape depends on what was drawn: each step is computed for all images and
    selected for some. A step of probability 0 is not computed. Move the module to the device of the views, and call it
    outside of autocast.

    Args:
        mean, std (`tuple[float]`): Of the pixels in [0, 1], one entry a channel.
        flip_probability, vertical_flip_probability (`float`): Of a horizontal flip, and of a vertical one.
        quarter_turn_probability (`float`): Of a turn by 90 degrees, counterclockwise, after the flips; it needs square
            views. With both flips and this at 0.5, all eight orientations of a view are equally likely.
        color_jitter (`tuple[float]`): Strengths s of brightness, contrast, saturation and hue. The first three are
            factors from [max(0, 1 - s), 1 + s]; the hue turns by a fraction of the circle from [-s, s].
        color_jitter_probability, grayscale_probability, blur_probability, solarize_probability (`float`): Of each.
        blur_sigma (`(float, float)`): Range of the Gaussian's width in pixels.
        blur_kernel_size (`int`): Odd; about a tenth of the image side in SimCLR.
    """

    def __init__(
        self,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip_probability=0.5,
        vertical_flip_probability=0.0,
        quarter_turn_probability=0.0,
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_probability=0.8,
        grayscale_probability=0.2,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
        blur_kernel_size=23,
        solarize_probability=0.0,
    ):
        super().__init__()
        if len(mean) != 3:
            if (color_jitter_probability > 0 and any(color_jitter[2:])) or grayscale_probability > 0:
                logger.warning(
                    "saturation, hue and grayscale are skipped: they need 3 channels, these images have %d", len(mean)
                )
            color_jitter, grayscale_probability = (*color_jitter[:2], 0, 0), 0
        if blur_probability > 0 and blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size={blur_kernel_size} is not odd; use {blur_kernel_size + 1}")
        self.blur_kernel_size = blur_kernel_size
        probabilities = {
            "flip": flip_probability,
            "vertical_flip": vertical_flip_probability,
            "quarter_turn": quarter_turn_probability,
            "jitter": color_jitter_probability,
            "grayscale": grayscale_probability,
            "blur": blur_probability,
            "solarize": solarize_probability,
        }
        probabilities = {step: probability for step, probability in probabilities.items() if probability > 0}
        ranges = {}
        if "jitter" in probabilities:
            *strengths, hue = color_jitter
            ranges |= {name: (max(0, 1 - s), 1 + s) for name, s in zip(ADJUSTMENTS, strengths, strict=False) if s > 0}
            if hue > 0:
                ranges["hue"] = (-hue, hue)
        if "blur" in probabilities:
            ranges["sigma"] = blur_sigma
        self.steps, self.ranges = tuple(probabilities), tuple(ranges)
        self.num_factors = 1 if len(mean) == 3 else len(mean)
        # Constants are buffers, so that they are on the device before the first step; they are not saved.
        constants = {
            "probability": list(probabilities.values()),
            "low": [low for low, _ in ranges.values()],
            "high": [high for _, high in ranges.values()],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1, 1), False)
        mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / std).float()[:, None, None], persistent=False)
        self.register_buffer("offset", (-mean / std).float()[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """
        `(batch_size, num_views, num_channels, height, width)`, uint8 or in [0, 1] -> fp32 of the same shape,
        normalized.
        """
        return self.transform(views, self.draw(views.shape[0] * views.shape[1], views.device))

    def draw(self, num_images: int, device: torch.device | str) -> dict[str, torch.Tensor]:
        """
        For each image, which steps apply (`bool`), the factors of the color jitter, the hue's turn and the blur's
        sigma, which is 0 where there is none; each `(num_images, 1, 1, 1)`, but the factors of other than three
        channels `(num_images, num_channels, 1, 1)`.
        """
        shape = (len(self.steps) + len(self.ranges), num_images, self.num_factors, 1, 1)
        chosen, numbers = torch.rand(shape, device=device).split([len(self.steps), len(self.ranges)])
        chosen = chosen[:, :, :1]
        chosen = dict(zip(self.steps, chosen < self.probability, strict=True))
        numbers = dict(zip(self.ranges, torch.lerp(self.low, self.high, numbers), strict=True))
        if "blur" in chosen:
            numbers["sigma"] = numbers["sigma"][:, :1] * chosen.pop("blur")
        return chosen | numbers

    def transform(self, views: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """What `forward` does, as a function of what was drawn for the `batch_size * num_views` images."""
        images = views.flatten(0, 1)
        if "flip" in drawn:
            images = torch.where(drawn["flip"], images.flip(-1), images)
        if "vertical_flip" in drawn:
            images = torch.where(drawn["vertical_flip"], images.flip(-2), images)
        if "quarter_turn" in drawn:
            images = torch.where(drawn["quarter_turn"], images.rot90(1, (-2, -1)), images)
        images = images / 255 if images.dtype == torch.uint8 else images
        if "jitter" in drawn:
            jittered = images
            for name, adjust in ADJUSTMENTS.items():
                if name in drawn:
                    jittered = adjust(jittered, drawn[name])
            images = torch.where(drawn["jitter"], jittered, images)
        if "grayscale" in drawn:
            images = torch.where(drawn["grayscale"], grayscale(images), images)
        if "sigma" in drawn:
            smallest = self.blur_kernel_size // 2 + 1
            if min(images.shape[-2:]) < smallest:
                raise ValueError(
                    f"blur_kernel_size={self.blur_kernel_size} needs images of at least {smallest} pixels a side, and "
                    f"these have {tuple(images.shape[-2:])}; use {2 * min(images.shape[-2:]) - 1} or less"
                )
            # oneDNN has fast convolutions of single channels, cuDNN in fp32 has not; products are fast on a GPU.
            blur = blur_with_convolutions if images.device.type == "cpu" else blur_with_products
            images = blur(images, drawn["sigma"], self.blur_kernel_size)
        if "solarize" in drawn:
            images = torch.where(drawn["solarize"], solarize(images), images)
        return torch.addcmul(self.offset, images, self.scale).unflatten(0, views.shape[:2])

    def compile_transform(self, **options):
        """From here on `transform` is compiled, into one graph for each shape; `draw` stays as it is."""
        self.transform = torch.compile(self.transform, dynamic=False, fullgraph=True, **options)


# --- RandAugment -----------------------------------------------------------------------------------------------------


def _gray(images):
    return grayscale(images) if images.shape[1] == 3 else images.mean(dim=1, keepdim=True)


def _stretch(images):
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def equalize(images: torch.Tensor) -> torch.Tensor:
    """
    Spreads the 256 levels of each channel so that each is as frequent as the others, as Pillow does: level i becomes
    (step // 2 + number of pixels below i) // step, where step is a 255th of the pixels below the last level.
    """
    levels = (255 * images.flatten(2)).long()  # (n, C, pixels)
    counts = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    step = (levels < levels.amax(2, keepdim=True)).sum(2, keepdim=True) // 255
    table = ((step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)).clamp(max=255)
    equalized = torch.where(step > 0, table.gather(2, levels) / 255, images.flatten(2))
    return equalized.view_as(images)


def _smooth(images):
    """Pillow's filter of that name, which leaves the border as it is."""
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth, channels = images.clone(), images.shape[1]
    inner = nn.functional.conv2d(images, kernel.expand(channels, 1, 3, 3), groups=channels)
    smooth[:, :, 1:-1, 1:-1] = inner
    return smooth


def _enhance(dull, images, level):
    """Away from the dull version of the images, or toward it."""
    return _blend(dull, images, 1 + 0.9 * level)


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


# Each takes images (n, C, H, W) in [0, 1], levels (n, 1, 1, 1) in [-1, 1]: which way and how strong; and the color of
# what comes into the image.
OPERATIONS = {
    "auto_contrast": lambda images, level, fill: _stretch(images),
    "equalize": lambda images, level, fill: equalize(images),
    "invert": lambda images, level, fill: 1 - images,
    "posterize": lambda images, level, fill: _posterize(images, level),
    "solarize": lambda images, level, fill: torch.where(images < 1 - level.abs(), images, 1 - images),
    "solarize_add": lambda images, level, fill: torch.where(
        images < 0.5, images + 110 / 255 * level.abs(), images
    ).clamp(max=1),
    "color": lambda images, level, fill: _enhance(_gray(images), images, level),
    "contrast": lambda images, level, fill: _enhance(_gray(images).mean((2, 3), keepdim=True), images, level),
    "brightness": lambda images, level, fill: _adjust_brightness(images, 1 + 0.9 * level),
    "sharpness": lambda images, level, fill: _enhance(_smooth(images), images, level),
    "rotate": _rotate,
    "shear_x": lambda images, level, fill: _warp(images, fill, xy=0.3 * level.flatten()),
    "shear_y": lambda images, level, fill: _warp(images, fill, yx=0.3 * level.flatten()),
    "translate_x": lambda images, level, fill: _warp(images, fill, x=2 * 0.45 * level.flatten()),
    "translate_y": lambda images, level, fill: _warp(images, fill, y=2 * 0.45 * level.flatten()),
}


class RandAugment:
    """
    RandAugment (arXiv 1909.13719) with the operations and strengths of MAE's fine-tuning, `rand-m9-mstd0.5-inc1` of
    timm: two operations for each image, each left out with probability one half. Where there are not three channels,
    `color` is left out, with a message.

    Args:
        magnitude (`float`): Mean of the level, of 10; its standard deviation is 0.5.
        fill (`tuple[float]`): Color in [0, 1] of what comes into the image, an entry a channel.
    """

    def __init__(self, magnitude: float = 9.0, fill=(0.485, 0.456, 0.406)):
        self.magnitude, self.fill, self.operations = magnitude, torch.tensor(fill)[:, None, None], dict(OPERATIONS)
        if len(fill) != 3:
            del self.operations["color"]
            logger.warning("RandAugment leaves out color: it needs 3 channels, these images have %d", len(fill))

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


# --- Random erasing --------------------------------------------------------------------------------------------------


def random_boxes(
    num_images: int,
    height: int,
    width: int,
    probability: float,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """
    Masks `(num_images, 1, height, width)` of random erasing (arXiv 1708.04896), with timm's ranges: a box for the
    images that are chosen with this probability. From torch's generator of the device, without a wait for it.

    Args:
        scale (`(float, float)`): Range of the box's area, as a fraction of the image.
        ratio (`(float, float)`): Range of height by width, from below 1 to above; flat and tall boxes are equally
            frequent.
    """
    chosen, area, is_flat, aspect, top, left = torch.rand(6, num_images, 1, 1, 1, device=device)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.where(is_flat < 0.5, ratio[0] + (1 - ratio[0]) * aspect, 1 + (ratio[1] - 1) * aspect)
    box_height = (area * aspect).sqrt().round().clamp(1, height)
    box_width = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (top * (height - box_height + 1)).floor(), (left * (width - box_width + 1)).floor()
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside = (rows >= top) & (rows < top + box_height) & (columns >= left) & (columns < left + box_width)
    return inside & (chosen < probability)
