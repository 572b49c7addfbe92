"""Reconstruction and denoising of the test images, in decibels, for a CAN with its decoder."""

import math
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForPreTraining

from ..plots import errors_of, reconstruct, reconstruction_sheet
from .encoders import load_model
from .features import Images
from .preprocessors import Preprocessor
from .protocol import Entry, Features, Measure, Protocol, Setup, file_name


__all__ = ["Reconstruction"]

_NUM_DRAWN = 6  # rows of the sheet


class Reconstruction(Protocol):
    """The error on masked patches below the full range, and by how much the noise gets weaker."""

    name, rank = "reconstruction", 2

    def check(self, setup: Setup, entry: Entry):
        config, size = entry.encoder.model.config, entry.preprocessor.image_size
        if config.model_type != "can" or not config.uses_decoder:
            raise ValueError(
                "the reconstruction task needs a CAN that was trained to reconstruct or to denoise, and "
                f"{entry.name} is {'one that was not' if config.model_type == 'can' else f'a {config.model_type}'}"
            )
        if size != config.image_shape or not entry.preprocessor.in_two_steps:
            raise ValueError(
                f"the reconstruction task needs the size that {entry.name} was trained at, {config.image_shape}, "
                f"and not {size}; leave out --image_size"
            )

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        config, preprocessor, test = entry.encoder.model.config, entry.preprocessor, setup.data.test
        seed, device = setup.settings.seed, setup.device
        model = load_model(entry.path, AutoModelForPreTraining, setup.settings.trust_remote_code)
        model.eval().to(device)
        mean, std = preprocessor.processor.image_mean, preprocessor.processor.image_std

        def errors(batch):
            images, indices = batch
            pixels = preprocessor.normalize(images.to(device))
            return _reconstruction_errors(
                model=model, pixel_values=pixels, indices=indices.tolist(), std=std, seed=seed
            )

        images = Images(test, partial(_with_index, preprocessor))
        made = setup.extractor(errors, images, f"{entry.name}: reconstruction")
        if not setup.is_main:
            return None
        figures = {"mask_ratio": config.mask_ratio, "noise_level": config.noise_std_max}
        figures["norm_pix_loss"] = config.norm_pix_loss
        if "masked" in made:
            figures["masked_patches"] = self._below(setup, 1.0, made["masked"])
            figures["plain"] = self._below(setup, 1.0, made["plain"])
        if "noise" in made:
            figures["noise_reduction"] = self._below(setup, made["noise"].mean(), made["residual"])
        path = setup.output_dir / "figures" / f"reconstruction-{file_name(entry.name)}.png"
        few = torch.stack([preprocessor.decode(test.read(row)) for row in range(min(_NUM_DRAWN, len(test)))])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reconstruction_sheet(
                model=model, pixel_values=preprocessor.normalize(few).to(device), mean=mean, std=std, path=path
            )
        return {**figures, "figure": str(path)}

    @staticmethod
    def _below(setup: Setup, signal: float, error: np.ndarray) -> dict:
        """Decibels from a mean square down to another, and the interval of that."""
        low, high = setup.interval(error)
        decibels = [10 * math.log10(signal / max(x, 1e-20)) for x in (error.mean(), high, low)]
        return {"db": decibels[0], "interval": decibels[1:]}

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        plain = "their own mean" if figures["norm_pix_loss"] else "mean color of the visible"
        decibels = {"masked_patches": ("masked patches", "psnr"), "plain": (f"... {plain}", "psnr"),
                    "noise_reduction": ("noise weaker by", "noise_reduction")}  # fmt: skip
        return {
            f"{title}, dB": Measure(
                value=figures[name]["db"],
                interval=figures[name]["interval"],
                metric=metric,
                task_type="image-to-image",
            )
            for name, (title, metric) in decibels.items()
            if name in figures
        }


def _with_index(preprocessor: Preprocessor, encoded: bytes, index: int) -> tuple[torch.Tensor, int]:
    return preprocessor.decode(encoded), index


def _reconstruction_errors(
    model: torch.nn.Module, pixel_values: torch.Tensor, indices: list[int], std: tuple[float, ...], seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    How well each image is completed and denoised, at the largest noise level. Noise and mask depend on the seed and
    the image's index alone.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalized pixels.
        std (`tuple[float, ...]`): By which they were normalized.

    Returns:
        As `errors_of`.
    """
    config, noise, scores = model.config, [], []
    for index in indices:
        generator = torch.Generator().manual_seed(hash((seed, int(index))) % 2**63)
        noise.append(torch.randn(pixel_values.shape[1:], generator=generator))
        scores.append(torch.rand(config.num_patches, generator=generator))
    noise, scores = (torch.stack(x).to(pixel_values.device) for x in (noise, scores))
    made = reconstruct(model, pixel_values, pixel_noise=noise, masking_scores=scores)
    return errors_of(made, pixel_values, std, config)
