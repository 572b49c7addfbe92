"""What training costs: FLOPs, time and memory."""

import copy
import sys
import time

import psutil
import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_can import CANConfig
from ..modeling_can import CANForPreTraining
from ..random_state import interlude
from .recipe import Recipe


__all__ = ["peak_memory", "step_seconds", "training_flops"]


def training_flops(config: CANConfig, num_views: int = 2) -> float:
    """
    FLOPs of forward and backward of the views of an image. What is computed twice (gradient checkpointing, gradient
    caching) counts once; the comparison of the embeddings, which grows with the batch, does not count.
    """
    batch_size = 2
    config = copy.deepcopy(config)  # the attention that is set below is no business of the caller's model
    with torch.device("meta"):
        model = CANForPreTraining(config)
        pixel_values = torch.empty(batch_size, num_views, config.num_channels, *config.image_shape)
    model.set_attn_implementation("eager")  # the counter does not see the products inside sdpa on a CPU
    with FlopCounterMode(display=False) as counter:
        _loss(model, pixel_values).backward()
    return counter.get_total_flops() / batch_size


def _loss(model: CANForPreTraining, pixel_values: torch.Tensor) -> torch.Tensor:
    """Of this process alone: the contrastive loss would gather embeddings from the others."""
    output = model(pixel_values, terms=("reconstruction", "denoising"))
    losses = (output.loss, None if output.image_embeds is None else output.image_embeds.sum())
    return sum(loss for loss in losses if loss is not None)


def step_seconds(recipe: Recipe, accelerator: Accelerator, batch_size: int) -> float:
    """
    Of an update of a new model on random images on this process, uncompiled: the best of three. Leaves no trace in the
    random numbers.
    """
    config, device, seconds = recipe.config, accelerator.device, []
    with interlude():
        model = CANForPreTraining(config).to(device).train()
        model.freeze_unused_parameters()
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
        shape = (batch_size, recipe.num_views, config.num_channels, *config.image_shape)
        pixel_values = torch.randn(shape, device=device)
        for _ in range(3):
            began = time.perf_counter()
            with accelerator.autocast():
                loss = _loss(model, pixel_values)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: of tensors on a CUDA device; else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
