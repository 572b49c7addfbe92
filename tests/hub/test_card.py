"""Model cards: every figure from recipe and results, nothing empty, for every kind of run; and the committed ones."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from safetensors import safe_open
from testing_utils import KEPT, ROOT, TINY, free_port
from transformers import AutoImageProcessor

from experiments.quickstart import card as quickstart_card
from modeling_can import CANConfig, CANForPreTraining, CANModel
from modeling_can.configuration_can import MAE, SIMCLR
from modeling_can.evaluation.knn import knn_predictions
from modeling_can.hub import update_card, write_card
from modeling_can.pretraining.builders import image_processor
from modeling_can.pretraining.recipe import Recipe, parse_arguments
from modeling_can.progress import duration


CARDS = sorted(path.parent for path in ROOT.glob("model_cards/*/recipe.yaml"))
UNTRAINED = [folder for folder in CARDS if folder.name.startswith("can-vit")]


def probed(knn: float, linear_probe: float) -> dict:
    return {
        "num_test": 5417,
        "knn": knn,
        "knn_interval": [knn - 0.0123, knn + 0.0345],
        "linear_probe": linear_probe,
        "linear_probe_interval": [linear_probe - 0.0234, linear_probe + 0.0456],
    }


RESULTS = {
    "command": ["run_pretraining.py", "--data_dir", "my photos", "--output_dir=it's"],
    "num_images": 76_543,
    "seed": 5678,
    "num_parameters": 8_765_432,
    "frozen": [],
    "num_processes": 1,
    "global_batch_size": 1736,
    "num_steps": 34_567,
    "warmup_steps": 1234,
    "learning_rate": 0.00345,
    "mixed_precision": "no",
    "machine": "some CPU, 16 threads",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "git_commit": None,
    "flops_per_image": 6.7e9,
    "train_flops": 9.3e17,
    "final_losses": {"contrastive_loss": 2.3456, "reconstruction_loss": 0.1678, "loss": 0.4783},
    "health": ["healthy"],
    "images_per_second": 4321.0,
    "data_wait": 0.0765,
    "peak_memory": 7_654_321_000,
    "bad_samples": {},
    "nonfinite_steps": 0,
    "train_seconds": 13_800.0,
    "total_seconds": 19_500.0,
}
PROBE = {
    "raw pixels": probed(0.3141, 0.3592),
    "untrained encoder": probed(0.4265, 0.4789),
    "CAN, pre-trained": probed(0.6932, 0.7238),
}
RUNS = {  # recipe, results
    "sample data, probed": ({"dataset_name": "sample_data", "probe_dataset_name": "sample_data"}, {"probe": PROBE}),
    "sample data, warm start": ({"dataset_name": "sample_data", "model_name_or_path": "facebook/vit-mae-base"}, {}),
    "a folder, one layer": (
        {"data_dir": "my photos", "num_hidden_layers": 1, "num_attention_heads": 1},
        {"git_commit": "0123abc-dirty"},
    ),
    "Hub data, 4 processes, bad images": (
        {"dataset_name": "ILSVRC/imagenet-1k", "probe_dataset_name": "uoft-cs/cifar10"},
        {"num_processes": 4, "mixed_precision": "bf16", "bad_samples": {"truncated": 1371, "empty": 2}, "probe": PROBE}
        | {"health": ["the embeddings have collapsed", "the device waits for data 45% of the time"]},
    ),
    "resumed, steps left out": (
        {"data_files": ["a-*.parquet", "b.parquet"], "on_nonfinite": "skip"},
        {"command": ["run_pretraining.py", "--resume_from_checkpoint", "latest"], "nonfinite_steps": 3}
        | {"final_losses": {}, "total_seconds": 600.0},
    ),
    "SimCLR": ({"data_dir": "x", **SIMCLR}, {"frozen": ["decoder"], "num_images": None}),
    "gray MAE": (
        {"data_dir": "x", **MAE, "num_channels": 1, "image_mean": [0.5], "image_std": [0.2]},
        {"frozen": ["projection_head"]},
    ),
    "built in Python": ({"probe_dataset_name": "uoft-cs/cifar10"}, {"num_images": None, "probe": PROBE}),
}


def made(folder: Path, settings: dict, changes: dict) -> tuple[ModelCard, Recipe, dict]:
    """The card of such a run."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    recipe = Recipe.from_dict({"max_steps": 5, **TINY, "image_size": [32, 48], **settings})
    results = {**copy.deepcopy(RESULTS), **copy.deepcopy(changes)}
    write_card(folder, recipe.to_dict(), recipe.config, results, recipe.repo_id if recipe.push_to_hub else None)
    return ModelCard.load(folder / "README.md"), recipe, results


