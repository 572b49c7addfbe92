"""The command as a user runs it, on small models and images: metrics, tables, cards, processes, leaks."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Image, load_dataset
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from testing_utils import NAMES, encoded, launch_evaluation, options, save
from transformers import ConvNextConfig, ConvNextModel, ViTImageProcessorPil, pipeline

import run_eval
from modeling_can.evaluation import (
    command,
    embed,
    entries,
    few_shot,
    finetuning,
    knn,
    linear,
    linear_sgd,
    protocol,
    report,
    robustness,
)
from modeling_can.evaluation.encoders import load_encoder, pooled
from modeling_can.evaluation.entries import load
from modeling_can.evaluation.features import Extractor
from modeling_can.evaluation.preprocessors import Preprocessor
from modeling_can.evaluation.protocol import Setup
from modeling_can.evaluation.retrieval import retrieval_sheet
from modeling_can.evaluation.settings import parse


@pytest.fixture(scope="module")
def measured(models, colors, tmp_path_factory):
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
    argv = options(copies, colors, out / "out", "can", "dinov2", task="knn,linear_probe,few_shot,retrieval",
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
    assert results["results"]["pixels"]["linear_probe"]["accuracy"] > 0.9  # the color is the class
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
    for image in ("evaluation.png", "retrieval-can.png", "retrieval-dinov2.png"):
        assert (out / "out" / "figures" / image).stat().st_size > 5000


def test_the_card_keeps_what_it_had_and_says_each_result_once(measured):
    out, argv, results = measured
    run_eval.main([*argv, "--seed=0"])
    card = ModelCard.load(out / "can" / "README.md")
    assert "Text." in card.text and card.data.license == "mit" and card.data.model_name == "mine"
    elsewhere = [r for r in card.data.eval_results if r.dataset_name == "elsewhere"]
    assert [r.metric_value for r in elsewhere] == [0.5]
    ours = {r.metric_name: r for r in card.data.eval_results if r.dataset_name == "colors"}
    assert len(ours) == len(card.data.eval_results) - 1 == len(report.measures(results["results"]["can"]))
    assert ours["linear probe"].metric_value == round(results["results"]["can"]["linear_probe"]["accuracy"], 4)
    assert ours["linear probe"].dataset_split == "test"
    few = results["results"]["can"]["few_shot"]["5"]  # its interval, not its spread
    assert ours["5 a class"].metric_args["interval_95"] == [round(end, 4) for end in few["interval"]]
    assert str(out) not in (out / "can" / "README.md").read_text()
    made = ModelCard.load(out / "dinov2" / "README.md")  # it had none
    assert made.data.model_name == "dinov2" and made.data.library_name == "transformers"


def test_a_model_that_is_only_the_reference_keeps_its_card(models, colors, tmp_path):
    copies = {name: str(shutil.copytree(models[name], tmp_path / name)) for name in ("can", "dinov2")}
    flags = {"task": "knn", "baselines": "none", "reference_model": copies["dinov2"], "update_card": "true"}
    run_eval.main(options(copies, colors, tmp_path / "out", "can", **flags))
    assert (tmp_path / "can" / "README.md").exists() and not (tmp_path / "dinov2" / "README.md").exists()


def test_sheets_of_features_need_no_right_labels(models, colors, tmp_path, capsys):
    convnext = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    models = models | {"convnext": save(tmp_path / "convnext", convnext)}
    drawn = {}
    for kind in ("right", "wrong"):
        if kind == "wrong":
            (tmp_path / "set").mkdir()
            for split in ("train", "test"):
                rows = load_dataset(colors, split=split)
                rows = (
                    rows.add_column("other", rows["label"][::-1])
                    .remove_columns("label")
                    .rename_column("other", "label")
                )
                rows.to_parquet(tmp_path / "set" / f"{split}-00000.parquet")
            colors = str(tmp_path / "set")
        results = run_eval.main(options(models, colors, tmp_path / kind, "can", "dinov2", "convnext", task="features"))
        folder, output = tmp_path / kind / "figures", capsys.readouterr().out
        assert set(results["results"]) == {"can", "dinov2", "convnext"}
        for name, figures in results["results"].items():
            path = folder / f"features-{name}.png"
            assert figures == {"features": {"figure": str(path)}} and str(path) in output
            drawn.setdefault(name, []).append(path.read_bytes())
    widths = {name: PILImage.open(folder / f"features-{name}.png").width for name in drawn}
    assert widths["can"] == widths["dinov2"] > 1.4 * widths["convnext"]  # no attention there
    assert all(right == wrong for right, wrong in drawn.values())


def test_a_pretraining_run_is_not_written_over(models, colors, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 0")
    for flags in ({"task": "knn"}, {"task": "embed"}):
        with pytest.raises(ValueError, match="holds a pre-training run, whose results.json this would replace"):
            run_eval.main(options(models, colors, tmp_path, "can", **flags))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_images_are_decoded_as_in_pretraining(models, colors, tmp_path):
    twelve_bits = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    PILImage.fromarray(twelve_bits).save(tmp_path / "12.png")
    means = []
    for trained, flags in (({}, {}), ({"high_bit_depth": "stretch"}, {}), ({}, {"high_bit_depth": "stretch"})):
        path = str(shutil.copytree(models["can"], tmp_path / "can", dirs_exist_ok=True))
        size = {"height": 32, "width": 32}
        Preprocessor(ViTImageProcessorPil(size=size, **trained)).save_pretrained(path)
        settings = parse(options({"can": path}, colors, tmp_path, "can", **flags))[0]
        preprocessor = load(path, settings).preprocessor
        preprocessor.save_pretrained(tmp_path / "again")  # beside what is fine-tuned or exported
        assert Preprocessor(ViTImageProcessorPil.from_pretrained(tmp_path / "again")).decoding == preprocessor.decoding
        means.append(preprocessor.decode((tmp_path / "12.png").read_bytes()).float().mean())
    assert means[0] < 10 and means[1] == means[2] and 120 < means[1] < 135
    with pytest.raises(ValueError, match="high_bit_depth='strech' is not one of full_range, stretch, skip"):
        parse(options(models, colors, tmp_path, "can", high_bit_depth="strech"))


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
def test_features_are_pooled_as_asked(models, colors, tmp_path, monkeypatch, pooling, width):
    widths = []
    original = knn.knn_predictions

    def spy(train, *arguments, **options):
        widths.append(train.shape[1])
        return original(train, *arguments, **options)

    monkeypatch.setattr(knn, "knn_predictions", spy)
    argv = options(models, colors, tmp_path, "can", task="knn", pooling=pooling)
    results = run_eval.main(argv)
    assert widths == [3 * 32 * 32, width, width] and results["pooling"] == pooling


def test_a_pooling_is_named_where_features_were_pooled():
    of = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    figures = {
        "knn": {"20": of}, "linear_probe": of, "few_shot": {"5": {**of, "std": 0.1}}, "finetune": of,
        "linear_probe_sgd": {**of, "pooling": "both"}, "exported": {**of, "head": "fine-tuned"},
        "retrieval": {"precision": 0.5, "interval": [0.4, 0.6], "neighbors": 7},
        "robustness": {**of, "clean": of, "head": "own classifier"},
    }  # fmt: skip
    poolings = {heading: measure.pooling for heading, measure in report.measures(figures, "cls").items()}
    frozen = ("k-NN, k = 20", "linear probe", "5 a class", "of 7 neighbors right")
    trained = ("fine-tuned", "exported classifier", "corrupted", "clean, same classifier")
    assert poolings == {**dict.fromkeys(frozen, "cls"), **dict.fromkeys(trained, "mean"), "linear probe, SGD": "both"}


def test_a_model_has_one_color_and_names_are_shown_as_they_are(tmp_path, monkeypatch):
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
    image, right = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), np.ones((1, 1), bool)
    retrieval_sheet(image, image[:, None], right, ["$100%$"], tmp_path / "sheet.png")


def test_another_batch_size_and_loader_workers_change_nothing(models, colors, tmp_path):
    figures = []
    for batch_size, workers in ((7, 1), (64, 0)):
        argv = options(
            models, colors, tmp_path, "can", task="knn,linear_probe", baselines="none", feature_cache="none"
        )
        argv += [f"--batch_size={batch_size}", f"--dataloader_num_workers={workers}"]
        figures.append(run_eval.main(argv)["results"]["can"])
    assert figures[0] == figures[1]


# --- No leak ---------------------------------------------------------------------------------------------------------


def test_nothing_that_is_learned_or_chosen_depends_on_the_test_labels(models, colors, tmp_path, monkeypatch):
    """With the test labels planted otherwise, every prediction is the same."""
    planted = tmp_path / "planted"
    shutil.copytree(colors, planted)
    test = load_dataset("parquet", data_files={"test": f"{colors}/test-*.parquet"})["test"]
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
    for name, folder in {"true": colors, "planted": str(planted)}.items():
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


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(models, colors, tmp_path):
    pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')
    results = []
    for num_processes in (1, 2):
        argv = options(models, colors, tmp_path / str(num_processes), "can", batch_size=8, baselines="pixels",
                       task="knn,linear_probe,few_shot,linear_probe_sgd,robustness,reconstruction,retrieval",
                       shots=5, corruptions="noise", sgd_num_epochs=2, sgd_batch_size=30)  # fmt: skip
        results.append(launch_evaluation(argv, num_processes))
    one, two = results
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for name in ("retrieval", "reconstruction"):
        assert one["results"]["can"][name].pop("figure") != two["results"]["can"][name].pop("figure")
    sgd = [result["results"]["can"].pop("linear_probe_sgd") for result in results]
    assert one["results"] == two["results"]  # to the last digit; SGD's batches are encoded in halves:
    assert [head["held_out_accuracy"] for head in sgd[0]["heads"]] == [
        head["held_out_accuracy"] for head in sgd[1]["heads"]
    ]
    assert sgd[0]["accuracy"] == sgd[1]["accuracy"]


# --- Fine-tuning and embedding through the script --------------------------------------------------------------------


def test_a_fine_tuned_model_is_measured_and_goes_into_the_pipeline(models, colors, tmp_path):
    flags = {"finetune_num_epochs": 40, "finetune_batch_size": 30, "finetune_base_learning_rate": 0.02,
             "finetune_warmup_ratio": 0.1, "finetune_randaugment_magnitude": 0, "finetune_mixup_alpha": 0,
             "finetune_random_erasing_probability": 0, "finetune_cutmix_alpha": 0,
             "finetune_drop_path_rate": 0}  # fmt: skip
    argv = options(models, colors, tmp_path, "can", task="finetune", **flags)
    figures = run_eval.main(argv)["results"]["can"]["finetune"]
    assert figures["accuracy"] > 0.7
    classify = pipeline("image-classification", model=figures["folder"])
    test = load_dataset("parquet", data_files=f"{colors}/test-*.parquet")["train"]
    right = [classify(row["image"])[0]["label"] == NAMES[row["label"]] for row in test]
    assert np.mean(right) == pytest.approx(figures["accuracy"])
    measured = {"classifier": figures["folder"]}  # and is measured as any other model, by its own classifier
    pytest.importorskip("imagecorruptions", reason='needs pip install "modeling-can[robustness]"')
    argv = options(
        measured, colors, tmp_path / "b", "classifier", task="robustness", corruptions="noise", baselines="none"
    )
    robustness = run_eval.main(argv)["results"]["can"]["robustness"]
    assert robustness["head"] == "its own classifier"
    assert robustness["clean"]["accuracy"] == figures["accuracy"]
    with pytest.raises(ValueError, match="finetuned/can is not empty"):
        run_eval.main(options(models, colors, tmp_path, "can", task="finetune", **flags))


def test_embeddings_of_a_folder_tell_what_was_left_out(models, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.png").write_bytes(encoded((1, 2, 3)))
    (tmp_path / "p" / "2.heic").write_bytes(b"")
    argv = ["--model_name_or_path", models["can"], "--task=embed", f"--data_dir={tmp_path}/p"]
    results = run_eval.main([*argv, f"--output_dir={tmp_path}/out"])
    assert results["embed"]["num_images"] == 1 and results["left_out"] == {".heic": 1}
    assert f"data_dir={tmp_path}/p: reads 1 images; left out: 1 .heic" in capsys.readouterr().out


@pytest.mark.parametrize("images_a_shard, num_files", [(1000, 1), (5, 3)])
def test_the_embeddings_of_few_images_in_a_folder_are_in_few_files(
    models, tmp_path, monkeypatch, images_a_shard, num_files
):
    monkeypatch.setattr(embed, "_FOLDER_SHARD", images_a_shard)
    (tmp_path / "p").mkdir()
    for number in range(12):
        (tmp_path / "p" / f"{number}.png").write_bytes(encoded((20 * number, 2, 3)))
    argv = ["--model_name_or_path", models["can"], "--task=embed", f"--data_dir={tmp_path}/p"]
    assert run_eval.main([*argv, f"--output_dir={tmp_path}/out"])["embed"]["files"] == num_files
    rows = load_dataset("parquet", data_files=f"{tmp_path}/out/part-*.parquet", split="train")
    assert sorted(rows["id"]) == sorted(f"{tmp_path}/p/{number}.png" for number in range(12))


def test_embeddings_are_those_of_the_model(models, colors, tmp_path):
    argv = ["--model_name_or_path", models["can"], "--task=embed", f"--data_files={colors}/test-*.parquet",
            f"--output_dir={tmp_path}", "--embedding_dtype=float32", "--pooling=both", "--batch_size=8"]  # fmt: skip
    results = run_eval.main(argv)
    assert results["embed"]["num_images"] == 31 and results["embed"]["done"]
    rows = load_dataset("parquet", data_files=f"{tmp_path}/part-*.parquet")["train"].with_format("numpy")
    assert rows.column_names == ["id", "label", "embedding"] and rows["embedding"][:].shape == (31, 64)
    encoder = load_encoder(models["can"])
    test = load_dataset("parquet", data_files=f"{colors}/test-*.parquet")["train"].cast_column(
        "image", Image(decode=False)
    )
    with torch.no_grad():
        prepared = torch.stack([encoder.preprocessor.decode(row["image"]["bytes"]) for row in test])
        expected = pooled(encoder(encoder.preprocessor.normalize(prepared)), "both", "can")
    order = np.argsort([int(name.split(":")[1]) for name in rows["id"][:]])
    np.testing.assert_allclose(rows["embedding"][:][order], expected, atol=1e-5)
    assert rows["label"][:][order].tolist() == test["label"][:]
    assert run_eval.main(argv)["embed"]["new_images"] == 0


def test_other_preprocessing_or_precision_makes_other_features(models, colors, tmp_path, monkeypatch):
    made, counts, extract = [], [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda *a: made.append(1) or extract(*a))
    for flags in ({}, {}, {"image_size": 48}, {"mixed_precision": "bf16"}):
        AcceleratorState._reset_state(True)
        run_eval.main(options(models, colors, tmp_path, "can", task="knn", baselines="none", **flags))
        counts.append(len(made))
    AcceleratorState._reset_state(True)
    assert counts == [2, 2, 4, 6]  # training and test images


def test_the_seed_reaches_what_is_trained(models, colors, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    seeds = []
    for task, module in (("finetune", finetuning), ("linear_probe_sgd", linear_sgd)):
        function = getattr(module, task)

        def spy(*arguments, function=function, **keywords):
            seeds.append(inspect.signature(function).bind(*arguments, **keywords).arguments["seed"])
            raise Enough

        monkeypatch.setattr(module, task, spy)
        with pytest.raises(Enough):
            run_eval.main(options(models, colors, tmp_path, "can", task=task, seed=7))
    assert seeds == [7, 7]


def test_the_seed_reaches_all_that_is_drawn(models, colors, tmp_path, monkeypatch):
    pytest.importorskip("imagecorruptions")
    seeds = {}
    where = {"load_labeled": command, "few_shot_predictions": few_shot, "linear_probe": linear,
             "bootstrap_interval": protocol, "untrained": entries}  # fmt: skip
    for name, module in where.items():
        function = getattr(module, name)

        def spy(*arguments, name=name, function=function, **keywords):
            bound = inspect.signature(function).bind(*arguments, **keywords)
            bound.apply_defaults()
            seeds.setdefault(name, set()).add(bound.arguments["seed"])
            return function(*arguments, **keywords)

        monkeypatch.setattr(module, name, spy)
    corrupted = []

    class Spied(robustness.Corrupted):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            corrupted.append(self.seed)

    monkeypatch.setattr(robustness, "Corrupted", Spied)
    run_eval.main(options(models, colors, tmp_path, "can", task="few_shot,linear_probe,robustness", shots=2, seed=7,
                          num_draws=2, test_size=0.3, corruptions="noise", baselines="untrained"))  # fmt: skip
    assert len(seeds) == 5 and all(values == {7} for values in seeds.values()), seeds
    assert corrupted[-1] == 7  # the first only checks
