"""A recipe becomes the parts of a run."""

import inspect

import pytest
from accelerate import Accelerator
from testing_utils import TINY, TOY

import run_pretraining
from modeling_can import CANConfig, CANForPreTraining
from modeling_can.pretraining import builders
from modeling_can.pretraining.cost import step_seconds, training_flops
from modeling_can.pretraining.recipe import Recipe


def test_views_augmentation_and_processor_are_as_the_recipe_says(monkeypatch):
    bound = inspect.signature(builders.Augmentation).bind
    monkeypatch.setattr(builders, "Augmentation", lambda *a, **k: bound(*a, **k).arguments)
    augmentation = dict(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6), flip_probability=0.3,
                        color_jitter=(0.1, 0.2, 0.3, 0.05), color_jitter_probability=0.51, grayscale_probability=0.11,
                        blur_probability=0.91, blur_sigma=(0.5, 1.5), solarize_probability=0.31,
                        vertical_flip_probability=0.41, quarter_turn_probability=0.0)  # fmt: skip
    views = dict(crop_scale=(0.3, 0.9), crop_ratio=(0.9, 1.1), resample="bicubic", seed=5, num_views=2)
    recipe = Recipe.from_dict({"data_dir": "x", "max_steps": 1, "image_size": (32, 48), "patch_size": (8, 16),
                               "high_bit_depth": "stretch", **augmentation, **views})  # fmt: skip
    made = builders.augmentation(recipe)
    assert made.pop("blur_kernel_size") == 3
    assert made == {name.removeprefix("image_"): value for name, value in augmentation.items()}
    square = Recipe.from_dict({"data_dir": "x", "max_steps": 1, "image_size": 32, "quarter_turn_probability": 0.61})
    assert builders.augmentation(square)["quarter_turn_probability"] == 0.61
    make = builders.view_maker(recipe)
    assert (make.scale, make.ratio, make.resample, make.seed, make.num_views) == tuple(views.values())
    assert make.image_shape == (32, 48) and make.decoding["min_size"] == (8, 16)
    assert make.decoding["high_bit_depth"] == "stretch" and make.decoding["num_channels"] == 3
    processor = builders.image_processor(recipe)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.resample == 3 and dict(processor.crop_size) == {"height": 32, "width": 48}
    assert dict(processor.size) == {"shortest_edge": round(48 * 256 / 224)}


@pytest.fixture
def shapes(monkeypatch):
    """Those of the batches that models get."""
    seen, forward = set(), CANForPreTraining.forward

    def spy(model, pixel_values, *arguments, **options):
        seen.add(tuple(pixel_values.shape))
        return forward(model, pixel_values, *arguments, **options)

    monkeypatch.setattr(CANForPreTraining, "forward", spy)
    return seen


def test_a_run_of_three_views_trains_and_counts_three(tmp_path, shapes):
    flags = {"num_views": 3, "max_steps": 2, "probe_dataset_name": "none", "log_with": "none", "output_dir": tmp_path}
    results = run_pretraining.main([*TOY, *(f"--{name}={value}" for name, value in flags.items())])
    assert {shape[1] for shape in shapes} == {3}
    flops = training_flops(CANConfig.from_pretrained(tmp_path), num_views=3)
    assert results["flops_per_image"] == flops and results["train_flops"] == flops * 2 * 8


def test_the_time_of_a_step_is_measured_on_batches_of_the_run(shapes):
    recipe = Recipe.from_dict({**TINY, "data_dir": "x", "max_steps": 1, "num_views": 3})
    assert step_seconds(recipe, Accelerator(cpu=True), batch_size=2) > 0
    assert shapes == {(2, 3, 3, 32, 48)}