def tables(text: str) -> list[list[str]]:
    """The rows of all tables, without their rulers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if set(line) - set("|- ")]


def leaves(tree, path=()) -> list[tuple[tuple, object]]:
    """Every value in nested dicts and lists, and the way to it."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return [(path, tree)]


def test_the_license_is_what_the_recipe_says(tmp_path):
    card, _, _ = made(tmp_path, {"data_dir": "x", "license": "cc-by-4.0"}, {})
    assert card.data.license == "cc-by-4.0" and "`cc-by-4.0`, as stated by those who trained the model" in card.text
    card, _, _ = made(tmp_path, {"data_dir": "x"}, {})
    assert card.data.license is None and "Not stated." in card.text


@pytest.mark.parametrize("name", RUNS)
def test_nothing_in_a_card_is_empty(tmp_path, name):
    card, recipe, results = made(tmp_path / "mine", *RUNS[name])
    text = str(card)
    empty = r"\bNone\b|\bnan\b|\binf\b|\{\}|\[\]|\{\{|\}\}|\{%|''|(?<!\w)\( *\)|, *,| , | \. |: *\n\n(?!```)"
    assert re.search(empty, text) is None and re.search(r"(?<![\d,.])1 (layers|heads|processes|images)", text) is None
    rows = tables(card.text)
    assert len(rows) >= 12 and all(cell for row in rows for cell in row)
    sections = re.split(r"^## .*\n", card.text, flags=re.MULTILINE)
    assert all(section.strip() for section in sections)
    headings = re.findall(r"^## (.*)", card.text, flags=re.MULTILINE)
    assert headings == ["Use", "Intended use and limits", "Results", "Training", "Health", "Reproduce", "License",
                        "Citation"]  # fmt: skip
    assert text.count("```") % 2 == 0 and card.text.lstrip().startswith("# mine\n")
    for sentence in results["health"]:
        assert f"- {sentence}\n" in card.text
    assert ("reconstructions.png" in text) == recipe.config.uses_decoder == ("output.logits" in text)
    assert "(figures/features.png)" in text
    assert ("pipeline(" in text) == (recipe.config.num_channels == 3)


@pytest.mark.parametrize("name", RUNS)
def test_the_front_matter_says_what_is_known(tmp_path, name):
    card, recipe, results = made(tmp_path / "mine", *RUNS[name])
    known = card.data.to_dict()
    assert known["library_name"] == "transformers" and known["pipeline_tag"] == "image-feature-extraction"
    assert known.get("license") == ("apache-2.0" if name == "sample data, probed" else None)
    assert ("Apache-2.0" in card.text) == ("license" in known) != ("Not stated" in card.text)
    assert known.get("datasets") == ("ILSVRC/imagenet-1k" if name.startswith("Hub data") else None)
    assert known.get("base_model") == recipe.model_name_or_path
    assert ("model-index" in known) == ("probe" in results) != ("Not evaluated" in card.text)
    if "probe" in results:
        ours = {result.metric_name: result for result in card.data.eval_results}
        assert card.data.model_name == "mine" and set(ours) == {"k-NN, k = 20", "linear probe"}
        assert ours["k-NN, k = 20"].metric_value == 0.6932
        assert ours["linear probe"].metric_args == {"interval_95": [0.7004, 0.7694], "num_test_images": 5417}
        assert {result.dataset_name for result in ours.values()} == {recipe.probe_dataset_name}


def test_local_names_are_not_taken_for_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "weights"):
        (tmp_path / name).mkdir()
    card, _, _ = made(tmp_path / "mine", {"dataset_name": "pictures", "model_name_or_path": "weights"}, {})
    assert card.data.datasets is None and card.data.base_model is None
    assert "`pictures`" in card.text and "the weights of `weights`" in card.text


def test_the_time_of_a_resumed_run_is_not_that_of_its_last_start(tmp_path):
    card, *_ = made(tmp_path / "a", *RUNS["resumed, steps left out"])
    assert "3 h 50 min of training, in several starts" in card.text and "10 min in all" not in card.text
    card, *_ = made(tmp_path / "b", *RUNS["a folder, one layer"])
    assert "3 h 50 min of training, 5 h 25 min in all" in card.text


