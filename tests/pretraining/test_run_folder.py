"""One run a folder; and what can be kept is kept when a disk is full."""

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from testing_utils import ROOT, TINY

import run_pretraining
from modeling_can import CANConfig, CANForPreTraining
from modeling_can.pretraining.checkpoints import Checkpoints
from modeling_can.pretraining.run_folder import lock, save_model, unlock


RUN = [
    *(word for key, value in TINY.items() if key != "image_size" for word in (f"--{key}", str(value))),
    *"--image_size 32 --dataset_name sample_data --probe_dataset_name none --log_with none --save_steps 2".split(),
    *"--per_device_train_batch_size 4 --max_steps 5 --logging_steps 1 --dataloader_num_workers 0".split(),
]  # fmt: skip
OWNER = """
import sys
from pathlib import Path
from modeling_can.pretraining.run_folder import lock
kept = lock(Path(sys.argv[1]))
print("has it", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_for_one_run(tmp_path):
    folder = tmp_path / "out"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert owner.stdout.readline() == "has it\n"
        expected = rf"another run is using output_dir={folder} \(process {owner.pid} on {socket.gethostname()}\)"
        for _ in range(2):  # asking does not take it away
            with pytest.raises(ValueError, match=expected):
                lock(folder)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    kept = lock(folder)  # its owner is gone
    assert str(os.getpid()) in (folder / ".lock").read_text()
    unlock(kept)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_refused_with_the_fix(tmp_path):
    (tmp_path / "file").write_text("")
    reasons = {
        tmp_path / "file": f"{tmp_path}/file is a file",
        tmp_path / "file" / "below": f"{tmp_path}/file is a file",
    }
    if Path("/proc/self").exists():
        reasons[Path("/proc/out")] = "No such file or directory"
    for folder, reason in reasons.items():
        expected = f"output_dir={folder} cannot be used: {reason}; give another --output_dir"
        with pytest.raises(ValueError, match=f"^{expected}$"):
            lock(folder)
        with pytest.raises(ValueError, match=f"^{expected}$"):
            run_pretraining.main([*RUN, f"--output_dir={folder}", "--preflight"])


def test_a_full_disk_is_refused_by_the_name_of_the_folder(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as if the disk were full: no file can be written
    try:
        with pytest.raises(ValueError, match=f"output_dir={tmp_path} cannot be written to: .*; make room, or give"):
            lock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
def test_a_run_refuses_the_folder_of_another_one(tmp_path):
    kept = lock(tmp_path)
    command = [sys.executable, str(ROOT / "run_pretraining.py"), *RUN, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"(process {os.getpid()} on" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    unlock(kept)


def test_a_model_is_saved_whole_or_elsewhere(tmp_path, monkeypatch):
    model = CANForPreTraining(CANConfig(**TINY))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))

    def processor(folder):
        (folder / "preprocessor_config.json").write_text("{}")
        if folder.is_relative_to(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out, full = tmp_path / "out", tmp_path / "none"
    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    save_model(out, model.save_pretrained, processor)
    assert CANForPreTraining.from_pretrained(out).num_parameters() == model.num_parameters()
    before = sorted(path.name for path in out.iterdir())
    assert {"metrics.jsonl", "preprocessor_config.json", "model.safetensors"} < set(before)

    full = out
    (out / "model.safetensors").write_text("of before")
    with pytest.raises(OSError, match=r"could not be saved in .*out: .*No space left.* It is in .*tmp/out-\d+: make"):
        save_model(out, model.save_pretrained, processor)
    assert sorted(path.name for path in out.iterdir()) == [*sorted({*before, "checkpoints"})]
    assert (out / "model.safetensors").read_text() == "of before"
    (place,) = (tmp_path / "tmp").iterdir()
    assert CANForPreTraining.from_pretrained(place).num_parameters() == model.num_parameters()

    full = tmp_path
    with pytest.raises(OSError, match=r"could not be saved \(.*out: .*checkpoints: .*tmp: .*resume_from_checkpoint"):
        save_model(out, model.save_pretrained, processor)


@pytest.mark.slow
def test_a_full_disk_of_the_log_ends_no_run(tmp_path):
    command = [sys.executable, str(ROOT / "run_pretraining.py"), *RUN, "--output_dir", str(tmp_path)]
    with open("/dev/full", "w") as full:
        subprocess.run(command, stdout=full, stderr=full)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "results.json").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_a_full_disk_at_the_end_costs_no_weights(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    flags = [*RUN, "--save_steps", "100", "--output_dir", str(out)]
    mount = f'mount -t tmpfs -o size=60k t {out} || exit 77; "$@"; status=$?; ls -A {out}; exit $status'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, str(ROOT / "run_pretraining.py"), *flags]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount a file system")
    (place,) = tmp_path.glob("out-*")
    assert done.returncode == 1 and f"It is in {place}" in done.stderr and "Traceback" not in done.stderr
    assert "model.safetensors" not in done.stdout
    CANForPreTraining.from_pretrained(place)


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = Checkpoints(tmp_path, limit=1).save(3, {}, {}, {})
    assert Checkpoints(tmp_path, limit=1).find("latest") == path
