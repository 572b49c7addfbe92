"""Protocols on frozen features against scikit-learn and against what a leak would give; intervals."""

import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from modeling_can.evaluation import few_shot
from modeling_can.evaluation.few_shot import draw_shots, few_shot_predictions
from modeling_can.evaluation.knn import NEIGHBORS, knn_predictions
from modeling_can.evaluation.linear import INVERSE_PENALTIES, linear_probe, mean_and_std
from modeling_can.evaluation.scores import bootstrap_interval
from modeling_can.evaluation.sets import hold_out
from modeling_can.metrics import Accuracy


# --- k-NN ------------------------------------------------------------------------------------------------------------


def test_knn_predicts_what_scikit_learn_does_with_the_same_weights():
    (train, labels), (test, _) = blobs(400), blobs(1100, seed=1)  # more than one part of 512
    predictions = knn_predictions(train, labels, test, 3)
    for k in NEIGHBORS:
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        np.testing.assert_array_equal(predictions[k], theirs.fit(train, labels).predict(test))
    assert any((predictions[1] != predictions[k]).any() for k in NEIGHBORS[1:])  # the data can tell them apart


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
def test_the_probe_is_the_regularized_optimum_on_standardized_features(num_classes):
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
    assert probe.held_out_score == pytest.approx(max(accuracy.values()), abs=0.02)
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


def blobs(num: int, num_classes: int = 3, width: int = 16, seed: int = 0, spread: float = 1.5):
    """Features of overlapping classes, neither centered nor of one scale, and their labels."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(num_classes, width))
    labels = rng.integers(num_classes, size=num)
    features = (centers[labels] + spread * rng.normal(size=(num, width))) * np.linspace(0.1, 5, width) + 3
    return features.astype(np.float32), labels


def test_few_shots_are_standardized_by_all_training_images():
    (train, labels), (test, _) = blobs(300), blobs(200, seed=1)
    for draw, predictions in enumerate(few_shot_predictions(train, labels, test, 3, "2", num_draws=3)):
        chosen = draw_shots(labels, "2", np.random.default_rng((0, draw)))
        probe = linear_probe(train[chosen], labels[chosen], 3, moments=mean_and_std(train))
        np.testing.assert_array_equal(predictions, probe.predict(test))
