"""Encoded images of any kind as pixels: RGB or gray in uint8, or arrays in fp32."""

import functools
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, ImageColor
from PIL.TiffImagePlugin import SAMPLESPERPIXEL

from .arrays import in_unit_range, read_array, reads_arrays
from .bad_samples import BadImage
from .formats import describe


__all__ = ["DECODING", "HIGH_BIT_DEPTH", "check_color", "decode", "largest_of_16_bits", "upright_size"]

_UPRIGHT = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


HIGH_BIT_DEPTH = ("full_range", "stretch", "skip")
# What decode does by default
DECODING = {"transparent_background": "white", "high_bit_depth": "full_range", "pixel_range": None}


def check_color(transparent_background: str):
    """`ValueError` for what is no color."""
    try:
        ImageColor.getrgb(transparent_background)
    except ValueError as error:
        raise ValueError(
            f"transparent_background={transparent_background!r} is no color; give a name or #rrggbb"
        ) from error


def decode(
    encoded: bytes,
    num_channels: int = 3,
    transparent_background: str = "white",
    high_bit_depth: str = "full_range",
    pixel_range: tuple[float, float] | None = None,
    min_size: tuple[int, int] = (1, 1),
    shrink: Callable[[tuple[int, int]], float] | None = None,
) -> np.ndarray:
    """
    An encoded image as uint8 `(height, width, num_channels)`, RGB (3 channels) or grayscale (1 channel), upright. Of
    an animation, the first frame; a TIFF of several pages is bad. JPEGs go through simplejpeg (libjpeg-turbo: the same
    pixels as Pillow's, sooner), the rest through Pillow.

    With another number of channels, or a `pixel_range`, it is read as an array (`arrays.read_array`): fp32 in [0, 1].

    Args:
        encoded (`bytes`): A file in any format that Pillow reads; as an array, also TIFF of any kind and NumPy's.
        num_channels (`int`): 3 or 1 for RGB or grayscale.
        transparent_background (`str`): Name or `#rrggbb` of the color that shines through transparent pixels.
        high_bit_depth (`str`):
            What becomes of 16-bit grayscale: `"full_range"` maps [0, 65535] to [0, 255]; `"stretch"` maps each
            image's own range to it (12-bit detectors, floating point); `"skip"` counts it as bad.
        pixel_range (`(float, float)`, *optional*): The values that become 0 and 1, as of `arrays.in_unit_range`.
        min_size (`(int, int)`): The least height and width.
        shrink (callable, *optional*):
            Upright (width, height) -> the factor by which the result may be smaller than that. A JPEG is then decoded
            at the nearest larger of the scales that its transform offers: a 12-megapixel photograph several times
            sooner.

    Raises:
        BadImage: `not_an_image`, `damaged`, `too_large` (Pillow's guard against decompression bombs), `too_small`,
            `bit_depth`, or `channels` for a TIFF of which only a part would be read; of an array also `not_finite`.
        ValueError: for an array whose range must be stated, or that needs a package which is not installed.
    """
    _read_large_images_in_silence()
    try:
        if not reads_arrays(num_channels, pixel_range):
            return _decode_colors(
                encoded,
                num_channels,
                transparent_background=transparent_background,
                high_bit_depth=high_bit_depth,
                min_size=min_size,
                shrink=shrink,
            )
        pixels = read_array(encoded, num_channels, min_size, shrink)
    except BadImage:
        raise
    except ModuleNotFoundError as error:  # of an optional package
        raise ValueError(str(error)) from error
    except Image.DecompressionBombError as error:
        raise BadImage("too_large", str(error).split(",")[0], advice="cut it into smaller images") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage("not_an_image", f"no image in its {len(encoded)} bytes: {describe(encoded)}") from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
        raise BadImage("damaged", f"{type(error).__name__}: {error}") from error
    return in_unit_range(pixels, pixel_range)


