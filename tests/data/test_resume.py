"""Killed workers continue with exactly the samples that they would have given; sources that fail are tried again."""

import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, interleave_datasets
from PIL import Image
from testing_utils import ROOT, identity

from modeling_can.data import ImageSource, ViewStream, resume, view_loader


NUM_IMAGES, BATCH_SIZE = 120, 4
PROCESS = """
import json, os, sys
import torch
from testing_utils import identity
from modeling_can.data import ImageSource, ViewStream, resume, view_loader

source, rank, state_path, num_batches = sys.argv[1:]
stream = ViewStream(ImageSource(**json.loads(source)), identity, seed=3, process_index=int(rank), num_processes=2,
                    block_size=7)
loader = view_loader(stream, 4, 2)
if os.path.exists(state_path):
    resume(loader, [torch.load(f"{state_path[:-1]}{r}", weights_only=False) for r in range(2)])
for index, batch in enumerate(loader):
    torch.save(loader.state_dict(), state_path + ".partial")
    print(json.dumps(batch["views"].flatten().tolist()), flush=True)
    if index + 1 == int(num_batches):
        os.replace(state_path + ".partial", state_path)
        print("now", flush=True)  # and goes on until it is killed
"""


def run_until_killed(source, state_paths, num_batches) -> list[list[list[int]]]:
    """Two processes with two workers each read on from their states; killed at some moment after so many batches."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps(source), str(rank), str(state_path), str(num_batches[rank])],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        for rank, state_path in enumerate(state_paths)
    ]
    batches = []
    try:
        for process in processes:
            lines = list(iter(process.stdout.readline, "now\n"))
            batches.append([json.loads(line) for line in lines])
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            process.wait()
    return batches


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "parquet",
        "one parquet shard",
        "tar",
        "folder",
    ],
)
def test_killed_twice_the_stream_is_that_of_an_uninterrupted_run(sources, tmp_path, kind):
    source = sources[kind]
    rng = np.random.default_rng(0)
    cuts = rng.integers(3, 16, size=(2, 2))
    paths = [tmp_path / f"state{rank}" for rank in range(2)]
    parts = [run_until_killed(source, paths, num_batches) for num_batches in (*cuts, (8, 8))]
    total = cuts.sum(0) + 8
    whole = run_until_killed(source, [tmp_path / f"other{rank}" for rank in range(2)], total)
    for rank in range(2):
        resumed = [batch for part in parts for batch in part[rank]]
        assert len(resumed) == total[rank] and resumed == whole[rank]
    if kind == "parquet":  # five shards among four workers: those with one shard go on into the next epoch sooner
        assert len({x for batch in whole[0] + whole[1] for x in batch}) > 60


def test_state_inside_a_process_too(sources):
    """Without workers, at every point of two epochs."""
    source = ImageSource(**sources["one parquet shard"])

    def loader():
        return view_loader(ViewStream(source, identity, block_size=5), 3)

    batches, states = [], []
    running = loader()
    for batch in itertools.islice(running, 16):
        batches.append(batch["views"].flatten().tolist())
        states.append(running.state_dict())
    for index in range(0, 15):
        resumed = loader()
        assert resume(resumed, [states[index]])
        following = [batch["views"].flatten().tolist() for batch in itertools.islice(resumed, 15 - index)]
        assert following == batches[index + 1 :], index


@pytest.mark.parametrize("num_batches, num_processes", [(10, 1), (10, 3), (16, 3), (16, 4)])
def test_another_number_of_workers_finishes_the_epoch_approximately(sources, caplog, num_batches, num_processes):
    source = ImageSource(**sources["parquet"])
    seen, states = [], []
    for rank in range(2):
        loader = view_loader(ViewStream(source, identity, 0, rank, 2, block_size=6), 3)
        seen += [x for b in itertools.islice(loader, num_batches) for x in b["views"].flatten().tolist()]
        states.append(loader.state_dict())
    assert len(set(seen)) == 6 * num_batches < NUM_IMAGES  # within the first epoch
    first_epoch, second_epoch = [], []
    for rank in range(num_processes):
        stream = ViewStream(source, identity, 0, rank, num_processes, block_size=6)
        loader = view_loader(stream, 1)
        assert not resume(loader, states)
        for batch in loader:
            epoch = stream.state_dict()["epoch"]
            if epoch > 1:
                break
            (first_epoch, second_epoch)[epoch].append(int(batch["views"]))
    assert (
        f"{num_processes} workers (processes x loader workers) resume what 2 began: epoch 0 is finished" in caplog.text
    )
    left = NUM_IMAGES - 6 * num_batches
    # Workers with few rows leave out fewer than the others would have to.
    assert len(set(first_epoch)) == len(first_epoch) and left <= len(first_epoch) <= left + 24
    assert sorted(second_epoch) == sources["crcs"]  # from then on whole epochs


def test_another_order_is_not_taken_for_the_same(sources, caplog):
    source = ImageSource(**sources["parquet"])
    loader = view_loader(ViewStream(source, identity), 3)
    next(iter(loader))
    for changed in ({"seed": 1}, {"block_size": 7}):
        assert not resume(view_loader(ViewStream(source, identity, **changed), 3), [loader.state_dict()])
    assert "with another seed, block size or set of images" in caplog.text


@pytest.mark.parametrize("change", ["none", "moved", "added", "removed", "replaced"])
def test_other_images_are_not_taken_for_the_same(tmp_path, change):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index:02}.png")
    loader = view_loader(ViewStream(ImageSource(data_dir=folder), identity), 3)
    next(iter(loader))
    if change == "moved":
        folder = folder.rename(tmp_path / "elsewhere")
    elif change == "added":
        Image.new("RGB", (16, 16)).save(folder / "20.png")
    elif change == "removed":
        (folder / "07.png").unlink()
    elif change == "replaced":
        Image.effect_noise((16, 16), 50).save(folder / "07.png")
    again = view_loader(ViewStream(ImageSource(data_dir=folder), identity), 3)
    assert resume(again, [loader.state_dict()]) == (change in ("none", "moved"))
    assert next(iter(again))["views"].shape[0] == 3


def test_a_shuffle_buffer_is_refused():
    rows = Dataset.from_dict({"image": [None] * 9}).to_iterable_dataset(num_shards=3)
    with pytest.raises(ValueError, match=r"leave out \.shuffle\(\)"):
        ImageSource(dataset=rows.shuffle(buffer_size=3).map(lambda row: row))
    with pytest.raises(ValueError, match=r"leave out \.shuffle\(\)"):
        ImageSource(dataset=interleave_datasets([rows, rows.shuffle(buffer_size=3)]))


@pytest.mark.slow
def test_spawned_workers_read_the_same_as_forked_ones(sources):
    source = ImageSource(**sources["folder"])
    spawned, forked = (
        [
            batch["views"].flatten().tolist()
            for batch in itertools.islice(
                view_loader(ViewStream(source, identity), 4, 1, multiprocessing_context=context), 5
            )
        ]
        for context in ("spawn", "fork")
    )
    assert spawned == forked
