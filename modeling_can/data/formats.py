"""What a file that Pillow does not open is, by its first bytes."""

import codecs
import io

from PIL import TiffImagePlugin


__all__ = ["describe"]


_CONVERT = "convert it to JPEG or PNG"
_AGAIN = "download it again"
_SIGNATURES = (  # (where, which bytes, what such a file is): the first that fits counts
    (0, b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: the image was not fetched; run git lfs pull"),
    (0, b"\xff\x0a", f"a JPEG XL image, which Pillow does not read; {_CONVERT}"),
    (0, b"\0\0\0\x0cJXL ", f"a JPEG XL image, which Pillow does not read; {_CONVERT}"),
    (0, b"\0\0\0\x0cjP  ", f"a JPEG 2000 image that Pillow does not read; {_CONVERT}"),
    (0, b"\xff\x4f\xff\x51", f"a JPEG 2000 image that Pillow does not read; {_CONVERT}"),
    (0, b"\xff\xd8\xff", f"a JPEG with a damaged header; {_AGAIN}"),
    (0, b"\x89PNG", f"a PNG with a damaged header; {_AGAIN}"),
    (0, b"GIF8", f"a GIF with a damaged header; {_AGAIN}"),
    (8, b"WEBP", f"a WebP image that Pillow does not read; {_CONVERT}"),
    (0, b"8BPS", f"a Photoshop document that Pillow does not read; {_CONVERT}"),
    (0, b"FUJIFILMCCD-RAW", f"a raw photo of a Fujifilm camera; {_CONVERT}"),
    (8, b"CR\x02", f"a raw photo of a Canon camera (CR2); {_CONVERT}"),
    (0, b"IIRO", f"a raw photo of an Olympus camera; {_CONVERT}"),
    (0, b"IIRS", f"a raw photo of an Olympus camera; {_CONVERT}"),
    (0, b"IIU\0", f"a raw photo of a Panasonic camera; {_CONVERT}"),
    (0, b"FOVb", f"a raw photo of a Sigma camera; {_CONVERT}"),
    (128, b"DICM", f"a DICOM file; {_CONVERT}"),
    (0, b"SIMPLE  =", f"a FITS file; {_CONVERT}"),
    (0, b"\x89HDF", "an HDF5 file, not an image; export the images in it"),
    (0, b"\x93NUMPY", "a NumPy array, which is read where pixel_range is set"),
    (0, b"%PDF", "a PDF document; export its pages as images"),
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"\x1f\x8b", "a gzip file; unpack it"),
    (0, b"BZh", "a bzip2 file; unpack it"),
    (0, b"\xfd7zXZ\0", "an xz file; unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file; unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (0, b"Rar!", "a RAR archive; unpack it"),
    (257, b"ustar", "a tar archive; unpack it, or read it with --data_files"),
    (0, b"PAR1", "a parquet file; read it with --data_files"),
)
_BRANDS = {  # of the ISO base media file format, behind the word ftyp
    b"avif": "an AVIF image", b"avis": "an AVIF image", b"crx ": "a raw photo of a Canon camera (CR3)",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC/HEIF image"),
}  # fmt: skip


def describe(encoded: bytes) -> str:
    """What these bytes are, and what to do about it."""
    for start, signature, what in _SIGNATURES:
        if encoded[start : start + len(signature)] == signature:
            return what
    if encoded[4:8] == b"ftyp":
        what = _BRANDS.get(encoded[8:12])
        return f"{what}, which this Pillow does not read; {_CONVERT}" if what else "a video, MP4 or QuickTime"
    if encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        fix = "save it with 1, 3 or 4 bands of 8 bits, or 1 of 16 bits, or set num_channels and pixel_range"
        return f"{_tiff(encoded)}, which Pillow does not read; {fix}"
    if not any(encoded[:1024]):
        return f"zeros, as a copy leaves that was cut off; {_AGAIN}"
    return _text(encoded[:1024]) or f"an unknown format that begins with the bytes {encoded[:8].hex(' ')}"


def _tiff(encoded: bytes) -> str:
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(encoded[: 16 if 43 in encoded[2:4] else 8])  # 43: BigTIFF
        file = io.BytesIO(encoded)
        file.seek(tags.next)
        tags.load(file)
        bits, bands = max(tags[TiffImagePlugin.BITSPERSAMPLE]), tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        kind = "floating-point numbers" if 3 in tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) else "integers"
        return f"a TIFF with {bands} band{'s' * (bands > 1)} of {bits}-bit {kind}"
    except Exception:  # as Pillow's plug-ins, anything on damaged files
        return "a TIFF with a damaged header"


def _text(start: bytes) -> str | None:
    """What a text is, or `None` for bytes that are no text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # whose last character may be cut in two
    except UnicodeDecodeError:
        return None
    if any(c < " " and c not in "\t\n\f\r" for c in text):
        return None
    text = text.strip()
    if text.lower().startswith(("<!doctype html", "<html", "<head")):
        return f"an HTML page, as a download leaves that failed; {_AGAIN}"
    if "<svg" in text:
        return "an SVG drawing; convert it to PNG"
    if text.startswith("<?xml"):
        return f"an XML document, as a download leaves that failed; {_AGAIN}"
    if text.startswith(("/9j/", "iVBORw0KGgo", "data:image/")):
        return "an image in Base64; decode it to bytes"
    return f"text, {text[:40]!r}"
