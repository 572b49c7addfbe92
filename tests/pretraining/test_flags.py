"""Every flag of the script, through main(argv), away from its default."""

import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from testing_utils import tiny_model

import run_pretraining
from modeling_can import CANForPreTraining
from modeling_can.averages import MetricAverage
from modeling_can.pretraining import compiling, feed, gradient_caching
from modeling_can.pretraining.compiling import compile_model, how_to_compile
from modeling_can.pretraining.recipe import Recipe, model_fields, training_fields
from modeling_can.random_state import rng_state, set_rng_state


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
         "decoder_intermediate_size": 32, "projection_size": 8, "image_size": "32,48",
         "per_device_train_batch_size": 4, "logging_steps": 2}  # fmt: skip
RUNS = {
    "a folder, accumulated": {
        "data_dir": "images", "num_train_samples": 48, "gradient_accumulation_steps": 2, "gradient_caching": False,
        "gradient_checkpointing": True, "tf32": False, "mixed_precision": "no", "log_with": "none", "num_channels": 1,
        "measure_mean_std": True, "dataloader_num_workers": 1, "shuffle_block_size": 16, "max_bad_fraction": 0.5,
        "license": "cc0-1.0", "high_bit_depth": "skip", "transparent_background": "#102030", "max_grad_norm": 1.0,
        "on_nonfinite": "skip",
        "save_steps": 2, "save_total_limit": 1, "overwrite_output_dir": True, "crop_scale": "0.3,0.9",
        "crop_ratio": "0.9,1.1", "resample": "bicubic", "flip_probability": 0.3, "color_jitter": "0.1,0.1,0.1,0.05",
        "color_jitter_probability": 0.5, "grayscale_probability": 0.1, "blur_probability": 0.9,
        "blur_sigma": "0.5,1.5", "solarize_probability": 0.3, "warmup_ratio": 0.5, "weight_decay": 0.1,
        "adam_beta1": 0.8, "adam_beta2": 0.9, "base_learning_rate": 1e-3, "seed": 5,
    },
    "parquet, downloaded": {
        "data_files": "images.parquet", "image_column": "photo", "streaming": False, "num_train_epochs": 1,
        "image_mean": "0.5,0.5,0.5", "image_std": "0.25,0.25,0.25", "drop_path_rate": 0.2, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "hidden_act": "relu", "initializer_range": 0.01, "layer_norm_eps": 1e-5,
        "qkv_bias": False, "patch_size": 16, "norm_pix_loss": True, "mask_ratio": 0.6, "noise_std_max": 0.1,
        "noise_level_embedding": False, "noise_head": "own", "norm_noise_loss": True,
        "projection_hidden_size": 24, "temperature": 0.2, "contrastive_loss_weight": 0.2,
        "reconstruction_loss_weight": 0.5, "denoising_loss_weight": 0.4, "probe_dataset_name": None,
    },
    "one view, without contrast": {
        "data_dir": "images", "max_steps": 2, "num_views": 1, "contrastive_loss_weight": 0, "noise_std_max": 0,
        "denoising_loss_weight": 0, "patch_size": 8, "log_with": "none", "image_size": 32,
        "vertical_flip_probability": 0.5, "quarter_turn_probability": 0.5, "position_embedding_type": "rotary",
        "rope_theta": 50, "num_register_tokens": 2, "gated_mlp": True, "key_bias": False,
        "interpolate_antialias": True,
        "pixel_range": "0,255", "display_channels": 1,
    },
    "labeled, from weights": {
        "dataset_name": "labeled", "dataset_split": "test", "probe_dataset_name": "labeled",
        "dataset_config_name": "default", "probe_train_split": "test", "probe_test_split": "train",
        "probe_dataset_config_name": "default",
        "probe_label_column": "kind", "probe_image_column": "image", "probe_every": 2, "max_steps": 4,
        "model_name_or_path": "weights", "layer_decay": 0.9, "frozen_encoder_ratio": 0.25,
        "log_with": "tensorboard", "patch_size": 8,
    },
}  # fmt: skip
ELSEWHERE = {"output_dir", "resume_from_checkpoint", "preflight", "torch_compile", "data_on_device",
             "push_to_hub", "hub_model_id", "hub_private", "hub_strategy"}  # fmt: skip
