"""The model: randomness, masking, positions, initialization, special cases, the transformers API."""

import copy
import inspect
import json
import logging

import pytest
import torch
from testing_utils import inputs, tiny_config, tiny_model, without_noise
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.initialization import no_init_weights

from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining, CANModel
from modeling_can.configuration_can import MAE, SIMCLR
from modeling_can.modeling_can import patchify, random_masking, resize_positions, sincos_positions, unpatchify
from modeling_can.optimization import parameter_groups


SQUARE = dict(image_size=32, patch_size=8)


# --- Randomness ------------------------------------------------------------------------------------------------------


def test_given_randomness_gives_the_same_numbers_twice_and_leaves_the_input_alone():
    model = tiny_model().train()
    batch = inputs(model.config)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    first, second = model(**batch), model(**batch)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, tensor in batch.items():
        assert torch.equal(tensor, before[name]), name


def test_drawn_randomness_differs_between_views_and_calls():
    model = tiny_model()
    pixels = inputs(model.config)["pixel_values"]
    first, second = model(pixels), model(pixels)
    assert first.loss != second.loss
    assert not torch.equal(first.mask[:, 0], first.mask[:, 1])
    assert (first.mask.sum(-1) == model.config.num_patches // 2).all()


def test_masked_pixels_reach_neither_encoder_nor_denoising_term():
    model = tiny_model()
    batch = inputs(model.config)
    reference = model(**batch)
    masked = unpatchify(reference.mask[..., None].expand(-1, -1, -1, model.config.pixels_per_patch), (8, 8), (4, 6), 3)
    changed = model(**{**batch, "pixel_values": batch["pixel_values"] + 5 * masked})
    assert torch.equal(changed.logits, reference.logits)
    assert torch.equal(changed.denoising_loss, reference.denoising_loss)
    assert torch.equal(changed.contrastive_loss, reference.contrastive_loss)
    assert changed.reconstruction_loss > reference.reconstruction_loss


def test_noise_reaches_the_encoder_and_its_level_the_decoder():
    model = tiny_model()
    batch = inputs(model.config)
    reference = model(**batch)
    louder = model(**{**batch, "pixel_noise": -batch["pixel_noise"]})
    assert not torch.equal(louder.image_embeds, reference.image_embeds)
    quiet = {**batch, "pixel_noise": torch.zeros_like(batch["pixel_noise"])}
    one, other = model(**quiet), model(**{**quiet, "noise_level": 0 * batch["noise_level"]})
    assert torch.equal(one.image_embeds, other.image_embeds)  # no noise, whatever the level
    assert (one.logits - other.logits).abs().amax(dim=(0, 1, 3)).min() > 1e-3  # yet every patch is told the level


def test_without_noise_level_embedding_the_decoder_is_not_told():
    model = tiny_model(noise_level_embedding=False)
    batch = inputs(model.config)
    batch["pixel_noise"] = torch.zeros_like(batch["pixel_noise"])
    one, other = model(**batch), model(**{**batch, "noise_level": 0 * batch["noise_level"]})
    assert torch.equal(one.logits, other.logits) and one.denoising_loss is not None


def test_noise_level_moves_its_sinusoid_by_much_more_than_a_per_cent():
    embedding = tiny_model().decoder.noise_level_embedding
    low, middle, high = embedding.sinusoidal(torch.tensor([0.0, 0.025, 0.05]))
    assert (high - low).norm() / low.norm() > 0.3
    assert (middle - low).norm() / low.norm() > 0.3


def test_random_masking_keeps_the_smallest_scores_in_image_order():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    ids_keep, ids_restore, mask = random_masking(scores, 2)
    assert ids_keep.tolist() == [[1, 3]] and mask.tolist() == [[1, 0, 1, 0]]
    assert ids_restore.tolist() == [[2, 0, 3, 1]]  # visible 1, 3, then masked 0, 2


# --- Features --------------------------------------------------------------------------------------------------------


def test_encoder_is_unmasked_ordered_and_deterministic_by_default():
    model = CANModel(tiny_config())
    pixels = inputs(model.config)["pixel_values"][:, 0]
    outputs = model(pixels)
    assert outputs.last_hidden_state.shape == (4, 25, 32) and outputs.mask is None
    assert torch.equal(outputs.last_hidden_state, model(pixels).last_hidden_state)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 1:].mean(1))
    masked = model(pixels, mask_ratio=0)
    assert torch.equal(masked.last_hidden_state, outputs.last_hidden_state) and masked.mask.sum() == 0


