"""k nearest neighbors, weighted by similarity."""

import numpy as np
import torch
from torch import nn

from .protocol import Entry, Features, Measure, Panel, Protocol, Setup


__all__ = ["KNN", "NEIGHBORS", "knn_predictions", "nearest_neighbors"]

NEIGHBORS = (1, 5, 10, 20, 100)


def nearest_neighbors(train, test, k: int, device: str | torch.device = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities of the k nearest training features, the nearest first, and their indices; each `(N, k)`."""
    train = nn.functional.normalize(torch.as_tensor(train, device=device), dim=1)
    similarities, indices = [], []
    for part in torch.as_tensor(test).split(512):  # bounds the memory
        part = nn.functional.normalize(part.to(device), dim=1)
        similarity, index = (part @ train.T).topk(min(k, len(train)), dim=1)
        similarities.append(similarity.cpu().numpy())
        indices.append(index.cpu().numpy())
    return np.concatenate(similarities), np.concatenate(indices)


def knn_predictions(
    train,
    train_labels: np.ndarray,
    test,
    num_classes: int,
    ks: tuple[int, ...] = NEIGHBORS,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> dict[int, np.ndarray]:
    """
    For each k the classes that the k nearest training features (cosine) vote for, each with weight
    exp(similarity / temperature) (Wu et al., arXiv 1805.01978, section 3.4). k above their number takes them all.
    """
    similarity, nearest = nearest_neighbors(train, test, max(ks), device)
    # Relative to the nearest one, which leaves the vote as it is, and cannot overflow.
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    rows, predictions = np.arange(len(nearest))[:, None], {}
    for k in ks:
        votes = np.zeros((len(nearest), num_classes), dtype=weights.dtype)
        np.add.at(votes, (rows, train_labels[nearest[:, :k]]), weights[:, :k])
        predictions[k] = votes.argmax(axis=1)
    return predictions


class KNN(Protocol):
    """k-NN of the frozen features, for several k."""

    name, on_features, for_baselines = "knn", True, True
    panel = Panel("k-NN", "k")

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict:
        labels = setup.data.train.labels
        predictions = knn_predictions(features.train, labels, features.test, setup.num_classes, device=setup.device)
        entry.correct["knn"] = predictions[20] == setup.data.test.labels
        return {str(k): setup.score(predicted) for k, predicted in predictions.items()}

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        return {
            f"k-NN, k = {k}": Measure(score["accuracy"], score["interval"], pooling=pooling)
            for k, score in figures.items()
        }
