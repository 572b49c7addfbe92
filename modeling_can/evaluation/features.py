"""
How good are features? Labelled sets, features of them, and the protocols on frozen features: k-NN, linear probe,
few-shot. The test images meet a protocol only once it has made all of its choices.
"""

import collections
import functools
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
import safetensors.numpy
import scipy.stats
import torch
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError
from torch import nn

from ..data import located, read_bytes
from ..faults import load, refuse_other_than_images, refuse_unwritable_cache
from ..folders import images_below, left_out_of_split, load_arguments, refuse_misread_folders, resolve_name
from ..loading import Patient, worker_options
from ..views import BadImage


logger = logging.getLogger(__name__)

NEIGHBOURS = (1, 5, 10, 20, 100)
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the linear probe, the strongest penalty first
MAX_ITERATIONS = 100  # for each, from where the one before ended; the held-out images judge an unfinished fit as any
SHOTS = ("1", "2", "5", "10", "1%", "10%")


# --- Labelled sets ---------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """
    Some labelled pictures.

    Args:
        name (`str`): For messages.
        pictures (`datasets.Dataset`): One column, `image`, of encoded pictures.
        labels (`np.ndarray` of shape `(N,)`): Class indices.
        folder (`str`, *optional*): Where images with relative paths are looked for before the working directory.
    """

    name: str
    pictures: datasets.Dataset
    labels: np.ndarray
    folder: str | None = None  # that relative paths begin at

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> "Split":
        return Split(self.name, self.pictures.select(indices), self.labels[indices], self.folder)

    def read(self, index: int) -> bytes:
        return read_bytes(located(self.pictures[int(index)]["image"], self.folder))


class LabelledSet(NamedTuple):
    """Pictures to learn from, pictures to be tested on, and the names of the classes."""

    train: Split
    test: Split
    class_names: list[str]


def load_split(
    dataset_name: str,
    config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
) -> tuple[Split, list[str]]:
    """
    One split of a set that `datasets.load_dataset` reads, and the names of its classes: those of a `ClassLabel`
    column, or the sorted values of any other.

    Raises:
        ValueError: if it cannot be found, is empty, lacks a column, or has rows without a label.
    """
    name = f"{dataset_name}, {split}"
    path = resolve_name(dataset_name)
    if os.path.isdir(path):
        refuse_misread_folders(Path(path))
    try:
        arguments = load_arguments(dataset_name, config_name)
        if os.path.isdir(path):
            files = datasets.load_dataset_builder(**arguments).config.data_files or {}
            _, line = left_out_of_split(path, "+".join(map(str, files)), files, labelled=True)
            warn_once(line)
        rows = load(arguments, split, dataset_name)
    except (DatasetGenerationError, pyarrow.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    except (OSError, RuntimeError) as error:  # no such folder or set, no network, or one that is a script
        refuse_unwritable_cache(error)
        raise ValueError(
            f"dataset_name={dataset_name} cannot be loaded: {error}. Give a Hub id, or a folder of parquet shards "
            "(train-*.parquet, test-*.parquet) or of class folders (train/CLASS/*.jpg, test/CLASS/*.jpg)"
        ) from error
    except ValueError as error:
        advice = ""
        if "split" in str(error).lower():
            advice = " Set train_split and test_split to others; with run_eval.py test_size=0.2 holds out a share"
        if "config" in str(error).lower():
            advice = " Set dataset_config_name"
        raise ValueError(f"{name}: {error}{advice}") from error
    for field, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            others = [other for other in rows.column_names if other != image_column or field == "image_column"]
            fix = (
                f"set {field} to one of {', '.join(others)}"
                if others
                else f"class folders make one, where every image lies at the same depth{uneven(Path(path))}"
            )
            raise ValueError(f"{name}: no column {column!r}; {fix}")
    if not len(rows):
        raise ValueError(f"{name} is empty")

    labels, kind = rows.with_format(None)[label_column][:], rows.features[label_column]
    labels = np.asarray(labels) if isinstance(kind, datasets.Value | datasets.ClassLabel) else np.empty((0, 0))
    if labels.ndim != 1 or labels.dtype.kind not in "iubUO":
        raise ValueError(f"{name}: {label_column!r} must hold one class for each image, not {kind}")
    refuse_other_than_images(name, image_column, rows.features)
    is_class = isinstance(kind, datasets.ClassLabel)
    missing = [row for row, label in enumerate(labels) if label is None or (is_class and label < 0)]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} rows have no label, the first is row {missing[0]}; remove them, or name a "
            "labelled split (train_split, test_split)"
        )
    values, indices = np.unique(labels, return_inverse=True)
    names, indices = (list(kind.names), labels) if is_class else ([str(value) for value in values], indices)
    try:
        pictures = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{name}: image_column={image_column!r} holds {rows.features[image_column]} and no images; set it to one "
            f"of {', '.join(rows.column_names)}"
        ) from error
    pictures = pictures if image_column == "image" else pictures.rename_column(image_column, "image")
    return Split(name, pictures, indices.astype(np.int64), path if os.path.isdir(path) else None), names


def uneven(folder: Path) -> str:
    """Of class folders, which image lies at another depth than most; nothing where there is none."""
    images = images_below(folder)
    depths = collections.Counter(len(image.parts) for image in images)
    if len(depths) < 2:
        return " in two classes or more: train/CLASS/*.jpg, test/CLASS/*.jpg"
    usual = depths.most_common(1)[0][0]
    other = next(image for image in images if len(image.parts) != usual)
    return f" (train/CLASS/*.jpg, test/CLASS/*.jpg): move or remove {other}, whose depth is another than most have"


@functools.cache
def warn_once(line: str):
    """Training and test images are mostly of one folder."""
    if line:
        logger.warning(line)


def load_labelled(
    dataset_name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
    test_size: float = 0.0,
    seed: int = 0,
) -> LabelledSet:
    """
    A set with a part to learn from and one to be tested on.

    Args:
        dataset_name (`str`): Hub id, folder of parquet shards or of class folders, or `"sample_data"`.
        train_split, test_split (`str`): Names, or slices such as `train[:80%]`.
        test_size (`float`):
            For a set without a test split, the share of every class of the training split to hold out.

    Raises:
        ValueError: as `load_split`; if there is a single class, or a test label that no training image has.
    """
    train, names = load_split(dataset_name, config_name, train_split, image_column, label_column)
    known = np.unique(train.labels)
    if len(known) < 2:
        raise ValueError(f"{train.name} has a single class, {names[known[0]]!r}; a test needs two or more")
    if test_size:
        held_out, rest = hold_out(train.labels, test_size, seed)
        if not len(held_out):
            raise ValueError(f"test_size={test_size} of {train.name} is no image of any class; raise it")
        return LabelledSet(train.select(rest), train.select(held_out), names)
    test, test_names = load_split(dataset_name, config_name, test_split, image_column, label_column)
    unseen = [
        test_names[label] for label in np.unique(test.labels) if test_names[label] not in {names[k] for k in known}
    ]
    if unseen:
        raise ValueError(
            f"{len(unseen)} labels of {test.name} have no image in {train.name}: {', '.join(unseen[:10])}; remove "
            "those rows, or name other splits (train_split, test_split)"
        )
    ours = np.array([names.index(name) if name in names else -1 for name in test_names])
    return LabelledSet(train, Split(test.name, test.pictures, ours[test.labels], test.folder), names)


def by_class(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The indices of every class, each in random order."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Random indices of `share` of every class, rounded to whole images but never all of them, and those of the rest;
    both sorted.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for own in by_class(labels, np.random.default_rng(seed)):
        chosen[own[: min(round(share * len(own)), len(own) - 1)]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


# --- Features --------------------------------------------------------------------------------------------------------


class Processes(NamedTuple):
    """
    This process among those that work together. `gather` hands the list of each to all, joined in the order of their
    index.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[list], list] = list


