"""The three terms of CAN (arXiv 2210.16870): contrastive (C), reconstruction (A) and denoising (N).

Legend: B images, V views, L patches, P pixels per patch. Every function computes in fp32 with autocast off, because
squares, exponentials and their sums lose digits in half precision. (The product of the contrastive loss is one in TF32
on GPUs, where the trainer allows it.)
"""

import torch
from torch import nn


__all__ = [
    "contrastive_loss",
    "full_precision",
    "masked_mean",
    "normalize_patches",
    "patch_errors",
    "patch_statistics",
]


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device (the meta device, which counts FLOPs, knows no autocast)."""
    device_type = tensor.device.type
    return torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False)


class _AllGather(torch.autograd.Function):
    """Rows of all processes, in the order of their rank; the backward pass sums what all of them need of one row."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.num_rows = tensor.shape[0]
        rows = tensor.new_empty(torch.distributed.get_world_size() * tensor.shape[0], *tensor.shape[1:])
        torch.distributed.all_gather_into_tensor(rows, tensor.contiguous())
        return rows

    @staticmethod
    def backward(ctx, grad):
        # Every process's loss depends on this process's rows, so the gradients are summed. Keeping only the local one,
        # as many gathers do, is wrong: tests/distributed/test_distributed.py then fails.
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad.narrow(0, torch.distributed.get_rank() * ctx.num_rows, ctx.num_rows)


def _all_gather(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Stacks the rows of all processes along the first axis, with gradient; every process must hold equally many.
    This is the one place that talks to other processes.

    Returns:
        The rows of the global batch, and the index of this process's first row in them. Without
        `torch.distributed`, the tensor itself and 0.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor, 0
    return _AllGather.apply(tensor), torch.distributed.get_rank() * tensor.shape[0]


def contrastive_loss(image_embeds: torch.Tensor, temperature: float) -> torch.Tensor:
    r"""
    InfoNCE (NT-Xent of SimCLR, arXiv 2002.05709, eq. 1), the term C of CAN: for every embedding z_i with positive z_j,
    another view of the same image,

        - log( exp(z_i . z_j / tau) / (exp(z_i . z_j / tau) + sum_k exp(z_i . z_k / tau)) ),

    where k runs over the embeddings of the other images of the global batch: with the paper's two views, 1 positive
    and 2N - 2 negatives. Averaged over this process's B images and the ordered pairs (i, j) of their views; the mean
    over processes is the loss of the joined batch, and so is its gradient. Of more than two views (not in the paper),
    those that are neither i nor j are left out of the denominator: an image is not its own negative.

    Args:
        image_embeds (`torch.Tensor` of shape `(batch_size, num_views, projection_size)`): Embeddings of unit length.
        temperature (`float`): tau.

    Raises:
        ValueError: if there are fewer than two views, or fewer than two images in the global batch.
    """
    num_views = image_embeds.shape[1]
    if num_views < 2:
        raise ValueError(
            "the contrastive term compares the views of an image, got 1; give pixel_values of shape (B, 2, C, H, W), "
            "or set contrastive_loss_weight=0"
        )
    with full_precision(image_embeds):
        anchors = image_embeds.float().flatten(0, 1)  # (BV, d): the views of an image are neighbors
        keys, offset = _all_gather(anchors)  # (NV, d)
        if keys.shape[0] < 2 * num_views:
            raise ValueError(
                f"the contrastive term needs other images as negatives, got a batch of {keys.shape[0] // num_views}; "
                "use at least 2 images a batch, or set contrastive_loss_weight=0"
            )
        logits = anchors @ keys.T / temperature  # (BV, NV)
        itself = offset + torch.arange(anchors.shape[0], device=anchors.device)
        view = itself % num_views
        views = [itself, *(itself - view + (view + step) % num_views for step in range(1, num_views))]  # of its image
        losses = []
        for positive in views[1:]:
            masked = logits
            for other in views:
                if other is not positive:
                    masked = masked.scatter(1, other[:, None], float("-inf"))
            losses.append(nn.functional.cross_entropy(masked, positive))
        return sum(losses) / len(losses)


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the P pixels of each patch (MAE, arXiv 2111.06377, section 4)."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(..., 1)` by which `normalize_patches` normalizes patches `(..., P)`."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5


def patch_errors(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Mean squared error of each patch, which the terms A and N of CAN share. A averages it over the masked patches, with
    the clean pixels as target, N over the visible ones, with sigma * e as target, in raw units.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_views, num_patches, pixels_per_patch)`): Predictions.
        target (`torch.Tensor` of the same shape): What they should be.

    Returns:
        `(batch_size, num_views, num_patches)`, fp32.
    """
    with full_precision(logits):
        return nn.functional.mse_loss(logits.float(), target.float(), reduction="none").mean(dim=-1)


def masked_mean(errors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The mean of the errors where `weight`, of the same shape, is 1; elsewhere it is 0."""
    return (errors * weight).sum() / weight.sum()
