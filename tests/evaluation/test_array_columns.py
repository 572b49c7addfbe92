"""Evaluation and embeddings of images that are read as arrays; what is refused in words."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, List, Value, load_dataset
from PIL import Image
from testing_utils import TINY, tiny_model
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    LevitImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessor,
    ViTImageProcessorPil,
)  # fmt: skip

import run_eval
from modeling_can import demo
from modeling_can.data.arrays import encode_array
from modeling_can.evaluation.encoders import load_encoder
from modeling_can.evaluation.features import Images
from modeling_can.evaluation.preprocessors import ArrayPreprocessor, preprocessor_of
from modeling_can.evaluation.sets import load_split
from modeling_can.evaluation.settings import make_settings
from modeling_can.pretraining.builders import image_processor
from modeling_can.pretraining.recipe import Recipe


rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(image_size=32, num_channels=2).save_pretrained(folder)
    ViTImageProcessor(
        size={"shortest_edge": 37}, do_center_crop=True, crop_size={"height": 32, "width": 32}, do_convert_rgb=False,
        image_mean=[0.4, 0.4], image_std=[0.2, 0.2], do_rescale=False, pixel_range=[0, 1000],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Images of two channels, of which the first or the second is bright."""
    folder, labels = tmp_path_factory.mktemp("labeled"), np.arange(24) % 2
    pixels = rng.integers(0, 300, (24, 2, 40, 36), dtype=np.uint16)
    pixels[np.arange(24), labels] += 600
    lists, label = List(List(List(Value("uint16")))), ClassLabel(names=["first", "second"])
    features = Features({"image": Array3D((2, 40, 36), "uint16"), "lists": lists, "label": label})
    rows = Dataset.from_dict({"image": list(pixels), "lists": pixels.tolist(), "label": labels}, features=features)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def arguments(model: str, task: str, out, **flags) -> list[str]:
    flags = {"model_name_or_path": model, "task": task, "output_dir": out, **flags}
    return [f"--{name}={value}" for name, value in flags.items()]


def test_features_are_measured_and_drawn(model, labeled, tmp_path):
    flags = {"dataset_name": labeled, "feature_cache": tmp_path / "cache", "baselines": "pixels", "shots": "1,5"}
    tasks = "knn,linear_probe,few_shot,reconstruction,retrieval,features"
    results = run_eval.main(arguments(model, tasks, tmp_path / "out", **flags))
    ours = results["results"][Path(model).name]
    assert ours["linear_probe"]["accuracy"] == 1
    assert ours["reconstruction"]["masked_patches"]["db"] > 0 and ours["retrieval"]["precision"] > 0.5


@pytest.mark.slow
def test_fine_tuning_and_the_probe_by_sgd_train_on_arrays(model, labeled, tmp_path):
    flags = {"dataset_name": labeled, "feature_cache": "none", "baselines": "none", "finetune_num_epochs": 2,
             "finetune_batch_size": 8, "sgd_num_epochs": 2, "sgd_batch_size": 8, "sgd_layers": 1}  # fmt: skip
    results = run_eval.main(arguments(model, "linear_probe_sgd,finetune", tmp_path / "out", **flags))
    ours = results["results"][Path(model).name]
    assert np.isfinite(ours["finetune"]["accuracy"]) and np.isfinite(ours["linear_probe_sgd"]["accuracy"])
    (tuned,) = {path.parent for path in (tmp_path / "out").rglob("model.safetensors")}
    assert AutoModelForImageClassification.from_pretrained(tuned).config.num_channels == 2


def test_arrays_and_nested_lists_are_the_same_images(model, labeled):
    preprocessor = load_encoder(model).preprocessor
    splits = [load_split(labeled, image_column=column, arrays=True)[0] for column in ("image", "lists")]
    first, second = (Images(split, preprocessor.decode).__getitems__(list(range(24))) for split in splits)
    assert len(first) == 24 and all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind", ["column", "folder"])
def test_embeddings_are_those_of_the_model(kind, model, labeled, tmp_path):
    rows = load_dataset(labeled, split="test").with_format("numpy")["image"][:].astype(np.uint16)
    source = {"dataset_name": labeled, "dataset_split": "test", "label_column": "label"}
    if kind == "folder":
        (tmp_path / "images").mkdir()
        for number, pixels in enumerate(rows):
            tifffile.imwrite(tmp_path / "images" / f"{number:02}.tif", pixels)
        source = {"data_dir": tmp_path / "images"}
    out = tmp_path / "out"
    run_eval.main(arguments(model, "embed", out, embedding_dtype="float32", **source))
    made = load_dataset("parquet", data_files=f"{out}/part-*.parquet", split="train")
    encoder = load_encoder(model)
    with torch.no_grad():
        pixels = torch.stack([encoder.preprocessor.decode(encode_array(row)) for row in rows])
        expected = encoder.model(encoder.preprocessor.normalize(pixels)).pooler_output

    def place(name: str) -> int:  # of the image in the split
        return int(Path(name).stem if kind == "folder" else name.split(":")[1])

    order = [place(name) for name in made["id"]]
    torch.testing.assert_close(torch.tensor(made["embedding"][:]), expected[order], rtol=1e-4, atol=1e-5)
    assert kind == "folder" or made["label"][:] == [index % 2 for index in order]


