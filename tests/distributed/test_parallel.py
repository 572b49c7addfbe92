"""One batch on one process, over two (DDP, FSDP2), or in two parts: the same run. And the script itself on FSDP2."""

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from testing_utils import ROOT, TOY, free_port, inputs, no_sync, run_processes, shard, tiny_model
from torch.nn.parallel import DistributedDataParallel

import run_pretraining
from modeling_can.evaluation.processes import end_training
from modeling_can.optimization import learning_rate, parameter_groups
from modeling_can.pretraining.gradient_caching import accumulated_backward, cached_backward
from modeling_can.pretraining.step import total_norm


STEPS, BATCH = 20, 8


def train(wrap, rank=0, num_processes=1, num_micro_batches=1) -> dict[str, list[float]]:
    """Losses and gradient norms of 20 steps, each process with its share of the same batches."""
    model = tiny_model().train()
    config = model.config
    model, no_sync = wrap(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-2, betas=(0.9, 0.95), fused=True)
    record = {name: [] for name in ("contrastive_loss", "reconstruction_loss", "denoising_loss", "grad_norm")}
    backward = accumulated_backward
    if num_micro_batches > 1:
        backward = partial(cached_backward, config=config)
    for step in range(STEPS):
        batch = inputs(config, BATCH, seed=step)
        num_parts = num_processes * num_micro_batches
        mine = range(rank * num_micro_batches, (rank + 1) * num_micro_batches)
        parts = [{name: value.chunk(num_parts)[i] for name, value in batch.items()} for i in mine]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, 5, 1e-2)
        terms = backward(
            model, [lambda part=part: part for part in parts], backward=lambda loss: loss.backward(), no_sync=no_sync
        )
        terms["grad_norm"] = total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
        for name, values in record.items():
            value = terms[name].detach().clone()
            if num_processes > 1 and name != "grad_norm":
                torch.distributed.all_reduce(value)
                value /= num_processes
            values.append(value.item())
    return record


def _process(rank, world_size):
    ddp = train(lambda model: (lambda ddp: (ddp, ddp.no_sync))(DistributedDataParallel(model)), rank, world_size)
    fsdp = train(lambda model: (lambda fsdp: (fsdp, partial(no_sync, fsdp)))(shard(model)), rank, world_size)
    return {"2 x B, DDP": ddp, "2 x B, FSDP2": fsdp}


@pytest.fixture(scope="module")
def records():
    alone = lambda model: (model, contextlib.nullcontext)  # noqa: E731
    first, second = run_processes(_process, 2)
    assert first == second
    return {"1 x 2B": train(alone), "B x 2, cached": train(alone, num_micro_batches=2), **first}


@pytest.mark.parametrize("how", ["2 x B, DDP", "2 x B, FSDP2", "B x 2, cached"])
def test_20_steps_are_those_of_one_process_with_the_whole_batch(records, how):
    for name, values in records["1 x 2B"].items():
        assert records[how][name] == pytest.approx(values, rel=1e-4, abs=1e-4), name
    losses = records["1 x 2B"]["reconstruction_loss"]
    assert losses[-1] < losses[0] - 0.1  # it did train


SHARDED = """
import sys
import run_pretraining
from modeling_can.pretraining import builders
from testing_utils import no_sync, shard

class Sharding(builders.Accelerator):
    def prepare(self, model, optimizer):
        names = {id(p): name for name, p in model.named_parameters()}
        held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        sharded = dict(shard(model).named_parameters())
        for group, group_names in zip(optimizer.param_groups, held):
            group["params"] = [sharded[name] for name in group_names]
        return model, super().prepare(optimizer)

    def no_sync(self, model):
        return no_sync(model)

builders.Accelerator = Sharding
run_pretraining.main(sys.argv[1:])
"""
RUN = ["--max_steps=6", "--save_steps=3", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=2",
       "--max_grad_norm=1", "--logging_steps=2", "--probe_every=4", "--hidden_size=32", "--num_hidden_layers=2",
       "--num_attention_heads=2", "--intermediate_size=64", "--dataloader_num_workers=0"]  # fmt: skip


