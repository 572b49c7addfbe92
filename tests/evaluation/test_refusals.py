"""What the evaluation refuses, and when."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers
from testing_utils import ROOT, VIT, options, save

import run_eval
from modeling_can.evaluation import command
from modeling_can.evaluation.finetuning import FineTuning
from modeling_can.evaluation.linear import LinearProbe
from modeling_can.evaluation.protocol import Setup
from modeling_can.evaluation.robustness import compare_corruption
from modeling_can.evaluation.settings import Settings, prefixed


REFUSED = {
    "--task=knm": r"task='knm' is not one of knn, ",
    "--tasks=knn": r"unknown key 'tasks'; did you mean 'task'",
    "--pooling=max": r"pooling='max' is not one of mean, cls, both",
    "--baselines=random": r"baselines='random' is not one of pixels, untrained",
    "--shots=few": r"shots='few' must be a number of images, such as 5, or a share",
    "--test_size=1.5": r"test_size=1.5 is outside \[0, 1\)",
    "--batch_size=0": r"batch_size=0 must be at least 1",
    "--image_size=1,2,3": r"image_size=\(1, 2, 3\) must have 1 or 2 values, not 3 \(height,width",
    "--task=embed,knn": r"embed stands alone",
    "--sgd_layers=0": r"sgd_layers=0 must be at least 1",
    "--dataset_name=none": r"give --dataset_name",
    "--label_column=klass": r"set label_column to one of label",
    "--image_size=33": r"refuses the 3 x 33 x 33 pixels .*--image_size 32,32",
    "--processor_name_or_path=nobody/nothing": r"nobody/nothing has no image processor",
    "--finetune_layer_decay=2": r"layer_decay=2",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_the_user_can_fix_is_said_with_the_fix(models, colors, tmp_path, flag):
    with pytest.raises(ValueError, match=REFUSED[flag]):
        run_eval.main([*options(models, colors, tmp_path, "can"), flag])


def test_more_shots_than_images_are_refused_before_anything_takes_time(models, colors, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_entries", None)
    with pytest.raises(ValueError, match="shots=31 wants 31 images of class red, which has 30"):
        run_eval.main(options(models, colors, tmp_path, "can", task="few_shot", shots="5,31"))


@pytest.mark.parametrize(
    "task, name, message",
    [
        ("knn,reconstruction", "dinov2", "needs a CAN .* dinov2 is a dinov2"),
        ("knn,finetune", "can", "finetuned/can is not empty"),
        ("knn,robustness", "can", "further_sets=none.yaml cannot be read"),
    ],
)
def test_what_a_later_task_would_refuse_is_refused_at_once(models, colors, tmp_path, monkeypatch, task, name, message):
    monkeypatch.setattr(Setup, "features", None)
    (tmp_path / "finetuned" / "can").mkdir(parents=True)
    (tmp_path / "finetuned" / "can" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        run_eval.main(options(models, colors, tmp_path, name, task=task, further_sets="none.yaml"))


STAGES = dict(hidden_sizes=[8] * 4, depths=[1] * 4)


@pytest.mark.parametrize("kind, sizes, message", [
    ("DINOv3ViT", VIT, "is a dinov3_vit, for which transformers has no image classifier.*--to can FOLDER"),
    ("CLIPVision", VIT, "is a clip_vision_model, for which .* no image classifier.*use linear_probe"),
    ("ConvNext", STAGES, "layer_decay=0.65 needs layers.*ConvNextModel has none; use layer_decay=1"),
])  # fmt: skip
def test_what_cannot_be_fine_tuned_is_refused_at_once(kind, sizes, message, colors, tmp_path, monkeypatch):
    monkeypatch.setattr(Setup, "features", None)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    models = {kind: save(tmp_path / kind, getattr(transformers, f"{kind}Model")(config))}
    with pytest.raises(ValueError, match=message):
        run_eval.main(options(models, colors, tmp_path / "out", kind, task="knn,finetune"))


def test_a_fault_costs_the_task_that_it_meets(models, colors, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(LinearProbe, "run", fail)
    with pytest.raises(OSError, match="the disk is full"):
        run_eval.main(options(models, colors, tmp_path, "can", baselines="none"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["results"]["can"]) == {"knn"}


def test_a_model_named_twice_is_measured_once(models, colors, tmp_path):
    argv = options(models, colors, tmp_path, "can", "can", task="knn", baselines="none")
    argv.insert(3, models["can"] + "/")
    assert list(run_eval.main(argv)["results"]) == ["can"]


def test_a_reference_without_errors_is_told_and_costs_nothing(capsys):
    perfect = {"fog": {"1": 1.0}}
    results = {name: {"robustness": {"by_corruption": perfect}} for name in ("a", "b")}
    compare_corruption(results, "a")
    assert "no corruption errors: reference_model makes no error under fog" in capsys.readouterr().out
    assert "corruption_error" not in results["b"]["robustness"]


def test_processes_that_do_not_know_each_other_are_refused(models, colors, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="2 processes were launched, and each .* ACCELERATE_USE_CPU=true"):
        run_eval.main(options(models, colors, tmp_path, "can"))


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
