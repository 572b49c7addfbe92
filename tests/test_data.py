"""Sources, order, views and augmentation, on real image files."""

import io
import itertools
import math
import zipfile
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from modeling_can.augmentations import Augmentation
from modeling_can.data import ImageSource, ViewStream
from modeling_can.views import TwoViews, decode, random_box


def picture(size=(40, 30), color=(200, 30, 90), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


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


def test_what_is_no_source_is_refused(tmp_path, shards):
    with pytest.raises(ValueError, match="exactly one of dataset_name, data_dir and data_files"):
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
    with pytest.raises(ValueError, match="ends in '.zip'"):
        ImageSource(data_files="images.zip")
    with pytest.raises(ValueError, match=r"no column 'img'; set image_column to one of \['image', 'label'\]"):
        ImageSource(dataset_name=str(shards[0]), image_column="img")


# --- Bad images ------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_skipped_counted_and_named(tmp_path, caplog):
    good = picture()
    for name, content in {"a.jpg": good, "b.jpg": good[:100], "c.jpg": b"", "d.png": b"text"}.items():
        (tmp_path / name).write_bytes(content)
    stream = ViewStream(ImageSource(data_dir=str(tmp_path)), TwoViews((16, 16)))
    rows = list(itertools.islice(iter(stream), 4))
    assert all(row["views"].shape == (2, 3, 16, 16) for row in rows)
    # Three of four are bad in each pass; those after the last good one belong to the next.
    assert 9 <= sum(row["num_skipped"] for row in rows) <= 12
    assert all(name in caplog.text for name in ("b.jpg", "c.jpg", "d.png"))


def test_null_rows_and_pictures_in_archives(tmp_path, caplog):
    features = Features({"image": ImageFeature()})
    rows = {"image": [{"bytes": picture(), "path": None}, None]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    stream = iter(ViewStream(ImageSource(data_files=str(tmp_path / "rows.parquet")), TwoViews((16, 16))))
    assert sum(row["num_skipped"] for row in itertools.islice(stream, 3)) >= 2
    assert "the row holds no image" in caplog.text
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "folder" / "train.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.jpg", picture(color=(80 * i, 2, 3)))
    source = ImageSource(dataset_name=str(tmp_path / "folder"))
    assert len(set(read(ViewStream(source, identity), 3))) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_without_a_readable_image_is_refused(tmp_path, num_workers):
    (tmp_path / "a.jpg").write_bytes(b"text")
    stream = ViewStream(ImageSource(data_dir=str(tmp_path)), TwoViews((16, 16)))
    with pytest.raises(ValueError, match=r"no readable image .*\(1 unreadable\)"):
        read(stream, 1, num_workers)


# --- Views -----------------------------------------------------------------------------------------------------------


def test_decoding_gives_upright_8_bit_pictures_in_the_wanted_channels():
    assert decode(picture(mode="L", color=7)).getpixel((0, 0)) == (7, 7, 7)
    assert decode(picture(mode="RGBA", color=(9, 8, 7, 255), format="PNG")).getpixel((0, 0)) == (9, 8, 7)
    assert decode(picture(mode="CMYK", color=(0, 255, 255, 0), quality=95)).getpixel((0, 0))[0] > 200  # red
    assert decode(picture(), num_channels=1).mode == "L"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert decode(picture(size=(40, 30), exif=exif)).size == (30, 40)
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(picture(mode="I;16", color=300, format="PNG"))


def test_views_are_crops_of_the_picture_that_depend_on_seed_epoch_and_picture_alone():
    ramp = np.stack([np.tile(np.arange(64, dtype=np.uint8), (48, 1))] * 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    encoded = buffer.getvalue()
    make = TwoViews((16, 24), scale=(0.2, 0.4), seed=3)
    views = make(encoded, epoch=1)
    assert views.shape == (2, 3, 16, 24) and views.dtype == np.uint8
    assert np.array_equal(views, make(encoded, epoch=1))
    assert not np.array_equal(views, make(encoded, epoch=2)) and not np.array_equal(views[0], views[1])
    spread = int(views[0, 0, 8, -1]) - int(views[0, 0, 8, 0])  # the crop is narrower than the picture
    assert 10 < spread < 50


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


OFF = dict(flip_probability=0, color_jitter_probability=0, greyscale_probability=0, blur_probability=0)


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


def test_colour_steps_on_one_channel_are_refused():
    with pytest.raises(ValueError, match="3 channels, got 1; set color_jitter_probability=0"):
        Augmentation(mean=(0.5,), std=(0.2,))