# in most tests; checkpoints; diagnostics; below, as it takes a minute; test_resident; those of the Hub in test_push


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of images, the same in parquet, a labeled set, and weights to begin with."""
    folder = tmp_path_factory.mktemp("places")
    images = [Image.effect_noise((60, 50), 60).convert("RGB") for _ in range(24)]
    (folder / "images").mkdir()
    for index, image in enumerate(images):
        image.save(folder / "images" / f"{index}.png")
    Dataset.from_dict({"photo": images}).to_parquet(folder / "images.parquet")
    (folder / "labeled").mkdir()
    for split in ("train", "test"):
        labeled = Dataset.from_dict({"image": images, "kind": [index % 2 for index in range(24)]})
        labeled.to_parquet(folder / "labeled" / f"{split}-00000.parquet")
    tiny_model().save_pretrained(folder / "weights")
    return folder


def run(places, folder, settings: dict) -> dict:
    settings = {**SMALL, "probe_dataset_name": None, "dataloader_num_workers": 0, **settings, "output_dir": folder}
    for name in ("data_dir", "data_files", "dataset_name", "probe_dataset_name", "model_name_or_path"):
        if settings.get(name):
            settings[name] = places / settings[name]
    return run_pretraining.main(["can-quickstart", *(f"--{name}={value}" for name, value in settings.items())])


@pytest.mark.parametrize("name", RUNS)
def test_the_script_runs_with(places, tmp_path, capfd, name):
    results = run(places, tmp_path, RUNS[name])
    steps = {
        "a folder, accumulated": 6,
        "parquet, downloaded": 6,
        "one view, without contrast": 2,
        "labeled, from weights": 4,
    }
    assert results["num_steps"] == steps[name] and json.loads((tmp_path / "results.json").read_text()) == results
    recipe = Recipe.from_dict(yaml.safe_load((tmp_path / "recipe.yaml").read_text()))
    for key in ("seed", "temperature", "adam_beta2", "qkv_bias", "shuffle_block_size"):
        if key in RUNS[name]:
            assert getattr(recipe, key, getattr(recipe.config, key, None)) == RUNS[name][key]
    assert (tmp_path / "tensorboard").exists() == (RUNS[name].get("log_with") != "none")
    if "model_name_or_path" in RUNS[name]:
        output = capfd.readouterr().out
        assert (
            f"taken from {places / 'weights'}: encoder, projection head, decoder" in output
            and "new: nothing" in output
        )
        began, trained = (CANForPreTraining.from_pretrained(path) for path in (places / "weights", tmp_path))
        difference = (began.can.layers[0].mlp.fc1.weight - trained.can.layers[0].mlp.fc1.weight).abs().max()
        assert 0 < difference < 1e-2  # a few steps from where it began, not from a fresh draw


def test_no_flag_is_left_out():
    used = {name for settings in RUNS.values() for name in settings} | SMALL.keys() | ELSEWHERE
    assert used == {field.name for field in [*training_fields(), *model_fields()]}


def test_compiling_stochastic_depth_is_refused(tmp_path):
    with pytest.raises(ValueError, match="drop_path_rate=0.1 with torch_compile"):
        run_pretraining.main(["--torch_compile", "--drop_path_rate=0.1", f"--output_dir={tmp_path}"])


def test_a_graph_that_would_overwrite_gradients_is_refused(tmp_path):
    flags = ["--torch_compile=cudagraph", "--gradient_accumulation_steps=2", f"--output_dir={tmp_path}"]
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 with torch_compile=cudagraph"):
        run_pretraining.main(flags)


def test_trackers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="log_with=wandb: wandb is not installed; pip install wandb"):
        run_pretraining.main(["--log_with=wandb", f"--output_dir={tmp_path}"])
    with pytest.raises(ValueError, match="log_with=tensorbord: 'tensorbord' is not one of .*tensorboard"):
        run_pretraining.main(["--log_with=tensorbord", f"--output_dir={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize("how", [True, "model"])
def test_compiled_training_is_alike_and_compiles_once(places, tmp_path, monkeypatch, how):
    """Accumulated, cached and checkpointed, with dropout, probes and images, and a resume: all in the first step."""
    settings = {"dataset_name": "labeled", "probe_dataset_name": "labeled", "probe_label_column": "kind",
                "probe_every": 2, "save_steps": 2, "logging_steps": 1, "max_steps": 4, "log_with": "none",
                "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "hidden_dropout_prob": 0.3,
                "seed": 3}  # fmt: skip
    eager = run(places, tmp_path / "eager", {**settings, "torch_compile": False})
    graphs, update = [], MetricAverage.update

    def count(*arguments):  # after every step
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return update(*arguments)

    monkeypatch.setattr(MetricAverage, "update", count)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(places, tmp_path / "compiled", {**settings, "torch_compile": how})
    assert compiled["compiled"] == {True: "blocks", "model": "model"}[how] and eager["compiled"] is None
    assert compiled["final_losses"] == pytest.approx(eager["final_losses"], rel=1e-4)
    assert len(graphs) == 4 and graphs[0] == graphs[-1] > 0

    # Resumed in a process of its own, which compiles anew, at its first step alone
    (tmp_path / "compiled" / "results.json").unlink()
    shutil.rmtree(tmp_path / "compiled" / "checkpoints" / "step-4", ignore_errors=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs.clear()
    resumed = run(
        places, tmp_path / "compiled", {**settings, "torch_compile": how, "resume_from_checkpoint": "latest"}
    )
    assert resumed["final_losses"] == compiled["final_losses"]
    assert len(graphs) == 2 and graphs[0] == graphs[-1] > 0


@pytest.mark.parametrize(
    ("choice", "device", "drop_path_rate", "expected"),
    [
        ("auto", "cpu", 0, None),
        ("auto", "cuda", 0, "blocks"),
        ("auto", "cuda", 0.1, None),
        (True, "cpu", 0, "blocks"),
        (False, "cuda", 0, None),
        ("model", "cuda", 0, "model"),
        ("cudagraph", "cuda", 0, "cudagraph"),
    ],
)
def test_what_is_compiled(monkeypatch, choice, device, drop_path_rate, expected):
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    assert how_to_compile(choice, torch.device(device), drop_path_rate) == expected


def test_without_triton_nothing_is_compiled_by_itself(monkeypatch):
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    assert how_to_compile("auto", torch.device("cuda"), 0) is None


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_repeat_their_random_numbers(checkpointing):
    """As gradient caching needs it: with and without a graph."""
    torch._dynamo.reset()
    model = tiny_model(hidden_dropout_prob=0.3).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_model(model, "blocks")
    pixels, state = torch.randn(8, 2, 3, 32, 48), rng_state()
    with torch.no_grad():
        first = model(pixels, terms=()).image_embeds
    set_rng_state(state)
    second = model(pixels)
    second.loss.backward()
    torch.testing.assert_close(second.image_embeds, first)
    assert not torch.allclose(model(pixels).image_embeds, first)


def test_every_update_is_made_as_the_recipe_says(places, tmp_path, monkeypatch):
    updates, temperatures, orders = [], set(), []

    class Spied(torch.optim.AdamW):
        def step(self, *arguments, **options):
            norm = torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])
            updates.append(([(g["lr"], tuple(g["betas"]), g["weight_decay"]) for g in self.param_groups], norm.item()))
            return super().step(*arguments, **options)

    contrast, stream = gradient_caching.contrastive_loss, feed.ViewStream
    monkeypatch.setattr(torch.optim, "AdamW", Spied)
    monkeypatch.setattr(
        gradient_caching,
        "contrastive_loss",
        lambda e, temperature: temperatures.add(temperature) or contrast(e, temperature),
    )
    monkeypatch.setattr(feed, "ViewStream", lambda *a, **k: orders.append(a[2]) or stream(*a, **k))
    settings = {"data_dir": "images", "max_steps": 4, "gradient_accumulation_steps": 2, "warmup_ratio": 0.5,
                "seed": 5, "base_learning_rate": 0.032, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9,
                "max_grad_norm": 0.01, "temperature": 0.2, "patch_size": 8}  # fmt: skip
    results = run(places, tmp_path, settings)
    assert results["learning_rate"] == pytest.approx(0.001)  # 0.032 * 8 / 256
    rates = [[group[0] for group in groups] for groups, _ in updates]
    assert rates == [pytest.approx([rate, rate]) for rate in (0.001 / 3, 0.002 / 3, 0.001, 0.0005)]
    for groups, norm in updates:
        assert [group[1:] for group in groups] == [((0.8, 0.9), 0.1), ((0.8, 0.9), 0.0)]
        assert norm == pytest.approx(0.01, rel=1e-3)  # clipped
    assert temperatures == {0.2} and orders == [5]
