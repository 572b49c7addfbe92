"""Query, key and value as one product: the same numbers as the three layers, which stay what others build on."""

import pytest
import torch
from testing_utils import inputs, tiny_config, tiny_model
from torch import nn

from modeling_can import CANModel
from modeling_can.modeling_can import CANAttention


NAMES = ("q_proj", "k_proj", "v_proj")


def attention(**changes) -> CANAttention:
    torch.manual_seed(0)
    return CANAttention(tiny_config(**changes), 32, 2)


def layer_by_layer(module: CANAttention, hidden_states) -> list[torch.Tensor]:
    return [module.get_submodule(name)(hidden_states) for name in NAMES]


def count_products(function) -> int:
    """How many matrix products of the forward pass `function` needs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.number += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return operation(*args, **(kwargs or {}))

    with torch.no_grad(), Count() as count:
        function()
    return count.number


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_equals_three_layers_in_value_and_gradient(bias):
    module = attention(qkv_bias=bias)
    hidden = torch.randn(3, 7, 32, requires_grad=True)
    assert count_products(lambda: module.project(hidden)) == 1
    factors = torch.randn(3, 3, 7, 32)
    gradients = []
    for projected in (module.project(hidden), layer_by_layer(module, hidden)):
        loss = sum((factor * tensor).sum() for factor, tensor in zip(factors, projected, strict=True))
        parameters = [p for name in NAMES for p in module.get_submodule(name).parameters()]
        gradients.append([hidden.detach(), *projected, *torch.autograd.grad(loss, [hidden, *parameters])])
    assert len(gradients[0]) == 5 + 3 * (1 + bias)
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)  # sums in another order, in fp32


def test_autocast_multiplies_in_half_precision():
    module, hidden = attention(), torch.randn(3, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(module.project(hidden), layer_by_layer(module, hidden), strict=True):
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_a_projection_are_run(register):
    module, hidden, seen = attention(), torch.randn(3, 7, 32), []
    handle = getattr(module.k_proj, register)(lambda layer, *tensors: seen.append(layer))
    module(hidden)
    assert seen == [module.k_proj]
    handle.remove()
    assert count_products(lambda: module.project(hidden)) == 1


def test_a_hook_on_the_gradient_is_run():
    module, hidden, seen = attention(), torch.randn(3, 7, 32, requires_grad=True), []
    module.v_proj.register_full_backward_hook(lambda layer, *gradients: seen.append(layer))
    module(hidden)[0].sum().backward()
    assert seen == [module.v_proj]


def test_a_forward_that_was_replaced_is_run():
    """As accelerate's offloading does it."""
    module, hidden = attention(), torch.randn(3, 7, 32)
    forward = module.q_proj.forward
    module.q_proj.forward = lambda tensor: 2 * forward(tensor)
    torch.testing.assert_close(module.project(hidden)[0], 2 * forward(hidden))


def test_an_adapter_counts_and_is_trained():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    model = tiny_model()
    pixels = inputs(model.config)["pixel_values"][:, 0]
    before = model.can(pixels).pooler_output
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).base_model.model.can
    after = adapted(pixels).pooler_output
    assert (after - before).abs().max() > 0.01
    after.sum().backward()
    adapters = {name: p.grad for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * model.config.num_hidden_layers
    assert all(gradient.abs().max() > 0 for gradient in adapters.values())


def four_bits(linear: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra quantization)")
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # which packs the weights


def eight_bits(linear: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]


@pytest.mark.parametrize("quantize", [four_bits, eight_bits])
def test_quantized_layers_are_called(quantize):
    module, hidden = attention(), torch.randn(3, 7, 32)
    exact = module.project(hidden)
    for name in NAMES:
        setattr(module, name, quantize(module.get_submodule(name)))
    quantized = module.project(hidden)
    for ours, layer, fp32 in zip(quantized, layer_by_layer(module, hidden), exact, strict=True):
        torch.testing.assert_close(ours, layer)
        assert nn.functional.cosine_similarity(ours.flatten(), fp32.flatten(), dim=0) > 0.98
        assert not torch.equal(ours, fp32)


def test_the_layers_keep_their_names():
    names = {name for name in CANModel(tiny_config()).state_dict() if ".attention." in name and ".0." in name}
    kinds = ("weight", "bias")
    assert names == {f"layers.0.attention.{layer}.{kind}" for layer in (*NAMES, "o_proj") for kind in kinds}
