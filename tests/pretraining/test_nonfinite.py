"""A NaN and an overflow, planted in the views of one step of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from testing_utils import ROOT, free_port


PLANT = """
import os, sys, torch
import run_pretraining
from modeling_can.data.augmentations import Augmentation

value, rank, step, *argv = sys.argv[1:]
forward, calls = Augmentation.forward, []

def planted(self, views):
    calls.append(views)
    views = forward(self, views)
    if len(calls) == int(step) + 1 and os.environ.get("RANK", "0") == rank:
        views[0, 0, 0, 0, 0] = float(value)
    return views

Augmentation.forward = planted
try:
    run_pretraining.main(argv)
except FloatingPointError as error:
    sys.exit(f"stopped: {error}")
"""
RUN = ["--max_steps=6", "--per_device_train_batch_size=8", "--logging_steps=3", "--hidden_size=32",
       "--num_hidden_layers=1", "--num_attention_heads=2", "--intermediate_size=64", "--probe_dataset_name=none",
       "--dataloader_num_workers=0", "--overwrite_output_dir"]  # fmt: skip


def run(tmp_path, value, step, num_processes=1, rank=0, **options):
    script = tmp_path / "plant.py"
    script.write_text(PLANT)
    launch = []
    if num_processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes),
                  "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                  "--main_process_port", str(free_port())]  # fmt: skip
    answer = subprocess.run(
        [sys.executable, *launch, str(script), value, str(rank), str(step), *RUN, f"--output_dir={tmp_path}/out",
         *(f"--{key}={value}" for key, value in options.items())],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return answer.returncode, answer.stdout + answer.stderr


@pytest.mark.parametrize("value", ["nan", pytest.param("1e30", marks=pytest.mark.slow)])  # whose square is infinite
def test_a_planted_number_stops_the_run_by_name(tmp_path, value):
    status, output = run(tmp_path, value, step=1)
    assert status == 1 and "stopped: the gradient of step 1 was not finite" in output, output
    assert "contrastive_loss" in output and "of the images crc32:" in output and "--on_nonfinite skip" in output


@pytest.mark.parametrize("num_processes, step, logging_steps", [
    pytest.param(2, 4, 3, marks=pytest.mark.slow),
    pytest.param(1, 4, 3, marks=pytest.mark.slow),
    pytest.param(1, 5, 1, marks=pytest.mark.slow),  # the line of the log has no other step
    pytest.param(1, 5, 3, marks=pytest.mark.slow),  # and it is the last step, whose pixels the log looks at
])  # fmt: skip
def test_a_planted_number_is_skipped_on_all_processes(tmp_path, num_processes, step, logging_steps):
    options = {"on_nonfinite": "skip", "logging_steps": logging_steps}
    status, output = run(tmp_path, "nan", step, num_processes, rank=num_processes - 1, **options)
    assert status == 0, output
    assert f"process {num_processes - 1}: the gradient of step {step} was not finite" in output
    if num_processes == 2:
        assert "process 0: the gradient of step 4" in output
        assert "the images of this process seem not to be to blame" in output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["nonfinite_steps"] == 1
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert "nan" not in (tmp_path / "out" / "metrics.jsonl").read_text().lower()


@pytest.mark.parametrize("num_processes, reconstruction, are_named", [
    (1, "nan", True),
    (1, 1.0, True),  # in the backward pass, say
    (2, "nan", True),
    (2, 1.0, False),  # of the other process, it seems
])  # fmt: skip
def test_images_are_named_where_they_may_be_to_blame(num_processes, reconstruction, are_named):
    from modeling_can.optimization import NonFiniteGuard

    guard = NonFiniteGuard(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]), num_processes)
    terms = {"contrastive_loss": torch.tensor(torch.nan), "reconstruction_loss": torch.tensor(float(reconstruction))}
    guard.check(4, torch.tensor(torch.inf), terms, ["a.jpg"])
    (sentence,) = guard.report()
    assert ("of the images a.jpg" in sentence) == are_named != ("not to be to blame" in sentence)


@pytest.mark.parametrize("kernel_looks", [True, False], ids=["", "on mps"])
def test_a_step_that_is_skipped_leaves_weights_and_moments_alone(kernel_looks, monkeypatch):
    from modeling_can import optimization
    from modeling_can.optimization import NonFiniteGuard

    if not kernel_looks:
        monkeypatch.setattr(optimization, "_WITHOUT_FOUND_INF", ("cpu",))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NonFiniteGuard(optimizer)
    for step, gradient in enumerate((1.0, float("nan"), float("inf"))):
        weight.grad = torch.full((3,), gradient)
        guard.check(step, weight.grad.norm(), {"loss": torch.tensor(gradient)}, ["a.jpg"])
        if not kernel_looks:
            optimizer.found_inf = None
        optimizer.step()
        if step == 0:
            first = weight.detach().clone()
            state = {name: value.clone() for name, value in optimizer.state[weight].items()}
    assert torch.equal(weight, first) and not torch.equal(first, torch.ones(3))
    assert all(torch.equal(value, optimizer.state[weight][name]) for name, value in state.items())
    assert [sentence.split(";")[0] for sentence in guard.report()] == [
        f"the gradient of step {step} was not finite and its update left out" for step in (1, 2)
    ]
    assert guard.report() == []
