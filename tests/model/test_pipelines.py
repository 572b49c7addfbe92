"""Configurations and transformers' pipelines."""

import copy

import numpy as np
import pytest
import torch
from each_model import CLOSE, build
from PIL import Image
from testing_utils import tiny_config
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil, pipeline

from modeling_can import CANConfig, CANForImageClassification, CANModel


def test_labels_and_fields_of_ones_own_survive(tmp_path):
    names = {0: "cat", 1: "dog", 2: "bird"}
    config = tiny_config(id2label=names, label2id={name: i for i, name in names.items()}, made_by="me")
    CANForImageClassification(config).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label == names and model.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert model.num_labels == model.config.num_labels == model.classifier.out_features == 3
    assert model.config.made_by == "me"
    wider = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
    assert wider.classifier.out_features == 4


def test_a_configuration_is_made_by_its_type_and_compares_by_value():
    config = AutoConfig.for_model("can", **{"hidden_size": 32, "num_attention_heads": 2})
    assert type(config) is CANConfig and config.hidden_size == 32
    assert config == CANConfig(hidden_size=32, num_attention_heads=2) != CANConfig()
    assert config == copy.deepcopy(config)
    assert CANConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)) for _ in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("task", ["image-feature-extraction", "image-classification"])
def test_pipelines_take_a_folder(task, tmp_path, images):
    model = build(CANModel if task == "image-feature-extraction" else CANForImageClassification)
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 48})
    processor.save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    expected = model(**processor(images, return_tensors="pt"))
    if task == "image-feature-extraction":
        for features, state in zip(pipe(images), expected.last_hidden_state, strict=True):
            torch.testing.assert_close(torch.tensor(features)[0], state, **CLOSE)
        pooled = pipe(images, pool=True)
        torch.testing.assert_close(torch.tensor(pooled)[:, 0], expected.pooler_output, **CLOSE)
    else:
        for answers, logits in zip(pipe(images, top_k=5), expected.logits, strict=True):
            scores = {answer["label"]: answer["score"] for answer in answers}
            probabilities = logits.softmax(-1)
            assert scores == pytest.approx({f"LABEL_{i}": probabilities[i].item() for i in range(5)}, abs=1e-5)
