"""Decoding: orientation, transparency, bit depth, sizes."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from testing_utils import ROOT, encoded_image, image_file

from modeling_can.data import encoded
from modeling_can.data.bad_samples import BadImage
from modeling_can.data.decoding import decode


def test_a_decoded_image_keeps_its_transparency():
    image = Image.effect_noise((20, 10), 60).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=int(np.bincount(np.asarray(image).flatten()).argmax()))
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    assert opened.mode == "P" and "transparency" in opened.info
    there, back = (
        decode(file, transparent_background="red") for file in (buffer.getvalue(), encoded(opened)["bytes"])
    )
    assert np.array_equal(there, back) and (there == (255, 0, 0)).all(axis=2).any()


WIDE_RANGE = Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16))


def test_decoding_is_as_the_recipe_says():
    transparent = decode(
        encoded_image(mode="RGBA", color=(10, 20, 30, 0), format="PNG"), transparent_background="#102030"
    )
    assert transparent[0, 0].tolist() == [16, 32, 48]
    assert decode(encoded_image(), num_channels=1).shape == (30, 40, 1)
    full = decode(image_file(WIDE_RANGE, "PNG"), num_channels=1)
    np.testing.assert_allclose(full.flatten(), np.linspace(0, 255, 1200), atol=1)
    dim = image_file(
        Image.fromarray((np.asarray(WIDE_RANGE) // 16 + 100).astype(np.uint16)), "PNG"
    )  # a 12-bit detector
    assert decode(dim, num_channels=1).max() == 16
    stretched = decode(dim, num_channels=1, high_bit_depth="stretch")
    assert stretched.min() == 0 and stretched.max() == 255
    with pytest.raises(BadImage, match="high_bit_depth is 'skip'"):
        decode(dim, high_bit_depth="skip")
    floating = image_file(Image.new("F", (40, 30), 0.5), "TIFF")
    with pytest.raises(BadImage, match="high_bit_depth='stretch'"):
        decode(floating)
    assert not decode(floating, high_bit_depth="stretch").any()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_as_in_pillow(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = image_file(Image.effect_noise((40, 24), 80).convert("RGB"), file_format, exif=exif)
    sizes = []
    decode(encoded, shrink=lambda size: sizes.append(size) or 1)
    assert sizes == [(40, 24) if orientation <= 4 else (24, 40)]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert abs(decode(encoded).astype(int) - np.asarray(expected)).max() <= 1


def test_jpegs_decode_to_the_pixels_of_pillow():
    for mode in ("RGB", "L"):
        for options in ({"quality": 60}, {"quality": 95, "subsampling": 0}, {"progressive": True}):
            encoded = image_file(Image.effect_noise((123, 77), 80).convert(mode), "JPEG", **options)
            expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
            assert abs(decode(encoded).astype(int) - expected).max() <= 1


def test_a_large_image_is_read_in_silence_and_a_larger_one_told_what_to_do():
    """Pillow warns of an attack from half its limit on. In a process of its own, as pytest has filters of its own."""
    code = (
        "import io\nfrom PIL import Image\nfrom modeling_can.data.decoding import decode\n"
        "for height, limit in ((15, 1000), (25, 1000)):\n"
        "    buffer = io.BytesIO()\n"
        "    Image.new('RGB', (100, height)).save(buffer, 'PNG')\n"
        "    Image.MAX_IMAGE_PIXELS = limit\n"
        "    print(decode(buffer.getvalue()).shape)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == "(15, 100, 3)\n" and "DecompressionBombWarning" not in answer.stderr
    assert "(2500 pixels) exceeds limit of 2000 pixels; cut it into smaller images" in answer.stderr


def test_broken_exif_does_no_harm():
    exif = b"Exif\0\0" + b"II*\0\xff\xff\xff\xff"
    assert decode(image_file(Image.new("RGB", (40, 30), (9, 9, 9)), "WEBP", exif=exif)).shape == (30, 40, 3)


def test_the_least_size_is_height_and_width():
    wide = encoded_image(size=(40, 20))  # 20 high
    assert decode(wide, min_size=(20, 40)).shape == (20, 40, 3)
    with pytest.raises(BadImage, match="20 x 40 pixels, less than 21 x 8"):
        decode(wide, min_size=(21, 8))
    with pytest.raises(BadImage):
        decode(wide, min_size=(8, 41))


PAGE = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40)
COLORS = np.zeros((30, 40, 3), np.uint8)


def tiff_of(*pages: np.ndarray, options: tuple = ({}, {})) -> bytes:
    """The last `options` are those of all further pages."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for index, page in enumerate(pages):
            writer.write(page, contiguous=False, **options[min(index, 1)])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "encoded, message",
    [
        (
            tiff_of(*[PAGE] * 5),
            "a TIFF of 5 pages, of which 1 would be read; set num_channels to 5 and pixel_range, or keep one page a "
            "file",
        ),
        (tiff_of(*[COLORS] * 2), "a TIFF of 2 pages, of which 1 would be read; keep one page a file"),
        (
            tiff_of(np.zeros((30, 40, 6), np.uint8), options=({"photometric": "rgb"},)),
            "a TIFF of 6 bands, of which 3 would be read; set num_channels to 6 and pixel_range, or keep the colors "
            "alone",
        ),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_tiff_of_which_a_part_would_be_read_is_bad(encoded, message, num_channels):
    with pytest.raises(BadImage) as error:
        decode(encoded, num_channels=num_channels)
    assert (error.value.reason, str(error.value)) == ("channels", message)


@pytest.mark.parametrize(
    "second, options",
    [
        (COLORS[::2, ::2], {"subfiletype": 1}),  # a pyramid
        (COLORS[:16, :16], {}),  # a thumbnail
        (COLORS[..., 0] > 0, {"subfiletype": 4}),  # the mask of a GeoTIFF
    ],
)
def test_a_tiff_may_hold_smaller_copies_and_a_mask(second, options):
    assert decode(tiff_of(COLORS + 7, second, options=({}, options))).tolist() == (COLORS + 7).tolist()
    assert decode(tiff_of(PAGE), num_channels=1).shape == (30, 40, 1)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(file_format):
    first, second = Image.new("RGB", (40, 30), (255, 0, 0)), Image.new("RGB", (40, 30), (0, 0, 255))
    encoded = image_file(first, file_format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(encoded)).n_frames == 2
    assert decode(encoded)[0, 0].argmax() == 0