def test_every_figure_in_the_tables_is_one_of_the_results_or_the_recipe(tmp_path):
    """Each number, undone its factor and rounding, is found in them."""
    for index, (settings, changes) in enumerate(RUNS.values()):
        card, recipe, results = made(tmp_path / str(index), settings, changes)
        values = [value for _, value in leaves([results, recipe.to_dict(), recipe.config.patch_shape])]
        words = [value for value in values if isinstance(value, str)]
        words += [duration(results[name]) for name in ("train_seconds", "total_seconds")]
        figures = [value for value in values if isinstance(value, int | float)]
        figures.append(results["peak_memory"] / 1e9)  # shown in GB
        for row in tables(card.text):
            said = " ".join(row[1:])
            for word in sorted(words, key=len, reverse=True):
                said = said.replace(word, "")
            for number in re.findall(r"\d[\d,]*\.?\d*(?:e-?\d+)?", said.replace(", ", " ; ")):
                mantissa, _, exponent = number.replace(",", "").partition("e")
                decimals = len(mantissa.partition(".")[2])
                rounding = 0.501 * 10.0 ** (int(exponent or 0) - decimals)
                shown = float(number.replace(",", ""))
                assert any(abs(factor * f - shown) <= rounding for f in figures for factor in (1, 100)), (row, number)


def test_every_result_is_in_the_card(tmp_path):
    """A result that is changed changes the card; those few that are left out are named here."""
    settings, changes = RUNS["Hub data, 4 processes, bad images"]
    changes = {**changes, "frozen": ["decoder"], "git_commit": "0123abc"}
    reference, _, results = made(tmp_path / "mine", settings, changes)
    unseen = set()
    for path, value in leaves(results):
        changed = copy.deepcopy(results)
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = f"{value}-changed" if isinstance(value, str) else value * 2 + 1
        card, _, _ = made(tmp_path / "mine", settings, changed)
        if str(card) == str(reference):
            unseen.add(path[0] if path[0] != "probe" else path)
    baselines = {("probe", name, "num_test") for name in ("raw pixels", "untrained encoder")}  # the same for all
    assert unseen == {"warmup_steps", "data_wait"} | baselines


@pytest.mark.parametrize("num_processes", [1, 4])
def test_the_command_is_the_one_that_was_typed(tmp_path, num_processes):
    card, _, results = made(tmp_path / "mine", {"data_dir": "my photos"}, {"num_processes": num_processes})
    training = card.text.split("## Training")[1].split("## Health")[0]
    words = shlex.split(re.search(r"```bash\n(.*?)```", training, re.DOTALL).group(1))
    assert words[-4:] == RESULTS["command"]
    launch = ["python"] if num_processes == 1 else ["accelerate", "launch", "--multi_gpu", "--num_processes", "4"]
    assert words[:-4] == launch
    assert ("not recorded" in training) == (num_processes > 1)


# --- Metrics of modeling-can eval ------------------------------------------------------------------------------------


def result(name: str, value: float, dataset: str = "flowers", interval: list | None = None) -> EvalResult:
    return EvalResult("image-classification", dataset, dataset, "accuracy", value, metric_name=name,
                      dataset_split="test", metric_args={"interval_95": interval} if interval else None)  # fmt: skip


def test_later_metrics_are_shown_in_the_text_once(tmp_path):
    folder = tmp_path / "mine"
    before, _, _ = made(folder, *RUNS["sample data, probed"])
    update_card(str(folder), [result("k-NN, k = 20", 0.5, interval=[0.4, 0.6]), result("5 a class", 0.25)])
    update_card(str(folder), [result("k-NN, k = 20", 0.75, interval=[0.7, 0.8])])
    once = (folder / "README.md").read_text()
    update_card(str(folder), [result("k-NN, k = 20", 0.75, interval=[0.7, 0.8])])
    assert (folder / "README.md").read_text() == once
    card = ModelCard.load(folder / "README.md")
    shown = [row for row in tables(card.text) if row not in tables(before.text)]
    assert shown == [
        ["data", "split", "metric", "value"],
        ["flowers", "test", "5 a class", "0.25"],
        ["flowers", "test", "k-NN, k = 20", "0.75 (0.7 to 0.8)"],
    ]
    outside = re.sub(r"(<!-- evaluation.*?-->\n).*?(<!-- end)", r"\1\2", card.text, flags=re.DOTALL)
    assert outside == before.text and len(card.data.eval_results) == 4  # the trainer's probe has its own table
    assert card.text.index("## Results") < card.text.index("| flowers") < card.text.index("## Training")