def launch(script: Path, folder: Path, *options: str) -> tuple[dict, dict, str]:
    """The results of a run of two processes, its weights, and what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port()), str(script), *RUN, f"--output_dir={folder}",
               *options]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **environment})
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
    return json.loads((folder / "results.json").read_text()), load_file(folder / "model.safetensors"), answer.stdout


@pytest.mark.slow
def test_the_script_trains_sharded_as_it_does_with_ddp(tmp_path):
    """Probe, clipping, images, checkpoint and resume included; a checkpoint fits the other way of training too."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    ddp, ddp_weights, _ = launch(ROOT / "run_pretraining.py", tmp_path / "ddp")
    sharded, weights, _ = launch(tmp_path / "sharded.py", tmp_path / "sharded")
    checkpoint = tmp_path / "ddp" / "checkpoints" / "step-3"
    _, resumed_weights, _ = launch(
        tmp_path / "sharded.py", tmp_path / "resumed", f"--resume_from_checkpoint={checkpoint}"
    )
    assert sharded["probe"].keys() == ddp["probe"].keys() and sharded["num_parameters"] == ddp["num_parameters"]
    for name, loss in ddp["final_losses"].items():
        assert sharded["final_losses"][name] == pytest.approx(loss, rel=1e-4)
    for name, weight in ddp_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(resumed_weights[name], weight, rtol=0, atol=1e-4)
    assert (tmp_path / "sharded" / "figures" / "reconstructions.png").exists()


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(tmp_path):
    options = ["--max_steps=4", "--probe_every=0", "--probe_dataset_name=none"]
    run_pretraining.main([*RUN, f"--output_dir={tmp_path / 'one'}", *options])
    checkpoint = f"--resume_from_checkpoint={tmp_path / 'one' / 'checkpoints' / 'step-3'}"
    results, _, output = launch(ROOT / "run_pretraining.py", tmp_path / "two", *options, checkpoint)
    assert "1 processes began it and 2 go on: weights and optimizer are exact, the order of the data" in output
    steps = [json.loads(line)["step"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4] and results["num_processes"] == 2


SEEDS = """
import os, sys, torch, run_pretraining
from modeling_can.data.augmentations import Augmentation
from modeling_can.averages import MetricAverage

forward = Augmentation.forward
def told(self, views):
    os.write(1, f"\\ndraws {torch.get_rng_state().sum().item()}\\n".encode())  # in one piece
    return forward(self, views)
Augmentation.forward = told
compute = MetricAverage.compute
def averaged(self):
    averages = compute(self)
    os.write(1, f"\\nmeans {averages['reconstruction_loss']}\\n".encode())
    return averages
MetricAverage.compute = averaged
run_pretraining.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_processes_draw_other_noise_and_masks_and_log_their_mean(tmp_path):
    (tmp_path / "seeds.py").write_text(SEEDS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(free_port()), str(tmp_path / "seeds.py"), *TOY, "--max_steps=1",
               f"--output_dir={tmp_path / 'out'}", "--probe_dataset_name=none"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    drawn, means = ([x for x in answer.stdout.splitlines() if x.startswith(word)] for word in ("draws", "means"))
    assert len(drawn) == 2 and drawn[0] != drawn[1], answer.stderr[-2000:]
    assert len(means) == 2 and means[0] == means[1]


def test_the_threads_of_a_group_have_time_before_it_is_dropped(monkeypatch):
    """Without it, a preflight of two processes hung after its last line, one in twelve."""
    calls = []
    monkeypatch.setattr("time.sleep", lambda seconds: calls.append(seconds))
    accelerator = SimpleNamespace(num_processes=2, end_training=lambda: calls.append("end"))
    end_training(accelerator)
    assert calls == [0.5, "end"]
    ends = [path for path in (ROOT / "modeling_can").rglob("*.py") if ".end_training(" in path.read_text()]
    assert [path.name for path in ends] == ["processes.py"]  # nothing ends a group in another way
