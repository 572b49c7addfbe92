"""What the training loop computes beside the model: parameter groups, schedule, averages over steps and processes."""

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    Trainable parameters for AdamW in two groups: matrices decay; biases, norms and tokens do not. Each parameter is in
    exactly one group; frozen ones are in none.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.ndim < 2 or name.endswith("_token") else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def learning_rate(step: int, max_steps: int, warmup_steps: int, peak: float) -> float:
    """
    The learning rate of a step (0-based) as a pure function of progress: linear warm-up that reaches `peak` at step
    `warmup_steps`, then half a cosine that would reach 0 at `max_steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def embedding_spread(image_embeds: torch.Tensor) -> torch.Tensor:
    """
    Standard deviation of unit-length embeddings `(..., d)` over the batch, times sqrt(d): about 1 when they point
    everywhere, 0 when all are the same (collapse).
    """
    embeds = image_embeds.detach().float().flatten(0, -2)
    return embeds.std(dim=0).mean() * embeds.shape[-1] ** 0.5


class MetricAverage:
    """
    Averages named scalars over steps and processes. Scalars stay on their device until `compute`, which is the only
    call that synchronises, with the device and between processes.

    Args:
        reduce (callable): Sums a tensor over the processes and divides by their number.
    """

    def __init__(self, reduce):
        self.reduce, self.sums, self.num_steps = reduce, {}, 0

    def update(self, metrics: dict[str, torch.Tensor]):
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.num_steps += 1

    def compute(self) -> dict[str, float]:
        """The averages since the last call."""
        if self.num_steps == 0:
            return {}
        stacked = self.reduce(torch.stack(list(self.sums.values())) / self.num_steps)
        averages = dict(zip(self.sums, stacked.tolist(), strict=True))
        self.sums, self.num_steps = {}, 0
        return averages
