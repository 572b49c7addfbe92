"""
Augmentation in batch: each operation is kornia's, all together are kornia's one after the other, and what is drawn
follows its distributions. kornia is a dependency of the tests only.
"""

import math

import numpy as np
import pytest
import torch
from kornia import enhance
from kornia.augmentation import RandomErasing
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from PIL import Image
from scipy.stats import chisquare, ks_2samp
from testing_utils import OFF
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_can.data import ImageSource, ViewStream, augmentations, mean_and_std
from modeling_can.data.augmentations import Augmentation, blur_with_convolutions, blur_with_products, random_boxes
from modeling_can.data.crops import RandomCrops


ALL_ON = dict(
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_probability=0.7,
    grayscale_probability=0.3,
    blur_kernel_size=7,
    solarize_probability=0.4,
)
ALL_ORIENTATIONS = dict(flip_probability=0.5, vertical_flip_probability=0.5, quarter_turn_probability=0.5)
# fp32 rounds by 6e-8; the hue is computed in another way, over some ten operations of numbers up to 6
CLOSE = dict(rtol=0, atol=1e-5)


def awkward_images(height=12, width=17) -> torch.Tensor:
    """Random ones, and all where a formula could divide by zero or meet two largest channels."""
    torch.manual_seed(0)
    images = torch.rand(12, 3, height, width)
    images[0], images[1] = 0, 1
    images[2] = images[2, :1]  # gray
    images[3] = (images[3] > 0.5).float()  # saturated, black and white
    images[4] = (255 * images[4]).round() / 255
    images[5, 0], images[6, 1], images[7, 2] = images[5, 1], images[6, 2], images[7, 0]  # two channels alike
    images[8] = images[8, :1] + 1e-7 * torch.randn(3, height, width)  # nearly gray
    images[9] *= 1e-6  # nearly black
    return images.clamp(0, 1)


ADJUSTMENTS = {
    "brightness": (enhance.adjust_brightness_accumulative, (0, 2)),
    "contrast": (enhance.adjust_contrast_with_mean_subtraction, (0, 2)),
    "saturation": (enhance.adjust_saturation_with_gray_subtraction, (0, 2)),
    "hue": (lambda images, turns: enhance.adjust_hue(images, 2 * math.pi * turns), (-0.5, 0.5)),
}


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_adjustments_are_those_of_kornia(name):
    theirs, (low, high) = ADJUSTMENTS[name]
    images = awkward_images()
    before = images.clone()
    for share in (0.0, 0.2, 0.5, 0.9, 1.0, None):
        factor = low + (high - low) * (torch.rand(len(images)) if share is None else torch.full((12,), share))
        made = augmentations.ADJUSTMENTS[name](images, factor[:, None, None, None])
        torch.testing.assert_close(made, theirs(images, factor), **CLOSE)
        assert made.min() >= 0 and made.max() <= 1
    assert torch.equal(images, before)


def test_grayscale_and_solarize_are_those_of_kornia():
    images = awkward_images()
    torch.testing.assert_close(augmentations.grayscale(images), rgb_to_grayscale(images), **CLOSE)
    torch.testing.assert_close(augmentations.solarize(images), enhance.solarize(images, 0.5), **CLOSE)


@pytest.mark.parametrize("blur", [blur_with_convolutions, blur_with_products])
@pytest.mark.parametrize("kernel_size", [1, 3, 9, 23])  # the last with images that it just fits
def test_blur_is_that_of_kornia(blur, kernel_size):
    images = awkward_images()
    sigma = torch.linspace(0.1, 3, len(images))
    made = blur(images, sigma[:, None, None, None], kernel_size)
    theirs = gaussian_blur2d(images, (kernel_size, kernel_size), sigma[:, None].expand(-1, 2))
    torch.testing.assert_close(made, theirs, **CLOSE)
    assert torch.equal(blur(images, torch.zeros(len(images), 1, 1, 1), kernel_size), images)
    gray = images[:, :1]  # images of one channel
    torch.testing.assert_close(blur(gray, sigma[:, None, None, None], kernel_size), theirs[:, :1], **CLOSE)


def test_all_steps_are_those_of_kornia_in_this_order():
    torch.manual_seed(0)
    views = torch.randint(0, 256, (32, 2, 3, 12, 17), dtype=torch.uint8)
    augment = Augmentation(**ALL_ON)
    drawn = augment.draw(64, "cpu")
    expected = []
    for i, image in enumerate(views.flatten(0, 1).float() / 255):
        image, of = image[None], {name: values[i].reshape(1) for name, values in drawn.items()}
        if of["flip"]:
            image = image.flip(-1)
        if of["jitter"]:
            for name, (adjust, _) in ADJUSTMENTS.items():
                image = adjust(image, of[name])
        if of["grayscale"]:
            image = rgb_to_grayscale(image).expand_as(image)
        if of["sigma"] > 0:
            image = gaussian_blur2d(image, (7, 7), of["sigma"].expand(1, 2))
        if of["solarize"]:
            image = enhance.solarize(image, 0.5)
        expected.append(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.cat(expected) - mean[:, None, None]) / std[:, None, None]
    # Errors of the steps add up, and 1 / std is between 4 and 5.
    torch.testing.assert_close(augment.transform(views, drawn).flatten(0, 1), expected, rtol=0, atol=5e-5)


