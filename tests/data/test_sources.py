"""Sources of images: folders, parquet, tar shards, data sets built in Python; what is refused."""

import json
import os
import shutil
import tarfile
import zlib

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from testing_utils import add_to_tar, encoded_image, identity, read

from modeling_can.data import ImageSource, ViewStream
from modeling_can.data import sources as sources_of_images
from modeling_can.data.decoding import decode


# --- Sources ---------------------------------------------------------------------------------------------------------


def test_any_folder_of_images_is_a_source(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "flat.png").write_bytes(encoded_image(format="PNG"))
    (tmp_path / "a" / "b" / "deep.JPG").write_bytes(encoded_image(color=(1, 2, 3)))
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
    images = [
        encoded_image(
            color=(i * 10, 200, 100),
        )
        for i in range(12)
    ]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for i in range(shard * 6, shard * 6 + 6):
                add_to_tar(archive, f"{i:03}.jpg", images[i])
    source = ImageSource(data_files=f"{tmp_path}/*.tar")  # whose column is called jpg
    everything = sorted(map(zlib.crc32, images))
    assert source.num_images() is None and sorted(read(ViewStream(source, identity), 12)) == everything

    features = Features({"photo": ImageFeature()})
    rows = Dataset.from_dict({"photo": [{"bytes": p, "path": None} for p in images]}, features=features)
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
        "map to images": stream().map(lambda row: {"image": row["image"].crop((0, 0, *row["image"].size))}),
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


def test_a_damaged_image_in_a_decoded_stream_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_of_images.time, "sleep", lambda seconds: pytest.fail("waits"))
    features = Features({"image": ImageFeature()})
    rows = {"image": [{"bytes": encoded_image(), "path": None}, {"bytes": b"no image", "path": None}]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    stream = load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", streaming=True)
    with pytest.raises(OSError, match="cannot identify image file"):
        read(ViewStream(ImageSource(dataset=stream.filter(lambda row: row["image"].width > 0)), identity), 2)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_skipped_and_taken_rows_are_the_same_for_any_number_of_workers(shards, num_workers):
    stream = load_dataset("parquet", data_files=f"{shards[0]}/*.parquet", split="train", streaming=True)
    in_order = [zlib.crc32(row["image"]["bytes"]) for row in stream.decode(False)]
    both = {"skip": (stream.skip(8), in_order[8:]), "take": (stream.take(16), in_order[:16])}
    for name, (part, expected) in both.items():
        source = ImageSource(dataset=part)
        shares = [
            read(ViewStream(source, identity, 0, rank, num_workers), 2 * 16 // num_workers)
            for rank in range(num_workers)
        ]
        assert {x for share in shares for x in share} <= set(expected), name
        if 16 % num_workers == 0:
            assert sorted(x for share in shares for x in share) == sorted(2 * expected), name
    with pytest.raises(ValueError, match=r"joins parts that were made by \.skip\(\) or \.take\(\)"):
        ImageSource(dataset=concatenate_datasets([stream.take(8), stream.skip(16)]))


def test_rows_with_several_images_are_refused():
    features = Features({"mask": ImageFeature(), "photo": ImageFeature()})
    rows = [{"bytes": encoded_image(), "path": None}] * 2
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
        encoded_image(format="PNG")
    )  # as macOS names them
    assert ImageSource(data_dir=str(tmp_path / "shots")).num_images() == 1
    (tmp_path / "shots" / os.fsdecode(b"\xff.png")).write_bytes(encoded_image(format="PNG"))
    with pytest.raises(ValueError, match="not UTF-8"):
        ImageSource(data_dir=str(tmp_path / "shots"))


def test_a_list_of_paths_is_a_source_that_tells_its_length(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(encoded_image(color=(number * 40, 1, 2)))
    lines = [json.dumps({"image": f"images/{number}.jpg"}) for number in range(5)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n\n")
    source = ImageSource(data_files=str(tmp_path / "list.jsonl"))
    assert source.num_images() == 5 == len(set(read(ViewStream(source, identity), 5)))
    (tmp_path / "list.jsonl").write_text(f"[{', '.join(lines)}]")
    source = ImageSource(data_files=str(tmp_path / "list.jsonl"))
    assert source.num_images() is None and len(set(read(ViewStream(source, identity), 5))) == 5


@pytest.mark.parametrize("name", ["images.zip", "images.txt", "images.tar"])
def test_a_file_in_the_place_of_a_folder_is_answered_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    for setting in ("data_dir", "dataset_name"):
        with pytest.raises(ValueError, match=f"{setting}=.*{name} is a file and not a folder; unpack .*--data_files"):
            ImageSource(**{setting: str(tmp_path / name)})
    if name != "images.tar":
        with pytest.raises(ValueError, match=r"ends in .* as \.jsonl, with a line .*unpack archives"):
            ImageSource(data_files=str(tmp_path / name))


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
