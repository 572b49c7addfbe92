"""The linear probe with few labels."""

import numpy as np
import torch

from .linear import linear_probe, mean_and_std
from .protocol import Entry, Features, Measure, Panel, Protocol, Setup
from .sets import by_class


__all__ = ["FewShot", "SHOTS", "draw_shots", "few_shot_predictions"]

SHOTS = ("1", "2", "5", "10", "1%", "10%")


def draw_shots(labels: np.ndarray, shots: str, rng: np.random.Generator, names: list[str] | None = None) -> np.ndarray:
    """
    Random indices of so many images of every class (`"5"`) or of a fraction of every class, at least one image
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
    standardized by all training images, which takes no labels.
    """
    predictions, moments = [], mean_and_std(train)
    for draw in range(num_draws):
        chosen = draw_shots(labels, shots, np.random.default_rng((seed, draw)))
        probe = linear_probe(
            features=train[chosen],
            labels=labels[chosen],
            num_classes=num_classes,
            seed=seed,
            device=device,
            moments=moments,
        )
        predictions.append(probe.predict(test))
    return predictions


class FewShot(Protocol):
    """The linear probe of the frozen features with few labels, over several draws of them."""

    name, on_features, for_baselines = "few_shot", True, True
    panel = Panel("few-shot", "labels", is_line=False)  # numbers and shares are no line

    def prepare(self, setup: Setup):
        for shots in setup.settings.shots:
            draw_shots(setup.data.train.labels, shots, np.random.default_rng(0), setup.data.class_names)

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict:
        settings, labels, figures = setup.settings, setup.data.train.labels, {}
        for shots in settings.shots:
            draws = few_shot_predictions(
                train=features.train,
                labels=labels,
                test=features.test,
                num_classes=setup.num_classes,
                shots=shots,
                num_draws=settings.num_draws,
                seed=settings.seed,
                device=setup.device,
            )
            right = np.stack([predictions == setup.data.test.labels for predictions in draws])
            accuracies = right.mean(axis=1)
            figures[shots] = {
                "accuracy": float(accuracies.mean()),
                "std": float(accuracies.std(ddof=1)) if len(draws) > 1 else None,
                "interval": setup.interval(right.mean(axis=0)),
                "draws": accuracies.tolist(),
            }
        return figures

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        return {
            f"{shots} of the labels" if "%" in shots else f"{shots} a class": Measure(
                score["accuracy"], score["interval"], spread=score["std"] or 0.0, pooling=pooling
            )
            for shots, score in figures.items()
        }
