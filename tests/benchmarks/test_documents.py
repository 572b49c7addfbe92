"""Every figure of the documents is in a JSON that says where it comes from."""

import json
import re
import sys

import pytest
from testing_utils import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))
import fill_documents  # noqa: E402

from experiments.cifar10 import runs  # noqa: E402


MOVED = {"benchmarks/claims.yaml": "experiments/cifar10/recipe.yaml"}  # commands name files as they were called then


@pytest.mark.parametrize("name", fill_documents.DOCUMENTS)
def test_documents_hold_the_figures_of_the_jsons(name):
    text = (ROOT / name).read_text()
    assert fill_documents.filled_in(text) == text, "python benchmarks/fill_documents.py rewrites them"


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text()
    figures = next(fill_documents.SECTION.finditer(text))[4]
    changed = text.replace(figures, figures.replace("1", "2"))
    assert changed != text and fill_documents.filled_in(changed) == text


RESULTS = sorted([*(ROOT / "benchmarks").glob("*.json"), *(ROOT / "benchmarks" / "gpu").glob("*.json")])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_jsons_say_where_they_come_from(path):
    report = json.loads(path.read_text())
    assert re.fullmatch(r"python (benchmarks/\w+|run_pretraining)\.py.*", report["command"])
    for name in re.findall(r"[\w/]+\.(?:py|yaml)", report["command"]):
        assert (ROOT / MOVED.get(name, name)).exists(), name
    assert report["machine"] and report["versions"]["torch"] and "seed" in report
    assert not re.search(r"/(root|work|tmp|home)/", path.read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", report["commit"]), "measured with code that no commit has"


STUDIES = sorted([*runs.RESULTS.rglob("*.json"), *(ROOT / "experiments" / "noise" / "results").rglob("*.json")])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_results_of_the_study_say_where_they_come_from(path):
    result = json.loads(path.read_text())
    parts = [result[name] for name in ("pretraining", "features", "noise") if name in result]
    evaluation = result.get("evaluation", {})
    parts += [evaluation] if "command" in evaluation else evaluation.values()
    assert parts
    for part in parts:
        assert part["command"][0] in ("run_pretraining.py", "run_eval.py") and part["machine"] and part["versions"]
        recipes = [word.removeprefix("./") for word in part["command"] if word.endswith(".yaml")]
        assert all((ROOT / MOVED.get(name, name)).exists() for name in recipes)
        assert re.fullmatch(r"[0-9a-f]{40}", part["git_commit"])
    assert "seed" in result and not re.search(r"/(root|work|tmp|home)/", path.read_text())


def gpu_report(**figures) -> dict:
    return {"machine": "A GPU", "size": "large", "batch_size": 64, **figures}


def test_figures_of_a_gpu_are_shown_where_they_are(tmp_path, monkeypatch):
    names = [name for name in fill_documents.FIGURES if name.startswith("gpu_")]
    monkeypatch.setattr(fill_documents, "FOLDER", tmp_path)
    assert {fill_documents.FIGURES[name]() for name in names} == {"Not measured on a GPU yet."}
    step = {"images_per_second": 1009.4, "tflops": 430.2, "share_of_large_product": 0.546, "memory_gib": 31.2,
            "speed_over_straightforward": 1.58, "first_step_seconds": 21.0}  # fmt: skip
    failed = {"error": "Memory: none\nleft"}
    reports = {
        "train_step-large": {"results": {"CAN, compiled": step, "CAN, compiled whole": failed}},
        "profile_step-large": {"compiled": True, "shares": {"GELU": 0.021}, "step_seconds": 0.06, "idle_share": 0.03},
        "trainer-large": {"images_per_second": 1000, "trainer_over_bare": 1.012, "data_wait": 0.004,
                          "seconds_to_first_step": 41.7},
        "gradient_caching-base": {"cached_over_plain_time": 1.21, "results": {
            "plain": {"peak_memory_gib": 20.0}, "cached": {"peak_memory_gib": 20.5}}},
    }  # fmt: skip
    (tmp_path / "gpu").mkdir()
    for name, figures in reports.items():
        (tmp_path / "gpu" / f"{name}.json").write_text(json.dumps(gpu_report(**figures)))
    table = fill_documents.FIGURES["gpu_train_step"]()
    row = "| ViT-Large, batch 64: CAN, compiled | A GPU | 1,009 | 430 | 55 % | 1.58 | 31.2 | 21.0 |"
    assert row in table.splitlines()
    assert "CAN, compiled whole | A GPU | failed: Memory: none |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| GELU | 2.1 % |" in fill_documents.FIGURES["gpu_profile"]()
    assert "1.012 times" in fill_documents.FIGURES["gpu_trainer"]().replace("\n", " ")
    assert fill_documents.FIGURES["gpu_caching"]() == "1.21 times the time, 20.5 GiB instead of 20.0 (A GPU)"


def test_the_study_of_a_gpu_is_shown_where_it_is(tmp_path, monkeypatch):
    figures = fill_documents.FIGURES["claims_tiny"]
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    assert figures() == "Not measured on a GPU yet."
    evaluation = {"results": {"linear_probe": {"accuracy": 0.9}, "knn": {"20": {"accuracy": 0.88}}}}
    pretraining = {"flops_per_image": 3.65e9, "train_flops": 4e16, "peak_memory": 5e9, "images_per_second": 1}
    result = {"images_per_second": 34000, "pretraining": pretraining, "evaluation": evaluation}
    path = runs.path_of(runs.runs_of("tiny", "main")[0])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    assert "| CAN | 1 | 90.0 | 88.0 | 3650 | 40000 | 34000 | 5.4 | 5.00 |" in figures()


def test_every_benchmark_is_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    for script in scripts:
        if "__main__" in script.read_text():
            assert f"python {script.relative_to(ROOT)}" in text, script