def test_masked_encoder_equals_the_encoder_on_the_visible_patches_alone():
    model = CANModel(tiny_config()).eval()
    batch = inputs(model.config)
    pixels, scores = batch["pixel_values"][:, 0], batch["masking_scores"][:, 0]
    outputs = model(pixels, mask_ratio=0.5, masking_scores=scores)
    for i in range(len(pixels)):
        visible = (outputs.mask[i] == 0).nonzero()[:, 0]
        patches = patchify(pixels[i], (8, 8))[visible]
        positions = model.embeddings.position_embeddings[0]
        tokens = model.embeddings.patch_embeddings(patches) + positions[1:][visible]
        hidden = torch.cat([model.embeddings.cls_token[0] + positions[:1], tokens])[None]
        for layer in model.layers:
            hidden = layer(hidden)
        torch.testing.assert_close(outputs.last_hidden_state[i], model.layernorm(hidden)[0], atol=1e-5, rtol=1e-5)


def test_patchify_is_row_column_channel_and_unpatchify_inverts_it():
    pixels = torch.arange(2 * 3 * 32 * 48).float().reshape(2, 3, 32, 48)
    patches = patchify(pixels, (8, 4))
    assert patches.shape == (2, 48, 96)
    assert patches[1, 13, (5 * 4 + 2) * 3 + 1] == pixels[1, 1, 8 + 5, 4 + 2]  # patch 13 = row 1, column 1 of 12
    assert torch.equal(unpatchify(patches, (8, 4), (4, 12), 3), pixels)


# --- Positions -------------------------------------------------------------------------------------------------------


def sensitivity_to_order(model: CANForPreTraining) -> float:
    """How far pooled features move when the patches of an image are shuffled."""
    config = model.config
    pixels = inputs(config)["pixel_values"][:, 0]
    order = torch.randperm(config.num_patches, generator=torch.Generator().manual_seed(2))
    shuffled = unpatchify(patchify(pixels, (8, 8))[:, order], (8, 8), config.grid_shape, 3)
    with torch.no_grad():
        return (model.can(pixels).pooler_output - model.can(shuffled).pooler_output).abs().max().item()


def test_shuffling_the_patches_changes_the_features_however_the_model_came_to_be(tmp_path):
    model = tiny_model()
    assert sensitivity_to_order(model) > 1e-3

    model.save_pretrained(tmp_path)
    loaded = CANForPreTraining.from_pretrained(tmp_path).eval()
    assert sensitivity_to_order(loaded) == sensitivity_to_order(model)
    frozen = {"can.embeddings.position_embeddings", "decoder.position_embeddings"}
    assert frozen.isdisjoint(dict(loaded.named_parameters())) and frozen <= set(loaded.state_dict())

    with torch.device("meta"):
        empty = CANForPreTraining(model.config)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert sensitivity_to_order(empty.eval()) == sensitivity_to_order(model)

    for module in empty.modules():
        module._is_hf_initialized = False
    for tensor in empty.state_dict().values():
        tensor.fill_(float("nan"))
    empty.init_weights()  # after a meta-device construction without a checkpoint
    assert sensitivity_to_order(empty) > 1e-3


