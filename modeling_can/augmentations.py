"""Photometric augmentation of uint8 views in batch, on the device that trains (SimCLR, arXiv 2002.05709, app. A)."""

import logging

import kornia.augmentation as K
import torch
from torch import nn


logger = logging.getLogger(__name__)


class Augmentation(nn.Module):
    """
    uint8 views -> flipped, colour-jittered, greyscaled, blurred, solarised, normalised fp32 views. Each view of each
    image draws its own numbers, from torch's global generator. Where there are not three channels, the two colour
    steps are left out, with a message.

    Args:
        mean, std (`tuple[float]`): Of the pixels in [0, 1], one entry a channel.
        flip_probability (`float`): Of a horizontal flip.
        color_jitter (`tuple[float]`): Strengths of brightness, contrast, saturation and hue.
        color_jitter_probability, greyscale_probability, blur_probability, solarize_probability (`float`): Of each.
        blur_sigma (`(float, float)`): Range of the Gaussian's width in pixels.
        blur_kernel_size (`int`): Odd; about a tenth of the image side in SimCLR.
    """

    def __init__(
        self,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        flip_probability=0.5,
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_probability=0.8,
        greyscale_probability=0.2,
        blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
        blur_kernel_size=23,
        solarize_probability=0.0,
    ):
        super().__init__()
        if len(mean) != 3 and (color_jitter_probability > 0 or greyscale_probability > 0):
            logger.warning(
                "colour jitter and greyscale are left out: they need 3 channels, these images have %d", len(mean)
            )
            color_jitter_probability = greyscale_probability = 0
        steps = []
        if flip_probability > 0:
            steps.append(K.RandomHorizontalFlip(p=flip_probability))
        if color_jitter_probability > 0:
            steps.append(K.ColorJitter(*color_jitter, p=color_jitter_probability))
        if greyscale_probability > 0:
            steps.append(K.RandomGrayscale(p=greyscale_probability))
        if blur_probability > 0:
            steps.append(K.RandomGaussianBlur((blur_kernel_size, blur_kernel_size), blur_sigma, p=blur_probability))
        if solarize_probability > 0:  # inverts what is brighter than one half (BYOL, arXiv 2006.07733)
            steps.append(K.RandomSolarize(thresholds=0.0, additions=0.0, p=solarize_probability))
        steps.append(K.Normalize(torch.tensor(mean), torch.tensor(std)))
        self.steps = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 `(batch_size, num_views, num_channels, height, width)` -> fp32 of the same shape, normalised."""
        return self.steps(views.flatten(0, 1).float() / 255).unflatten(0, views.shape[:2])
