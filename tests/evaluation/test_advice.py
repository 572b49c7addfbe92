"""Advice: the sentence follows from the intervals, on made-up accuracies; then all of it on tiny models."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import options
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import run_eval
from modeling_can.evaluation.advice import MARGIN, Difference, paired_difference, sentence


KINDS = ("pixels", "untrained", "start")


def draws(num_test: int, accuracies: tuple[float, float], num: int, seed: int = 0):
    """Pairs of models whose right answers are independent of each other."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        yield tuple(rng.random(num_test) < accuracy for accuracy in accuracies)


@pytest.mark.parametrize("num_test", [1, 5, 30, 1000])
@pytest.mark.parametrize("accuracies", [(0, 0), (1, 0), (0.5, 0.5), (0.9, 0.7), (0.02, 0.01)])
def test_a_difference_changes_its_sign_with_the_order(num_test, accuracies):
    for ours, theirs in draws(num_test, accuracies, 20):
        difference, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
        low, high = difference.interval
        assert difference.value == -back.value and back.interval == pytest.approx((-high, -low))
        assert -1 <= low <= difference.value <= high <= 1
        assert low < high  # of models that agree on every image too
        assert (difference.verdict == "better") == (low > 0) == (back.verdict == "worse")
        assert (difference.verdict == "level") == (low <= 0 <= high < MARGIN)


@pytest.mark.parametrize("num_test, accuracies", [(40, (0.6, 0.6)), (40, (0.9, 0.8)), (300, (0.98, 0.95))])
def test_the_interval_holds_the_true_difference_95_times_of_100(num_test, accuracies):
    found = [paired_difference(*pair).interval for pair in draws(num_test, accuracies, 1000)]
    held = np.mean([low <= accuracies[0] - accuracies[1] <= high for low, high in found])
    assert held > 0.95 - 3 * (0.05 * 0.95 / 1000) ** 0.5  # three standard errors


def test_pairs_tell_more_than_two_accuracies():
    """83 and 80 % of 1,000 images, whose own intervals of 2.4 points overlap."""
    ours, theirs = np.arange(1000) < 830, np.arange(1000) < 800
    assert paired_difference(ours, theirs).verdict == "better"
    assert paired_difference(ours, theirs[::-1]).verdict == "unclear"  # the same accuracies, of other images


def test_with_as_many_images_as_are_asked_for_the_verdict_is_mostly_clear():
    for accuracies, verdicts in (((0.75, 0.7), ["better"]), ((0.7, 0.7), ["level", "worse"])):
        asked = [paired_difference(*pair) for pair in draws(200, accuracies, 200)]
        unclear = [difference for difference in asked if difference.verdict == "unclear"]
        assert len(unclear) > 20 and all(difference.num_test_needed > 200 for difference in unclear)
        as_it_is = min(unclear, key=lambda difference: abs(difference.value - (accuracies[0] - accuracies[1])))
        again = draws(as_it_is.num_test_needed, accuracies, 100, seed=1)
        assert np.mean([paired_difference(*pair).verdict in verdicts for pair in again]) > 0.65  # 0.8 asked for


EXAMPLES = {
    "better": Difference(0.05, (0.02, 0.08), 100),
    "unclear": Difference(0.02, (-0.03, 0.07), 1234),
    "level": Difference(-0.02, (-0.045, 0.005), 100),
    "worse": Difference(-0.05, (-0.08, -0.02), 100),
}