def test_position_tables_are_the_closed_form_for_any_grid():
    table = sincos_positions((3, 5), 8)
    assert table.shape == (1, 16, 8) and not table[0, 0].any()
    frequencies = torch.tensor([1.0, 0.01])
    for row in range(3):
        for column in range(5):
            x, y = column * frequencies, row * frequencies
            expected = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()])
            torch.testing.assert_close(table[0, 1 + row * 5 + column], expected)
    model = tiny_model()
    for module, width in ((model.can.embeddings, 32), (model.decoder, 16)):
        assert torch.equal(module.position_embeddings, sincos_positions((4, 6), width))


def test_positions_are_resized_in_two_dimensions():
    # Away from the border a plane stays one, to the 0.05 of torch's bicubic kernel; a table resampled along the
    # flattened sequence would be off by whole rows.
    table = torch.zeros(1, 1 + 8 * 8, 2)
    table[0, 1:, 0] = torch.arange(8.0).repeat_interleave(8)
    table[0, 1:, 1] = torch.arange(8.0).repeat(8)
    grid = resize_positions(table, (8, 8), (16, 24))[0, 1:].unflatten(0, (16, 24))
    rows, columns = (torch.arange(16) + 0.5) / 2 - 0.5, (torch.arange(24) + 0.5) / 3 - 0.5
    torch.testing.assert_close(grid[5:11, 7:17, 0], rows[5:11, None].expand(6, 10), atol=0.05, rtol=0)
    torch.testing.assert_close(grid[5:11, 7:17, 1], columns[None, 7:17].expand(6, 10), atol=0.05, rtol=0)
    assert resize_positions(table, (8, 8), (8, 8)) is table


def test_other_sizes_work_in_encoder_and_decoder_when_asked_for():
    model = tiny_model()
    pixels = torch.randn(2, 2, 3, 64, 40)
    outputs = model(pixels, interpolate_pos_encoding=True)
    assert outputs.logits.shape == (2, 2, 40, 192) and outputs.loss.isfinite()
    with pytest.raises(ValueError, match="64 x 40.*interpolate_pos_encoding=True"):
        model(pixels)
    with pytest.raises(ValueError, match="64 x 42, not a multiple"):
        model.can(torch.randn(2, 3, 64, 42), interpolate_pos_encoding=True)
    # At its own size, interpolation changes nothing.
    batch = inputs(model.config)
    assert torch.equal(model(**batch).loss, model(**batch, interpolate_pos_encoding=True).loss)


# --- Initialization and training -------------------------------------------------------------------------------------


def test_initial_weights_follow_maes_scheme():
    torch.manual_seed(0)
    model = CANForPreTraining(tiny_config(hidden_size=128, decoder_hidden_size=64))
    for name, module in model.named_modules():
        if name == "decoder.noise_head":
            assert not module.weight.any() and not module.bias.any()
        elif isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5  # Xavier-uniform: U[-bound, bound]
            assert module.weight.abs().max() <= bound, name
            assert module.weight.detach().std() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert module.bias.abs().max() == 0, name
    for token in (model.can.embeddings.cls_token, model.decoder.mask_token):
        assert token.detach().std() == pytest.approx(0.02, rel=0.4) and token.abs().max() > 0


@pytest.mark.slow
def test_one_step_moves_every_trainable_parameter_of_the_default_config():
    torch.manual_seed(0)
    model = CANForPreTraining(CANConfig())  # ViT-B/16 at 224
    assert model.freeze_unused_parameters() == []
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 2, 3, 224, 224)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        SIMCLR,
        MAE,
        dict(contrastive_loss_weight=0),
        dict(reconstruction_loss_weight=0),
        dict(denoising_loss_weight=0),
        dict(denoising_loss_weight=0, noise_std_max=0),
        dict(reconstruction_loss_weight=0, mask_ratio=0),
    ],
)
def test_what_the_objective_leaves_unused_is_frozen_and_nothing_else(changes):
    model = tiny_model(**changes)
    model.freeze_unused_parameters()
    outputs = model(inputs(model.config)["pixel_values"])
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    weights = model.config
    assert (outputs.contrastive_loss is None) == (weights.contrastive_loss_weight == 0)
    assert (outputs.image_embeds is None) == (weights.contrastive_loss_weight == 0)
    assert (outputs.reconstruction_loss is None) == (weights.reconstruction_loss_weight == 0)
    assert (outputs.denoising_loss is None) == (weights.denoising_loss_weight == 0)
    assert (outputs.logits is None) == (not weights.uses_decoder)


