"""
The checks of the preflight, on batches, model and machine. Each returns what is wrong, in a sentence with the fix, or
None.

Legend: B images, V views, d embedding width.
"""

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ..data.loading import SHARED_MEMORY, free_shared_memory


__all__ = [
    "check_disk", "check_gradients", "check_optimizer", "check_pixels", "check_positions", "check_positives",
    "check_shared_memory",
]  # fmt: skip


def check_pixels(pixel_values: torch.Tensor) -> str | None:
    """
    Whether normalized pixels `(B, V, C, H, W)` are finite, the views differ, and, of 16 images and more, each
    channel has about mean 0 and standard deviation 1.
    """
    pixels = pixel_values.float()
    mean, std = pixels.mean(dim=(0, 1, 3, 4)), pixels.std(dim=(0, 1, 3, 4))
    if not pixels.isfinite().all():
        return "the normalized pixels are not finite; check image_mean and image_std"
    if len(pixels) >= 16 and (mean.abs().max() > 1.5 or std.min() < 0.2 or std.max() > 3):
        return (
            f"the normalized pixels have mean {_numbers(mean)} and standard deviation {_numbers(std)}, far from 0 "
            "and 1; set image_mean and image_std to those of your images (--measure_mean_std finds them)"
        )
    if pixels.shape[1] > 1 and torch.equal(pixels[:, 0], pixels[:, 1]):
        return "the views of every image are the same; augmentation is off"
    return None


def check_gradients(model: nn.Module, norm: Callable[[list], torch.Tensor]) -> str | None:
    """Whether every trainable parameter got a finite gradient that is not zero; `norm` takes a list of gradients."""
    missing, zero = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            missing.append(name)
        elif parameter.requires_grad and not name.endswith("k_proj.bias"):  # softmax does not see a constant of keys
            size = float(norm([parameter.grad]))
            if size == 0 or not math.isfinite(size):
                zero.append(f"{name} ({size})")
    if missing or zero:
        return f"parameters without a gradient: {', '.join(missing) or 'none'}; zero or not finite: {', '.join(zero)}"
    return None


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Whether the optimizer holds every trainable parameter once, and nothing else."""
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    left_out = [name for key, name in trainable.items() if key not in held]
    if left_out or len(held) != len(trainable):
        return f"the optimizer holds {len(held)} of {len(trainable)} parameters; left out: {', '.join(left_out)}"
    return None


def check_positions(model: nn.Module) -> str | None:
    """Whether all patches differ in the tables of positions: one of zeros makes a ViT blind to order."""
    for name, table in model.named_buffers():
        if name.endswith("position_embeddings"):
            rows = table[0, 1:].float()
            if len(rows) > 1 and len(rows.unique(dim=0)) < len(rows):
                return f"{name} gives different patches the same position"
    return None


def check_positives(
    contrastive_loss: Callable, batch_size: int, width: int, process: int, device: torch.device
) -> str | None:
    """
    Whether each image meets its own second view as its positive, on every process: embeddings that are the same for
    the views of an image, and random otherwise, must have a loss near 0.

    Args:
        contrastive_loss (callable): `(image_embeds, temperature) -> loss`, over all processes, which all call it.
        batch_size, width (`int`): B of this process, d.
        process (`int`): Its rank, so that every process has images of its own.
    """
    generator = torch.Generator().manual_seed(process)
    embeds = nn.functional.normalize(torch.randn(batch_size, 1, width, generator=generator), dim=-1)
    loss = contrastive_loss(embeds.expand(-1, 2, -1).to(device), 0.01).item()
    if loss > 0.1:
        return f"an image's positive is not its own other view: {loss:.3g} nats for embeddings that tell all apart"
    return None


def check_disk(folder: Path, num_checkpoints: int, parameters: Iterable[nn.Parameter]) -> str | None:
    """Whether the file system of `folder` has room for the checkpoints, one more being written, and the model."""
    weights = sum(p.numel() * 4 for p in parameters)
    needed = weights * (3 * (num_checkpoints + 1) + 1)  # a checkpoint: weights and two moments of AdamW
    free = shutil.disk_usage(folder).free
    if free < needed:
        return f"{folder} has {free / 1e9:.1f} GB free, checkpoints need {needed / 1e9:.1f}; lower save_total_limit"
    return None


def check_shared_memory(num_workers: int, batch_bytes: float) -> str | None:
    """Whether there is room for what the loader workers of a process hand over: two batches each, and one more."""
    needed, free = batch_bytes * (2 * num_workers + 1) if num_workers else 0, free_shared_memory()
    if free < needed:
        return (
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, the batches of {num_workers} loader workers need "
            f"{needed / 1e6:.0f}; make it larger (docker run --shm-size=8g), or lower dataloader_num_workers"
        )
    return None


def _numbers(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.tolist())
