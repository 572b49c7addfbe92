"""Bad and unusual images: skipped and reported, or converted."""

import hashlib
import itertools
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from testing_utils import PHOTO, encoded_image, identity, image_file, read

from modeling_can.data import ImageSource, ViewStream, view_loader
from modeling_can.data.crops import RandomCrops


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 20,000 x 20,000 pixels."""
    encoded = bytearray(encoded_image(format="PNG"))
    encoded[16:24] = struct.pack(">II", 20_000, 20_000)
    encoded[29:33] = struct.pack(">I", zlib.crc32(bytes(encoded[12:29])))
    return bytes(encoded)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # lies on its side
FRAMES = [Image.new("RGB", (40, 30), color) for color in ((250, 0, 0), (0, 0, 250))]
PALETTE = Image.new("P", (40, 30), 0)
PALETTE.putpalette([9, 8, 7, 200, 100, 0])


BAD = {
    "empty": (b"", "empty"),
    "truncated JPEG": (PHOTO[: len(PHOTO) // 2], "damaged"),
    "truncated PNG": (encoded_image(format="PNG")[:60], "damaged"),
    "text named .jpg": (b"this is not an image", "not_an_image"),
    "decompression bomb": (bomb(), "too_large"),
    "smaller than the patch": (encoded_image(size=(7, 40)), "too_small"),
}


UNUSUAL = {  # and the color that the middle of a view must have
    "CMYK JPEG": (encoded_image(mode="CMYK", color=(0, 255, 255, 0), quality=95), (254, 0, 0)),
    "grayscale JPEG": (encoded_image(mode="L", color=77), (77, 77, 77)),
    "palette PNG with transparency": (image_file(PALETTE, "PNG", transparency=0), (255, 255, 255)),
    "RGBA PNG": (encoded_image(mode="RGBA", color=(10, 20, 30, 255), format="PNG"), (10, 20, 30)),
    "transparent PNG": (encoded_image(mode="RGBA", color=(10, 20, 30, 0), format="PNG"), (255, 255, 255)),
    "16-bit PNG": (encoded_image(mode="I;16", color=30 * 257, format="PNG"), (30, 30, 30)),
    "animated GIF": (image_file(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (250, 0, 0)),
    "animated WebP": (image_file(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), (250, 0, 0)),
    "EXIF rotation": (encoded_image(color=(9, 99, 199), exif=TURNED, quality=95), (9, 99, 199)),
    "20,000 x 20 strip": (encoded_image(size=(20_000, 20), color=(50, 60, 70), quality=95), (50, 60, 70)),
}


@pytest.fixture(scope="module")
def good_and(tmp_path_factory):
    """A parquet file of one good image and the one given; both are read to the end of the first pass and beyond."""

    def read_both(encoded: bytes) -> tuple[list[dict], list[dict]]:
        path = tmp_path_factory.mktemp("images") / "rows.parquet"
        rows = {"image": [{"bytes": PHOTO, "path": "photo.jpg"}, {"bytes": encoded, "path": "unusual"}]}
        Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(path)
        source = ImageSource(data_files=str(path))
        log = path.with_name("bad_samples.jsonl")
        stream = ViewStream(source, RandomCrops((16, 16), min_size=(8, 8)), max_bad_fraction=1.0, bad_sample_log=log)
        samples = list(itertools.islice(stream, 4))
        return samples, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return read_both


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_passed_over_and_reported(good_and, kind):
    encoded, reason = BAD[kind]
    samples, log = good_and(encoded)
    assert all(sample["views"].shape == (2, 3, 16, 16) for sample in samples)
    assert [bad for sample in samples for bad in sample["bad"]] == [reason]
    (record,) = log
    assert record["reason"] == reason and record["path"] == "unusual"
    assert record["sha256"] == (hashlib.sha256(encoded).hexdigest() if encoded else None) and record["detail"]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_image_is_converted(good_and, kind):
    encoded, color = UNUSUAL[kind]
    samples, log = good_and(encoded)
    assert not log
    colors = [sample["views"][0, :, 8, 8].int() for sample in samples]
    # The other image is noise of every gray; the unusual one shows in each of the two passes.
    assert sum((abs(c - torch.tensor(color)) <= 4).all() for c in colors) >= 2


def test_a_folder_with_bad_files_is_read_and_its_log_names_each_once(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, content in {"a.jpg": PHOTO, "b.jpg": PHOTO[:300], "c.jpg": b"", "d.png": b"text"}.items():
        (images / name).write_bytes(content)
    source = ImageSource(data_dir=str(images))
    (images / "e.jpg").write_bytes(PHOTO)  # came too late to be listed
    stream = ViewStream(
        source, RandomCrops((16, 16)), max_bad_fraction=0.8, bad_sample_log=tmp_path / "bad_samples.jsonl"
    )
    bad = []
    for batch in itertools.islice(view_loader(stream, 3), 4):
        assert batch["views"].shape == (3, 2, 3, 16, 16)
        bad += batch["bad"]
    assert sorted(bad) == ["damaged", "empty", "not_an_image"]
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in lines) == ["b.jpg", "c.jpg", "d.png"]
    (images / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"no usable image: [a-z_]+, .* \(.*, the last of 4 rows\)$"):
        read(ViewStream(source, RandomCrops((16, 16)), max_bad_fraction=0.8), 1)
    stream = ViewStream(source, RandomCrops((16, 16)), process_index=1, num_processes=2)
    with pytest.raises(ValueError, match=r"the last of 2 rows of worker 1 of 2\); use fewer workers, if other rows"):
        read(stream, 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_stop_the_stream(tmp_path, num_workers):
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(PHOTO if i else b"text")
    stream = ViewStream(ImageSource(data_dir=str(tmp_path)), RandomCrops((16, 16)))
    with pytest.raises(ValueError, match="1 of 20 images .* are bad, more than max_bad_fraction=0.01.*no image in"):
        list(itertools.islice(view_loader(stream, 4, num_workers), 10))


def test_what_is_wrong_with_one_row_ends_no_stream(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", PHOTO)
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(PHOTO[-40:], bytes(40)))  # wrong CRC
    (tmp_path / "odd::name.jpg").write_bytes(PHOTO)
    paths = [f"zip://a.jpg::{tmp_path}/a.zip", "nul\0byte.jpg", "foo://a.jpg", None, None, f"{tmp_path}/odd::name.jpg"]
    features = Features({"image": ImageFeature(decode=False)})
    rows = Dataset.from_dict({"image": [path and {"path": path, "bytes": None} for path in paths]}, features=features)
    log = tmp_path / "not yet there" / "bad_samples.jsonl"
    stream = ViewStream(ImageSource(dataset=rows), RandomCrops((16, 16)), max_bad_fraction=0.9, bad_sample_log=log)
    samples = list(itertools.islice(stream, 2))
    bad = [reason for sample in samples for reason in sample["bad"]]
    assert sum(reason == "missing" for reason in bad) == 3 and bad.count("empty") >= 2  # rows without a name: each
    text = log.read_text()
    assert all(word in text for word in ("BadZipFile", "null byte", "foo", "worker 0"))


def test_folders_behind_links_are_read_and_names_that_are_no_text_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(PHOTO)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "cycle").symlink_to(tmp_path / "images")
    assert ImageSource(data_dir=str(tmp_path / "images")).num_images() == 1
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(PHOTO)
    with pytest.raises(ValueError, match="not UTF-8 text; rename"):
        ImageSource(data_dir=str(tmp_path / "images"))


def test_null_rows_and_images_in_archives(tmp_path):
    features = Features({"image": ImageFeature()})
    rows = {"image": [{"bytes": encoded_image(), "path": None}, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    source = ImageSource(data_files=str(tmp_path / "rows.parquet"))
    stream = ViewStream(source, RandomCrops((16, 16)), max_bad_fraction=0.5)
    assert {reason for sample in itertools.islice(stream, 3) for reason in sample["bad"]} == {"empty"}
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "folder" / "train.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.jpg", encoded_image(color=(80 * i, 2, 3)))
    source = ImageSource(dataset_name=str(tmp_path / "folder"))
    assert len(set(read(ViewStream(source, identity), 3))) == 3


def test_too_many_bad_images_stop_the_stream_after_a_thousand():
    rows = {"image": [{"bytes": PHOTO, "path": None}] * 100 + [{"bytes": b"text", "path": None}] * 1400}
    source = ImageSource(dataset=Dataset.from_dict(rows, features=Features({"image": ImageFeature()})))
    with pytest.raises(ValueError, match=r" of 10\d\d images .* are bad"):  # and not of 1500, after the whole pass
        list(ViewStream(source, RandomCrops((16, 16))))
