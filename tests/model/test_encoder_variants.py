"""What the encoders of other models have: registers, rotary positions, gates, keys without bias."""

import copy
import json

import pytest
import torch
from each_model import CLOSE, MODELS, build, example, scalar
from testing_utils import inputs, tiny_config, tiny_model

from modeling_can import CANConfig, CANForPreTraining, CANModel
from modeling_can.configuration_can import ENCODER_VARIANTS
from modeling_can.modeling_can import resize_positions, rotary_angles, rotate, sincos_positions


ROTARY = dict(
    position_embedding_type="rotary", num_register_tokens=3, gated_mlp=True, hidden_act="silu", key_bias=False
)
REGISTERS = dict(num_register_tokens=2, interpolate_antialias=True)
VARIANTS = pytest.mark.parametrize("variant", [ROTARY, REGISTERS], ids=["rotary", "registers"])


# --- Those that have none of it --------------------------------------------------------------------------------------


def test_defaults_are_in_no_config_json_and_in_no_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not set(ENCODER_VARIANTS) & (written.keys() | model.config.to_dict().keys())
    loaded = CANConfig.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) == getattr(CANConfig, name) for name in ENCODER_VARIANTS)
    assert not [name for name in model.state_dict() if "register" in name or "gate" in name]
    assert not [name for name, _ in model.named_modules() if "gate" in name]


@VARIANTS
@pytest.mark.parametrize("kind", MODELS)
def test_others_come_back_as_they_were(kind, variant, tmp_path):
    model = build(kind, **variant)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in ENCODER_VARIANTS if name in written} == {
        name: value for name, value in variant.items() if name in ENCODER_VARIANTS
    }
    loaded = kind.from_pretrained(tmp_path).eval()
    assert torch.equal(scalar(loaded(**example(model))), scalar(model(**example(model))))


# --- Rotary positions ------------------------------------------------------------------------------------------------


def test_rotated_queries_and_keys_meet_by_the_distance_of_their_patches():
    angles = rotary_angles((4, 6), 16, 100.0, torch.device("cpu"))
    assert angles.shape == (1, 24, 16)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator).expand(-1, -1, 24, -1) for _ in range(2))
    queries, keys = (rotate(states, angles.cos(), angles.sin()) for states in (query, key))
    products = (queries @ keys.mT)[0, 0].unflatten(0, (4, 6)).unflatten(2, (4, 6))  # (row, column, row, column)
    for (a, b, c, d), (down, right) in (((0, 0, 1, 2), (2, 3)), ((3, 1, 0, 0), (0, 4)), ((1, 1, 2, 1), (1, 2))):
        torch.testing.assert_close(products[a, b, c, d], products[a + down, b + right, c + down, d + right], **CLOSE)
    assert products.std() > 0.1
    torch.testing.assert_close(queries.norm(dim=-1), query.norm(dim=-1))  # a rotation
    assert torch.equal(rotate(query, torch.ones(16), torch.zeros(16)), query)  # prefix tokens


def test_patches_have_an_order_without_a_table():
    model = tiny_model(**ROTARY).can
    pixels = inputs(model.config)["pixel_values"][:, 0]
    swapped = torch.cat([pixels[..., 8:16], pixels[..., :8], pixels[..., 16:]], dim=-1)  # two columns of patches
    assert (model(pixels).pooler_output - model(swapped).pooler_output).abs().max() > 1e-4
    assert model.embeddings.position_embeddings is None and "position_embeddings" not in dict(model.named_buffers())


def test_masked_patches_keep_the_places_of_the_others():
    model = tiny_model(**ROTARY).can
    pixels = inputs(model.config)["pixel_values"][:, 0]
    scores = torch.rand(4, 24, generator=torch.Generator().manual_seed(1))
    output = model(pixels, mask_ratio=0.5, masking_scores=scores)
    states, _, _, rotary = model.embeddings(pixels)
    prefix = model.config.num_prefix_tokens
    for row, mask in enumerate(output.mask):
        kept = torch.cat([torch.arange(prefix), prefix + (mask == 0).nonzero()[:, 0]])
        tokens = states[row : row + 1, kept]
        for layer in model.layers:
            tokens = layer(tokens, rotary=rotary[:, :, :, kept])
        torch.testing.assert_close(model.layernorm(tokens)[0], output.last_hidden_state[row], **CLOSE)


def test_all_patches_visible_is_no_mask():
    model = tiny_model(**ROTARY).can
    pixels = inputs(model.config)["pixel_values"][:, 0]
    torch.testing.assert_close(model(pixels, mask_ratio=0)[0], model(pixels)[0], **CLOSE)


# --- Registers -------------------------------------------------------------------------------------------------------


