"""
The two protocols that train on augmented images: many linear heads on a frozen encoder in one pass, and fine-tuning of
the whole encoder, by MAE's recipe (arXiv 2111.06377, table 9) or with LoRA (arXiv 2106.09685).

Neither is given test images: those are for `SGDProbe.predict` and `class_predictions`, once everything is chosen. The
order of the images, their crops, flips, RandAugment and mixing are the same on any number of processes.
"""

import contextlib
import inspect
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..augmentations import RandAugment, random_boxes
from ..loading import Patient, worker_options
from ..modeling_can import resize_positions
from ..progress import tell
from ..recipe import INSTALL, option
from ..training import MetricAverage, NonFiniteGuard, decays, interlude, learning_rate
from ..views import RandomCrops
from .encoders import POOLINGS, Encoder, Preprocessor, classifier_class, load_config, load_model, pooled
from .features import ALONE, Pictures, Processes, extract
from .sets import Split, hold_out


logger = logging.getLogger(__name__)

# Of the linear heads, for 256 images a step
BASE_LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# MAE's for ViT-B; and with adapters, by the quickstart's CAN at rank 8 on a held-out fifth of sample_data: 68.2, 74.1,
# 79.3, 44.1 % at 1.5e-3, 5e-3, 1.5e-2, 5e-2 (10 epochs, batch 128), 79.3 and 80.4 % at the first two (40, batch 1024)
FULL, LORA = {"base_learning_rate": 5e-4, "layer_decay": 0.65}, {"base_learning_rate": 5e-3, "layer_decay": 1.0}
LOG_STEPS = 10  # between looks at the loss, which wait for the device
# What random numbers are for, so that no two purposes share theirs
AUGMENTATION, MIXING, STEP = range(1, 4)


