"""
Figures of a run: what the model reconstructs, what its features tell apart, and how its metrics moved.

Drawn without pyplot, which would choose a backend for the whole process and keep every figure.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from .configuration_can import CANConfig
from .losses import patch_statistics
from .modeling_can import CANForPreTraining, patchify, unpatchify


__all__ = [
    "amplified_noise", "curves", "displayed", "errors_of", "feature_columns", "feature_sheet", "plain",
    "principal_components", "reconstruct", "reconstruction_sheet", "save_figure", "segmentation_sheet", "true_colors",
]  # fmt: skip


@torch.no_grad()
def reconstruct(
    model: CANForPreTraining,
    pixel_values: torch.Tensor,
    noise_level: float | None = None,
    pixel_noise: torch.Tensor | None = None,
    masking_scores: torch.Tensor | None = None,
    mask_ratio: float | None = None,
) -> dict[str, torch.Tensor]:
    """
    One view of each image through noise, mask and decoder.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalized pixels.
        noise_level (`float`, *optional*): sigma; `noise_std_max` if `None`.
        pixel_noise (`torch.Tensor` of the same shape, *optional*): e, drawn from N(0, I) if `None`.
        masking_scores (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Drawn from U[0, 1].
        mask_ratio (`float`, *optional*): Fraction of the patches to mask, in [0, 1); the model's own if `None`.

    Returns:
        Tensors of the same shape, in normalized pixels: `input` (noised, masked patches NaN), `reconstruction`
        (predicted on masked patches, the noised input minus the predicted noise on visible ones), `noise` and
        `predicted_noise` (masked patches NaN; zero where the model has no noise).
    """
    config = model.config
    has_noise = config.noise_std_max > 0
    noise_level = config.noise_std_max if noise_level is None else noise_level
    mask_ratio = config.mask_ratio if mask_ratio is None else mask_ratio
    if pixel_noise is None or not has_noise:
        pixel_noise = torch.randn_like(pixel_values) if has_noise else torch.zeros_like(pixel_values)
    noised = pixel_values + noise_level * pixel_noise
    encoded = model.can(noised, mask_ratio=mask_ratio, masking_scores=masking_scores)
    levels = torch.full((len(pixel_values),), float(noise_level), device=pixel_values.device)
    logits = model.decoder(encoded.last_hidden_state, encoded.ids_restore, config.grid_shape, levels)

    clean, noised_patches = patchify(pixel_values, config.patch_shape), patchify(noised, config.patch_shape)
    predicted_pixels = logits
    if config.norm_pix_loss:  # back to true colors, with the statistics that normalized the target
        patch_mean, patch_std = patch_statistics(clean)
        predicted_pixels = logits * patch_std + patch_mean
    predicted_noise = logits if config.denoising_loss_weight > 0 else torch.zeros_like(logits)
    masked, nan = encoded.mask[:, :, None].bool(), torch.tensor(float("nan"), device=logits.device)
    patches = {
        "input": torch.where(masked, nan, noised_patches),
        "reconstruction": torch.where(masked, predicted_pixels, noised_patches - predicted_noise),
        "noise": torch.where(masked, nan, noised_patches - clean),
        "predicted_noise": torch.where(masked, nan, predicted_noise),
    }
    return {
        name: unpatchify(value, config.patch_shape, config.grid_shape, config.num_channels)
        for name, value in patches.items()
    }


def errors_of(
    images: dict[str, torch.Tensor], pixel_values: torch.Tensor, std: tuple[float, ...], config: CANConfig
) -> dict[str, torch.Tensor]:
    """
    Args:
        images (`dict[str, torch.Tensor]`): What `reconstruct` made of `pixel_values`.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalized pixels.
        std (`tuple[float, ...]`): By which they were normalized.

    Returns:
        Each `(batch_size,)`. `masked`: mean squared error on the masked patches, pixels in [0, 1]; `plain`: that of
        the mean color of the visible patches in their place (both absent without reconstruction loss). `noise` and
        `residual`: mean square on visible patches of the noise, and of what is left after subtracting the predicted
        noise, in normalized units (absent without denoising loss). With `norm_pix_loss` a masked patch is put back
        with its own true mean and standard deviation, as in MAE's figures, and `plain` is each patch's own true mean.
        NaN where nothing is masked.
    """
    masked, std = images["input"].isnan(), torch.tensor(std, device=pixel_values.device)[:, None, None]

    def mean_square(error, where):
        return torch.where(where, error, 0).square().sum(dim=(1, 2, 3)) / where.sum(dim=(1, 2, 3))

    errors = {}
    if config.reconstruction_loss_weight > 0:
        if config.norm_pix_loss:
            patches = patchify(pixel_values, config.patch_shape)
            plain = patches.mean(dim=-1, keepdim=True).expand_as(patches)
            plain = unpatchify(plain, config.patch_shape, config.grid_shape, config.num_channels)
        else:
            plain = torch.where(masked, 0, pixel_values).sum(dim=(2, 3)) / (~masked).sum(dim=(2, 3))
            plain = plain[:, :, None, None]
        errors["masked"] = mean_square((images["reconstruction"] - pixel_values) * std, masked)
        errors["plain"] = mean_square((plain - pixel_values) * std, masked)
    if config.denoising_loss_weight > 0:
        errors["noise"] = mean_square(images["noise"].nan_to_num(), ~masked)
        residual = images["noise"] - images["predicted_noise"]
        errors["residual"] = mean_square(residual.nan_to_num(), ~masked)
    return errors


def true_colors(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalized pixels `(..., C, H, W)` -> [0, 1], masked patches gray."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std))
    return (pixels * std + mean).clamp(0, 1).nan_to_num(0.5)


def displayed(images: torch.Tensor, channels: tuple[int, ...] | None = None) -> torch.Tensor:
    """
    Images `(..., C, H, W)` -> `(..., 3 or 1, H, W)`: three channels as red, green and blue, or one as gray; by default
    the first three, or the first of two.
    """
    channels = channels or range(3 if images.shape[-3] >= 3 else 1)
    return images[..., list(channels), :, :]


def amplified_noise(noise: torch.Tensor, noise_std_max: float) -> torch.Tensor:
    """Noise -> [0, 1]: mid-gray is none (and masked patches), the full range three times `noise_std_max`."""
    return (0.5 + noise / (6 * max(noise_std_max, 1e-6))).clamp(0, 1).nan_to_num(0.5)


def reconstruction_sheet(
    model: CANForPreTraining,
    pixel_values: torch.Tensor,
    mean: tuple,
    std: tuple,
    path: Path,
    channels: tuple[int, ...] | None = None,
) -> None:
    """
    Saves a sheet with a row an image: image, noised and masked input, reconstruction, noise, predicted noise. Of
    images of many channels those that `displayed` shows.
    """
    images, sigma_max = reconstruct(model, pixel_values), model.config.noise_std_max
    columns = {
        "image": true_colors(pixel_values, mean, std),
        "noised, masked input": true_colors(images["input"], mean, std),
        "reconstruction": true_colors(images["reconstruction"], mean, std),
        "noise (amplified)": amplified_noise(images["noise"], sigma_max),
        "predicted noise": amplified_noise(images["predicted_noise"], sigma_max),
    }
    _save_sheet({name: displayed(column, channels) for name, column in columns.items()}, path)


def principal_components(tokens: torch.Tensor) -> torch.Tensor:
    """
    Patch tokens as colors: their first three principal components over all images together.

    Args:
        tokens (`torch.Tensor` of shape `(N, d, h, w)`): d is 3 or more.

    Returns:
        `(N, 3, h, w)` in [0, 1], each component scaled by its 1st and 99th percentile; zero where all tokens are
        alike. A component's sign is such that the largest entry of its direction is positive. What is not finite
        counts as zero.
    """
    rows = tokens.movedim(1, -1).flatten(0, 2).cpu().double()  # (N * h * w, d)
    rows = rows.nan_to_num(0, 0, 0)  # of which there are no eigenvectors: a sheet ends no run
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(-1)  # (d, 3), the first one first
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    components = rows @ (directions * largest.sign())
    low, high = components.quantile(torch.tensor([0.01, 0.99], dtype=torch.double), dim=0)
    # Of tokens that span less than three dimensions, the last components are rounding errors, and stay dark.
    scale = (high - low).clamp(min=max(1e-4 * (high - low).max().item(), 1e-12))
    components = ((components - low) / scale).clamp(0, 1).float()
    return components.view(len(tokens), *tokens.shape[2:], 3).movedim(-1, 1)


def feature_columns(tokens: torch.Tensor, attentions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """
    What `evaluation.encoders.feature_maps` returns, to be looked at: patch tokens as colors, and where the class token
    looks.

    Args:
        tokens (`torch.Tensor` of shape `(N, d, h, w)`): Of the patches.
        attentions (`torch.Tensor` of shape `(N, h, w)`, *optional*):
            From the class token to the patches. Each image's smallest is shown black, its largest white. `None` leaves
            out the column.

    Returns:
        Title -> `(N, 3 or 1, h, w)` in [0, 1].
    """
    columns = {"principal components": principal_components(tokens)}
    if attentions is not None:
        low, high = attentions.amin((1, 2), keepdim=True), attentions.amax((1, 2), keepdim=True)
        columns["class token attention"] = ((attentions - low) / (high - low).clamp(min=1e-12))[:, None]
    return columns


def feature_sheet(images: torch.Tensor, tokens: torch.Tensor, attentions: torch.Tensor | None, path: Path) -> None:
    """
    Saves a sheet with a row an image: image, and its `feature_columns`.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1].
        tokens, attentions: As of `feature_columns`.
    """
    columns, size = {"image": images, **feature_columns(tokens, attentions)}, images.shape[-2:]
    _save_sheet({name: nn.functional.interpolate(column, size) for name, column in columns.items()}, path)


def segmentation_sheet(
    images: torch.Tensor, masks: list[torch.Tensor], predictions: list[torch.Tensor], path: Path
) -> None:
    """
    Saves a sheet with a row an image: image, mask and prediction, in which every class has a color (PASCAL VOC's) and
    pixels that do not count are white.

    Args:
        images (`torch.Tensor` of shape `(N, C, H, W)`): In [0, 1].
        masks, predictions (`list[torch.Tensor]`): Of each image, class indices `(h, w)`; -1 does not count.
    """
    size = images.shape[-2:]

    def colored(classes: torch.Tensor) -> torch.Tensor:
        classes, colors = classes.cpu(), []
        for channel in range(3):  # every third bit of the index, the lowest one first, from the highest of the color
            bits = [((classes >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8)]
            colors.append(torch.where(classes < 0, 255, sum(bits)))
        return nn.functional.interpolate(torch.stack(colors)[None] / 255, size)[0]

    columns = {"image": images}
    for title, maps in (("mask", masks), ("prediction", predictions)):
        columns[title] = torch.stack([colored(classes) for classes in maps])
    _save_sheet(columns, path)


def _save_sheet(columns: dict[str, torch.Tensor], path: Path):
    """
    One image of all, nearest neighbors enlarged, white between them: an axis for each would take seconds.

    Args:
        columns (`dict[str, torch.Tensor]`): Each `(N, C, H, W)` in [0, 1], C being 3, or 1 for gray.
    """
    columns = {name: column.cpu().expand(-1, 3, -1, -1) for name, column in columns.items()}
    grid = torch.stack(list(columns.values()), dim=1)  # (rows, columns, channels, height, width)
    scale = max(1, round(160 / max(grid.shape[-2:])))
    grid = grid.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    grid = nn.functional.pad(grid, (4, 4, 4, 4), value=1.0)
    sheet = grid.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    figure = Figure((1.6 * len(columns), 1.6 * len(columns) * sheet.shape[0] / sheet.shape[1] + 0.3))
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest")
    axis.xaxis.tick_top()
    axis.set_xticks([(column + 0.5) * sheet.shape[1] / len(columns) for column in range(len(columns))], list(columns))
    axis.tick_params(length=0, labelsize=8)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    save_figure(figure, path)


def plain(text: str) -> str:
    """A name as matplotlib shows it as it is: between dollars it would read a formula."""
    return text.replace("$", r"\$")


def curves(metrics: list[dict], path: Path) -> None:
    """Saves a panel for each of the run's measurements over the steps, with a trivial model's losses dashed."""
    panels = {
        "loss": "weighted sum", "contrastive_loss": "C, InfoNCE (nats)",
        "reconstruction_loss": "A, masked patches (MSE)",
        "denoising_loss": "N, noise (MSE)", "knn": "k-NN accuracy",
        "embedding_spread": "embedding spread (0 = collapse)", "effective_rank": "effective rank of the embeddings",
        "uniformity": "uniformity (0 = collapse)", "grad_norm": "gradient norm", "learning_rate": "learning rate",
        "images_per_second": "images a second", "data_wait": "fraction of the time waiting for data",
    }  # fmt: skip
    panels = {name: title for name, title in panels.items() if any(name in line for line in metrics)}
    figure = Figure((14, 5))
    axes = figure.subplots(2, (len(panels) + 1) // 2, squeeze=False)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        trivial = name.removesuffix("_loss") + "_trivial"
        for key, style in ((name, "-"), (trivial, "--")):
            lines = [line for line in metrics if key in line]
            marker = "." if len(lines) == 1 else ""  # of a single point there is no line to see
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            axis.plot(steps, values, style, linewidth=1, marker=marker)
        axis.set_title(title, fontsize=8)
        if name == "denoising_loss":
            axis.set_yscale("log")  # it begins far above what a model that predicts nothing has
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.text(0.995, 0.005, "dashed: a model that has learned nothing", fontsize=7, ha="right", va="bottom")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path):
    """As PNG, into a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