@VARIANTS
def test_registers_are_in_no_feature_and_end_before_the_decoder(variant):
    model = tiny_model(**variant)
    config, batch = model.config, inputs(model.config)
    encoded = model.can(batch["pixel_values"][:, 0], mask_ratio=0.5)
    prefix = 1 + config.num_register_tokens
    assert config.num_prefix_tokens == prefix and encoded.last_hidden_state.shape == (4, prefix + 12, 32)
    torch.testing.assert_close(encoded.pooler_output, encoded.last_hidden_state[:, prefix:].mean(1))
    changed = encoded.last_hidden_state.clone()
    changed[:, 1:prefix] += 1
    level = batch["noise_level"][:, 0]
    assert torch.equal(*(model.decoder(states, encoded.ids_restore, config.grid_shape, level)
                         for states in (encoded.last_hidden_state, changed)))  # fmt: skip
    with torch.no_grad():
        model.can.embeddings.register_tokens += 1
    again = model.can(batch["pixel_values"][:, 0]).pooler_output
    assert (again - encoded.pooler_output).abs().max() > 1e-3


def test_they_start_like_the_class_token_and_gates_like_all_linear_layers():
    model = CANModel(tiny_config(**ROTARY | {"num_register_tokens": 64}, initializer_range=0.05))
    assert model.embeddings.register_tokens.std().item() == pytest.approx(0.05, rel=0.1)
    gate = model.layers[0].mlp.gate_proj
    assert gate.weight.std().item() == pytest.approx((2 / (32 + 64)) ** 0.5, rel=0.1) and not gate.bias.any()


# --- All together ----------------------------------------------------------------------------------------------------


@VARIANTS
def test_every_parameter_is_trained(variant):
    model = tiny_model(**variant)
    model(**inputs(model.config)).loss.backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    # At its start, the noise head is 0 and lets no gradient through; a constant of all keys is nothing to softmax.
    assert all(name.startswith("decoder") or name.endswith("k_proj.bias") for name in still), still
    layers = [layer.attention for layer in (*model.can.layers, *model.decoder.layers)]
    assert all((layer.k_proj.bias is None) == (not model.config.key_bias) for layer in layers)


@VARIANTS
def test_keys_without_bias_need_no_product_of_their_own(variant):
    attention = tiny_model(**variant).can.layers[0].attention
    torch.nn.init.normal_(attention.q_proj.bias)
    hidden = torch.randn(2, 5, 32)
    for ours, layer in zip(
        attention.project(hidden), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True
    ):
        torch.testing.assert_close(ours, layer(hidden), **CLOSE)


@VARIANTS
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()  # flex attention has no backward pass on CPU
def test_attention_implementations_agree(implementation, variant):
    model = tiny_model(**variant)
    model.set_attn_implementation("eager")
    batch = inputs(model.config)
    expected = model(**batch, output_attentions=True)
    tokens = model.config.num_prefix_tokens + 12
    assert expected.attentions[0].shape == (4, 2, 2, tokens, tokens)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(**batch).loss, expected.loss, **CLOSE)


def test_compiling_in_one_graph_and_checkpointing_change_no_number():
    model = tiny_model(**ROTARY, num_hidden_layers=1).can
    pixels, results = inputs(model.config)["pixel_values"][:, 0], []
    scores = torch.rand(4, 24, generator=torch.Generator().manual_seed(1))
    for way in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="eager"),
                lambda model: model.gradient_checkpointing_enable() or model.train()):  # fmt: skip
        twin = copy.deepcopy(model)
        scalar(way(twin)(pixels, mask_ratio=0.5, masking_scores=scores)).backward()
        results.append(twin.embeddings.register_tokens.grad)
    for gradient in results[1:]:
        torch.testing.assert_close(gradient, results[0])


@pytest.mark.slow
def test_compiling_pre_training_changes_no_number():
    model = tiny_model(**ROTARY)
    batch = inputs(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_half_precision_turns_queries_in_single_precision():
    model = tiny_model(**ROTARY)
    batch = inputs(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.05)
    angles = rotary_angles((4, 6), 16, 100.0, torch.device("cpu"))
    states = torch.randn(2, 2, 24, 16).bfloat16()
    turned = rotate(states, angles.cos(), angles.sin())
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(states.float(), angles.cos(), angles.sin()).bfloat16())


@VARIANTS
def test_other_sizes_are_those_of_the_same_model_built_for_them(variant):
    model = tiny_model(**variant)
    larger = CANForPreTraining(tiny_config(**variant, image_size=(48, 40)))
    state = model.state_dict()
    for name in state:
        if name.endswith("position_embeddings"):
            state[name] = resize_positions(state[name], (4, 6), (6, 5), model.config.interpolate_antialias)
    larger.load_state_dict(state)
    batch = inputs(larger.config)
    torch.testing.assert_close(model(**batch, interpolate_pos_encoding=True).loss, larger.eval()(**batch).loss)


def test_antialiasing_averages_where_the_grid_gets_smaller():
    table = sincos_positions((16, 16), 32)
    plain, smooth = (resize_positions(table, (16, 16), (4, 4), antialias) for antialias in (False, True))
    assert (plain - smooth).abs().max() > 0.1 and torch.equal(plain[:, :1], smooth[:, :1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_register_tokens": -1}, "num_register_tokens=-1 must be at least 0"),
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned' is not one of absolute, rotary"),
        ({"rope_theta": 0}, "rope_theta=0 must be finite and greater than 0"),
        ({"position_embedding_type": "rotary", "num_attention_heads": 16}, "heads of width 2, which rotary positions"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
