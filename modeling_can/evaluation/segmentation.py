"""
Linear segmentation: a linear classifier of the frozen encoder's patch tokens, its logits upsampled to the pixels of
the mask (as DINOv2, arXiv 2304.07193, sec. 7.4).
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy, interpolate

from ..plots import segmentation_sheet
from ..progress import tell
from .features import Images
from .linear import LinearClassifier, held_out_scores, mean_and_std
from .masks import MaskedSplit
from .preprocessors import Preprocessor
from .protocol import Entry, Features, Measure, Protocol, Setup, file_name
from .scores import bootstrap_interval_of
from .sets import hold_out


__all__ = [
    "INVERSE_PENALTIES", "SAMPLED", "Segmentation", "iou", "mean_iou", "patch_classifier",
    "pixel_counts", "sampled", "upsampled_classes",
]  # fmt: skip

INVERSE_PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0)  # C, the strongest penalty first
SAMPLED = 4  # pixels of a mask to learn from, along each side of a patch
_MAX_ITERATIONS = 100  # for each penalty, from where the one before ended
_MAX_BYTES = 2**32  # of patch tokens and sampled pixels; above, some of the training images are drawn
_MAX_LOGITS = 2**25  # upsampled at a time
_NUM_DRAWN = 6  # rows of the sheet


def patch_classifier(
    tokens: np.ndarray, labels: np.ndarray, num_classes: int, num_fit: int, device: str | torch.device = "cpu"
) -> LinearClassifier:
    """
    Multinomial logistic regression on standardized patch tokens, by L-BFGS on all of them: the problem is convex, and
    its solution the same each time. The loss is that of the upsampled logits at `SAMPLED` x `SAMPLED` pixels of every
    patch, which a test compares with that at all pixels; the fractions of the classes in a patch would be a cheaper
    target, but leave the borders of objects blunt. The penalty is |W|^2 / 2C beside the sum over images of their mean
    loss. C is chosen by the mIoU on the images held out; then all images are fitted. Without a pixel that counts
    in those held out, or in the others, C is 1.

    Args:
        tokens (`np.ndarray` of shape `(N, h, w, d)`): Of the patches; standardized in place, as a copy may not fit.
        labels (`np.ndarray` of shape `(N, SAMPLED * h, SAMPLED * w)`): As of `sampled`.
        num_fit (`int`): How many images are not held out, the first ones.
    """
    mean, std = mean_and_std(tokens.reshape(-1, tokens.shape[-1]))
    tokens -= mean
    tokens /= std
    tokens, labels = torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device).long()
    weights = torch.zeros(len(mean) + 1, num_classes, device=device, requires_grad=True)  # each fit begins at the last

    def score(inverse_penalty: float) -> float:
        _fit(weights, tokens[:num_fit], labels[:num_fit], inverse_penalty)
        with torch.no_grad():
            parts = _upsampled(weights, tokens[num_fit:], labels[num_fit:])
            counts = sum(pixel_counts(logits.argmax(dim=1), part, num_classes) for logits, part in parts)
        return float(mean_iou(counts.cpu().numpy()))

    can_choose = all((part >= 0).any() for part in (labels[:num_fit], labels[num_fit:]))
    scores = held_out_scores(score, INVERSE_PENALTIES if can_choose else ())
    best = max(scores, key=scores.get, default=1.0)  # the strongest of equals
    _fit(weights, tokens, labels, best)
    fitted = weights.detach().cpu().numpy()
    weight = (fitted[:-1] / std[:, None]).T
    return LinearClassifier(weight, fitted[-1] - weight @ mean, best, scores.get(best))


def _fit(weights: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, inverse_penalty: float):
    """Changes the weights `(d + 1, num_classes)`, bias last."""
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_MAX_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = weights[:-1].square().sum() / (2 * inverse_penalty * len(tokens))
        loss.backward()
        for logits, part in _upsampled(weights, tokens, labels):
            of_part = cross_entropy(logits, part, ignore_index=-1, reduction="sum") / labels.numel()
            of_part.backward()  # one after the other, which bounds the memory
            loss = loss.detach() + of_part.detach()
        return loss

    optimizer.step(closure)


def _upsampled(weights: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple]:
    """
    Some images at a time, the logits `(n, num_classes)` of their sampled pixels, and the labels `(n,)`. Products of
    matrices upsample, as the gradient of `interpolate` is not the same each time on a GPU.
    """
    down, across = (
        interpolate(torch.eye(n, device=tokens.device)[None], SAMPLED * n, mode="linear")[0] for n in tokens.shape[1:3]
    )
    size = max(1, _MAX_LOGITS // (labels[0].numel() * weights.shape[1]))
    for few, part in zip(tokens.split(size), labels.split(size), strict=True):
        logits = few @ weights[:-1] + weights[-1]
        logits = torch.einsum("bhwk,hi,wj->bijk", logits, down, across)
        yield logits.flatten(0, 2), part.flatten()


def sampled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask `(height, width)` at another size: the pixels that are nearest to the centers of the new ones."""
    row, column = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, mask.shape, strict=True))
    return mask[row[:, None], column]


