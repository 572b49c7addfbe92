"""Sheets of images: what is drawn is what was computed."""

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from modeling_can import plots
from modeling_can.plots import curves, feature_sheet, principal_components


def test_components_are_those_of_scikit_learn_over_all_images():
    torch.manual_seed(0)
    tokens = torch.randn(5, 12, 4, 6) * torch.linspace(3, 1, 12)[:, None, None]  # distinct variances
    rows = tokens.permute(0, 2, 3, 1).reshape(-1, 12).numpy()
    expected = PCA(3).fit(rows)
    directions = expected.components_
    signs = np.sign(directions[range(3), np.abs(directions).argmax(axis=1)])
    expected = expected.transform(rows) * signs
    low, high = np.percentile(expected, (1, 99), axis=0)
    expected = ((expected - low) / (high - low)).clip(0, 1).reshape(5, 4, 6, 3)
    made = principal_components(tokens)
    assert made.shape == (5, 3, 4, 6)
    np.testing.assert_allclose(made.permute(0, 2, 3, 1), expected, atol=1e-4)


def test_components_that_are_not_there_are_dark():
    torch.manual_seed(0)
    line = torch.randn(4, 1, 3, 3) * torch.randn(1, 8, 1, 1)  # along one direction
    made = principal_components(line)
    assert made[:, 0].amax() == 1 and made[:, 1:].abs().max() < 0.01
    assert not principal_components(torch.ones(4, 8, 3, 3)).any()
    assert principal_components(torch.full((4, 8, 3, 3), torch.nan)).isfinite().all()


def test_the_sheet_shows_image_components_and_attention_side_by_side(tmp_path):
    torch.manual_seed(0)
    images, tokens = torch.rand(2, 1, 8, 8), torch.randn(2, 6, 2, 2)  # gray, with four patches
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]] * 2)
    for name, attentions in (("with", attention), ("without", None)):
        feature_sheet(images, tokens, attentions, tmp_path / f"{name}.png")
    pixels = np.asarray(Image.open(tmp_path / "with.png").convert("RGB")).astype(int)
    columns = pixels.shape[1] // 3
    left, middle, right = (pixels[:, i * columns : (i + 1) * columns] for i in range(3))
    assert (left.max(-1) == left.min(-1)).all() and (right.max(-1) == right.min(-1)).all()  # gray
    assert (middle.max(-1) - middle.min(-1)).max() > 50
    shades = np.unique(right[pixels.shape[0] // 2 + 40 :].reshape(-1, 3), axis=0, return_counts=True)
    frequent = sorted(shades[0][shades[1] > 1000][:, 0])
    np.testing.assert_allclose(frequent, [0, 85, 170, 255], atol=1)  # black the least attended patch, white the most
    assert Image.open(tmp_path / "without.png").width < 0.7 * pixels.shape[1]


def test_curves_of_one_line_show_points(tmp_path, monkeypatch):
    figures, draw = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or draw(figure, path))
    for number in (1, 2):
        curves([{"step": step, "loss": 0.5} for step in range(number)], tmp_path / "curves.png")
    one, two = (figure.axes[0].lines[0].get_marker() for figure in figures)
    assert one == "." and two in ("", "None")
