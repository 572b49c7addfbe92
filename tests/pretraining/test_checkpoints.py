"""Runs that are killed, stopped, damaged or out of disk, as real processes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from testing_utils import ROOT, RUN, free_port, kill_rank_1

import run_pretraining
from modeling_can.evaluation.probe import Probe
from modeling_can.former_names import FORMER_NAMES
from modeling_can.optimization import learning_rate
from modeling_can.pretraining.checkpoints import Checkpoints, describe_file


def start(folder: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_pretraining.py"), *RUN, "--output_dir", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def steps(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait", "health")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(folder)
    assert process.wait(timeout=120) == 0, process.stdout.read()
    return folder


def kill_and_resume(folder: Path, delays, uninterrupted: Path):
    """SIGKILL some time after the first checkpoint of each attempt, then to the end."""
    killed = 0
    for delay in delays:
        process = start(folder, "--resume_from_checkpoint=latest")
        before = {path.name for path in folder.glob("checkpoints/step-*")}
        while process.poll() is None and {path.name for path in folder.glob("checkpoints/step-*")} == before:
            time.sleep(0.002)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (folder / "results.json").exists():
            break
    else:
        process = start(folder, "--resume_from_checkpoint=latest")
        output = process.communicate(timeout=120)[0]
        # Nothing to resume if it was killed while it wrote the first one.
        assert process.returncode == 0 and ("resumed from" in output or "there is no checkpoint yet" in output), output
    assert killed and weights(folder) == weights(uninterrupted)
    assert steps(folder) == steps(uninterrupted)


def test_a_killed_run_ends_with_the_same_bits(uninterrupted, tmp_path):
    kill_and_resume(tmp_path / "run", [0.05], uninterrupted)


@pytest.mark.soak
def test_a_run_killed_three_times_ends_with_the_same_bits(uninterrupted, tmp_path):
    kill_and_resume(tmp_path / "run", [0.0, 0.02, 0.1], uninterrupted)


@pytest.mark.soak
def test_a_run_killed_25_times_ends_with_the_same_bits(uninterrupted, tmp_path):
    rng = np.random.default_rng(0)
    for attempt in range(25):
        kill_and_resume(tmp_path / f"run-{attempt}", rng.uniform(0, 0.3, size=1), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_saves_and_goes_on_with_the_same_bits(uninterrupted, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder)
    while not list(folder.glob("checkpoints/step-*[0-9]")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == (130 if number == signal.SIGINT else 0), output
    words = rf"stopped by {number.name} after step (\d+); to go on, repeat the command with --resume_from_checkpoint"
    step = int(re.search(words, output)[1])
    assert (folder / "checkpoints" / f"step-{step}").is_dir()
    with pytest.raises(ValueError, match="unfinished run; continue it with --resume_from_checkpoint latest"):
        run_pretraining.main([*RUN, f"--output_dir={folder}"])
    process = start(folder, "--resume_from_checkpoint=latest")
    assert f"at step {step}" in process.communicate(timeout=120)[0] and process.returncode == 0
    assert weights(folder) == weights(uninterrupted)


def torchrun(folder: Path) -> subprocess.Popen:
    """Two processes of this machine over gloo."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=0",
         "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", str(ROOT / "run_pretraining.py"), *RUN,
         f"--output_dir={folder}", "--resume_from_checkpoint=latest", "--dataloader_num_workers=0",
         "--max_steps=200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_when_one_of_two_processes_dies_the_other_ends_with_an_error(tmp_path):
    launcher = torchrun(tmp_path / "run")
    kill_rank_1(launcher, tmp_path / "run")
    output = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0 and not (tmp_path / "run" / "results.json").exists()
    assert "another process" in output, output


def test_checkpoints_rotate_and_damaged_ones_are_refused(uninterrupted, tmp_path):
    kept = uninterrupted / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step-20", "step-25"]
    checkpoints = Checkpoints(tmp_path / "checkpoints", limit=2)
    assert checkpoints.find("latest") is None
    for step in (1, 2, 10):
        checkpoints.save(step, {"w": torch.ones(3)}, {"progress": step}, {"rng": step})
    assert [path.name for path in checkpoints.paths()] == ["step-2", "step-10"]
    checkpoints.save(11, {"w": torch.ones(3)}, {"progress": 11}, {"rng": 11}, best=2)
    assert [path.name for path in checkpoints.paths()] == ["step-2", "step-10", "step-11"]
    checkpoints.save(10, {"w": torch.ones(3)}, {"progress": 10}, {"rng": 10})  # as of a run that went back to step 2
    assert [path.name for path in checkpoints.paths()] == ["step-2", "step-10"]
    path = checkpoints.find("latest")
    assert path.name == "step-10" and checkpoints.load(path)[1:] == ({"progress": 10}, [{"rng": 10}])
    with open(path / "shared.pt", "r+b") as file:
        file.seek(30)
        file.write(b"?")
    with pytest.raises(ValueError, match=r"step-10 is damaged: shared.pt is not what was written.*step-2"):
        checkpoints.find("latest")
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoints.find(str(tmp_path))
    with pytest.raises(ValueError, match="is not beyond"):
        run_pretraining.main(
            [*RUN, "--output_dir", str(tmp_path / "out"), "--max_steps=20", f"--resume_from_checkpoint={kept}/step-25"]
        )
    # As when images are gone since: the length is the user's own
    with pytest.raises(ValueError, match="^num_train_samples=160, which is 20 steps of 8 images, is not beyond .*; r"):
        flags = [flag for flag in RUN if "max_steps" not in flag]
        flags += ["--num_train_samples=160", f"--resume_from_checkpoint={kept}/step-25"]
        run_pretraining.main([*flags, f"--output_dir={tmp_path / 'out'}"])


