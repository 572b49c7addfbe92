"""Parts of a layer: drop path, dropout, layer norm, positions."""

import pytest
import torch
from testing_utils import inputs, tiny_config, tiny_model

from modeling_can.modeling_can import CANDropPath, CANModel, resize_positions, sincos_positions


def test_drop_path_keeps_the_mean_and_grows_with_depth():
    torch.manual_seed(0)
    made = CANDropPath(0.2).train()(torch.ones(20_000, 1, 1)).flatten()
    assert set(made.unique().tolist()) == {0.0, 1.25} and made.mean().item() == pytest.approx(1, abs=0.02)
    model = CANModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.2))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_covers_attention_and_mlp():
    layer = CANModel(tiny_config(num_hidden_layers=2, drop_path_rate=0.5)).layers[1].train()
    tokens = torch.randn(200, 3, 32)
    made = layer(tokens)
    unchanged = (made == tokens).flatten(1).all(1).float().mean().item()
    assert unchanged == pytest.approx(0.25, abs=0.1)  # both branches are left out


def test_layer_norm_eps_and_dropouts_are_those_of_the_configuration():
    model = tiny_model(layer_norm_eps=0.25)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.25}
    for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        for attention in ("eager", "sdpa"):
            dropped = tiny_model(**{name: 0.5}).train()
            dropped.set_attn_implementation(attention)
            batch = inputs(dropped.config)
            assert dropped(**batch).loss != dropped(**batch).loss, name
            assert dropped.eval()(**batch).loss == dropped(**batch).loss, name


def test_positions_in_half_precision_are_resized_in_full():
    half = sincos_positions((4, 6), 32).bfloat16()
    expected = resize_positions(half.float(), (4, 6), (7, 5)).bfloat16()
    assert torch.equal(resize_positions(half, (4, 6), (7, 5)), expected)
