"""Many linear heads in one pass, and fine-tuning, on pictures of a few colours."""

import functools
import io
import logging
import math
import os
import sys

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from accelerate import Accelerator
from conftest import free_port
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    pipeline,
)

from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining
from modeling_can.data.augmentations import OPERATIONS, RandAugment
from modeling_can.data.crops import RandomCrops
from modeling_can.evaluation import classifier, finetuning, linear_sgd, training_images
from modeling_can.evaluation.classifier import class_predictions, layer_groups
from modeling_can.evaluation.encoders import Preprocessor, load_encoder, load_preprocessor
from modeling_can.evaluation.features import Extractor, Processes
from modeling_can.evaluation.finetuning import FineTuning, finetune
from modeling_can.evaluation.linear_sgd import Heads, linear_probe_sgd, train_step
from modeling_can.evaluation.sets import Split, hold_out
from modeling_can.evaluation.training_images import epochs, mix


COLOURS = {"red": (220, 60, 60), "green": (60, 220, 60), "blue": (60, 60, 220), "grey": (120, 120, 120)}
NAMES = list(COLOURS)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
             patch_size=8)  # fmt: skip
PRETRAINED = {
    "CAN": lambda: CANForPreTraining(CANConfig(**SMALL)),
    "ViT": lambda: ViTModel(ViTConfig(**SMALL)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "ViT-MAE": lambda: ViTMAEForPreTraining(ViTMAEConfig(**SMALL)),
}
# Short, and with few augmentations: what is learnt here is the colour.
QUICK = FineTuning(
    num_epochs=8,
    batch_size=16,
    base_learning_rate=0.1,
    layer_decay=0.9,
    drop_path_rate=0.0,
    randaugment_magnitude=0.0,
    random_erasing_probability=0.0,
    mixup_alpha=0.2,
    cutmix_alpha=0.0,
)


def pictures(num_images: int, seed: int = 0, names=NAMES, channels: int = 3) -> Split:
    """Noise around a colour, the label."""
    rng, encoded = np.random.default_rng(seed), []
    labels = np.arange(num_images) % len(names)
    for label in labels:
        noisy = np.clip(rng.normal(COLOURS[names[label]], 60, (20, 24, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy if channels == 3 else noisy[:, :, 0]).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    rows = datasets.Dataset.from_dict({"image": encoded}).cast_column("image", datasets.Image(decode=False))
    return Split("colours", rows, labels)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder for each kind of encoder."""

    @functools.cache
    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        PRETRAINED[kind]().save_pretrained(folder)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        return str(folder)

    return make


def tune(name: str, output_dir, recipe=QUICK, train=None, size=None, **options):
    train = pictures(64) if train is None else train
    return finetune(
        name, train, NAMES, load_preprocessor(name, size), Accelerator(cpu=True), output_dir, recipe, **options
    )


# --- Order, mixing, augmentation -------------------------------------------------------------------------------------


def test_an_epoch_shows_every_image_once_but_those_of_the_last_incomplete_batch():
    steps = list(epochs(num_images=11, batch_size=4, num_epochs=3, seed=0))
    assert [epoch for epoch, _ in steps] == [0, 0, 1, 1, 2, 2] and all(len(rows) == 4 for _, rows in steps)
    seen = [np.concatenate([rows for epoch, rows in steps if epoch == e]).tolist() for e in range(3)]
    assert all(len(set(rows)) == 8 for rows in seen) and seen[0] != seen[1] != seen[2]
    again = list(epochs(11, 4, 3, seed=0))
    assert all((one == two).all() for (_, one), (_, two) in zip(steps, again, strict=True))


def test_crops_are_decoded_as_the_pictures_of_the_test():
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
    train, preprocessor = pictures(12), load_preprocessor(pretrained("CAN"))

    def crops(seed=0, num_workers=0):
        share = training_images.Share(slice(2, 4), 12, 4, 2, 0)
        return torch.cat(list(training_images.crop_loader(train, preprocessor, share, seed, num_workers)))

    made, rows = crops(), np.concatenate([rows[2:4] for _, rows in epochs(12, 4, 2, 0)])
    assert made.shape == (12, 1, 3, 16, 16) and made.dtype == torch.uint8
    assert torch.equal(made, crops(num_workers=2)) and not torch.equal(made, crops(seed=1))
    twice = [np.flatnonzero(rows == row) for row in np.unique(rows) if (rows == row).sum() == 2]
    assert twice and all(not torch.equal(made[first], made[second]) for first, second in twice)
    for crop, row in zip(made, rows, strict=True):
        colour = crop.float().mean((0, 2, 3))
        assert all(abs(colour - torch.tensor(COLOURS[NAMES[train.labels[row]]])) < 50)


def test_augmentation_flips_by_place_and_is_the_processor_otherwise(pretrained):
    preprocessor = load_preprocessor(pretrained("CAN"))
    augment = training_images.Augmentation(preprocessor, 64, seed=0, flip_probability=0.5)
    crops = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    made, plain = augment(crops, step=3, first=0), preprocessor.normalise(crops)
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
    """Pairs of a black and a white picture, so that a pixel is the share of the white one."""
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
            if is_cut:  # arXiv 1905.04899, eq. 2: r_w = W sqrt(1 - lambda), the centre uniform
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


def smooth_picture() -> np.ndarray:
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
    picture = smooth_picture()
    expected = np.asarray(PILLOW[name, direction](Image.fromarray(picture)), dtype=np.float32)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].repeat(2, 1, 1, 1) / 255
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


# --- Parameters ------------------------------------------------------------------------------------------------------


DEPTH = 4
CLASSIFIERS = {
    "CAN": lambda: CANForImageClassification(CANConfig(**{**SMALL, "num_hidden_layers": DEPTH})),
    "ViT and ViT-MAE": lambda: ViTForImageClassification(ViTConfig(**{**SMALL, "num_hidden_layers": DEPTH})),
    "DINOv2": lambda: Dinov2ForImageClassification(Dinov2Config(**{**SMALL, "num_hidden_layers": DEPTH})),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_layers_learn_at_the_rates_of_the_formula(kind):
    model = CLASSIFIERS[kind]()
    groups = layer_groups(model, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, *_ in found) == sorted(names.values())  # each exactly once
    parameters = dict(model.named_parameters())
    for name, scale, decay in found:
        expected = {f".{layer}.": 0.5 ** (DEPTH - layer) for layer in range(DEPTH)}
        layer = next((key for key in expected if key in name and "layer" in name.split(key)[0]), None)
        if layer is None:
            assert ("embeddings" in name) != name.startswith("classifier") or "layernorm" in name
        assert scale == expected.get(layer, 0.5 ** (DEPTH + 1) if "embeddings" in name else 1.0), name
        plain = parameters[name].ndim == 1 or any(x in name for x in ("cls_token", "mask_token", "position"))
        assert decay == (0.0 if plain else 0.05), name
    assert len({scale for _, scale, _ in found}) == DEPTH + 2


def test_layer_decay_needs_numbered_layers():
    model = ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 2, 1, 1], image_size=32)
    )
    with pytest.raises(ValueError, match="layer_decay=0.65 needs layers.* use layer_decay=1"):
        layer_groups(model, 0.05, 0.65)
    groups = layer_groups(model, 0.05, 1.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in groups} == {1.0}


# --- Fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("CAN", (16, 24)), ("ViT", (24, 16)), ("DINOv2", None), ("ViT-MAE", None)])
def test_fine_tuning_learns_and_leaves_a_model_that_others_load(pretrained, tmp_path, kind, size):
    """At the encoder's own size, and at another one."""
    name, folder, test = pretrained(kind), tmp_path / "tuned", pictures(40, seed=1)
    preprocessor = load_preprocessor(name, size)
    torch.manual_seed(0)
    before = classifier.new_classifier(name, NAMES, preprocessor.image_size)
    untrained = (class_predictions(before.eval(), preprocessor, test) == test.labels).mean()
    model, facts = tune(name, folder, size=size)
    predictions = class_predictions(model, preprocessor, test)
    assert untrained < 0.6 and (predictions == test.labels).mean() > 0.9
    assert facts["num_steps"] == 32 and facts["batch_size"] == 16
    assert facts["learning_rate"] == pytest.approx(0.1 * 16 / 256)

    start = before.state_dict()
    for parameter, value in model.named_parameters():
        moved = not torch.equal(value, start[parameter])
        assert moved != parameter.endswith("mask_token"), parameter  # which DINOv2 uses in pre-training alone
        assert value.requires_grad == moved, parameter  # DDP waits for what could move
    assert before.classifier.weight.std() < 3e-5 and not before.classifier.bias.any()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]
    classify = pipeline("image-classification", model=str(folder))
    images = [Image.open(io.BytesIO(test.read(row))) for row in range(40)]
    labels = [answers[0]["label"] for answers in classify(images)]
    assert labels == [NAMES[label] for label in predictions]
    saved = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = torch.rand(2, 3, *preprocessor.image_size)
    torch.testing.assert_close(saved(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    assert saved.config.label2id == {label: i for i, label in enumerate(NAMES)}
    encoder = load_encoder(str(folder))
    features = encoder(pixels)["mean"]
    assert encoder.preprocessor.image_size == preprocessor.image_size
    if kind == "CAN":  # whose head is on the mean of the patches
        torch.testing.assert_close(model.classifier(features), model(pixels).logits)


def test_every_layer_moves_at_its_own_rate(pretrained, tmp_path):
    """The first step of Adam is the learning rate itself, whatever the gradient."""
    name = pretrained("CAN")
    recipe = FineTuning(num_epochs=1, batch_size=64, base_learning_rate=0.04, layer_decay=0.1, weight_decay=0.0,
                        warmup_ratio=0.0, drop_path_rate=0.0)  # fmt: skip
    model, _ = tune(name, tmp_path / "tuned", recipe)
    torch.manual_seed(0)
    before = classifier.new_classifier(name, NAMES, (16, 16)).state_dict()
    moved = {key: (value - before[key]).abs().max().item() for key, value in model.state_dict().items()}
    powers = {
        "can.embeddings.patch_embeddings.bias": 3,
        "can.layers.0.mlp.fc1.weight": 2,
        "can.layers.1.mlp.fc1.weight": 1,
        "can.layernorm.weight": 0,
        "classifier.weight": 0,
    }
    for part, power in powers.items():
        assert moved[part] == pytest.approx(0.04 / 4 * 0.1**power, rel=0.05), part


def test_a_run_is_what_a_plain_loop_makes_of_it(pretrained, tmp_path):
    """Every step on all images, so that only the crops differ; nothing is shared with the trainer but the crops."""
    name, train = pretrained("CAN"), pictures(32)
    preprocessor = load_preprocessor(name)
    recipe = FineTuning(num_epochs=4, batch_size=32, base_learning_rate=0.08, layer_decay=1, weight_decay=0.3,
                        warmup_ratio=0.25, label_smoothing=0.2, drop_path_rate=0.0, mixup_alpha=0, cutmix_alpha=0,
                        flip_probability=0, randaugment_magnitude=0, random_erasing_probability=0)  # fmt: skip
    model, facts = tune(name, tmp_path / "tuned", recipe, train)
    torch.manual_seed(0)
    plain = classifier.new_classifier(name, NAMES, (16, 16))
    matrices, others = [], []
    for key, parameter in plain.named_parameters():
        (matrices if key.endswith("weight") and "norm" not in key else others).append(parameter)
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0}])
    view = RandomCrops((16, 16), scale=(0.08, 1), num_views=1)
    target = 0.8 * torch.eye(4)[torch.from_numpy(train.labels)] + 0.2 / 4
    losses = []
    for step, rate in enumerate([0.005, 0.01, 0.0075, 0.0025]):  # 0.08 * 32 / 256, warmed up and down again
        pixels = torch.cat([view(train.read(row), epoch=step) for row in range(32)])
        loss = -(target * plain(preprocessor.normalise(pixels)).logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert facts["num_steps"] == 4 and facts["final_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    for (key, value), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not key.endswith("k_proj.bias"):  # see below
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=key)


def test_another_size_leaves_the_function_as_it_was(pretrained):
    for kind in ("CAN", "ViT"):
        name = pretrained(kind)
        torch.manual_seed(0)
        at_home = classifier.new_classifier(name, NAMES, (16, 16)).eval()
        resized = classifier.at_size(at_home, (24, 32)).eval()
        pixels = torch.rand(2, 3, 24, 32)
        expected = at_home(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(resized(pixels).logits, expected)


def test_the_whole_recipe_runs_also_on_grey_pictures(tmp_path, caplog):
    name = str(tmp_path / "grey")
    CANForPreTraining(CANConfig(**SMALL, num_channels=1)).save_pretrained(name)
    ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(name)
    train, recipe = pictures(24, channels=1), FineTuning(num_epochs=2, batch_size=1024)
    with caplog.at_level(logging.WARNING):
        first = tune(name, tmp_path / "one", recipe, train)
    assert "RandAugment leaves out colour" in caplog.text
    assert "a step takes 24 images: there are no more than 24 to train on" in caplog.text
    second = tune(name, tmp_path / "two", recipe, train)
    other = tune(name, tmp_path / "three", recipe, train, seed=1)
    assert first.facts["final_loss"] == second.facts["final_loss"] != other.facts["final_loss"]  # reproducible
    assert math.isfinite(first.facts["final_loss"])


def test_fine_tuning_leaves_random_numbers_alone(pretrained, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(pretrained("CAN"), tmp_path / "tuned", FineTuning(num_epochs=1, batch_size=64))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_picture_half_of_a_pair_is_fine_tuned(tmp_path, rank):
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = SiglipConfig(text_config={**text, "vocab_size": 9}, vision_config=SMALL)
    SiglipModel(config).save_pretrained(tmp_path / "pair")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "pair")
    recipe = FineTuning(**{**vars(QUICK), "num_epochs": 1, "lora_rank": rank, "layer_decay": None})
    model, _ = tune(str(tmp_path / "pair"), tmp_path / "tuned", recipe)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    pixels = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    with pytest.raises(
        ValueError, match=r"made for \(16, 16\) cannot be fine-tuned at \(32, 32\); use --image_size 16"
    ):
        classifier.new_classifier(str(tmp_path / "pair"), NAMES, (32, 32))


def test_lora_trains_adapters_and_head_and_is_merged(pretrained, tmp_path, monkeypatch):
    from peft import PeftModel

    name, folder, kept = pretrained("CAN"), tmp_path / "tuned", {}
    save = finetuning.save

    def look(model, *arguments):
        kept["trained"] = {n for n, p in model.named_parameters() if p.requires_grad}
        kept["pixels"] = torch.rand(3, 3, 16, 16)
        kept["logits"] = model(pixel_values=kept["pixels"]).logits.detach()
        kept["weights"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        return save(model, *arguments)

    monkeypatch.setattr(finetuning, "save", look)
    recipe = FineTuning(**{**vars(QUICK), "lora_rank": 4, "base_learning_rate": 0.2, "layer_decay": None})
    model, facts = tune(name, folder, recipe)
    assert kept["trained"] and all("lora_" in n or "classifier.modules_to_save" in n for n in kept["trained"])
    start = CANForPreTraining.from_pretrained(name).can.state_dict()
    for parameter, value in kept["weights"].items():
        if parameter in kept["trained"]:
            assert "lora_B" not in parameter or value.any(), parameter  # they begin at zero
        elif "original_module" not in parameter:
            there = parameter.removeprefix("base_model.model.can.").replace(".base_layer", "")
            torch.testing.assert_close(value, start[there], rtol=0, atol=0)
    linear = [m for m in CANForPreTraining.from_pretrained(name).can.modules() if isinstance(m, nn.Linear)]
    assert sum("lora_A" in n for n in kept["trained"]) == len(linear)
    head = model.classifier.weight.numel() + model.classifier.bias.numel()
    assert facts["num_trained_parameters"] == head + sum(4 * (m.in_features + m.out_features) for m in linear)

    logits = kept["logits"]
    assert not any("lora" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(model(kept["pixels"]).logits, logits, rtol=1e-4, atol=1e-5)
    saved = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(saved(kept["pixels"]).logits, logits, rtol=1e-4, atol=1e-5)
    fresh = classifier.new_classifier(name, NAMES, (16, 16))
    assert sorted(path.suffix for path in (folder / "adapter").iterdir()) == [".json", ".safetensors"]
    adapted = PeftModel.from_pretrained(fresh, folder / "adapter").eval()
    torch.testing.assert_close(adapted(pixel_values=kept["pixels"]).logits, logits, rtol=1e-4, atol=1e-5)
    test = pictures(40, seed=1)
    assert (class_predictions(model, load_preprocessor(str(folder)), test) == test.labels).mean() > 0.9


# --- Many heads ------------------------------------------------------------------------------------------------------


def test_heads_in_one_pass_are_those_trained_one_at_a_time():
    widths, rates, classes = [5, 8], [0.03, 0.3, 1.0], 3
    heads = Heads(widths, len(rates), classes).train()
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=0.9)
    alone = [[nn.Linear(width, classes) for _ in rates] for width in widths]
    norms = [nn.BatchNorm1d(width, eps=1e-6, affine=False) for width in widths]
    optimizers = [[torch.optim.SGD(h.parameters(), lr=0.0, momentum=0.9) for h in group] for group in alone]
    for head in sum(alone, []):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    for step in range(20):
        torch.manual_seed(step)
        features, labels = [3 + 2 * torch.randn(16, width) for width in widths], torch.randint(classes, (16,))
        rate = 0.5 * (1 + math.cos(step / 20 * math.pi))
        train_step(heads, optimizer, features, labels, torch.tensor(rates).repeat(2), rate)
        for x, norm, group, sgds in zip(features, norms, alone, optimizers, strict=True):
            normal = norm(x)
            for head, sgd, base in zip(group, sgds, rates, strict=True):
                sgd.param_groups[0]["lr"] = base * rate
                sgd.zero_grad()
                nn.functional.cross_entropy(head(normal), labels).backward()
                sgd.step()
    for group, weight, bias in zip(alone, heads.weights, heads.biases, strict=True):
        torch.testing.assert_close(torch.stack([head.weight for head in group]), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.stack([head.bias for head in group]), bias, rtol=1e-5, atol=1e-6)
    features = [torch.randn(4, width) for width in widths]
    expected = [h(norm.eval()(x)) for x, norm, g in zip(features, norms, alone, strict=True) for h in g]
    torch.testing.assert_close(heads.eval()(features), torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def probe(pretrained):
    encoder, train = load_encoder(pretrained("ViT")), pictures(80)
    before = encoder.digest()
    probe = linear_probe_sgd(encoder, train, 4, num_epochs=3, batch_size=16)
    assert encoder.digest() == before
    return probe


def test_the_probe_learns_with_heads_for_every_layer_pooling_and_rate(probe):
    kinds = {(row["layers"], row["pooling"]) for row in probe.table}
    assert kinds == {(n, pooling) for n in (1, 2) for pooling in ("mean", "cls", "both")}  # it has two blocks
    assert len(probe.table) == 6 * len(linear_sgd.BASE_LEARNING_RATES)
    held_out = [row["held_out_accuracy"] for row in probe.table]
    assert held_out[probe.chosen] == max(held_out) > min(held_out)
    test = pictures(40, seed=1)
    assert (probe.predict(test) == test.labels).mean() > 0.8


def test_the_heads_are_trained_as_they_say(pretrained, monkeypatch):
    rates, seen, step = (0.1, 1e-9), [], linear_sgd.train_step
    monkeypatch.setattr(linear_sgd, "train_step", lambda **options: seen.append(options) or step(**options))
    probe = linear_probe_sgd(
        load_encoder(pretrained("CAN")), pictures(40), 4, 3, batch_size=16, base_learning_rates=rates, layers=(1,)
    )
    defaults = seen[0]["optimizer"].defaults
    assert (defaults["momentum"], defaults["weight_decay"], defaults["nesterov"]) == (0.9, 0, False)
    num_steps = 3 * (36 // 16)
    expected = [16 / 256 * (1 + math.cos(math.pi * i / num_steps)) / 2 for i in range(num_steps)]
    assert [options["rate"] for options in seen] == pytest.approx(expected)
    for weight in probe.heads.weights:  # of each representation
        assert weight[0].abs().max() > 1e-3 and weight[1].abs().max() < 1e-8
    assert [row["base_learning_rate"] for row in probe.table] == [0.1, 1e-9] * 3


def test_representations_are_those_of_the_encoder(probe):
    encoder, pixels = probe.represent.encoder, torch.rand(3, 3, 16, 16)
    for (number, pooling), made in zip(probe.represent.kinds, probe.represent(pixels), strict=True):
        alone = encoder(pixels, number)
        expected = torch.cat([alone["cls"], alone["mean"]], 1) if pooling == "both" else alone[pooling]
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_the_test_set_has_no_say_in_the_choice(probe):
    """Labels planted so that another head is right on all test images: it is not the one that answers."""
    test = pictures(40, seed=2)
    everything = linear_sgd.head_predictions(probe.heads, probe.represent, test)
    worst = min(range(len(probe.table)), key=lambda head: probe.table[head]["held_out_accuracy"])
    test.labels = everything[:, worst]
    best_by_test = (everything == test.labels[:, None]).mean(axis=0).argmax()
    assert best_by_test != probe.chosen
    predictions = probe.predict(test)
    assert (predictions == everything[:, probe.chosen]).all() and (predictions == test.labels).mean() < 1


def test_the_probe_is_chosen_on_images_that_it_was_not_trained_on(pretrained, monkeypatch):
    """Labels without any meaning can be learnt by heart, and held-out ones cannot be guessed."""
    train = pictures(120)
    train.labels = np.random.default_rng(0).permutation(train.labels)
    seen, make = [], linear_sgd.crop_loader
    monkeypatch.setattr(
        linear_sgd, "crop_loader", lambda part, *rest, **options: seen.append(part) or make(part, *rest, **options)
    )
    probe = linear_probe_sgd(load_encoder(pretrained("CAN")), train, 4, num_epochs=1, batch_size=32)
    held_out, fit = hold_out(train.labels, 0.1, 0)
    assert len(held_out) == 12 and len(seen[0]) == 108
    fitted = {seen[0].read(row) for row in range(len(seen[0]))}
    assert fitted.isdisjoint(train.read(row) for row in held_out)
    assert max(row["held_out_accuracy"] for row in probe.table) < 0.8


# --- Processes -------------------------------------------------------------------------------------------------------


EXACT = FineTuning(
    num_epochs=2,
    batch_size=16,
    base_learning_rate=0.05,
    drop_path_rate=0.0,
    flip_probability=0.5,
    random_erasing_probability=0.0,
)  # fmt: skip  crops, flips, RandAugment, mixup and cutmix are on


def both_tasks(rank, world_size, name, folder, port=None):
    """Weights and figures of fine-tuning and of the probe, on this one of the processes."""
    if port is not None:  # for accelerate, which meets a group that is there
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}  # fmt: skip
        os.environ.update({key: str(value) for key, value in place.items()})
    accelerator, train = Accelerator(cpu=True), pictures(70)
    assert accelerator.num_processes == world_size
    answers, seeds, clean = {}, [], finetuning.mix
    finetuning.mix = lambda **options: seeds.append(torch.initial_seed()) or clean(**options)
    for parts in (1, 2):
        recipe = FineTuning(**{**vars(EXACT), "gradient_accumulation_steps": parts})
        model, facts = finetune(
            name, train, NAMES, load_preprocessor(name), accelerator, f"{folder}-{world_size}-{parts}", recipe
        )
        weights = {key: value.numpy() for key, value in model.state_dict().items()}
        answers[f"fine-tuned in {parts}"] = facts["final_loss"], weights
    gather_object = list if world_size == 1 else accelerate_gather
    finetuning.mix, answers["seeds"] = clean, seeds
    probe = linear_probe_sgd(
        load_encoder(name), train, 4, num_epochs=2, batch_size=16,
        processes=Processes(rank, world_size, gather_object), gather=accelerator.gather,
    )  # fmt: skip
    weights = {key: value.detach().numpy() for key, value in probe.heads.state_dict().items()}
    processes = Processes(rank, world_size, gather_object)
    predictions = probe.predict(pictures(30, seed=1), Extractor(batch_size=8, processes=processes))
    answers["probe"] = probe.table[probe.chosen]["held_out_accuracy"], weights
    assert (predictions is None) == (rank > 0)
    answers["predictions"] = predictions
    return answers


def accelerate_gather(items: list) -> list:
    from accelerate.utils import gather_object

    return gather_object(items)


def test_two_processes_do_what_one_does(run_processes, pretrained, tmp_path):
    name = pretrained("CAN")
    (one,) = (both_tasks(0, 1, name, tmp_path / "tuned"),)
    two = run_processes(both_tasks, 2, name, tmp_path / "tuned", free_port())
    start = CANForPreTraining.from_pretrained(name).can.layernorm.weight
    assert not np.allclose(one["fine-tuned in 1"][1]["can.layernorm.weight"], start.detach().numpy(), atol=1e-3)
    for task in ("fine-tuned in 1", "fine-tuned in 2", "probe"):
        loss, weights = one["fine-tuned in 1" if task != "probe" else "probe"]
        for other_loss, other_weights in (one[task], *(answers[task] for answers in two)):
            assert other_loss == pytest.approx(loss, abs=1e-5), task
            for key, value in weights.items():
                # What is added to all keys changes no attention: its gradient is rounding, which AdamW makes steps of.
                atol = 1e-3 if key.endswith("k_proj.bias") else 1e-5
                np.testing.assert_allclose(other_weights[key], value, atol=atol, err_msg=f"{task} {key}")
    np.testing.assert_array_equal(two[0]["predictions"], one["predictions"])
    seeds = [answers["seeds"][:8] for answers in two]  # of what each process draws for itself, one a step
    assert len(set(seeds[0] + seeds[1])) == 16 and one["seeds"][:8] == seeds[0]


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_epochs": 0}, "num_epochs=0 must be finite and greater than 0"),
        ({"base_learning_rate": math.inf}, "base_learning_rate=inf must be finite"),
        ({"mixup_alpha": -1.0}, "mixup_alpha=-1.0 must be finite and at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 is outside \[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate=-0.1 is outside \[0, 1\)"),
        ({"flip_probability": 1.5}, r"flip_probability=1.5 is outside \[0, 1\]"),
        ({"warmup_ratio": 2.0}, r"warmup_ratio=2.0 is outside \[0, 1\]"),
        ({"randaugment_magnitude": 11.0}, "randaugment_magnitude=11.0 is outside"),
        ({"layer_decay": 1.1}, "layer_decay=1.1 is above 1"),
        ({"layer_decay": 0.9, "lora_rank": 4}, "layer_decay=0.9 with lora_rank=4"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(**changes)


def test_what_is_left_open_follows_the_method():
    assert (FineTuning().base_learning_rate, FineTuning().layer_decay) == (5e-4, 0.65)
    assert FineTuning(lora_rank=8).layer_decay == 1


def test_fine_tuning_refuses_what_cannot_be(pretrained, tmp_path, monkeypatch):
    name = pretrained("CAN")
    with pytest.raises(ValueError, match="batch_size=15 is not a multiple of 2 .*processes x .*in pairs.*; use 16"):
        tune(name, tmp_path / "tuned", FineTuning(batch_size=15))
    with pytest.raises(ValueError, match="1 images to train on are fewer than a step needs, 2"):
        tune(name, tmp_path / "tuned", QUICK, train=pictures(1))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").touch()
    with pytest.raises(ValueError, match="there is not empty; give a new folder"):
        tune(name, tmp_path / "there")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank=4 needs peft: pip install -e \"\.\[lora\]\" -c constraints.txt"):
        tune(name, tmp_path / "tuned", FineTuning(lora_rank=4))
    assert not (tmp_path / "tuned").exists()


def test_a_processor_of_another_kind_is_refused(pretrained, tmp_path):
    preprocessor = load_preprocessor(pretrained("CAN"))
    preprocessor.in_two_steps = False
    with pytest.raises(ValueError, match="does more than resize, crop, rescale and normalise"):
        finetune(pretrained("CAN"), pictures(8), NAMES, preprocessor, Accelerator(cpu=True), tmp_path / "x", QUICK)


def test_the_probe_refuses_sets_of_which_nothing_can_be_held_out(pretrained):
    with pytest.raises(ValueError, match="no class has the 6 images"):
        linear_probe_sgd(load_encoder(pretrained("CAN")), pictures(20), 4)


def test_a_gradient_that_is_not_finite_stops_before_the_update(pretrained, tmp_path, monkeypatch):
    """Nothing is saved, and the weights are those of the step before."""
    kept, clean = [], finetuning.mix

    def poisoned(images, step, **options):
        kept.append([p.detach().clone() for p in spied[0].parameters()])
        return clean(images * (math.nan if step == 3 else 1), step=step, **options)

    spied, make = [], finetuning.new_classifier
    monkeypatch.setattr(finetuning, "new_classifier", lambda **options: spied.append(make(**options)) or spied[0])
    monkeypatch.setattr(finetuning, "mix", poisoned)
    monkeypatch.setattr(finetuning, "LOG_STEPS", 4)
    with pytest.raises(FloatingPointError, match="gradient of step 3 was not finite.*of the images in rows"):
        tune(pretrained("CAN"), tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists() and len(kept) == 4
    moved = [not torch.equal(one, two) for one, two in zip(kept[2], kept[3], strict=True)]
    assert any(moved)
    assert all(torch.equal(one, two) for one, two in zip(kept[3], spied[0].parameters(), strict=True))
