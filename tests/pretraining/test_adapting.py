"""Going on from other weights: rates of the blocks, frozen steps, the start beside the run."""

import json
import shutil

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from testing_utils import ROOT, tiny_model
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

import run_pretraining
from modeling_can.configuration_can import SIMCLR
from modeling_can.conversion.export import to_timm
from modeling_can.optimization import layer_groups, learning_rate
from modeling_can.pretraining.builders import _tell_of_warm_start
from modeling_can.pretraining.recipe import make_recipe


TILES = ROOT / "modeling_can" / "data" / "sample_data"


def test_the_encoder_alone_has_the_rates_of_its_blocks():
    model = tiny_model(num_hidden_layers=3, decoder_num_hidden_layers=2)
    groups = layer_groups(model, weight_decay=0.05, layer_decay=0.5, encoder="can.", frozen_steps=7)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["first_step"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, (scale, first_step) in found.items():
        blocks = {f"can.layers.{index}.": 0.5 ** (3 - index) for index in range(3)} | {"can.embeddings.": 0.5**4}
        assert scale == next((blocks[start] for start in blocks if name.startswith(start)), 1.0), name
        assert first_step == (7 if name.startswith("can.") else 0), name


def test_what_is_frozen_at_first_has_the_rest_of_the_schedule():
    late = [learning_rate(step, max_steps=50, warmup_steps=4, peak=2.0, first_step=10) for step in range(50)]
    assert late[:10] == [0.0] * 10
    assert late[10:] == [learning_rate(step, max_steps=40, warmup_steps=4, peak=2.0) for step in range(40)]
    assert max(late) == late[14] == 2.0


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A ViT of transformers: an encoder alone."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "vit"
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return folder


def adapt(start, out, **settings):
    settings = {"dataset_name": "sample_data", "max_steps": 6, "per_device_train_batch_size": 8, **settings}
    settings |= {"log_with": "none", "dataloader_num_workers": 0, "model_name_or_path": start, "output_dir": out}
    return run_pretraining.main(["can-adapt", *(f"--{name}={value}" for name, value in settings.items())])


def test_a_recipe_without_sizes_gets_those_of_the_weights(start, tmp_path):
    recipe = make_recipe("can-adapt", {"model_name_or_path": str(start), "data_dir": "x"})
    config = recipe.config
    assert recipe.base_learning_rate == 2e-3  # of that width
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (32, 2, (8, 8))
    own = tiny_model(decoder_hidden_size=16, projection_size=24)
    own.save_pretrained(tmp_path)
    config = make_recipe("can-adapt", {"model_name_or_path": str(tmp_path), "data_dir": "x"}).config
    assert (config.decoder_hidden_size, config.projection_size) == (16, 24)
    tiny_model(**SIMCLR).save_pretrained(tmp_path / "simclr")  # which had no noise, and no decoder to train
    objective = make_recipe({"model_name_or_path": str(tmp_path / "simclr"), "max_steps": 1}, {"data_dir": "x"}).config
    assert objective.noise_std_max > 0 and objective.denoising_loss_weight > 0
    asked = {"model_name_or_path": str(start), "data_dir": "x", "hidden_size": 64}
    assert make_recipe("can-adapt", asked).config.hidden_size == 64  # which the run then refuses, with the flags
    with pytest.raises(ValueError, match="num_channels='four'"):
        make_recipe("can-adapt", {**asked, "num_channels": "four"})
    only_data = {"model_name_or_path": str(start), "max_steps": 1, "num_channels": 4, "measure_mean_std": True}
    assert make_recipe(only_data, {"data_dir": "x"}).config.hidden_size == 32  # a recipe of the data alone


def test_a_file_of_weights_tells_its_sizes_too(tmp_path):
    encoder, _ = to_timm(tiny_model(image_size=32, patch_size=8).can)
    save_file(encoder, tmp_path / "w.safetensors")
    asked = {"model_name_or_path": str(tmp_path / "w.safetensors"), "data_dir": "x", "num_attention_heads": 2}
    config = make_recipe("can-adapt", asked).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)


def test_a_line_says_by_what_is_normalized_where_the_weights_do_not(tmp_path, capsys):
    tiny_model(image_size=32).save_pretrained(tmp_path)
    asked = {"model_name_or_path": str(tmp_path), "data_dir": "x", "image_mean": "0.5,0.25,0.1"}
    _tell_of_warm_start(make_recipe("can-adapt", asked), ["encoder"], [])
    says = (
        f"{tmp_path} has no image processor that says its normalization: images are normalized by mean 0.5, 0.25, 0.1"
    )
    assert says in capsys.readouterr().out
    ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    _tell_of_warm_start(make_recipe("can-adapt", asked), ["encoder"], [])
    out = capsys.readouterr().out
    assert "no image processor" not in out and "to do so as well: --image_mean 0.5,0.5,0.5" in out