def test_flips_and_quarter_turns_are_those_of_torch():
    torch.manual_seed(0)
    views = torch.randint(0, 256, (32, 2, 3, 12, 12), dtype=torch.uint8)
    augment = Augmentation((0,) * 3, (1,) * 3, **OFF | ALL_ORIENTATIONS)
    drawn = augment.draw(64, "cpu")
    expected = []
    for i, image in enumerate(views.flatten(0, 1) / 255):
        image = torch.flip(image, [2]) if drawn["flip"][i] else image
        image = torch.flip(image, [1]) if drawn["vertical_flip"][i] else image
        expected.append(torch.rot90(image, 1, [1, 2]) if drawn["quarter_turn"][i] else image)
    torch.testing.assert_close(augment.transform(views, drawn).flatten(0, 1), torch.stack(expected))


def test_all_eight_orientations_are_equally_likely():
    torch.manual_seed(0)
    view = torch.tensor([[0, 85], [170, 255]], dtype=torch.uint8)
    augment = Augmentation((0,), (1,), **OFF | ALL_ORIENTATIONS)
    made = augment(view.expand(10_000, 2, 1, 2, 2)).flatten(0, 2)
    eight = torch.stack([torch.rot90(v, turns) for v in (view, view.T) for turns in range(4)]) / 255
    counts = torch.isclose(made[:, None], eight).all((2, 3)).sum(0)
    assert counts.sum() == 20_000 and chisquare(counts).pvalue > 1e-3


def test_draws_follow_their_distributions():
    torch.manual_seed(0)
    augment = Augmentation(**{**ALL_ON, "color_jitter": (0.4, 1.5, 0.2, 0.1)}, blur_probability=0.6,
                           vertical_flip_probability=0.2, quarter_turn_probability=0.9)  # fmt: skip
    drawn = augment.draw(20_000, "cpu")
    assert {values.shape for values in drawn.values()} == {(20_000, 1, 1, 1)}
    blurred = drawn["sigma"] > 0
    for chosen, probability in (
        (drawn["flip"], 0.5),
        (drawn["vertical_flip"], 0.2),
        (drawn["quarter_turn"], 0.9),
        (drawn["jitter"], 0.7),
        (drawn["grayscale"], 0.3),
        (blurred, 0.6),
        (drawn["solarize"], 0.4),
    ):  # fmt: skip
        assert chosen.float().mean() == pytest.approx(probability, abs=0.015)  # 4 standard deviations
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.0, 2.5), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in {**ranges, "sigma": (0.1, 2.0)}.items():
        values = drawn[name][blurred] if name == "sigma" else drawn[name].flatten()
        assert ks_2samp(values, low + (high - low) * torch.rand(20_000)).pvalue > 1e-3, name
        assert low <= values.min() and values.max() <= high + 1e-6
    numbers = torch.stack([values.flatten().float() for values in drawn.values()])
    correlation = torch.corrcoef(numbers) - torch.eye(len(numbers))
    correlation[list(drawn).index("sigma")] = correlation[:, list(drawn).index("sigma")] = 0
    assert correlation.abs().max() < 0.03  # no two share a number


def test_same_state_same_views_and_each_view_by_itself():
    views = torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8).expand(8, 2, -1, -1, -1)
    before, augment = views.clone(), Augmentation(**ALL_ON, blur_probability=1.0)
    torch.manual_seed(1)
    first, second = augment(views), augment(views)
    torch.manual_seed(1)
    assert torch.equal(augment(views), first) and torch.equal(views, before)
    assert len(torch.cat([first, second]).flatten(0, 1).flatten(1).unique(dim=0)) == 32


def test_strong_jitter_stays_in_range():
    torch.manual_seed(0)
    views = (255 * awkward_images()).round().byte()[:, None].expand(-1, 20, -1, -1, -1)
    augment = Augmentation((0,) * 3, (1,) * 3, color_jitter=(1, 1, 1, 0.5), color_jitter_probability=1.0,
                           blur_kernel_size=7, solarize_probability=0.5)  # fmt: skip
    made = augment(views)
    assert made.dtype == torch.float32 and made.shape == views.shape
    assert made.min() >= -1e-6 and made.max() <= 1 + 1e-6  # weights of the blur sum to 1 up to rounding


