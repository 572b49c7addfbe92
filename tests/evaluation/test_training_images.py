"""Images for fine-tuning: order, crops, mixing, RandAugment."""

import io
import math

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from colored_images import COLORS, NAMES, labeled_images
from PIL import Image, ImageEnhance, ImageOps
from transformers import (
    ViTImageProcessor,
)

from modeling_can.data.augmentations import OPERATIONS, RandAugment
from modeling_can.evaluation import training_images
from modeling_can.evaluation.preprocessors import Preprocessor, load_preprocessor
from modeling_can.evaluation.sets import Split
from modeling_can.evaluation.training_images import epochs, mix


def test_an_epoch_shows_every_image_once_but_those_of_the_last_incomplete_batch():
    steps = list(epochs(num_images=11, batch_size=4, num_epochs=3, seed=0))
    assert [epoch for epoch, _ in steps] == [0, 0, 1, 1, 2, 2] and all(len(rows) == 4 for _, rows in steps)
    seen = [np.concatenate([rows for epoch, rows in steps if epoch == e]).tolist() for e in range(3)]
    assert all(len(set(rows)) == 8 for rows in seen) and seen[0] != seen[1] != seen[2]
    again = list(epochs(11, 4, 3, seed=0))
    assert all((one == two).all() for (_, one), (_, two) in zip(steps, again, strict=True))


def test_crops_are_decoded_as_the_images_of_the_test():
    twelve_bits = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    file = io.BytesIO()
    Image.fromarray(twelve_bits).save(file, "PNG")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}] * 4})
    train = Split("dim", rows.cast_column("image", datasets.Image(decode=False)), np.zeros(4, int))
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, high_bit_depth="stretch")
    crops = list(
        training_images.crop_loader(train, Preprocessor(processor), training_images.Share(slice(4), 4, 4, 8, 0), 0, 0)
    )
    assert 110 < torch.cat(crops).float().mean() < 145


def test_crops_depend_on_seed_epoch_and_image(pretrained):
    """And are in the order of the steps, with workers as without."""
    train, preprocessor = labeled_images(12), load_preprocessor(pretrained("CAN"))

    def crops(seed=0, num_workers=0):
        share = training_images.Share(slice(2, 4), 12, 4, 2, 0)
        return torch.cat(list(training_images.crop_loader(train, preprocessor, share, seed, num_workers)))

    made, rows = crops(), np.concatenate([rows[2:4] for _, rows in epochs(12, 4, 2, 0)])
    assert made.shape == (12, 1, 3, 16, 16) and made.dtype == torch.uint8
    assert torch.equal(made, crops(num_workers=2)) and not torch.equal(made, crops(seed=1))
    twice = [np.flatnonzero(rows == row) for row in np.unique(rows) if (rows == row).sum() == 2]
    assert twice and all(not torch.equal(made[first], made[second]) for first, second in twice)
    for crop, row in zip(made, rows, strict=True):
        color = crop.float().mean((0, 2, 3))
        assert all(abs(color - torch.tensor(COLORS[NAMES[train.labels[row]]])) < 50)


def test_augmentation_flips_by_place_and_is_the_processor_otherwise(pretrained):
    preprocessor = load_preprocessor(pretrained("CAN"))
    augment = training_images.Augmentation(preprocessor, 64, seed=0, flip_probability=0.5)
    crops = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    made, plain = augment(crops, step=3, first=0), preprocessor.normalize(crops)
    flipped = (made == plain.flip(-1)).flatten(1).all(1)
    assert (flipped | (made == plain).flatten(1).all(1)).all() and 20 < flipped.sum() < 44
    torch.testing.assert_close(torch.cat([augment(crops[:24], 3, 0), augment(crops[24:], 3, 24)]), made)
    assert not torch.equal(augment(crops, step=4, first=0), made)
    never, always = (training_images.Augmentation(preprocessor, 64, 0, p)(crops, 3, 0) for p in (0.0, 1.0))
    assert torch.equal(never, plain) and torch.equal(always, plain.flip(-1))

    erased = (
        training_images.Augmentation(preprocessor, 64, 0, 0.0, random_erasing_probability=0.25)(crops, 3, 0) != plain
    )
    area = erased.any(1).float().mean((1, 2))
    assert 6 < (area > 0).sum() < 28 and area.max() < 0.5 and erased.float().mean() < 0.15


