"""The linear probe: multinomial logistic regression on frozen features."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .protocol import Entry, Features, Measure, Protocol, Setup
from .sets import hold_out


__all__ = [
    "LinearProbe",
    "fit_probe",
    "INVERSE_PENALTIES",
    "LinearClassifier",
    "held_out_scores",
    "linear_probe",
    "mean_and_std",
]

INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the linear probe, the strongest penalty first
_MAX_ITERATIONS = 100  # for each, from where the one before ended; the held-out images judge an unfinished fit as any


class LinearClassifier(NamedTuple):
    """
    Logits = features @ weight.T + bias.

    Args:
        weight (`np.ndarray` of shape `(num_classes, d)`), bias (`np.ndarray` of shape `(num_classes,)`): On features
            as they are, so that they can become the last layer of a model.
        inverse_penalty (`float`): C, which was chosen.
        held_out_score (`float`, *optional*): What C was chosen by, in [0, 1]: accuracy, of patches mIoU.
    """

    weight: np.ndarray
    bias: np.ndarray
    inverse_penalty: float
    held_out_score: float | None

    def predict(self, features: np.ndarray) -> np.ndarray:
        return (features @ self.weight.T + self.bias).argmax(axis=1)


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    moments: tuple[np.ndarray, np.ndarray] | None = None,
) -> LinearClassifier:
    """
    Multinomial logistic regression on standardized features, with the penalty |W|^2 / 2C beside the sum of the losses.
    C, at most scikit-learn's default of 1, is chosen on a fifth of every class, from the strongest penalty on until
    two weaker ones in a row are worse than the best; then all images are fitted. Where no class has the three images
    of which one can be held out, C is 1.

    Args:
        device: A GPU runs torch's L-BFGS, a CPU scikit-learn's.
        moments (`(np.ndarray, np.ndarray)`, *optional*): Mean and standard deviation to scale by; their own if `None`.
    """
    mean, std = moments or mean_and_std(features)
    held_out, fit = hold_out(labels, 0.2, seed)
    order, num_fit = np.concatenate([fit, held_out]), len(fit)
    scaled, labels = features[order], labels[order]  # the one copy: parts of it are views
    scaled -= mean
    scaled /= std
    fit_weights = _logistic_regression(num_classes, device)

    def accuracy(inverse_penalty: float) -> float:
        weights = fit_weights(scaled[:num_fit], labels[:num_fit], inverse_penalty)
        predicted = (scaled[num_fit:] @ weights[:-1] + weights[-1]).argmax(axis=1)
        return float((predicted == labels[num_fit:]).mean())

    accuracies = held_out_scores(accuracy, INVERSE_PENALTIES if len(held_out) else ())
    best = max(accuracies, key=accuracies.get, default=1.0)  # the strongest of equals
    weights = fit_weights(scaled, labels, best)
    weight = (weights[:-1] / std[:, None]).T
    return LinearClassifier(weight, weights[-1] - weight @ mean, best, accuracies.get(best))


def held_out_scores(score: Callable[[float], float], inverse_penalties: tuple[float, ...]) -> dict[float, float]:
    """
    What is scored with each penalty, from the strongest on until two weaker ones in a row are worse than the best: the
    weakest ones take the longest.
    """
    scores = {}
    for inverse_penalty in inverse_penalties:
        scores[inverse_penalty] = score(inverse_penalty)
        if len(scores) >= 3 and max(list(scores.values())[-2:]) < max(scores.values()):
            break
    return scores


def mean_and_std(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every column, in fp32, summed up in fp64 part by part, as all at once would double the memory."""
    parts = np.array_split(features, -(-len(features) // 65_536))
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / len(features)
    variance = sum(((part - mean) ** 2).sum(axis=0) for part in parts) / len(features)
    return mean.astype(np.float32), np.maximum(variance**0.5, 1e-6).astype(np.float32)


def _logistic_regression(num_classes: int, device) -> Callable[[np.ndarray, np.ndarray, float], np.ndarray]:
    """
    A function (features, labels, C) -> weights `(d + 1, num_classes)`, bias last, that starts where its last call
    ended.
    """
    if torch.device(device).type != "cpu":
        return _torch_logistic_regression(num_classes, device)
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and only this needs it
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)

    def fit(features, labels, inverse_penalty):
        present = np.unique(labels)
        # Of two classes scikit-learn fits the difference, whose square is twice that of the two halves.
        model.C = 2 * inverse_penalty if len(present) == 2 else inverse_penalty
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model.fit(features, labels)
        coefficients, bias = model.coef_, model.intercept_
        if len(present) == 2:
            coefficients, bias = np.concatenate([-coefficients, coefficients]) / 2, np.append(-bias, bias) / 2
        weights = np.zeros((features.shape[1] + 1, num_classes), dtype=np.float32)
        weights[-1] = -np.inf  # of classes without an image
        weights[:-1, present], weights[-1, present] = coefficients.T, bias
        return weights

    return fit


def _torch_logistic_regression(num_classes: int, device):
    weights = None

    def fit(features, labels, inverse_penalty):
        nonlocal weights
        decay = 1 / (inverse_penalty * len(features))  # beside the mean of the losses
        features, labels = torch.as_tensor(features, device=device), torch.as_tensor(labels, device=device)
        if weights is None:
            weights = torch.zeros(features.shape[1] + 1, num_classes, device=device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=_MAX_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            logits = torch.addmm(weights[-1], features, weights[:-1])
            loss = nn.functional.cross_entropy(logits, labels) + decay / 2 * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weights.detach().cpu().numpy().copy()

    return fit


class LinearProbe(Protocol):
    """The linear probe of the frozen features; keeps what it fitted in the entry, for the export of a classifier."""

    name, on_features, for_baselines, rank = "linear_probe", True, True, 0

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict:
        entry.probe = probe = fit_probe(setup, features.train)
        predicted = probe.predict(features.test)
        entry.correct["linear_probe"] = predicted == setup.data.test.labels
        return {
            **setup.score(predicted),
            "C": probe.inverse_penalty,
            "held_out_accuracy": probe.held_out_score,
        }

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        return {"linear probe": Measure(figures["accuracy"], figures["interval"], pooling=pooling)}


def fit_probe(setup: Setup, train: np.ndarray) -> LinearClassifier:
    """Of features of all training images."""
    return linear_probe(
        features=train,
        labels=setup.data.train.labels,
        num_classes=setup.num_classes,
        seed=setup.settings.seed,
        device=setup.device,
    )
