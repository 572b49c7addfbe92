"""Protocols on frozen features against scikit-learn and against what a leak would give; sets, features, intervals."""

import io
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Picture
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from modeling_can.data.decoding import decode
from modeling_can.evaluation import few_shot
from modeling_can.evaluation.features import Extractor, Pictures, Processes, cached
from modeling_can.evaluation.few_shot import draw_shots, few_shot_predictions
from modeling_can.evaluation.knn import NEIGHBOURS, knn_predictions
from modeling_can.evaluation.linear import INVERSE_PENALTIES, linear_probe, mean_and_std
from modeling_can.evaluation.probe import Probe
from modeling_can.evaluation.scores import bootstrap_interval
from modeling_can.evaluation.sets import Split, hold_out, load_labelled
from modeling_can.metrics import Accuracy


def blobs(num: int, num_classes: int = 3, width: int = 16, seed: int = 0, spread: float = 1.5):
    """Features of overlapping classes, neither centred nor of one scale, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = rng.integers(num_classes, size=num)
    features = (centres[labels] + spread * rng.normal(size=(num, width))) * np.linspace(0.1, 5, width) + 3
    return features.astype(np.float32), labels


def encoded(colour, size=(40, 32)) -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", size, tuple(map(int, colour))).save(buffer, "PNG")
    return buffer.getvalue()


# --- k-NN ------------------------------------------------------------------------------------------------------------


def test_knn_predicts_what_scikit_learn_does_with_the_same_weights():
    (train, labels), (test, _) = blobs(400), blobs(1100, seed=1)  # more than one part of 512
    predictions = knn_predictions(train, labels, test, 3)
    for k in NEIGHBOURS:
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        np.testing.assert_array_equal(predictions[k], theirs.fit(train, labels).predict(test))
    assert any((predictions[1] != predictions[k]).any() for k in NEIGHBOURS[1:])  # the data can tell them apart


def test_knn_takes_all_where_there_are_fewer_than_k():
    (train, labels), (test, _) = blobs(12), blobs(50, seed=1)
    predictions = knn_predictions(train, labels, test, 3, ks=(12, 100))
    np.testing.assert_array_equal(predictions[12], predictions[100])


# --- Linear probe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_probe_of_the_gpu_and_that_of_the_cpu_agree(num_classes, monkeypatch):
    """Within 0.2 points; the GPU's code runs on the CPU here, on a device that is only called otherwise."""
    (train, labels), (test, answers) = (blobs(n, num_classes, 32, seed) for n, seed in ((3000, 0), (5000, 1)))
    ours = linear_probe(train, labels, num_classes)
    original = torch.device

    class Elsewhere(str):
        type = "cuda"

    monkeypatch.setattr(torch, "device", lambda name: Elsewhere(name))
    theirs = linear_probe(train, labels, num_classes, device="cpu")
    monkeypatch.setattr(torch, "device", original)
    assert ours.inverse_penalty == theirs.inverse_penalty
    accuracies = [(probe.predict(test) == answers).mean() for probe in (ours, theirs)]
    assert abs(accuracies[0] - accuracies[1]) <= 0.002 and accuracies[0] > 1.3 / num_classes


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_probe_is_the_regularised_optimum_on_standardised_features(num_classes):
    train, labels = blobs(600, num_classes)
    probe = linear_probe(train, labels, num_classes)
    scaled = (train - train.mean(0)) / train.std(0)
    weight = torch.tensor(probe.weight * train.std(0), requires_grad=True)
    bias = torch.tensor(probe.bias + probe.weight @ train.mean(0), requires_grad=True)
    logits = torch.from_numpy(scaled) @ weight.T + bias
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    (loss + weight.square().sum() / (2 * probe.inverse_penalty * len(train))).backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3  # scikit-learn stops at 1e-4, in float32