def test_gradient_checkpointing_and_drop_path_train():
    model = tiny_model().train()
    batch = inputs(model.config)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    calls = []
    model.can.layers[0].attention.register_forward_hook(lambda *_: calls.append("attention"))
    model(**batch).loss.backward()
    assert len(calls) == 2  # once more in the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    dropped = tiny_model(drop_path_rate=0.5)
    assert torch.equal(dropped(**batch).loss, tiny_model()(**batch).loss)  # not in evaluation
    dropped.train()
    assert dropped(**batch).loss != dropped(**batch).loss


# --- Special cases ---------------------------------------------------------------------------------------------------


def copy_encoder(can: CANModel, vit) -> None:
    """CAN's encoder weights into transformers' ViT layout, the patch projection as a convolution."""
    state = can.state_dict()
    weight = state.pop("embeddings.patch_embeddings.weight")
    patch = can.config.patch_shape[0]
    weight = weight.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)
    state["embeddings.patch_embeddings.projection.weight"] = weight
    state["embeddings.patch_embeddings.projection.bias"] = state.pop("embeddings.patch_embeddings.bias")
    vit.load_state_dict(state)


def vit_settings(config):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
             "patch_size", "layer_norm_eps")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def test_mae_limit_equals_transformers_vit_mae_in_loss_and_gradient():
    model = tiny_model(**SQUARE, **MAE)
    config = model.config
    decoder = {name: getattr(config, name) for name in config.to_dict() if name.startswith("decoder_")}
    mae = ViTMAEForPreTraining(ViTMAEConfig(**vit_settings(config), **decoder, mask_ratio=0.75)).eval()
    copy_encoder(model.can, mae.vit)
    renamed = {"embed": "decoder_embed", "position_embeddings": "decoder_pos_embed", "layers": "decoder_layers",
               "layernorm": "decoder_norm", "head": "decoder_pred", "mask_token": "mask_token"}  # fmt: skip
    state = {}
    for name, tensor in model.decoder.state_dict().items():
        first, *rest = name.split(".")
        state[".".join([renamed[first], *rest])] = tensor
    mae.decoder.load_state_dict(state)

    batch = without_noise(inputs(config))
    outputs = model(**batch)
    expected = mae(batch["pixel_values"].flatten(0, 1), noise=batch["masking_scores"].flatten(0, 1))
    torch.testing.assert_close(outputs.mask.flatten(0, 1), expected.mask)
    torch.testing.assert_close(outputs.logits.flatten(0, 1), expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=0)

    outputs.loss.backward()
    expected.loss.backward()
    pairs = [(model.can.layers, mae.vit.layers), (model.can.layernorm, mae.vit.layernorm)]
    pairs += [(model.decoder.layers, mae.decoder.decoder_layers), (model.decoder.head, mae.decoder.decoder_pred)]
    pairs += [(model.decoder.embed, mae.decoder.decoder_embed)]
    compared = 0
    for ours, theirs in pairs:
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared == 4 * 16 + 6
    weight = mae.vit.embeddings.patch_embeddings.projection.weight.grad
    ours = model.can.embeddings.patch_embeddings.weight.grad
    torch.testing.assert_close(ours, weight.permute(0, 2, 3, 1).flatten(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.can.embeddings.cls_token.grad, mae.vit.embeddings.cls_token.grad, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(model.decoder.mask_token.grad, mae.decoder.mask_token.grad, atol=1e-5, rtol=1e-4)


def test_simclr_limit_equals_simclr_on_transformers_vit():
    model = tiny_model(**SQUARE, **SIMCLR)
    vit = ViTModel(ViTConfig(**vit_settings(model.config)), add_pooling_layer=False).eval()
    copy_encoder(model.can, vit)
    pixels = inputs(model.config)["pixel_values"]
    tokens = vit(pixels.flatten(0, 1)).last_hidden_state
    torch.testing.assert_close(model.can(pixels.flatten(0, 1)).last_hidden_state, tokens, atol=1e-5, rtol=1e-5)

    head = model.projection_head
    embeds = head.fc2(torch.relu(head.fc1(tokens[:, 1:].mean(1))))
    embeds = embeds / embeds.norm(dim=1, keepdim=True)
    first, second = embeds[0::2], embeds[1::2]
    # SimCLR as its authors wrote it: two blocks of logits for each direction, the diagonal of the same view excluded.
    big = torch.eye(len(first)) * 1e9
    labels = torch.arange(len(first))
    losses = [
        torch.nn.functional.cross_entropy(torch.cat([a @ b.T / 0.1, a @ a.T / 0.1 - big], dim=1), labels)
        for a, b in ((first, second), (second, first))
    ]
    torch.testing.assert_close(model(pixels).loss, sum(losses) / 2, atol=1e-5, rtol=0)


# --- The transformers API --------------------------------------------------------------------------------------------


def test_auto_classes_load_every_head_from_one_pretraining_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CANConfig)
    pixels = inputs(model.config)["pixel_values"]
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, CANModel)
    assert torch.equal(encoder(pixels[:, 0]).pooler_output, model.can(pixels[:, 0]).pooler_output)
    full = AutoModelForPreTraining.from_pretrained(tmp_path)
    batch = inputs(model.config)
    assert torch.equal(full(**batch).loss, model(**batch).loss)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert isinstance(classifier, CANForImageClassification)
    outputs = classifier(pixels[:, 0], labels=torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(outputs.logits, classifier.classifier(encoder(pixels[:, 0]).pooler_output))
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(outputs.loss, expected)


def test_config_survives_json(tmp_path):
    config = tiny_config(image_size=[32, 48], patch_size=(8, 8), projection_hidden_size=24)
    config.save_pretrained(tmp_path)
    loaded = CANConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.image_size == (32, 48) and loaded.grid_shape == (4, 6) and loaded.projection_hidden_size == 24
    changed, others = CANConfig.from_pretrained(tmp_path, image_size=[64, 48], unknown=1, return_unused_kwargs=True)
    assert changed.image_size == (64, 48) and others == {"unknown": 1}


def test_hidden_states_attentions_and_tuples():
    model = tiny_model()
    model.set_attn_implementation("eager")
    batch = inputs(model.config)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(4, 2, 13, 32)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(4, 2, 2, 13, 13)] * 2
    assert torch.equal(model(**batch, return_dict=False)[0], outputs.loss)
    encoder = model.can(batch["pixel_values"][:, 0], output_hidden_states=True)
    torch.testing.assert_close(model.can.layernorm(encoder.hidden_states[-1]), encoder.last_hidden_state)
    some = model(**batch, output_hidden_states=[0, -1]).hidden_states
    assert some[1] is None and torch.equal(some[0], outputs.hidden_states[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()  # flex attention has no backward pass on CPU
def test_attention_implementations_agree(implementation):
    model = tiny_model()
    model.set_attn_implementation("eager")
    batch = inputs(model.config)
    expected = model(**batch).loss
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(**batch).loss, expected, atol=1e-5, rtol=1e-5)


def test_torch_compile_fullgraph_gives_the_same_loss_and_gradient():
    model = tiny_model()
    batch = inputs(model.config)
    loss = model(**batch).loss
    loss.backward()
    expected = copy.deepcopy(model.decoder.embed.weight.grad)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch).loss.backward()
    torch.testing.assert_close(model.decoder.embed.weight.grad, expected)


