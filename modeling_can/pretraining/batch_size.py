"""How many images a step has where the user leaves it open: what fits into a GPU's memory."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from ..progress import tell
from .cost import step_seconds
from .recipe import Recipe


__all__ = ["LARGEST_BATCH", "largest_step", "largest_that_fits", "measured_batch_size"]

LARGEST_BATCH = {"cpu": 256, "cuda": 1024}  # of a step, over all processes
_SHARE = 0.75  # of the memory; the rest is for images that stay on the GPU, and for what compiling takes


def largest_step(num_images: int, device_type: str) -> int:
    """Images of a step: a power of two, so that an epoch has at least four steps where there are so many images."""
    most = LARGEST_BATCH["cuda" if device_type == "cuda" else "cpu"]
    return 2 ** int(math.log2(min(most, max(16, num_images // 4))))


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """
    The largest power of two up to `most` for which `fits` is true; it is asked with growing numbers until it is not.

    Raises:
        ValueError: if not even one image fits.
    """
    size, found = 1, 0
    while size <= most and fits(size):
        size, found = 2 * size, size
    if not found:
        raise ValueError(
            "per_device_train_batch_size=auto: not even one image fits into the memory of the GPU; take a smaller "
            "encoder or image_size, or add --gradient_checkpointing"
        )
    return found


def measured_batch_size(recipe: Recipe, accelerator: Accelerator, num_images: int | None) -> int:
    """
    What `per_device_train_batch_size=auto` stands for, alike on all processes, which all call it: on a GPU what fits,
    on a CPU the largest step.
    """
    device = accelerator.device
    parts = accelerator.num_processes * recipe.gradient_accumulation_steps
    most = largest_step(num_images or LARGEST_BATCH["cuda"] * 4, device.type) // parts or 1
    if device.type != "cuda":
        if accelerator.is_main_process:
            tell(f"per_device_train_batch_size auto: {most}, as only a GPU of CUDA is measured")
        return most
    found = largest_that_fits(lambda size: _fits(recipe, accelerator, size), most)
    found = int(accelerator.gather(torch.tensor([found], device=device)).min())
    if accelerator.is_main_process:
        tell(f"per_device_train_batch_size auto: {found} images fit, and {most} are the most that are asked for")
    return found


def _fits(recipe: Recipe, accelerator: Accelerator, size: int) -> bool:
    """Whether steps of so many images take at most their share of the memory of this process's GPU."""
    device = accelerator.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    try:
        step_seconds(recipe, accelerator, size)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return total - free + torch.cuda.max_memory_allocated(device) <= _SHARE * total
