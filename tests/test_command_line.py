"""The first second of a command, in which PyTorch is not imported."""

import os
import subprocess
import sys
from argparse import ArgumentParser

import pytest
from testing_utils import ROOT

from modeling_can import command_line
from modeling_can.evaluation import settings
from modeling_can.fields import read_flags
from modeling_can.keywords import Evaluation, Pretraining
from modeling_can.pretraining import recipe


@pytest.fixture(scope="module")
def without_packages(tmp_path_factory):
    """An environment in which the first import of a large package ends the process."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("torch", "transformers", "datasets", "numpy"):
        (folder / f"{name}.py").write_text("import os\nraise SystemExit('policy ' + os.environ['OMP_WAIT_POLICY'])")
    usual = {name: value for name, value in os.environ.items() if name not in command_line.ENVIRONMENT}
    return {**usual, "PYTHONPATH": str(folder)}


def first_second(words: str, environment: dict) -> tuple[str, str]:
    command = [sys.executable, *words.split()]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 1
    return answer.stdout, answer.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        ("run_pretraining.py", "recipe can-quickstart; images of sample_data; output folder out/can-quickstart"),
        (
            "-m modeling_can pretrain --data_dir tests",
            "chosen for these images; images of tests; output folder out/",
        ),
        ("-m modeling_can pretrain can-quickstart --data_dir tests", "recipe can-quickstart; images of tests; output"),
        ("run_eval.py --model_name_or_path a b --dataset_name c", "models a, b; images of c; output folder out/eval"),
        (
            "-m modeling_can embed --model_name_or_path a --data_files *.md --output_dir o",
            "images of *.md; output folder o",
        ),
    ],
)
def test_what_is_asked_for_is_said_before_pytorch_is_imported(words, said, without_packages):
    stdout, stderr = first_second(words, without_packages)
    assert said in stdout and stderr == "policy passive\n"
    chosen = {**without_packages, "RANK": "1", "OMP_WAIT_POLICY": "active"}
    assert first_second(words, chosen) == ("", "policy active\n")  # said by one process, and the user's choice stays


@pytest.mark.parametrize(
    "words, fault",
    [
        ("run_pretraining.py --data_dri x", "unknown key 'data_dri'; did you mean 'data_dir'?"),
        ("run_pretraining.py --epochs 3", "did you mean 'num_train_epochs'?"),
        ("-m modeling_can pretrain can-vit-smal", "did you mean can-vit-small-patch16-224?"),
        ("-m modeling_can pretrain --data_dir nowhere", "data_dir=nowhere is not a folder"),
        ("-m modeling_can pretrain --max_steps many", "max_steps='many' must be a whole number"),
        ("run_eval.py --model_nme x", "did you mean 'model_name_or_path'?"),
        ("-m modeling_can embed --data_dir nowhere", "data_dir=nowhere is not a folder"),
        ("-m modeling_can pretrain --data_files nowhere/*.tar --output_dir o", "data_files=nowhere/*.tar is no file"),
        (
            "-m modeling_can pretrain --dataset_name ./nowhere",
            "dataset_name=./nowhere: there is no such file",
        ),
        ("run_eval.py --model_name_or_path ~/nowhere", "model_name_or_path=~/nowhere: there is no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_pytorch_is_imported(words, fault, without_packages):
    stdout, stderr = first_second(words, without_packages)
    assert stdout == "" and fault in stderr and "policy" not in stderr


@pytest.mark.parametrize(
    "words, program",
    [
        ("run_pretraining.py", "run_pretraining.py"),
        ("run_eval.py --model_name_or_path a --dataset_name c", "run_eval.py"),
        *((f"-m modeling_can {command}", "modeling-can") for command in ("pretrain", "eval", "convert", "demo")),
    ],
)
def test_ctrl_c_while_pytorch_is_imported_ends_in_one_line(words, program, tmp_path):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    command, environment = [sys.executable, *words.split()], {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (130, f"{program}: stopped by Ctrl-C\n")


def test_flags_are_read_as_by_the_settings_themselves():
    for keywords, groups in ((Pretraining, recipe._groups()), (Evaluation, settings._groups())):
        argv = [f"--{f.name}=1,2" for group in groups.values() for f in group]
        first, full = (read_flags(ArgumentParser(), g, argv) for g in ({"": command_line._fields(keywords)}, groups))
        assert first == full
        (default,) = {f.default for group in groups.values() for f in group if f.name == "output_dir"}
        assert command_line.OUTPUT_DIRS[keywords] == default


def test_the_environment_of_a_process_that_has_pytorch_stays(monkeypatch):
    for name in command_line.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    command_line.set_environment()
    assert not command_line.ENVIRONMENT.keys() & os.environ.keys()
