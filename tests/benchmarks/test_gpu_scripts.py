"""The scripts for a GPU run from a plain copy, at toy size on a CPU, and leave few, small and whole files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest
import torch
from testing_utils import ROOT
from transformers import AutoImageProcessor, AutoModel

import modeling_can  # noqa: F401


COMMIT = "0123456789" * 4
STUDY = "experiments/cifar10/gpu_study.sh"
RESULTS = {"ceilings.json", "tests.xml", "train_step-base.json", "train_step-large.json", "train_step-tiny256.json",
           "train_step-tiny1024.json", "profile_step-large.json"}  # fmt: skip
KEPT = {"config.json", "metrics.jsonl", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "results.json"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The files of the checkout without .git, as `git archive` would give them."""
    git = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout, to know which files are its own")
    folder = tmp_path_factory.mktemp("copy")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def start(copy: Path, out: Path, script: str = "benchmarks/gpu_speed.sh", *words: str) -> subprocess.Popen:
    """With an import path of its own and, as far as it can be had, without an installed package."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GIT_COMMIT": COMMIT, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(copy / script), "--out", str(out), "--toy", *words]
    return subprocess.Popen(command, env=environment, cwd=out.parent, stdout=subprocess.DEVNULL)


def kill_when_there_is(path: Path, process: subprocess.Popen, log: Path, after: float = 0):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(after)
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in reversed(processes):  # the script first, so that it begins nothing more
        one.kill()
    psutil.wait_procs(processes)
    process.wait()


def check_whole(folder: Path):
    for path in folder.iterdir():
        assert path.is_file() and re.fullmatch(r"[\w.-]+", path.name) and path.stat().st_size < 2**24
        if path.suffix == ".json":
            report = json.loads(path.read_text())
            assert report["commit"] == COMMIT and report["machine"] and report["versions"]["torch"]
            assert re.fullmatch(r"python benchmarks/\w+\.py.*", report["command"])
            assert str(folder) not in path.read_text()
        elif path.suffix == ".xml":
            ElementTree.parse(path)
        else:
            assert path.name == "log.txt"


@pytest.mark.soak
def test_a_run_that_is_killed_leaves_whole_files_and_the_next_one_does_the_rest(copy, tmp_path):
    out = tmp_path / "out"
    process = start(copy, out)
    kill_when_there_is(out / "train_step-base.json", process, out / "log.txt", after=1)  # within the next part
    there = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "log.txt"}
    assert "train_step-base.json" in there and "profile_step-large.json" not in there
    check_whole(out)

    status = start(copy, out).wait(timeout=300)
    assert status == 0, (out / "log.txt").read_text()[-3000:]
    check_whole(out)
    names = {path.name for path in out.iterdir()}
    assert names == RESULTS | {"log.txt"} and len(names) <= 8
    assert all((out / name).stat().st_mtime_ns == then for name, then in there.items()), "done twice"
    rows = json.loads((out / "train_step-base.json").read_text())["results"]
    assert list(rows) == ["straightforward CAN", "straightforward CAN, compiled", "CAN", "CAN, compiled"]
    assert not any("error" in row for row in rows.values())
    assert json.loads((out / "train_step-large.json").read_text())["probe"]["new_graphs"] == 0
    assert json.loads((out / "profile_step-large.json").read_text())["compiled"] is True


@pytest.mark.slow
def test_a_part_that_fails_stops_no_other_and_is_named(copy, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(copy, broken)
    (broken / "benchmarks" / "ceilings.py").write_text("raise SystemExit('no such thing')\n")
    command = ["bash", str(broken / "benchmarks" / "gpu_speed.sh"), "--out", str(out), "--toy", "versions", "tests"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.splitlines()[-1] == "failed: ceilings.json"
    assert {path.name for path in out.iterdir()} == {"log.txt", "tests.xml"}
    assert "no such thing" in (out / "log.txt").read_text()


@pytest.mark.slow
def test_a_part_that_does_not_exist_is_refused(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu_speed.sh"), "--out", str(tmp_path), "--toy", "speed"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "speed is no part" in ended.stdout


def check_kept(folder: Path) -> list[dict]:
    """Of a run of the study, perhaps unfinished; gives the lines of its metrics."""
    for path in folder.iterdir():
        assert path.is_file() and re.fullmatch(r"[\w.-]+", path.name) and path.stat().st_size < 2**24
        if path.suffix in (".json", ".yaml"):
            text = path.read_text()
            assert not re.search(r"/(tmp|root|home)/", text)
            assert path.suffix == ".yaml" or json.loads(text)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_features(folder: Path):
    """Weights in bfloat16 load as float32 and give features."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = model(processor(list(images), return_tensors="pt").pixel_values).pooler_output
    assert features.isfinite().all() and features.std() > 0


