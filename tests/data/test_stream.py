"""The order of the stream: each worker's part, shuffling, epochs."""

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from testing_utils import encoded_image, identity, read

from modeling_can.data import ImageSource, ViewStream


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (2, 0), (2, 2), (1, 2)])
def test_workers_share_every_epoch_without_overlap(shards, num_processes, num_workers):
    folder, everything = shards
    source = ImageSource(data_files=f"{folder}/*.parquet")
    shares = [
        read(ViewStream(source, identity, 0, rank, num_processes), 2 * 24 // num_processes, num_workers)
        for rank in range(num_processes)
    ]
    for epoch in range(2):  # the stream goes on into the second epoch without a gap
        seen = [x for share in shares for x in share[epoch * len(share) // 2 : (epoch + 1) * len(share) // 2]]
        assert sorted(seen) == everything


def test_rows_are_dealt_with_a_warning_where_shards_are_too_few(shards, caplog):
    folder, everything = shards
    source = ImageSource(data_files=f"{folder}/train-0.parquet")
    shares = [read(ViewStream(source, identity, 0, rank, 3), 2) for rank in range(3)]
    assert len({x for share in shares for x in share}) == 6
    assert "1 shards for 3 workers" in caplog.text


def test_order_depends_on_seed_and_epoch_and_is_reproducible(shards):
    source = ImageSource(data_files=f"{shards[0]}/*.parquet")
    first = read(ViewStream(source, identity, 0), 48)
    assert first == read(ViewStream(source, identity, 0), 48)
    assert first != read(ViewStream(source, identity, 1), 48)
    assert first[:24] != first[24:]
    assert read(ViewStream(source, identity, 0, block_size=5), 24) != first[:24]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_shards_are_shuffled_and_dealt_anew_for_every_epoch(shards, num_processes):
    source = ImageSource(data_files=f"{shards[0]}/*.parquet")
    shard_of = {
        x: i
        for i in range(4)
        for x in read(ViewStream(ImageSource(data_files=f"{shards[0]}/train-{i}.parquet"), identity), 6)
    }

    def shard_orders(seed):
        """For each of six epochs, the shards in the order in which the first process reads them."""
        share = read(ViewStream(source, identity, seed, 0, num_processes, block_size=1), 6 * 24 // num_processes)
        per_epoch = 24 // num_processes
        return [
            tuple(dict.fromkeys(shard_of[x] for x in share[e * per_epoch : (e + 1) * per_epoch])) for e in range(6)
        ]

    first = shard_orders(0)
    assert len(set(first)) > 2 and first != shard_orders(1) and first == shard_orders(0)
    assert all(len(order) == 4 // num_processes for order in first)
    if num_processes == 2:
        assert len({frozenset(order) for order in first}) > 1  # processes exchange shards between epochs


def test_an_image_is_cropped_anew_in_every_epoch(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded_image(color=(i, 2, 3), format="PNG"))
    epochs = []
    stream = ViewStream(
        ImageSource(data_dir=str(tmp_path)), lambda encoded, epoch: epochs.append(epoch) or np.zeros(1)
    )
    reading = iter(stream)
    for _ in range(9):
        next(reading)
    assert epochs == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_single_shard_is_shuffled_anew_in_every_epoch(shards):
    source = ImageSource(data_files=f"{shards[0]}/train-0.parquet")
    rows = read(ViewStream(source, identity), 6 * 6)
    assert len({tuple(rows[6 * epoch : 6 * epoch + 6]) for epoch in range(6)}) > 4


def test_every_block_is_shuffled_in_its_own_way(tmp_path):
    images = [encoded_image(color=(i * 10, 5, 100), format="PNG") for i in range(24)]
    rows = {"image": [{"bytes": p, "path": None} for p in images]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(tmp_path / "one.parquet")
    place = {int(identity(p, 0)[0]): i for i, p in enumerate(images)}
    order = [
        place[x]
        for x in read(ViewStream(ImageSource(data_files=f"{tmp_path}/one.parquet"), identity, block_size=6), 24)
    ]
    blocks = [tuple(i - 6 * block for i in order[6 * block : 6 * block + 6]) for block in range(4)]
    assert all(sorted(block) == list(range(6)) for block in blocks) and len(set(blocks)) > 2