def test_steps_that_are_off_are_not_drawn():
    assert set(Augmentation().draw(1, "cpu")) == {
        "flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "sigma"
    }  # fmt: skip
    assert set(Augmentation(color_jitter=(0.4, 0, 0, 0), blur_probability=0).draw(1, "cpu")) == {
        "flip", "jitter", "brightness", "grayscale"
    }  # fmt: skip
    assert set(Augmentation((0.5,), (0.2,)).draw(1, "cpu")) == {"flip", "jitter", "brightness", "contrast", "sigma"}


def test_one_channel():
    views = torch.randint(0, 256, (4, 2, 1, 16, 20), dtype=torch.uint8)
    augment = Augmentation((0.5,), (0.2,), solarize_probability=0.5, blur_kernel_size=5)
    assert augment(views).shape == views.shape and augment(views).isfinite().all()


def test_unfit_kernels_are_refused():
    views = torch.zeros(1, 2, 3, 8, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 12 pixels a side, and these have .8, 16.; use 15 or less"):
        Augmentation(blur_kernel_size=23)(views)
    assert Augmentation(blur_kernel_size=15)(views).shape == views.shape
    with pytest.raises(ValueError, match="blur_kernel_size=4 is not odd; use 5"):
        Augmentation(blur_kernel_size=4)


def test_is_without_state():
    assert not Augmentation().state_dict()


def test_is_one_graph():
    """`fullgraph` raises where a second one would begin; and other numbers need no other graph."""
    torch.manual_seed(0)
    views = torch.randint(0, 256, (4, 2, 3, 12, 17), dtype=torch.uint8)
    augment = Augmentation(**ALL_ON)
    drawn = augment.draw(8, "cpu")
    expected, graphs = augment.transform(views, drawn), []
    augment.compile_transform(backend=lambda module, _: graphs.append(module) or module)
    torch.testing.assert_close(augment.transform(views, drawn), expected, rtol=0, atol=0)
    for _ in range(5):
        augment(views)
    assert len(graphs) == 2  # with and without gradients, which `forward` turns off


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_nothing_reads_a_value(mode):
    """There are none to read: on the CPU with convolutions for the blur, on the meta device with a GPU's products."""
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        views = torch.zeros(4, 2, 3, 12, 17, dtype=torch.uint8)
        augment = Augmentation(**ALL_ON)
        made = augment(views)
        boxes = random_boxes(4, 12, 17, 0.5, device=views.device)
    assert made.shape == views.shape and made.dtype == torch.float32 and boxes.shape == (4, 1, 12, 17)


@pytest.mark.slow  # ten seconds of compiling
@pytest.mark.parametrize("blur", [blur_with_convolutions, blur_with_products])
def test_compiled_is_eager(blur, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(augmentations, "blur_with_convolutions", blur)
    views = torch.randint(0, 256, (4, 2, 3, 24, 32), dtype=torch.uint8)
    augment = Augmentation(**ALL_ON)
    drawn = augment.draw(8, "cpu")
    expected = augment.transform(views, drawn)
    augment.compile_transform()
    torch.testing.assert_close(augment.transform(views, drawn), expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_on_a_gpu(is_compiled):
    """As on a CPU, and without a wait for the device."""
    torch.manual_seed(0)
    views = torch.randint(0, 256, (4, 2, 3, 24, 32), dtype=torch.uint8)
    augment = Augmentation(**ALL_ON)
    drawn = augment.draw(8, "cpu")
    expected = augment.transform(views, drawn)
    augment, views = augment.cuda(), views.cuda()
    if is_compiled:
        augment.compile_transform()
    made = augment.transform(views, {name: values.cuda() for name, values in drawn.items()})
    # 5e-4 of a product in TF32, which the settings may allow, twice, over a standard deviation of 0.22
    torch.testing.assert_close(made.cpu(), expected, rtol=0, atol=5e-3)
    augment(views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = augment(views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made.isfinite().all()


# --- For fine-tuning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 3])
def test_equalize_is_that_of_kornia(num_channels):
    for size in ((12, 17), (64, 48)):
        images = awkward_images(*size)[:, :num_channels]
        images[10] = (4 * images[10]).round() / 4  # few levels
        images[11] = 0.3 * images[11] + 0.2
        torch.testing.assert_close(augmentations.equalize(images), enhance.equalize(images), **CLOSE)


def test_boxes_are_distributed_as_those_of_kornia():
    torch.manual_seed(0)
    shape = num_images, height, width = 4000, 32, 48
    ours = random_boxes(*shape, 0.7)[:, 0]
    erase = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), p=0.7)
    theirs = erase(torch.ones(num_images, 1, height, width))[:, 0] == 0
    sides = {}
    for name, boxes in (("ours", ours), ("theirs", theirs)):
        chosen = boxes[boxes.any((1, 2))]
        assert len(chosen) / num_images == pytest.approx(0.7, abs=0.03)
        rows, columns = chosen.any(2), chosen.any(1)
        assert torch.equal(chosen, rows[:, :, None] & columns[:, None, :])  # a box
        sides[name] = {
            "top": rows.int().argmax(1), "left": columns.int().argmax(1), "height": rows.sum(1),
            "width": columns.sum(1), "area": chosen.sum((1, 2)),
        }  # fmt: skip
    for name, values in sides["ours"].items():
        assert ks_2samp(values, sides["theirs"][name]).pvalue > 1e-3, name


def test_augmentation_normalizes_and_leaves_its_input_alone():
    views = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    before = views.clone()
    augment = Augmentation(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), **OFF)
    expected = (views / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    torch.testing.assert_close(augment(views), expected)
    assert torch.equal(views, before)


@pytest.mark.parametrize("step", list(OFF))
def test_each_step_changes_each_view_by_itself(step):
    torch.manual_seed(0)
    views = torch.randint(0, 256, (1, 1, 3, 16, 16), dtype=torch.uint8).expand(64, 2, -1, -1, -1)
    plain = Augmentation(**OFF)(views)
    augmented = Augmentation(**{**OFF, step: 0.5}, blur_kernel_size=3)(views)
    changed = (augmented != plain).flatten(2).any(-1)
    assert 0.35 < changed.float().mean() < 0.65  # probability 0.5 on 128 views
    assert (changed[:, 0] != changed[:, 1]).any()
    torch.manual_seed(0)
    first = Augmentation()(views)
    torch.manual_seed(0)
    assert torch.equal(first, Augmentation()(views)) and first.dtype == torch.float32


def test_augmentation_makes_no_device_wait():
    """On the meta device there are no values that the host could ask for."""
    views = torch.zeros(4, 2, 3, 16, 16, dtype=torch.uint8, device="meta")
    augment = Augmentation(solarize_probability=0.5, blur_kernel_size=5).to("meta")
    assert augment(views).shape == views.shape


def test_color_steps_are_left_out_with_a_message_where_there_is_no_color(caplog):
    views = torch.randint(0, 256, (4, 2, 1, 16, 16), dtype=torch.uint8)
    augment = Augmentation((0.5,), (0.2,), flip_probability=0, blur_probability=0, color_jitter=(0, 0, 0.4, 0.1))
    torch.testing.assert_close(augment(views), (views / 255 - 0.5) / 0.2)
    assert "they need 3 channels, these images have 1" in caplog.text


def test_solarization_inverts_what_is_bright():
    views = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    augment = Augmentation(mean=(0,) * 3, std=(1,) * 3, **{**OFF, "solarize_probability": 1.0})
    torch.testing.assert_close(augment(views), torch.where(views > 127, 255 - views, views) / 255)


def test_mean_and_std_are_those_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.normal((50, 100, 150), (10, 20, 30), (40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    make = RandomCrops((40, 40), scale=(1, 1), ratio=(1, 1))
    mean, std = mean_and_std(ViewStream(ImageSource(data_dir=str(tmp_path)), make))
    np.testing.assert_allclose(np.array(mean) * 255, (49.5, 99.5, 149.5), atol=0.7)
    np.testing.assert_allclose(np.array(std) * 255, (10, 20, 30), atol=0.7)
    (tmp_path / "flat").mkdir()
    pixels[:, :, 2] = 0
    Image.fromarray(pixels).save(tmp_path / "flat" / "no blue.png")
    with pytest.raises(ValueError, match="channel 2 is the same everywhere"):
        mean_and_std(ViewStream(ImageSource(data_dir=str(tmp_path / "flat")), make))


def test_jitter_and_blur_are_as_strong_as_asked():
    torch.manual_seed(0)
    views = torch.randint(60, 190, (16, 2, 3, 16, 16), dtype=torch.uint8)

    def change(**options):
        augment = Augmentation(mean=(0,) * 3, std=(1,) * 3, blur_kernel_size=5, **{**OFF, **options})
        return (augment(views) - views / 255).abs().mean().item()

    for name, probability, weak, strong in (
        ("color_jitter", "color_jitter_probability", (0.01, 0, 0, 0), (0.6, 0, 0, 0)),
        ("blur_sigma", "blur_probability", (0.1, 0.11), (2.0, 2.1)),
    ):
        assert change(**{name: weak, probability: 1.0}) < 0.01 < 0.05 < change(**{name: strong, probability: 1.0})
