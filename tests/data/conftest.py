import tarfile
import zlib

import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from testing_utils import add_to_tar, encoded_image


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four parquet shards of six distinct images, and the images."""
    folder = tmp_path_factory.mktemp("shards")
    images = [encoded_image(color=(i * 10, 255 - i * 10, 100)) for i in range(24)]
    for i in range(4):
        rows = {"image": [{"bytes": p, "path": None} for p in images[i * 6 : i * 6 + 6]], "label": [i] * 6}
        features = Features({"image": ImageFeature(), "label": Dataset.from_dict({"label": [0]}).features["label"]})
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{i}.parquet")
    return folder, sorted(zlib.crc32(p) for p in images)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 120 images in five parquet shards (of two row groups), five tar shards and a folder."""
    folder = tmp_path_factory.mktemp("sources")
    images = [encoded_image(color=(i, 255 - i, i // 2), format="PNG") for i in range(120)]
    (folder / "images").mkdir()
    for i, encoded in enumerate(images):
        (folder / "images" / f"{i}.png").write_bytes(encoded)
    for shard in range(5):
        part = range(shard * 24, shard * 24 + 24)
        rows = Dataset.from_dict(
            {"image": [{"bytes": images[i], "path": None} for i in part]},
            features=Features({"image": ImageFeature()}),
        )
        rows.to_parquet(folder / f"{shard}.parquet", batch_size=12)
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for i in part:
                add_to_tar(archive, f"{i:03}.png", images[i])
    return {
        "parquet": {"data_files": f"{folder}/*.parquet"},
        "one parquet shard": {"data_files": f"{folder}/0.parquet"},
        "tar": {"data_files": f"{folder}/*.tar"},
        "folder": {"data_dir": f"{folder}/images"},
        "crcs": sorted(map(zlib.crc32, images)),
    }
