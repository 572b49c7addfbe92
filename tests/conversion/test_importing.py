"""Warm starts: every source's outputs, what counts as taken, and errors that leave the model whole."""

import json
import re

import huggingface_hub
import pytest
import safetensors.torch
import torch
from other_encoders import (
    DECODER_SIZES,
    SQUARE,
    VIT_SIZES,
    can,
    dinov2,
    dinov2_with_registers,
    dinov3,
    equal,
    features,
    pixels_of,
    tokens,
    vit,
    vit_mae,
)
from testing_utils import TINY, inputs, tiny_model, without_noise
from transformers import (
    BertConfig,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling_can import CANForImageClassification, CANForPreTraining, CANModel
from modeling_can.configuration_can import MAE
from modeling_can.conversion import DINOV2, DINOV2_LAYER_SCALE, VIT, VIT_MAE, their_name, to_can, warm_start
from modeling_can.pretraining.recipe import Recipe


def state_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_parts(model, before: dict) -> set[str]:
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = ("can.", "projection_head.", "decoder.noise_level_embedding.", "decoder.")
    return {next(part for part in parts if name.startswith(part)) for name in changed}


# --- Channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 2, 5])
@pytest.mark.parametrize("kind", ["vit_mae", "dinov2", "can"])
def test_other_channels_begin_with_the_mean_filter_over_rgb(kind, num_channels, tmp_path):
    source = {"vit_mae": vit_mae, "dinov2": dinov2, "can": lambda: can(**SQUARE)}[kind]()
    source.save_pretrained(tmp_path)
    model = tiny_model(**SQUARE, num_channels=num_channels)
    before = state_of(model)
    taken, new = warm_start(model, str(tmp_path))
    assert f"heads of the decoder (num_channels is 3 there and {num_channels} here)" in new
    assert f"mean filter over RGB for each of {num_channels} channels" in taken[0]
    gray = pixels_of(32, 32)[:, :1]
    expected = tokens(source, gray.expand(-1, 3, -1, -1))  # the same image in all channels: as a gray one in RGB
    ours = tokens(model.can, gray.expand(-1, num_channels, -1, -1))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    pixels = torch.randn(2, num_channels, 32, 32)  # and no channel counts more than another
    torch.testing.assert_close(tokens(model.can, pixels), tokens(model.can, pixels.flip(1)), rtol=1e-4, atol=1e-5)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith(("decoder.head.", "decoder.noise_head.")) for name in changed)
    assert (kind != "dinov2") == any(name.startswith("decoder.layers.0.") for name in changed)


# --- Outputs equal the source's --------------------------------------------------------------------------------------