ALONE = Processes()


class Pictures(torch.utils.data.Dataset):
    """
    The pictures of a split, each prepared in the loader's workers by `prepare(encoded bytes, index)`.

    Raises:
        ValueError: for a picture that cannot be used: an evaluation leaves nothing out.
    """

    def __init__(self, split: Split, prepare: Callable):
        self.split, self.prepare = split, prepare

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        images = self.split.pictures[indices]["image"]
        return [self._prepare(image, index, index) for image, index in zip(images, indices, strict=True)]

    def _prepare(self, image: dict, index: int, argument: int) -> torch.Tensor:
        try:
            return self.prepare(read_bytes(located(image, self.split.folder)), argument)
        except BadImage as error:
            path = f", {image['path']}," if image and image["path"] else ""
            raise ValueError(
                f"{self.split.name}: the image of row {index}{path} is {error.reason} ({error}); mend or remove it, "
                "as an evaluation leaves no image out"
            ) from error


class KeptPictures(Pictures):
    """Pictures that are prepared once and kept, up to a gigabyte of them, for a set that is seen again and again."""

    def __init__(self, split: Split, prepare: Callable):
        super().__init__(split, prepare)
        self.kept, self.num_bytes = {}, 0

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if all(index in self.kept for index in indices):
            return [self.kept[index] for index in indices]
        images = super().__getitems__(indices)
        if self.num_bytes < 2**30:
            self.kept.update(zip(indices, images, strict=True))
            self.num_bytes += sum(image.nbytes for image in images)
        return images