def test_device_map_and_half_precision_loading(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    placed = CANForPreTraining.from_pretrained(tmp_path, device_map="cpu").eval()
    batch = inputs(model.config)
    assert torch.equal(placed(**batch).loss, model(**batch).loss)
    half = CANForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    outputs = half(**batch)
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.05)  # bf16 holds 3 digits


# --- Views and errors ------------------------------------------------------------------------------------------------


def test_one_view_works_without_the_contrastive_term_and_says_so_with_it():
    model = tiny_model(contrastive_loss_weight=0)
    batch = inputs(model.config, num_views=1)
    outputs = model(**batch)
    assert outputs.logits.shape == (4, 1, 24, 192) and outputs.loss.isfinite()
    with pytest.raises(ValueError, match="1 view.*contrastive_loss_weight=0.03.*two views"):
        tiny_model()(**batch)


def test_views_beyond_two_are_views_like_the_others():
    model = tiny_model()
    batch = inputs(model.config, num_views=4)
    outputs = model(**batch)
    assert outputs.logits.shape == (4, 4, 24, 192) and outputs.image_embeds.shape == (4, 4, 8)
    pair = model(**{name: value[:, 1:3] for name, value in batch.items()})  # each is masked and noised by itself
    torch.testing.assert_close(outputs.image_embeds[:, 1:3], pair.image_embeds)
    torch.testing.assert_close(outputs.logits[:, 1:3], pair.logits)
    outputs.loss.backward()
    assert model.projection_head.fc1.weight.grad.abs().sum() > 0


