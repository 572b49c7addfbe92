"""The linear probe with few labels."""

import numpy as np
import torch

from .linear import linear_probe, mean_and_std
from .sets import by_class


__all__ = ["SHOTS", "draw_shots", "few_shot_predictions"]

SHOTS = ("1", "2", "5", "10", "1%", "10%")


def draw_shots(labels: np.ndarray, shots: str, rng: np.random.Generator, names: list[str] | None = None) -> np.ndarray:
    """
    Random indices of so many images of every class (`"5"`) or of so large a share of every class, at least one image
    (`"10%"`).

    Raises:
        ValueError: if a class has fewer.
    """
    chosen = []
    for own in by_class(labels, rng):
        wanted = max(1, round(float(shots[:-1]) / 100 * len(own))) if shots.endswith("%") else int(shots)
        if wanted > len(own):
            label = labels[own[0]]
            raise ValueError(
                f"shots={shots} wants {wanted} images of class {names[label] if names else label}, which has "
                f"{len(own)}; give other --shots"
            )
        chosen.append(own[:wanted])
    return np.concatenate(chosen)


def few_shot_predictions(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    shots: str,
    num_draws: int = 5,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[np.ndarray]:
    """
    What the linear probe predicts with the labels of `shots` images alone, for each of several draws. Features are
    standardised by all training images, which takes no labels.
    """
    predictions, moments = [], mean_and_std(train)
    for draw in range(num_draws):
        chosen = draw_shots(labels, shots, np.random.default_rng((seed, draw)))
        probe = linear_probe(train[chosen], labels[chosen], num_classes, seed, device, moments)
        predictions.append(probe.predict(test))
    return predictions
