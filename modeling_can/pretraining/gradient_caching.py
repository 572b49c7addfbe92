"""Forward and backward of one optimizer step over several micro-batches, each alone or contrasted with each other."""

import contextlib

import torch

from ..losses import contrastive_loss
from ..random_state import rng_state, set_rng_state


__all__ = ["accumulated_backward", "cached_backward"]


def accumulated_backward(model, micro_batches: list, backward, no_sync) -> dict[str, torch.Tensor]:
    """
    Forward and backward of one optimizer step over micro-batches, each with a contrastive loss of its own: the plain
    way, in which an image meets the negatives of its micro-batch alone. Of a single micro-batch, an ordinary step.

    Args and returns as `cached_backward`.
    """
    results = []
    for index, make in enumerate(micro_batches):
        with no_sync() if index + 1 < len(micro_batches) else contextlib.nullcontext():
            output = model(**make())
            backward(output.loss / len(micro_batches))
        results.append(_without_graph(output))
    return _joined(results)


def cached_backward(model, micro_batches: list, backward, no_sync, config) -> dict[str, torch.Tensor]:
    """
    Forward and backward of one optimizer step over micro-batches, with the loss and the gradient of one large batch
    and the activations of one micro-batch (GradCache, arXiv 2101.06983). The first pass embeds every micro-batch
    without a graph; the contrastive loss over all embeddings gives the gradient with respect to each; the second pass
    repeats every micro-batch, with the same noise, masks and augmentation from the same random numbers, and carries
    that gradient on. Reconstruction and denoising are means over images, for which summing micro-batches is exact.

    Args:
        model (callable): A `CANForPreTraining`, or DDP around it, with contrastive weight > 0.
        micro_batches (`list[callable]`): Each gives the inputs of the model, the same ones from the same random state.
        backward (callable): Back-propagates a loss.
        no_sync (callable): A context that leaves out the exchange of gradients between processes.
        config (`CANConfig`): The model's.

    Returns:
        The losses of this process's images, each unweighted, and `image_embeds`; all without a graph.
    """
    replays, embeds = [], []
    with torch.no_grad():
        for make in micro_batches:
            replays.append(rng_state())
            embeds.append(model(**make(), terms=()).image_embeds)
    whole = torch.cat(embeds).requires_grad_()
    contrastive = contrastive_loss(whole, config.temperature)
    (gradient,) = torch.autograd.grad(contrastive, whole)

    results, gradients = [], gradient.split([len(part) for part in embeds])
    for index, (make, replay) in enumerate(zip(micro_batches, replays, strict=True)):
        set_rng_state(replay)
        with no_sync() if index + 1 < len(micro_batches) else contextlib.nullcontext():
            output = model(**make(), terms=("reconstruction", "denoising"))
            # The division makes means of reconstruction and denoising; the parts of this gradient add up as they are.
            linear = (output.image_embeds * (gradients[index] * len(micro_batches))).sum()  # has this gradient
            loss = config.loss_weights["contrastive_loss"] * linear
            backward((loss if output.loss is None else loss + output.loss) / len(micro_batches))
        results.append({**_without_graph(output), "contrastive_loss": contrastive.detach()})
    return _joined(results)


def _without_graph(output) -> dict[str, torch.Tensor]:
    """
    What is worth keeping of a micro-batch, whose predictions are as large as its activations; copied, because the next
    replay of a CUDA graph overwrites its outputs.
    """
    names = ("contrastive_loss", "reconstruction_loss", "denoising_loss", "image_embeds")
    return {name: output[name].detach().clone() for name in names if output.get(name) is not None}


def _joined(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The embeddings of all micro-batches, and the means of their losses."""
    parts = {name: [result[name] for result in results] for name in results[0]}
    return {name: torch.cat(p) if name == "image_embeds" else torch.stack(p).mean() for name, p in parts.items()}