@pytest.mark.parametrize("verdicts", [v for v in itertools.product([None, *EXAMPLES], repeat=3) if any(v)])
def test_the_sentence_follows_from_the_verdicts(verdicts):
    differences = {kind: EXAMPLES[verdict] for kind, verdict in zip(KINDS, verdicts, strict=True) if verdict}
    assert [difference.verdict for difference in differences.values()] == list(filter(None, verdicts))
    text = sentence("mine", differences, 150, "linear probe", "theirs")
    *baselines, start = verdicts
    if start in ("worse", "level"):
        relation = {"worse": "better than", "level": "as good as"}[start]
        assert text.startswith(f"Keep the weights that the run began with: the start (theirs) is {relation} mine (")
    elif {"worse", "level"} & set(baselines):
        assert text.startswith("Not worth it yet: ") and "pre-train longer" in text
        assert ("raw pixels are better" in text or "untrained encoder is better" in text) == ("worse" in baselines)
    elif "unclear" in verdicts:
        assert text.startswith("Not known yet: 150 test images cannot tell mine from ")
        assert text.endswith("(linear probe +2.0 points, 95 % interval -3.0 to +7.0); about 1,200 would")
    else:
        assert text.startswith("Worth it: mine is better than ") and "linear probe +5.0 points" in text
        named = ("raw pixels" in text, "an untrained encoder" in text, "the start (theirs)" in text)
        assert named == tuple(map(bool, verdicts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Class folders without splits, of images that brightness tells apart."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for index, name in enumerate(("dark", "medium", "light")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = rng.integers(80 * index, 80 * index + 60, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.fixture()
def mine(models, tmp_path) -> dict[str, str]:
    """A model whose recipe says that its run began from another."""
    path, start = (str(shutil.copytree(models[name], tmp_path / name)) for name in ("can", "dinov2"))
    (tmp_path / "can" / "recipe.yaml").write_text(json.dumps({"model_name_or_path": start}))  # which is YAML too
    return {"can": path, "start": start}


def test_one_command_says_whether_it_was_worth_it(mine, folder, tmp_path, capsys):
    results = run_eval.main(options(mine, folder, tmp_path / "out", "can", update_card="true"))
    said = capsys.readouterr().out
    assert f"{folder} has no test split: 20% of every class is held out" in said
    assert list(results["results"]) == ["pixels", "untrained", "dinov2", "can"]
    assert (results["data"]["num_train"], results["data"]["num_test"]) == (48, 12)
    (advice,) = results["advice"].values()
    assert advice["text"] in said and advice["task"] == "linear_probe" and set(advice["differences"]) == set(KINDS)
    accuracies = {name: figures["linear_probe"]["accuracy"] for name, figures in results["results"].items()}
    for kind, name in zip(KINDS, accuracies, strict=False):
        difference = advice["differences"][kind]
        assert difference["value"] == pytest.approx(accuracies["can"] - accuracies[name])
    card = (tmp_path / "can" / "README.md").read_text()
    assert card.count(advice["text"]) == 1 and str(tmp_path) not in card
    assert not (tmp_path / "dinov2" / "README.md").exists()  # which was not asked for

    results = run_eval.main(options(mine, folder, tmp_path / "out", "can", "start", task="knn", update_card="true"))
    assert list(results["results"])[-2:] == ["can", "dinov2"] and set(results["advice"]) == {"can", "dinov2"}
    assert results["advice"]["can"]["task"] == "knn"
    assert set(results["advice"]["dinov2"]["differences"]) == {"pixels", "untrained"}
    card = (tmp_path / "can" / "README.md").read_text()
    assert card.count("Advice for") == 1 and results["advice"]["can"]["text"] in card


def test_a_start_that_is_gone_or_not_wanted_is_left_out(mine, folder, tmp_path, capsys):
    flags = {"task": "knn", "feature_cache": "none"}
    results = run_eval.main(options(mine, folder, tmp_path / "out", "can", baselines="pixels", **flags))
    assert list(results["results"]) == ["pixels", "can"] and set(results["advice"]["can"]["differences"]) == {"pixels"}
    shutil.rmtree(mine["start"])
    results = run_eval.main(options(mine, folder, tmp_path / "out", "can", baselines="start", **flags))
    assert f"not compared with what the run began from: model_name_or_path={mine['start']}" in capsys.readouterr().out
    assert list(results["results"]) == ["can"] and results["advice"] == {}


@pytest.mark.parametrize("kind", ["timm", "pth"])
def test_a_start_that_transformers_cannot_load_is_left_out_with_the_fix(mine, folder, tmp_path, kind, capsys):
    start = tmp_path / f"theirs.{kind}"
    if kind == "timm":
        start.mkdir()
        (start / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}))
    else:
        torch.save({"model": {}}, start)
    (tmp_path / "can" / "recipe.yaml").write_text(json.dumps({"model_name_or_path": str(start)}))
    flags = {"task": "knn", "feature_cache": "none", "baselines": "pixels,start"}
    results = run_eval.main(options(mine, folder, tmp_path / "out", "can", **flags))
    said = capsys.readouterr().out
    assert "not compared with" in said and f"modeling_can.conversion {start} --to can FOLDER" in said
    assert list(results["results"]) == ["pixels", "can"]


def test_a_start_of_dinov3_as_the_hub_has_it_is_compared(mine, folder, tmp_path):
    start = tmp_path / "dinov3"
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8)
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32)).save_pretrained(start)
    processor = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",  # whose class needs torchvision
        "size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "do_center_crop": None,
    }
    (start / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "can" / "recipe.yaml").write_text(json.dumps({"model_name_or_path": str(start)}))
    flags = {"task": "knn", "feature_cache": "none", "baselines": "start"}
    results = run_eval.main(options(mine, folder, tmp_path / "out", "can", **flags))
    assert list(results["results"]) == ["dinov3", "can"] and set(results["advice"]["can"]["differences"]) == {"start"}