def test_the_probe_takes_the_memory_of_the_features_once_more():
    features, labels = blobs(20_000, width=128, spread=5)
    moments = mean_and_std(features)
    tracemalloc.start()
    linear_probe(features, labels, 3, moments=moments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert features.nbytes < peak < 1.5 * features.nbytes


def test_the_probe_does_not_depend_on_scale_and_shift_of_the_features():
    (train, labels), (test, _) = blobs(600), blobs(300, seed=1)
    scale = np.geomspace(0.01, 100, train.shape[1]).astype(np.float32)
    moved = linear_probe(train * scale - 7, labels, 3)
    assert (moved.predict(test * scale - 7) == linear_probe(train, labels, 3).predict(test)).mean() > 0.99


def test_the_penalty_is_chosen_on_a_held_out_fifth():
    train, labels = blobs(300, spread=3.0)
    probe = linear_probe(train, labels, 3, seed=5)
    held_out, fit = hold_out(labels, 0.2, seed=5)
    scaled = (train - train.mean(0)) / train.std(0)
    accuracy = {}
    for inverse_penalty in INVERSE_PENALTIES:
        model = LogisticRegression(C=inverse_penalty, max_iter=2000).fit(scaled[fit], labels[fit])
        accuracy[inverse_penalty] = model.score(scaled[held_out], labels[held_out])
    assert len(set(accuracy.values())) > 1
    assert probe.held_out_accuracy == pytest.approx(max(accuracy.values()), abs=0.02)
    assert accuracy[probe.inverse_penalty] >= max(accuracy.values()) - 0.02


def test_a_class_without_images_is_never_predicted():
    (train, labels), (test, _) = blobs(200), blobs(100, seed=1)
    probe = linear_probe(train, labels + 1, 5)
    assert set(probe.predict(test)) <= {1, 2, 3}


def test_hold_out_takes_its_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 3, 2])
    chosen, rest = hold_out(labels, 0.2, seed=0)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [20, 10, 1, 0]
    assert sorted([*chosen, *rest]) == list(range(155))
    assert not np.array_equal(chosen, hold_out(labels, 0.2, seed=1)[0])
    assert np.bincount(labels[hold_out(labels, 0.9, seed=0)[1]]).min() == 1  # never all of a class


# --- Few-shot --------------------------------------------------------------------------------------------------------


def test_shots_are_so_many_of_every_class_or_so_large_a_share():
    labels = np.repeat([0, 1, 2], [400, 100, 10])
    counts = {"1": [1, 1, 1], "10": [10, 10, 10], "1%": [4, 1, 1], "10%": [40, 10, 1]}
    for shots, expected in counts.items():
        chosen = draw_shots(labels, shots, np.random.default_rng(0))
        assert np.bincount(labels[chosen]).tolist() == expected and len(set(chosen)) == len(chosen)
    with pytest.raises(ValueError, match="shots=11 wants 11 images of class 2, which has 10; give other --shots"):
        draw_shots(labels, "11", np.random.default_rng(0))


def test_few_shot_uses_no_label_but_those_of_its_shots():
    (train, labels), (test, answers) = blobs(300), blobs(200, seed=1)
    honest = few_shot_predictions(train, labels, test, 3, "5", num_draws=3)
    for draw, predictions in enumerate(honest):
        chosen = draw_shots(labels, "5", np.random.default_rng((0, draw)))
        poisoned = (labels + 1) % 3
        poisoned[chosen] = labels[chosen]
        monkey = few_shot.draw_shots
        try:
            few_shot.draw_shots = lambda *_, chosen=chosen: chosen
            (again,) = few_shot_predictions(train, poisoned, test, 3, "5", num_draws=1)
        finally:
            few_shot.draw_shots = monkey
        np.testing.assert_array_equal(predictions, again)
    accuracies = [(predictions == answers).mean() for predictions in honest]
    assert len(set(accuracies)) > 1 and np.mean(accuracies) > 0.4  # draws differ; chance is a third


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    references = np.repeat([0, 1, 5], [50, 10, 3])
    predictions = rng.choice([0, 1, 5], 63)
    result = Accuracy().compute(predictions=predictions, references=references)
    assert result["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    assert result["mean_per_class_accuracy"] == pytest.approx(balanced_accuracy_score(references, predictions))


def test_the_interval_is_that_of_the_binomial_distribution():
    scores = np.arange(1000) % 4 == 0  # mean 0.25
    low, high = bootstrap_interval(scores)
    assert low == pytest.approx(0.25 - 1.96 * np.sqrt(0.25 * 0.75 / 1000), abs=0.004)
    assert high == pytest.approx(0.25 + 1.96 * np.sqrt(0.25 * 0.75 / 1000), abs=0.004)
    for scores in (np.ones(50), np.zeros(50)):  # of which resampling knows no spread
        exact = scipy.stats.binomtest(int(scores.sum()), 50).proportion_ci()
        assert bootstrap_interval(scores) == pytest.approx((exact.low, exact.high))
    assert bootstrap_interval(np.zeros(1)) == (0.0, 0.0)


def test_mean_and_deviation_are_those_of_all_parts_together():
    features = np.random.default_rng(0).normal(1000, 0.1, (70_000, 2)).astype(np.float32)  # two parts, far from zero
    mean, std = mean_and_std(features)
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, features.std(0, dtype=np.float64), rtol=1e-4)