def upsampled_classes(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits `(num_classes, h, w)` -> the class of each pixel `(height, width)` after bilinear upsampling."""
    best = classes = None
    step = max(1, _MAX_LOGITS // (size[0] * size[1]))
    for first, part in zip(range(0, len(logits), step), logits.split(step), strict=True):
        value, index = interpolate(part[None], size, mode="bilinear")[0].max(dim=0)
        if best is None:
            best, classes = value, index
        else:
            best, classes = torch.maximum(best, value), torch.where(value > best, index + first, classes)
    return classes


def pixel_counts(predicted: torch.Tensor, mask: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    How many pixels `(3, num_classes)` are predicted rightly, have and are predicted to have each class: diagonal, row
    and column sums of the confusion matrix. Pixels of the mask that do not count, -1, are in none.
    """
    counting = mask >= 0
    predicted, mask = predicted[counting], mask[counting]
    parts = (mask[predicted == mask], mask, predicted)
    return torch.stack([torch.bincount(part, minlength=num_classes) for part in parts])


def iou(counts: np.ndarray) -> np.ndarray:
    """Counts `(..., 3, num_classes)` -> intersection over union of each class, NaN of those that do not occur."""
    right, true, predicted = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    return np.divide(right, true + predicted - right, out=np.full(right.shape, np.nan), where=true > 0)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Counts `(..., 3, num_classes)` -> the mean over the classes that occur, `(...)`; NaN if none does."""
    of_class = iou(counts)
    occurs = ~np.isnan(of_class)
    number = occurs.sum(axis=-1)
    total = np.where(occurs, of_class, 0).sum(axis=-1)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def _pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    right, true = counts[..., 0, :].sum(axis=-1), counts[..., 1, :].sum(axis=-1)
    return np.divide(right, true, out=np.full(true.shape, np.nan), where=true > 0)


class Segmentation(Protocol):
    """mIoU over the test images. It needs masks instead of labels, so that it stands alone."""

    name, for_baselines, for_reference, rank = "segmentation", True, True, 0

    @staticmethod
    def refuse_arrays(name: str):
        raise ValueError(
            f"the segmentation task takes RGB and gray images, and {name} takes arrays, for its number of channels or "
            "its pixel_range; use another task, on a set with labels (if you gave it --pixel_range: leave that out)"
        )

    def check(self, setup: Setup, entry: Entry):
        if entry.preprocessor.reads_arrays:
            self.refuse_arrays(entry.name)
        if not entry.preprocessor.in_two_steps:
            kind = type(entry.preprocessor.processor).__name__
            raise ValueError(
                "the segmentation task needs an image processor that resizes, crops, rescales and normalizes, so that "
                f"masks fit the images; the {kind} of {entry.name} does something else: --processor_name_or_path"
            )
        _token_shape(setup, entry)

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        data, seed = setup.data, setup.settings.seed
        width, *grid = _token_shape(setup, entry)
        num_used = max(2, _MAX_BYTES // (4 * grid[0] * grid[1] * (width + SAMPLED**2)))
        used = np.random.default_rng(seed).permutation(len(data.train))[:num_used]
        held_out, fit = hold_out(np.zeros(len(used)), 0.2, seed)
        if len(used) < len(data.train) and setup.is_main:
            tell(
                f"{entry.name}: segmentation learns from {len(used):,} of {len(data.train):,} training images, drawn "
                f"with seed={seed}, whose patches fit in {_MAX_BYTES / 2**30:.0f} GiB"
            )
        made = self._tokens(setup, entry, data.train.select(used[np.concatenate([fit, held_out])]), grid)
        head = None
        if setup.is_main:
            head = patch_classifier(**made, num_classes=setup.num_classes, num_fit=len(fit), device=setup.device)
        (head, *_) = setup.processes.gather([head])
        counts = self._counts(setup, entry, head)
        if not setup.is_main:
            return None
        of_class, interval = iou(counts.sum(axis=0)), partial(bootstrap_interval_of, counts=counts, seed=seed)
        figures = {
            "mean_iou": float(mean_iou(counts.sum(axis=0))),
            "interval": interval(mean_iou),
            "pixel_accuracy": float(_pixel_accuracy(counts.sum(axis=0))),
            "pixel_accuracy_interval": interval(_pixel_accuracy),
            "iou": {
                name: None if np.isnan(value) else float(value)
                for name, value in zip(data.class_names, of_class, strict=True)
            },
            "C": head.inverse_penalty,
            "held_out_mean_iou": head.held_out_score,
            "num_train": len(used),
            "patches": grid,
        }
        if entry.kind == "model":
            try:
                figures["figure"] = self._draw(setup, entry, head)
            except OSError as error:  # a full disk costs the sheet, not the figures
                tell(f"{entry.name}: the sheet of test images could not be drawn: {error}")
        return figures

    @staticmethod
    def _tokens(setup: Setup, entry: Entry, split: MaskedSplit, grid: list[int]) -> dict[str, np.ndarray] | None:
        """Patch tokens and sampled pixels of all images; on the first process, elsewhere `None`."""
        size = [SAMPLED * number for number in grid]

        def encode(batch):
            images, rows = batch
            labels = np.stack([sampled(split.mask(row), size) for row in rows.tolist()])
            return {
                "tokens": entry.patch_tokens(images.to(setup.device)).movedim(1, -1),
                "labels": torch.from_numpy(labels),
            }

        images = Images(split, partial(_with_index, entry.preprocessor))
        made = setup.extractor(encode, images, f"{entry.name}: patches of {split.name}")
        if made and not np.isfinite(made["tokens"]).all():
            raise ValueError(f"{entry.name} gives patch tokens that are not finite; try --mixed_precision no")
        return made

    def _counts(self, setup: Setup, entry: Entry, head: LinearClassifier) -> np.ndarray | None:
        """`pixel_counts` of every test image, `(N, 3, num_classes)`; on the first process, elsewhere `None`."""
        test = setup.data.test

        def encode(batch):
            images, rows = batch
            counts = []
            for row, logits in zip(rows.tolist(), _logits(entry, head, images.to(setup.device)), strict=True):
                mask = torch.from_numpy(test.mask(row)).to(setup.device)
                counts.append(pixel_counts(upsampled_classes(logits, mask.shape), mask, setup.num_classes))
            return {"counts": torch.stack(counts)}

        images = Images(test, partial(_with_index, entry.preprocessor))
        made = setup.extractor(encode, images, f"{entry.name}: segmentation")
        return made and made["counts"].astype(np.float64)

    @staticmethod
    def _draw(setup: Setup, entry: Entry, head: LinearClassifier) -> str:
        test = setup.data.test
        rows = np.random.default_rng(setup.settings.seed).permutation(len(test))[:_NUM_DRAWN]
        images = torch.stack([entry.preprocessor.whole(test.read(row)) for row in rows])
        masks = [torch.from_numpy(test.mask(row)) for row in rows]
        with torch.no_grad():
            logits = _logits(entry, head, images.to(setup.device))
            predicted = [upsampled_classes(part, mask.shape) for part, mask in zip(logits, masks, strict=True)]
        path = setup.output_dir / "figures" / f"segmentation-{file_name(entry.name)}.png"
        segmentation_sheet(images=images / 255, masks=masks, predictions=predicted, path=path)
        return str(path)

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        kind = "image-segmentation"
        return {
            "linear segmentation, mIoU": Measure(
                figures["mean_iou"], figures["interval"], metric="mean_iou", task_type=kind
            ),
            "linear segmentation, pixels": Measure(
                figures["pixel_accuracy"],
                figures["pixel_accuracy_interval"],
                metric="pixel_accuracy",
                task_type=kind,
            ),
        }


def _with_index(preprocessor: Preprocessor, encoded: bytes, index: int) -> tuple[torch.Tensor, int]:
    return preprocessor.whole(encoded), index


def _token_shape(setup: Setup, entry: Entry) -> tuple[int, int, int]:
    """`(d, h, w)` of the patch tokens of an image."""
    size, channels = entry.preprocessor.image_size, entry.preprocessor.num_channels
    with torch.no_grad():
        images = torch.zeros(1, channels, *size, dtype=torch.uint8, device=setup.device)
        return tuple(entry.patch_tokens(images).shape[1:])


def _logits(entry: Entry, head: LinearClassifier, images: torch.Tensor) -> torch.Tensor:
    """Of the patches of prepared images, `(B, num_classes, h, w)`."""
    weight, bias = (torch.from_numpy(part).to(images.device) for part in (head.weight, head.bias))
    return torch.einsum("bdhw,kd->bkhw", entry.patch_tokens(images).float(), weight) + bias[:, None, None]
