"""Compilation of the model for training: whether, and how much of it as one graph."""

import os
import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers.modeling_layers import GradientCheckpointingLayer


__all__ = ["compile_model", "how_to_compile"]


def how_to_compile(choice: bool | str, device: torch.device, drop_path_rate: float) -> str | None:
    """
    What `compile_model` is to do for the recipe's `torch_compile`, or `None` for nothing.
    `"auto"` compiles the blocks where that pays and works: on a GPU with Triton and a C compiler, without drop path.
    """
    if choice == "auto":
        has_compiler = has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
        choice = device.type == "cuda" and has_compiler and drop_path_rate == 0
    return {True: "blocks", False: None}.get(choice, choice)


def compile_model(model: nn.Module, what: str):
    """
    Compiles a CAN in place, for one batch size.

    Args:
        model (`CANPreTrainedModel`): Its names and its state dict stay as they are.
        what (`str`):
            `"blocks"`: the transformer blocks, one compilation for all of the encoder and one for the decoder,
            whatever the depth. `"model"`: everything as one graph, which takes several times longer to compile.
            `"cudagraph"`: the same, recorded as a CUDA graph: for a small model, whose kernels are shorter than the
            time that it takes to launch them one by one.
    """
    # Inductor's own random numbers would differ between the two passes of gradient caching.
    options = {"fallback_random": True, "triton.cudagraphs": what == "cudagraph"}
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in blocks if what == "blocks" else [model]:
        module.compile(dynamic=False, options=options)
