"""Labeled sets: splits, labels, held-out parts, errors."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, List, Value
from testing_utils import encoded, write_split
from transformers import ViTImageProcessorPil

from modeling_can.data import ImageSource
from modeling_can.evaluation.preprocessors import Preprocessor
from modeling_can.evaluation.probe import Probe
from modeling_can.evaluation.sets import load_labeled


def test_the_trainers_probe_asks_20_neighbors(tmp_path):
    names = ClassLabel(names=["red", "green"])
    write_split(
        tmp_path, "train", {"image": [encoded([v] * 3) for v in (100, *[101] * 25)], "label": [0] + [1] * 25}, names
    )
    write_split(tmp_path, "test", {"image": [encoded([100] * 3)], "label": [1]}, names)
    preprocessor = Preprocessor(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    probe = Probe(str(tmp_path), None, "train", "test", "image", "label", preprocessor)
    embed = lambda pixels: torch.stack([torch.ones(len(pixels)), pixels.mean((1, 2, 3))], 1)  # noqa: E731
    assert probe.measure(embed, linear=False)["knn"] == 1  # the nearest one alone is of the other class


def rows(labels) -> dict:
    return {"image": [encoded((i, i, i)) for i in range(len(labels))], "label": labels}


def test_parquet_shards_and_class_folders_are_read_alike(tmp_path):
    (tmp_path / "shards").mkdir()
    for split, labels in (("train", [0, 1, 1, 0]), ("test", [1, 0])):
        write_split(tmp_path / "shards", split, rows(labels), ClassLabel(names=["green", "red"]))
        for index, label in enumerate(labels):
            path = tmp_path / "folders" / split / ["green", "red"][label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded((index, index, index)))
    shards, folders = (load_labeled(str(tmp_path / kind)) for kind in ("shards", "folders"))
    assert shards.class_names == folders.class_names == ["green", "red"]
    for ours, theirs in zip(shards[:2], folders[:2], strict=True):
        pairs = [{(split.read(i), int(split.labels[i])) for i in range(len(split))} for split in (ours, theirs)]
        assert pairs[0] == pairs[1] and len(pairs[0]) == len(ours)


def test_the_trainers_probe_takes_splits_by_name(tmp_path):
    write_split(tmp_path, "train", rows([0, 1, 0, 1]))
    write_split(tmp_path, "validation", rows([1, 0]))
    preprocessor = Preprocessor(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    probe = Probe(str(tmp_path), None, "train", "validation", "image", "label", preprocessor)
    assert (len(probe.set.train), len(probe.set.test)) == (4, 2)
    with pytest.raises(ValueError, match='Unknown split "test".* all these names begin with probe_'):
        Probe(str(tmp_path), None, "train", "test", "image", "label", preprocessor)


@pytest.mark.parametrize("config_name", [None, "three"])
def test_a_set_with_configurations_names_them_and_the_flag(tmp_path, config_name):
    configs = ""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_split(tmp_path / name, "train", rows([0, 1]))
        configs += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    told = r"^\S+ has the configurations 'one', 'two'; set dataset_config_name( \(.*, probe_dataset_config_name\))? to"
    with pytest.raises(ValueError, match=told):
        load_labeled(str(tmp_path), config_name)
    with pytest.raises(ValueError, match=told):
        ImageSource(str(tmp_path), config_name=config_name)


def test_labels_of_any_type_become_class_indices(tmp_path):
    write_split(tmp_path, "train", rows(["cat", "dog", "ant", "dog"]), Value("string"))
    write_split(tmp_path, "test", rows(["dog", "ant"]), Value("string"))  # fewer classes, other indices of its own
    data = load_labeled(str(tmp_path))
    assert data.class_names == ["ant", "cat", "dog"]
    assert data.train.labels.tolist() == [1, 2, 0, 2] and data.test.labels.tolist() == [2, 0]


def test_a_share_is_held_out_where_there_is_no_test_split(tmp_path):
    write_split(tmp_path, "train", rows([0] * 10 + [1] * 20))
    data = load_labeled(str(tmp_path), test_size=0.2)
    assert np.bincount(data.test.labels).tolist() == [2, 4] and np.bincount(data.train.labels).tolist() == [8, 16]
    images = [{split.read(i) for i in range(len(split))} for split in data[:2]]
    assert not images[0] & images[1] and len(images[0] | images[1]) == 30
    sliced = load_labeled(str(tmp_path), train_split="train[:15]", test_split="train[15:]")
    assert (len(sliced.train), len(sliced.test)) == (15, 15)


@pytest.mark.parametrize("splits, test_size", [(["train"], 0.2), (["train", "test"], 0), (["train", "validation"], 0)])
def test_class_folders_without_splits_are_tested_on_a_fifth(tmp_path, splits, test_size):
    for split in splits:
        for index, label in enumerate([0] * 10 + [1] * 20):
            path = tmp_path / (split if splits[1:] else "") / ["cat", "dog"][label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded((index, index, index)))
    if "validation" in splits:  # which may be for something else
        with pytest.raises(
            ValueError,
            match="Name others with --train_split and --test_split .*--probe_train_split and --probe_test_split",
        ):
            load_labeled(str(tmp_path), test_size=None)
        return
    data, again = (load_labeled(str(tmp_path), test_size=None) for _ in range(2))
    assert data.test_size == test_size and len(data.test) == (6 if test_size else 30)
    assert [data.test.read(i) for i in range(len(data.test))] == [again.test.read(i) for i in range(len(again.test))]
    if test_size:
        assert np.bincount(data.test.labels).tolist() == [2, 4]


ERRORS = {
    "no split": (
        dict(test=None),
        {},
        "--train_split and --test_split .*--test_size 0.2 of modeling-can eval holds out",
    ),
    "no label column": ({}, dict(label_column="klass"), "no column 'klass'; set label_column to one of label"),
    "no image column": ({}, dict(image_column="photo"), "no column 'photo'; set image_column to one of image, label"),
    "unseen": (dict(train=[0, 0, 1, 1], test=[0, 2]), {}, "1 labels of .*test have no image in .*train: blue"),
    "a single class": (dict(train=[1, 1]), {}, "has a single class, 'green'; a test needs two or more"),
    "unlabeled": (dict(test=[0, None]), {}, "1 rows have no label, the first is row 1"),
    "empty": (dict(test=[]), {}, "has no rows"),
}


@pytest.mark.parametrize("changes, arguments, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_what_is_wrong_and_what_helps(tmp_path, changes, arguments, message):
    for split, labels in {"train": [0, 1, 0, 1], "test": [1, 0], **changes}.items():
        if labels is not None:
            write_split(tmp_path, split, rows(labels), ClassLabel(names=["red", "green", "blue"]))
    with pytest.raises(ValueError, match=message):
        load_labeled(str(tmp_path), **arguments)


def test_several_labels_an_image_and_sets_that_are_not_there_are_refused(tmp_path):
    write_split(tmp_path, "train", rows([[0, 1], [1, 2]]), List(Value("int64")))
    with pytest.raises(ValueError, match="'label' must hold one class for each image"):
        load_labeled(str(tmp_path))
    write_split(tmp_path, "train", rows([[0], [1, 2]]), List(Value("int64")))
    with pytest.raises(ValueError, match="'label' must hold one class for each image"):
        load_labeled(str(tmp_path))
    with pytest.raises(ValueError, match="dataset_name=nobody/nothing cannot be loaded: .*class folders"):
        load_labeled("nobody/nothing")
    write_split(tmp_path, "train", rows([0, 1]))
    with pytest.raises(ValueError, match="image_column='label' holds .* and no images; set it to one of image, label"):
        load_labeled(str(tmp_path), image_column="label")
    (tmp_path / "train-00000.parquet").write_bytes((tmp_path / "train-00000.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match="(cannot be read|cannot be loaded): "):
        load_labeled(str(tmp_path))
