"""Runs of several processes as their launchers start, stop and restart them, and the files in launch/."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from testing_utils import ROOT, RUN, free_port, kill_rank_1, tiny_model
from torch.distributed import TCPStore

from modeling_can.modeling_can import CANLayer
from modeling_can.rendezvous import attempt_name


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file=launch/ddp.yaml", "--num_processes=2"]


class Launch:
    """A command with two processes of a toy run below it, over gloo."""

    def __init__(self, folder: Path, command: list[str], **environment: str):
        self.log = folder.parent / f"log-{time.time_ns()}.txt"
        self.mark = f"TEST_LAUNCH={self.log}"
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=open(self.log, "w"),
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TEST_LAUNCH": str(self.log)}
            | environment,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A launcher gives its processes sessions of their own, so there is no group to kill.
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except (ProcessLookupError, FileNotFoundError, PermissionError):
                pass
        self.process.wait()

    def wait_for_checkpoint(self, folder: Path):
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoints/step-*[0-9]")):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def end(self, timeout: float) -> tuple[int, str]:
        code = self.process.wait(timeout)
        return code, self.log.read_text()


def toy_run(folder: Path, *options: str) -> list[str]:
    return ["run_pretraining.py", *RUN, f"--output_dir={folder}", "--resume_from_checkpoint=latest", *options]


# --- One node --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            [*TORCHRUN, "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{port}"],
            id="torchrun",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            [*ACCELERATE, "--max_restarts=1", "--main_process_port={port}"],
            id="accelerate",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_when_a_process_is_killed_the_launcher_resumes_the_run(tmp_path, launcher):
    folder = tmp_path / "run"
    command = [argument.replace("{port}", str(free_port())) for argument in launcher]
    with Launch(folder, command + toy_run(folder, "--max_steps=60")) as launch:
        launch.wait_for_checkpoint(folder)
        kill_rank_1(launch.process, folder)
        code, output = launch.end(timeout=60)
    assert code == 0, output
    assert re.search(r"resumed from .*step-\d+ at step \d+; from here on the run is what it would have been", output)
    assert json.loads((folder / "results.json").read_text())["num_processes"] == 2


def test_no_process_meets_the_keys_of_an_earlier_attempt():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(rank: int, delay: float, names: list):
        store = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
        time.sleep(delay)
        names[rank] = attempt_name(store, rank, 3, timedelta(seconds=20))

    attempts = []
    # Each time another process is late, and the others find only what its predecessor left.
    for delays in ((0, 0, 0), (0, 0.5, 0), (0.5, 0, 0), (0, 0, 0.5)):
        names = [None] * 3
        threads = [threading.Thread(target=join, args=(rank, delays[rank], names)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert names[0] is not None and names == [names[0]] * 3
        attempts.append(names[0])
    assert len(set(attempts)) == len(attempts)
    with pytest.raises(RuntimeError, match="not all of the 3 processes"):
        attempt_name(TCPStore("127.0.0.1", server.port, is_master=False), 0, 3, timedelta(seconds=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_launcher_that_is_stopped_saves_first(tmp_path, number):
    folder = tmp_path / "run"
    command = [*TORCHRUN, f"--master-port={free_port()}", *toy_run(folder, "--max_steps=2000")]
    with Launch(folder, command) as launch:
        launch.wait_for_checkpoint(folder)
        launch.process.send_signal(number)  # it signals the group of each process, workers of the loader and all
        _, output = launch.end(timeout=25)  # it would kill what has not ended after 30 seconds
    step = int(re.search(rf"stopped by {number.name} after step (\d+)", output)[1])
    assert (folder / "checkpoints" / f"step-{step}").is_dir()


# --- Slurm -----------------------------------------------------------------------------------------------------------

SCONTROL = r"""#!/bin/bash
if [ "$1" = show ]; then printf '127.0.0.1\n127.0.0.1\n'; else echo "$*" >> "$REQUEUED"; fi
"""
SRUN = r"""#!{python}
import os, signal, subprocess, sys
from pathlib import Path

def below(pid):
    children = [int(child) for child in Path(f"/proc/{{pid}}/task/{{pid}}/children").read_text().split()]
    return children + [pid for child in children for pid in below(child)]

def send(number):
    for pid in below(os.getpid()):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

command = sys.argv[sys.argv.index("bash"):]
tasks = [subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(node)}}) for node in range(2)]
signal.signal(signal.SIGUSR1, lambda number, frame: send(number))
codes = []
while len(codes) < 2:
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    if codes[-1]:
        send(signal.SIGKILL)  # --kill-on-bad-exit
sys.exit(max(map(abs, codes)))
"""


@pytest.mark.soak
def test_the_slurm_job_saves_is_requeued_and_goes_on(tmp_path):
    """As Slurm would, its commands replaced: two nodes, each step's processes signaled one and all."""
    folder, commands = tmp_path / "run", tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    requeued = tmp_path / "requeued"
    environment = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REQUEUED": str(requeued),
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
    }
    command = ["bash", "launch/pretrain.slurm", *toy_run(folder)[1:-1]]
    with Launch(folder, [*command, "--max_steps=2000"], **environment) as job:
        job.wait_for_checkpoint(folder)
        job.process.send_signal(signal.SIGUSR1)
        code, output = job.end(timeout=60)
    assert code != 0 and requeued.read_text() == f"requeue {environment['SLURM_JOB_ID']}\n", output
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+)", output)[1])
    assert (folder / "checkpoints" / f"step-{step}").is_dir()
    with Launch(folder, [*command, f"--max_steps={step + 5}"], **environment) as job:
        code, output = job.end(timeout=60)
    assert code == 0 and f"step-{step} at step {step}" in output, output
    assert json.loads((folder / "results.json").read_text())["num_processes"] == 2
    assert len(requeued.read_text().splitlines()) == 1


# --- FSDP2: accelerate makes it DDP on a CPU, so no more than what is asked for can be tested ------------------------


def test_fsdp2_yaml_asks_for_what_it_says():
    arguments = ["--config_file", str(ROOT / "launch" / "fsdp2.yaml"), "--num_processes", "2", "run_pretraining.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    fsdp = {name: value for name, value in environment.items() if name.startswith("FSDP_")}
    with patch_environment(**fsdp):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    model = tiny_model()
    plugin.set_auto_wrap_policy(model)
    wrapped = {
        type(module)
        for module in model.modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    assert wrapped == {CANLayer}
