"""Sources, order, views and augmentation, on real image files."""

import hashlib
import io
import itertools
import json
import math
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from modeling_can.data import ImageSource, ViewStream, encoded, mean_and_std, view_loader
from modeling_can.data import sources as sources_of_images
from modeling_can.data.augmentations import Augmentation
from modeling_can.data.crops import RandomCrops, random_box
from modeling_can.data.decoding import BadImage, decode


def picture(size=(40, 30), color=(200, 30, 90), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def identity(encoded: bytes, epoch: int) -> np.ndarray:
    """A view maker that tells which picture it was given."""
    return np.array([zlib.crc32(encoded)])


def read(stream: ViewStream, count: int, num_workers: int = 0) -> list[int]:
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers)
    return [int(row["views"]) for row in itertools.islice(loader, count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four parquet shards of six distinct pictures, and the pictures."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = [picture(color=(i * 10, 255 - i * 10, 100)) for i in range(24)]
    for i in range(4):
        rows = {"image": [{"bytes": p, "path": None} for p in pictures[i * 6 : i * 6 + 6]], "label": [i] * 6}
        features = Features({"image": ImageFeature(), "label": Dataset.from_dict({"label": [0]}).features["label"]})
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{i}.parquet")
    return folder, sorted(zlib.crc32(p) for p in pictures)


# --- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (2, 0), (2, 2), (1, 2)])
def test_readers_share_every_epoch_without_overlap(shards, num_processes, num_workers):
    folder, everything = shards
    source = ImageSource(data_files=f"{folder}/*.parquet")
    shares = [
        read(ViewStream(source, identity, 0, rank, num_processes), 2 * 24 // num_processes, num_workers)
        for rank in range(num_processes)
    ]
    for epoch in range(2):  # the stream goes on into the second epoch without a gap
        seen = [x for share in shares for x in share[epoch * len(share) // 2 : (epoch + 1) * len(share) // 2]]
        assert sorted(seen) == everything


def test_rows_are_dealt_with_a_warning_where_shards_are_too_few(shards, caplog):
    folder, everything = shards
    source = ImageSource(data_files=f"{folder}/train-0.parquet")
    shares = [read(ViewStream(source, identity, 0, rank, 3), 2) for rank in range(3)]
    assert len({x for share in shares for x in share}) == 6
    assert "1 shards for 3 readers" in caplog.text


def test_order_depends_on_seed_and_epoch_and_is_reproducible(shards):
    source = ImageSource(data_files=f"{shards[0]}/*.parquet")
    first = read(ViewStream(source, identity, 0), 48)
    assert first == read(ViewStream(source, identity, 0), 48)
    assert first != read(ViewStream(source, identity, 1), 48)
    assert first[:24] != first[24:]
    assert read(ViewStream(source, identity, 0, block_size=5), 24) != first[:24]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_are_shuffled_and_dealt_anew_for_every_epoch(shards, num_processes):
    source = ImageSource(data_files=f"{shards[0]}/*.parquet")
    shard_of = {
        x: i
        for i in range(4)
        for x in read(ViewStream(ImageSource(data_files=f"{shards[0]}/train-{i}.parquet"), identity), 6)
    }

    def shard_orders(seed):
        """For each of six epochs, the shards in the order in which the first process reads them."""
        share = read(ViewStream(source, identity, seed, 0, num_processes, block_size=1), 6 * 24 // num_processes)
        per_epoch = 24 // num_processes
        return [
            tuple(dict.fromkeys(shard_of[x] for x in share[e * per_epoch : (e + 1) * per_epoch])) for e in range(6)
        ]

    first = shard_orders(0)
    assert len(set(first)) > 2 and first != shard_orders(1) and first == shard_orders(0)
    assert all(len(order) == 4 // num_processes for order in first)
    if num_processes == 2:
        assert len({frozenset(order) for order in first}) > 1  # processes exchange shards between epochs


# --- Sources ---------------------------------------------------------------------------------------------------------


def test_any_folder_of_images_is_a_source(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "flat.png").write_bytes(picture(format="PNG"))
    (tmp_path / "a" / "b" / "deep.JPG").write_bytes(picture(color=(1, 2, 3)))
    (tmp_path / "notes.txt").write_text("not an image")
    source = ImageSource(data_dir=str(tmp_path))
    assert source.num_images() == 2
    assert len(set(read(ViewStream(source, identity), 2))) == 2


def test_load_dataset_folders_and_the_bundled_tiles_are_sources(shards):
    two = ImageSource(data_files=[f"{shards[0]}/train-0.parquet", f"{shards[0]}/train-1.parquet"])
    assert two.num_images() == 12
    source = ImageSource(dataset_name=str(shards[0]))
    assert source.num_images() == 24 and sorted(read(ViewStream(source, identity), 24)) == shards[1]
    bundled = ImageSource(dataset_name="sample_data")
    assert bundled.num_images() == 2880 and bundled.dataset.num_shards == 4


def test_tar_shards_and_data_sets_built_in_python_are_sources(tmp_path):
    pictures = [
        picture(
            color=(i * 10, 200, 100),
        )
        for i in range(12)
    ]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for i in range(shard * 6, shard * 6 + 6):
                add_to_tar(archive, f"{i:03}.jpg", pictures[i])
    source = ImageSource(data_files=f"{tmp_path}/*.tar")  # whose column is called jpg
    everything = sorted(map(zlib.crc32, pictures))
    assert source.num_images() is None and sorted(read(ViewStream(source, identity), 12)) == everything

    features = Features({"photo": ImageFeature()})
    rows = Dataset.from_dict({"photo": [{"bytes": p, "path": None} for p in pictures]}, features=features)
    for built in (rows, rows.to_iterable_dataset(num_shards=3)):
        assert sorted(read(ViewStream(ImageSource(dataset=built), identity), 12)) == everything
    assert ImageSource(dataset=rows).num_images() == 12


def test_streams_that_filter_or_map_decoded_lose_nothing(shards):
    def pixels(encoded, epoch):
        return np.array([zlib.crc32(decode(encoded).tobytes())])

    def stream():
        return load_dataset("parquet", data_files=f"{shards[0]}/*.parquet", split="train", streaming=True)

    everything = sorted(read(ViewStream(ImageSource(dataset=stream()), pixels), 24))
    whole = stream().features
    built = {
        "filter": stream().filter(lambda row: row["image"].width > 0),
        "filter, label alone": stream().filter(lambda label: label >= 0, input_columns=["label"]),
        "map": stream().map(lambda row: {"label": 0}),
        "map to pictures": stream().map(lambda row: {"image": row["image"].crop((0, 0, *row["image"].size))}),
        "map with features": stream().map(lambda row: {"label": 0}, features=whole),
        "map to bytes": stream().decode(False).map(lambda row: {"image": row["image"]["bytes"]}),
        "not decoded": stream().decode(False).filter(lambda row: True).map(lambda row: {"label": 0}),
    }
    for name, dataset in built.items():
        assert sorted(read(ViewStream(ImageSource(dataset=dataset), pixels), 24)) == everything, name
    original = read(ViewStream(ImageSource(dataset=built["not decoded"]), identity), 24)
    assert sorted(original) == shards[1]
    tensors = stream().map(lambda row: {"image": torch.zeros(3, 8, 8)}).with_format("torch")
    with pytest.raises(ValueError, match="a Tensor is no image"):
        read(ViewStream(ImageSource(dataset=tensors), pixels), 1)


def test_a_decoded_picture_keeps_its_transparency():
    picture = Image.effect_noise((20, 10), 60).convert("P")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=int(np.bincount(np.asarray(picture).flatten()).argmax()))
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    assert opened.mode == "P" and "transparency" in opened.info
    there, back = (
        decode(file, transparent_background="red") for file in (buffer.getvalue(), encoded(opened)["bytes"])
    )
    assert np.array_equal(there, back) and (there == (255, 0, 0)).all(axis=2).any()


def test_a_damaged_picture_in_a_decoded_stream_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_of_images.time, "sleep", lambda seconds: pytest.fail("waits"))
    features = Features({"image": ImageFeature()})
    rows = {"image": [{"bytes": picture(), "path": None}, {"bytes": b"no picture", "path": None}]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    stream = load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", streaming=True)
    with pytest.raises(OSError, match="cannot identify image file"):
        read(ViewStream(ImageSource(dataset=stream.filter(lambda row: row["image"].width > 0)), identity), 2)


@pytest.mark.parametrize("num_readers", [1, 2, 3, 8])
def test_skipped_and_taken_rows_are_the_same_for_any_number_of_readers(shards, num_readers):
    stream = load_dataset("parquet", data_files=f"{shards[0]}/*.parquet", split="train", streaming=True)
    in_order = [zlib.crc32(row["image"]["bytes"]) for row in stream.decode(False)]
    both = {"skip": (stream.skip(8), in_order[8:]), "take": (stream.take(16), in_order[:16])}
    for name, (part, expected) in both.items():
        source = ImageSource(dataset=part)
        shares = [
            read(ViewStream(source, identity, 0, rank, num_readers), 2 * 16 // num_readers)
            for rank in range(num_readers)
        ]
        assert {x for share in shares for x in share} <= set(expected), name
        if 16 % num_readers == 0:
            assert sorted(x for share in shares for x in share) == sorted(2 * expected), name
    with pytest.raises(ValueError, match=r"joins parts that were made by \.skip\(\) or \.take\(\)"):
        ImageSource(dataset=concatenate_datasets([stream.take(8), stream.skip(16)]))


def test_rows_with_several_images_are_refused():
    features = Features({"mask": ImageFeature(), "photo": ImageFeature()})
    rows = [{"bytes": picture(), "path": None}] * 2
    source = ImageSource(dataset=Dataset.from_dict({"mask": rows, "photo": rows}, features=features))
    with pytest.raises(ValueError, match=r"several images; set image_column to one of \['mask', 'photo'\]"):
        read(ViewStream(source, identity), 1)


def test_configurations_and_unusual_file_names(tmp_path, shards):
    for number, name in enumerate(["one", "two"]):
        (tmp_path / name).mkdir()
        shutil.copy(f"{shards[0]}/train-{number}.parquet", tmp_path / name / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    seen = []
    for name, streaming in (("one", True), ("two", True), ("two", False)):
        source = ImageSource(dataset_name=str(tmp_path), config_name=name, streaming=streaming)
        seen.append(sorted(read(ViewStream(source, identity), 6)))
    assert seen[0] != seen[1] == seen[2]
    with pytest.raises(ValueError, match="Config name is missing|one.*two"):
        ImageSource(dataset_name=str(tmp_path))
    with pytest.raises(ValueError, match="dataset_config_name=two is of a dataset_name, and data_dir is given"):
        ImageSource(data_dir=str(tmp_path), config_name="two")

    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "Screenshot at 3.45.12\u202fPM.png").write_bytes(
        picture(format="PNG")
    )  # as macOS names them
    assert ImageSource(data_dir=str(tmp_path / "shots")).num_images() == 1
    (tmp_path / "shots" / os.fsdecode(b"\xff.png")).write_bytes(picture(format="PNG"))
    with pytest.raises(ValueError, match="not UTF-8"):
        ImageSource(data_dir=str(tmp_path / "shots"))


def test_a_source_can_be_downloaded_first(shards):
    source = ImageSource(data_files=f"{shards[0]}/*.parquet", streaming=False)
    assert source.num_images() == 24 and sorted(read(ViewStream(source, identity), 24)) == shards[1]
    part = ImageSource(dataset_name=str(shards[0]), split="train[:25%]", streaming=False)
    assert part.num_images() == 6 and set(read(ViewStream(part, identity), 6)) < set(shards[1])


def test_what_is_no_source_is_refused(tmp_path, shards):
    with pytest.raises(ValueError, match="exactly one of dataset_name, data_dir, data_files and dataset"):
        ImageSource()
    with pytest.raises(ValueError, match="exactly one"):
        ImageSource(data_dir="a", data_files="b")
    with pytest.raises(ValueError, match="is not a folder"):
        ImageSource(data_dir=str(tmp_path / "missing"))
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match="holds no images.*--data_files"):
        ImageSource(data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data_files=.*none\.parquet"):
        ImageSource(data_files=str(tmp_path / "none.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="dataset_name=.*empty"):
        ImageSource(dataset_name=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="one split, a Dataset or IterableDataset"):
        ImageSource(dataset={"train": []})
    with pytest.raises(ValueError, match="s3://bucket/.* needs a package that is not installed: .*s3fs"):
        ImageSource(data_files="s3://bucket/train-*.parquet")
    with pytest.raises(ValueError, match="ends in '.zip'"):
        ImageSource(data_files="images.zip")
    for streaming in (True, False):
        with pytest.raises(ValueError, match=r"dataset_split=val: .*train"):
            ImageSource(dataset_name=str(shards[0]), split="val", streaming=streaming)
    with pytest.raises(ValueError, match=r"dataset_split=train\[:50%\]: .* --streaming false"):
        ImageSource(dataset_name=str(shards[0]), split="train[:50%]")
    with pytest.raises(ValueError, match=r"no column 'img'; set image_column to one of \['image', 'label'\]"):
        ImageSource(dataset_name=str(shards[0]), image_column="img")


# --- Bad and unusual images -----------------------------------------------------------------------------------------


def image_file(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 20,000 x 20,000 pixels."""
    encoded = bytearray(picture(format="PNG"))
    encoded[16:24] = struct.pack(">II", 20_000, 20_000)
    encoded[29:33] = struct.pack(">I", zlib.crc32(bytes(encoded[12:29])))
    return bytes(encoded)


PHOTO = image_file(Image.effect_noise((90, 60), 80).convert("RGB"), "JPEG")
TURNED = Image.Exif()
TURNED[0x0112] = 6  # lies on its side
FRAMES = [Image.new("RGB", (40, 30), color) for color in ((250, 0, 0), (0, 0, 250))]
PALETTE = Image.new("P", (40, 30), 0)
PALETTE.putpalette([9, 8, 7, 200, 100, 0])
WIDE_RANGE = Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16))

BAD = {
    "empty": (b"", "empty"),
    "truncated JPEG": (PHOTO[: len(PHOTO) // 2], "damaged"),
    "truncated PNG": (picture(format="PNG")[:60], "damaged"),
    "text named .jpg": (b"this is not a picture", "not_an_image"),
    "decompression bomb": (bomb(), "too_large"),
    "smaller than the patch": (picture(size=(7, 40)), "too_small"),
}
UNUSUAL = {  # and the colour that the middle of a view must have
    "CMYK JPEG": (picture(mode="CMYK", color=(0, 255, 255, 0), quality=95), (254, 0, 0)),
    "greyscale JPEG": (picture(mode="L", color=77), (77, 77, 77)),
    "palette PNG with transparency": (image_file(PALETTE, "PNG", transparency=0), (255, 255, 255)),
    "RGBA PNG": (picture(mode="RGBA", color=(10, 20, 30, 255), format="PNG"), (10, 20, 30)),
    "transparent PNG": (picture(mode="RGBA", color=(10, 20, 30, 0), format="PNG"), (255, 255, 255)),
    "16-bit PNG": (picture(mode="I;16", color=30 * 257, format="PNG"), (30, 30, 30)),
    "animated GIF": (image_file(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (250, 0, 0)),
    "animated WebP": (image_file(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), (250, 0, 0)),
    "EXIF rotation": (picture(color=(9, 99, 199), exif=TURNED, quality=95), (9, 99, 199)),
    "20,000 x 20 strip": (picture(size=(20_000, 20), color=(50, 60, 70), quality=95), (50, 60, 70)),
}


@pytest.fixture(scope="module")
def good_and(tmp_path_factory):
    """A parquet file of one good picture and the one given; both are read to the end of the first pass and beyond."""

    def read_both(encoded: bytes) -> tuple[list[dict], list[dict]]:
        path = tmp_path_factory.mktemp("images") / "rows.parquet"
        rows = {"image": [{"bytes": PHOTO, "path": "photo.jpg"}, {"bytes": encoded, "path": "unusual"}]}
        Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(path)
        source = ImageSource(data_files=str(path))
        ledger = path.with_name("bad_samples.jsonl")
        stream = ViewStream(source, RandomCrops((16, 16), min_size=(8, 8)), max_bad_fraction=1.0, ledger=ledger)
        samples = list(itertools.islice(stream, 4))
        return samples, [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []

    return read_both


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_passed_over_and_reported(good_and, kind):
    encoded, reason = BAD[kind]
    samples, ledger = good_and(encoded)
    assert all(sample["views"].shape == (2, 3, 16, 16) for sample in samples)
    assert [bad for sample in samples for bad in sample["bad"]] == [reason]
    (record,) = ledger
    assert record["reason"] == reason and record["path"] == "unusual"
    assert record["sha256"] == (hashlib.sha256(encoded).hexdigest() if encoded else None) and record["detail"]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_image_is_converted(good_and, kind):
    encoded, color = UNUSUAL[kind]
    samples, ledger = good_and(encoded)
    assert not ledger
    colors = [sample["views"][0, :, 8, 8].int() for sample in samples]
    # The other picture is noise of every grey; the unusual one shows in each of the two passes.
    assert sum((abs(c - torch.tensor(color)) <= 4).all() for c in colors) >= 2


def test_decoding_is_as_the_recipe_says():
    transparent = decode(UNUSUAL["transparent PNG"][0], transparent_background="#102030")
    assert transparent[0, 0].tolist() == [16, 32, 48]
    assert decode(picture(), num_channels=1).shape == (30, 40, 1)
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
def test_pictures_stand_upright_as_in_pillow(orientation, file_format):
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


def test_a_folder_with_bad_files_is_read_and_its_ledger_names_each_once(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name, content in {"a.jpg": PHOTO, "b.jpg": PHOTO[:300], "c.jpg": b"", "d.png": b"text"}.items():
        (images / name).write_bytes(content)
    source = ImageSource(data_dir=str(images))
    (images / "e.jpg").write_bytes(PHOTO)  # came too late to be listed
    stream = ViewStream(source, RandomCrops((16, 16)), max_bad_fraction=0.8, ledger=tmp_path / "bad_samples.jsonl")
    bad = []
    for batch in itertools.islice(view_loader(stream, 3), 4):
        assert batch["views"].shape == (3, 2, 3, 16, 16)
        bad += batch["bad"]
    assert sorted(bad) == ["damaged", "empty", "not_an_image"]
    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in lines) == ["b.jpg", "c.jpg", "d.png"]
    (images / "a.jpg").unlink()
    with pytest.raises(ValueError, match="no usable image among the 4 rows .* The last bad one: .*"):
        read(ViewStream(source, RandomCrops((16, 16)), max_bad_fraction=0.8), 1)


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
    ledger = tmp_path / "not yet there" / "bad_samples.jsonl"
    stream = ViewStream(ImageSource(dataset=rows), RandomCrops((16, 16)), max_bad_fraction=0.9, ledger=ledger)
    samples = list(itertools.islice(stream, 2))
    bad = [reason for sample in samples for reason in sample["bad"]]
    assert sum(reason == "missing" for reason in bad) == 3 and bad.count("empty") >= 2  # rows without a name: each
    text = ledger.read_text()
    assert all(word in text for word in ("BadZipFile", "null byte", "foo", "reader 0"))


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


def test_broken_exif_does_no_harm():
    exif = b"Exif\0\0" + b"II*\0\xff\xff\xff\xff"
    assert decode(image_file(Image.new("RGB", (40, 30), (9, 9, 9)), "WEBP", exif=exif)).shape == (30, 40, 3)


def test_null_rows_and_pictures_in_archives(tmp_path):
    features = Features({"image": ImageFeature()})
    rows = {"image": [{"bytes": picture(), "path": None}, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    source = ImageSource(data_files=str(tmp_path / "rows.parquet"))
    stream = ViewStream(source, RandomCrops((16, 16)), max_bad_fraction=0.5)
    assert {reason for sample in itertools.islice(stream, 3) for reason in sample["bad"]} == {"empty"}
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "folder" / "train.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.jpg", picture(color=(80 * i, 2, 3)))
    source = ImageSource(dataset_name=str(tmp_path / "folder"))
    assert len(set(read(ViewStream(source, identity), 3))) == 3


# --- Views -----------------------------------------------------------------------------------------------------------


def test_views_are_crops_of_the_picture_that_depend_on_seed_epoch_and_picture_alone():
    ramp = np.stack([np.tile(np.arange(64, dtype=np.uint8), (48, 1))] * 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    encoded = buffer.getvalue()
    make = RandomCrops((16, 24), scale=(0.2, 0.4), seed=3)
    views = make(encoded, epoch=1)
    assert views.shape == (2, 3, 16, 24) and views.dtype == torch.uint8
    assert torch.equal(views, make(encoded, epoch=1))
    assert not torch.equal(views, make(encoded, epoch=2)) and not torch.equal(views[0], views[1])
    spread = int(views[0, 0, 8, -1]) - int(views[0, 0, 8, 0])  # the crop is narrower than the picture
    assert 10 < spread < 50


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_smaller_without_a_visible_difference(orientation, monkeypatch):
    x, y = np.meshgrid(np.arange(1600), np.arange(1200))
    waves = [127 + 80 * np.sin(x / 90 + i) + 40 * np.cos(y / 70) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = image_file(Image.fromarray(np.stack(waves, 2).astype(np.uint8)), "JPEG", quality=95, exif=exif)
    make = RandomCrops((64, 64))
    views = make(encoded).float()
    sizes = []
    decode_jpeg = "modeling_can.data.decoding.simplejpeg.decode_jpeg"
    monkeypatch.setattr(decode_jpeg, lambda *_, **s: sizes.append(s) or 1 / 0)
    with pytest.raises(BadImage, match="ZeroDivisionError"):
        make(encoded)
    assert 64 < sizes[0]["min_height"] < 600 and sizes[0]["min_height"] < sizes[0]["min_width"]
    monkeypatch.setattr(decode_jpeg, lambda *_, **s: (_ for _ in ()).throw(ValueError))
    assert abs(make(encoded) - views).max() < 9  # through Pillow, at full size


def test_boxes_have_the_stated_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((640, 480), (0.2, 1.0), (0.75, 4 / 3), rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and boxes[:, 2].max() <= 640 and boxes[:, 3].max() <= 480
    share, aspect = width * height / (640 * 480), width / height
    assert 0.19 < share.min() < 0.25 and share.max() > 0.9
    assert math.isclose(aspect.min(), 0.75, rel_tol=0.02) and math.isclose(aspect.max(), 4 / 3, rel_tol=0.02)
    left, upper, right, lower = random_box((2000, 20), (0.5, 1.0), (0.75, 4 / 3), rng)
    assert lower - upper == 20 and (right - left) == round(20 * 4 / 3)  # the fallback


# --- Augmentation ----------------------------------------------------------------------------------------------------


OFF = dict(
    flip_probability=0,
    color_jitter_probability=0,
    greyscale_probability=0,
    blur_probability=0,
    solarize_probability=0,
)


def test_augmentation_normalises_and_leaves_its_input_alone():
    views = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    before = views.clone()
    augment = Augmentation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), **OFF)
    expected = (views / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    torch.testing.assert_close(augment(views), expected)
    assert torch.equal(views, before)


@pytest.mark.parametrize("step", list(OFF))
def test_each_step_changes_each_view_by_itself(step):
    torch.manual_seed(0)
    views = torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8).expand(64, 2, -1, -1, -1)
    plain = Augmentation(**OFF)(views)
    augmented = Augmentation(**{**OFF, step: 0.5}, blur_kernel_size=3)(views)
    changed = (augmented != plain).flatten(2).any(-1)
    assert 0.35 < changed.float().mean() < 0.65  # probability 0.5 on 128 views
    assert (changed[:, 0] != changed[:, 1]).any()
    torch.manual_seed(0)
    first = Augmentation()(views)
    torch.manual_seed(0)
    assert torch.equal(first, Augmentation()(views)) and first.dtype == torch.float32


def test_augmentation_makes_no_device_wait():
    """On the meta device there are no values that the host could ask for."""
    views = torch.zeros(4, 2, 3, 16, 16, dtype=torch.uint8, device="meta")
    augment = Augmentation(solarize_probability=0.5, blur_kernel_size=5).to("meta")
    assert augment(views).shape == views.shape


def test_colour_steps_are_left_out_with_a_message_where_there_is_no_colour(caplog):
    views = torch.randint(0, 256, (4, 2, 1, 16, 16), dtype=torch.uint8)
    augment = Augmentation(mean=(0.5,), std=(0.2,), flip_probability=0, blur_probability=0)
    torch.testing.assert_close(augment(views), (views / 255 - 0.5) / 0.2)
    assert "they need 3 channels, these images have 1" in caplog.text


def test_solarisation_inverts_what_is_bright():
    views = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    augment = Augmentation(mean=(0,) * 3, std=(1,) * 3, **{**OFF, "solarize_probability": 1.0})
    torch.testing.assert_close(augment(views), torch.where(views > 127, 255 - views, views) / 255)


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.normal((50, 100, 150), (10, 20, 30), (40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    make = RandomCrops((40, 40), scale=(1, 1), ratio=(1, 1))
    mean, std = mean_and_std(ViewStream(ImageSource(data_dir=str(tmp_path)), make))
    np.testing.assert_allclose(np.array(mean) * 255, (49.5, 99.5, 149.5), atol=0.7)
    np.testing.assert_allclose(np.array(std) * 255, (10, 20, 30), atol=0.7)
    (tmp_path / "flat").mkdir()
    pixels[:, :, 2] = 0
    Image.fromarray(pixels).save(tmp_path / "flat" / "no blue.png")
    with pytest.raises(ValueError, match="channel 2 is the same everywhere"):
        mean_and_std(ViewStream(ImageSource(data_dir=str(tmp_path / "flat")), make))
