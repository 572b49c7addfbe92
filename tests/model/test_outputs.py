"""Outputs that code written for transformers' vision models takes for granted, of each of the three classes."""

import pytest
import torch
from each_model import CLOSE, EXACT, assert_same, build, example, scalar
from testing_utils import inputs, tiny_config

from modeling_can import CANForImageClassification, CANForPreTraining, CANModel


# --- Outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evaluation_is_deterministic_and_leaves_training_mode_random(kind):
    model = build(kind, hidden_dropout_prob=0.5)
    batch = example(model)
    assert_same(model(**batch), model(**batch), **EXACT)
    model.train()
    assert scalar(model(**batch)) != scalar(model(**batch))


@torch.no_grad()
def test_a_tuple_holds_what_the_named_output_holds(kind):
    model = build(kind, attn_implementation="eager")
    batch = example(model) | {"output_hidden_states": True, "output_attentions": True}
    named, plain = model(**batch), model(**batch, return_dict=False)
    assert type(plain) is tuple and len(plain) == len(named.to_tuple())
    for value, other in zip(plain, named.to_tuple(), strict=True):
        torch.testing.assert_close(value, other, **EXACT)
    model.config.return_dict = False
    assert type(model(**batch)) is tuple


@torch.no_grad()
def test_hidden_states_and_attentions_are_one_a_layer_and_the_embeddings(kind):
    model = build(kind, attn_implementation="eager")
    plain = model(**example(model))
    assert plain.hidden_states is None and plain.attentions is None
    for by_config in (False, True):
        model.config.output_hidden_states = model.config.output_attentions = by_config
        asked = {} if by_config else {"output_hidden_states": True, "output_attentions": True}
        output = model(**example(model), **asked)
        layers = model.config.num_hidden_layers
        assert len(output.hidden_states) == layers + 1 and len(output.attentions) == layers
        tokens = output.hidden_states[0].shape[-2]
        for state, attention in zip(output.hidden_states[1:], output.attentions, strict=True):
            assert state.shape[-2:] == (tokens, model.config.hidden_size)
            assert attention.shape[-3:] == (model.config.num_attention_heads, tokens, tokens)
            assert state.shape[:-2] == attention.shape[:-3]
            torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
        final = model.base_model.layernorm(output.hidden_states[-1])
        if kind is CANModel:
            torch.testing.assert_close(output.last_hidden_state, final, **EXACT)
        if kind is CANForImageClassification:
            torch.testing.assert_close(output.logits, model.classifier(final[:, 1:].mean(1)), **EXACT)


@torch.no_grad()
def test_asking_for_more_changes_no_number(kind):
    model = build(kind, attn_implementation="eager")
    plain = model(**example(model))
    more = model(**example(model), output_hidden_states=True, output_attentions=True)
    for name, value in plain.items():
        torch.testing.assert_close(value, more[name], **EXACT)


@torch.no_grad()
def test_an_image_gives_the_same_alone_and_in_a_batch(kind):
    model = build(kind, contrastive_loss_weight=0)  # which compares the images of a batch
    batch = example(model)
    per_image = [name for name, value in model(**batch).items() if value.ndim]
    assert per_image
    whole = model(**batch)
    for index in range(4):
        alone = model(**{name: value[index : index + 1] for name, value in batch.items()})
        for name in per_image:
            torch.testing.assert_close(alone[name][0], whole[name][index], **CLOSE)


@torch.no_grad()
def test_eager_and_sdpa_agree_in_every_output(kind):
    model = build(kind)
    model.set_attn_implementation("eager")
    eager = model(**example(model))
    model.set_attn_implementation("sdpa")
    assert_same(model(**example(model)), eager, **CLOSE)


@torch.no_grad()
def test_other_sizes_need_leave_and_leave_the_configuration_alone(kind):
    model = build(kind)
    before = model.config.to_dict()
    larger = inputs(tiny_config(image_size=(64, 40)))  # 40 patches instead of 24
    batch = larger if kind is CANForPreTraining else {"pixel_values": larger["pixel_values"][:, 0]}
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(**batch)
    output = model(**batch, interpolate_pos_encoding=True)
    if kind is CANModel:
        assert output.last_hidden_state.shape == (4, 41, 32)
    assert all(value.isfinite().all() for value in output.values()) and model.config.to_dict() == before
    own = example(model)
    assert_same(model(**own, interpolate_pos_encoding=True), model(**own), **EXACT)
