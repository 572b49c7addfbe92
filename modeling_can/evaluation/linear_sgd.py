"""
Many linear heads on a frozen encoder, trained on augmented images in one pass. They are given no test images: those
are for `SGDProbe.predict`, once everything is chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..optimization import learning_rate, peak_learning_rate
from .encoders import POOLINGS, Encoder, pooled
from .features import ALONE, Extractor, Images, Processes
from .protocol import Entry, Features, Measure, Protocol, Setup
from .sets import Split, hold_out
from .training_images import Augmentation, Share, crop_loader, epochs, fitting_batch_size


__all__ = [
    "LinearProbeSGD",
    "BASE_LEARNING_RATES", "Heads", "SGDProbe", "head_predictions", "linear_probe_sgd",
    "train_step",
]  # fmt: skip

# Of the linear heads, for 256 images a step
BASE_LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Heads(nn.Module):
    """
    Linear heads on several representations, the same number on each, on features that batch norm without affine
    parameters has standardized, as in MAE's linear probe. They begin at zero: the problem is convex.

    Args:
        widths (`list[int]`): Of the representations.
    """

    def __init__(self, widths: list[int], num_heads: int, num_classes: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, eps=1e-6, affine=False) for width in widths)
        self.weights = nn.ParameterList(torch.zeros(num_heads, num_classes, width) for width in widths)
        self.biases = nn.ParameterList(torch.zeros(num_heads, num_classes) for _ in widths)

    def forward(self, representations: list[torch.Tensor]) -> torch.Tensor:
        """Features `(B, width)` of each -> logits `(B, representations * heads, num_classes)`."""
        logits = []
        for features, norm, weight, bias in zip(representations, self.norms, self.weights, self.biases, strict=True):
            made = nn.functional.linear(norm(features), weight.flatten(0, 1), bias.flatten())  # one product
            logits.append(made.unflatten(1, bias.shape))
        return torch.cat(logits, dim=1)


def train_step(heads: Heads, optimizer, representations, labels: torch.Tensor, rates: torch.Tensor, rate: float):
    """
    A step of SGD at which head h has the learning rate `rates[h] * rate`: its loss is multiplied by `rates[h]`, which
    is the same, because without weight decay an update is linear in the gradients.
    """
    logits = heads(representations)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="none"
    )
    optimizer.zero_grad()
    (losses.view(len(labels), -1).mean(dim=0) * rates).sum().backward()
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


class _Representations:
    """
    Pixel values -> the pooled features of several numbers of layers and poolings, from one pass.

    Args:
        layers (`tuple[int]`): How many of the last blocks to take side by side; at most all there are.
    """

    def __init__(self, encoder: Encoder, layers: tuple[int, ...]):
        config, preprocessor = encoder.model.config, encoder.preprocessor
        depth = config.num_hidden_layers if hasattr(config, "num_hidden_layers") else len(config.depths)
        layers, device = sorted({min(number, depth) for number in layers}), next(encoder.parameters()).device
        zeros = torch.zeros(1, preprocessor.num_channels, *preprocessor.image_size, device=device)
        self.encoder, self.kinds, self.columns, self.device = encoder.eval(), [], {}, device
        with torch.no_grad():
            for number in layers:
                features = encoder(zeros, number)
                self.columns[number] = features["mean"].shape[1]
                self.kinds += [(number, pooling) for pooling in POOLINGS if pooling == "mean" or "cls" in features]
            self.widths = [features.shape[1] for features in self(zeros)]

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        features = self.encoder(pixel_values, max(self.columns))
        return [
            pooled({k: x[:, -self.columns[number] :] for k, x in features.items()}, pooling, self.encoder.name).float()
            for number, pooling in self.kinds  # the last layers are the last columns
        ]


class SGDProbe(NamedTuple):
    """
    Args:
        heads (`Heads`), represent (`_Representations`): All that were trained, the same on every process.
        chosen (`int`): Which one is the best on the images held out.
        table (`list[dict]`): Layers, pooling, learning rate and held-out accuracy, in [0, 1], of each head.
    """

    heads: Heads
    represent: _Representations
    chosen: int
    table: list[dict]

    def predict(self, split: Split, *extraction) -> np.ndarray | None:
        """What the chosen head says of each image; further arguments and returns are those of `head_predictions`."""
        predictions = head_predictions(self.heads, self.represent, split, *extraction)
        return None if predictions is None else predictions[:, self.chosen]


def head_predictions(
    heads: Heads,
    represent: _Representations,
    split: Split,
    extractor: Extractor = Extractor(),  # noqa: B008  frozen
    description: str = "",
) -> np.ndarray | None:
    """The classes `(N, heads)` that every head sees in the images; on the first process, elsewhere `None`."""
    preprocessor = represent.encoder.preprocessor

    def encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
        representations = represent(preprocessor.normalize(images.to(represent.device)))
        with torch.autocast(represent.device.type, enabled=False):
            return {"classes": heads.eval()(representations).argmax(dim=2)}

    made = extractor(encode, Images(split, preprocessor.decode), description)
    return None if made is None else made["classes"].astype(np.int64)


def linear_probe_sgd(
    encoder: Encoder,
    train: Split,
    num_classes: int,
    num_epochs: int = 10,
    batch_size: int = 256,
    base_learning_rates: tuple[float, ...] = BASE_LEARNING_RATES,
    layers: tuple[int, ...] = (1, 4),
    flip_probability: float = 0.5,
    seed: int = 0,
    num_workers: int = 0,
    processes: Processes = ALONE,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    progress: Callable = iter,
) -> SGDProbe:
    """
    Linear heads on the frozen encoder, for every learning rate on every representation (the last block or the last
    blocks; mean, class token or both), trained together on random crops and flips by SGD (momentum 0.9, no weight
    decay, cosine to 0), as MAE and DINOv2 do (arXiv 2111.06377, app. A.1; 2304.07193, app. B.3). The best is chosen
    on a tenth of every class, prepared as in a test.

    Args:
        encoder (`Encoder`): On the device to work on; not changed.
        batch_size (`int`): Images of one step, of all processes together.
        base_learning_rates (`tuple[float]`): For 256 images a step.
        layers (`tuple[int]`): Numbers of blocks; above the encoder's depth, all of them.
        gather (callable): Joins a tensor `(b, ...)` of all processes in their order; called by all of them.
        progress (callable): Wraps the range of steps, e.g. into a bar.

    Raises:
        ValueError: if no class has the six images of which one can be held out, or the batch size does not divide by
            the number of processes.
    """
    held_out, fit = hold_out(train.labels, 0.1, seed)
    if not len(held_out):
        raise ValueError(
            f"{train.name}: no class has the 6 images of which the SGD probe can hold one out to choose by; use "
            "linear_probe or few_shot, which are for small sets"
        )
    batch_size = fitting_batch_size(len(fit), batch_size, processes.count, "processes")
    share = batch_size // processes.count
    mine = slice(processes.index * share, (processes.index + 1) * share)
    augment = Augmentation(encoder.preprocessor, batch_size, seed, flip_probability)
    represent = _Representations(encoder, layers)
    device = represent.device
    heads = Heads(represent.widths, len(base_learning_rates), num_classes).to(device).train()
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=0.9)
    rates = torch.tensor(base_learning_rates, device=device).repeat(len(represent.kinds))

    part, steps = train.select(fit), (len(fit), batch_size, num_epochs, seed)
    num_steps = num_epochs * (len(fit) // batch_size)
    loader = crop_loader(part, encoder.preprocessor, Share(mine, *steps), seed=seed, num_workers=num_workers)
    for step, (_, rows), crops in zip(progress(range(num_steps)), epochs(*steps), loader, strict=True):
        crops = crops[:, 0].to(device, non_blocking=True)
        features = gather(torch.cat(represent(augment(crops, step, mine.start)), dim=1))
        labels = torch.from_numpy(part.labels[rows]).to(device)  # of all processes: all know the order
        rate = learning_rate(step, num_steps, 0, peak_learning_rate(1.0, batch_size))
        with torch.autocast(device.type, enabled=False):
            train_step(
                heads=heads,
                optimizer=optimizer,
                representations=features.split(represent.widths, dim=1),
                labels=labels,
                rates=rates,
                rate=rate,
            )

    held_out = train.select(held_out)
    predictions = head_predictions(heads, represent, held_out, Extractor(batch_size, num_workers, processes))
    accuracies = None if predictions is None else (predictions == held_out.labels[:, None]).mean(axis=0).tolist()
    accuracies = processes.gather([accuracies])[0]
    kinds = [(*kind, rate) for kind in represent.kinds for rate in base_learning_rates]
    columns = ("layers", "pooling", "base_learning_rate", "held_out_accuracy")
    table = [dict(zip(columns, (*kind, x), strict=True)) for kind, x in zip(kinds, accuracies, strict=True)]
    return SGDProbe(heads.eval(), represent, int(np.argmax(accuracies)), table)


class LinearProbeSGD(Protocol):
    """The best of many linear heads, trained on augmented images."""

    name, rank = "linear_probe_sgd", 0

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        settings, description = setup.settings, f"{entry.name}: linear probe, SGD"
        with setup.accelerator.autocast():
            probe = linear_probe_sgd(
                encoder=entry.encoder,
                train=setup.data.train,
                num_classes=setup.num_classes,
                num_epochs=settings.sgd_num_epochs,
                batch_size=settings.sgd_batch_size,
                base_learning_rates=settings.sgd_base_learning_rates,
                layers=settings.sgd_layers,
                seed=settings.seed,
                gather=setup.accelerator.gather,
                progress=partial(setup.progress, description=description, unit="steps"),
                num_workers=settings.dataloader_num_workers,
                processes=setup.processes,
            )
            predictions = probe.predict(setup.data.test, setup.extractor, description)
        if predictions is None:
            return None
        return {**setup.score(predictions), **probe.table[probe.chosen], "heads": probe.table}

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        own = figures.get("pooling", "mean")
        return {"linear probe, SGD": Measure(figures["accuracy"], figures["interval"], pooling=own)}