@pytest.mark.soak
def test_a_run_of_the_study_that_is_killed_leaves_whole_files_and_goes_on(copy, tmp_path):
    out = tmp_path / "out"
    words = (STUDY, "main-can-0", "--epochs", "2")
    process = start(copy, out, *words)
    kept = out / "main-can-0"
    kill_when_there_is(kept / "preprocessor_config.json", process, out / "log.txt")
    (kept / "results.json.partial").touch()  # what a kill within the writing of a file leaves
    assert {path.name for path in kept.iterdir() if path.suffix != ".partial"} == KEPT - {"results.json"}
    before = check_kept(kept)
    check_features(kept)

    assert start(copy, out, *words).wait(timeout=300) == 0, (out / "log.txt").read_text()[-3000:]
    assert "resumed from" in (out / "log.txt").read_text()
    assert {path.name for path in out.iterdir()} == {"log.txt", "main-can-0"}
    assert {path.name for path in kept.iterdir()} == KEPT
    after = check_kept(kept)
    assert len(after) > len(before) > 0
    assert after[0] == before[0] and any("knn" in line for line in after)
    results = json.loads((kept / "results.json").read_text())
    assert results["git_commit"] == COMMIT and results["length"] == {"num_train_epochs": 2.0}
    check_features(kept)

    for path in (*kept.iterdir(), kept):  # as files that came back may be
        path.chmod(0o555 if path.is_dir() else 0o444)
    flags = ["--scale", "smoke", "--stage", "evaluate", "report", "--weights", str(out)]
    flags += ["--data", str(copy / "modeling_can" / "data" / "sample_data")]
    environment = {**os.environ, "GIT_COMMIT": COMMIT, "PYTHONPATH": str(copy)}
    command = [sys.executable, str(copy / "experiments" / "cifar10" / "study.py"), *flags]
    subprocess.run(command, env=environment, cwd=copy, check=True, stdout=subprocess.DEVNULL)
    kept.chmod(0o755)
    (path,) = (copy / "out/cifar10/results/smoke/main").iterdir()
    result = json.loads(path.read_text())
    assert result["settings"]["num_train_epochs"] == 2 and result["pretraining"]["git_commit"] == COMMIT
    assert 0 < result["evaluation"]["results"]["few_shot"]["10%"]["accuracy"] < 1
    seconds = [line["seconds"] for line in result["along_the_way"]]
    assert seconds == sorted(seconds) and seconds[0] > 0
    report = (copy / "out/cifar10/results/smoke/README.md").read_text()
    assert "| CAN | 1 |" in report and "Search" not in report


@pytest.mark.soak
def test_a_run_of_the_study_measures_its_speed(copy, tmp_path):
    out = tmp_path / "out"
    words = (STUDY, "trial-can-*", "--rates", "5e-4", "--seconds")
    assert start(copy, out, *words, "1").wait(timeout=300) == 0, (out / "log.txt").read_text()[-3000:]
    kept = out / "trial-can-0.0005-0"
    assert {path.name for path in kept.iterdir()} == {"metrics.jsonl", "results.json"}
    check_kept(kept)
    results = json.loads((kept / "results.json").read_text())
    length, images = results["length"], results["num_images"]
    epochs = length["num_train_epochs"]
    assert epochs == max(1, int(length["measured_images_per_second"] / images)) and length["seconds"] == 1
    assert results["num_steps"] == round(epochs * images / 64)
    assert "CAN, pre-trained" in results["probe"]


@pytest.mark.slow
def test_a_run_of_the_study_that_is_out_of_time_leaves_its_weights(copy, tmp_path):
    out = tmp_path / "out"
    process = start(copy, out, STUDY, "main-mae-0", "--epochs", "1000")
    deadline = time.monotonic() + 120
    while not (out / "main-mae-0" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, (out / "log.txt").read_text()[-3000:]
        time.sleep(0.05)
    (timer,) = (one for one in psutil.Process(process.pid).children() if one.name() == "timeout")
    timer.terminate()  # hands it on, as at the limit
    assert process.wait(timeout=120) == 1
    log = (out / "log.txt").read_text()
    assert "stopped by SIGTERM" in log and "main-mae-0 was stopped" in log
    assert {path.name for path in (out / "main-mae-0").iterdir()} == KEPT - {"results.json"}


@pytest.mark.slow
def test_a_study_without_a_run_is_refused(tmp_path):
    command = ["bash", str(ROOT / STUDY), "--out", str(tmp_path), "--toy"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "main-can-0" in ended.stdout
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ended = subprocess.run([*command, "main-dino-0"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "main-can-quarter-0" in ended.stdout
