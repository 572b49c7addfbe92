"""
Images that are read as arrays, with every channel as it is: TIFFs of any number of bands or pages, NumPy arrays, and
columns of arrays. What is read stays fp32, and is not brought to 8 bits.
"""

import io
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow
from PIL import Image, ImageOps

from .bad_samples import BadImage


__all__ = [
    "ARRAY_EXTENSION", "arrays_of", "check_pixel_range", "dtype_of", "encode_array", "in_unit_range", "read_array",
    "reads_arrays",
]  # fmt: skip

ARRAY_EXTENSION = ".npy"
_NUMPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # what their files begin with
_RANGES = {"bool": (0, 1), "uint8": (0, 255), "uint16": (0, 65535)}  # of pixels of a type, where none is stated


def reads_arrays(num_channels: int, pixel_range: tuple[float, float] | None = None) -> bool:
    """Whether images are read as arrays, and not as RGB or gray of 8 bits."""
    return num_channels not in (1, 3) or pixel_range is not None


# --- Files -----------------------------------------------------------------------------------------------------------


def read_array(
    encoded: bytes,
    num_channels: int,
    min_size: tuple[int, int] = (1, 1),
    shrink: Callable[[tuple[int, int]], float] | None = None,
) -> np.ndarray:
    """
    An encoded image `(height, width, num_channels)` in the type that it has.

    Args:
        encoded (`bytes`): A TIFF, a NumPy file, or any other format that Pillow reads.
        num_channels (`int`):
            The channels may be the first or the last axis, whichever has so many entries; the first if both have. The
            pages of a TIFF are its channels.
        min_size, shrink: As of `decoding.decode`; an array is never made smaller.

    Raises:
        BadImage: `channels` for another number of channels, `too_small`, or `bit_depth` for more bits than
            can be read.
        ValueError: if a package is missing that the file needs.
    """
    if encoded.startswith(_NUMPY):
        pixels = np.load(io.BytesIO(encoded), allow_pickle=False)
    elif encoded.startswith(_TIFF):
        pixels = _read_tiff(encoded)
    else:
        pixels = _read_with_pillow(encoded)
    pixels = _channels_last(pixels, num_channels)
    height, width = pixels.shape[:2]
    if height < min_size[0] or width < min_size[1]:
        raise BadImage("too_small", f"{height} x {width} pixels, less than {min_size[0]} x {min_size[1]}")
    if shrink:
        shrink((width, height))
    return pixels


def _read_tiff(encoded: bytes) -> np.ndarray:
    """The first series: all pages of one shape, at full resolution where there are smaller ones too."""
    try:
        import tifffile
    except ImportError as error:
        raise _missing("tifffile") from error
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        first, *others = file.series
        try:
            if first.ndim == 2 and others and all(other.shape == first.shape for other in others):
                return np.stack([page.asarray() for page in file.series])  # written one page after the other
            return first.asarray()
        except (KeyError, ValueError) as error:
            if "imagecodecs" not in str(error):
                raise
            raise _missing("imagecodecs") from error


def _missing(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"a TIFF is to be read with all its channels, which needs {package}; pip install 'modeling-can[arrays]'"
    )


def _read_with_pillow(encoded: bytes) -> np.ndarray:
    """Turned upright as its EXIF says; a palette becomes colors. imagecodecs reads what Pillow brings to 8 bits."""
    image = Image.open(io.BytesIO(encoded))
    bits = _bits(encoded, image)
    if bits > 8 and not (bits == 16 and image.mode.startswith("I")):  # Pillow keeps 16-bit gray
        return _upright(_read_with_imagecodecs(encoded, image.format, bits), image.getexif().get(0x0112, 1))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    return np.asarray(ImageOps.exif_transpose(image))


