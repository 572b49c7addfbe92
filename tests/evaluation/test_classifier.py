"""A probe or a fine-tuned encoder becomes a classifier that transformers loads."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from testing_utils import NAMES, encoded, options, save, tiny_config
from transformers import ViTImageProcessorPil, pipeline

import run_eval
from modeling_can import CANForPreTraining
from modeling_can.evaluation.encoders import pooled
from modeling_can.evaluation.export import on_class_token_and_mean
from modeling_can.evaluation.linear import LinearClassifier


def exported(models, colors, out, name, **flags) -> tuple[dict, Path]:
    settings = {"export_classifier": out / "made", "baselines": "none", **flags}
    return run_eval.main(options(models, colors, out, name, **settings)), out / "made"


@pytest.mark.parametrize("name, pooling", [("can", "mean"), ("dinov2", "both")])
def test_a_probe_becomes_a_classifier_that_plain_transformers_loads(models, colors, tmp_path, name, pooling):
    results, folder = exported(models, colors, tmp_path, name, task="knn,linear_probe", pooling=pooling)
    figures = results["results"][name]
    assert figures["exported"]["accuracy"] == figures["linear_probe"]["accuracy"] > 0.9
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Dinov2ForImageClassification"] and "auto_map" not in config
    classify = pipeline("image-classification", str(folder))
    card = ModelCard.load(folder / "README.md")
    assert [example["example_title"] for example in card.data.widget] == NAMES
    for example in card.data.widget:
        answers = classify(str(folder / example["src"]))
        assert [answer["label"] for answer in answers] == [shown["label"] for shown in example["output"]]
        assert answers[0]["label"] == example["example_title"]
        for answer, shown in zip(answers, example["output"], strict=True):
            assert answer["score"] == pytest.approx(shown["score"], abs=1e-4)
    assert card.data.pipeline_tag == "image-classification" and card.data.eval_results[0].metric_value > 0.9
    assert not re.search(r"None|nan|{{|\|\s*\|", card.text) and str(tmp_path) not in card.text.split("```bash")[0]


def test_an_encoder_with_registers_becomes_dinov2_with_registers(models, colors, tmp_path):
    config = tiny_config(image_size=32, num_register_tokens=2, interpolate_antialias=True)
    folder = save(tmp_path / "registers", CANForPreTraining(config))
    results, made = exported({"registers": folder}, colors, tmp_path, "registers", task="linear_probe", pooling="both")
    figures = results["results"]["registers"]
    assert figures["exported"]["accuracy"] == figures["linear_probe"]["accuracy"]
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["Dinov2WithRegistersForImageClassification"]


def test_the_snippet_of_a_classifiers_card_runs(models, colors, tmp_path, monkeypatch):
    _, folder = exported(models, colors, tmp_path, "classifier", task="linear_probe")
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(snippet, names)
    assert names["answers"][0]["label"] in NAMES


@pytest.mark.parametrize("name", ["can", "classifier"])
def test_a_fine_tuned_model_becomes_a_classifier(models, colors, tmp_path, name):
    training = dict(finetune_num_epochs=1, finetune_batch_size=16, finetune_base_learning_rate=1e-2)
    results, folder = exported(models, colors, tmp_path, name, task="finetune", **training)
    figures = results["results"][name]
    assert figures["exported"]["accuracy"] == figures["finetune"]["accuracy"]
    assert figures["exported"]["head"] == "fine-tuned"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [("Dinov2" if name == "can" else "ViT") + "ForImageClassification"]


def test_what_cannot_become_a_classifier_is_refused_before_anything_takes_time(models, colors, tmp_path):
    oblong = save(tmp_path / "oblong", CANForPreTraining(tiny_config(image_size=(32, 48))))
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(oblong)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    rotary = save(tmp_path / "rotary", CANForPreTraining(tiny_config(image_size=32, position_embedding_type="rotary")))
    models = {**models, "oblong": oblong, "rotary": rotary}
    for name, flags, message in (
        ("can", {"task": "knn"}, "export_classifier needs --task linear_probe or finetune; got knn"),
        ("oblong", {"task": "linear_probe"}, "grid of 4 x 6"),
        ("rotary", {"task": "linear_probe"}, "rotary has rotary positions, .* transformers has no classifier"),
        ("can", {"task": "linear_probe", "export_classifier": tmp_path / "full"}, "full is not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            exported(models, colors, tmp_path, name, **flags)
    with pytest.raises(ValueError, match="export_classifier takes one model"):
        run_eval.main(options(models, colors, tmp_path, "can", "dinov2", export_classifier=tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_a_gray_encoder_becomes_a_classifier_of_color_images(colors, tmp_path):
    path = tmp_path / "gray"
    CANForPreTraining(tiny_config(image_size=32, num_channels=1)).save_pretrained(path)
    gray = {"image_mean": [0.5], "image_std": [0.2], "do_convert_rgb": False}
    ViTImageProcessorPil(size={"height": 32, "width": 32}, **gray).save_pretrained(path)
    results, folder = exported({"gray": str(path)}, colors, tmp_path, "gray", task="linear_probe")
    figures = results["results"]["gray"]
    assert (
        abs(figures["exported"]["accuracy"] - figures["linear_probe"]["accuracy"]) < 0.04
    )  # of 31 images at most one
    classify = pipeline("image-classification", str(folder))
    assert {answer["label"] for answer in classify(str(folder / "examples/1.jpg"))} == set(NAMES)


def test_a_class_without_training_images_and_odd_names_do_no_harm(models, tmp_path):
    names = ["r]ed", "<b>green", "blue|x", "nobody\nhere"]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    (tmp_path / "odd").mkdir()
    for split in ("train", "test"):
        labels = np.arange(30) % 3
        images = [{"bytes": encoded(200 * np.eye(3)[label]), "path": None} for label in labels]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "odd" / f"{split}-00000.parquet")
    results, folder = exported(models, str(tmp_path / "odd"), tmp_path, "can", task="linear_probe")
    assert results["results"]["can"]["exported"]["accuracy"] == 1
    card = ModelCard.load(folder / "README.md")
    assert r"r\]ed, \<b\>green, blue\|x, nobody here" in card.text
    assert card.data.widget[0]["example_title"] == "r]ed"


def test_what_is_fine_tuned_at_another_shape_is_refused_before_it_takes_time(models, colors, tmp_path):
    with pytest.raises(ValueError, match="makes a grid of 4 x 8"):
        exported(models, colors, tmp_path, "can", task="finetune", image_size="32,64")
    with pytest.raises(ValueError, match="is or holds output_dir"):
        exported(models, colors, tmp_path, "can", task="linear_probe", export_classifier=tmp_path)


def test_the_classifiers_card_says_what_the_encoder_saw_and_what_others_reach(models, colors, tmp_path, capsys):
    path = shutil.copytree(models["can"], tmp_path / "can")
    (path / "recipe.yaml").write_text(json.dumps({"data_dir": colors}))
    flags = {"task": "linear_probe", "baselines": "untrained,pixels"}
    results, folder = exported({"can": str(path)}, colors, tmp_path, "can", **flags)
    assert "Note: can was pre-trained on test images too" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_args["test_images_seen_without_labels"]
    fresh = 100 * results["results"]["untrained"]["linear_probe"]["accuracy"]
    assert "expect less on other images" in card.text and f"untrained {fresh:.1f} %" in card.text


@pytest.mark.parametrize("pooling", ["mean", "cls", "both"])
def test_a_probe_reads_as_a_layer_what_it_was_fitted_on(pooling):
    features = {"cls": torch.randn(5, 4), "mean": torch.randn(5, 4)}
    read = pooled(features, pooling, "a model")
    probe = LinearClassifier(np.random.randn(3, read.shape[1]).astype(np.float32), np.ones(3, np.float32), 1.0, None)
    head = on_class_token_and_mean(probe, pooling)
    expected = read @ torch.from_numpy(probe.weight).T + torch.from_numpy(probe.bias)
    torch.testing.assert_close(head(torch.cat([features["cls"], features["mean"]], 1)), expected)
