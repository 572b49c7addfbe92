"""Runs on images of other channels than RGB: TIFFs and a column of arrays, probed, resumed to the same bits."""

import os
import re
import shutil

import numpy as np
import pytest
import tifffile
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from huggingface_hub import ModelCard
from matplotlib.image import imread
from testing_utils import TINY, save, tiny_model
from torch import nn
from transformers import AutoImageProcessor, AutoModel

import modeling_can
from modeling_can.evaluation.preprocessors import ArrayPreprocessor, load_preprocessor
from modeling_can.plots import displayed
from modeling_can.pretraining.checkpoints import changed_fields
from modeling_can.pretraining.loop import earlier_augmentation
from modeling_can.pretraining.recipe import Recipe


rng = np.random.default_rng(0)
RUN = {**TINY, "image_size": 32, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 8, "log_with": "none",
       "num_channels": 4, "pixel_range": [0, 4095], "measure_mean_std": True,
       "display_channels": [3, 2, 1]}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of TIFFs, one of them with too few bands; and a labeled set with a column of arrays."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "tiffs").mkdir()
    pixels = rng.integers(0, 4096, (24, 4, 40, 44), dtype=np.uint16)
    for number, bands in enumerate(pixels):
        tifffile.imwrite(folder / "tiffs" / f"{number}.tif", bands, photometric="minisblack")
    tifffile.imwrite(folder / "tiffs" / "bad.tif", pixels[0, :2], photometric="minisblack")
    features = Features({"bands": Array3D((4, 40, 44), "uint16"), "label": ClassLabel(names=["dark", "bright"])})
    labels = [number % 2 for number in range(24)]
    arrays = [bands // 4 + 3000 * label for bands, label in zip(pixels, labels, strict=True)]
    (folder / "labeled").mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_dict({"bands": arrays, "label": labels}, features=features)
        rows.to_parquet(folder / "labeled" / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    probe = {"probe_dataset_name": str(images / "labeled"), "probe_image_column": "bands"}
    results = modeling_can.pretrain(
        {**RUN, **probe, "data_dir": str(images / "tiffs"), "max_bad_fraction": 0.1}, output_dir=str(out)
    )
    return out, results


def test_a_folder_of_tiffs_trains_and_what_does_not_fit_is_named(finished):
    out, results = finished
    assert results["num_steps"] == 4 and results["bad_samples"] == {"channels": 1}
    assert "set num_channels to 2" in (out / "bad_samples.jsonl").read_text()
    assert results["probe"]["CAN, pre-trained"]["knn"] == 1  # dark and bright images
    model = AutoModel.from_pretrained(out)
    assert model.config.num_channels == 4 and model.embeddings.patch_embeddings.in_features == 4 * 64
    recipe = Recipe.from_dict(modeling_can.fields.load_yaml(out / "recipe.yaml"))
    assert len(recipe.image_mean) == 4 and recipe.pixel_range == (0, 4095)
    assert imread(out / "figures" / "reconstructions.png").std() > 0


def test_the_saved_processor_makes_what_training_saw(finished, images):
    out, _ = finished
    preprocessor = load_preprocessor(str(out))
    assert isinstance(preprocessor, ArrayPreprocessor) and preprocessor.image_size == (32, 32)
    pixels = preprocessor.decode((images / "tiffs" / "3.tif").read_bytes())
    assert pixels.shape == (4, 32, 32) and 0 <= pixels.min() < pixels.max() <= 1
    # transformers' part of it, where nothing is to be resized
    processor = AutoImageProcessor.from_pretrained(out)
    as_it_is = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
    theirs = processor(pixels.numpy(), **as_it_is, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs, preprocessor.normalize(pixels[None]))


def test_the_cards_snippets_run(finished, monkeypatch, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "out")
    card = ModelCard.load(folder / "README.md").text
    assert "Values from 0.0 to 4095.0 became [0, 1]" in card and "pipeline(" not in card
    np.save(folder / "image.npy", rng.random((4, 32, 32), dtype=np.float32))
    monkeypatch.chdir(folder)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL)[:2]:
        snippet = snippet.replace(", trust_remote_code=True", "")
        exec(snippet.replace("flip(-2)])", "flip(-2)])\ntorch.manual_seed(0)"), names)
    assert names["embedding"].shape == (1, 32) and names["output"].loss.isfinite()


def test_a_column_of_arrays_resumes_to_the_same_bits(images, tmp_path):
    data = {"data_files": str(images / "labeled" / "train.parquet"), "image_column": "bands"}
    whole, half = tmp_path / "whole", tmp_path / "half"
    modeling_can.pretrain({**RUN, **data}, output_dir=str(whole))
    assert os.listdir(whole / "checkpoints") == ["step-2"]
    shutil.copytree(whole / "checkpoints", half / "checkpoints")
    modeling_can.pretrain({**RUN, **data}, output_dir=str(half), resume_from_checkpoint="latest")
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_settings_are_chosen_for_arrays_too_also_from_rgb_weights(images, tmp_path, capfd):
    start = save(tmp_path / "start", tiny_model(image_size=32))
    results = modeling_can.pretrain(
        data_dir=str(images / "tiffs"), model_name_or_path=start, num_channels=4, max_steps=1, max_bad_fraction=0.1,
        per_device_train_batch_size=4, output_dir=str(tmp_path / "out"), log_with="none",
    )  # fmt: skip
    told = capfd.readouterr().out
    assert results["num_steps"] == 1 and "40 pixels on the shorter side" in told and "the images are not RGB" in told
    assert "mean filter over RGB for each of 4 channels" in told and "normalized otherwise" not in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_range": [5, 5]}, "pixel_range=.*must be two values"),
        ({"pixel_range": [9, 0]}, "pixel_range=.*must not decrease"),
        ({"pixel_range": [1]}, "pixel_range=.*must have 2 values"),
        ({"display_channels": [0, 1, 4]}, "display_channels=.*use 0 to 3"),
        ({"display_channels": [0, 1]}, "display_channels=.*must have 1 or 3 values"),
        ({"high_bit_depth": "stretch"}, "high_bit_depth=stretch is for RGB and gray images"),
        ({"measure_mean_std": False}, "image_mean=.*must have 4 values"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({**RUN, "data_dir": "x", **changes})


def test_figures_of_a_run_show_the_channels_that_are_asked_for(images, tmp_path):
    """One channel is gray, where the default is three."""
    settings = {**RUN, "data_dir": str(images / "tiffs"), "max_bad_fraction": 0.1, "display_channels": [2]}
    out = tmp_path / "out"
    modeling_can.pretrain(settings, output_dir=str(out), max_steps=1, preflight=True)
    modeling_can.pretrain(settings, output_dir=str(out), max_steps=1)
    num_columns = {"preflight": 1, "reconstructions": 1, "features": 3}  # of features, only the image
    for name, columns in num_columns.items():
        sheet = imread(out / "figures" / f"{name}.png")[:, :, :3]
        image = sheet[:, : sheet.shape[1] // columns]
        assert image.std() > 0 and np.ptp(image, axis=2).max() == 0, name


def test_channels_of_figures_are_no_change_of_what_is_trained():
    recipe = Recipe.from_dict({**RUN, "data_dir": "x"})
    shared = {"recipe": {**recipe.to_dict(), "display_channels": (0,)}, "optimizer": {"state": {}}}
    assert changed_fields(recipe, shared, {}, nn.Module()) == []


@pytest.mark.parametrize(
    ("recipe", "is_told"),
    [
        ({"num_channels": 1}, True),
        ({"num_channels": 1, "pixel_range": None}, False),
        ({"num_channels": 3}, False),
        ({"num_channels": 1, "color_jitter_probability": 0}, False),
    ],
)
def test_a_checkpoint_of_one_channel_says_that_brightness_now_changes(recipe, is_told):
    remarks = earlier_augmentation({"data_on_device": False, "color_jitter_probability": 0.8, **recipe})
    assert is_told == any("brightness and contrast of one channel" in remark for remark in remarks)


def test_floating_point_images_without_a_range_stop_the_run_at_once(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(8):
        np.save(tmp_path / "images" / f"{number}.npy", rng.random((4, 40, 40), dtype=np.float32))
    with pytest.raises(ValueError, match="pixel_range is not set"):
        settings = {**RUN, "pixel_range": None, "data_dir": str(tmp_path / "images")}
        modeling_can.pretrain(settings, output_dir=str(tmp_path / "out"))


def test_figures_show_three_channels_or_one():
    images = torch.rand(2, 5, 4, 4)
    assert torch.equal(displayed(images), images[:, :3]) and torch.equal(displayed(images[:, :2]), images[:, :1])
    assert torch.equal(displayed(images, (4, 0, 1)), images[:, [4, 0, 1]])
    assert torch.equal(displayed(images, (3,)), images[:, 3:4])
