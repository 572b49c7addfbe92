"""
What pre-training and fine-tuning share around the optimizer: precision, parameter groups, learning rate, and the guard
that skips an update whose gradient is not finite.
"""

import math
import re

import torch
from torch import nn


__all__ = [
    "NonFiniteGuard", "decays", "layer_groups", "learning_rate", "mixed_precision", "parameter_groups",
    "peak_learning_rate",
]  # fmt: skip

_WITHOUT_FOUND_INF = ("mps",)  # devices whose fused kernels do not look at found_inf


def mixed_precision(choice: str) -> str:
    """bf16 by default on GPUs that have it; never on a CPU, where it can be hundreds of times slower than fp32."""
    if choice == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "no"
    return choice


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    Trainable parameters for AdamW in two groups: matrices decay; biases, norms and tokens do not. Each parameter is in
    exactly one group; frozen ones are in none.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter) else no_decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def layer_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, encoder: str = "", frozen_steps: int = 0
) -> list[dict]:
    """
    The trainable parameters for AdamW, each with the factor `lr_scale` of its learning rate: of L layers, layer i
    (0-based) learns at layer_decay ** (L - i) of the rate of what comes after the last one, and what comes before the
    first, the embeddings, at layer_decay ** (L + 1) (BEiT, arXiv 2106.08254). Matrices decay.

    Args:
        encoder (`str`): How the names of the encoder's parameters begin; all others have the full rate.
        frozen_steps (`int`): `first_step` of the encoder's groups, before which they have no rate; of others it is 0.

    Raises:
        ValueError: if layer_decay is below 1 and the layers do not tell their number.
    """
    names = [name for name, _ in model.named_parameters() if name.startswith(encoder)]
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
        layer = numbered[name] + 1 if name in numbered else depth + 1 if seen or name not in found else 0
        if parameter.requires_grad:
            group = {
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "first_step": frozen_steps if name in found else 0,
                "weight_decay": weight_decay if decays(name, parameter) else 0.0,
            }
            groups.setdefault(tuple(group.values()), {"params": [], **group})["params"].append(parameter)
    return list(groups.values())


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter: for matrices, not for biases, norms, tokens and positions."""
    return parameter.ndim >= 2 and not name.endswith(
        ("_token", "_tokens", "position_embeddings", "position_embedding.weight", "position_bias_table")
    )


def peak_learning_rate(base: float, batch_size: int) -> float:
    """The learning rate of a batch of images, over all processes, whose base rate is that of a batch of 256."""
    return base * batch_size / 256


def learning_rate(step: int, max_steps: int, warmup_steps: int, peak: float, first_step: int = 0) -> float:
    """
    The learning rate of a step (0-based) as a pure function of progress: 0 before `first_step`, linear warm-up that
    reaches `peak` after `warmup_steps` more, then half a cosine that would reach 0 at `max_steps`.
    """
    if step < first_step:
        return 0.0
    step, max_steps = step - first_step, max_steps - first_step
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class NonFiniteGuard:
    """
    Keeps an update whose gradient is not finite from happening: on the device, without waiting for it (but on mps),
    and on all processes alike, because they share the gradient.

    Args:
        optimizer (`torch.optim.Optimizer`): A fused one, whose kernel skips a step with `found_inf` set.
        num_processes (`int`): That share the gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_processes: int = 1):
        self.optimizer, self.num_processes, self.steps = optimizer, num_processes, []

    def check(self, step: int, grad_norm: torch.Tensor, terms: dict[str, torch.Tensor], images: list[str]):
        """Whether the gradient is finite, on the device; to be called before `optimizer.step()`."""
        finite = grad_norm.isfinite()
        self.optimizer.found_inf = (~finite).float()
        if finite.device.type in _WITHOUT_FOUND_INF and not finite:  # which waits for the device
            self.optimizer.zero_grad()  # a parameter without a gradient stays as it is
        # The contrastive loss meets the embeddings of all processes, so it does not tell whose images are to blame.
        ours = torch.stack([term.isfinite().all() for name, term in terms.items() if name != "contrastive_loss"]).all()
        losses = {name: term for name, term in terms.items() if term.ndim == 0}
        self.steps.append((step, finite, ours, losses, images))
        return finite

    def report(self) -> list[str]:
        """A sentence on each update that was left out since the last call, which waits for the device."""
        steps, self.steps = self.steps, []
        all_finite = torch.stack([finite for _, finite, *_ in steps]).tolist() if steps else []
        return [
            f"the gradient of step {step} was not finite and its update left out; "
            + ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            + (
                "; the images of this process seem not to be to blame"
                if ours and self.num_processes > 1
                else f"; of the images {', '.join(images)}"
            )
            for (step, _, ours, losses, images), finite in zip(steps, all_finite, strict=True)
            if not finite
        ]