def test_the_best_checkpoint_by_probe_is_kept_and_images_and_trackers_go_on(tmp_path, monkeypatch):
    accuracies = iter([0.1, 0.9, 0.5, 0.4, 0.3])  # untrained, steps 2, 4, 6, 8; then once more from step 6
    measured = []

    def measure(self, embed, linear=True):
        measured.append(next(accuracies, 0.2))
        intervals = {"knn_interval": [0.0, 1.0], "linear_probe_interval": [0.0, 1.0]}
        return {"knn": measured[-1], "linear_probe": 0.0, "num_test": 2, **intervals}

    monkeypatch.setattr(Probe, "measure", measure)
    monkeypatch.setattr("modeling_can.pretraining.probing.raw_pixels", None)
    options = [*RUN, f"--output_dir={tmp_path}", "--max_steps=9", "--save_steps=2", "--save_total_limit=1",
               "--probe_every=2", "--probe_dataset_name=sample_data"]  # fmt: skip
    accuracies = iter([0.0, *accuracies])  # raw pixels first
    results = run_pretraining.main(options)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-8"]
    assert results["best_probe"] == {"step": 2, "knn": pytest.approx(0.9)}
    assert "features grow worse: k-NN 30.0%, after 90.0% at step 2" not in str(results["health"])  # too early to judge
    run_pretraining.main([*options, "--resume_from_checkpoint=latest"])
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder), {"images": 0, "scalars": 0})
    events.Reload()
    knn = {event.step: event.value for event in events.Scalars("knn")}
    assert knn == pytest.approx({2: 0.9, 4: 0.5, 6: 0.4, 8: 0.3})
    assert {"loss", "contrastive_loss", "denoising_trivial", "effective_rank", "data_wait"} <= set(
        events.Tags()["scalars"]
    )
    for name in ("reconstructions", "features"):
        assert {event.step for event in events.Images(name)} >= {2, 4, 6, 8, 9}


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, capfd):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modeling_can.pretraining.checkpoints.put_in_place", full)
    monkeypatch.setattr("modeling_can.pretraining.run_log.reconstruction_sheet", full)
    results = run_pretraining.main([*RUN, f"--output_dir={tmp_path}", "--max_steps=12", "--log_with=none"])
    output = capfd.readouterr().out
    assert output.count("No space left on device; training goes on, and tries again at the next one") == 2
    assert "the images of step 12 could not be drawn" in output and results["num_steps"] == 12
    assert (tmp_path / "model.safetensors").exists() and not list((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_of_another_run_replaces_no_unfinished_one(uninterrupted, tmp_path):
    (tmp_path / "checkpoints" / "step-40").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds an unfinished run"):
        run_pretraining.main([*RUN, f"--output_dir={tmp_path}", "--max_steps=50",
                              f"--resume_from_checkpoint={uninterrupted}/checkpoints/step-25"])  # fmt: skip
    assert (tmp_path / "checkpoints" / "step-40").is_dir()


def test_settings_that_changed_are_named_and_another_model_is_refused(uninterrupted, tmp_path, capfd):
    resume = [*RUN, f"--resume_from_checkpoint={uninterrupted}/checkpoints/step-25"]
    with pytest.raises(ValueError, match="is of another model: intermediate_size was 64, is 32; give it the same"):
        run_pretraining.main([*resume, f"--output_dir={tmp_path / 'a'}", "--intermediate_size=32"])
    run_pretraining.main([*resume, f"--output_dir={tmp_path / 'b'}", "--base_learning_rate=0.001"])
    output = capfd.readouterr().out
    assert "settings that changed since: base_learning_rate was 0.006, is 0.001" in output


def test_other_settings_have_means_of_their_own_and_another_step_is_told(uninterrupted, tmp_path, capfd):
    """The checkpoint lies between two lines of the log."""
    results = run_pretraining.main([*RUN, f"--resume_from_checkpoint={uninterrupted}/checkpoints/step-25",
                                    f"--output_dir={tmp_path}", "--contrastive_loss_weight=0",
                                    "--per_device_train_batch_size=4"])  # fmt: skip
    after = [line for line in steps(tmp_path) if line["step"] > 25]
    assert len(after) == 2 and not any("contrastive_loss" in line for line in after)
    output = capfd.readouterr().out
    assert "a step has 4 images and had 8: learning rate, length and the place in the schedule are those" in output
    assert results["train_flops"] == results["flops_per_image"] * (25 * 8 + 5 * 4)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_sentence(tmp_path, capfd):
    before = ["--noise_head=shared", "--norm_noise_loss=false"]  # and nothing else
    run_pretraining.main([*RUN, *before, f"--output_dir={tmp_path / 'a'}"])
    path = tmp_path / "a" / "checkpoints" / "step-25"
    shared = torch.load(path / "shared.pt", weights_only=False)
    for name in ("data_on_device", "noise_head", "norm_noise_loss"):  # which it did not know
        del shared["recipe"][name]
    shared["recipe"]["torch_compile"] = False
    for part in (shared["recipe"], shared["progress"]):
        for former, name in FORMER_NAMES.items():
            if name in part:
                part[former] = part.pop(name)
    assert "greyscale_probability" in shared["recipe"] and "ledger_bytes" in shared["progress"]
    torch.save(shared, path / "shared.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["shared.pt"] = describe_file(path / "shared.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    resume = [*RUN, f"--resume_from_checkpoint={path}", f"--output_dir={tmp_path / 'b'}", "--overwrite_output_dir"]
    assert run_pretraining.main([*resume, *before])["num_steps"] == 30
    output = capfd.readouterr().out
    assert (
        "settings that changed since: torch_compile was False, is auto; an earlier version wrote it, whose" in output
    )
    with pytest.raises(ValueError, match="is of another model: .*noise_head was shared, is own"):
        run_pretraining.main(resume)
    run_pretraining.main([*resume, "--noise_head=shared"])
    assert "norm_noise_loss was False, is True" in capfd.readouterr().out


def test_the_optimizer_takes_the_settings_of_the_recipe(uninterrupted, tmp_path, monkeypatch, capfd):
    used = []
    monkeypatch.setattr(torch.optim.AdamW, "step", spied(torch.optim.AdamW.step, used))
    run_pretraining.main([*RUN, f"--resume_from_checkpoint={uninterrupted}/checkpoints/step-25", "--weight_decay=0.5",
                          "--adam_beta2=0.999", f"--output_dir={tmp_path}"])  # fmt: skip
    assert used[-5:] == [[(0.5, (0.9, 0.999)), (0.0, (0.9, 0.999))]] * 5  # before them torch makes room for the state
    assert "weight_decay was 0.05, is 0.5" in capfd.readouterr().out


def spied(step, used: list):
    def spy(self, *arguments, **options):
        used.append([(group["weight_decay"], tuple(group["betas"])) for group in self.param_groups])
        return step(self, *arguments, **options)

    return spy


def test_a_term_that_a_checkpoint_did_not_train_is_refused(tmp_path):
    without = ["--contrastive_loss_weight=0", "--max_steps=2", "--save_steps=1", f"--output_dir={tmp_path / 'a'}"]
    run_pretraining.main([*RUN, *without])
    resume = [*RUN, f"--resume_from_checkpoint={tmp_path}/a/checkpoints/step-1", f"--output_dir={tmp_path / 'b'}"]
    with pytest.raises(
        ValueError, match="did not train the projection_head: .*contrastive_loss_weight was 0.0, is 0.1"
    ):
        run_pretraining.main(resume)


def test_a_finished_run_that_is_made_longer_goes_on(tmp_path, capfd):
    without_length = [flag for flag in RUN if "max_steps" not in flag]
    run = [*without_length, f"--output_dir={tmp_path}", "--resume_from_checkpoint=latest", "--save_steps=1"]
    for num_samples, num_steps in ((16, 2), (16, 2), (32, 4)):
        results = run_pretraining.main([*run, f"--num_train_samples={num_samples}"])
        assert results["num_steps"] == num_steps
    told = capfd.readouterr().out
    assert told.count("is finished: nothing to do. To make it longer raise num_train_samples or max_steps. ") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    peak, rate = results["learning_rate"], lines[-1]["learning_rate"]
    assert rate == learning_rate(3, max_steps=4, warmup_steps=results["warmup_steps"], peak=peak)  # of the new length


def test_other_folders_are_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    for name in ("step-2-keep", "step-9.partial"):
        (tmp_path / name).mkdir()
    assert checkpoints.find("latest") is None
    checkpoints.save(1, {"w": torch.ones(3)}, {}, {})
    assert checkpoints.find("latest").name == "step-1"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, {"w": torch.ones(3)}, {}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk were full: writing more fails
    try:
        with pytest.raises(OSError, match="step-2 could not be written"):
            checkpoints.save(2, {"w": torch.ones(100_000)}, {}, {})
        # torch says no more than `unexpected pos 64 vs 0`
        with pytest.raises(OSError, match=r"step-2 could not be written \([\d.e+]+ MB were free there\): "):
            checkpoints.save(2, {"w": torch.ones(3)}, {"optimizer": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoints.find("latest").name == "step-1"
