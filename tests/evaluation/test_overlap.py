"""Test images that pre-training saw."""

import json
import shutil
from pathlib import Path

import pytest
from testing_utils import options

from modeling_can.evaluation import report
from modeling_can.evaluation.overlap import seen_in_pretraining
from modeling_can.evaluation.settings import parse


@pytest.mark.parametrize("source, flags, is_seen", [
    ({"data_dir": "SET"}, {}, True),
    ({"data_dir": "SET/train"}, {}, False),
    ({"data_dir": "SET/train"}, {"test_size": 0.3}, True),
    ({"data_dir": "SET/../elsewhere"}, {}, False),
    ({"dataset_name": "SET", "dataset_split": "train"}, {}, False),
    ({"dataset_name": "SET", "dataset_split": "train"}, {"test_size": 0.3}, True),
    ({"dataset_name": "SET", "dataset_split": "test"}, {}, True),
    ({"dataset_name": "SET", "dataset_split": "train+test"}, {}, True),
    ({"dataset_name": "SET", "dataset_split": "unlabeled"}, {}, None),
    ({"dataset_name": "SET", "dataset_split": "train"}, {"test_split": "train[80%:]"}, True),
    ({"dataset_name": "SET", "dataset_split": "train[:80%]"}, {"test_split": "train[80%:]"}, False),
    ({"dataset_name": "SET", "dataset_split": "train[:74]"}, {"test_split": "train[80%:]"}, True),  # of 90
    ({"dataset_name": "SET", "dataset_split": "test", "dataset_config_name": "other"}, {}, True),
    ({"dataset_name": "SET", "dataset_split": "test", "dataset_config_name": "other"},
     {"dataset_config_name": "default"}, False),
    ({"data_dir": "SET/test/cats"}, {}, True),
    ({"data_dir": "SET/data/test"}, {}, True),
    ({"dataset_name": "SET/test"}, {}, True),
    ({"data_dir": "SET/test"}, {"test_size": 0.3}, False),
    ({"data_dir": "SET/test"}, {"test_split": "train[:20%]+test"}, True),
    ({"data_dir": "SET/cats"}, {}, None),
    ({"data_dir": "SET/val"}, {}, None),  # which may be another name of a split
    ({"data_files": "SET/*.parquet"}, {}, None),
    ({"data_files": "elsewhere/*.parquet"}, {}, False),
])  # fmt: skip
def test_test_images_that_pretraining_saw_are_mentioned(models, colors, tmp_path, source, flags, is_seen):
    path = shutil.copytree(models["can"], tmp_path / "can")
    colors = str(shutil.copytree(colors, tmp_path / "colors"))
    recipe = {key: value.replace("SET", colors) for key, value in source.items()}
    if "data_dir" in recipe or "dataset_name" in recipe:
        Path(recipe.get("data_dir") or recipe["dataset_name"]).mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
    settings = parse(options({"can": str(path)}, colors, tmp_path, "can", **flags))[0]
    assert seen_in_pretraining(str(path), settings) is is_seen


def test_remarks_say_what_was_seen():
    results = {
        "models": {
            "mine": {"test_images_seen_without_labels": True},
            "other": {"test_images_seen_without_labels": False},
            "third": {"test_images_seen_without_labels": None},
        },
    }
    seen, open_question = report.remarks(results)
    assert seen == "mine was pre-trained on test images too, without their labels"
    assert open_question == "third was pre-trained on a part of this set; whether on test images, is not known"