def black_and_white(num_pairs: int):
    """Pairs of a black and a white image, so that a pixel is the share of the white one."""
    images = torch.tensor([0.0, 1.0]).repeat(num_pairs)[:, None, None, None].expand(-1, 3, 20, 30)
    return images, torch.eye(2).repeat(num_pairs, 1)


@pytest.mark.parametrize(("alphas", "share_cut"), [((0.8, 0.0), 0), ((0.0, 1.0), 1), ((0.8, 1.0), 0.5)])
def test_targets_are_the_shares_of_the_pixels(alphas, share_cut):
    images, targets = black_and_white(200)
    mixed, shares = mix(images, targets, *alphas, seed=1)
    torch.testing.assert_close(shares.sum(1), torch.ones(400))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares[:, 1])  # of cutmix: the area that is left of the box
    torch.testing.assert_close(mixed[0::2] + mixed[1::2], torch.ones(200, 3, 20, 30))  # both ways alike
    cut = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert cut.float().mean().item() == pytest.approx(share_cut, abs=0.1)


def test_mixing_is_that_of_the_papers():
    images, targets = torch.rand(8, 3, 20, 30), torch.eye(8)
    mixed, shares = mix(images, targets, 0.8, 1.0, seed=5, step=3, first_pair=10)
    kinds = set()
    for pair in range(4):
        rng = np.random.default_rng((5, 3, training_images.MIXING, 10 + pair))
        is_cut = rng.random() < 0.5
        kept = rng.beta(1.0, 1.0) if is_cut else rng.beta(0.8, 0.8)
        for own, other in ((2 * pair, 2 * pair + 1), (2 * pair + 1, 2 * pair)):
            expected = images[own].clone()
            if is_cut:  # arXiv 1905.04899, eq. 2: r_w = W sqrt(1 - lambda), the center uniform
                if own % 2 == 0:
                    row, column = rng.integers(20), rng.integers(30)
                height, width = int(20 * math.sqrt(1 - kept)) // 2, int(30 * math.sqrt(1 - kept)) // 2
                area = 0
                for y in range(row - height, row + height):
                    for x in range(column - width, column + width):
                        if 0 <= y < 20 and 0 <= x < 30:
                            expected[:, y, x] = images[other, :, y, x]
                            area += 1
                share = 1 - area / 600
            else:  # arXiv 1710.09412, eq. 2
                share = kept
                expected = share * images[own] + (1 - share) * images[other]
            torch.testing.assert_close(mixed[own], expected)
            torch.testing.assert_close(shares[own], share * targets[own] + (1 - share) * targets[other])
        kinds.add(is_cut)
    assert kinds == {True, False}


def test_shares_are_drawn_from_beta():
    images, targets = black_and_white(500)
    _, shares = mix(images[:, :, :1, :1], targets, 0.3, 0.0)
    assert scipy.stats.kstest(shares[::2, 0].numpy(), scipy.stats.beta(0.3, 0.3).cdf).pvalue > 0.01


def test_pairs_are_mixed_alike_wherever_they_are():
    images, targets = torch.rand(8, 3, 6, 6), torch.eye(8)
    whole = mix(images, targets, 0.8, 1.0, seed=2, step=7)
    halves = [mix(images[i : i + 4], targets[i : i + 4], 0.8, 1.0, 2, 7, first_pair=i // 2) for i in (0, 4)]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(parts), rtol=0, atol=0)
    assert not torch.equal(whole[1], mix(images, targets, 0.8, 1.0, seed=2, step=8)[1])


def smooth_image() -> np.ndarray:
    """uint8 `(32, 40, 3)`, a few waves."""
    y, x = np.mgrid[:32, :40] / 10
    waves = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(2 * x) * np.cos(y)], axis=-1)
    return (127 + 90 * waves).astype(np.uint8)


