"""Pictures of a run: what the model reconstructs, and how its numbers moved."""

from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from .configuration_can import CANConfig  # noqa: E402
from .modeling_can import CANForPreTraining, patchify, unpatchify  # noqa: E402


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
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pixels.
        noise_level (`float`, *optional*): sigma; `noise_std_max` if `None`.
        pixel_noise (`torch.Tensor` of the same shape, *optional*): e, drawn from N(0, I) if `None`.
        masking_scores (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Drawn from U[0, 1].
        mask_ratio (`float`, *optional*): Share of the patches to hide, in [0, 1); the model's own if `None`.

    Returns:
        Tensors of the same shape, in normalised pixels: `input` (noised, hidden patches NaN), `reconstruction`
        (predicted on hidden patches, the noised input minus the predicted noise on visible ones), `noise` and
        `predicted_noise` (hidden patches NaN; zero where the model has no noise).
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
    if config.norm_pix_loss:  # back to true colours, with the statistics that normalised the target
        predicted_pixels = logits * (clean.var(-1, keepdim=True) + 1e-6) ** 0.5 + clean.mean(-1, keepdim=True)
    predicted_noise = logits if config.denoising_loss_weight > 0 else torch.zeros_like(logits)
    hidden, nan = encoded.mask[:, :, None].bool(), torch.tensor(float("nan"), device=logits.device)
    patches = {
        "input": torch.where(hidden, nan, noised_patches),
        "reconstruction": torch.where(hidden, predicted_pixels, noised_patches - predicted_noise),
        "noise": torch.where(hidden, nan, noised_patches - clean),
        "predicted_noise": torch.where(hidden, nan, predicted_noise),
    }
    return {
        name: unpatchify(value, config.patch_shape, config.grid_shape, config.num_channels)
        for name, value in patches.items()
    }


def reconstruction_errors(
    model: CANForPreTraining, pixel_values: torch.Tensor, indices: list[int], std: tuple[float, ...], seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    How well each image is completed and denoised, at the largest noise level. Noise and mask depend on the seed and
    the image's index alone.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pixels.
        std (`tuple[float, ...]`): By which they were normalised.

    Returns:
        As `errors_of`.
    """
    config, noise, scores = model.config, [], []
    for index in indices:
        generator = torch.Generator().manual_seed(hash((seed, int(index))) % 2**63)
        noise.append(torch.randn(pixel_values.shape[1:], generator=generator))
        scores.append(torch.rand(config.num_patches, generator=generator))
    noise, scores = (torch.stack(x).to(pixel_values.device) for x in (noise, scores))
    return errors_of(reconstruct(model, pixel_values, None, noise, scores), pixel_values, std, config)


def errors_of(
    pictures: dict[str, torch.Tensor], pixel_values: torch.Tensor, std: tuple[float, ...], config: CANConfig
) -> dict[str, torch.Tensor]:
    """
    Args:
        pictures (`dict[str, torch.Tensor]`): What `reconstruct` made of `pixel_values`.
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pixels.
        std (`tuple[float, ...]`): By which they were normalised.

    Returns:
        Each `(batch_size,)`. `hidden`: mean squared error on the hidden patches, pixels in [0, 1]; `plain`: that of
        the mean colour of the visible patches in their place (both absent without reconstruction loss). `noise` and
        `residual`: mean square on visible patches of the noise, and of what is left after subtracting the predicted
        noise, in normalised units (absent without denoising loss). With `norm_pix_loss` a hidden patch is put back
        with its own true mean and deviation, as in MAE's pictures, and `plain` is each patch's own true mean. NaN
        where nothing is hidden.
    """
    hidden, std = pictures["input"].isnan(), torch.tensor(std, device=pixel_values.device)[:, None, None]

    def mean_square(error, where):
        return torch.where(where, error, 0).square().sum(dim=(1, 2, 3)) / where.sum(dim=(1, 2, 3))

    errors = {}
    if config.reconstruction_loss_weight > 0:
        if config.norm_pix_loss:
            patches = patchify(pixel_values, config.patch_shape)
            plain = patches.mean(dim=-1, keepdim=True).expand_as(patches)
            plain = unpatchify(plain, config.patch_shape, config.grid_shape, config.num_channels)
        else:
            plain = torch.where(hidden, 0, pixel_values).sum(dim=(2, 3)) / (~hidden).sum(dim=(2, 3))
            plain = plain[:, :, None, None]
        errors["hidden"] = mean_square((pictures["reconstruction"] - pixel_values) * std, hidden)
        errors["plain"] = mean_square((plain - pixel_values) * std, hidden)
    if config.denoising_loss_weight > 0:
        errors["noise"] = mean_square(pictures["noise"].nan_to_num(), ~hidden)
        residual = pictures["noise"] - pictures["predicted_noise"]
        errors["residual"] = mean_square(residual.nan_to_num(), ~hidden)
    return errors


def true_colours(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalised pixels `(..., C, H, W)` -> [0, 1], hidden patches grey."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std))
    return (pixels * std + mean).clamp(0, 1).nan_to_num(0.5)


def amplified_noise(noise: torch.Tensor, noise_std_max: float) -> torch.Tensor:
    """Noise -> [0, 1]: mid-grey is none (and hidden patches), the full range three times `noise_std_max`."""
    return (0.5 + noise / (6 * max(noise_std_max, 1e-6))).clamp(0, 1).nan_to_num(0.5)


def reconstruction_sheet(
    model: CANForPreTraining, pixel_values: torch.Tensor, mean: tuple, std: tuple, path: Path
) -> None:
    """Saves a sheet with a row an image: image, noised and masked input, reconstruction, noise, predicted noise."""
    pictures, sigma_max = reconstruct(model, pixel_values), model.config.noise_std_max
    columns = {
        "image": true_colours(pixel_values, mean, std),
        "noised, masked input": true_colours(pictures["input"], mean, std),
        "reconstruction": true_colours(pictures["reconstruction"], mean, std),
        "noise (amplified)": amplified_noise(pictures["noise"], sigma_max),
        "predicted noise": amplified_noise(pictures["predicted_noise"], sigma_max),
    }
    # One picture of all, nearest neighbours enlarged, white between them: an axis for each would take seconds.
    height, width = pixel_values.shape[-2:]
    scale = max(1, round(160 / max(height, width)))
    grid = torch.stack(list(columns.values()), dim=1).cpu()  # (rows, columns, channels, height, width)
    grid = grid.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    grid = nn.functional.pad(grid, (4, 4, 4, 4), value=1.0)
    sheet = grid.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).expand(-1, -1, 3)
    figure, axis = plt.subplots(
        figsize=(1.6 * len(columns), 1.6 * len(columns) * sheet.shape[0] / sheet.shape[1] + 0.3)
    )
    axis.imshow(sheet, interpolation="nearest")
    axis.xaxis.tick_top()
    axis.set_xticks([(column + 0.5) * sheet.shape[1] / len(columns) for column in range(len(columns))], list(columns))
    axis.tick_params(length=0, labelsize=8)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    _save(figure, path)


def retrieval_sheet(
    queries: torch.Tensor, neighbours: torch.Tensor, right: np.ndarray, names: list[str], path: Path
) -> None:
    """
    Saves a contact sheet with a row for each query: the picture, then its nearest neighbours, the nearest first,
    framed green where they are of its class, else red.

    Args:
        queries (`torch.Tensor` of shape `(N, C, H, W)`), neighbours (`(N, k, C, H, W)`): uint8.
        right (`np.ndarray` of shape `(N, k)`): Whether a neighbour is of the query's class.
        names (`list[str]`): The class of each query.
    """
    pictures = torch.cat([queries[:, None], neighbours], dim=1).float() / 255
    scale = max(1, round(120 / max(pictures.shape[-2:])))
    pictures = pictures.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1).expand(-1, -1, 3, -1, -1)
    colours = torch.tensor([[0.85, 0.15, 0.15], [0.15, 0.65, 0.25]])[torch.from_numpy(right).long()]  # (N, k, 3)
    frames = torch.cat([torch.ones(len(queries), 1, 3), colours], dim=1)[..., None, None]
    border = max(2, pictures.shape[-1] // 30)

    def framed(x, width, colour):
        inside = nn.functional.pad(torch.ones_like(x[:, :, :1]), (width,) * 4).bool()
        return torch.where(inside, nn.functional.pad(x, (width,) * 4), colour)

    grid = framed(framed(pictures, border, frames), border, torch.ones(1))
    sheet = grid.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()
    width = 1.2 * pictures.shape[1]
    figure, axis = plt.subplots(figsize=(width + 0.8, width * sheet.shape[0] / sheet.shape[1] + 0.4))
    axis.imshow(sheet, interpolation="nearest")
    rows, columns = sheet.shape[0] / len(pictures), sheet.shape[1] / pictures.shape[1]
    axis.xaxis.tick_top()
    axis.set_xticks([columns / 2, columns * (pictures.shape[1] + 1) / 2], ["query", "nearest training images"])
    axis.set_yticks([rows * (row + 0.5) for row in range(len(names))], [plain(name) for name in names])
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    _save(figure, path)


def evaluation_figure(results: dict[str, dict], path: Path) -> bool:
    """
    Saves accuracy over k (k-NN), shots (few-shot) and severity (corruptions), a line for each model, where they were
    measured; returns whether any was.

    Args:
        results (`dict[str, dict]`): As in `results.json`: model -> task -> figures.
    """
    panels = {"knn": ("k-NN", "k"), "few_shot": ("few-shot", "labels"), "robustness": ("corrupted", "severity")}
    panels = {task: titles for task, titles in panels.items() if any(task in tasks for tasks in results.values())}
    if not panels:
        return False
    shown = [model for model, tasks in results.items() if tasks.keys() & panels.keys()]
    colours = {model: f"C{index}" for index, model in enumerate(shown)}
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 3.6), squeeze=False)
    for axis, (task, (title, label)) in zip(axes[0], panels.items(), strict=True):
        ticks = []
        for model, tasks in results.items():
            if task not in tasks:
                continue
            points = tasks[task]["by_severity"] if task == "robustness" else tasks[task]
            ticks = list(points)
            accuracy = [100 * point["accuracy"] for point in points.values()]
            low, high = ([100 * point["interval"][end] for point in points.values()] for end in (0, 1))
            style = "o" if task == "few_shot" else "o-"  # numbers and shares are no line
            axis.plot(ticks, accuracy, style, markersize=3, linewidth=1, color=colours[model])
            if task == "few_shot":
                axis.vlines(ticks, low, high, colors=colours[model], alpha=0.5)
            else:
                axis.fill_between(ticks, low, high, color=colours[model], alpha=0.2)
        axis.set_title(f"{title}, accuracy in %", fontsize=9)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for model, colour in colours.items():  # whichever panels it is in
        axes[0, 0].plot([], [], "o-", markersize=3, linewidth=1, color=colour, label=plain(model))
    axes[0, 0].legend(fontsize=7)
    _save(figure, path)
    return True


def plain(text: str) -> str:
    """A name as matplotlib shows it as it is: between dollars it would read a formula."""
    return text.replace("$", r"\$")


def curves(metrics: list[dict], path: Path) -> None:
    """Saves a panel for each of the run's measurements over the steps, with a trivial model's losses dashed."""
    panels = {
        "loss": "weighted sum", "contrastive_loss": "C, InfoNCE (nats)",
        "reconstruction_loss": "A, hidden pixels (MSE)",
        "denoising_loss": "N, noise (MSE)", "knn": "k-NN accuracy",
        "embedding_spread": "embedding spread (0 = collapse)", "effective_rank": "effective rank of the embeddings",
        "uniformity": "uniformity (0 = collapse)", "grad_norm": "gradient norm", "learning_rate": "learning rate",
        "images_per_second": "images a second", "data_wait": "share of the time waiting for data",
    }  # fmt: skip
    panels = {name: title for name, title in panels.items() if any(name in line for line in metrics)}
    figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(14, 5), squeeze=False)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        trivial = name.removesuffix("_loss") + "_trivial"
        for key, style in ((name, "-"), (trivial, "--")):
            lines = [line for line in metrics if key in line]
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], style, linewidth=1)
        axis.set_title(title, fontsize=8)
        if name == "denoising_loss":
            axis.set_yscale("log")  # it begins far above what a model that predicts nothing has
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.text(0.995, 0.005, "dashed: a model that has learnt nothing", fontsize=7, ha="right", va="bottom")
    _save(figure, path)


def _save(figure, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
