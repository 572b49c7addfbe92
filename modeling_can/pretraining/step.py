"""One update of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from ..configuration_can import CANConfig
from ..optimization import NonFiniteGuard
from .checkpoints import in_one_piece
from .gradient_caching import accumulated_backward, cached_backward
from .health import embedding_spread


__all__ = ["StepOutput", "TrainStep", "step_metrics", "total_norm"]


@dataclass
class StepOutput:
    """
    Of one step, on this process: `terms`, the losses, each unweighted, and `image_embeds`; `grad_norm`, `()`, of all
    processes, before clipping; and whether that was `finite`, `()`, so that the update took place.
    """

    terms: dict[str, torch.Tensor]
    grad_norm: torch.Tensor
    finite: torch.Tensor


class TrainStep:
    """
    Forward and backward (with cached embeddings if asked), clipping, guard, update, schedule.

    Args:
        model (`nn.Module`): A `CANForPreTraining`, as accelerate has prepared it.
        optimizer (`AcceleratedOptimizer`): A fused one, as accelerate has prepared it.
        accelerator (`Accelerator`): Of this process.
        config (`CANConfig`): The model's.
        learning_rate (callable):
            Of a step, 0-based, and of what is frozen before `first_step`, as the optimizer's groups may say
            (`layer_groups`), and by what it is multiplied.
        caching (`bool`): Whether several micro-batches are contrasted as one batch.
        max_grad_norm (`float`): That gradients are clipped to; 0 does not clip.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        accelerator: Accelerator,
        config: CANConfig,
        learning_rate: Callable[..., float],
        caching: bool = False,
        max_grad_norm: float = 0.0,
    ):
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        self.guard = NonFiniteGuard(optimizer.optimizer, accelerator.num_processes)
        self._backward = partial(cached_backward, config=config) if caching else accumulated_backward

    def __call__(self, step: int, micro_batches: list, images: list[str]) -> StepOutput:
        """
        Step `step`, 0-based.

        Args:
            micro_batches (`list[callable]`): Each gives the inputs of the model.
            images (`list[str]`): The names of their images, for messages.
        """
        for group in self.optimizer.param_groups:
            rate = self.learning_rate(step, first_step=group.get("first_step", 0))
            group["lr"] = group.get("lr_scale", 1.0) * rate
        terms = self.backward(micro_batches)
        frozen = [p.grad for p in self._frozen(step) if p.grad is not None]
        if frozen:  # neither in the norm, to which the others are clipped, nor in AdamW's moments
            torch._foreach_zero_(frozen)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = total_norm([p.grad for p in parameters])
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, grad_norm)
        finite = self.guard.check(step, grad_norm, terms, images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepOutput(terms, grad_norm, finite)

    def _frozen(self, step: int) -> list[nn.Parameter]:
        groups = [group for group in self.optimizer.param_groups if step < group.get("first_step", 0)]
        return [parameter for group in groups for parameter in group["params"]]

    def backward(self, micro_batches: list) -> dict[str, torch.Tensor]:
        """The terms of `StepOutput`; leaves the gradient in the parameters."""
        no_sync = partial(self.accelerator.no_sync, self.model)
        return self._backward(self._forward, micro_batches, backward=self.accelerator.backward, no_sync=no_sync)

    def _forward(self, **inputs):
        with self.accelerator.autocast():  # which accelerate puts around a model by itself, but for a sharded one
            return self.model(**inputs)


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of all gradients together, `()`, on the device; alike on all processes."""
    return in_one_piece(nn.utils.get_total_norm(gradients))


def step_metrics(
    terms: dict[str, torch.Tensor], config: CANConfig, grad_norm: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is averaged and logged of a step, whose `terms` and `grad_norm` are those of `StepOutput`."""
    metrics = {name: value for name, value in terms.items() if name.endswith("loss")}
    metrics["loss"] = sum(config.loss_weights[name] * value for name, value in metrics.items())
    metrics["grad_norm"] = grad_norm
    if "image_embeds" in terms:
        metrics["embedding_spread"] = embedding_spread(terms["image_embeds"])
    return metrics