def test_a_frozen_encoder_leaves_steps_for_its_learning_rate(start):
    asked = {"model_name_or_path": str(start), "data_dir": "x", "frozen_encoder_ratio": 0.9}
    with pytest.raises(ValueError, match="frozen_encoder_ratio=0.9 and warmup_ratio=0.1 take all steps"):
        make_recipe("can-adapt", asked)


def test_a_frozen_encoder_needs_weights(start, tmp_path):
    for recipe in ("can-adapt", None):  # also where the settings are to be chosen
        with pytest.raises(ValueError, match="frozen_encoder_ratio=0.1, but .* set model_name_or_path, or frozen"):
            make_recipe(recipe, {"data_dir": "x", "frozen_encoder_ratio": 0.1})
    assert make_recipe("can-adapt", {"data_dir": "x", "frozen_encoder_ratio": 0}).config.hidden_size == 768


def test_a_run_goes_on_though_its_start_is_gone(start, tmp_path):
    gone, out = shutil.copytree(start, tmp_path / "start"), tmp_path / "out"
    adapt(gone, out, max_steps=2, save_steps=1)
    shutil.rmtree(gone)
    assert adapt(gone, out, max_steps=3, resume_from_checkpoint="latest")["num_steps"] == 3


def test_decoder_and_heads_learn_first_and_a_resumed_run_is_exact(start, tmp_path):
    adapt(start, tmp_path / "whole", frozen_encoder_ratio=0.5, save_steps=1, save_total_limit=9)
    at = {step: load_file(tmp_path / f"whole/checkpoints/step-{step}/model.safetensors") for step in (1, 3, 5)}
    encoder = {name for name in at[1] if name.startswith("can.") and not name.endswith("position_embeddings")}
    assert all(torch.equal(at[1][name], at[3][name]) for name in encoder)
    assert not any(torch.equal(at[3][name], at[5][name]) for name in encoder)
    assert not torch.equal(at[1]["decoder.head.weight"], at[3]["decoder.head.weight"])
    state = torch.load(tmp_path / "whole/checkpoints/step-3/shared.pt", weights_only=False)["optimizer"]["state"]
    assert not any(state[name]["exp_avg"].any() for name in state if name.startswith("can."))
    # The earlier a block, the less it moves
    moved = [(at[5][f"can.layers.{i}.mlp.fc1.bias"] - at[3][f"can.layers.{i}.mlp.fc1.bias"]).norm() for i in (0, 1)]
    assert 0.6 < moved[0] / moved[1] < 0.9  # AdamW's first steps are of the size of the rate: 0.75

    for step in (2, 4):  # while it is frozen, and after
        checkpoint = tmp_path / f"whole/checkpoints/step-{step}"
        adapt(start, tmp_path / f"from-{step}", frozen_encoder_ratio=0.5, resume_from_checkpoint=checkpoint)
        resumed = load_file(tmp_path / f"from-{step}/model.safetensors")
        whole = load_file(tmp_path / "whole/model.safetensors")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_other_rates_after_a_checkpoint(start, tmp_path, capsys):
    adapt(start, tmp_path / "first", save_steps=3)
    for name, settings in {"same": {}, "plain": {"layer_decay": 1, "frozen_encoder_ratio": 0}}.items():
        checkpoint = tmp_path / "first/checkpoints/step-3"
        adapt(start, tmp_path / name, resume_from_checkpoint=checkpoint, **settings)
    assert "layer_decay was 0.75, is 1" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "plain/metrics.jsonl").read_text().splitlines()]
    assert all(line["learning_rate"] > 0 for line in lines)


def test_the_start_stands_beside_the_run(start, tmp_path, capsys):
    for split in ("train", "test"):
        some = load_dataset("parquet", data_files=str(TILES / f"{split}-*.parquet"), split="train").shuffle(seed=0)
        (tmp_path / "labeled").mkdir(exist_ok=True)
        some.select(range(100)).to_parquet(tmp_path / "labeled" / f"{split}.parquet")
    results = adapt(start, tmp_path / "run", probe_dataset_name=tmp_path / "labeled", probe_every=3)
    probe = results["probe"]
    assert list(probe) == ["raw pixels", "the start", "CAN, pre-trained"]
    out = capsys.readouterr().out
    assert f"{start} has no image processor that says its normalization: images are normalized by mean 0.485, " in out
    assert f"(the start: {100 * probe['the start']['knn']:.1f} %)" in out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| the start |" in card
    is_worse = probe["CAN, pre-trained"]["knn"] < probe["the start"]["knn"]
    assert is_worse == any("worse than before training" in sentence for sentence in results["health"])
