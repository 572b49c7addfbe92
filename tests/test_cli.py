"""The command modeling-can, and the same from Python."""

import os
import re
import shutil
import subprocess
import sys
import typing

import pytest
from PIL import Image
from testing_utils import ROOT, TOY

import modeling_can
from modeling_can import cli, keywords
from modeling_can.evaluation import settings
from modeling_can.pretraining import presets, recipe


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8,
         "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "log_with": None}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        Image.effect_noise((60, 50), 60).convert("RGB").save(folder / f"{index}.png")
    return folder


def ended(argv):
    """The status with which a command line ends, or what it says where that is 1."""
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    return end.value.code


def test_commands_are_listed_and_a_wrong_one_is_refused_with_the_right_one(capsys):
    cli.main([])
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in cli.COMMANDS)
    assert "no command 'pretran'; did you mean pretrain?" in ended(["pretran"])
    assert "no recipe can-vit-smal; did you mean can-vit-small-patch16-224?" in ended(["pretrain", "can-vit-smal"])
    assert "unknown key 'data_dri'; did you mean 'data_dir'?" in ended(["pretrain", "--data_dri=x"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_three_examples_before_the_flags(name, capsys):
    if name == "demo":
        pytest.importorskip("gradio")
    assert ended([name, "--help"]) == 0
    before_flags = capsys.readouterr().out.split("options:")[0]
    assert before_flags.count(f"{name} ") >= 3 and len(before_flags.splitlines()) < 50


def test_flags_are_grouped(capsys):
    assert ended(["pretrain", "--help"]) == 0
    said = capsys.readouterr().out
    groups = ["data:", "views:", "length:", "start:", "optimization:", "output:", "the Hub:", "model:"]
    assert [line for line in said.splitlines() if line in groups] == groups


def test_the_status_tells_how_a_run_ended():
    assert [cli.exit_status(found) for found in (
        None, {"num_steps": 3}, {"stopped_by": "SIGINT", "step": 2}, {"stopped_by": "SIGTERM", "step": 2},
        {"ready": True}, {"ready": False},
    )] == [0, 0, 130, 0, 0, 1]  # fmt: skip


def test_presets_are_found_by_name():
    folders = {path.parent.name for path in (ROOT / "model_cards").glob("*/recipe.yaml")}
    assert presets.QUICKSTART in folders
    for name in folders:
        made = recipe.make_recipe(name, {"data_dir": "x", "max_steps": 1, "frozen_encoder_ratio": 0})
        assert made.data_dir == "x" and made.dataset_name is None


def test_keywords_are_those_of_the_settings():
    fields = [*recipe.training_fields(), *recipe.model_fields()]
    assert typing.get_type_hints(keywords.Pretraining) == {f.name: f.type for f in fields}
    flags = [f for group in settings._groups().values() for f in group]
    assert typing.get_type_hints(keywords.Evaluation) == {f.name: f.type for f in flags}


def test_python_does_what_the_commands_do(images, tmp_path):
    results = modeling_can.pretrain(data_dir=images, output_dir=tmp_path / "run", max_steps=2, **SMALL)
    assert results["num_steps"] == 2 and results["command"][:3] == ["-m", "modeling_can", "pretrain"]
    assert "already holds a finished run" in ended(results["command"][2:])  # what the card says names the same run
    ready = modeling_can.pretrain(data_dir=images, output_dir=tmp_path / "look", max_steps=2, preflight=True, **SMALL)
    assert ready == {"ready": True}
    found = modeling_can.embed(model_name_or_path=tmp_path / "run", data_dir=images, output_dir=tmp_path / "embedded")
    assert found["embed"]["new_images"] == 12
    with pytest.raises(ValueError, match="unknown key 'max_step'; did you mean 'max_steps'"):
        modeling_can.pretrain(data_dir=images, max_step=2)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        modeling_can.pretrian  # noqa: B018


@pytest.mark.slow
def test_an_installed_wheel_does_all_of_it(images, tmp_path):
    """From a folder of its own: no checkout is on the path."""
    ignored = shutil.ignore_patterns(".git", "out", "build", "*.egg-info", ".*_cache")
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    pip, site = [sys.executable, "-m", "pip"], tmp_path / "site"
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", ".", "--wheel-dir", str(tmp_path)]
    subprocess.run(wheel, cwd=checkout, check=True)
    shutil.rmtree(checkout)
    (file,) = tmp_path.glob("*.whl")
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(file)]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*words) -> str:
        command = [str(site / "bin" / "modeling-can"), *map(str, words)]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert not re.search("Warning|torchvision", answer.stderr), answer.stderr  # about which a user can do nothing
        return answer.stdout

    where = f"import modeling_can; assert modeling_can.__file__.startswith({str(site)!r})"
    subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, check=True)
    data, alone = ["--data_dir", images, "--output_dir"], "--dataloader_num_workers=0"
    run("pretrain", *TOY, *data, "run", alone)
    run("eval", "--model_name_or_path=run", "--dataset_name=sample_data", "--task=knn", "--output_dir=eval")
    assert "12 embeddings" in run("embed", "--model_name_or_path=run", *data, "embedded")
    run("convert", "run", "--to", "vit", "vit")
    assert (tmp_path / "vit" / "model.safetensors").exists()
    run("pretrain", "can-vit-tiny-patch16-224", *TOY[1:], *data, "preset", alone, "--image_size=32", "--patch_size=8")
