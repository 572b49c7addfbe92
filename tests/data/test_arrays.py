"""Images that are read as arrays: files of the libraries that users have, columns, crops, augmentation."""

import io
import itertools
import struct
import sys
import tarfile
import types
import zlib

import datasets
import numpy as np
import pytest
import tifffile
import torch
from datasets import Array2D, Array3D, Array4D, Dataset, Features, List, Value
from PIL import Image
from testing_utils import add_to_tar, image_file, noise_file

from modeling_can.data import ImageSource, ViewStream, mean_and_std
from modeling_can.data.arrays import encode_array
from modeling_can.data.augmentations import Augmentation
from modeling_can.data.bad_samples import BadImage
from modeling_can.data.crops import RandomCrops
from modeling_can.data.decoding import decode
from modeling_can.data.resident import crop, read_images
from modeling_can.evaluation.sets import load_split


rng = np.random.default_rng(0)
BANDS = rng.integers(0, 4096, (5, 24, 32), dtype=np.uint16)  # (channels, height, width)


def tiff(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def pages(pixels: np.ndarray, **options) -> bytes:
    """One page after the other, as an acquisition writes them."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pixels:
            writer.write(page, contiguous=False, **options)
    return buffer.getvalue()


def geotiff(pixels: np.ndarray, tmp_path, **options) -> bytes:
    rasterio = pytest.importorskip("rasterio")
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype}
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(0, 0, 10, 10)}
    with rasterio.open(tmp_path / "bands.tif", "w", **profile, **place, **options) as file:
        file.write(pixels)
        file.build_overviews([2])
    return (tmp_path / "bands.tif").read_bytes()


# --- Files -----------------------------------------------------------------------------------------------------------

FILES = {
    "pages": lambda: tiff(BANDS),
    "bands side by side": lambda: tiff(BANDS.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig"),
    "bands one by one": lambda: tiff(BANDS, photometric="minisblack", planarconfig="separate"),
    "deflate": lambda: tiff(BANDS, compression="zlib"),
    "ImageJ": lambda: tiff(BANDS, imagej=True, metadata={"axes": "CYX"}),
    "OME": lambda: tiff(BANDS, ome=True, metadata={"axes": "CYX"}),
    "BigTIFF, big-endian": lambda: tiff(BANDS, bigtiff=True, byteorder=">"),
    "written page by page": lambda: pages(BANDS),
    "pages without metadata": lambda: pages(BANDS, metadata=None),
    "Pillow's pages": lambda: image_file(
        Image.fromarray(BANDS[0]), "TIFF", save_all=True, append_images=list(map(Image.fromarray, BANDS[1:]))
    ),
    "npy, channels first": lambda: encode_array(BANDS),
    "npy, channels last": lambda: encode_array(np.asfortranarray(BANDS.transpose(1, 2, 0))),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_pixels_are_those_that_were_written(kind):
    made = decode(FILES[kind](), num_channels=5, pixel_range=(0, 4095))
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, BANDS.transpose(1, 2, 0) / np.float32(4095))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interleave": "band"},
        {"compress": "deflate", "predictor": 2, "tiled": True, "blockxsize": 16, "blockysize": 16},
        {"compress": "lzw"},
    ],
    ids=["default", "bands", "deflate", "LZW"],
)
def test_geotiffs_of_rasterio_are_read_at_full_resolution(options, tmp_path):
    if options.get("compress") == "lzw":
        pytest.importorskip("imagecodecs")
    made = decode(geotiff(BANDS, tmp_path, **options), num_channels=5)
    np.testing.assert_array_equal(made, BANDS.transpose(1, 2, 0) / np.float32(65535))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "bool"])
@pytest.mark.parametrize("num_channels", [1, 2, 4])
def test_integers_have_the_range_of_their_type(dtype, num_channels):
    pixels = rng.integers(0, 2 if dtype == "bool" else 256, (num_channels, 9, 11)).astype(dtype)
    largest = {"uint8": 255, "uint16": 65535, "bool": 1}[dtype]
    given = {"pixel_range": (0, largest)} if num_channels == 1 else {}
    for file in (encode_array(pixels), tiff(pixels, photometric="minisblack")):
        np.testing.assert_array_equal(
            decode(file, num_channels, **given), pixels.transpose(1, 2, 0).astype(np.float32) / np.float32(largest)
        )


def test_other_types_need_a_range_and_what_lies_beyond_is_clipped():
    pixels = np.array([[[-4.0, 0.0, 2.0, 9.0]]] * 2, dtype=np.float32)
    with pytest.raises(
        ValueError, match=r"pixel_range is not set.*float32.*set pixel_range to the two, e.g. -4,9"
    ) as e:
        decode(encode_array(pixels), 2)
    assert not isinstance(e.value, BadImage)  # a setting that is missing is no matter of one image
    made = decode(encode_array(pixels), 2, pixel_range=(-2, 6))
    np.testing.assert_array_equal(made[0, :, 0], [0, 0.25, 0.5, 1])
    np.testing.assert_array_equal(decode(encode_array(pixels.astype("int64")), 2, pixel_range=(-2, 6)), made)


def test_a_range_of_one_value_is_refused_and_pixels_that_are_not_finite_suggest_none():
    with pytest.raises(ValueError, match=r"pixel_range=\(5, 5\) must be two values") as e:
        decode(encode_array(BANDS), 5, pixel_range=(5, 5))
    assert not isinstance(e.value, BadImage)
    pixels = np.full((2, 3, 4), np.nan)
    with pytest.raises(BadImage, match="no pixel that is finite") as e:
        decode(encode_array(pixels), 2)
    assert e.value.reason == "not_finite"
    pixels[0, 0] = [np.inf, 3, -1, -np.inf]
    with pytest.raises(ValueError, match="set pixel_range to the two, e.g. -1,3, the least"):
        decode(encode_array(pixels), 2)


def test_images_of_pillow_give_all_their_channels():
    image = Image.effect_noise((20, 12), 60).convert("RGBA")
    image.putalpha(Image.effect_noise((20, 12), 60))
    np.testing.assert_array_equal(decode(image_file(image, "PNG"), 4), np.asarray(image) / np.float32(255))
    png = image_file(image.convert("RGB"), "PNG")
    np.testing.assert_array_equal(decode(png, 3, pixel_range=(0, 255)), decode(png, 3) / np.float32(255))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = decode(image_file(image, "PNG", exif=turned), 4)
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(image), -1) / np.float32(255))


DEEP = rng.integers(0, 65536, (6, 9, 4), dtype=np.uint16)  # (height, width, channels)


def deep_png(pixels: np.ndarray, exif: bytes = b"") -> bytes:
    """Of 16 bits, which Pillow does not write in several channels."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [(b"IHDR", struct.pack(">2I5B", width, height, 16, color_type, 0, 0, 0)), (b"eXIf", exif)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_pngs_of_16_bits_keep_them(num_channels):
    if num_channels > 1:
        pytest.importorskip("imagecodecs")
    pixels = DEEP[..., :num_channels]
    made = decode(deep_png(pixels), num_channels, pixel_range=(0, 65535))
    np.testing.assert_array_equal(made, pixels / np.float32(65535))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_jpeg_2000_keeps_its_bits(num_channels, bits):
    imagecodecs = pytest.importorskip("imagecodecs")
    pixels = (DEEP.repeat(8, 0).repeat(8, 1)[..., :num_channels] >> (16 - bits)).astype("u1" if bits == 8 else "u2")
    file = imagecodecs.jpeg2k_encode(pixels.squeeze(), level=0, bitspersample=bits, reversible=True)
    made = decode(file, num_channels, pixel_range=(0, 2**bits - 1))
    np.testing.assert_array_equal(made, pixels / np.float32(2**bits - 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_imagecodecs_reads_are_turned_as_pillow_turns(orientation, monkeypatch):
    codecs = types.SimpleNamespace(png_decode=lambda _: DEEP, jpeg2k_decode=None)
    monkeypatch.setitem(sys.modules, "imagecodecs", codecs)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shallow = image_file(Image.fromarray((DEEP // 257).astype(np.uint8)), "PNG", exif=exif)
    made = decode(deep_png(DEEP, exif.tobytes().removeprefix(b"Exif\0\0")), 4)
    np.testing.assert_array_equal((made * 65535).round() // 257, (decode(shallow, 4) * 255).round())


def test_more_bits_than_pillow_keeps_are_bad_without_imagecodecs(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    siz = b"\xff\x4f\xff\x51" + struct.pack(">2H8IH", 47, 0, 4, 4, 0, 0, 4, 4, 0, 0, 3) + bytes([11, 1, 1] * 3)
    for file, kind in ((deep_png(DEEP[..., :3]), "PNG of 16"), (siz + b"\xff\xd9", "JPEG2000 of 12")):
        with pytest.raises(BadImage, match=rf"a {kind} bits.* 8; save it as TIFF, or .*modeling-can\[arrays\]") as e:
            decode(file, 3, pixel_range=(0, 65535))
        assert e.value.reason == "bit_depth"
    others = {"PPM": b"P6 2 2 65535\n" + bytes(24), "SGI": image_file(Image.new("RGB", (2, 2)), "SGI")}
    others["SGI"] = others["SGI"][:3] + b"\2" + others["SGI"][4:]
    for kind, file in others.items():
        with pytest.raises(BadImage, match=f"a {kind} of 16 bits, of which Pillow would keep 8; save it as TIFF$"):
            decode(file, 3, pixel_range=(0, 65535))
    assert decode(b"P6 2 2 255\n" + bytes(12), 3, pixel_range=(0, 255)).shape == (2, 2, 3)


BAD = {
    "fewer channels": (encode_array(BANDS[:2]), "channels", "2 channels .*; the model takes 5; set num_channels to 2"),
    "gray": (tiff(BANDS[0]), "channels", "1 channel .*set num_channels to 1"),
    "a JPEG": (noise_file(0), "channels", "3 channels"),
    "a stack of volumes": (encode_array(BANDS[None]), "channels", "keep one image in a file"),
    "a vector": (encode_array(BANDS[0, 0]), "channels", "keep one image in a file"),
    "not finite": (encode_array(np.full((5, 9, 9), np.nan)), "not_finite", "fill them"),
    "text": (encode_array(np.full((5, 9, 9), "a")), "damaged", "no numbers"),
    "objects": (b"\x93NUMPY" + bytes(30), "damaged", "Error"),
    "half a TIFF": (tiff(BANDS)[:2000], "damaged", "Error"),
    "ragged lists": (encode_array([[1, 2], [3]]), "not_an_image", r"text, '\[\[1, 2\], \[3\]\]'"),
    "small": (encode_array(BANDS[:, :4]), "too_small", "4 x 32 pixels, less than 8 x 8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_a_bad_image(kind):
    file, reason, message = BAD[kind]
    with pytest.raises(BadImage, match=message) as error:
        decode(file, 5, pixel_range=(0, 4095), min_size=(8, 8))
    assert error.value.reason == reason


@pytest.mark.parametrize("package", ["tifffile", "imagecodecs"])
def test_a_missing_package_is_named(package, monkeypatch):
    file = tiff(BANDS)
    if package == "tifffile":
        monkeypatch.setitem(sys.modules, "tifffile", None)
    else:
        message = "<COMPRESSION.LZW: 5> requires the 'imagecodecs' package"
        monkeypatch.setattr(
            tifffile.TiffPageSeries, "asarray", lambda self: (_ for _ in ()).throw(ValueError(message))
        )
    with pytest.raises(ValueError, match=rf"needs {package}; pip install 'modeling-can\[arrays\]'"):
        decode(file, 5)


# --- Sources ---------------------------------------------------------------------------------------------------------

ROWS = rng.integers(0, 60_000, (30, 2, 8, 9), dtype=np.uint16)


def as_array(encoded: bytes, epoch: int) -> np.ndarray:
    return np.load(io.BytesIO(encoded))[None].astype(np.float64)


def read_rows(source: ImageSource, count: int = len(ROWS)) -> set[bytes]:
    stream = ViewStream(source, as_array, block_size=7)
    return {sample["views"].numpy().tobytes() for sample in itertools.islice(stream, count)}


def column(kind: str, folder) -> dict:
    """The rows in a set, as arguments of `ImageSource`."""
    nested = List(List(List(Value("uint16"))))
    feature = {"nested lists": nested, "gray": Array2D((8, 9), "float32")}.get(kind, Array3D((2, 8, 9), "uint16"))
    rows = ROWS[:, 0].astype("float32") if kind == "gray" else ROWS
    rows = rows.tolist() if kind == "nested lists" else list(rows)
    made = Dataset.from_dict({"image": rows}, features=Features({"image": feature}))
    if kind == "built in Python":
        return {"dataset": made}
    if kind == "mapped":  # of unknown types
        return {"dataset": made.to_iterable_dataset().map(lambda row: {"image": np.array(row["image"], "uint16")})}
    if kind == "tar":
        with tarfile.open(folder / "rows.tar", "w") as archive:
            for number, row in enumerate(ROWS):
                add_to_tar(archive, f"{number}.npy", encode_array(row))
        return {"data_files": f"{folder}/rows.tar", "image_column": "npy"}
    if kind == "bytes":
        made = Dataset.from_dict({"image": [encode_array(row) for row in ROWS]})
    made.to_parquet(folder / "rows.parquet")
    return {"data_files": f"{folder}/rows.parquet", "streaming": kind != "downloaded"}


@pytest.mark.parametrize(
    "kind", ["parquet", "downloaded", "nested lists", "gray", "built in Python", "mapped", "tar", "bytes"]
)
def test_columns_of_arrays_are_read_in_their_type(kind, tmp_path):
    rows = ROWS[:, 0].astype("float32") if kind == "gray" else ROWS
    source = ImageSource(**column(kind, tmp_path), arrays=True)
    assert read_rows(source) == {row[None].astype(np.float64).tobytes() for row in rows}
    block, _ = next(source.blocks(source.dataset))
    assert np.load(io.BytesIO(source.images(block)[0]["bytes"])).dtype == rows.dtype


def rows_of(feature, shape: tuple[int, ...], dtype: str) -> Dataset:
    rows = rng.integers(0, 256, (4, *shape)).astype(dtype)
    rows = rows.tolist() if isinstance(feature, List) else list(rows)
    features = Features({"image": feature, "label": Value("int64")})
    return Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features=features)


def nested(dtype: str) -> List:
    return List(List(List(Value(dtype))))


@pytest.mark.parametrize(
    ("feature", "shape", "dtype"),
    [
        (Array3D((8, 9, 3), "uint8"), (8, 9, 3), "uint8"),
        (Array3D((8, 9, 4), "uint8"), (8, 9, 4), "uint8"),
        (nested("uint8"), (8, 9, 3), "uint8"),
        (nested("int64"), (8, 9, 3), "int64"),
        (Array2D((8, 9), "uint8"), (8, 9), "uint8"),
        (List(List(Value("float32"))), (8, 9), "float32"),
    ],
)
def test_arrays_that_pillow_can_hold_are_images_too(feature, shape, dtype, tmp_path):
    rows = rows_of(feature, shape, dtype)
    rows.to_parquet(tmp_path / "train.parquet")
    source, (split, _) = ImageSource(dataset=rows), load_split(str(tmp_path))
    image = source.images(next(source.blocks(source.dataset))[0])[1]
    for encoded in (image["bytes"], split.read(1)):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), rows[1]["image"])


@pytest.mark.parametrize(
    ("feature", "shape", "dtype"),
    [
        (Array3D((3, 8, 9), "uint8"), (3, 8, 9), "uint8"),
        (Array3D((8, 9, 1), "uint8"), (8, 9, 1), "uint8"),
        (Array3D((8, 9, 3), "uint16"), (8, 9, 3), "uint16"),  # of which datasets keeps the lower 8 bits
        (Array3D((8, 9, 3), "float32"), (8, 9, 3), "float32"),
        (nested("uint8"), (3, 8, 9), "uint8"),
        (nested("float64"), (8, 9, 3), "float64"),
    ],
)
def test_other_arrays_need_a_range_to_be_read(feature, shape, dtype, tmp_path):
    rows = rows_of(feature, shape, dtype)
    rows.to_parquet(tmp_path / "train.parquet")
    message = "image_column=image of .*arrays.* set pixel_range .* 0,255 of uint8, or num_channels"
    with pytest.raises(ValueError, match=message):
        source = ImageSource(dataset=rows)
        next(source.blocks(source.dataset))
    with pytest.raises(ValueError, match=message):
        load_split(str(tmp_path))
    source = ImageSource(dataset=rows, arrays=True)
    channels = 1 if shape[-1] == 1 else 3
    image = source.images(next(source.blocks(source.dataset))[0])[0]
    assert decode(image["bytes"], channels, pixel_range=(0, 255)).shape == (8, 9, channels)


def test_a_stack_in_a_row_is_no_image():
    made = Dataset.from_dict({"image": [np.zeros((2, 3, 4, 5))]}, Features({"image": Array4D((2, 3, 4, 5), "uint8")}))
    for arrays in (False, True):
        with pytest.raises(ValueError, match="not one image in each row"):
            ImageSource(dataset=made, arrays=arrays)


def test_rows_without_an_image_or_with_a_ragged_one_are_bad(tmp_path):
    rows = [[[[1, 2], [3, 4]]], None, [[[1, 2], [3]]], [[[5, 6], [7, 8]]]]
    Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "rows.parquet")
    source = ImageSource(data_files=f"{tmp_path}/rows.parquet", arrays=True)
    crops = RandomCrops((4, 4), num_channels=1, pixel_range=(0, 9))
    samples = list(itertools.islice(ViewStream(source, crops, max_bad_fraction=1), 4))
    assert sorted(reason for sample in samples for reason in sample["bad"]) == ["empty", "not_an_image"]


def test_reading_goes_on_exactly_where_it_was(tmp_path):
    arguments = column("parquet", tmp_path)

    def stream():
        return ViewStream(ImageSource(**arguments, arrays=True), as_array, seed=3, block_size=7)

    whole = [sample["views"] for sample in itertools.islice(stream(), 50)]
    first = stream()
    begun = [sample["views"] for sample in itertools.islice(first, 17)]
    state, second = first.state_dict(), stream()
    second.load_state_dict(state)
    rest = [sample["views"] for sample in itertools.islice(second, 33)]
    assert all(map(torch.equal, whole, begun + rest))


def test_a_folder_holds_numpy_files_where_arrays_are_read(tmp_path):
    for number, row in enumerate(ROWS[:4]):
        np.save(tmp_path / f"{number}.npy", row)
        tifffile.imwrite(tmp_path / f"{number}.tif", row)
    assert ImageSource(data_dir=tmp_path, arrays=True).num_images() == 8
    source = ImageSource(data_dir=tmp_path)
    assert source.num_images() == 4 and source.left_out == {".npy": 4}
    for path in tmp_path.glob("*.tif"):
        path.unlink()
    with pytest.raises(ValueError, match="left out: 4 .npy; NumPy arrays are read where pixel_range is set"):
        ImageSource(data_dir=tmp_path)


# --- Crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 7])
def test_a_constant_image_stays_constant(num_channels, resample):
    levels = np.linspace(0, 1, num_channels, dtype=np.float32)
    image = np.broadcast_to(levels[:, None, None], (num_channels, 30, 40))
    crops = RandomCrops((16, 20), num_channels, resample=resample, pixel_range=(0, 1))
    views = crops(encode_array(image))
    assert views.shape == (2, num_channels, 16, 20) and views.dtype == torch.float32
    torch.testing.assert_close(views, torch.from_numpy(levels)[:, None, None].expand_as(views), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_crops_of_arrays_are_those_of_rgb_images_but_for_rounding(resample):
    image = np.asarray(Image.open(io.BytesIO(noise_file(1))).convert("RGB")) // 2 + 64  # bicubic clips nothing
    png = image_file(Image.fromarray(image), "PNG")
    options = {"resample": resample, "seed": 5}
    as_image, as_array = RandomCrops((24, 24), **options), RandomCrops((24, 24), **options, pixel_range=(0, 255))
    for epoch in range(3):  # the same bytes: the same boxes
        torch.testing.assert_close(as_array(png, epoch), as_image(png, epoch) / 255, rtol=0, atol=1.5 / 255)


def test_every_channel_is_cropped_as_if_it_were_alone(monkeypatch):
    box = (3, 2, 23, 20)
    monkeypatch.setattr(RandomCrops, "boxes", lambda self, *_: [box])
    options = {"num_views": 1, "pixel_range": (0, 4095), "resample": "bicubic"}
    together = RandomCrops((12, 12), 5, **options)(encode_array(BANDS))
    alone = [RandomCrops((12, 12), 1, **options)(encode_array(band)) for band in BANDS]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_crops_on_the_device_are_those_of_the_loader(resample, tmp_path):
    for number, shift in enumerate(range(4)):
        np.save(tmp_path / f"{number}.npy", np.roll(BANDS, shift, axis=2))
    crops = RandomCrops((16, 16), 5, resample=resample, seed=3, pixel_range=(0, 4095))
    images = read_images(ImageSource(data_dir=tmp_path, arrays=True), crops, torch.device("cpu"))
    assert images.pixels.dtype == torch.float32 and images.pixels.shape == (4, 5, 24, 32)
    for path, checksum, pixels in zip(images.names, images.checksums, images.pixels, strict=True):
        boxes = torch.tensor([crops.boxes((32, 24), 7, int(checksum))])
        with open(path, "rb") as file:
            expected = crops(file.read(), epoch=7)
        torch.testing.assert_close(crop(pixels[None], boxes, (16, 16), resample)[0], expected, rtol=0, atol=1e-4)


def test_mean_and_deviation_keep_their_digits_where_little_of_the_range_is_used(tmp_path):
    for number in range(8):
        pixels = rng.normal([[[100]], [[300]]], [[[2]], [[5]]], (2, 64, 64))
        np.save(tmp_path / f"{number}.npy", pixels.round().astype(np.uint16))
    crops = RandomCrops((64, 64), 2, scale=(1, 1), ratio=(1, 1))
    mean, std = mean_and_std(ViewStream(ImageSource(data_dir=tmp_path, arrays=True), crops))
    np.testing.assert_allclose(mean, [100 / 65535, 300 / 65535], rtol=0.01)
    np.testing.assert_allclose(std, [2 / 65535, 5 / 65535], rtol=0.05)


# --- Augmentation ----------------------------------------------------------------------------------------------------


def test_arrays_of_three_channels_are_augmented_as_images_are():
    views = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    augment = Augmentation(solarize_probability=0.5, blur_kernel_size=5)
    drawn = augment.draw(8, "cpu")
    assert torch.equal(augment.transform(views, drawn), augment.transform(views / 255, drawn))


def test_no_channel_depends_on_another_where_there_are_not_three():
    augment = Augmentation(
        (0.5,) * 5, (0.2,) * 5, vertical_flip_probability=0.5, quarter_turn_probability=0.5,
        color_jitter_probability=1, blur_probability=1, solarize_probability=0.5, blur_kernel_size=5,
    )  # fmt: skip
    views, drawn = torch.rand(6, 2, 5, 16, 16), augment.draw(12, "cpu")
    assert {"jitter", "brightness", "contrast", "sigma"} < drawn.keys() and not {"hue", "saturation"} & drawn.keys()
    made = augment.transform(views, drawn)
    views[:, :, 2] = torch.rand(6, 2, 16, 16)
    changed = (augment.transform(views, drawn) != made).flatten(3).any(dim=3)  # (images, views, channels)
    assert changed[:, :, 2].all() and not changed[:, :, [0, 1, 3, 4]].any()
    order = torch.tensor([3, 0, 4, 1, 2])
    reordered = {name: values[:, order] if values.shape[1] == 5 else values for name, values in drawn.items()}
    made = augment.transform(views, drawn)[:, :, order]
    assert torch.equal(augment.transform(views[:, :, order], reordered), made)


def test_each_channel_draws_its_own_factors_where_there_are_not_three():
    augment = Augmentation((0.5,) * 4, (0.2,) * 4, blur_kernel_size=5)
    drawn = augment.draw(5000, "cpu")
    for name in ("brightness", "contrast"):
        factors = drawn[name].squeeze()
        assert factors.shape == (5000, 4) and 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
        between = torch.corrcoef(factors.T) - torch.eye(4)
        assert between.abs().max() < 0.08, "channels share a factor"
    assert all(drawn[name].shape == (5000, 1, 1, 1) for name in ("flip", "jitter", "sigma"))


def test_brightness_and_contrast_are_about_each_channels_own_mean():
    augment = Augmentation((0,) * 2, (1,) * 2, flip_probability=0, blur_probability=0, color_jitter_probability=1)
    views = torch.rand(3, 2, 2, 8, 8) * 0.4 + 0.2
    drawn = augment.draw(6, "cpu")
    drawn |= {
        "brightness": torch.full_like(drawn["brightness"], 0.9),
        "contrast": torch.full_like(drawn["contrast"], 0.5),
    }
    bright = 0.9 * views
    expected = bright.mean((3, 4), keepdim=True).lerp(bright, 0.5)
    torch.testing.assert_close(augment.transform(views, drawn), expected)
    constant = torch.full((3, 2, 2, 8, 8), 0.5)
    torch.testing.assert_close(augment.transform(constant, drawn), 0.9 * constant)


def test_datasets_columns_that_hold_no_arrays_are_left_as_they_are(tmp_path):
    rows = {"image": [{"bytes": noise_file(0), "path": None}] * 2}
    made = Dataset.from_dict(rows, features=Features({"image": datasets.Image()}))
    source = ImageSource(dataset=made, arrays=True)
    block, _ = next(source.blocks(source.dataset))
    assert source.images(block)[0]["bytes"] == noise_file(0)