SOURCES = {
    "vit": lambda: vit(),
    "vit for classification": lambda: vit(ViTForImageClassification),
    "vit without bias": lambda: vit(qkv_bias=False),
    "vit_mae": lambda: vit_mae(),
    "vit_mae encoder": lambda: vit_mae(ViTMAEModel),
    "dinov2": lambda: dinov2(),
    "dinov2 for classification": lambda: dinov2(Dinov2ForImageClassification),
    "dinov2 without bias or mask token": lambda: dinov2(qkv_bias=False, use_mask_token=False),
    "can": lambda: can(**SQUARE),
    "can encoder": lambda: can(CANModel, **SQUARE),
    "can classifier": lambda: can(CANForImageClassification, **SQUARE),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_features_equal_the_sources_at_its_size_and_at_others(kind, tmp_path):
    source = SOURCES[kind]()
    source.save_pretrained(tmp_path)
    model = tiny_model(**SQUARE, qkv_bias="without bias" not in kind)
    taken, _ = warm_start(model, str(tmp_path))
    assert taken[0].split(" (")[0] == "encoder" and "resized" not in taken[0]
    for height, width in ((32, 32), (48, 48), (40, 64), (16, 64)):
        pixels = pixels_of(height, width)
        ours = model.can(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours, tokens(source, pixels), atol=1e-5, rtol=1e-5)
    theirs = source.base_model.state_dict()
    for index in range(2):  # the one tensor to which softmax makes the outputs blind
        name = f"layers.{index}.attention.k_proj.bias"
        their_bias = theirs.get(f"encoder.layer.{index}.attention.k_proj.bias" if "dinov2" in kind else name)
        ours = model.can.state_dict().get(name)
        assert torch.equal(ours, their_bias) if model.config.qkv_bias else ours is their_bias is None


@pytest.mark.parametrize("kind", ["vit", "vit_mae", "dinov2", "can"])
@pytest.mark.parametrize("size", [(16, 16), (48, 24)])
def test_positions_are_resized_to_the_models_grid(kind, size, tmp_path):
    source = SOURCES[kind]()
    source.save_pretrained(tmp_path)
    model = tiny_model(patch_size=8, image_size=size)
    taken, _ = warm_start(model, str(tmp_path))
    assert f"positions resized from 4 x 4 to {size[0] // 8} x {size[1] // 8}" in taken[0]
    pixels = pixels_of(*size)
    ours = model.can(pixels).last_hidden_state
    torch.testing.assert_close(ours, tokens(source, pixels), atol=1e-5, rtol=1e-5)


def test_layer_scale_of_a_half_precision_checkpoint_is_folded_in_full_precision(tmp_path):
    source = dinov2().to(torch.float16)
    source.save_pretrained(tmp_path)
    model = tiny_model(**SQUARE)
    warm_start(model, str(tmp_path))
    pixels = pixels_of(32, 32)
    theirs = tokens(source.float(), pixels)
    torch.testing.assert_close(model.can(pixels).last_hidden_state, theirs, atol=1e-5, rtol=1e-5)


def test_sources_that_are_not_square(tmp_path):
    source = vit(image_size=(32, 48), patch_size=(8, 4))
    source.save_pretrained(tmp_path)
    model = tiny_model(image_size=(32, 48), patch_size=(8, 4))
    warm_start(model, str(tmp_path))
    pixels = pixels_of(32, 48)
    ours, theirs = model.can(pixels).last_hidden_state, source(pixels).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_every_parameter_of_the_sources_moves_the_outputs_that_are_compared():
    # Or the equality of the outputs would prove nothing; but for the key's bias, which softmax cannot see.
    pixels = pixels_of(32, 32)
    unused = r"pooler|mask_token|(k_proj|key).bias"
    for source in (vit(), vit_mae(ViTMAEModel), dinov2()):
        expected = tokens(source, pixels)
        for name, tensor in source.state_dict().items():
            before = tensor.clone()
            tensor.mul_(1.5)
            moved = (tokens(source, pixels) - expected).abs().max()
            tensor.copy_(before)
            assert moved > 1e-3 or re.search(unused, name), name


def test_vit_mae_with_its_decoder_gives_the_same_loss_and_predictions(tmp_path):
    source = vit_mae()
    source.save_pretrained(tmp_path)
    model = tiny_model(**SQUARE, **MAE)
    assert warm_start(model, str(tmp_path)) == (["encoder", "decoder"], ["projection head"])
    batch = without_noise(inputs(model.config))
    outputs = model(**batch)
    expected = source(batch["pixel_values"].flatten(0, 1), noise=batch["masking_scores"].flatten(0, 1))
    torch.testing.assert_close(outputs.logits.flatten(0, 1), expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_can_gives_the_same_losses(tmp_path):
    source = can()
    source.save_pretrained(tmp_path)
    model = tiny_model()
    taken, new = warm_start(model, str(tmp_path))
    assert taken == ["encoder", "projection head", "decoder", "noise-level embedding", "noise head"] and new == []
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    batch = inputs(model.config)
    assert torch.equal(model(**batch).loss, source(**batch).loss)


def test_the_tables_name_every_tensor_of_the_sources_and_of_ours():
    # So that the reverse direction can be read from them too.
    every = set(tiny_model(**SQUARE, **MAE).state_dict())  # without noise
    encoder = {name for name in every if name.startswith("can.")}
    decoder = {name for name in every if name.startswith("decoder.")}
    lambdas = {their_name(name.rpartition(".")[0], DINOV2_LAYER_SCALE) for name in encoder} - {None}
    theirs = {their_name(name, VIT) for name in encoder}
    assert theirs == set(ViTModel(ViTConfig(**VIT_SIZES), add_pooling_layer=False).state_dict())
    theirs = {their_name(name, VIT_MAE) for name in encoder | decoder}
    assert theirs == set(ViTMAEForPreTraining(ViTMAEConfig(**VIT_SIZES, **DECODER_SIZES)).state_dict())
    theirs = {their_name(name, DINOV2) for name in encoder} | lambdas
    assert theirs == set(dinov2(use_mask_token=False).state_dict()) and len(lambdas) == 4


# --- What was taken and what is new ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, changes, taken, new",
    [
        (lambda: vit(), {}, ["encoder"], ["projection head", "decoder", "noise-level embedding", "noise head"]),
        (lambda: vit(), MAE, ["encoder"], ["projection head", "decoder"]),
        (
            lambda: dinov2(),
            {},
            ["encoder (layer scale folded into the output projections; mask token left out)"],
            ["projection head", "decoder", "noise-level embedding", "noise head"],
        ),
        (lambda: vit_mae(), {}, ["encoder", "decoder"], ["projection head", "noise-level embedding", "noise head"]),
        (
            lambda: vit_mae(),
            dict(image_size=16),
            ["encoder (positions resized from 4 x 4 to 2 x 2)", "decoder (positions resized from 4 x 4 to 2 x 2)"],
            ["projection head", "noise-level embedding", "noise head"],
        ),
        (
            lambda: vit_mae(ViTMAEModel),
            {},
            ["encoder"],
            ["projection head", "decoder", "noise-level embedding", "noise head"],
        ),
        (
            lambda: vit_mae(decoder_num_hidden_layers=3, decoder_num_attention_heads=4),
            {},
            ["encoder"],
            [
                "projection head",
                "decoder (decoder_num_hidden_layers is 3 there and 2 here, decoder_num_attention_heads is 4 there and "
                "2 here)",
                "noise-level embedding",
                "noise head",
            ],
        ),
        (
            lambda: can(CANModel, **SQUARE),
            {},
            ["encoder"],
            ["projection head", "decoder", "noise-level embedding", "noise head"],
        ),
        (
            lambda: can(CANForImageClassification, **SQUARE),
            {},
            ["encoder"],
            ["projection head", "decoder", "noise-level embedding", "noise head"],
        ),
        (
            lambda: can(**SQUARE, noise_head="shared"),
            {},
            ["encoder", "projection head", "decoder", "noise-level embedding"],
            ["noise head"],
        ),
        (
            lambda: can(**SQUARE, **MAE),
            {},
            ["encoder", "projection head", "decoder"],
            ["noise-level embedding", "noise head"],
        ),
        (lambda: can(**SQUARE), MAE, ["encoder", "projection head", "decoder"], []),
        (
            lambda: can(**SQUARE, decoder_num_hidden_layers=1, projection_size=16),
            {},
            ["encoder"],
            [
                "projection head (projection_size is 16 there and 8 here)",
                "decoder (decoder_num_hidden_layers is 1 there and 2 here)",
                "noise-level embedding (decoder_num_hidden_layers is 1 there and 2 here)",
                "noise head (decoder_num_hidden_layers is 1 there and 2 here)",
            ],
        ),
    ],
)
def test_the_lists_name_each_part_once_and_nothing_else_changes(source, changes, taken, new, tmp_path):
    source().save_pretrained(tmp_path)
    model = tiny_model(**{**SQUARE, **changes})
    before = state_of(model)
    assert warm_start(model, str(tmp_path)) == (taken, new)
    prefixes = {
        "encoder": "can.",
        "projection head": "projection_head.",
        "decoder": "decoder.",
        "noise-level embedding": "decoder.noise_level_embedding.",
        "noise head": "decoder.noise_head.",
    }
    assert changed_parts(model, before) == {prefixes[part.split(" (")[0]] for part in taken}


def test_positions_that_are_all_zero_are_mentioned(tmp_path):
    source = vit_mae()
    with torch.no_grad():
        source.vit.embeddings.position_embeddings[:, 1:] = 0
    source.save_pretrained(tmp_path)
    taken, _ = warm_start(tiny_model(**SQUARE), str(tmp_path))
    assert taken == ["encoder (positions are all zero, so that it cannot tell where a patch lies)", "decoder"]


def test_the_model_stays_trainable_in_place_and_in_its_dtype(tmp_path):
    source = vit(ViTForImageClassification)
    source.to(torch.float16).save_pretrained(tmp_path)
    model = tiny_model(**SQUARE, contrastive_loss_weight=0).to(torch.bfloat16)
    model.freeze_unused_parameters()
    held = {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    warm_start(model, str(tmp_path))
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == held
    before = state_of(model)
    weight = source.vit.layers[1].mlp.fc2.weight
    torch.testing.assert_close(before["can.layers.1.mlp.fc2.weight"], weight.to(torch.bfloat16))
    model(inputs(model.config)["pixel_values"]).loss.backward()
    optimizer.step()
    assert "can." in changed_parts(model, before)
    assert torch.equal(model.can.embeddings.position_embeddings, before["can.embeddings.position_embeddings"])


# --- Errors, which leave the model as it was -------------------------------------------------------------------------


def refused(message: str, path, **changes):
    model = tiny_model(**{**SQUARE, **changes})
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as error:
        warm_start(model, str(path))
    assert changed_parts(model, before) == set()
    return str(error.value)


@pytest.mark.parametrize(
    "source, flags",
    [
        (
            lambda: vit(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=96,
                patch_size=4,
                hidden_act="relu",
                layer_norm_eps=1e-12,
                qkv_bias=False,
            ),
            "--hidden_size 48 --num_hidden_layers 3 --num_attention_heads 4 --intermediate_size 96 --patch_size 4 "
            "--hidden_act relu --layer_norm_eps 1e-12 --qkv_bias false",
        ),
        (lambda: vit(image_size=(32, 64), patch_size=(8, 16)), "--patch_size 8,16"),
        (lambda: vit_mae(num_channels=1), "--num_channels 1"),
        (lambda: dinov2(mlp_ratio=3, hidden_size=16), "--hidden_size 16 --intermediate_size 48"),
        (lambda: can(**SQUARE, hidden_size=64), "--hidden_size 64"),
        (lambda: dinov2(use_swiglu_ffn=True), "--intermediate_size 48 --hidden_act silu --gated_mlp true"),
        (lambda: dinov2_with_registers(), "--num_register_tokens 3 --interpolate_antialias true"),
        (
            lambda: dinov3(rope_theta=50.0),
            "--key_bias false --num_register_tokens 2 --position_embedding_type rotary --rope_theta 50.0",
        ),
    ],
)
def test_another_encoder_is_refused_with_the_words_that_fix_it(source, flags, tmp_path):
    source().save_pretrained(tmp_path)
    message = refused("has another encoder", tmp_path)
    first = "; use the recipe can-adapt, or none, and leave out " + " ".join(re.findall(r"--\S+", flags))
    assert message.endswith(f"{first}; with another recipe, add {flags}")
    words = dict(re.findall(r"--(\S+) (\S+)", flags))
    assert all(f"{name} is " in message for name in words)
    fixed = Recipe.from_dict({**TINY, "image_size": 32, **words, "max_steps": 1, "measure_mean_std": True}).config
    model = CANForPreTraining(fixed)
    assert warm_start(model, str(tmp_path))[0][0].startswith("encoder")


def test_other_biases_than_can_has_are_refused(tmp_path):
    for changes in ({"value_bias": False}, {"proj_bias": False}, {"query_bias": False, "value_bias": False,
                                                                 "key_bias": True}):  # fmt: skip
        dinov3(**changes).save_pretrained(tmp_path)
        refused("'query_bias': .*CAN's encoder has biases everywhere, or not in query, key and value, or", tmp_path)


def test_other_kinds_of_model_are_refused_by_name(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    refused("model_type='bert'.*can, vit_mae, vit, dinov2, dinov2_with_registers, dinov3_vit", tmp_path)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it asks five times
    fix = "give a folder written by save_pretrained, or the id of a model on the Hub"
    for name in ("nowhere", "nowhere.pth"):
        refused(f"^model_name_or_path={tmp_path}/{name}: there is no such file or folder$", tmp_path / name)
    refused(f"model_name_or_path='nobody/nothing' cannot be read.*{fix}", "nobody/nothing")
    refused("it has no config.json; of a run's checkpoints, resume_from_checkpoint takes care", tmp_path)
    ViTConfig(**VIT_SIZES).save_pretrained(tmp_path)
    refused(f"no file named model.safetensors.*{fix}", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    refused(f"cannot be read.*{fix}", tmp_path)


@pytest.mark.parametrize(
    "source, key",
    [
        (lambda: vit(), "layernorm.bias"),
        (lambda: vit_mae(), "vit.embeddings.position_embeddings"),
        (lambda: dinov2(), "encoder.layer.0.layer_scale2.lambda1"),
        (lambda: dinov2_with_registers(), "embeddings.register_tokens"),
        (lambda: can(**SQUARE), "can.embeddings.position_embeddings"),
        (lambda: can(CANModel, **SQUARE), "layers.0.mlp.fc1.weight"),
    ],
)
def test_an_incomplete_encoder_is_refused(source, key, tmp_path):
    source().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights[key]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    registers = {"num_register_tokens": 3, "interpolate_antialias": True} if "register" in key else {}
    refused(f"lacks 1 tensors of its encoder.*{key}; give a complete checkpoint", tmp_path, **registers)


def test_a_table_that_its_config_belies_is_refused(tmp_path):
    vit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": 64}))
    refused("another shape than its config.json says, e.g. embeddings.position_embeddings", tmp_path)


@pytest.mark.parametrize(
    "source, changes, key",
    [
        (
            lambda: dinov3(use_gated_mlp=True, hidden_act="silu"),
            {"use_gated_mlp": False, "hidden_act": "gelu"},
            "layer.0.mlp.gate_proj.bias",
        ),
        (lambda: dinov3(key_bias=True), {"key_bias": False}, "layer.0.attention.k_proj.bias"),
        (lambda: vit(), {"num_hidden_layers": 1}, "layers.1.attention.k_proj.bias"),
        (lambda: vit_mae(), {"qkv_bias": False}, "layers.0.attention.k_proj.bias"),
        (lambda: can(**SQUARE, num_register_tokens=2), {"num_register_tokens": 0}, "can.embeddings.register_tokens"),
        (lambda: can(CANModel, **SQUARE), {"num_hidden_layers": 1}, "layers.1.attention"),
    ],
)
def test_layers_that_the_config_does_not_name_are_refused(source, changes, key, tmp_path):
    source().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=rf"e\.g\. \S*{re.escape(key)}\S*; make config.json say what the file has"):
        to_can(str(tmp_path))


def test_heads_and_buffers_beside_the_encoder_are_left_behind(tmp_path):
    source = dinov3()
    source.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    others = (
        "rope_embed.inv_freq",
        "pooler.dense.weight",
        "classifier.weight",
        "decoder.layers.0.mlp.fc1.weight",
        "head.layers.0.bias",
    )
    weights |= {name: torch.ones(2) for name in others}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    equal(features(to_can(str(tmp_path)), pixels_of(32, 32)), tokens(source, pixels_of(32, 32)))


def test_an_incomplete_decoder_stays_new(tmp_path):
    vit_mae().save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["decoder.mask_token"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = tiny_model(**SQUARE, **MAE)
    before = state_of(model)
    _, new = warm_start(model, str(tmp_path))
    assert new[1] == "decoder (the checkpoint lacks some of it, e.g. decoder.mask_token)"
    assert changed_parts(model, before) == {"can."}
