"""Two random crops of a picture, from one decoding, as uint8. Runs in the loader's workers, so it needs no torch."""

import io
import math
import zlib

import fsspec
import numpy as np
from PIL import Image, ImageOps


RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def read_bytes(image: dict) -> bytes:
    """
    The encoded file behind a row of a `datasets.Image(decode=False)` column, `{"bytes": ..., "path": ...}`; the path
    may also be one that fsspec reads (`zip://a.jpg::b.zip`, `hf://...`).

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the row is empty.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise ValueError("the row holds no image")
    if image["bytes"] is not None:
        return image["bytes"]
    with fsspec.open(image["path"], "rb") as file:
        return file.read()


def decode(encoded: bytes, num_channels: int = 3) -> Image.Image:
    """
    An encoded picture as 8-bit RGB (3 channels) or greyscale (1 channel), upright.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: where there is no such picture in the bytes.
    """
    image = Image.open(io.BytesIO(encoded))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(f"a picture with pixels of type {image.mode!r} has more than 8 bits; convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert("RGB" if num_channels == 3 else "L")


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """
    The box (left, upper, right, lower) of a random resized crop: its share of the area is uniform in `scale`, the
    logarithm of its aspect (width / height) uniform in that of `ratio`. After ten misfits, the largest centred box
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


class TwoViews:
    """
    Encoded picture -> two random resized crops.

    Args:
        image_shape (`(int, int)`): Height and width of a view in pixels.
        num_channels (`int`): 3 (RGB) or 1 (greyscale).
        scale, ratio: Ranges of `random_box`.
        resample (`str`): `"bicubic"` or `"bilinear"`.
        seed (`int`): A picture's boxes depend on the seed, the epoch and its bytes alone, not on who reads it when.
    """

    def __init__(
        self, image_shape, num_channels=3, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), resample="bicubic", seed=0
    ):
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels={num_channels}: pictures are read as RGB (3) or greyscale (1)")
        self.image_shape, self.num_channels = image_shape, num_channels
        self.scale, self.ratio, self.resample, self.seed = scale, ratio, RESAMPLING[resample], seed

    def __call__(self, encoded: bytes, epoch: int = 0) -> np.ndarray:
        """Returns uint8 of shape `(2, num_channels, height, width)`; raises what `decode` raises."""
        image = decode(encoded, self.num_channels)
        rng = np.random.default_rng((self.seed, epoch, zlib.crc32(encoded)))
        height, width = self.image_shape
        views = [
            image.resize((width, height), self.resample, box=random_box(image.size, self.scale, self.ratio, rng))
            for _ in range(2)
        ]
        return np.stack([np.asarray(view).reshape(height, width, -1).transpose(2, 0, 1) for view in views])
