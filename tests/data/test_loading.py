"""A wait for data ends: in a batch, in an error that names the cause, or in a stop signal."""

import os
import signal
import subprocess
import sys
import threading
import time

import datasets
import pytest
import torch
from testing_utils import ROOT

from modeling_can.data import ImageSource, ViewStream, loading
from modeling_can.data.loading import Patient, view_loader, worker_options


TINY = (
    "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 64 --decoder_hidden_size 16 "
    "--decoder_num_hidden_layers 1 --decoder_num_attention_heads 2 --decoder_intermediate_size 32 --image_size 32 "
    "--patch_size 8 --per_device_train_batch_size 4 --log_with none --probe_dataset_name none"
).split()


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(loading, "POLL_SECONDS", 0.3)


class Numbers(torch.utils.data.Dataset):
    """Before the third item, what `act` says happens in the worker."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 2:
            self.act()
        return torch.tensor(index)


def numbers(act, **options):
    loader = torch.utils.data.DataLoader(Numbers(act), batch_size=None, **worker_options(1))
    return Patient(loader, **options)


def test_a_slow_batch_is_awaited_and_none_is_lost():
    batches = numbers(lambda: time.sleep(1.2))  # four times as long as the workers are waited for at once
    assert [int(x) for x in batches] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_batch_that_never_comes_is_an_error():
    batches = numbers(lambda: time.sleep(60), patience=0.8)
    assert [int(next(batches)), int(next(batches))] == [0, 1]
    with pytest.raises(TimeoutError, match="no batch came from 1 loader workers.*/dev/shm"):
        next(batches)


def test_a_killed_worker_is_named_as_such():
    batches = numbers(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(OSError, match=r"loader worker \d+ was killed by SIGKILL \(often because memory ran out\)"):
        list(batches)


def test_an_error_in_a_worker_stays_what_it_is():
    def fail():
        raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        list(numbers(fail))


def test_a_temporary_folder_too_long_for_a_socket_is_refused(monkeypatch):
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: f"/tmp/{'x' * 80}/pymp-12345678")
    with pytest.raises(ValueError, match="TMPDIR=/tmp/x+ is longer than .*dataloader_num_workers to 0"):
        worker_options(1)
    assert worker_options(0) == {"num_workers": 0, "timeout": 0}


def rows(number: int) -> datasets.Dataset:
    encoded = (ROOT / "modeling_can" / "data" / "sample_data").glob("*.parquet")
    tiles = datasets.Dataset.from_parquet(str(sorted(encoded)[0])).cast_column("image", datasets.Image(decode=False))
    return tiles.select(range(number)).select_columns(["image"])


@pytest.mark.slow
def test_fewer_images_than_workers(caplog):
    source = ImageSource(dataset=rows(3))
    stream = ViewStream(source, lambda encoded, epoch: torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    loader = view_loader(stream, 4, num_workers=4)
    assert loader.num_workers == 3 and "3 image(s) for 1 processes with 4 loader workers each: 3 each" in caplog.text
    assert next(Patient(loader))["views"].shape == (4, 2, 3, 8, 8)
    with pytest.raises(ValueError, match="3 image.* for 4 processes"):
        view_loader(ViewStream(source, stream.make_views, num_processes=4), 4)


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_worker_without_rows_does_not_spin(num_workers):
    source = ImageSource(dataset=rows(3).to_iterable_dataset())  # which does not tell its length
    make_views = lambda encoded, epoch: torch.zeros(2, 3, 8, 8, dtype=torch.uint8)  # noqa: E731
    stream = ViewStream(source, make_views, process_index=3 if not num_workers else 0, num_processes=4)
    assert source.num_images() is None
    with pytest.raises(ValueError, match=r"has no rows for worker \d+ of \d+; start fewer"):
        for _ in Patient(view_loader(stream, 1, num_workers)):
            pass


STALL = """
import os, sys, time, datasets
sys.path.insert(0, {root!r})
import run_pretraining
tiles = datasets.load_dataset({tiles!r}, split="train").select_columns(["image"])
def rows():
    for index, row in enumerate(tiles):
        if index == 40:
            print("stalls", flush=True)
            time.sleep(1000)
        yield row
if __name__ == "__main__":
    run_pretraining.main(sys.argv[1:], datasets.IterableDataset.from_generator(rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers, number", [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_stop_signal_ends_a_wait_for_data(tmp_path, num_workers, number):
    (tmp_path / "stall.py").write_text(
        STALL.format(root=str(ROOT), tiles=str(ROOT / "modeling_can" / "data" / "sample_data"))
    )
    flags = [*TINY, "--max_steps", "100", "--save_steps", "2", "--shuffle_block_size", "8", "--logging_steps", "1"]
    flags += ["--dataloader_num_workers", str(num_workers), "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "stall.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    too_late = threading.Timer(120, process.kill)
    too_late.start()
    try:
        told = ""  # of the worker and of the run, which share the pipe
        while not ("stalls" in told and "step " in told):
            line = process.stdout.readline()
            assert line, told  # it ended, or was killed
            told += line
        time.sleep(2)  # the batches that were there before are trained on
        process.send_signal(number)
        _, errors = process.communicate(timeout=40)
    finally:
        too_late.cancel()
        process.kill()
    assert process.returncode == 1
    assert f"stopped by {number.name} after step" in errors and "waited for data; to go on, repeat the" in errors
    assert f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoints' / 'step-'}" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("size", [16, 40])  # kB: too little for the queues, and for a batch
def test_a_full_shared_memory_is_named(tmp_path, size):
    flags = [*TINY, "--dataset_name", "sample_data", "--max_steps", "3", "--dataloader_num_workers", "1"]
    command = [sys.executable, str(ROOT / "run_pretraining.py"), *flags, "--output_dir", str(tmp_path / "out")]
    mount = f'mount -t tmpfs -o size={size}k t /dev/shm || exit 77; exec "$@"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", *command], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount a file system")
    assert done.returncode == 1
    # Among what torchdata prints of a loader that could not be built
    assert any(line.startswith("run_pretraining.py: /dev/shm is full") for line in done.stderr.splitlines())
