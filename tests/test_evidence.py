"""Every figure of the documents is in a JSON that says where it comes from."""

import json
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence  # noqa: E402


@pytest.mark.parametrize("name", evidence.DOCUMENTS)
def test_documents_hold_the_figures_of_the_jsons(name):
    text = (ROOT / name).read_text()
    assert evidence.filled_in(text) == text, "python benchmarks/evidence.py rewrites them"


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text()
    figures = next(evidence.SECTION.finditer(text))[4]
    changed = text.replace(figures, figures.replace("1", "2"))
    assert changed != text and evidence.filled_in(changed) == text


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.json")), ids=lambda path: path.stem)
def test_jsons_say_where_they_come_from(path):
    report = json.loads(path.read_text())
    assert re.fullmatch(r"python benchmarks/\w+\.py.*", report["command"])
    assert (ROOT / report["command"].split()[1]).exists()
    assert report["machine"] and report["versions"]["torch"] and "seed" in report
    assert re.fullmatch(r"[0-9a-f]{40}", report["commit"]), "measured with code that no commit has"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/claims").rglob("*.json")), ids=lambda path: path.stem)
def test_results_of_the_study_say_where_they_come_from(path):
    result = json.loads(path.read_text())
    parts = [result["pretraining"]] if "pretraining" in result else []
    evaluation = result.get("evaluation", {})
    parts += [evaluation] if "command" in evaluation else evaluation.values()
    assert parts
    for part in parts:
        assert part["command"][0] in ("run_pretraining.py", "run_eval.py") and part["machine"] and part["versions"]
        assert re.fullmatch(r"[0-9a-f]{40}", part["git_commit"])
    assert "seed" in result and not re.search(r"/(root|work|tmp|home)/", path.read_text())


def test_every_benchmark_is_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    helpers = {"evidence.py", "straightforward.py"}
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert script.name in helpers or f"benchmarks/{script.name}" in text, script.name