def test_wrong_shapes_are_refused_with_the_fix():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 48\).*torch.stack"):
        model(torch.randn(2, 3, 32, 48))
    with pytest.raises(ValueError, match="1 channels.*num_channels=3"):
        model(torch.randn(2, 2, 1, 32, 48))
    with pytest.raises(ValueError, match="batch of 1"):
        model(torch.randn(1, 2, 3, 32, 48))
    with pytest.raises(ValueError, match="single images"):
        model.can(torch.randn(2, 2, 3, 32, 48))
    with pytest.raises(ValueError, match="mask_ratio=1"):
        model.can(torch.randn(2, 3, 32, 48), mask_ratio=1)
    with pytest.raises(ValueError, match="masking_scores without mask_ratio"):
        model.can(torch.randn(2, 3, 32, 48), masking_scores=torch.rand(2, 24))
    for name, shape in {"masking_scores": (2, 2, 20), "pixel_noise": (2, 1, 3, 32, 48), "noise_level": (2, 1)}.items():
        with pytest.raises(ValueError, match=f"{name} has shape"):
            model(torch.randn(2, 2, 3, 32, 48), **{name: torch.rand(shape)})
    with pytest.raises(ValueError, match="masking_scores has shape"):
        model(torch.randn(2, 2, 3, 32, 48), masking_scores=torch.rand(2, 24))
    with pytest.raises(ValueError, match="uint8.*processor"):
        model.can(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8.*processor"):
        model(torch.zeros(2, 2, 3, 32, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match="noise_std_max > 0"):
        tiny_model(**MAE)(torch.randn(2, 2, 3, 32, 48), noise_level=torch.rand(2, 2))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_size=225, patch_size=16), "image_size=225 is not a multiple of patch_size=16; use 224 or 240"),
        (dict(image_size=(32, 50)), "not a multiple"),
        (dict(image_size=[32, 48, 3]), "3 entries"),
        (dict(hidden_size=30, num_attention_heads=4), "hidden_size=30 is not a multiple of num_attention_heads=4"),
        (dict(decoder_hidden_size=18, decoder_num_attention_heads=2), "decoder_hidden_size=18 is not a multiple of 4"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0 must be at least 1"),
        (dict(mask_ratio=1.0), r"mask_ratio=1.0 is outside \[0, 1\); give a number from 0 to below 1"),
        (dict(mask_ratio=-0.1), r"mask_ratio=-0.1 is outside \[0, 1\)"),
        (dict(mask_ratio=float("nan")), "mask_ratio=nan"),
        (dict(mask_ratio=0), "mask_ratio=0 hides none of the 24 patches.*reconstruction_loss_weight=0"),
        (dict(noise_std_max=0), "noise_std_max=0 has no noise to predict.*denoising_loss_weight=0"),
        (dict(noise_std_max=-1), "noise_std_max=-1"),
        (dict(temperature=0), "temperature=0 must be finite and greater than 0"),
        (dict(layer_norm_eps=-1), "layer_norm_eps=-1"),
        (dict(hidden_act="gellu"), "hidden_act='gellu' is not known; did you mean 'gelu'"),
        (dict(denoising_loss_weight=-0.3), "denoising_loss_weight=-0.3"),
        (
            dict(contrastive_loss_weight=0, reconstruction_loss_weight=0, denoising_loss_weight=0),
            "all three loss weights are 0",
        ),
        (dict(mask_ration=0.75), "no field 'mask_ration'; did you mean 'mask_ratio'"),
    ],
)
def test_config_refuses_what_cannot_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CANConfig.from_pretrained(tmp_path, **changes)


