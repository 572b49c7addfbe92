"""What training costs: FLOPs and memory."""

import copy
import sys

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_can import CANConfig
from ..modeling_can import CANForPreTraining


__all__ = ["peak_memory", "training_flops"]


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
        # The contrastive loss would gather embeddings from the other processes.
        output = model(pixel_values, terms=("reconstruction", "denoising"))
        losses = (output.loss, None if output.image_embeds is None else output.image_embeds.sum())
        sum(loss for loss in losses if loss is not None).backward()
    return counter.get_total_flops() / batch_size


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: of tensors on a CUDA device; else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
