"""The script as a user runs it, on small models and tiles: figures, tables, cards, processes, leaks, refusals."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import free_port, tiny_config
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from huggingface_hub import ModelCard
from PIL import Image as Picture
from test_evaluation import encoded
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

import run_eval
from modeling_can import CANForPreTraining
from modeling_can.evaluation import command, few_shot, knn, report
from modeling_can.evaluation.encoders import Preprocessor, load_encoder, pooled
from modeling_can.evaluation.entries import load
from modeling_can.evaluation.features import Extractor
from modeling_can.evaluation.finetuning import FineTuning
from modeling_can.evaluation.linear import LinearProbe
from modeling_can.evaluation.overlap import seen_in_pretraining
from modeling_can.evaluation.protocol import Setup
from modeling_can.evaluation.retrieval import retrieval_sheet
from modeling_can.evaluation.robustness import class_order, compare_corruption
from modeling_can.evaluation.settings import Settings, parse, prefixed


ROOT = Path(__file__).parent.parent
VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)
NAMES = ["red", "green", "blue"]


def save(folder: Path, model) -> str:
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    return {
        "can": save(folder / "can", CANForPreTraining(tiny_config(image_size=32))),
        "dinov2": save(folder / "dinov2", Dinov2Model(Dinov2Config(**VIT))),
        "classifier": save(folder / "classifier", ViTForImageClassification(ViTConfig(**VIT, **names))),
    }


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    """A set of plain pictures of three classes, 90 to learn from and 31 to be tested on, which colour tells apart."""
    folder = tmp_path_factory.mktemp("sets") / "colours"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, num in (("train", 90), ("test", 31)):
        labels = np.arange(num) % 3
        shades = 100 * np.eye(3)[labels] + rng.integers(20, 140, (num, 3))
        images = [{"bytes": encoded(shade), "path": None} for shade in shades]
        features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def options(models, colours, out, *names, **flags) -> list[str]:
    paths = [models[name] for name in names]
    flags = {"dataset_name": colours, "output_dir": out, "feature_cache": Path(out) / "cache", **flags}
    return ["--model_name_or_path", *paths, *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module")
def measured(models, colours, tmp_path_factory):
    """Two models, all tasks on features, with intervals, baselines and card."""
    out = tmp_path_factory.mktemp("eval")
    for name in ("can", "dinov2"):
        shutil.copytree(models[name], out / name)
    card = """---
license: mit
model-index:
- name: mine
  results:
  - task:
      type: image-classification
    dataset:
      name: elsewhere
      type: elsewhere
    metrics:
    - type: accuracy
      value: 0.5
---

# Mine