def test_advice_is_kept_for_each_data_set_and_said_once(tmp_path):
    for data, advice in {"a": "Worth it: x", "b": "Not known yet: y"}.items():
        update_card(str(tmp_path), [result("linear probe", 0.5)], {data: advice})
    update_card(str(tmp_path), [result("linear probe", 0.5)], {"a": "Not worth it yet: z"})
    once = (tmp_path / "README.md").read_text()
    update_card(str(tmp_path), [result("linear probe", 0.5)])
    assert (tmp_path / "README.md").read_text() == once and "Worth it: x" not in once
    assert "\n\nAdvice for `a`: Not worth it yet: z\n\nAdvice for `b`: Not known yet: y\n<!-- end" in once


def test_a_card_of_others_gets_the_figures_at_its_end(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n\nTheir text.\n")
    update_card(str(tmp_path), [result("linear probe", 0.5)])
    once = (tmp_path / "README.md").read_text()
    update_card(str(tmp_path), [result("linear probe", 0.5)])
    assert (tmp_path / "README.md").read_text() == once and "license: mit" in once
    assert "Their text.\n\n## Evaluation\n" in once and once.count("| flowers | test | linear probe | 0.5 |") == 1


# --- Snippets --------------------------------------------------------------------------------------------------------


def shipped(folder: Path, name: str) -> list[str]:
    """A model as a run leaves it, with a photograph beside it; the snippets of its card."""
    card, recipe, _ = made(folder, *RUNS[name])
    torch.manual_seed(0)
    CANForPreTraining(recipe.config).save_pretrained(folder)
    image_processor(recipe).save_pretrained(folder)
    Image.effect_noise((70, 60), 60).convert("RGB").save(folder / "photo.jpg")
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


@pytest.mark.parametrize("name, num_snippets", [("gray MAE", 2), ("SimCLR", 3)])
def test_the_snippets_run(tmp_path, monkeypatch, name, num_snippets):
    """Those of the default objective: tests/pretraining/test_loop.py."""
    snippets, scope = shipped(tmp_path, name), {}
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(snippet, scope)
    assert len(snippets) == num_snippets and scope["embedding"].shape == (1, 32)
    assert scope["output"].loss.isfinite() and ("predicted" in scope) == (name == "gray MAE")


@pytest.mark.slow
def test_the_snippets_run_where_this_package_is_not_installed(tmp_path):
    snippets = shipped(tmp_path / "shipped", "sample data, probed")
    blocked = """
import sys
class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "modeling_can":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked)
"""
    code = "\n".join([blocked, *snippets, "print(tuple(embedding.shape), len(pooled[0]), predicted.shape[1])"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "shipped",
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.stdout.strip().endswith("(1, 32) 32 192"), answer.stderr


@pytest.mark.slow
def test_the_commands_in_the_card_of_several_processes_run(tmp_path):
    """The repetition, which must end with the same losses, and the evaluation."""

    def run(command: str):
        command = command.replace("--num_processes 2", f"--num_processes 2 --main_process_port {free_port()}")
        answer = subprocess.run(
            command,
            shell=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def losses(folder: str) -> dict:
        return json.loads((tmp_path / folder / "results.json").read_text())["final_losses"]

    (tmp_path / "my photos").mkdir()
    for index in range(24):
        Image.effect_noise((60, 50), 60).convert("RGB").save(tmp_path / "my photos" / f"{index}.png")
    options = {"data_dir": tmp_path / "my photos", "output_dir": tmp_path / "out", "max_steps": 2, "image_size": 32,
               "per_device_train_batch_size": 4, "probe_dataset_name": "none", "log_with": "none", "hidden_size": 32,
               "num_hidden_layers": 1, "num_attention_heads": 2, "dataloader_num_workers": 0}  # fmt: skip
    words = shlex.join(f"--{name}={value}" for name, value in options.items())
    typed = f"accelerate launch --multi_gpu --num_processes 2 run_pretraining.py {words}"
    run(typed)
    card = (tmp_path / "out" / "README.md").read_text()
    evaluate, train, again = re.findall(r"```bash\n(.*?)\n```", card, re.DOTALL)
    assert train == typed
    run(again.replace("FOLDER", str(tmp_path / "out")).replace("NEW", str(tmp_path / "new")))
    assert losses("new") == pytest.approx(losses("out"), rel=1e-5)
    evaluate = evaluate.replace("FOLDER", str(tmp_path / "out")).replace("LABELED_SET", "sample_data")
    run(f"{evaluate} --output_dir {tmp_path / 'eval'} --feature_cache none --task knn --baselines none")
    measured = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert "k-NN, k = 20" in {entry.metric_name for entry in measured}


# --- The committed cards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_every_recipe_has_a_card(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-feature-extraction"
    assert f"# {folder.name}\n" in card.text


@pytest.mark.parametrize("folder", UNTRAINED, ids=lambda folder: folder.name)
def test_a_card_without_results_claims_nothing(folder):
    card = ModelCard.load(folder / "README.md")
    recipe = parse_arguments([str(folder / "recipe.yaml")], "")
    assert "**No results yet.**" in card.text
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "datasets"}  # no license where no weights are
    assert card.data.datasets == [recipe.dataset_name] and "#" not in card.text.replace(f"# {folder.name}", "")
    command = f"accelerate launch -m modeling_can pretrain {folder.name} --output_dir"
    assert re.findall(r"```bash\n(.*?)```", card.text, re.DOTALL) == [f"{command} {recipe.output_dir}\n"]
    text = card.text.replace("2210.16870", "").replace(folder.name, "").replace("ImageNet-1k", "")
    assert set(re.findall(r"\d+", text)) == {str(recipe.config.image_size), str(recipe.config.patch_size)}


def test_the_quickstarts_card_is_its_results():
    folder = ROOT / "model_cards" / "can-quickstart"
    card, runs = (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())
    rows = {row[0]: row[1:] for row in tables(card)}
    for name in runs[0]["probe"]:
        for column, probe in enumerate(("knn", "linear_probe")):
            values = [100 * run["probe"][name][probe] for run in runs]
            assert list(map(float, re.findall(r"[\d.]+", rows[name][column]))) == pytest.approx(
                [sum(values) / len(values), *values], abs=0.0501
            )
    assert quickstart_card(runs) == card
    assert all(run["health"][0].startswith("healthy") and run["noise_weaker_by"]["uniform"] > 1 for run in runs)
    assert [run["seed"] for run in runs] == [0, 1, 2]
    assert all(re.fullmatch("[0-9a-f]{40}", run["git_commit"]) for run in runs), "run from a clean commit"
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"


# --- The model that is kept ------------------------------------------------------------------------------------------


def test_the_kept_model_loads_in_full_and_is_small():
    model, loading = CANForPreTraining.from_pretrained(KEPT, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.dtype == torch.float32
    assert (KEPT / "model.safetensors").stat().st_size < 16 * 2**20
    with safe_open(KEPT / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())


@pytest.mark.slow
def test_the_kept_model_tells_pictures_apart_that_it_has_not_seen():
    """Which photograph is a bundled tile from? Better than the same encoder untrained."""
    tiles = datasets.load_dataset("parquet", data_dir=str(ROOT / "modeling_can" / "data" / "sample_data"))
    processor = AutoImageProcessor.from_pretrained(KEPT)
    torch.manual_seed(0)
    accuracy = []
    for model in (CANModel.from_pretrained(KEPT), CANModel(CANConfig.from_pretrained(KEPT))):
        features = {}
        for split in ("train", "test"):
            some = tiles[split].shuffle(seed=0).select(range(600))
            with torch.inference_mode():
                pixels = processor(list(some["image"]), return_tensors="pt").pixel_values
                features[split] = model.eval()(pixels).pooler_output.numpy(), np.array(some["label"])
        (train, labels), (test, answers) = features.values()
        accuracy.append((knn_predictions(train, labels, test, 12)[20] == answers).mean())
    assert accuracy[0] > accuracy[1] + 0.05, accuracy


def test_the_kept_models_card_is_its_evaluation():
    figures = json.loads((KEPT / "evaluation.json").read_text())
    results = figures["results"][KEPT.name]
    shown = {entry.metric_name: entry.metric_value for entry in ModelCard.load(KEPT / "README.md").data.eval_results}
    assert shown["k-NN, k = 20"] == round(results["knn"]["20"]["accuracy"], 4)
    assert shown["linear probe"] == round(results["linear_probe"]["accuracy"], 4)
    assert re.fullmatch(r"[0-9a-f]{40}", figures["git_commit"]) and figures["machine"] and figures["command"]
    for name in ("README.md", "recipe.yaml", "results.json", "evaluation.json", "config.json"):
        assert not re.search(r"/(root|work|tmp|home)/", (KEPT / name).read_text()), name
