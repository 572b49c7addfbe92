"""Photometric augmentation of uint8 views in batch, on the device that trains (SimCLR, arXiv 2002.05709, app. A)."""

import kornia.augmentation as K
import torch
from torch import nn


class Augmentation(nn.Module):
    """
    uint8 views -> flipped, colour-jittered, greyscaled, blurred, normalised fp32 views. Each view of each image draws
    its own numbers, from torch's global generator.

    Args:
        mean, std (`tuple[float]`): Of the pixels in [0, 1], one entry a channel.
        flip_probability (`float`): Of a horizontal flip.
        color_jitter (`tuple[float]`): Strengths of brightness, contrast, saturation and hue.
        color_jitter_probability, greyscale_probability, blur_probability (`float`): Of each step.
        blur_sigma (`(float, float)`): Range of the Gaussian's width in pixels.
        blur_kernel_size (`int`): Odd; about a tenth of the image side in SimCLR.

    Raises:
        ValueError: for colour steps on anything but three channels.
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
    ):
        super().__init__()
        if len(mean) != 3 and (color_jitter_probability > 0 or greyscale_probability > 0):
            raise ValueError(
                f"colour jitter and greyscale need 3 channels, got {len(mean)}; "
                "set color_jitter_probability=0 and greyscale_probability=0"
            )
        steps = []
        if flip_probability > 0:
            steps.append(K.RandomHorizontalFlip(p=flip_probability))
        if color_jitter_probability > 0:
            steps.append(K.ColorJitter(*color_jitter, p=color_jitter_probability))
        if greyscale_probability > 0:
            steps.append(K.RandomGrayscale(p=greyscale_probability))
        if blur_probability > 0:
            steps.append(K.RandomGaussianBlur((blur_kernel_size, blur_kernel_size), blur_sigma, p=blur_probability))
        steps.append(K.Normalize(torch.tensor(mean), torch.tensor(std)))
        self.steps = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """uint8 `(batch_size, num_views, num_channels, height, width)` -> fp32 of the same shape, normalised."""
        return self.steps(views.flatten(0, 1).float() / 255).unflatten(0, views.shape[:2])