# --- Features --------------------------------------------------------------------------------------------------------


def split_of(num: int) -> Split:
    pictures = Dataset.from_dict({"image": [{"bytes": bytes([i]), "path": None} for i in range(num)]},
                                 features=Features({"image": Image(decode=False)}))  # fmt: skip
    return Split("a set", pictures, np.arange(num))


def first_byte(encoded: bytes, index: int) -> torch.Tensor:
    return torch.tensor([float(encoded[0]), float(index)])


def squared(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"square": batch.square(), "size": torch.full((len(batch), 1), len(batch))}


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (7, 2), (30, 0), (64, 1)])
def test_every_image_comes_once_in_order_whatever_the_batch_size(batch_size, num_workers):
    state = torch.get_rng_state()
    features = Extractor(batch_size, num_workers)(squared, Pictures(split_of(30), first_byte))
    assert torch.equal(torch.get_rng_state(), state)  # a probe changes nothing of the training around it
    np.testing.assert_array_equal(features["square"], np.stack([np.arange(30.0) ** 2] * 2, axis=1))
    assert features["square"].dtype == np.float32


@pytest.mark.parametrize("count", [2, 3])
def test_several_take_turns_and_extract_what_one_does(count):
    """As threads here; as processes in tests/test_run_eval.py. There are five batches: the last round is not full."""
    alone, barrier, slots = Extractor(5)(squared, Pictures(split_of(23), first_byte)), Barrier(count), [None] * count

    def share(index):
        def gather(objects):
            slots[index] = objects
            barrier.wait(timeout=30)
            joined = [item for objects in slots for item in objects]
            barrier.wait(timeout=30)
            return joined

        return Extractor(5, processes=Processes(index, count, gather))(squared, Pictures(split_of(23), first_byte))

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
    data = load_labelled(str(tmp_path))
    pictures = Pictures(data.test, lambda encoded, index: torch.from_numpy(decode(encoded)))
    with pytest.raises(ValueError, match="test: the image of row 5 is not_an_image .*leaves no image out"):
        Extractor()(lambda batch: {"x": batch.float()}, pictures)


# --- Sets ------------------------------------------------------------------------------------------------------------


def write_split(folder, split, rows, label=None):
    label = label or ClassLabel(names=["red", "green"])
    features = Features({"image": Image(), "label": label})
    images = [{"bytes": image, "path": None} for image in rows["image"]]
    Dataset.from_dict({"image": images, "label": rows["label"]}, features=features).to_parquet(
        folder / f"{split}-00000.parquet"
    )


def rows(labels) -> dict:
    return {"image": [encoded((i, i, i)) for i in range(len(labels))], "label": labels}


def test_parquet_shards_and_class_folders_are_read_alike(tmp_path):
    (tmp_path / "shards").mkdir()
    for split, labels in (("train", [0, 1, 1, 0]), ("test", [1, 0])):
        write_split(tmp_path / "shards", split, rows(labels), ClassLabel(names=["green", "red"]))
        for index, label in enumerate(labels):
            path = tmp_path / "folders" / split / ["green", "red"][label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded((index, index, index)))
    shards, folders = (load_labelled(str(tmp_path / kind)) for kind in ("shards", "folders"))
    assert shards.class_names == folders.class_names == ["green", "red"]
    for ours, theirs in zip(shards[:2], folders[:2], strict=True):
        pairs = [{(split.read(i), int(split.labels[i])) for i in range(len(split))} for split in (ours, theirs)]
        assert pairs[0] == pairs[1] and len(pairs[0]) == len(ours)