@torch.no_grad()
def extract(
    encode: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    pictures: Pictures,
    batch_size: int = 256,
    num_workers: int = 0,
    processes: Processes = ALONE,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, np.ndarray] | None:
    """
    What `encode` makes of all pictures, in their order, in fp32; on the first process, elsewhere `None`. The set is
    cut into the same batches on any number of processes, which take turns, so that the result is the same.

    Args:
        encode (callable): A batch of prepared pictures -> named tensors with as many rows.
        progress (callable): Wraps the iterable of rounds, e.g. into a bar.
    """
    starts = range(0, len(pictures), batch_size)
    own = [
        list(range(start, min(start + batch_size, len(pictures))))
        for start in starts[processes.index :: processes.count]
    ]
    loader = Patient(
        torch.utils.data.DataLoader(
            pictures,
            batch_sampler=own,
            **worker_options(num_workers),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or starting it would draw a number from the global one
        )
    )
    arrays, num_rows = {}, 0
    for _ in progress(range(-(-len(starts) // processes.count))):
        batch = next(loader, None)  # there may be one round more on the first processes
        made = None if batch is None else {name: x.float().cpu().numpy() for name, x in encode(batch).items()}
        gathered = processes.gather([made])
        for part in gathered if processes.index == 0 else []:
            for name, rows in (part or {}).items():
                if name not in arrays:
                    arrays[name] = np.empty((len(pictures), *rows.shape[1:]), dtype=np.float32)
                arrays[name][num_rows : num_rows + len(rows)] = rows
            num_rows += len(rows) if part else 0
    return arrays if processes.index == 0 else None


def cached(folder: Path | None, facts: dict, make: Callable[[], dict | None], processes: Processes = ALONE):
    """
    Arrays by name from the cache, or made and put there.

    Args:
        folder (`Path`, *optional*): `None` makes them anew.
        facts (`dict`): All that they depend on; its hash is the file's name.
        make (callable): Returns them on the first process; called by all.
    """
    if folder is None:
        return make()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = Path(folder) / f"{key}.safetensors"
    arrays = None
    if processes.index == 0 and path.exists():
        try:
            arrays = safetensors.numpy.load_file(path)
        except SafetensorError as error:  # damaged: made anew
            logger.warning("%s: %s", path, error)
    if processes.gather([arrays is not None])[0]:
        return arrays
    arrays = make()
    if arrays is not None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"facts": json.dumps(facts, default=str)}
            safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, partial, metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # a full disk costs the cache, not the evaluation
            if partial.exists():
                partial.unlink()
            logger.warning("features are not cached: %s", error)
    return arrays


def raw_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """The baseline features `(B, C * h * w)`: the pixels themselves, pictures above 32 x 32 reduced to that."""
    height, width = pixel_values.shape[-2:]
    small = nn.functional.adaptive_avg_pool2d(pixel_values, (min(32, height), min(32, width)))
    return small.flatten(1)


# --- k-NN ------------------------------------------------------------------------------------------------------------


def nearest_neighbours(train, test, k: int, device: str | torch.device = "cpu") -> tuple[np.ndarray, np.ndarray]:
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
    ks: tuple[int, ...] = NEIGHBOURS,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> dict[int, np.ndarray]:
    """
    For each k the classes that the k nearest training features (cosine) vote for, each with weight
    exp(similarity / temperature) (Wu et al., arXiv 1805.01978, section 3.4). k above their number takes them all.
    """
    similarity, nearest = nearest_neighbours(train, test, max(ks), device)
    # Relative to the nearest one, which leaves the vote as it is, and cannot overflow.
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    rows, predictions = np.arange(len(nearest))[:, None], {}
    for k in ks:
        votes = np.zeros((len(nearest), num_classes), dtype=weights.dtype)
        np.add.at(votes, (rows, train_labels[nearest[:, :k]]), weights[:, :k])
        predictions[k] = votes.argmax(axis=1)
    return predictions


# --- Linear probe ----------------------------------------------------------------------------------------------------


class LinearClassifier(NamedTuple):
    """
    Logits = features @ weight.T + bias.

    Args:
        weight (`np.ndarray` of shape `(num_classes, d)`), bias (`np.ndarray` of shape `(num_classes,)`): On features
            as they are, so that they can become the last layer of a model.
        inverse_penalty (`float`): C, which was chosen.
        held_out_accuracy (`float`, *optional*): What it was chosen by, in [0, 1].
    """

    weight: np.ndarray
    bias: np.ndarray
    inverse_penalty: float
    held_out_accuracy: float | None

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
    Multinomial logistic regression on standardised features, with the penalty |W|^2 / 2C beside the sum of the losses.
    C, at most scikit-learn's default of 1, is chosen on a fifth of every class, from the strongest penalty on until
    two weaker ones in a row are worse than the best; then all images are fitted. Where no class has the three images
    of which one can be held out, C is 1.

    Args:
        device: A GPU runs torch's L-BFGS, a CPU scikit-learn's.
        moments (`(np.ndarray, np.ndarray)`, *optional*): Mean and deviation to standardise by, if not those of these.
    """
    mean, std = moments or mean_and_std(features)
    held_out, fit = hold_out(labels, 0.2, seed)
    order, num_fit = np.concatenate([fit, held_out]), len(fit)
    scaled, labels = features[order], labels[order]  # the one copy: parts of it are views
    scaled -= mean
    scaled /= std
    fit_weights, best, accuracies = _logistic_regression(num_classes, device), 1.0, {}
    for inverse_penalty in INVERSE_PENALTIES if len(held_out) else ():
        weights = fit_weights(scaled[:num_fit], labels[:num_fit], inverse_penalty)
        predicted = (scaled[num_fit:] @ weights[:-1] + weights[-1]).argmax(axis=1)
        accuracies[inverse_penalty] = float((predicted == labels[num_fit:]).mean())
        best = max(accuracies, key=accuracies.get)  # the strongest of equals
        if len(accuracies) >= 3 and max(list(accuracies.values())[-2:]) < accuracies[best]:
            break  # the weakest ones take the longest
    weights = fit_weights(scaled, labels, best)
    weight = (weights[:-1] / std[:, None]).T
    return LinearClassifier(weight, weights[-1] - weight @ mean, best, accuracies.get(best))


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

    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

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
            [weights], max_iter=MAX_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
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


# --- Few-shot --------------------------------------------------------------------------------------------------------


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


# --- Intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(scores: np.ndarray, seed: int = 0, num_resamples: int = 1000) -> tuple[float, float]:
    """
    95 % percentile bootstrap interval of the mean of `scores`, one an image; of a single one, itself. Where all are
    right or all are wrong, of which resampling makes no interval at all, that of Clopper and Pearson.
    """
    if len(scores) == 1:
        return float(scores[0]), float(scores[0])
    bound = 0.025 ** (1 / len(scores))
    if np.all(scores == 1):
        return bound, 1.0
    if np.all(scores == 0):
        return 0.0, 1 - bound
    result = scipy.stats.bootstrap(
        (np.asarray(scores, dtype=np.float32),),
        np.mean,
        n_resamples=num_resamples,
        batch=20,  # bounds the memory
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


# --- Again and again, while training ---------------------------------------------------------------------------------


class Probe:
    """
    A labelled set on which features are measured again and again.

    Args:
        dataset_name, config_name, train_split, test_split, image_column, label_column: What `load_labelled` takes.
        preprocessor: `encoders.Preprocessor` of the processor that is saved with the model, so that users get what was
            measured.
        device (`torch.device`): That looks for the nearest neighbors.
    """

    def __init__(
        self,
        dataset_name: str,
        config_name: str | None,
        train_split: str,
        test_split: str,
        image_column: str,
        label_column: str,
        preprocessor,
        device: str | torch.device = "cpu",
    ):
        try:
            self.set = load_labelled(dataset_name, config_name, train_split, test_split, image_column, label_column)
        except ValueError as error:
            message = f"probe_dataset_name={dataset_name}: {error} (here all these names begin with probe_)"
            raise ValueError(message) from error
        self.preprocessor, self.device = preprocessor, device
        self.train, self.test = (
            KeptPictures(split, lambda *picture: self.preprocessor.decode(*picture))
            for split in (self.set.train, self.set.test)
        )

    def measure(self, embed: Callable[[torch.Tensor], torch.Tensor], linear: bool = True) -> dict:
        """
        k-NN (k = 20) and, unless `linear` is off, linear-probe accuracy of what `embed` makes of pixels, as `knn` and
        `linear_probe`; beside each its 95 % interval, as `knn_interval`; and `num_test`, the number of test images.
        """

        def features(pictures: Pictures) -> np.ndarray:
            return extract(lambda batch: {"features": embed(self.preprocessor.normalise(batch))}, pictures)["features"]

        train, test = features(self.train), features(self.test)
        labels, num_classes = self.set.train.labels, len(self.set.class_names)
        predictions = {"knn": knn_predictions(train, labels, test, num_classes, ks=(20,), device=self.device)[20]}
        if linear:
            predictions["linear_probe"] = linear_probe(train, labels, num_classes).predict(test)
        figures = {"num_test": len(self.set.test)}
        for name, predicted in predictions.items():
            right = predicted == self.set.test.labels
            figures |= {name: float(right.mean()), f"{name}_interval": list(bootstrap_interval(right))}
        return figures
