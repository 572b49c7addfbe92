"""How good are features? k-NN and linear probe on a labelled set, for any function from images to features."""

from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch

from .data import resolve_name


def load_labelled(
    dataset_name: str, image_column: str = "image", label_column: str = "label"
) -> dict[str, datasets.Dataset]:
    """
    The train and test splits of a labelled set.

    Raises:
        ValueError: if it lacks one of the splits or columns, or its labels are not class indices.
    """
    sets = datasets.load_dataset(resolve_name(dataset_name))
    for split in ("train", "test"):
        if split not in sets:
            raise ValueError(f"{dataset_name} has no split {split!r}, only {list(sets)}; a probe needs train and test")
        columns = sets[split].column_names
        for column in (image_column, label_column):
            if column not in columns:
                raise ValueError(f"the {split} split of {dataset_name} has no column {column!r}, only {columns}")
        labels = np.asarray(sets[split][label_column])
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(f"{dataset_name}, {split}: {label_column!r} must hold class indices from 0 on")
    return {split: sets[split] for split in ("train", "test")}


def batches(dataset: datasets.Dataset, processor: Callable, image_column: str = "image") -> Iterator[torch.Tensor]:
    """The images of a set, in order, in batches of pixel values as the processor prepares them."""
    mode = "RGB" if len(processor.image_mean) == 3 else "L"
    for batch in dataset.select_columns([image_column]).iter(batch_size=256):
        yield processor([image.convert(mode) for image in batch[image_column]], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def extract_features(embed: Callable[[torch.Tensor], torch.Tensor], pixel_batches) -> np.ndarray:
    """`embed` maps pixel values `(B, C, H, W)` to features `(B, d)`; returns all of them in fp32."""
    return np.concatenate([embed(pixels).float().cpu().numpy() for pixels in pixel_batches])


def knn_accuracy(train, train_labels, test, test_labels, k: int = 20, temperature: float = 0.07) -> float:
    """
    Share of test features whose k nearest training features (cosine), each voting with weight
    exp(similarity / temperature), name the right class (Wu et al., arXiv 1805.01978, section 3.4).
    """
    train, test = (torch.nn.functional.normalize(torch.as_tensor(x), dim=1) for x in (train, test))
    train_labels, test_labels = torch.as_tensor(train_labels), torch.as_tensor(test_labels)
    num_right = 0
    for features, labels in zip(test.split(1024), test_labels.split(1024), strict=True):  # bounds the memory
        similarity, nearest = (features @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(features), int(train_labels.max()) + 1)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        num_right += (votes.argmax(dim=1) == labels).sum().item()
    return num_right / len(test)


def logistic_regression(features, labels, num_classes: int, weight_decay: float, max_iter: int = 100) -> torch.Tensor:
    """
    Multinomial logistic regression by full-batch L-BFGS, penalty weight_decay / 2 * |W|^2 beside the mean loss.
    Returns the weights `(d + 1, num_classes)`, bias last.
    """
    weights = torch.zeros(features.shape[1] + 1, num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iter, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = torch.addmm(weights[-1], features, weights[:-1])
        loss = torch.nn.functional.cross_entropy(logits, labels) + weight_decay / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear_probe_accuracy(train, train_labels, test, test_labels, seed: int = 0) -> float:
    """
    Test accuracy of multinomial logistic regression on standardised features. Its regularisation is chosen on a fifth
    of the training set, never on the test set.
    """
    train, train_labels, test, test_labels = map(torch.as_tensor, (train, train_labels, test, test_labels))
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    num_classes = int(train_labels.max()) + 1

    def accuracy(fit, held_out, weight_decay):
        weights = logistic_regression(train[fit], train_labels[fit], num_classes, weight_decay)
        features, labels = held_out
        return ((features @ weights[:-1] + weights[-1]).argmax(dim=1) == labels).float().mean().item()

    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(train)))
    held_out, fit = order[: len(train) // 5], order[len(train) // 5 :]
    best = max(
        (1e-3, 1e-2, 1e-1, 1.0), key=lambda decay: accuracy(fit, (train[held_out], train_labels[held_out]), decay)
    )
    return accuracy(order, (test, test_labels), best)


def raw_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """The baseline features `(B, C * h * w)`: the pixels themselves, pictures above 32 x 32 reduced to that."""
    height, width = pixel_values.shape[-2:]
    small = torch.nn.functional.adaptive_avg_pool2d(pixel_values, (min(32, height), min(32, width)))
    return small.flatten(1)


class Probe:
    """
    A labelled set on which features are measured again and again.

    Args:
        dataset_name, image_column, label_column: What `load_labelled` takes.
        processor: Image processor; the one that is saved with the model, so that users get what was measured.
    """

    def __init__(self, dataset_name: str, image_column: str, label_column: str, processor: Callable):
        self.sets = load_labelled(dataset_name, image_column, label_column)
        self.image_column, self.processor = image_column, processor
        self.labels = {split: np.asarray(dataset[label_column]) for split, dataset in self.sets.items()}

    def measure(self, embed: Callable[[torch.Tensor], torch.Tensor], linear: bool = True) -> dict[str, float]:
        """k-NN and, unless `linear` is off, linear-probe accuracy, in [0, 1], of the features that `embed` makes."""
        train, test = (
            extract_features(embed, batches(self.sets[split], self.processor, self.image_column))
            for split in ("train", "test")
        )
        data = (train, self.labels["train"], test, self.labels["test"])
        accuracy = {"knn": knn_accuracy(*data)}
        if linear:
            accuracy["linear_probe"] = linear_probe_accuracy(*data)
        return accuracy
