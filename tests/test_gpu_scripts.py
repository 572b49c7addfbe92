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


ROOT = Path(__file__).parent.parent
COMMIT = "0123456789" * 4
RESULTS = {"ceilings.json", "tests.xml", "train_step-base.json", "train_step-large.json", "train_step-tiny256.json",
           "train_step-tiny1024.json", "profile_step-large.json"}  # fmt: skip
pytestmark = pytest.mark.slow


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


def start(copy: Path, out: Path) -> subprocess.Popen:
    """With an import path of its own and, as far as it can be had, without an installed package."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GIT_COMMIT": COMMIT, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(copy / "benchmarks" / "gpu_speed.sh"), "--out", str(out), "--toy"]
    return subprocess.Popen(command, env=environment, cwd=out.parent, stdout=subprocess.DEVNULL)


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


def test_a_run_that_is_killed_leaves_whole_files_and_the_next_one_does_the_rest(copy, tmp_path):
    out = tmp_path / "out"
    process = start(copy, out)
    deadline = time.monotonic() + 120
    while not (out / "train_step-base.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, (out / "log.txt").read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(1)  # into the next part
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in reversed(processes):  # the script first, so that it begins nothing more
        one.kill()
    psutil.wait_procs(processes)
    process.wait()
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


def test_a_part_that_does_not_exist_is_refused(tmp_path):
    command = ["bash", str(ROOT / "benchmarks" / "gpu_speed.sh"), "--out", str(tmp_path), "--toy", "speed"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "speed is no part" in ended.stdout