@dataclass(frozen=True)
class FineTuning:
    """The recipe of `finetune`; the defaults are MAE's for ViT-B on ImageNet."""

    num_epochs: int = option(100, "passes over the training images")
    batch_size: int = option(1024, "images of one step, of all processes together")
    gradient_accumulation_steps: int = option(1, "parts of a step's batch, one after the other")
    base_learning_rate: float | None = option(None, "for 256 images a step; 5e-4 if none, with LoRA 5e-3")
    layer_decay: float | None = option(None, "learning rate of a layer by that of the next; 0.65 if none, no LoRA")
    warmup_ratio: float = option(0.05, "share of the steps with linear warm-up")
    weight_decay: float = option(0.05, "AdamW, on matrices only")
    drop_path_rate: float = option(0.1, "stochastic depth of the last layer, where the model has it")
    label_smoothing: float = option(0.1, "share of the target that goes to all classes alike")
    mixup_alpha: float = option(0.8, "mixing of two images: Beta(alpha, alpha); 0 is off")
    cutmix_alpha: float = option(1.0, "a box of one image in another: Beta(alpha, alpha); 0 is off")
    flip_probability: float = option(0.5, "of a horizontal flip")
    randaugment_magnitude: float = option(9.0, "level of RandAugment, of 10; 0 is off")
    random_erasing_probability: float = option(0.25, "of a box of noise")
    lora_rank: int = option(0, "of adapters, which are then trained instead of the encoder; 0 is off")

    def __post_init__(self):
        if self.lora_rank and self.layer_decay not in (None, 1):
            raise ValueError(
                f"layer_decay={self.layer_decay} with lora_rank={self.lora_rank}: adapters have one learning rate; "
                "leave out one of the two"
            )
        for name, default in (LORA if self.lora_rank else FULL).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("num_epochs", "batch_size", "gradient_accumulation_steps", "base_learning_rate", "layer_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and greater than 0")
        for name in ("weight_decay", "mixup_alpha", "cutmix_alpha", "lora_rank"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")
        for name in ("drop_path_rate", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        for name in ["warmup_ratio", *(f.name for f in fields(self) if f.name.endswith("_probability"))]:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        if self.layer_decay > 1:
            raise ValueError(f"layer_decay={self.layer_decay} is above 1, where all layers learn at the same rate")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise ValueError(f"randaugment_magnitude={self.randaugment_magnitude} is outside [0, 10]; 0 is off")

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


# --- Images to train on ----------------------------------------------------------------------------------------------


def epochs(num_images: int, batch_size: int, num_epochs: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """The epoch and the images of every step: consecutive ones of the epoch's permutation, full batches only."""
    for epoch in range(num_epochs):
        order = np.random.default_rng((seed, epoch)).permutation(num_images)
        for start in range(0, num_images - batch_size + 1, batch_size):
            yield epoch, order[start : start + batch_size]


def fitting_batch_size(num_images: int, batch_size: int, unit: int, why: str) -> int:
    """
    The batch size, or of a smaller set all of it, cut to a multiple of `unit`.

    Raises:
        ValueError: if the batch size is no such multiple, or the set has fewer images than that.
    """
    if batch_size % unit:
        nearest = max(1, round(batch_size / unit)) * unit
        raise ValueError(f"batch_size={batch_size} is not a multiple of {unit} ({why}); use {nearest}")
    if num_images < unit:
        raise ValueError(f"{num_images} images to train on are fewer than a step needs, {unit} ({why}); give more")
    if num_images < batch_size:
        batch_size = num_images // unit * unit
        logger.warning("a step takes %d images: there are no more than %d to train on", batch_size, num_images)
    return batch_size


class Crops(Pictures):
    """Random crops of the pictures of a split, by (epoch, index)."""

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[torch.Tensor]:
        images = self.split.pictures[[index for _, index in keys]]["image"]
        return [self._prepare(image, index, epoch) for image, (epoch, index) in zip(images, keys, strict=True)]


class Share:
    """The share of a process in every step, as a sampler of batches; the loader's workers live as long as it does."""

    def __init__(self, mine: slice, *arguments):
        self.mine, self.arguments = mine, arguments

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, rows in epochs(*self.arguments):
            yield [(epoch, int(row)) for row in rows[self.mine]]


def crop_loader(train: Split, preprocessor: Preprocessor, share: Share, seed: int, num_workers: int):
    """uint8 `(share of the batch, 1, C, H, W)` for every step."""
    resample = "bicubic" if preprocessor.processor.resample == 3 else "bilinear"  # as the images of the test will be
    view = RandomCrops(
        preprocessor.image_size, preprocessor.num_channels, (0.08, 1.0), resample=resample, seed=seed, num_views=1,
        **preprocessor.decoding,
    )  # fmt: skip
    options = {"pin_memory": torch.cuda.is_available(), **worker_options(num_workers)}
    return Patient(torch.utils.data.DataLoader(Crops(train, view), batch_sampler=share, **options))


class Augmentation:
    """
    uint8 crops -> flipped, RandAugmented, normalised, erased pixel values, on their device. Flips and RandAugment
    depend on the seed, the step and the image's place in the batch of all processes; erasing draws from torch's
    global generator.

    Raises:
        ValueError: if the processor cannot be applied in two steps.
    """

    def __init__(
        self,
        preprocessor: Preprocessor,
        batch_size: int,
        seed: int,
        flip_probability: float,
        randaugment_magnitude: float = 0.0,
        random_erasing_probability: float = 0.0,
    ):
        if not preprocessor.in_two_steps:
            raise ValueError(
                f"the image processor, a {type(preprocessor.processor).__name__}, does more than resize, crop, "
                "rescale and normalise, so that crops cannot be augmented in between; give one that does not, e.g. "
                "that of a ViT (--processor_name_or_path)"
            )
        self.preprocessor, self.batch_size, self.seed = preprocessor, batch_size, seed
        self.flip_probability, self.randaugment = flip_probability, None
        self.random_erasing_probability = random_erasing_probability
        if randaugment_magnitude > 0:
            fill = preprocessor.processor.image_mean or [0.5] * preprocessor.num_channels
            self.randaugment = RandAugment(randaugment_magnitude, fill)

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor, step: int, first: int) -> torch.Tensor:
        """`(b, C, H, W)`, the images from place `first` of the batch."""
        here = slice(first, first + len(crops))
        rng = np.random.default_rng((self.seed, step, AUGMENTATION))
        flipped = torch.from_numpy(rng.random(self.batch_size) < self.flip_probability)[here].to(crops.device)
        crops = torch.where(flipped[:, None, None, None], crops.flip(-1), crops)
        if self.randaugment:
            operations, levels = self.randaugment.draw(self.batch_size, rng)
            crops = 255 * self.randaugment(crops.float() / 255, operations[here], levels[here])
        pixel_values = self.preprocessor.normalise(crops)
        if self.random_erasing_probability > 0:
            erased = random_boxes(
                len(crops), *crops.shape[-2:], self.random_erasing_probability, device=crops.device
            )  # fmt: skip
            pixel_values = torch.where(erased, torch.randn_like(pixel_values), pixel_values)
        return pixel_values


def mix(
    images: torch.Tensor,
    targets: torch.Tensor,
    mixup_alpha: float,
    cutmix_alpha: float,
    seed: int = 0,
    step: int = 0,
    first_pair: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mixes images 2i and 2i + 1 with each other, both ways: by mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899),
    each for one half of the pairs where both are on. What is drawn depends on the seed, the step and the number of
    the pair.

    Args:
        images (`torch.Tensor` of shape `(2 * n, C, H, W)`), targets (`torch.Tensor` of shape `(2 * n, num_classes)`):
            Of n pairs; shares of the classes.
        mixup_alpha, cutmix_alpha (`float`): Beta(alpha, alpha) is the share that an image keeps of itself; 0 is off.
        first_pair (`int`): Number of the first pair among those of all processes.
    """
    height, width = images.shape[-2:]
    shares, boxes = [], []  # of each pair, what an image keeps outside of a box; rows and columns of the box
    for pair in range(len(images) // 2):
        rng = np.random.default_rng((seed, step, MIXING, first_pair + pair))
        cut = cutmix_alpha > 0 and (mixup_alpha == 0 or rng.random() < 0.5)
        share = rng.beta(*2 * [cutmix_alpha if cut else mixup_alpha])
        shares.append(1.0 if cut else share)
        box = []
        for side in (height, width):
            centre, half = rng.integers(side), int(side * math.sqrt(1 - share)) // 2 if cut else 0
            box += [max(0, centre - half), min(side, centre + half)]
        boxes.append(box)
    shares = torch.tensor(shares, dtype=torch.float32, device=images.device)[:, None, None]
    top, bottom, left, right = torch.tensor(boxes, device=images.device)[..., None, None].unbind(1)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    in_box = (rows[:, None] >= top) & (rows[:, None] < bottom) & (columns >= left) & (columns < right)
    kept = torch.where(in_box, 0.0, shares)[:, None, None]  # (n, 1, 1, H, W)
    share = kept.mean((2, 3, 4))[:, :, None]  # of the pixels there are: boxes end at the border
    images, targets = images.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2))
    images = kept * images + (1 - kept) * images.flip(1)
    return images.flatten(0, 1), (share * targets + (1 - share) * targets.flip(1)).flatten(0, 1)


# --- Many linear heads in one pass -----------------------------------------------------------------------------------


class Heads(nn.Module):
    """
    Linear heads on several representations, the same number on each, on features that batch norm without affine
    parameters has standardised, as in MAE's linear probe. They begin at zero: the problem is convex.

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


class Representations:
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
        heads (`Heads`), represent (`Representations`): All that were trained, the same on every process.
        chosen (`int`): Which one is the best on the images held out.
        table (`list[dict]`): Layers, pooling, learning rate and held-out accuracy, in [0, 1], of each head.
    """

    heads: Heads
    represent: Representations
    chosen: int
    table: list[dict]

    def predict(self, split: Split, **options) -> np.ndarray | None:
        """What the chosen head says of each picture; options and returns are those of `head_predictions`."""
        predictions = head_predictions(self.heads, self.represent, split, **options)
        return None if predictions is None else predictions[:, self.chosen]


def head_predictions(
    heads: Heads,
    represent: Representations,
    split: Split,
    batch_size: int = 256,
    num_workers: int = 0,
    processes: Processes = ALONE,
    progress: Callable = iter,
) -> np.ndarray | None:
    """The classes `(N, heads)` that every head sees in the pictures; on the first process, elsewhere `None`."""
    preprocessor = represent.encoder.preprocessor

    def encode(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        representations = represent(preprocessor.normalise(pictures.to(represent.device)))
        with torch.autocast(represent.device.type, enabled=False):
            return {"classes": heads.eval()(representations).argmax(dim=2)}

    pictures = Pictures(split, preprocessor.decode)
    made = extract(encode, pictures, batch_size, num_workers, processes, progress)
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
    represent = Representations(encoder, layers)
    device = represent.device
    heads = Heads(represent.widths, len(base_learning_rates), num_classes).to(device).train()
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=0.9)
    rates = torch.tensor(base_learning_rates, device=device).repeat(len(represent.kinds))

    part, steps = train.select(fit), (len(fit), batch_size, num_epochs, seed)
    num_steps = num_epochs * (len(fit) // batch_size)
    loader = crop_loader(part, encoder.preprocessor, Share(mine, *steps), seed, num_workers)
    for step, (_, rows), crops in zip(progress(range(num_steps)), epochs(*steps), loader, strict=True):
        crops = crops[:, 0].to(device, non_blocking=True)
        features = gather(torch.cat(represent(augment(crops, step, mine.start)), dim=1))
        labels = torch.from_numpy(part.labels[rows]).to(device)  # of all processes: all know the order
        rate = learning_rate(step, num_steps, 0, batch_size / 256)
        with torch.autocast(device.type, enabled=False):
            train_step(heads, optimizer, features.split(represent.widths, dim=1), labels, rates, rate)

    held_out = train.select(held_out)
    predictions = head_predictions(heads, represent, held_out, batch_size, num_workers, processes)
    accuracies = None if predictions is None else (predictions == held_out.labels[:, None]).mean(axis=0).tolist()
    accuracies = processes.gather([accuracies])[0]
    kinds = [(*kind, rate) for kind in represent.kinds for rate in base_learning_rates]
    columns = ("layers", "pooling", "base_learning_rate", "held_out_accuracy")
    table = [dict(zip(columns, (*kind, x), strict=True)) for kind, x in zip(kinds, accuracies, strict=True)]
    return SGDProbe(heads.eval(), represent, int(np.argmax(accuracies)), table)


# --- The classifier to fine-tune -------------------------------------------------------------------------------------


def new_classifier(
    name: str,
    class_names: list[str],
    image_size: tuple[int, int],
    drop_path_rate: float = 0.0,
    trust_remote_code: bool = False,
) -> nn.Module:
    """
    The encoder under a new head, drawn from torch's global generator, for images of another size than the encoder's
    where its positions can be resampled.

    Raises:
        ValueError: what `load_model` raises; if its positions cannot be resampled.
    """
    options = {"id2label": dict(enumerate(class_names)), "label2id": {x: i for i, x in enumerate(class_names)}}
    options["num_labels"] = len(class_names)
    if hasattr(load_config(name, trust_remote_code), "drop_path_rate"):
        options["drop_path_rate"] = drop_path_rate
    elif drop_path_rate:
        logger.warning("drop_path_rate=%g is left out: the model of %s has no stochastic depth", drop_path_rate, name)
    kind = classifier_class(name, trust_remote_code)
    model = at_size(load_model(name, kind, trust_remote_code, new=("classifier.",), **options), image_size)
    for part, module in model.named_modules():
        if part.startswith("classifier") and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=2e-5)  # MAE's: the first gradients leave the encoder alone
            nn.init.zeros_(module.bias)
    return model


def at_size(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """
    The model with its position table resampled for images of that size, which then is its own, so that whoever loads
    it needs to know nothing; or the model itself, if it takes images of any size (DINOv2).
    """
    if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        return model
    own = getattr(model.config, "vision_config", model.config)  # of a pair with a text encoder
    before, patch = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (own.image_size, own.patch_size)
    )
    if image_size == before:
        return model
    if own is not model.config:
        raise ValueError(
            f"a {type(model).__name__} made for {before} cannot be fine-tuned at {image_size}; use --image_size "
            f"{before[0]},{before[1]}"
        )
    config = type(model.config).from_dict({**model.config.to_dict(), "image_size": image_size})
    resized, state = type(model)(config), model.state_dict()
    for key, tensor in resized.state_dict().items():
        if tensor.shape == state[key].shape:
            continue
        old, new = ((size[0] // patch[0], size[1] // patch[1]) for size in (before, image_size))
        if not key.endswith("position_embeddings") or state[key].shape[1] != 1 + old[0] * old[1]:
            raise ValueError(
                f"a {type(model).__name__} made for {before} cannot be fine-tuned at {image_size}: {key} would not "
                f"fit; use --image_size {before[0]},{before[1]}"
            )
        state[key] = resize_positions(state[key], old, new)
    resized.load_state_dict(state)
    return resized


def freeze_unused(model: nn.Module, pixel_values: torch.Tensor):
    """Parameters that get no gradient (the mask token of DINOv2) are none to train: DDP would wait for theirs."""
    model.eval()(pixel_values=pixel_values).logits.sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def layer_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """
    The trainable parameters for AdamW, each with the factor `lr_scale` of its learning rate: of L layers, layer i
    (0-based) learns at layer_decay ** (L - i) of the rate of what comes after the last one, and what comes before the
    first, the embeddings, at layer_decay ** (L + 1) (BEiT, arXiv 2106.08254). Matrices decay.

    Raises:
        ValueError: if layer_decay is below 1 and the layers do not tell their number.
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name: re.match(r"(.*?\b(?:layer|layers))\.(\d+)\.", name) for name in names}
    numbered = {name: int(match[2]) for name, match in found.items() if match}
    if layer_decay < 1 and len({match[1] for match in found.values() if match}) != 1:
        raise ValueError(
            f"layer_decay={layer_decay} needs layers that are numbered from first to last, and a "
            f"{type(model).__name__} has none; use layer_decay=1"
        )
    depth, seen, groups = 1 + max(numbered.values(), default=0), False, {}
    for name, parameter in model.named_parameters():
        seen |= name in numbered
        layer = numbered[name] + 1 if name in numbered else depth + 1 if seen else 0
        if parameter.requires_grad:
            decay = weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((layer_decay ** (depth + 1 - layer), decay), []).append(parameter)
    return [{"params": params, "lr_scale": s, "weight_decay": decay} for (s, decay), params in groups.items()]


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """
    Freezes the encoder and puts LoRA on all of its linear layers that get a gradient, alpha = 2 * rank; the head is
    trained in full.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"lora_rank={rank} needs peft: {INSTALL.format('lora')}") from error
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and not name.startswith("classifier")
    ]
    if not linear:
        raise ValueError(f"lora_rank={rank} adapts linear layers, and a {type(model).__name__} has none; leave it out")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, modules_to_save=["classifier"])
    return get_peft_model(model, config)


# --- Fine-tuning -----------------------------------------------------------------------------------------------------


class FineTuned(NamedTuple):
    """The model as it was saved, in evaluation mode, on every process; and what there is to tell of its training."""

    model: nn.Module
    facts: dict


@interlude()
def finetune(
    name: str,
    train: Split,
    class_names: list[str],
    preprocessor: Preprocessor,
    accelerator,
    output_dir: Path,
    recipe: FineTuning = FineTuning(),  # noqa: B008  frozen
    seed: int = 0,
    num_workers: int = 0,
    trust_remote_code: bool = False,
) -> FineTuned:
    """
    Trains a classifier, all of it or adapters, and saves it with its processor in a folder that transformers'
    image-classification pipeline (of pictures in colour) and `encoders.load_encoder` read; of a LoRA run the merged
    model, and the adapter under `adapter/`. Called by every process; DDP. Nothing is chosen: the model is the one
    after the last step.

    On N processes the weights are those of one, up to rounding, but for random erasing and drop path, which draw on
    each process.

    Args:
        name (`str`): Folder or Hub id of the encoder.
        class_names (`list[str]`): The labels of `train` are indices of it.
        accelerator (`accelerate.Accelerator`): The processes, device and precision.
        output_dir (`Path`): A folder that does not exist yet, or is empty; it is there when it is complete.

    Raises:
        ValueError: for what the user can mend.
        FloatingPointError: on all processes, if the gradient is not finite; no such update is made.
    """
    output_dir, device = Path(output_dir), accelerator.device
    index, count, num_parts = (
        accelerator.process_index, accelerator.num_processes, recipe.gradient_accumulation_steps
    )  # fmt: skip
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} is not empty; give another one, or remove it")
    pairs = 2 if recipe.mixes else 1
    batch_size = fitting_batch_size(
        len(train),
        recipe.batch_size,
        count * num_parts * pairs,
        f"processes x gradient_accumulation_steps{' x 2, as images are mixed in pairs' if recipe.mixes else ''}",
    )
    share, size = batch_size // count, batch_size // count // num_parts
    augment = Augmentation(
        preprocessor, batch_size, seed,
        recipe.flip_probability, recipe.randaugment_magnitude, recipe.random_erasing_probability,
    )  # fmt: skip

    torch.manual_seed(seed)
    with accelerator.local_main_process_first():  # which downloads it
        model = new_classifier(
            name, class_names, preprocessor.image_size, recipe.drop_path_rate, trust_remote_code
        ).to(device)  # fmt: skip
    freeze_unused(model, torch.zeros(2, preprocessor.num_channels, *preprocessor.image_size, device=device))
    if recipe.lora_rank:
        model = with_adapters(model, recipe.lora_rank)
    optimizer = torch.optim.AdamW(
        layer_groups(model, recipe.weight_decay, recipe.layer_decay), betas=(0.9, 0.999), fused=True
    )
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model, optimizer = accelerator.prepare(model, optimizer)

    steps = (len(train), batch_size, recipe.num_epochs, seed)
    num_steps = recipe.num_epochs * (len(train) // batch_size)
    warmup_steps, peak = round(recipe.warmup_ratio * num_steps), recipe.base_learning_rate * batch_size / 256
    mine = slice(index * share, (index + 1) * share)
    loader = crop_loader(train, preprocessor, Share(mine, *steps), seed, num_workers)
    average = MetricAverage(lambda tensor: accelerator.reduce(tensor, "mean"))
    guard = NonFiniteGuard(optimizer.optimizer, count)
    report = Report(num_steps, batch_size, accelerator.is_main_process)
    model.train()
    for step, ((epoch, rows), crops) in enumerate(zip(epochs(*steps), loader, strict=True)):
        torch.manual_seed(int(np.random.default_rng((seed, step, STEP, index)).integers(2**63)))  # erasing, drop path
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, num_steps, warmup_steps, peak)
        crops = crops[:, 0].to(device, non_blocking=True)
        labels = torch.from_numpy(train.labels[rows[mine]]).to(device, non_blocking=True)
        step_loss = 0.0
        for part in range(num_parts):
            here = slice(part * size, (part + 1) * size)
            first = mine.start + here.start
            pixel_values = augment(crops[here], step, first)
            targets = nn.functional.one_hot(labels[here], len(class_names)).float()
            if recipe.mixes:
                pixel_values, targets = mix(
                    pixel_values, targets, recipe.mixup_alpha, recipe.cutmix_alpha, seed, step, first // 2
                )
            with accelerator.no_sync(model) if part + 1 < num_parts else contextlib.nullcontext():
                logits = model(pixel_values=pixel_values).logits.float()
                loss = nn.functional.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
                accelerator.backward(loss / num_parts)
            step_loss = step_loss + loss.detach() / num_parts
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        images = [f"in rows {', '.join(map(str, rows[mine]))}"]
        average.update({"loss": step_loss}, guard.check(step, norm, {"loss": step_loss}, images))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_STEPS == 0 or step + 1 == num_steps:  # waits for the device, and the processes
            for sentence in guard.report():
                raise FloatingPointError(f"{sentence}. Lower base_learning_rate, or look at the images")
            report(step + 1, epoch, average.compute()["loss"])
    facts = {
        **asdict(recipe),
        "batch_size": batch_size,
        "learning_rate": peak,
        "num_steps": num_steps,
        "num_trained_parameters": num_trained,
        "final_loss": report.loss,
        "train_seconds": report.seconds,
        "images_per_second": num_steps * batch_size / report.seconds,
    }
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    model = save(model, preprocessor, output_dir, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return FineTuned(model, facts)


class Report:
    """Loss and speed while training: a bar, or where there is no terminal a line every half minute."""

    def __init__(self, num_steps: int, batch_size: int, is_main: bool):
        self.num_steps, self.batch_size, self.is_main, self.loss, self.seconds = num_steps, batch_size, is_main, 0, 0
        self.began = self.told = time.perf_counter()
        self.bar = tqdm(total=num_steps, desc="fine-tuning", dynamic_ncols=True, disable=None if is_main else True)

    def __call__(self, step: int, epoch: int, loss: float):
        now = time.perf_counter()
        self.loss, self.seconds = loss, now - self.began
        text = f"loss {loss:.3f}, {step * self.batch_size / self.seconds:.0f} images/s"
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(text)
        if self.is_main and self.bar.disable and (now - self.told > 30 or step == self.num_steps):
            self.told = now
            tell(f"fine-tuning, epoch {epoch + 1}, step {step} of {self.num_steps}: {text}")
        if step == self.num_steps:
            self.bar.close()


def save(model: nn.Module, preprocessor: Preprocessor, output_dir: Path, is_main: bool) -> nn.Module:
    """The model, its adapters merged; the first process writes it under another name and renames it."""
    partial = output_dir.with_name(output_dir.name + ".partial")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if hasattr(model, "merge_and_unload"):
        if is_main:
            model.save_pretrained(partial / "adapter", save_embedding_layers=False)
            (partial / "adapter" / "README.md").unlink(missing_ok=True)  # peft's, empty but for a path on this machine
        model = model.merge_and_unload()
    if is_main:
        model.save_pretrained(partial)
        preprocessor.save_pretrained(partial)
        if output_dir.exists():
            output_dir.rmdir()  # it is empty
        os.replace(partial, output_dir)
    return model


def class_predictions(
    model: nn.Module,
    preprocessor: Preprocessor,
    split: Split,
    batch_size: int = 256,
    num_workers: int = 0,
    processes: Processes = ALONE,
    progress: Callable = iter,
) -> np.ndarray | None:
    """The class `(N,)` that a classifier sees in every picture; on the first process, elsewhere `None`."""
    device = next(model.parameters()).device
    encode = lambda pictures: {"logits": model(pixel_values=preprocessor.normalise(pictures.to(device))).logits}  # noqa: E731
    pictures = Pictures(split, preprocessor.decode)
    made = extract(encode, pictures, batch_size, num_workers, processes, progress)
    return None if made is None else made["logits"].argmax(axis=1)