def enhance(kind, direction: int):
    return lambda image: kind(image).enhance(1 + 0.9 * 0.8 * direction)


PILLOW = {  # at a level of 8, of 10
    ("auto_contrast", 1): ImageOps.autocontrast,
    ("equalize", 1): ImageOps.equalize,
    ("invert", 1): ImageOps.invert,
    ("posterize", 1): lambda image: ImageOps.posterize(image, 1),
    ("solarize", 1): lambda image: ImageOps.solarize(image, 51),
    ("solarize_add", 1): lambda image: image.point(lambda x: min(255, x + 88) if x < 128 else x),
    **{
        (name, direction): enhance(kind, direction)
        for direction in (-1, 1)
        for name, kind in {
            "color": ImageEnhance.Color,
            "contrast": ImageEnhance.Contrast,
            "brightness": ImageEnhance.Brightness,
            "sharpness": ImageEnhance.Sharpness,
        }.items()
    },
    ("rotate", 1): lambda image: image.rotate(24, Image.Resampling.BILINEAR, fillcolor=(0, 0, 0)),
    ("shear_x", 1): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0.24, -0.24 * 16, 0, 1, 0), Image.Resampling.BILINEAR
    ),
    ("shear_y", 1): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, 0.24, 1, -0.24 * 20), Image.Resampling.BILINEAR
    ),
    ("translate_x", 1): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0.36 * 40, 0, 1, 0), Image.Resampling.BILINEAR
    ),
    ("translate_y", 1): lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, 0.36 * 32), Image.Resampling.BILINEAR
    ),
}


def test_every_operation_of_randaugment_is_compared_with_pillow():
    assert {name for name, _ in PILLOW} == set(OPERATIONS)


@pytest.mark.parametrize(("name", "direction"), PILLOW)
def test_randaugment_does_what_pillow_does(name, direction):
    image = smooth_image()
    expected = np.asarray(PILLOW[name, direction](Image.fromarray(image)), dtype=np.float32)
    images = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(2, 1, 1, 1) / 255
    images[1] = 0.5
    made = OPERATIONS[name](images, torch.full((2, 1, 1, 1), 0.8 * direction), torch.zeros(3, 1, 1))
    off = np.abs(255 * made[0].permute(1, 2, 0).numpy() - expected)
    # Pillow rounds to whole levels at every step, and is off by up to half a pixel at the border of what it warps.
    assert np.quantile(off, 0.9) <= 2.0 and off.mean() < 2.0, (name, off.mean(), off.max())


def test_randaugment_draws_for_each_image():
    randaugment, rng = RandAugment(9.0, (0.5, 0.5, 0.5)), np.random.default_rng(0)
    operations, levels = randaugment.draw(3000, rng)
    assert (operations == -1).mean() == pytest.approx(0.5, abs=0.03)
    counts = np.bincount(operations[operations >= 0], minlength=15) / (operations >= 0).sum()
    np.testing.assert_allclose(counts, 1 / 15, atol=0.015)
    assert np.abs(levels).mean() == pytest.approx(0.9, abs=0.01) and np.abs(levels).std() < 0.06
    assert (levels > 0).mean() == pytest.approx(0.5, abs=0.03)

    images = torch.rand(6, 3, 16, 16)
    before, names = images.clone(), list(randaugment.operations)
    chosen = np.array([[-1, -1], [names.index("invert"), -1], [-1, names.index("brightness")], [5, 9], [2, 3], [0, 1]])
    levels = levels[:6]
    made = randaugment(images, chosen, levels)
    assert torch.equal(images, before) and torch.equal(made[0], images[0])
    torch.testing.assert_close(made[1], 1 - images[1])
    torch.testing.assert_close(made[2], (images[2] * (1 + 0.9 * levels[2, 1])).clamp(0, 1))
    alone = [randaugment(images[i : i + 1], chosen[i : i + 1], levels[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(made, torch.cat(alone))
