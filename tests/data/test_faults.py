"""Sources with a fault: one sentence with the true cause and the fix, or the images without what is damaged beside."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from testing_utils import ROOT, add_to_tar, encoded_image, identity, read

from modeling_can.data import ImageSource, ViewStream
from modeling_can.data.crops import RandomCrops
from modeling_can.evaluation.sets import load_labeled, load_split


IMAGES = [encoded_image(color=(i * 20, 200, 100)) for i in range(8)]
IMAGE_FEATURES = Features({"image": ImageFeature()})


def everything(count: int = 8) -> list[int]:
    return sorted(map(zlib.crc32, IMAGES[:count]))


def write_tar(path: Path, extension: str = "", good: bytes = b"", bad: bytes = b"", where: int = 0) -> str:
    """Eight images, each with a member of that extension, which is `bad` for one of them."""
    with tarfile.open(path, "w") as archive:
        for i, encoded in enumerate(IMAGES):
            add_to_tar(archive, f"{i:03}.jpg", encoded)
            if extension:
                add_to_tar(archive, f"{i:03}.{extension}", bad if i == where else good)
    return str(path)


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


MEMBERS = {  # extension -> what is right and what is wrong
    "json": (b'{"a": 1}', b'{"a":'),
    "txt": (b"text", b"\xff\xfe\x00"),
    "cls": (b"3", b"three"),
    "npy": (array(), b"garbage"),
    "pth": (b"", b"x"),
    "cbor": (b"\x01", b"x"),  # for which datasets needs a package
    "json.gz": (gzip.compress(b"{}"), b"garbage"),
}


# --- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 6])  # among those by which datasets finds out the types, and behind them
@pytest.mark.parametrize("extension", MEMBERS)
def test_a_damaged_member_that_is_not_used_costs_no_image(tmp_path, extension, where):
    source = ImageSource(data_files=write_tar(tmp_path / "a.tar", extension, *MEMBERS[extension], where))
    assert sorted(read(ViewStream(source, identity), 8)) == everything()
    assert len(read(ViewStream(source, identity), 8, num_workers=2)) == 8


def test_members_of_other_types_cost_no_image(tmp_path):
    path = write_tar(tmp_path / "a.tar", "json", b'{"a": 1}', b'{"a": "one"}')
    assert sorted(read(ViewStream(ImageSource(data_files=path), identity), 8)) == everything()


def test_members_that_are_used_are_decoded_and_a_damaged_one_is_named(tmp_path):
    path = write_tar(tmp_path / "good.tar", "cls", b"3", b"5")
    source = ImageSource(data_files=path, extra_columns=("cls",))
    ((block, _),) = source.blocks(source.dataset)
    assert block["cls"] == [5, *[3] * 7] and source.features["cls"] == Value("int64")
    for where in (0, 6):
        path = write_tar(tmp_path / "bad.tar", "cls", b"3", b"three", where)
        with pytest.raises(ValueError, match=rf"bad.tar: its member 00{where}.cls cannot be decoded \(ValueError: "):
            source = ImageSource(data_files=path, extra_columns=("cls",))
            list(source.blocks(source.dataset))


@pytest.mark.parametrize("extension", ["json", "npy", "pth"])
def test_a_set_that_is_downloaded_first_names_a_damaged_member(tmp_path, extension):
    path = write_tar(tmp_path / "train.tar", extension, *MEMBERS[extension], 6)
    message = rf"train.tar: its member 00\d.{extension} cannot be decoded .*fix or remove it"
    with pytest.raises(ValueError, match=message):
        ImageSource(data_files=path, streaming=False)
    with pytest.raises(ValueError, match=message):
        load_split(str(tmp_path), image_column="jpg", label_column=extension)


# --- Columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ([[{"bytes": IMAGES[0], "path": None}] * 2], r"of type List\(Image.*make one row of each image"),
        ([3], r"image_column=image of .*rows.parquet is of type Value\('int64'\).*set image_column to"),
        ([[1, 2]], r"of type List\(Value\('int64'\)\)"),
        ([["a.jpg", "b.jpg"]], r"of type List\(Value\('string'\)\)"),
        ([{"url": "x"}], r"of type \{'url': Value\('string'\)\}"),
    ],
)
def test_a_column_that_is_no_image_is_refused_with_its_type(tmp_path, values, message):
    several = Features({"image": datasets.List(ImageFeature()), "label": Value("int64")})
    features = several if "Image" in message else None
    rows = Dataset.from_dict({"image": values * 4, "label": [0, 1, 0, 1]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        ImageSource(data_files=f"{tmp_path}/rows.parquet")
    with pytest.raises(ValueError, match=message.replace("rows.parquet", "train")):
        load_split(str(tmp_path))


def test_the_column_that_holds_images_is_named(tmp_path):
    rows = {"image": [3], "photo": [{"bytes": IMAGES[0], "path": None}]}
    Dataset.from_dict(rows, features=Features({"image": Value("int64"), "photo": ImageFeature()})).to_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(ValueError, match=r"set image_column to one of \['photo'\]"):
        ImageSource(data_files=f"{tmp_path}/rows.parquet")


def test_bytes_paths_and_pixels_are_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    for value in (IMAGES[0], f"{tmp_path}/a.jpg", {"bytes": IMAGES[0]}, np.zeros((8, 8), np.uint8).tolist()):
        Dataset.from_dict({"image": [value] * 2}).to_parquet(tmp_path / "rows.parquet")
        source = ImageSource(data_files=f"{tmp_path}/rows.parquet")
        assert len(read(ViewStream(source, identity), 2)) == 2


# --- Empty files -----------------------------------------------------------------------------------------------------


def write_images(path: Path, count: int):
    rows = {"image": [{"bytes": encoded, "path": None} for encoded in IMAGES[:count]]}
    Dataset.from_dict(rows, features=IMAGE_FEATURES).to_parquet(path)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_file_without_rows_does_no_harm_and_one_of_0_bytes_is_named(tmp_path, streaming):
    write_images(tmp_path / "a.parquet", 0)
    with pytest.raises(ValueError, match="has no rows"):
        ImageSource(data_files=f"{tmp_path}/*.parquet", streaming=streaming)
    write_images(tmp_path / "b.parquet", 8)
    source = ImageSource(data_files=f"{tmp_path}/*.parquet", streaming=streaming)
    assert sorted(read(ViewStream(source, identity), 8)) == everything()
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="c.parquet has 0 bytes; copy it once more, or remove it"):
        ImageSource(data_files=f"{tmp_path}/*.parquet", streaming=streaming)
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="c.parquet cannot be read: .*copy it once more, or remove it"):
        ImageSource(data_files=f"{tmp_path}/*.parquet", streaming=streaming)


def test_an_empty_tar_does_no_harm_and_one_of_0_bytes_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(ValueError, match="has no rows"):
        ImageSource(data_files=f"{tmp_path}/*.tar")
    write_tar(tmp_path / "b.tar")
    source = ImageSource(data_files=f"{tmp_path}/*.tar")
    assert sorted(read(ViewStream(source, identity), 8)) == everything()
    with pytest.raises(ValueError, match="a.tar is an empty tar, which needs --streaming true"):
        ImageSource(data_files=f"{tmp_path}/*.tar", streaming=False)
    (tmp_path / "c.tar").write_bytes(b"")
    for streaming in (True, False):
        with pytest.raises(ValueError, match="c.tar has 0 bytes"):
            ImageSource(data_files=f"{tmp_path}/*.tar", streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
def test_an_empty_jsonl_does_no_harm(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        ImageSource(data_files=f"{tmp_path}/*.jsonl", streaming=streaming)
    (tmp_path / "1.jpg").write_bytes(IMAGES[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"image": "1.jpg"}) + "\n")
    source = ImageSource(data_files=f"{tmp_path}/*.jsonl", streaming=streaming)
    assert read(ViewStream(source, identity), 1) == everything(1)


# --- Class folders ---------------------------------------------------------------------------------------------------


def write_folder(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGES[0])
    return str(folder)


CLASSES = ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg")


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_with_the_name_of_a_split_is_refused(tmp_path, name):
    folder = write_folder(tmp_path, *CLASSES, f"{name}/0.jpg")
    message = f"takes the folder {name} for a split and reads nothing of others, such as .*--data_dir {folder}"
    for streaming in (True, False):
        with pytest.raises(ValueError, match=message):
            ImageSource(dataset_name=folder, streaming=streaming)
    with pytest.raises(ValueError, match=message):
        load_labeled(folder)
    assert ImageSource(data_dir=folder).num_images() == 5


def test_a_class_with_the_name_of_the_other_split_is_refused(tmp_path):
    """datasets would test on train/test/0.jpg."""
    names = [f"{split}/{name}/0.jpg" for split in ("train", "test") for name in ("cat", "test")]
    folder = write_folder(tmp_path, *names)
    with pytest.raises(ValueError, match=r"takes train/test/0.jpg for an image of the splits test and train"):
        load_labeled(folder)


@pytest.mark.parametrize("other", ["stray.jpg", "bird/wild/0.jpg"])
def test_a_test_with_labels_names_the_image_at_another_depth(tmp_path, other):
    folder = write_folder(tmp_path, *CLASSES, other)
    with pytest.raises(ValueError, match=f"no column 'label'; class folders .*move or remove {other}"):
        load_split(folder)
    assert len(read(ViewStream(ImageSource(dataset_name=folder), identity), 5)) == 5  # labels play no part


def test_class_folders_in_splits_are_read(tmp_path):
    folder = write_folder(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in CLASSES))
    assert len(load_labeled(folder).test) == 4
    assert len(read(ViewStream(ImageSource(dataset_name=folder), identity), 4)) == 4


# --- Relative paths --------------------------------------------------------------------------------------------------


def write_paths(folder: Path, kind: str):
    paths = [f"images/{i}.jpg" for i in range(8)]
    if kind == "jsonl":
        lines = [json.dumps({"image": path, "label": i % 2}) for i, path in enumerate(paths)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    elif kind == "strings":
        Dataset.from_dict({"image": paths}).to_parquet(folder / "train.parquet")
    else:
        rows = [{"image": {"bytes": None, "path": path}} for path in paths]
        table = pyarrow.Table.from_pylist(rows, schema=IMAGE_FEATURES.arrow_schema)
        pyarrow.parquet.write_table(table, folder / "train.parquet")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "strings", "images"])
def test_relative_paths_begin_at_the_table_or_else_at_the_working_directory(tmp_path, monkeypatch, kind, streaming):
    for place in ("table", "here"):
        (tmp_path / place / "images").mkdir(parents=True)
    write_paths(tmp_path / "table", kind)
    monkeypatch.chdir(tmp_path / "here")
    source = ImageSource(data_files=f"../table/train.{kind if kind == 'jsonl' else 'parquet'}", streaming=streaming)
    with pytest.raises(ValueError, match=f"images/.*jpg is neither in {tmp_path}/table, where .* nor in .*/here"):
        read(ViewStream(source, RandomCrops((16, 16))), 1)
    for i, encoded in enumerate(IMAGES):
        (tmp_path / ("table" if i < 4 else "here") / "images" / f"{i}.jpg").write_bytes(encoded)
    assert sorted(read(ViewStream(source, identity), 8)) == everything()


def test_relative_paths_in_a_labeled_set_begin_at_its_folder(tmp_path):
    (tmp_path / "images").mkdir()
    write_paths(tmp_path, "jsonl")
    for i, encoded in enumerate(IMAGES):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(encoded)
    split, _ = load_split(str(tmp_path))
    assert [split.read(i) for i in range(8)] == IMAGES and split.select(np.array([3])).read(0) == IMAGES[3]


# --- Caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_DATASETS_CACHE"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, variable):
    write_images(tmp_path / "train.parquet", 8)
    script = (
        "from modeling_can.data import ImageSource\nfrom modeling_can.evaluation.sets import load_split\n"
        f"for attempt in (lambda: ImageSource(data_files={str(tmp_path / 'train.parquet')!r}),\n"
        f"                lambda: ImageSource(data_files={str(tmp_path / 'train.parquet')!r}, streaming=False),\n"
        f"                lambda: load_split({str(tmp_path)!r})):\n"
        "    try:\n        attempt()\n    except ValueError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), variable: "/dev/null/x"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(
        "the cache folder /dev/null/x" in line and "cannot be written (Not a directory" in line for line in lines
    )
    assert all("set HF_HOME, or HF_DATASETS_CACHE alone, to a folder that can" in line for line in lines)
