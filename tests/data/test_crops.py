"""Views: boxes, resizing, what a crop depends on."""

import io
import math

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from testing_utils import image_file, noise_file

from modeling_can.data.bad_samples import BadImage
from modeling_can.data.crops import RandomCrops, random_box


def test_views_are_crops_of_the_image_that_depend_on_seed_epoch_and_image_alone():
    ramp = np.stack([np.tile(np.arange(64, dtype=np.uint8), (48, 1))] * 3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    encoded = buffer.getvalue()
    make = RandomCrops((16, 24), scale=(0.2, 0.4), seed=3)
    views = make(encoded, epoch=1)
    assert views.shape == (2, 3, 16, 24) and views.dtype == torch.uint8
    assert torch.equal(views, make(encoded, epoch=1))
    assert not torch.equal(views, make(encoded, epoch=2)) and not torch.equal(views[0], views[1])
    spread = int(views[0, 0, 8, -1]) - int(views[0, 0, 8, 0])  # the crop is narrower than the image
    assert 10 < spread < 50


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_smaller_without_a_visible_difference(orientation, monkeypatch):
    x, y = np.meshgrid(np.arange(1600), np.arange(1200))
    waves = [127 + 80 * np.sin(x / 90 + i) + 40 * np.cos(y / 70) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = image_file(Image.fromarray(np.stack(waves, 2).astype(np.uint8)), "JPEG", quality=95, exif=exif)
    make = RandomCrops((64, 64))
    views = make(encoded).float()
    sizes = []
    decode_jpeg = "modeling_can.data.decoding.simplejpeg.decode_jpeg"
    monkeypatch.setattr(decode_jpeg, lambda *_, **s: sizes.append(s) or 1 / 0)
    with pytest.raises(BadImage, match="ZeroDivisionError"):
        make(encoded)
    assert 64 < sizes[0]["min_height"] < 600 and sizes[0]["min_height"] < sizes[0]["min_width"]
    monkeypatch.setattr(decode_jpeg, lambda *_, **s: (_ for _ in ()).throw(ValueError))
    assert abs(make(encoded) - views).max() < 9  # through Pillow, at full size


def test_boxes_have_the_stated_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((640, 480), (0.2, 1.0), (0.75, 4 / 3), rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and boxes[:, 2].max() <= 640 and boxes[:, 3].max() <= 480
    share, aspect = width * height / (640 * 480), width / height
    assert 0.19 < share.min() < 0.25 and share.max() > 0.9
    assert math.isclose(aspect.min(), 0.75, rel_tol=0.02) and math.isclose(aspect.max(), 4 / 3, rel_tol=0.02)
    left, upper, right, lower = random_box((2000, 20), (0.5, 1.0), (0.75, 4 / 3), rng)
    assert lower - upper == 20 and (right - left) == round(20 * 4 / 3)  # the fallback


def test_images_of_one_size_have_different_boxes(monkeypatch):
    boxes = []
    monkeypatch.setattr("modeling_can.data.crops.random_box", lambda *a: boxes.append(random_box(*a)) or boxes[-1])
    make = RandomCrops((16, 16))
    for seed in (0, 1):
        make(noise_file(seed))
    assert boxes[:2] != boxes[2:]


def test_boxes_lie_anywhere_and_aspects_are_uniform_in_the_logarithm():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((400, 400), (0.05, 0.15), (0.5, 2.0), rng) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    for place in (boxes[:, 0] / (400 - width), boxes[:, 1] / (400 - height)):
        assert scipy.stats.kstest(place, "uniform").pvalue > 1e-3
    aspects = np.log(width / height) / np.log(4) + 0.5
    assert scipy.stats.kstest(aspects, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest((width * height / 400**2 - 0.05) / 0.1, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_views_are_resized_as_pillow_does(resample):
    made = RandomCrops((16, 16), scale=(1, 1), ratio=(1, 1), resample=resample)(noise_file(0, size=(48, 48)))[0]
    theirs = Image.open(io.BytesIO(noise_file(0, size=(48, 48)))).resize((16, 16), Image.Resampling[resample.upper()])
    assert abs(made.permute(1, 2, 0).int() - torch.from_numpy(np.asarray(theirs).astype(np.int32))).max() <= 2
