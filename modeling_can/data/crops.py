"""Random crops of an image, from one decoding. Runs in the loader's workers."""

import math
import zlib

import numpy as np
import torch
from torch.nn.functional import interpolate

from .decoding import decode


__all__ = ["RandomCrops", "random_box"]


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """
    The box (left, upper, right, lower) of a random resized crop: its fraction of the area is uniform in `scale`, the
    logarithm of its aspect (width / height) uniform in that of `ratio`. After ten misfits, the largest centered box
    of an allowed aspect.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


class RandomCrops:
    """
    Encoded image -> random resized crops.

    Args:
        image_shape (`(int, int)`): Height and width of a view in pixels.
        num_channels (`int`): 3 (RGB), 1 (grayscale), or the channels of arrays.
        scale, ratio: Ranges of `random_box`.
        resample (`str`): `"bilinear"` or `"bicubic"`, with antialiasing, the numbers of Pillow.
        seed (`int`): An image's boxes depend on the seed, the epoch and its bytes alone, not on who reads it when.
        num_views (`int`): How many crops.
        decoding: Keyword arguments of `decode`.
    """

    def __init__(
        self,
        image_shape,
        num_channels=3,
        scale=(0.2, 1.0),
        ratio=(3 / 4, 4 / 3),
        resample="bilinear",
        seed=0,
        num_views=2,
        **decoding,
    ):
        self.image_shape, self.decoding = image_shape, {"num_channels": num_channels, **decoding}
        self.scale, self.ratio, self.resample, self.seed, self.num_views = scale, ratio, resample, seed, num_views

    def boxes(self, size: tuple[int, int], epoch: int, checksum: int) -> list[tuple[int, int, int, int]]:
        """
        The boxes (left, upper, right, lower) of the views of an image of this (width, height), whose bytes have this
        CRC-32, in this epoch.
        """
        rng = np.random.default_rng((self.seed, epoch, checksum))
        return [random_box(size, self.scale, self.ratio, rng) for _ in range(self.num_views)]

    def __call__(self, encoded: bytes, epoch: int = 0) -> torch.Tensor:
        """
        Returns uint8 of shape `(num_views, num_channels, height, width)`, of arrays fp32 in [0, 1]; raises what
        `decode` raises.
        """
        height, width = self.image_shape
        boxes, full_size = [], None

        def draw_boxes(size):
            """The boxes, and how much smaller the image may be without a box falling short of the view."""
            nonlocal boxes, full_size
            boxes, full_size = self.boxes(size, epoch, zlib.crc32(encoded)), size
            return min(min((r - l) / width, (b - t) / height) for l, t, r, b in boxes)  # noqa: E741

        pixels = torch.from_numpy(decode(encoded, **self.decoding, shrink=draw_boxes)).permute(2, 0, 1)[None]
        across, down = pixels.shape[3] / full_size[0], pixels.shape[2] / full_size[1]
        views = torch.empty(self.num_views, pixels.shape[1], height, width, dtype=pixels.dtype)
        for view, (left, top, right, bottom) in zip(views, boxes, strict=True):
            rows = slice(round(top * down), max(round(bottom * down), round(top * down) + 1))
            columns = slice(round(left * across), max(round(right * across), round(left * across) + 1))
            crop = pixels[:, :, rows, columns]
            view.copy_(interpolate(crop, (height, width), mode=self.resample, antialias=True)[0])
        return views if views.dtype == torch.uint8 else views.clamp_(0, 1)  # which bicubic crops leave