Text.
"""
    (out / "can" / "README.md").write_text(card)
    copies = {name: str(out / name) for name in ("can", "dinov2")}
    argv = options(copies, colours, out / "out", "can", "dinov2", task="knn,linear_probe,few_shot,retrieval",
                   shots="1,5,10%", num_draws=2, update_card="true")  # fmt: skip
    return out, argv, run_eval.main(argv)


def test_models_and_baselines_stand_side_by_side(measured, capsys):
    out, argv, results = measured
    assert json.loads((out / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["results"]) == ["pixels", "untrained (can)", "untrained (dinov2)", "can", "dinov2"]
    for name, figures in results["results"].items():
        is_model = name in ("can", "dinov2")
        assert set(figures) == {"knn", "linear_probe", "few_shot"} | ({"retrieval"} if is_model else set())
        assert list(figures["knn"]) == ["1", "5", "10", "20", "100"]
        assert list(figures["few_shot"]) == ["1", "5", "10%"]
        for score in (*figures["knn"].values(), figures["linear_probe"], *figures["few_shot"].values()):
            low, high = score["interval"]
            assert 0 <= low <= score["accuracy"] <= high <= 1
        few = figures["few_shot"]["5"]
        assert few["accuracy"] == pytest.approx(np.mean(few["draws"]))
        assert few["std"] == pytest.approx(np.std(few["draws"], ddof=1))
    assert results["results"]["pixels"]["linear_probe"]["accuracy"] > 0.9  # the colour is the class
    assert results["data"]["num_train"] == 90 and results["data"]["num_test"] == 31
    assert results["data"]["class_names"] == NAMES
    assert {"command", "versions", "git_commit", "machine", "seed", "seconds", "total_seconds"} <= results.keys()
    table = report.table(results["results"])
    lines = table.splitlines()
    assert (
        lines[0].split("  ")[0] == "" and "untrained (dinov2)" in lines[0] and len({len(line) for line in lines}) == 1
    )
    accuracy = results["results"]["can"]["knn"]["20"]["accuracy"]
    assert f"{100 * accuracy:.1f} ±" in next(line for line in lines if line.startswith("k-NN, k = 20"))
    for picture in ("evaluation.png", "retrieval-can.png", "retrieval-dinov2.png"):
        assert (out / "out" / "figures" / picture).stat().st_size > 5000


def test_the_card_keeps_what_it_had_and_says_each_result_once(measured):
    out, argv, results = measured
    run_eval.main([*argv, "--seed=0"])
    card = ModelCard.load(out / "can" / "README.md")
    assert "Text." in card.text and card.data.license == "mit" and card.data.model_name == "mine"
    elsewhere = [r for r in card.data.eval_results if r.dataset_name == "elsewhere"]
    assert [r.metric_value for r in elsewhere] == [0.5]
    ours = {r.metric_name: r for r in card.data.eval_results if r.dataset_name == "colours"}
    assert len(ours) == len(card.data.eval_results) - 1 == len(report.measures(results["results"]["can"]))
    assert ours["linear probe"].metric_value == round(results["results"]["can"]["linear_probe"]["accuracy"], 4)
    assert ours["linear probe"].dataset_split == "test"
    few = results["results"]["can"]["few_shot"]["5"]  # its interval, not its spread
    assert ours["5 a class"].metric_args["interval_95"] == [round(end, 4) for end in few["interval"]]
    assert str(out) not in (out / "can" / "README.md").read_text()
    made = ModelCard.load(out / "dinov2" / "README.md")  # it had none
    assert made.data.model_name == "dinov2" and made.data.library_name == "transformers"


def test_a_model_that_is_only_the_reference_keeps_its_card(models, colours, tmp_path):
    copies = {name: str(shutil.copytree(models[name], tmp_path / name)) for name in ("can", "dinov2")}
    flags = {"task": "knn", "baselines": "none", "reference_model": copies["dinov2"], "update_card": "true"}
    run_eval.main(options(copies, colours, tmp_path / "out", "can", **flags))
    assert (tmp_path / "can" / "README.md").exists() and not (tmp_path / "dinov2" / "README.md").exists()


def test_a_pretraining_run_is_not_written_over(models, colours, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 0")
    for flags in ({"task": "knn"}, {"task": "embed"}):
        with pytest.raises(ValueError, match="holds a pre-training run, whose results.json this would replace"):
            run_eval.main(options(models, colours, tmp_path, "can", **flags))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_pictures_are_decoded_as_in_pretraining(models, colours, tmp_path):
    twelve_bits = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    Picture.fromarray(twelve_bits).save(tmp_path / "12.png")
    means = []
    for trained, flags in (({}, {}), ({"high_bit_depth": "stretch"}, {}), ({}, {"high_bit_depth": "stretch"})):
        path = str(shutil.copytree(models["can"], tmp_path / "can", dirs_exist_ok=True))
        size = {"height": 32, "width": 32}
        Preprocessor(ViTImageProcessorPil(size=size, **trained)).save_pretrained(path)
        settings = parse(options({"can": path}, colours, tmp_path, "can", **flags))[0]
        preprocessor = load(path, settings).preprocessor
        preprocessor.save_pretrained(tmp_path / "again")  # beside what is fine-tuned or exported
        assert Preprocessor(ViTImageProcessorPil.from_pretrained(tmp_path / "again")).decoding == preprocessor.decoding
        means.append(preprocessor.decode((tmp_path / "12.png").read_bytes()).float().mean())
    assert means[0] < 10 and means[1] == means[2] and 120 < means[1] < 135
    with pytest.raises(ValueError, match="high_bit_depth='strech' is not one of full_range, stretch, skip"):
        parse(options(models, colours, tmp_path, "can", high_bit_depth="strech"))


def test_a_second_run_takes_the_features_from_the_cache(measured, monkeypatch):
    out, argv, results = measured
    monkeypatch.setattr(Extractor, "__call__", None)  # nothing is extracted
    assert run_eval.main(argv)["results"] == results["results"]
    (weights,) = [path for path in (out / "can").glob("*.safetensors")]
    tensors = __import__("safetensors.torch").torch.load_file(weights)
    tensors["can.layernorm.bias"] += 1
    __import__("safetensors.torch").torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(TypeError):  # other weights, other features
        run_eval.main(argv)


@pytest.mark.parametrize("pooling, width", [("cls", 32), ("both", 64)])
def test_features_are_pooled_as_asked(models, colours, tmp_path, monkeypatch, pooling, width):
    widths = []
    original = knn.knn_predictions

    def spy(train, *arguments, **options):
        widths.append(train.shape[1])
        return original(train, *arguments, **options)

    monkeypatch.setattr(knn, "knn_predictions", spy)
    argv = options(models, colours, tmp_path, "can", task="knn", pooling=pooling)
    results = run_eval.main(argv)
    assert widths == [3 * 32 * 32, width, width] and results["pooling"] == pooling


def test_a_pooling_is_named_where_features_were_pooled():
    of = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    figures = {
        "knn": {"20": of}, "linear_probe": of, "few_shot": {"5": {**of, "std": 0.1}}, "finetune": of,
        "linear_probe_sgd": {**of, "pooling": "both"}, "exported": {**of, "head": "fine-tuned"},
        "retrieval": {"precision": 0.5, "interval": [0.4, 0.6], "neighbours": 7},
        "robustness": {**of, "clean": of, "head": "own classifier"},
    }  # fmt: skip
    poolings = {heading: measure.pooling for heading, measure in report.measures(figures, "cls").items()}
    frozen = ("k-NN, k = 20", "linear probe", "5 a class", "of 7 neighbours right")
    trained = ("fine-tuned", "exported classifier", "corrupted", "clean, same classifier")
    assert poolings == {**dict.fromkeys(frozen, "cls"), **dict.fromkeys(trained, "mean"), "linear probe, SGD": "both"}


def test_a_model_has_one_colour_and_names_are_shown_as_they_are(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(report, "save_figure", lambda figure, path: (figure.savefig(path), seen.update(figure=figure)))
    of = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    mine = {"knn": {"1": of, "5": of}, "robustness": {"by_severity": {"1": of, "2": of}}}
    results = {"pixels": {"knn": mine["knn"]}, "$a_$x_$": mine, "reference": {"robustness": mine["robustness"]}}
    assert report.evaluation_figure(results, tmp_path / "figure.png")
    first, second = seen["figure"].axes
    drawn = [[line.get_color() for line in axis.lines if len(line.get_xdata())] for axis in (first, second)]
    assert drawn == [["C0", "C1"], ["C1", "C2"]]
    handles, labels = first.get_legend_handles_labels()
    assert [handle.get_color() for handle in handles] == ["C0", "C1", "C2"]
    assert labels == ["pixels", r"\$a_\$x_\$", "reference"]
    picture, right = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), np.ones((1, 1), bool)
    retrieval_sheet(picture, picture[:, None], right, ["$100%$"], tmp_path / "sheet.png")


def test_another_batch_size_and_loader_workers_change_nothing(models, colours, tmp_path):
    figures = []
    for batch_size, workers in ((7, 1), (64, 0)):
        argv = options(
            models, colours, tmp_path, "can", task="knn,linear_probe", baselines="none", feature_cache="none"
        )
        argv += [f"--batch_size={batch_size}", f"--dataloader_num_workers={workers}"]
        figures.append(run_eval.main(argv)["results"]["can"])
    assert figures[0] == figures[1]


# --- Robustness and reconstruction -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def robust(models, colours, tmp_path_factory):
    pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')
    out = tmp_path_factory.mktemp("robust")
    (out / "sets.yaml").write_text(
        f"two colours:\n  dataset_name: {colours}\n  class_map: {{red: red, green: 1, blue: null}}\n"
        f"all of them:\n  dataset_name: {colours}\n"
    )
    shutil.copytree(models["classifier"], out / "other classes")
    config = json.loads((out / "other classes" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (out / "other classes" / "config.json").write_text(json.dumps(config))
    paths = {**models, "other": str(out / "other classes")}
    argv = options(paths, colours, out, "can", "classifier", "other", task="robustness", corruptions="noise",
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
    assert figures["two colours"]["num_classes"] == 2 and figures["two colours"]["num_images"] == 21


def test_a_classifier_is_used_for_its_own_classes_alone():
    assert class_order({0: "LABEL_0", 1: "LABEL_1"}, NAMES) is None
    assert class_order({0: "blue", 1: "other", 2: "red", 3: "green"}, NAMES) == [2, 3, 0]
    assert class_order({0: "red", 1: "green", 2: "red", 3: "blue"}, NAMES) is None  # which red?
    birds = [f"bird {index}" for index in range(98)]
    theirs = dict(enumerate([*birds, "crane", "crane"]))
    assert class_order(theirs, [*birds, "crane", "crane 2"]) == list(range(100))


def test_reconstruction_is_in_decibels_below_the_full_range(models, colours, tmp_path):
    argv = options(models, colours, tmp_path, "can", task="reconstruction")
    results = run_eval.main(argv)
    figures = results["results"]["can"]["reconstruction"]
    assert set(results["results"]) == {"can"}
    for name in ("hidden_patches", "plain", "noise_reduction"):
        low, high = figures[name]["interval"]
        assert low <= figures[name]["db"] <= high
    # One colour a picture, whose noised mean stands in for the hidden patches; a fresh decoder is far from that.
    assert figures["plain"]["db"] > 50 > figures["hidden_patches"]["db"]
    assert figures["noise_reduction"]["db"] == 0  # a fresh noise head predicts none
    assert Path(figures["picture"]).stat().st_size > 5000
    again = run_eval.main([*argv, "--batch_size=5"])["results"]["can"]["reconstruction"]
    assert again["hidden_patches"]["db"] == pytest.approx(figures["hidden_patches"]["db"], abs=1e-4)
    with pytest.raises(ValueError, match="needs a CAN .* dinov2 is a dinov2"):
        run_eval.main(options(models, colours, tmp_path, "dinov2", task="reconstruction"))


# --- No leak ---------------------------------------------------------------------------------------------------------


def test_nothing_that_is_learnt_or_chosen_depends_on_the_test_labels(models, colours, tmp_path, monkeypatch):
    """With the test labels planted otherwise, every prediction is the same."""
    planted = tmp_path / "planted"
    shutil.copytree(colours, planted)
    test = load_dataset("parquet", data_files={"test": f"{colours}/test-*.parquet"})["test"]
    wrong = [(label + 1) % 3 for label in test["label"]]
    rows = test.remove_columns("label").add_column("label", wrong).cast_column("label", ClassLabel(names=NAMES))
    rows.to_parquet(planted / "test-00000-of-00001.parquet")
    predictions = {}
    original = Setup.score

    def spy(self, predicted, labels=None):
        made.append((np.asarray(predicted).tolist(), self.data.test.labels.tolist()))
        return original(self, predicted, labels)

    monkeypatch.setattr(Setup, "score", spy)
    few = few_shot.few_shot_predictions
    monkeypatch.setattr(
        few_shot, "few_shot_predictions", lambda **o: [made.append((p.tolist(), [])) or p for p in few(**o)]
    )
    for name, folder in {"true": colours, "planted": str(planted)}.items():
        made = []
        argv = options(models, folder, tmp_path / name, "can", shots="1,5", num_draws=2, sgd_num_epochs=2,
                       task="knn,linear_probe,few_shot,linear_probe_sgd,finetune", sgd_batch_size=30,
                       finetune_num_epochs=1, finetune_batch_size=30)  # fmt: skip
        run_eval.main(argv)
        predictions[name] = made
    assert len(predictions["true"]) > 20
    for (ours, answers), (theirs, others) in zip(predictions["true"], predictions["planted"], strict=True):
        assert ours == theirs and (not answers or answers != others)


# --- Processes -------------------------------------------------------------------------------------------------------


def launch(argv: list[str], num_processes: int) -> dict:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
               "--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port())]  # fmt: skip
    if num_processes == 1:
        command = [sys.executable]
    answer = subprocess.run(
        [*command, str(ROOT / "run_eval.py"), *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
    (out,) = [word.split("=")[1] for word in argv if word.startswith("--output_dir")]
    return json.loads((Path(out) / "results.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(models, colours, tmp_path):
    pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')
    results = []
    for num_processes in (1, 2):
        argv = options(models, colours, tmp_path / str(num_processes), "can", batch_size=8, baselines="pixels",
                       task="knn,linear_probe,few_shot,linear_probe_sgd,robustness,reconstruction,retrieval",
                       shots=5, corruptions="noise", sgd_num_epochs=2, sgd_batch_size=30)  # fmt: skip
        results.append(launch(argv, num_processes))
    one, two = results
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for name in ("retrieval", "reconstruction"):
        assert one["results"]["can"][name].pop("picture") != two["results"]["can"][name].pop("picture")
    sgd = [result["results"]["can"].pop("linear_probe_sgd") for result in results]
    assert one["results"] == two["results"]  # to the last digit; SGD's batches are encoded in halves:
    assert [head["held_out_accuracy"] for head in sgd[0]["heads"]] == [
        head["held_out_accuracy"] for head in sgd[1]["heads"]
    ]
    assert sgd[0]["accuracy"] == sgd[1]["accuracy"]


# --- Fine-tuning and embedding through the script --------------------------------------------------------------------


def test_a_fine_tuned_model_is_measured_and_goes_into_the_pipeline(models, colours, tmp_path):
    from transformers import pipeline

    flags = {"finetune_num_epochs": 40, "finetune_batch_size": 30, "finetune_base_learning_rate": 0.02,
             "finetune_warmup_ratio": 0.1, "finetune_randaugment_magnitude": 0, "finetune_mixup_alpha": 0,
             "finetune_random_erasing_probability": 0, "finetune_cutmix_alpha": 0,
             "finetune_drop_path_rate": 0}  # fmt: skip
    argv = options(models, colours, tmp_path, "can", task="finetune", **flags)
    figures = run_eval.main(argv)["results"]["can"]["finetune"]
    assert figures["accuracy"] > 0.7
    classify = pipeline("image-classification", model=figures["folder"])
    test = load_dataset("parquet", data_files=f"{colours}/test-*.parquet")["train"]
    right = [classify(row["image"])[0]["label"] == NAMES[row["label"]] for row in test]
    assert np.mean(right) == pytest.approx(figures["accuracy"])
    measured = {"classifier": figures["folder"]}  # and is measured as any other model, by its own classifier
    pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')
    argv = options(
        measured, colours, tmp_path / "b", "classifier", task="robustness", corruptions="noise", baselines="none"
    )
    robustness = run_eval.main(argv)["results"]["can"]["robustness"]
    assert robustness["head"] == "its own classifier"
    assert robustness["clean"]["accuracy"] == figures["accuracy"]
    with pytest.raises(ValueError, match="finetuned/can is not empty"):
        run_eval.main(options(models, colours, tmp_path, "can", task="finetune", **flags))


def test_embeddings_of_a_folder_tell_what_was_left_out(models, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.png").write_bytes(encoded((1, 2, 3)))
    (tmp_path / "p" / "2.heic").write_bytes(b"")
    argv = ["--model_name_or_path", models["can"], "--task=embed", f"--data_dir={tmp_path}/p"]
    results = run_eval.main([*argv, f"--output_dir={tmp_path}/out"])
    assert results["embed"]["num_images"] == 1 and results["left_out"] == {".heic": 1}
    assert f"data_dir={tmp_path}/p: reads 1 images; left out: 1 .heic" in capsys.readouterr().out


def test_embeddings_are_those_of_the_model(models, colours, tmp_path):
    argv = ["--model_name_or_path", models["can"], "--task=embed", f"--data_files={colours}/test-*.parquet",
            f"--output_dir={tmp_path}", "--embedding_dtype=float32", "--pooling=both", "--batch_size=8"]  # fmt: skip
    results = run_eval.main(argv)
    assert results["embed"]["num_images"] == 31 and results["embed"]["done"]
    rows = load_dataset("parquet", data_files=f"{tmp_path}/part-*.parquet")["train"].with_format("numpy")
    assert rows.column_names == ["id", "label", "embedding"] and rows["embedding"][:].shape == (31, 64)
    encoder = load_encoder(models["can"])
    test = load_dataset("parquet", data_files=f"{colours}/test-*.parquet")["train"].cast_column(
        "image", Image(decode=False)
    )
    with torch.no_grad():
        prepared = torch.stack([encoder.preprocessor.decode(row["image"]["bytes"]) for row in test])
        expected = pooled(encoder(encoder.preprocessor.normalise(prepared)), "both", "can")
    order = np.argsort([int(name.split(":")[1]) for name in rows["id"][:]])
    np.testing.assert_allclose(rows["embedding"][:][order], expected, atol=1e-5)
    assert rows["label"][:][order].tolist() == test["label"][:]
    assert run_eval.main(argv)["embed"]["new_images"] == 0


# --- Refusals --------------------------------------------------------------------------------------------------------


REFUSED = {
    "--task=knm": r"task='knm' is not one of knn, ",
    "--tasks=knn": r"unknown key 'tasks'; did you mean 'task'",
    "--pooling=max": r"pooling='max' is not one of mean, cls, both",
    "--baselines=random": r"baselines='random' is not one of pixels, untrained",
    "--shots=few": r"shots='few' must be a number of images, such as 5, or a share",
    "--test_size=1.5": r"test_size=1.5 is outside \[0, 1\)",
    "--batch_size=0": r"batch_size=0 must be at least 1",
    "--image_size=1,2,3": r"image_size=\(1, 2, 3\) must be one number, or height,width",
    "--task=embed,knn": r"embed stands alone",
    "--sgd_layers=0": r"sgd_layers=\(0,\) must be numbers of blocks, at least 1",
    "--dataset_name=none": r"give --dataset_name",
    "--label_column=klass": r"set label_column to one of label",
    "--image_size=33": r"refuses the 3 x 33 x 33 pixels .*--image_size 32,32",
    "--processor_name_or_path=nobody/nothing": r"nobody/nothing has no image processor",
    "--finetune_layer_decay=2": r"layer_decay=2",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_the_user_can_mend_is_said_with_the_fix(models, colours, tmp_path, flag):
    with pytest.raises(ValueError, match=REFUSED[flag]):
        run_eval.main([*options(models, colours, tmp_path, "can"), flag])


def test_more_shots_than_images_are_refused_before_anything_takes_time(models, colours, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_entries", None)
    with pytest.raises(ValueError, match="shots=31 wants 31 images of class red, which has 30"):
        run_eval.main(options(models, colours, tmp_path, "can", task="few_shot", shots="5,31"))


@pytest.mark.parametrize(
    "task, name, message",
    [
        ("knn,reconstruction", "dinov2", "needs a CAN .* dinov2 is a dinov2"),
        ("knn,finetune", "can", "finetuned/can is not empty"),
        ("knn,robustness", "can", "further_sets=none.yaml cannot be read"),
    ],
)
def test_what_a_later_task_would_refuse_is_refused_at_once(
    models, colours, tmp_path, monkeypatch, task, name, message
):
    monkeypatch.setattr(Setup, "features", None)
    (tmp_path / "finetuned" / "can").mkdir(parents=True)
    (tmp_path / "finetuned" / "can" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        run_eval.main(options(models, colours, tmp_path, name, task=task, further_sets="none.yaml"))


def test_a_fault_costs_the_task_that_it_meets(models, colours, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(LinearProbe, "run", fail)
    with pytest.raises(OSError, match="the disk is full"):
        run_eval.main(options(models, colours, tmp_path, "can", baselines="none"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["results"]["can"]) == {"knn"}


def test_a_model_named_twice_is_measured_once(models, colours, tmp_path):
    argv = options(models, colours, tmp_path, "can", "can", task="knn", baselines="none")
    argv.insert(3, models["can"] + "/")
    assert list(run_eval.main(argv)["results"]) == ["can"]


def test_a_reference_without_errors_is_told_and_costs_nothing(capsys):
    perfect = {"fog": {"1": 1.0}}
    results = {name: {"robustness": {"by_corruption": perfect}} for name in ("a", "b")}
    compare_corruption(results, "a")
    assert "no corruption errors: reference_model makes no error under fog" in capsys.readouterr().out
    assert "corruption_error" not in results["b"]["robustness"]


def test_processes_that_do_not_know_each_other_are_refused(models, colours, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="2 processes were launched, and each .* ACCELERATE_USE_CPU=true"):
        run_eval.main(options(models, colours, tmp_path, "can"))


@pytest.mark.slow
def test_the_script_ends_with_one_line_for_an_error(models, tmp_path):
    command = [sys.executable, str(ROOT / "run_eval.py"), "--model_name_or_path", "nobody/nothing", "--dataset_name",
               "sample_data", "--output_dir", str(tmp_path)]  # fmt: skip
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert re.search(
        r"^run_eval.py: model_name_or_path=nobody/nothing cannot be loaded: .*hf download", answer.stderr, re.M
    )


def test_every_flag_is_told_by_help(capsys):
    with pytest.raises(SystemExit):
        run_eval.main(["--help"])
    text = capsys.readouterr().out
    for field in (
        *dataclasses.fields(Settings),
        *prefixed(FineTuning, "finetune"),
    ):
        assert f"--{field.name} " in text


# --- A classifier to use ---------------------------------------------------------------------------------------------


def exported(models, colours, out, name, **flags) -> tuple[dict, Path]:
    settings = {"export_classifier": out / "made", "baselines": "none", **flags}
    return run_eval.main(options(models, colours, out, name, **settings)), out / "made"


@pytest.mark.parametrize("name, pooling", [("can", "mean"), ("dinov2", "both")])
def test_a_probe_becomes_a_classifier_that_plain_transformers_loads(models, colours, tmp_path, name, pooling):
    results, folder = exported(models, colours, tmp_path, name, task="knn,linear_probe", pooling=pooling)
    figures = results["results"][name]
    assert figures["exported"]["accuracy"] == figures["linear_probe"]["accuracy"] > 0.9
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Dinov2ForImageClassification"] and "auto_map" not in config
    classify = pipeline("image-classification", str(folder))
    card = ModelCard.load(folder / "README.md")
    assert [example["example_title"] for example in card.data.widget] == NAMES
    for example in card.data.widget:
        assert classify(str(folder / example["src"]))[0]["label"] == example["example_title"]
    assert card.data.pipeline_tag == "image-classification" and card.data.eval_results[0].metric_value > 0.9
    assert not re.search(r"None|nan|{{|\|\s*\|", card.text) and str(tmp_path) not in card.text.split("```bash")[0]


def test_the_snippet_of_a_classifiers_card_runs(models, colours, tmp_path, monkeypatch):
    _, folder = exported(models, colours, tmp_path, "classifier", task="linear_probe")
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(snippet, names)
    assert names["answers"][0]["label"] in NAMES


@pytest.mark.parametrize("name", ["can", "classifier"])
def test_a_fine_tuned_model_becomes_a_classifier(models, colours, tmp_path, name):
    training = dict(finetune_num_epochs=1, finetune_batch_size=16, finetune_base_learning_rate=1e-2)
    results, folder = exported(models, colours, tmp_path, name, task="finetune", **training)
    figures = results["results"][name]
    assert figures["exported"]["accuracy"] == figures["finetune"]["accuracy"]
    assert figures["exported"]["head"] == "fine-tuned"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [("Dinov2" if name == "can" else "ViT") + "ForImageClassification"]


def test_what_cannot_become_a_classifier_is_refused_before_anything_takes_time(models, colours, tmp_path):
    oblong = save(tmp_path / "oblong", CANForPreTraining(tiny_config(image_size=(32, 48))))
    ViTImageProcessorPil(size={"height": 32, "width": 48}).save_pretrained(oblong)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    models = {**models, "oblong": oblong}
    for name, flags, message in (
        ("can", {"task": "knn"}, "export_classifier needs --task linear_probe or finetune; got knn"),
        ("oblong", {"task": "linear_probe"}, "grid of 4 x 6"),
        ("can", {"task": "linear_probe", "export_classifier": tmp_path / "full"}, "full is not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            exported(models, colours, tmp_path, name, **flags)
    with pytest.raises(ValueError, match="export_classifier takes one model"):
        run_eval.main(options(models, colours, tmp_path, "can", "dinov2", export_classifier=tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_a_grey_encoder_becomes_a_classifier_of_colour_pictures(colours, tmp_path):
    path = tmp_path / "grey"
    CANForPreTraining(tiny_config(image_size=32, num_channels=1)).save_pretrained(path)
    grey = {"image_mean": [0.5], "image_std": [0.2], "do_convert_rgb": False}
    ViTImageProcessorPil(size={"height": 32, "width": 32}, **grey).save_pretrained(path)
    results, folder = exported({"grey": str(path)}, colours, tmp_path, "grey", task="linear_probe")
    figures = results["results"]["grey"]
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


def test_what_is_fine_tuned_at_another_shape_is_refused_before_it_takes_time(models, colours, tmp_path):
    with pytest.raises(ValueError, match="makes a grid of 4 x 8"):
        exported(models, colours, tmp_path, "can", task="finetune", image_size="32,64")
    with pytest.raises(ValueError, match="is or holds output_dir"):
        exported(models, colours, tmp_path, "can", task="linear_probe", export_classifier=tmp_path)


@pytest.mark.parametrize("source, flags, is_seen", [
    ({"data_dir": "SET"}, {}, True),
    ({"data_dir": "SET/train"}, {}, False),
    ({"data_dir": "SET/train"}, {"test_size": 0.3}, True),
    ({"data_dir": "SET/../elsewhere"}, {}, False),
    ({"dataset_name": "SET", "dataset_split": "train"}, {}, False),
    ({"dataset_name": "SET", "dataset_split": "train"}, {"test_size": 0.3}, True),
    ({"dataset_name": "SET", "dataset_split": "test"}, {}, True),
    ({"dataset_name": "SET", "dataset_split": "train+test"}, {}, True),
    ({"dataset_name": "SET", "dataset_split": "unlabelled"}, {}, None),
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
def test_test_images_that_pretraining_saw_are_mentioned(models, colours, tmp_path, source, flags, is_seen):
    path = shutil.copytree(models["can"], tmp_path / "can")
    colours = str(shutil.copytree(colours, tmp_path / "colours"))
    recipe = {key: value.replace("SET", colours) for key, value in source.items()}
    if "data_dir" in recipe or "dataset_name" in recipe:
        Path(recipe.get("data_dir") or recipe["dataset_name"]).mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
    settings = parse(options({"can": str(path)}, colours, tmp_path, "can", **flags))[0]
    assert seen_in_pretraining(str(path), settings) is is_seen


def test_remarks_say_what_was_seen_and_what_is_no_better_than_nothing():
    def probe(accuracy):
        return {"linear_probe": {"accuracy": accuracy}}

    results = {
        "models": {
            "mine": {"test_images_seen_without_labels": True},
            "other": {"test_images_seen_without_labels": False},
            "third": {"test_images_seen_without_labels": None},
        },
        "results": {"untrained (mine)": probe(0.5), "mine": probe(0.5), "other": probe(0.6), "pixels": probe(0.9)},
    }
    seen, useless, open_question = report.remarks(results)
    assert seen == "mine was pre-trained on test images too, without their labels"
    assert open_question == "third was pre-trained on a part of this set; whether on test images, is not known"
    assert useless.startswith("mine is no better than untrained (mine) in the linear probe: 50.0 against 50.0 %")


def test_the_classifiers_card_says_what_the_encoder_saw_and_what_others_reach(models, colours, tmp_path, capsys):
    path = shutil.copytree(models["can"], tmp_path / "can")
    (path / "recipe.yaml").write_text(json.dumps({"data_dir": colours}))
    flags = {"task": "linear_probe", "baselines": "untrained,pixels"}
    results, folder = exported({"can": str(path)}, colours, tmp_path, "can", **flags)
    assert "Note: can was pre-trained on test images too" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_args["test_images_seen_without_labels"]
    fresh = 100 * results["results"]["untrained"]["linear_probe"]["accuracy"]
    assert "expect less on others" in card.text and f"untrained {fresh:.1f} %" in card.text
