"""
Is a run healthy? Measures without labels, the losses of a model that has learned nothing, and the plain sentences that
they add up to.

Legend: B images, N images that are contrasted with each other (over micro-batches and processes), d embedding width,
P pixels per patch.
"""

import math

import torch

from ..configuration_can import CANConfig
from ..losses import normalize_patches
from ..modeling_can import patchify


__all__ = [
    "TERMS", "effective_rank", "embedding_health", "embedding_spread", "findings", "reachable_gain", "trivial_losses",
    "verdict",
]  # fmt: skip


TERMS = {"contrastive": "C", "reconstruction": "A", "denoising": "N"}
_EARLY = 100  # steps


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
    if embeds.device.type == "mps":  # which has no double precision
        embeds = embeds.cpu()
    embeds = embeds.double()
    # d x d instead of n x d, on the CPU: the decompositions of a GPU take longer and wait for it several times.
    values = torch.linalg.eigvalsh((embeds.T @ embeds).cpu()).clamp(min=0).sqrt()
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def embedding_health(image_embeds: torch.Tensor) -> dict[str, float]:
    """
    Measures of unit-length embeddings `(B, V, d)`, B and V at least 2, without labels.

    Returns:
        `effective_rank`; `alignment`, the mean squared distance of positives, and `uniformity`, the logarithm of the
        mean of exp(-2 distance^2) over the pairs of different images, about -4 when they are spread evenly and 0 when
        they are all the same (Wang and Isola, arXiv 2005.10242, section 4.1); `positive_similarity` and
        `negative_similarity`, mean cosines, whose distance is the gap that the contrastive term widens.
    """
    embeds = image_embeds.float()
    cosines = torch.einsum("ivd,jwd->ijvw", embeds, embeds)
    others = ~torch.eye(embeds.shape[1], dtype=torch.bool, device=embeds.device)
    positive = cosines.diagonal()[others].mean()  # (V, V, B) -> ()

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
    What each term of the objective costs a model that has learned nothing, by the term's name.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, V, C, H, W)`): A batch as the model gets it.
        num_contrasted (`int`): N.

    Returns:
        `contrastive`: guessing among a positive and the views of the other images, ln(V (N - 1) + 1), which is
        ln(2N - 1) for two views. `reconstruction`: the mean of each channel over the batch everywhere, or
        zero where targets are normalized per patch. `denoising`: zero noise, the mean of sigma^2 over
        U[0, sigma_max], which is sigma_max^2 / 3.
    """
    losses = {}
    if config.contrastive_loss_weight > 0:
        losses["contrastive"] = math.log(pixel_values.shape[1] * (num_contrasted - 1) + 1)
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
    lines: list[dict], warmup_steps: int, max_steps: int, before: tuple[str, float] | None = None
) -> dict[str, str]:
    """
    What is wrong with a run, in plain sentences with the fix in them, by a short name; empty if nothing is.

    Args:
        lines (`list[dict]`):
            The run's lines of `metrics.jsonl`, the newest last; the last five are judged together, and all lines that
            have one for the k-NN accuracy. What a line lacks is not judged.
        warmup_steps, max_steps (`int`):
            What the model learns is judged after the warm-up, a tenth of the steps and 100 steps: before, every model
            looks dead. Whether a run ended worse than it began is judged however short it was.
        before (`(str, float)`, *optional*): With what the run began, in words, and its k-NN accuracy.
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
    if left_out := _left_out(lines):
        found["left_out"] = left_out
    probes = [(line["step"], line["knn"]) for line in lines if "knn" in line]
    worse = {}
    if before and probes and probes[-1][1] < before[1]:
        worse["no_better"] = (
            f"the features are worse than before training: k-NN {probes[-1][1]:.1%}, {before[0]} {before[1]:.1%}; "
            "lower base_learning_rate, or train longer"
        )
    if _is_early(last["step"], warmup_steps, max_steps):
        has_ended = last["step"] == max_steps and "knn" in last
        return found | (worse if has_ended else {})

    rank, similarity = mean("effective_rank"), mean("negative_similarity")
    if similarity is not None and similarity > 0.95:
        found["collapse"] = (
            f"the embeddings have collapsed: those of different images have a cosine of {similarity:.3f} and fill "
            f"{rank:.1f} directions; lower base_learning_rate, or check that the views are not all alike"
        )
    usual_fix = "train longer, or raise base_learning_rate or {}_loss_weight"
    dead = {  # with the fraction of the trivial loss above which a term is dead, and what any run can change about it
        "contrastive": ("the contrastive head tells images apart no better than guessing", 0.95, usual_fix),
        "reconstruction": ("the decoder reconstructs masked patches no better than the mean color", 0.95, usual_fix),
        # A draw of sigma makes the loss of a dead head scatter, and 0.9 is half a decibel of noise.
        "denoising": (
            "the noise head is hardly better than predicting zero",
            0.9,
            "train longer, raise noise_std_max or {0}_loss_weight, or leave the term out with {0}_loss_weight 0",
        ),
    }
    for term, (sentence, share, fix) in dead.items():
        loss, trivial = mean(f"{term}_loss"), mean(f"{term}_trivial")
        if loss is not None and trivial is not None and loss > share * trivial:
            found[term] = f"{sentence}: {loss:.4g} against {trivial:.4g}; {fix.format(term)}"
    norms = sorted(line["grad_norm"] for line in lines if "grad_norm" in line)
    usual, norm = norms[len(norms) // 2] if norms else None, mean("grad_norm")
    if norm == 0:
        found["no_gradient"] = "the gradient is zero: nothing is learned"
    elif norm is not None and norm > 10 * usual:
        found["gradient"] = (
            f"the gradient norm is {norm:.3g}, ten times and more its median of {usual:.3g}; lower "
            "base_learning_rate, or set max_grad_norm"
        )
    if probes:
        (best_step, best), (_, newest) = max(probes, key=lambda probe: probe[1]), probes[-1]
        if newest < best - 0.03:
            found["falling"] = f"the features grow worse: k-NN {newest:.1%}, after {best:.1%} at step {best_step}"
    return found | worse


def _left_out(lines: list[dict]) -> str | None:
    """On updates that did not take place since the sixth line from the end, if they are more than one in ten."""
    counted = [{"step": 0, "num_nonfinite": 0}, *(line for line in lines if "num_nonfinite" in line)][-6:]
    num_steps, num_left_out = (counted[-1][name] - counted[0][name] for name in ("step", "num_nonfinite"))
    if num_left_out <= 0.1 * num_steps:
        return None
    return (
        f"{num_left_out} of the last {num_steps} updates were left out, as their gradients were not finite; lower "
        "base_learning_rate or set max_grad_norm, and begin anew or go on from a checkpoint before them"
    )


def verdict(
    lines: list[dict], warmup_steps: int, max_steps: int, before: tuple[str, float] | None = None
) -> list[str]:
    """The sentences on a run so far: what is wrong (`findings`), or in one sentence that nothing seems to be."""
    found = list(findings(lines, warmup_steps, max_steps, before).values())
    last = lines[-1]
    if found:
        return found
    if _is_early(last["step"], warmup_steps, max_steps):
        return ["too early to judge what is learned"]
    parts = [
        f"{short} {last[f'{term}_loss']:.4g} (trivial: {last[f'{term}_trivial']:.4g})"
        for term, short in TERMS.items()
        if f"{term}_trivial" in last and f"{term}_loss" in last
    ]
    if "effective_rank" in last:
        parts.append(f"embeddings in {last['effective_rank']:.0f} directions")
    return [f"healthy: {', '.join(parts)}"]


def _is_early(step: int, warmup_steps: int, max_steps: int) -> bool:
    return step <= max(_EARLY, warmup_steps, 0.1 * max_steps)
