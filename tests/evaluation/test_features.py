"""Features: every image once and in order, and the cache."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from datasets import Dataset, Features, Image
from testing_utils import encoded, write_split

from modeling_can.data.decoding import decode
from modeling_can.evaluation.features import Extractor, Images, Processes, cached
from modeling_can.evaluation.sets import Split, load_labeled


def split_of(num: int) -> Split:
    images = Dataset.from_dict({"image": [{"bytes": bytes([i]), "path": None} for i in range(num)]},
                                 features=Features({"image": Image(decode=False)}))  # fmt: skip
    return Split("a set", images, np.arange(num))


def first_byte(encoded: bytes, index: int) -> torch.Tensor:
    return torch.tensor([float(encoded[0]), float(index)])


def squared(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"square": batch.square(), "size": torch.full((len(batch), 1), len(batch))}


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (7, 2), (30, 0), (64, 1)])
def test_every_image_comes_once_in_order_whatever_the_batch_size(batch_size, num_workers):
    state = torch.get_rng_state()
    features = Extractor(batch_size, num_workers)(squared, Images(split_of(30), first_byte))
    assert torch.equal(torch.get_rng_state(), state)  # a probe changes nothing of the training around it
    np.testing.assert_array_equal(features["square"], np.stack([np.arange(30.0) ** 2] * 2, axis=1))
    assert features["square"].dtype == np.float32


@pytest.mark.parametrize("count", [2, 3])
def test_several_take_turns_and_extract_what_one_does(count):
    """As threads here; as processes in tests/evaluation/test_command.py. Five batches: the last round is not full."""
    alone, barrier, slots = Extractor(5)(squared, Images(split_of(23), first_byte)), Barrier(count), [None] * count

    def share(index):
        def gather(objects):
            slots[index] = objects
            barrier.wait(timeout=30)
            joined = [item for objects in slots for item in objects]
            barrier.wait(timeout=30)
            return joined

        return Extractor(5, processes=Processes(index, count, gather))(squared, Images(split_of(23), first_byte))

    with ThreadPoolExecutor(count) as threads:
        first, *others = threads.map(share, range(count))
    assert all(other is None for other in others)
    for name in alone:  # the sizes of the batches too
        np.testing.assert_array_equal(first[name], alone[name])


def test_the_cache_knows_what_its_features_depend_on(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"mean": np.arange(6, dtype=np.float32).reshape(2, 3)}

    first = cached(tmp_path, {"weights": "a"}, make)
    again = cached(tmp_path, {"weights": "a"}, make)
    np.testing.assert_array_equal(first["mean"], again["mean"])
    assert len(calls) == 1
    cached(tmp_path, {"weights": "b"}, make)
    cached(None, {"weights": "a"}, make)
    assert len(calls) == 3
    assert len(list(tmp_path.iterdir())) == 2
    with safetensors.safe_open(next(tmp_path.iterdir()), "np") as file:
        assert "weights" in json.loads(file.metadata()["facts"])


def test_a_damaged_cache_is_made_anew(tmp_path):
    cached(tmp_path, {}, lambda: {"x": np.ones(3, np.float32)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert cached(tmp_path, {}, lambda: {"x": np.full(1, 2.0)})["x"] == 2
    assert cached(tmp_path, {}, None)["x"] == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert cached(tmp_path / "file" / "folder", {}, lambda: {"x": np.ones(1)})["x"] == 1
    assert "not cached" in caplog.text


def test_a_bad_image_is_named_and_not_left_out(tmp_path):
    rows = {"image": [encoded((i, 0, 0)) for i in range(5)] + [b"no image"], "label": [0, 1] * 3}
    write_split(tmp_path, "train", rows)
    write_split(tmp_path, "test", rows)
    data = load_labeled(str(tmp_path))
    images = Images(data.test, lambda encoded, index: torch.from_numpy(decode(encoded)))
    with pytest.raises(
        ValueError, match=r"test: the image of row 5 cannot be used \(not_an_image: .*leaves no image out"
    ):
        Extractor()(lambda batch: {"x": batch.float()}, images)
    images = Images(data.test.select(np.array([5, 0])), lambda encoded, index: torch.from_numpy(decode(encoded)))
    with pytest.raises(ValueError, match="test: the image of row 5 cannot"):
        Extractor()(lambda batch: {"x": batch.float()}, images)