@pytest.mark.parametrize("width, heads, advised", [(32, 3, 36), (30, 3, 36), (30, 5, 40), (18, 2, 20), (30, 4, 32)])
def test_the_advised_width_is_accepted(width, heads, advised):
    with pytest.raises(ValueError, match=f"hidden_size={width} is not a multiple of .*use (a width of )?{advised}"):
        tiny_config(hidden_size=width, num_attention_heads=heads)
    assert tiny_config(hidden_size=advised, num_attention_heads=heads).hidden_size == advised


def test_a_foreign_key_in_a_file_is_kept_with_a_warning(tmp_path, caplog):
    """Beside what a user writes: a folder that another library added to, or that was converted, is not locked."""
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_epsilon": 1e-5, "in_channels": 3}))
    transformers_logger = logging.getLogger("modeling_can.configuration_can")
    transformers_logger.addHandler(caplog.handler)
    config, unused = CANConfig.from_pretrained(tmp_path, return_unused_kwargs=True)
    transformers_logger.removeHandler(caplog.handler)
    assert config.layer_norm_epsilon == 1e-5 and config.layer_norm_eps == tiny_config().layer_norm_eps and not unused
    assert "'layer_norm_epsilon', which CANConfig does not know; it has 'layer_norm_eps'" in caplog.text
    config.save_pretrained(tmp_path / "again")
    assert CANConfig.from_pretrained(tmp_path / "again").layer_norm_epsilon == 1e-5
    with pytest.raises(ValueError, match="did you mean 'layer_norm_eps'"):
        CANConfig.from_pretrained(tmp_path, layer_norm_epsilon=1e-5)


def test_position_tables_are_there_before_any_initialization():
    with no_init_weights():
        model = CANForPreTraining(tiny_config())
    assert torch.equal(model.can.embeddings.position_embeddings, sincos_positions((4, 6), 32))
    assert torch.equal(model.decoder.position_embeddings, sincos_positions((4, 6), 16))


def test_classes_carry_the_public_signatures():
    forward = inspect.signature(CANForPreTraining.forward).parameters
    assert list(forward)[1:6] == [
        "pixel_values", "pixel_noise", "noise_level", "masking_scores", "interpolate_pos_encoding",
    ]  # fmt: skip


def test_terms_are_the_losses_to_be_computed():
    model = tiny_model()
    batch = inputs(model.config, 4)
    whole = model(**batch)
    none = model(**batch, terms=())
    assert none.loss is None and none.logits is None and torch.equal(none.image_embeds, whole.image_embeds)
    for name in ("contrastive", "reconstruction", "denoising"):
        one = model(**batch, terms=(name,))
        assert torch.equal(one[f"{name}_loss"], whole[f"{name}_loss"])
        assert one.loss == model.config.loss_weights[f"{name}_loss"] * one[f"{name}_loss"]
        assert (
            sum(one.get(f"{other}_loss") is not None for other in ("contrastive", "reconstruction", "denoising")) == 1
        )
    with pytest.raises(ValueError, match="names 'reconstuction', which is not one of contrastive, reconstruction"):
        model(**batch, terms=("reconstuction",))