def test_what_arrays_cannot_have_is_refused_in_words(model, labeled, tmp_path):
    for task, flags, message in (
        ("robustness", {}, "robustness task corrupts RGB and gray images.*takes arrays of 2 channels"),
        ("linear_probe", {"export_classifier": tmp_path / "classifier"}, "export_classifier: .*arrays of 2 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            run_eval.main(
                arguments(model, task, tmp_path / "out", dataset_name=labeled, feature_cache="none", **flags)
            )
    with pytest.raises(ValueError, match="the demo shows RGB and gray images, .*arrays of 2 channels"):
        demo.Demo(model)


def test_images_of_other_channels_are_refused_in_words_without_a_flag_that_eval_has_not(model, tmp_path):
    for index in range(8):
        path = tmp_path / "photos" / ("train", "test")[index % 2] / "ab"[index // 4] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    flags = {"dataset_name": tmp_path / "photos", "feature_cache": "none"}
    message = r"cannot be used \(channels: 3 channels \(an array of 40 x 36 x 3 uint8\); the model takes 2\); fix or"
    with pytest.raises(ValueError, match=message) as error:
        run_eval.main(arguments(model, "knn", tmp_path / "out", **flags))
    assert "num_channels" not in str(error.value)
    np.save(tmp_path / "photos" / "good.npy", np.zeros((2, 40, 36), np.uint16))
    flags = {"data_dir": tmp_path / "photos", "max_bad_fraction": 0.9}
    run_eval.main(arguments(model, "embed", tmp_path / "embeddings", **flags))
    log = [json.loads(line) for line in (tmp_path / "embeddings" / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["detail"] for line in log} == {"3 channels (an array of 40 x 36 x 3 uint8); the model takes 2"}


def test_a_range_of_one_value_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="pixel_range=.*must be two values"):
        make_settings({"model_name_or_path": "m", "dataset_name": "d", "pixel_range": "5,5"})


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 37}, "do_center_crop": True, "crop_size": {"height": 32, "width": 30}},
        {"size": {"height": 20, "width": 50}},
        {"size": {"height": 20, "width": 50}, "resample": 3},
    ],
)
def test_the_geometry_is_that_of_transformers(options):
    """Of three channels, which transformers resizes too, but for its rounding to 8 bits."""
    options = {**options, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    image = rng.integers(50, 200, (40, 60, 3), dtype=np.uint8)
    theirs = ViTImageProcessorPil(**options)([image], return_tensors="pt")["pixel_values"][0]
    preprocessor = preprocessor_of(ViTImageProcessorPil(**options, pixel_range=[0, 255], do_rescale=False))
    assert isinstance(preprocessor, ArrayPreprocessor)
    ours = preprocessor.normalize(preprocessor.decode(encode_array(image))[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (ViTImageProcessorPil(resample=0), "ViTImageProcessorPil has resample=0"),
        (ViTImageProcessorPil(resample=1), "resample=1"),
        (ViTImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}), "size=.*longest_edge"),
        (ViTImageProcessorPil(do_pad=True, pad_size={"height": 256, "width": 256}), "do_pad=True"),
        (ViTImageProcessorPil(rescale_factor=1 / 127.5), "rescale_factor="),
        (ConvNextImageProcessorPil(size={"shortest_edge": 224}), "ConvNextImageProcessorPil has crop_pct=0.875"),
        (MobileViTImageProcessorPil(), "do_flip_channel_order=True"),
        (
            LevitImageProcessorPil(),
            "LevitImageProcessorPil has a way of its own",
        ),  # resizes to 256/224 of what it says
    ],
)
def test_a_processor_that_does_more_is_refused_by_its_option(processor, message):
    with pytest.raises(ValueError, match=f"{message}.*--processor_name_or_path"):
        preprocessor_of(processor, decoding={"pixel_range": (0, 255)})
    assert preprocessor_of(processor, (32, 32) if "longest" in message else None) is not None  # of RGB


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [32, (32, 48), 224, (17, 111)])
@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_processors_of_the_trainer_are_taken(num_channels, shape, resample):
    recipe = Recipe.from_dict(
        {
            **TINY, "num_channels": num_channels, "image_mean": (0.5,) * num_channels, "pixel_range": [0, 9],
            "image_std": (0.5,) * num_channels, "image_size": shape, "patch_size": 1, "resample": resample,
            "data_dir": "x", "max_steps": 1,
        }
    )  # fmt: skip
    for image_size in (None, (64, 64)):
        assert isinstance(preprocessor_of(image_processor(recipe), image_size), ArrayPreprocessor)


def test_another_size_keeps_the_proportions(model):
    preprocessor = load_encoder(model).preprocessor
    other = ArrayPreprocessor(preprocessor.processor, (64, 64))
    assert other.image_size == (64, 64) and other.sizes["size"] == {"shortest_edge": 74}
