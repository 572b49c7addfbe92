"""
Does it work, and what does it cost? Measures of a run's health, the plain sentences that they add up to, the checks
before it starts, and its arithmetic.

Legend: B images, N images that are contrasted with each other (over micro-batches and processes), d embedding width,
P pixels per patch.
"""

import copy
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .configuration_can import CANConfig
from .data.loading import SHARED_MEMORY, free_shared_memory
from .losses import normalize_patches
from .modeling_can import CANForPreTraining, patchify


TERMS = {"contrastive": "C", "reconstruction": "A", "denoising": "N"}
EARLY = 100  # steps


# --- Measures --------------------------------------------------------------------------------------------------------


def embedding_spread(image_embeds: torch.Tensor) -> torch.Tensor:
    """
    Standard deviation of unit-length embeddings `(..., d)` over the batch, times sqrt(d): about 1 when they point
    everywhere, 0 when all are the same (collapse).
    """
    embeds = image_embeds.detach().float().flatten(0, -2)
    return embeds.std(dim=0).mean() * embeds.shape[-1] ** 0.5


def effective_rank(embeds: torch.Tensor) -> torch.Tensor:
    """
    How many directions the rows of `(n, d)` fill, from 1 to min(n, d): the exponential of the entropy of their
    singular values, as shares of the sum (RankMe, arXiv 2210.02885, section 3).
    """
    embeds = embeds.double()
    # d x d instead of n x d, on the CPU: the decompositions of a GPU take longer and wait for it several times.
    values = torch.linalg.eigvalsh((embeds.T @ embeds).cpu()).clamp(min=0).sqrt()
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def embedding_health(image_embeds: torch.Tensor) -> dict[str, float]:
    """
    Measures of unit-length embeddings `(B, 2, d)`, B at least 2, without labels.

    Returns:
        `effective_rank`; `alignment`, the mean squared distance of positives, and `uniformity`, the logarithm of the
        mean of exp(-2 distance^2) over the pairs of different images, about -4 when they are spread evenly and 0 when
        they are all the same (Wang and Isola, arXiv 2005.10242, section 4.1); `positive_similarity` and
        `negative_similarity`, mean cosines, whose distance is the gap that the contrastive term widens.
    """
    embeds = image_embeds.float()
    cosines = torch.einsum("ivd,jwd->ijvw", embeds, embeds)
    positive = cosines.diagonal()[0, 1].mean()  # (2, 2, B) -> ()

    def mean_of_different(values):
        number = values.numel() - values.diagonal().numel()
        return (values.sum() - values.diagonal().sum()) / number

    measures = {
        "alignment": 2 - 2 * positive,  # distance^2 = 2 - 2 cosine
        "uniformity": mean_of_different((2 * (2 * cosines - 2)).exp()).log(),
        "positive_similarity": positive,
        "negative_similarity": mean_of_different(cosines),
    }
    values = dict(zip(measures, torch.stack(list(measures.values())).tolist(), strict=True))  # one wait for the device
    return {"effective_rank": effective_rank(embeds.flatten(0, 1)).item(), **values}


@torch.no_grad()
def trivial_losses(config: CANConfig, pixel_values: torch.Tensor, num_contrasted: int) -> dict[str, float]:
    """
    What each term of the objective costs a model that has learnt nothing, by the term's name.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 2, C, H, W)`): A batch as the model gets it.
        num_contrasted (`int`): N.

    Returns:
        `contrastive`: guessing, ln(2N - 1). `reconstruction`: the mean of each channel over the batch everywhere, or
        zero where targets are normalised per patch. `denoising`: zero noise, the mean of sigma^2 over
        U[0, sigma_max], which is sigma_max^2 / 3.
    """
    losses = {}
    if config.contrastive_loss_weight > 0:
        losses["contrastive"] = math.log(2 * num_contrasted - 1)
    if config.reconstruction_loss_weight > 0:
        pixels = pixel_values.float()
        if config.norm_pix_loss:
            losses["reconstruction"] = normalize_patches(patchify(pixels, config.patch_shape)).square().mean().item()
        else:
            losses["reconstruction"] = pixels.var(dim=(0, 1, 3, 4), correction=0).mean().item()
    if config.denoising_loss_weight > 0:
        losses["denoising"] = config.noise_std_max**2 / 3
    return losses


def reachable_gain(config: CANConfig) -> float:
    """
    By how many dB the noise can be weakened at most. Through the encoder's width D and the decoder's w, min(D, w) of
    the P directions of a patch are reached, and noise is alike in all of them. Infinite where all are reached.
    """
    width, pixels = min(config.hidden_size, config.decoder_hidden_size), config.pixels_per_patch
    return math.inf if width >= pixels else -10 * math.log10(1 - width / pixels)


# --- The verdict -----------------------------------------------------------------------------------------------------


