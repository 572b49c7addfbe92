"""Image retrieval: the nearest training images of every test image, as a sheet to look at and a precision."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from ..plots import plain, save_figure
from .knn import nearest_neighbors
from .protocol import Entry, Features, Measure, Protocol, Setup, file_name


__all__ = ["Retrieval", "retrieval_sheet"]

_QUERIES, _SHOWN = 8, 7  # rows of the sheet, and neighbors in each


class Retrieval(Protocol):
    """The sheet, and the fraction of the neighbors that are of the query's class."""

    name, on_features = "retrieval", True

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict:
        data, labels = setup.data, setup.data.test.labels
        _, nearest = nearest_neighbors(features.train, features.test, _SHOWN, setup.device)
        right = data.train.labels[nearest] == labels[:, None]
        rows = np.random.default_rng(setup.settings.seed).permutation(len(labels))[:_QUERIES]
        draw = lambda split, row: entry.preprocessor.shown(split.read(row))  # noqa: E731
        path = setup.output_dir / "figures" / f"retrieval-{file_name(entry.name)}.png"
        retrieval_sheet(
            queries=torch.stack([draw(data.test, row) for row in rows]),
            neighbors=torch.stack([torch.stack([draw(data.train, row) for row in nearest[query]]) for query in rows]),
            right=right[rows],
            names=[data.class_names[label] for label in labels[rows]],
            path=path,
        )
        share = right.mean(axis=1)
        interval = setup.interval(share)
        return {"precision": float(share.mean()), "interval": interval, "neighbors": _SHOWN, "figure": str(path)}

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        heading = f"of {figures['neighbors']} neighbors right"
        return {heading: Measure(figures["precision"], figures["interval"], "precision", pooling=pooling)}


def retrieval_sheet(
    queries: torch.Tensor, neighbors: torch.Tensor, right: np.ndarray, names: list[str], path: Path
) -> None:
    """
    Saves a contact sheet with a row for each query: the image, then its nearest neighbors, the nearest first,
    framed green where they are of its class, else red.

    Args:
        queries (`torch.Tensor` of shape `(N, C, H, W)`), neighbors (`(N, k, C, H, W)`): uint8.
        right (`np.ndarray` of shape `(N, k)`): Whether a neighbor is of the query's class.
        names (`list[str]`): The class of each query.
    """
    images = torch.cat([queries[:, None], neighbors], dim=1).float() / 255
    scale = max(1, round(120 / max(images.shape[-2:])))
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1).expand(-1, -1, 3, -1, -1)
    colors = torch.tensor([[0.85, 0.15, 0.15], [0.15, 0.65, 0.25]])[torch.from_numpy(right).long()]  # (N, k, 3)
    frames = torch.cat([torch.ones(len(queries), 1, 3), colors], dim=1)[..., None, None]
    border = max(2, images.shape[-1] // 30)

    def framed(x, width, color):
        inside = nn.functional.pad(torch.ones_like(x[:, :, :1]), (width,) * 4).bool()
        return torch.where(inside, nn.functional.pad(x, (width,) * 4), color)

    grid = framed(framed(images, border, frames), border, torch.ones(1))
    sheet = grid.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()
    width = 1.2 * images.shape[1]
    figure = Figure((width + 0.8, width * sheet.shape[0] / sheet.shape[1] + 0.4))
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest")
    rows, columns = sheet.shape[0] / len(images), sheet.shape[1] / images.shape[1]
    axis.xaxis.tick_top()
    axis.set_xticks([columns / 2, columns * (images.shape[1] + 1) / 2], ["query", "nearest training images"])
    axis.set_yticks([rows * (row + 0.5) for row in range(len(names))], [plain(name) for name in names])
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    save_figure(figure, path)