def _bits(encoded: bytes, image: Image.Image) -> int:
    """Of one channel in the file, at least 8; Pillow tells only what it makes of them."""
    bits = 8
    if image.format == "PNG":  # IHDR, which comes first
        bits = encoded[24]
    elif image.format == "JPEG2000":  # the SIZ segment, of the first component
        bits = (encoded[encoded.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1
    elif image.format == "PPM":  # its largest value
        bits = max([8, *(n.bit_length() for tile in image.tile for n in tile.args if isinstance(n, int))])
    elif image.format == "SGI":  # bytes
        bits = 8 * encoded[3]
    elif image.format == "AVIF" and (place := encoded.find(b"av1C")) >= 0:  # high_bitdepth and twelve_bit
        bits = {0x40: 10, 0x60: 12}.get(encoded[place + 6] & 0x60, 8)
    return max(bits, 8)


def _read_with_imagecodecs(encoded: bytes, kind: str, bits: int) -> np.ndarray:
    fix = "save it as TIFF"
    if kind in ("PNG", "JPEG2000"):
        try:
            import imagecodecs

            return {"PNG": imagecodecs.png_decode, "JPEG2000": imagecodecs.jpeg2k_decode}[kind](encoded)
        except ImportError:
            fix += ", or install imagecodecs: pip install 'modeling-can[arrays]'"
    raise BadImage("bit_depth", f"a {kind} of {bits} bits, of which Pillow would keep 8; {fix}")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As the EXIF tag says: mirrored at the diagonal, then each axis turned round or not."""
    pixels = pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _channels_last(pixels: np.ndarray, num_channels: int) -> np.ndarray:
    shape = pixels.shape
    if pixels.ndim == 2 and num_channels == 1:
        return pixels[..., None]
    if pixels.ndim == 3 and num_channels in (shape[0], shape[-1]):
        return np.moveaxis(pixels, 0, -1) if shape[0] == num_channels else pixels
    found = {2: 1, 3: min(shape[0], shape[-1]) if pixels.ndim == 3 else 0}.get(pixels.ndim)
    what = f"an array of {' x '.join(map(str, shape))} {pixels.dtype}"
    if found is None:
        raise BadImage("channels", f"{what}, not (channels, height, width); keep one image in a file")
    raise BadImage(
        "channels",
        f"{found} channel{'s' * (found != 1)} ({what}); the model takes {num_channels}",
        advice=f"set num_channels to {found} if all images are so, or remove it",
    )


def check_pixel_range(pixel_range: tuple[float, float]):
    """`ValueError` for a range of one value."""
    if pixel_range[0] == pixel_range[1]:
        raise ValueError(f"pixel_range={pixel_range} must be two values, that of black and that of white")


def in_unit_range(pixels: np.ndarray, pixel_range: tuple[float, float] | None) -> np.ndarray:
    """
    Pixels in fp32, from `pixel_range` to [0, 1]; what lies beyond it is clipped.

    Args:
        pixel_range (`(float, float)`, *optional*): The values that become 0 and 1; by default [0, 255] of uint8 and
            [0, 65535] of uint16.

    Raises:
        ValueError: for another type without a `pixel_range`, or for a range of one value.
        BadImage: `not_finite`.
    """
    if pixels.dtype.kind not in "biuf":
        raise BadImage("damaged", f"an array of {pixels.dtype}, which are no numbers")
    if pixel_range is None and pixels.dtype.name not in _RANGES:
        finite = pixels[np.isfinite(pixels)]
        if not finite.size:
            raise BadImage("not_finite", "no pixel that is finite")
        low, high = (f"{value:.6g}" for value in (finite.min(), finite.max()))
        raise ValueError(
            f"pixel_range is not set, and pixels of type {pixels.dtype} do not tell which values are black and white; "
            f"set pixel_range to the two, e.g. {low},{high}, the least and the largest of one image"
        )
    low, high = pixel_range or _RANGES[pixels.dtype.name]
    check_pixel_range((low, high))
    scaled = np.subtract(pixels, low, dtype=np.float32)
    scaled /= np.float32(high - low)
    if not np.isfinite(scaled).all():
        raise BadImage("not_finite", "pixels that are not finite; fill them with a value in pixel_range")
    return scaled.clip(0, 1, out=scaled)


# --- Columns ---------------------------------------------------------------------------------------------------------


def dtype_of(kind) -> str | None:
    """The type of the numbers in a column of arrays or nested lists, one image in each row; None of other columns."""
    if isinstance(kind, datasets.Array2D | datasets.Array3D):
        return kind.dtype
    depth = 0
    while hasattr(kind, "feature"):
        kind, depth = kind.feature, depth + 1
    is_number = isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "float", "bool"))
    return kind.dtype if is_number and depth in (2, 3) else None


def arrays_of(column: pyarrow.ChunkedArray) -> list:
    """The rows of such a column: arrays in the type of the column, nested lists where the rows of one are ragged."""
    rows = []
    for chunk in column.chunks:
        storage = chunk.storage if isinstance(chunk, pyarrow.ExtensionArray) else chunk
        rows += [row.as_py() if row.values is None else _array(row.values) for row in storage]
    return rows


def _array(values: pyarrow.Array) -> np.ndarray | list:
    if not hasattr(values, "flatten") or not pyarrow.types.is_nested(values.type):
        return values.to_numpy(zero_copy_only=False)
    inner, lengths = _array(values.flatten()), set(values.value_lengths().to_pylist())
    if len(lengths) != 1 or isinstance(inner, list):
        return values.to_pylist()
    return inner.reshape(len(values), -1, *inner.shape[1:])


def encode_array(value, dtype: str | None = None) -> bytes:
    """
    An array, a tensor or nested lists as a NumPy file; of lists that are ragged, how they begin, which is no image.
    """
    try:
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(value, dtype=dtype), allow_pickle=False)
        return buffer.getvalue()
    except ValueError:
        return repr(value)[:100].encode()
