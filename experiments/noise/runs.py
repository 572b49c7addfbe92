"""
The runs of the study: at each scale a base and what differs from it, one factor at a time. Each is named by that.
"""

from experiments.cifar10.runs import SCALES, contrastive_weight


__all__ = ["RUNS", "runs"]

OWN = {"noise_head": "own", "norm_noise_loss": True}
SHARED = {"noise_head": "shared", "norm_noise_loss": True}
PAPER = {"noise_head": "shared", "norm_noise_loss": False, "noise_std_max": 0.05, "denoising_loss_weight": 0.2165}
NO_C = {"contrastive_loss_weight": 0}
NO_LOSS = {"denoising_loss_weight": 0}
NO_NOISE = {"noise_std_max": 0, "denoising_loss_weight": 0}
NO_LEVEL = {"noise_level_embedding": False}
COMMON = {  # name: what differs from the base, in the order of worth
    "base": {},
    **{f"sigma-{sigma}": {"noise_std_max": sigma} for sigma in (0.05, 0.1, 0.25, 1)},
    "no-noise": NO_NOISE,
    "paper": PAPER,
    "no-loss": NO_LOSS,
    "no-level": NO_LEVEL,
    "shared": SHARED,
    **{f"weight-{weight}": {"denoising_loss_weight": weight} for weight in (0.1, 0.3, 3)},
    "raw-0.3": {"norm_noise_loss": False, "denoising_loss_weight": 0.3},
    "sigma-0.05-weight-10": {"noise_std_max": 0.05, "denoising_loss_weight": 10},
    "sigma-0.05-own-raw": {**PAPER, "noise_head": "own"},
    "no-c": NO_C,
    "no-c-sigma-0.05": {**NO_C, "noise_std_max": 0.05},
    "no-c-paper": {**PAPER, **NO_C},
    "patch-8": {"patch_size": 8},
    "decoder-32": {"decoder_hidden_size": 32, "decoder_intermediate_size": 128},
    "decoder-128": {"decoder_hidden_size": 128, "decoder_intermediate_size": 512},
    "mask-0.25": {"mask_ratio": 0.25},
}
CIFAR10 = {
    **{key: value for key, value in SCALES["toy"].items() if key != "num_train_epochs"}, **contrastive_weight(0.3),
    **OWN, "patch_size": 4, "noise_std_max": 0.5, "denoising_loss_weight": 1, "per_device_train_batch_size": 512,
    "base_learning_rate": 1e-3, "max_steps": 2000,
}  # fmt: skip
BASES = {"quickstart": {**OWN, "noise_std_max": 0.5, "denoising_loss_weight": 1}, "cifar10": CIFAR10}
RUNS = {
    "quickstart": {
        **COMMON,
        "encoder-48": {"hidden_size": 48, "intermediate_size": 192},
        "encoder-192": {"hidden_size": 192, "intermediate_size": 768},
        "weight-3-decoder-128": {  # the best ones together
            "denoising_loss_weight": 3,
            "decoder_hidden_size": 128,
            "decoder_intermediate_size": 512,
        },
    },
    "cifar10": {
        **COMMON,
        "encoder-64": {"hidden_size": 64, "intermediate_size": 256},
        "encoder-192": {"hidden_size": 192, "intermediate_size": 768},
        "sigma-0.25-no-loss": {**NO_LOSS, "noise_std_max": 0.25},
        "sigma-0.25-no-level": {**NO_LEVEL, "noise_std_max": 0.25},
        "sigma-0.25-shared": {**SHARED, "noise_std_max": 0.25},
    },
}
# With seeds 1 and 2 too
ABLATIONS = ("base", "no-noise", "no-loss", "no-level", "shared", "paper")
SEEDED = {"quickstart": (*ABLATIONS, "weight-3", "weight-3-decoder-128"), "cifar10": ABLATIONS}


def runs(scale: str) -> dict[str, dict]:
    """Name with seed -> settings."""
    seeded = [(name, 0) for name in RUNS[scale]] + [(name, seed) for seed in (1, 2) for name in SEEDED[scale]]
    return {f"{name}-seed-{seed}": {**BASES[scale], **RUNS[scale][name], "seed": seed} for name, seed in seeded}