def findings(
    lines: list[dict], warmup_steps: int, max_steps: int, untrained_knn: float | None = None
) -> dict[str, str]:
    """
    What is wrong with a run, in plain sentences with the fix in them, by a short name; empty if nothing is.

    Args:
        lines (`list[dict]`):
            The run's lines of `metrics.jsonl`, the newest last; the last five are judged together, and all lines that
            have one for the k-NN accuracy. What a line lacks is not judged.
        warmup_steps, max_steps (`int`):
            What the model learns is judged after the warm-up, a tenth of the steps and `EARLY` steps: before, every
            model looks dead.
        untrained_knn (`float`, *optional*): k-NN accuracy before training.
    """
    last = lines[-1]

    def mean(name: str, lines=lines) -> float | None:
        values = [line[name] for line in lines[-5:] if name in line]
        return sum(values) / len(values) if values else None

    found = {}
    wait = mean("data_wait", lines[1:])  # in the first, the loader started
    if wait is not None and wait > 0.3:
        found["starving"] = (
            f"the device waits for data {wait:.0%} of the time; raise dataloader_num_workers, or bring the data nearer"
        )
    if _is_early(last["step"], warmup_steps, max_steps):
        return found

    rank, similarity = mean("effective_rank"), mean("negative_similarity")
    if similarity is not None and similarity > 0.95:
        found["collapse"] = (
            f"the embeddings have collapsed: those of different images have a cosine of {similarity:.3f} and fill "
            f"{rank:.1f} directions; lower base_learning_rate, or check that the two views are not all alike"
        )
    dead = {  # with the share of the trivial loss above which a term is dead
        "contrastive": ("the contrastive head tells images apart no better than guessing", 0.95),
        "reconstruction": ("the decoder reconstructs hidden patches no better than the mean colour", 0.95),
        # A draw of sigma makes the loss of a dead head scatter, and 0.9 is half a decibel of noise.
        "denoising": ("the noise head is hardly better than predicting zero", 0.9),
    }
    for term, (sentence, share) in dead.items():
        loss, trivial = mean(f"{term}_loss"), mean(f"{term}_trivial")
        if loss is not None and trivial is not None and loss > share * trivial:
            found[term] = (
                f"{sentence}: {loss:.4g} against {trivial:.4g}; train longer, or raise base_learning_rate or "
                f"{term}_loss_weight"
            )
    norms = sorted(line["grad_norm"] for line in lines if "grad_norm" in line)
    usual, norm = norms[len(norms) // 2] if norms else None, mean("grad_norm")
    if norm == 0:
        found["no_gradient"] = "the gradient is zero: nothing is learnt"
    elif norm is not None and norm > 10 * usual:
        found["gradient"] = (
            f"the gradient norm is {norm:.3g}, ten times and more its median of {usual:.3g}; lower "
            "base_learning_rate, or set max_grad_norm"
        )
    probes = [(line["step"], line["knn"]) for line in lines if "knn" in line]
    if probes:
        (best_step, best), (_, newest) = max(probes, key=lambda probe: probe[1]), probes[-1]
        if newest < best - 0.03:
            found["falling"] = f"the features grow worse: k-NN {newest:.1%}, after {best:.1%} at step {best_step}"
        if untrained_knn is not None and newest < untrained_knn:
            found["no_better"] = (
                f"the features are worse than those of the untrained encoder: k-NN {newest:.1%} against "
                f"{untrained_knn:.1%}"
            )
    return found


def verdict(lines: list[dict], warmup_steps: int, max_steps: int, untrained_knn: float | None = None) -> list[str]:
    """The sentences on a run so far: what is wrong (`findings`), or in one sentence that nothing seems to be."""
    found = list(findings(lines, warmup_steps, max_steps, untrained_knn).values())
    last = lines[-1]
    if found:
        return found
    if _is_early(last["step"], warmup_steps, max_steps):
        return ["too early to judge what is learnt"]
    parts = [
        f"{short} {last[f'{term}_loss']:.4g} (trivial: {last[f'{term}_trivial']:.4g})"
        for term, short in TERMS.items()
        if f"{term}_trivial" in last and f"{term}_loss" in last
    ]
    if "effective_rank" in last:
        parts.append(f"embeddings in {last['effective_rank']:.0f} directions")
    return [f"healthy: {', '.join(parts)}"]


def _is_early(step: int, warmup_steps: int, max_steps: int) -> bool:
    return step <= max(EARLY, warmup_steps, 0.1 * max_steps)


# --- Preflight -------------------------------------------------------------------------------------------------------
# Each check returns what is wrong, in a sentence with the fix, or None.


def check_pixels(pixel_values: torch.Tensor) -> str | None:
    """
    Whether normalised pixels `(B, V, C, H, W)` are finite, two views differ, and, of 16 images and more, each
    channel has about mean 0 and deviation 1.
    """
    pixels = pixel_values.float()
    mean, std = pixels.mean(dim=(0, 1, 3, 4)), pixels.std(dim=(0, 1, 3, 4))
    if not pixels.isfinite().all():
        return "the normalised pixels are not finite; check image_mean and image_std"
    if len(pixels) >= 16 and (mean.abs().max() > 1.5 or std.min() < 0.2 or std.max() > 3):
        return (
            f"the normalised pixels have mean {_numbers(mean)} and deviation {_numbers(std)}, far from 0 and 1; "
            "set image_mean and image_std to those of your images (--measure_mean_std finds them)"
        )
    if pixels.shape[1] == 2 and torch.equal(pixels[:, 0], pixels[:, 1]):
        return "the two views of every image are the same; augmentation is off"
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
    """Whether the optimiser holds every trainable parameter once, and nothing else."""
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    left_out = [name for key, name in trainable.items() if key not in held]
    if left_out or len(held) != len(trainable):
        return f"the optimiser holds {len(held)} of {len(trainable)} parameters; left out: {', '.join(left_out)}"
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


# --- Arithmetic and memory -------------------------------------------------------------------------------------------


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
    """Bytes, at most so far: of tensors on a GPU; of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # there is none on Windows, where hub.py and what evaluates import this module too

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- Words -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `3 min`, `40 s`."""
    for unit, size, smaller, parts in (("d", 86_400, "h", 24), ("h", 3600, "min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size * parts / size)} {smaller}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _numbers(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.tolist())