@functools.cache
def _read_large_images_in_silence():
    """Pillow warns of an attack from half its limit on; not when this is imported, which must change nothing."""
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _decode_colors(
    encoded: bytes,
    num_channels: int,
    transparent_background: str,
    high_bit_depth: str,
    min_size: tuple[int, int],
    shrink: Callable[[tuple[int, int]], float] | None,
) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded))  # reads the header only
    if image.format == "TIFF":
        _refuse_pages(encoded)
    orientation = _orientation(image)
    if image.height < min_size[0] or image.width < min_size[1]:
        height, width = min_size
        raise BadImage("too_small", f"{image.height} x {image.width} pixels, less than {height} x {width}")
    factor = max(1.0, shrink(image.size if orientation <= 4 else image.size[::-1])) if shrink else 1.0
    pixels = _decode_jpeg(encoded, image, num_channels, factor)
    if pixels is None or orientation != 1:
        image = image if pixels is None else Image.fromarray(pixels.squeeze(2) if num_channels == 1 else pixels)
        image = _convert(image, num_channels, transparent_background, high_bit_depth)
        pixels = np.array(image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image)
    return pixels.reshape(*pixels.shape[:2], num_channels)


def _refuse_pages(encoded: bytes):
    """`BadImage` for a TIFF of more pages or bands than are read. Pillow reads the first ones and does not say so."""
    image = Image.open(io.BytesIO(encoded))  # anew, as going to another page changes it
    size, num_read, num_bands = image.size, len(image.getbands()), image.tag_v2.get(SAMPLESPERPIXEL, 1)
    if num_bands > max(num_read, 4):
        raise BadImage(
            "channels",
            f"a TIFF of {num_bands} bands, of which {num_read} would be read",
            advice=f"set num_channels to {num_bands} and pixel_range, or keep the colors alone",
        )
    try:
        image.seek(1)
        is_page = image.size == size and not image.tag_v2.get(254, 0) & 5  # NewSubfileType: a smaller copy, a mask
    except Exception:  # there is none, or none that Pillow reads
        return
    if is_page:
        number = image.n_frames
        advice = f"set num_channels to {number} and pixel_range, or keep" if num_read == 1 else "keep"
        raise BadImage("channels", f"a TIFF of {number} pages, of which 1 would be read", f"{advice} one page a file")


def upright_size(encoded: bytes) -> tuple[int, int]:
    """
    Height and width of what `decode` returns, from the header alone; raises `BadImage` where there is no header to
    read.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
    except Image.UnidentifiedImageError as error:
        raise BadImage("not_an_image", f"no image in its {len(encoded)} bytes: {describe(encoded)}") from error
    except Exception as error:
        raise BadImage("damaged", f"{type(error).__name__}: {error}") from error
    return image.size[::-1] if _orientation(image) <= 4 else image.size


def largest_of_16_bits(encoded: bytes) -> int:
    """The largest value of a 16-bit grayscale image that `decode` takes, 0 of any other."""
    image = Image.open(io.BytesIO(encoded))
    return int(np.asarray(image).max()) if image.mode.startswith("I") else 0


def _orientation(image: Image.Image) -> int:
    """How the image must be turned, 1 if not at all, as EXIF says; Pillow itself turns TIFFs."""
    try:
        return 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
    except Exception:  # a broken EXIF block in an image that is none the worse for it
        return 1


def _decode_jpeg(encoded: bytes, image: Image.Image, num_channels: int, factor: float) -> np.ndarray | None:
    """A JPEG, up to so many times smaller; `None` for what is none, for CMYK, and for what only Pillow may read."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    width, height = (math.ceil(side / factor) for side in image.size)
    try:
        colorspace = "RGB" if num_channels == 3 else "GRAY"
        return simplejpeg.decode_jpeg(encoded, colorspace, min_width=width, min_height=height)
    except ValueError:  # it is strict about every oddity
        return None


def _convert(image: Image.Image, num_channels: int, transparent_background: str, high_bit_depth: str) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image, high_bit_depth)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, ImageColor.getrgb(transparent_background))
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB" if num_channels == 3 else "L")


def _eight_bits(image: Image.Image, high_bit_depth: str) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    if high_bit_depth == "skip":
        raise BadImage("bit_depth", f"pixels of type {image.mode!r}, and high_bit_depth is 'skip'")
    if not np.isfinite(pixels).all():
        raise BadImage("bit_depth", "pixels that are not finite")
    low, high = (pixels.min(), pixels.max()) if high_bit_depth == "stretch" else (0, 65535)
    if pixels.min() < low or pixels.max() > high or image.mode == "F" and high_bit_depth == "full_range":
        raise BadImage("bit_depth", f"pixels of type {image.mode!r}, not 16-bit; high_bit_depth='stretch' takes them")
    scaled = (pixels - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(scaled.round().astype(np.uint8))
