"""Corruptions: drawn from the image's index alone, stronger with severity; the paper's formulas; further sets."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from testing_utils import NAMES, options
from transformers import (
    ViTImageProcessorPil,
)

import run_eval
from modeling_can.evaluation.features import Extractor
from modeling_can.evaluation.preprocessors import Preprocessor
from modeling_can.evaluation.protocol import Setup
from modeling_can.evaluation.robustness import (
    GROUPS,
    SEVERITIES,
    Corrupted,
    accuracy_by_corruption,
    class_order,
    corrupted_predictions,
    corruption_error,
    corruptions_by_group,
    load_further_sets,
)
from modeling_can.evaluation.sets import Split


pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')


def preprocessor(**changes) -> Preprocessor:
    return Preprocessor(ViTImageProcessorPil(**{"size": {"height": 32, "width": 40}, **changes}))


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    PILImage.fromarray(coarse).resize((80, 64), PILImage.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def split_of(num: int) -> Split:
    images = [{"bytes": encoded(i), "path": None} for i in range(num)]
    images = Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    return Split("a set", images, np.arange(num) % 2)


ALL = [name for names in corruptions_by_group().values() for name in names]


def test_the_fifteen_common_corruptions_in_four_groups():
    groups = corruptions_by_group()
    assert tuple(groups) == GROUPS and len(ALL) == len(set(ALL)) == 15
    with pytest.raises(ValueError, match="corruptions=light: known are noise"):
        corruptions_by_group(("light",))


def test_what_is_drawn_depends_on_the_image_alone_and_nothing_else_is_drawn():
    corrupted = Corrupted(preprocessor(), ALL, seed=3)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = corrupted(encoded(0), 5)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(1)
    corrupted(encoded(1), 6)
    again = corrupted(encoded(0), 5)
    assert first.shape == (75, 3, 32, 40) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    drawn = [name for name in ALL if name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate",
                                                  "jpeg_compression")]  # fmt: skip
    for index, seed in ((6, 3), (5, 4)):
        other = Corrupted(preprocessor(), ALL, seed=seed)(encoded(0), index)
        differs = (other != first).flatten(1).any(dim=1)
        for (name, severity), differ in zip(corrupted.versions, differs, strict=True):
            assert differ or name not in drawn or severity < 5, name


def test_corruptions_grow_with_severity():
    prepare, corrupted = preprocessor(), Corrupted(preprocessor(), ALL)
    clean = torch.stack([prepare.decode(encoded(seed)) for seed in range(6)]).float()
    versions = torch.stack([corrupted(encoded(seed), seed) for seed in range(6)]).float()
    errors = (versions - clean[:, None]).square().mean(dim=(0, 2, 3, 4)).unflatten(0, (15, 5))
    assert (errors > 0).all()
    assert (errors[:, 4] > errors[:, 0]).all(), dict(zip(ALL, errors.tolist(), strict=True))


def test_grayscale_images_stay_grayscale():
    versions = Corrupted(preprocessor(image_mean=[0.5], image_std=[0.5]), ALL, (1,))(encoded(0), 0)
    assert versions.shape == (15, 1, 32, 40)


def test_predictions_are_those_of_one_image_after_the_other():
    prepare, split = preprocessor(), split_of(5)
    corrupted = Corrupted(prepare, ["gaussian_noise", "fog"], (1, 5))
    weight = torch.randn(3 * 32 * 40, 4, generator=torch.Generator().manual_seed(0))

    def classify(images):
        assert len(images) <= 9
        return prepare.normalize(images).flatten(1) @ weight

    predictions = corrupted_predictions(classify, split, corrupted, Extractor(batch_size=9, num_workers=1))
    expected = [classify(corrupted(encoded(index), index)).argmax(1) for index in range(5)]
    np.testing.assert_array_equal(predictions, torch.stack(expected))
    assert corrupted.versions == [("gaussian_noise", 1), ("gaussian_noise", 5), ("fog", 1), ("fog", 5)]


def test_the_formulas_of_the_paper():
    versions = [(name, severity) for name in ("fog", "snow") for severity in SEVERITIES]
    right = np.random.default_rng(0).random((40, 10)) < np.linspace(0.9, 0.2, 10)
    table = accuracy_by_corruption(right, versions)
    reference = accuracy_by_corruption(np.random.default_rng(1).random((40, 10)) < 0.5, versions)
    assert table["snow"]["2"] == right[:, 6].mean()
    errors = corruption_error(table, reference)
    expected = {}
    for name in ("fog", "snow"):
        ours = sum(1 - table[name][str(severity)] for severity in SEVERITIES)
        expected[name] = ours / sum(1 - reference[name][str(severity)] for severity in SEVERITIES)
    assert errors["fog"] == pytest.approx(expected["fog"]) and errors["snow"] == pytest.approx(expected["snow"])
    assert errors["mean"] == pytest.approx((expected["fog"] + expected["snow"]) / 2)
    assert corruption_error(table, table)["mean"] == pytest.approx(1)
    perfect = accuracy_by_corruption(np.ones((3, 10), bool), versions)
    with pytest.raises(ValueError, match="reference_model makes no error under fog"):
        corruption_error(table, perfect)


def test_small_images_and_other_processors_are_refused():
    with pytest.raises(ValueError, match=r"image_size=\(16, 16\): the corruptions need 32 x 32"):
        Corrupted(preprocessor(size={"height": 16, "width": 16}), ALL)
    odd = preprocessor()
    odd.in_two_steps = False
    with pytest.raises(ValueError, match="cannot be corrupted in between"):
        Corrupted(odd, ALL)


# --- Further sets ----------------------------------------------------------------------------------------------------


CLASSES = ["ant", "bee", "cat", "dog"]


def further(tmp_path, labels, kind, **entry):
    (tmp_path / "set").mkdir()
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(labels))], "label": labels}
    features = Features({"image": Image(), "label": kind})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "test-00000.parquet")
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"other": {"dataset_name": str(tmp_path / "set"), **entry}}))
    return load_further_sets(str(tmp_path / "sets.yaml"), CLASSES)["other"]


def test_a_further_set_has_our_classes_by_name(tmp_path):
    other = further(tmp_path, [1, 0, 1], ClassLabel(names=["dog", "bee"]))
    assert other.split.labels.tolist() == [1, 3, 1] and other.classes.tolist() == [1, 3]


def test_a_class_map_renames_and_leaves_out(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"n01": "cat", "n02": 0, "n03": None}, indent="\t"))
    other = further(tmp_path, ["n02", "n03", "n01", "n02"], Value("string"), class_map="classes.json")
    assert other.split.labels.tolist() == [0, 2, 0] and other.classes.tolist() == [0, 2]
    assert [other.split.read(row) for row in range(3)] == [encoded(0), encoded(2), encoded(3)]


def test_a_class_map_may_go_by_index(tmp_path):
    other = further(tmp_path, [0, 1], ClassLabel(names=["x", "y"]), class_map={0: "dog", 1: "ant"})
    assert other.split.labels.tolist() == [3, 0]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({}, "'x' is none of our 4 classes; give a class_map"),
        ({"class_map": {"x": "dog"}}, "class_map has no entry for 'y'"),
        ({"class_map": {"x": "dgo", "y": "ant"}}, "'dgo' is none of our 4 classes"),
        ({"class_map": {"x": 7, "y": 0}}, "7 is none of our 4 classes"),
        ({"class_map": {"x": None, "y": None}}, "leaves all rows out"),
        ({"class_map": "tabs.yaml"}, "class_map=tabs.yaml cannot be read"),
        ({"class_map": "none.json"}, "class_map=none.json cannot be read"),
        ({"splt": "test"}, "needs dataset_name and knows"),
        ({"split": "train"}, "split"),
    ],
)
def test_further_sets_that_do_not_fit_are_refused(tmp_path, entry, message):
    (tmp_path / "tabs.yaml").write_text("\tx: dog")
    with pytest.raises(ValueError, match=message):
        further(tmp_path, [0, 1], ClassLabel(names=["x", "y"]), **entry)


def test_files_of_further_sets_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="further_sets=.*none.yaml cannot be read"):
        load_further_sets(str(tmp_path / "none.yaml"), CLASSES)
    (tmp_path / "tabs.yaml").write_text("other:\n\tsplit: test\n")
    with pytest.raises(ValueError, match="tabs.yaml cannot be read: .*line 2: .*replace the tab by spaces"):
        load_further_sets(str(tmp_path / "tabs.yaml"), CLASSES)
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="class_map must map labels to classes, not be \\['a', 'b'\\]"):
        further(tmp_path, [0, 1], ClassLabel(names=["x", "y"]), class_map="list.yaml")
    with pytest.raises(ValueError, match="must map names to dataset_name"):
        load_further_sets(str(tmp_path / "list.yaml"), CLASSES)


@pytest.fixture(scope="module")
def robust(models, colors, tmp_path_factory):
    pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')
    out = tmp_path_factory.mktemp("robust")
    (out / "sets.yaml").write_text(
        f"two colors:\n  dataset_name: {colors}\n  class_map: {{red: red, green: 1, blue: null}}\n"
        f"all of them:\n  dataset_name: {colors}\n"
    )
    shutil.copytree(models["classifier"], out / "other classes")
    config = json.loads((out / "other classes" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (out / "other classes" / "config.json").write_text(json.dumps(config))
    paths = {**models, "other": str(out / "other classes")}
    argv = options(paths, colors, out, "can", "classifier", "other", task="robustness", corruptions="noise",
                   reference_model="untrained", baselines="none", further_sets=out / "sets.yaml")  # fmt: skip
    predictions = {}
    original = Setup.score

    def spy(self, predicted, labels=None):
        predictions.setdefault(len(predicted), set()).update(np.asarray(predicted).tolist())
        return original(self, predicted, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "score", spy)
        results = run_eval.main(argv)["results"]
    return results, predictions


def test_robustness_compares_corrupted_with_clean(robust):
    robust, _ = robust
    assert list(robust) == [
        "untrained (can)",
        "can",
        "classifier",
        "other classes",
    ]  # the reference, though no baseline
    for figures in (entry["robustness"] for entry in robust.values()):
        assert set(figures["by_corruption"]) == {"gaussian_noise", "shot_noise", "impulse_noise"}
        cells = [x for severities in figures["by_corruption"].values() for x in severities.values()]
        assert figures["accuracy"] == pytest.approx(np.mean(cells)) and len(cells) == 15
        assert figures["by_group"]["noise"] == pytest.approx(np.mean(cells))
        assert figures["relative_drop"] == pytest.approx(1 - figures["accuracy"] / figures["clean"]["accuracy"])
        assert np.mean([score["accuracy"] for score in figures["by_severity"].values()]) == pytest.approx(
            np.mean(cells)
        )
    assert robust["untrained (can)"]["robustness"]["corruption_error"]["mean"] == pytest.approx(1)
    assert robust["can"]["robustness"]["corruption_error"]["reference"] == "untrained (can)"
    assert robust["can"]["robustness"]["head"] == "linear probe"
    assert robust["classifier"]["robustness"]["head"] == "its own classifier"
    assert robust["other classes"]["robustness"]["head"] == "linear probe"


def test_further_sets_are_judged_among_their_own_classes(robust):
    robust, predictions = robust
    assert predictions[21] <= {0, 1} and predictions[31] == {0, 1, 2}
    figures = robust["can"]["robustness"]["further_sets"]
    assert (
        figures["all of them"]["accuracy"] == robust["can"]["robustness"]["clean"]["accuracy"]
    )  # the test set itself
    assert figures["two colors"]["num_classes"] == 2 and figures["two colors"]["num_images"] == 21


def test_a_classifier_is_used_for_its_own_classes_alone():
    assert class_order({0: "LABEL_0", 1: "LABEL_1"}, NAMES) is None
    assert class_order({0: "blue", 1: "other", 2: "red", 3: "green"}, NAMES) == [2, 3, 0]
    assert class_order({0: "red", 1: "green", 2: "red", 3: "blue"}, NAMES) is None  # which red?
    birds = [f"bird {index}" for index in range(98)]
    theirs = dict(enumerate([*birds, "crane", "crane"]))
    assert class_order(theirs, [*birds, "crane", "crane 2"]) == list(range(100))


def test_reconstruction_is_in_decibels_below_the_full_range(models, colors, tmp_path):
    argv = options(models, colors, tmp_path, "can", task="reconstruction")
    results = run_eval.main(argv)
    figures = results["results"]["can"]["reconstruction"]
    assert set(results["results"]) == {"can"}
    for name in ("masked_patches", "plain", "noise_reduction"):
        low, high = figures[name]["interval"]
        assert low <= figures[name]["db"] <= high
    # One color an image, whose noised mean stands in for the masked patches; a fresh decoder is far from that.
    assert figures["plain"]["db"] > 50 > figures["masked_patches"]["db"]
    assert figures["noise_reduction"]["db"] == 0  # a fresh noise head predicts none
    assert Path(figures["figure"]).stat().st_size > 5000
    again = run_eval.main([*argv, "--batch_size=5"])["results"]["can"]["reconstruction"]
    assert again["masked_patches"]["db"] == pytest.approx(figures["masked_patches"]["db"], abs=1e-4)
    with pytest.raises(ValueError, match="needs a CAN .* dinov2 is a dinov2"):
        run_eval.main(options(models, colors, tmp_path, "dinov2", task="reconstruction"))


def test_a_classifier_may_have_its_classes_in_another_order(models, colors, tmp_path):
    pytest.importorskip("imagecorruptions")
    other, order = shutil.copytree(models["classifier"], tmp_path / "other"), [2, 0, 1]
    config, weights = (
        json.loads((other / "config.json").read_text()),
        safetensors.torch.load_file(other / "model.safetensors"),
    )
    names = [config["id2label"][str(index)] for index in order]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    for key in ("classifier.weight", "classifier.bias"):
        weights[key] = weights[key][order]
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    argv = options({**models, "other": str(other)}, colors, tmp_path, "classifier", "other", task="robustness",
                   corruptions="noise", baselines="none")  # fmt: skip
    one, two = (figures["robustness"] for figures in run_eval.main(argv)["results"].values())
    assert one["by_corruption"] == two["by_corruption"] and one["clean"] == two["clean"]
    assert one["head"] == "its own classifier"


def test_every_version_of_an_image_draws_anew():
    versions = Corrupted(preprocessor(), ["gaussian_noise"], (3, 3))(encoded(0), 0)
    assert not torch.equal(versions[0], versions[1])
