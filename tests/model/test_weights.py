"""Weights as transformers treats them: meta device, half precision, copies, counts, input embeddings."""

import copy
import pickle

import torch
from each_model import EXACT, assert_same, build, example, scalar
from testing_utils import tiny_config

from modeling_can.modeling_can import sincos_positions


def test_a_model_made_on_the_meta_device_is_initialized_afterwards(kind):
    with torch.device("meta"):
        model = kind(tiny_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    base = model.base_model
    torch.testing.assert_close(base.embeddings.position_embeddings, sincos_positions((4, 6), 32), **EXACT)
    assert base.embeddings.cls_token.abs().max() > 0 and base.layers[0].mlp.fc1.weight.std() > 0.01


@torch.no_grad()
def test_half_precision_gives_nearly_the_same(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    expected = scalar(model(**example(model)))
    for dtype, digits in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        half = kind.from_pretrained(tmp_path, dtype=dtype).eval()
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        torch.testing.assert_close(scalar(half(**example(half))).float(), expected, rtol=digits, atol=digits)


@torch.no_grad()
def test_copies_and_pickles_are_the_model(kind):
    model = build(kind)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other(**example(model)), model(**example(model)), **EXACT)
        other.base_model.layernorm.bias.add_(1)
        assert not torch.equal(other.base_model.layernorm.bias, model.base_model.layernorm.bias)


def test_the_input_embeddings_are_the_patch_projection(kind):
    model = build(kind)
    projection = model.get_input_embeddings()
    assert projection is model.base_model.embeddings.patch_embeddings
    new = torch.nn.Linear(projection.in_features, projection.out_features)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is model.base_model.embeddings.patch_embeddings is new
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()  # what PEFT does under gradient checkpointing
    model.requires_grad_(False)
    assert scalar(model(**example(model))).requires_grad


def test_parameters_are_counted_as_torch_counts_them(kind):
    model = build(kind)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == count == model.num_parameters(only_trainable=True)  # positions are buffers
    model.base_model.requires_grad_(False)
    inside = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert model.num_parameters(only_trainable=True) == count - inside
    assert model.get_memory_footprint() == 4 * sum(tensor.numel() for tensor in model.state_dict().values())