def test_the_trainers_probe_takes_splits_by_name(tmp_path):
    write_split(tmp_path, "train", rows([0, 1, 0, 1]))
    write_split(tmp_path, "validation", rows([1, 0]))
    probe = Probe(str(tmp_path), None, "train", "validation", "image", "label", None)
    assert (len(probe.set.train), len(probe.set.test)) == (4, 2)
    with pytest.raises(ValueError, match='Unknown split "test".* all these names begin with probe_'):
        Probe(str(tmp_path), None, "train", "test", "image", "label", None)


def test_labels_of_any_type_become_class_indices(tmp_path):
    write_split(tmp_path, "train", rows(["cat", "dog", "ant", "dog"]), Value("string"))
    write_split(tmp_path, "test", rows(["dog", "ant"]), Value("string"))  # fewer classes, other indices of its own
    data = load_labelled(str(tmp_path))
    assert data.class_names == ["ant", "cat", "dog"]
    assert data.train.labels.tolist() == [1, 2, 0, 2] and data.test.labels.tolist() == [2, 0]


def test_a_share_is_held_out_where_there_is_no_test_split(tmp_path):
    write_split(tmp_path, "train", rows([0] * 10 + [1] * 20))
    data = load_labelled(str(tmp_path), test_size=0.2)
    assert np.bincount(data.test.labels).tolist() == [2, 4] and np.bincount(data.train.labels).tolist() == [8, 16]
    images = [{split.read(i) for i in range(len(split))} for split in data[:2]]
    assert not images[0] & images[1] and len(images[0] | images[1]) == 30
    sliced = load_labelled(str(tmp_path), train_split="train[:15]", test_split="train[15:]")
    assert (len(sliced.train), len(sliced.test)) == (15, 15)


ERRORS = {
    "no split": (dict(test=None), {}, "train_split and test_split to others.* test_size=0.2 holds out"),
    "no label column": ({}, dict(label_column="klass"), "no column 'klass'; set label_column to one of label"),
    "no image column": ({}, dict(image_column="photo"), "no column 'photo'; set image_column to one of image, label"),
    "unseen": (dict(train=[0, 0, 1, 1], test=[0, 2]), {}, "1 labels of .*test have no image in .*train: blue"),
    "a single class": (dict(train=[1, 1]), {}, "has a single class, 'green'; a test needs two or more"),
    "unlabelled": (dict(test=[0, None]), {}, "1 rows have no label, the first is row 1"),
    "empty": (dict(test=[]), {}, "has no rows"),
}


@pytest.mark.parametrize("changes, arguments, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_what_is_wrong_and_what_helps(tmp_path, changes, arguments, message):
    for split, labels in {"train": [0, 1, 0, 1], "test": [1, 0], **changes}.items():
        if labels is not None:
            write_split(tmp_path, split, rows(labels), ClassLabel(names=["red", "green", "blue"]))
    with pytest.raises(ValueError, match=message):
        load_labelled(str(tmp_path), **arguments)


def test_several_labels_an_image_and_sets_that_are_not_there_are_refused(tmp_path):
    write_split(tmp_path, "train", rows([[0, 1], [1, 2]]), List(Value("int64")))
    with pytest.raises(ValueError, match="'label' must hold one class for each image"):
        load_labelled(str(tmp_path))
    write_split(tmp_path, "train", rows([[0], [1, 2]]), List(Value("int64")))
    with pytest.raises(ValueError, match="'label' must hold one class for each image"):
        load_labelled(str(tmp_path))
    with pytest.raises(ValueError, match="dataset_name=nobody/nothing cannot be loaded: .*class folders"):
        load_labelled("nobody/nothing")
    write_split(tmp_path, "train", rows([0, 1]))
    with pytest.raises(ValueError, match="image_column='label' holds .* and no images; set it to one of image, label"):
        load_labelled(str(tmp_path), image_column="label")
    (tmp_path / "train-00000.parquet").write_bytes((tmp_path / "train-00000.parquet").read_bytes()[:100])
    with pytest.raises(ValueError, match="(cannot be read|cannot be loaded): "):
        load_labelled(str(tmp_path))
