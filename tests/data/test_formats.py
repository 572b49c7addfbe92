"""What is said of a file that is no image, or none that Pillow reads."""

import base64
import gzip
import io
import struct
import zipfile

import pytest
from testing_utils import PHOTO

from modeling_can.data.bad_samples import BadImage
from modeling_can.data.decoding import decode
from modeling_can.data.formats import describe


def tiff(bands: int, bits: int, sample_format: int = 1) -> bytes:
    """A TIFF of 4 x 4 pixels, with `sample_format` 3 of floating-point numbers; Pillow writes no such ones."""
    pixels = bytes(4 * 4 * bands * bits // 8)
    color = 2 if bands == 3 else 1
    tags = {256: 4, 257: 4, 258: None, 259: 1, 262: color, 273: None, 277: bands, 278: 4, 279: len(pixels), 339: None}
    behind = 8 + 2 + 12 * len(tags) + 4
    several = {258: [bits] * bands, 339: [sample_format] * bands}
    directory, blob = struct.pack("<H", len(tags)), b""
    for tag, value in tags.items():
        if tag in several and bands > 2:
            directory += struct.pack("<HHLL", tag, 3, bands, behind + len(blob))
            blob += struct.pack(f"<{bands}H", *several[tag])
        elif tag in several:
            directory += struct.pack("<HHL", tag, 3, bands) + struct.pack(f"<{bands}H", *several[tag]).ljust(4, b"\0")
        else:
            directory += struct.pack("<HHLL", tag, 4, 1, behind + 2 * 2 * bands * (bands > 2) if tag == 273 else value)
    return b"II*\0" + struct.pack("<L", 8) + directory + bytes(4) + blob + pixels


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", PHOTO)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES = {
    "two bands": (tiff(2, 8), "a TIFF with 2 bands of 8-bit integers, which Pillow does not read; save it with 1, 3"),
    "eight bands": (tiff(8, 16), "a TIFF with 8 bands of 16-bit integers"),
    "floats in color": (tiff(3, 32, 3), "a TIFF with 3 bands of 32-bit floating-point numbers"),
    "broken TIFF": (b"II*\0\xff\xff\xff\x7f", "a TIFF with a damaged header"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC/HEIF image, which this Pillow does not read; convert it"),
    "AVIF": (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF image, which this Pillow does not read"),
    "film": (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
    "JPEG XL": (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
    "raw": (b"FUJIFILMCCD-RAW 0201", "a raw photo of a Fujifilm camera"),
    "Photoshop": (b"8BPS\0\x09", "a Photoshop document"),
    "Git LFS": (POINTER, "a Git LFS pointer: the image was not fetched; run git lfs pull"),
    "HTML": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>caf\xc3\xa9", "an HTML page, as a download leaves"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "SVG": (b'<?xml version="1.0"?><svg/>', "an SVG drawing"),
    "gzip": (gzip.compress(PHOTO), "a gzip file; unpack it"),
    "zip": (zipped(), "a zip archive; unpack it"),
    "Base64": (base64.b64encode(PHOTO), "an image in Base64"),
    "long text": (("x" * 1023 + "é" * 9).encode(), "text, 'xxxx"),
    "zeros": (bytes(5000), "zeros, as a copy leaves that was cut off"),
    "anything": (b"\x01\x02\x03\x04\x05\x06\x07\x08\x09", "an unknown format that begins with the bytes 01 02 03 04"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_image_is_called_by_its_name(kind):
    encoded, name = FILES[kind]
    with pytest.raises(BadImage, match=f"no image in its {len(encoded)} bytes: {name}") as caught:
        decode(encoded)
    assert caught.value.reason == "not_an_image"


def test_a_format_that_another_pillow_reads_is_called_by_its_name():
    """JPEG 2000 is an option when Pillow is built."""
    assert describe(b"\0\0\0\x0cjP  \r\n\x87\n").startswith("a JPEG 2000 image that Pillow does not read; convert")
