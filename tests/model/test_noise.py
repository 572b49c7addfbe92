"""The noise term N: a head of its own that starts at nothing, learns, and keeps apart from the pixels."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import inputs, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import run_pretraining
from modeling_can import CANConfig, CANForPreTraining
from modeling_can.modeling_can import patchify
from modeling_can.pretraining.health import reachable_gain
from modeling_can.pretraining.recipe import Recipe
from modeling_can.pretraining.results import noise_limit


def trivial(config, batch, mask) -> torch.Tensor:
    """N of predicting no noise."""
    noise = patchify(batch["noise_level"][:, :, None, None, None] * batch["pixel_noise"], config.patch_shape)
    return noise[mask == 0].square().mean()


def test_it_starts_at_the_loss_of_predicting_no_noise():
    model = tiny_model()
    batch = inputs(model.config, batch_size=8)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.denoising_loss, trivial(model.config, batch, outputs.mask))
    assert not outputs.logits[outputs.mask == 0].any()
    shared = tiny_model(noise_head="shared")(**batch)
    assert shared.denoising_loss > 10 * outputs.denoising_loss


def test_the_prediction_is_sigma_times_that_of_e():
    model = tiny_model()
    torch.nn.init.normal_(model.decoder.noise_head.weight, std=0.1)
    batch, seen = inputs(model.config), []
    model.decoder.noise_head.register_forward_hook(lambda layer, tokens, output: seen.append(output))
    outputs = model(**batch)
    (e,) = seen
    visible = outputs.logits[outputs.mask == 0].view(8, -1, model.config.pixels_per_patch)
    torch.testing.assert_close(visible, batch["noise_level"].view(8, 1, 1) * e)


@pytest.mark.parametrize("norm_noise_loss", [True, False])
def test_the_loss_is_the_sum_that_the_docstring_states(norm_noise_loss):
    model = tiny_model(norm_noise_loss=norm_noise_loss, noise_std_max=0.5)
    config, outputs = model.config, model(**inputs(model.config))
    denoising = outputs.denoising_loss / (0.25 / 3) if norm_noise_loss else outputs.denoising_loss
    expected = (
        config.contrastive_loss_weight * outputs.contrastive_loss
        + config.reconstruction_loss_weight * outputs.reconstruction_loss
        + config.denoising_loss_weight * denoising
    )
    torch.testing.assert_close(outputs.loss, expected)


def test_each_layer_is_for_its_own_patches():
    model = tiny_model()
    torch.nn.init.normal_(model.decoder.noise_head.weight, std=0.1)
    outputs = model(**inputs(model.config))
    layers = model.decoder.head.weight, model.decoder.noise_head.weight
    for kind, expected in ((1, (True, False)), (0, (False, True))):  # 1 = masked
        gradients = torch.autograd.grad(outputs.logits[outputs.mask == kind].sum(), layers, retain_graph=True)
        assert tuple(bool(gradient.any()) for gradient in gradients) == expected


def test_it_learns_where_the_decoder_is_wide_enough():
    model = tiny_model(
        image_size=16, patch_size=4, hidden_size=96, intermediate_size=192, decoder_hidden_size=96,
        decoder_intermediate_size=192, noise_std_max=0.5, denoising_loss_weight=1.0, reconstruction_loss_weight=0.1,
        contrastive_loss_weight=0,
    ).train()  # fmt: skip
    batch = inputs(model.config, batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert outputs.denoising_loss < 0.1 * trivial(model.config, batch, outputs.mask)


@pytest.mark.parametrize("changes", [{"denoising_loss_weight": 0}, {"denoising_loss_weight": 0, "noise_std_max": 0}])
def test_without_the_term_there_is_no_layer_and_nothing_changes(changes):
    own, shared = (tiny_model(noise_head=noise_head, **changes) for noise_head in ("own", "shared"))
    assert own.decoder.noise_head is None
    batch = inputs(own.config)
    if own.config.noise_std_max == 0:
        batch = {name: batch[name] for name in ("pixel_values", "masking_scores")}
    assert torch.equal(own(**batch).logits, shared(**batch).logits)


def test_a_configuration_from_before_is_read_as_the_shared_layer(tmp_path):
    model = tiny_model(noise_head="shared", norm_noise_loss=False)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written.pop("noise_head"), written.pop("norm_noise_loss")) == ("shared", False)
    (tmp_path / "config.json").write_text(json.dumps(written))
    before, info = CANForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (before.config.noise_head, before.config.norm_noise_loss) == ("shared", False)
    batch = inputs(model.config)
    assert torch.equal(before.eval()(**batch).loss, model(**batch).loss)


def test_a_new_configuration_comes_back_as_it_was(tmp_path):
    model = tiny_model()
    torch.nn.init.normal_(model.decoder.noise_head.weight, std=0.1)
    model.save_pretrained(tmp_path)
    assert "decoder.noise_head.weight" in load_file(tmp_path / "model.safetensors")
    again = CANForPreTraining.from_pretrained(tmp_path)
    assert again.config.noise_head == "own" and again.config.norm_noise_loss is True
    batch = inputs(model.config)
    torch.testing.assert_close(again.eval()(**batch).loss, model(**batch).loss)


def test_weights_without_the_layer_give_a_layer_that_predicts_nothing(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: x for name, x in state.items() if "noise_head" not in name}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    again = CANForPreTraining.from_pretrained(tmp_path)
    assert not again.decoder.noise_head.weight.any() and not again.decoder.noise_head.bias.any()


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({"reconstruction_loss_weight": 0}, ["decoder.head"]),
        ({"reconstruction_loss_weight": 0, "mask_ratio": 0}, ["decoder.mask_token", "decoder.head"]),
        ({}, []),
    ],
)
def test_what_is_not_used_is_frozen_and_the_rest_gets_a_gradient(changes, frozen):
    model = tiny_model(**changes)
    assert model.freeze_unused_parameters() == frozen
    torch.nn.init.normal_(model.decoder.noise_head.weight, std=0.1)
    model(**inputs(model.config)).loss.backward()
    for name, parameter in model.named_parameters():
        is_trained = parameter.grad is not None and bool(parameter.grad.any())
        assert is_trained == (not any(name.startswith(part) for part in frozen)) or name.endswith("k_proj.bias"), name


def test_preflight_is_content_with_a_head_that_starts_at_zero(tmp_path, capfd):
    """Which, as the decoder's only use, gives it no gradient in the first step."""
    flags = ["--patch_size=8", "--reconstruction_loss_weight=0", "--max_steps=2", "--probe_dataset_name=none",
             "--per_device_train_batch_size=4", "--dataloader_num_workers=0", "--preflight"]  # fmt: skip
    found = run_pretraining.main([*flags, f"--output_dir={tmp_path}"])
    output = capfd.readouterr().out
    assert found == {"ready": True} and "ok    every parameter gets a gradient" in output
    assert "the noise can be weakened by 1.8 dB at most" in output


def test_it_costs_no_more_products():
    flops = []
    for noise_head in ("own", "shared"):
        model = tiny_model(noise_head=noise_head)
        with FlopCounterMode(display=False) as counter:
            model(**inputs(model.config)).loss.backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


@pytest.mark.parametrize(("widths", "gain"), [((96, 64), 1.76), ((32, 64), 0.79), ((256, 192), math.inf)])
def test_the_widths_limit_what_can_be_removed(widths, gain):
    """Against the least squares fit of a map of this rank to the identity."""
    config = tiny_config(hidden_size=widths[0], decoder_hidden_size=widths[1], patch_size=8)
    assert reachable_gain(config) == pytest.approx(gain, abs=0.01)
    if math.isfinite(gain):
        noise = torch.randn(20000, config.pixels_per_patch, generator=torch.Generator().manual_seed(0))
        directions = torch.linalg.qr(torch.randn(config.pixels_per_patch, min(widths)))[0]
        left = noise - noise @ directions @ directions.T
        assert -10 * torch.log10(left.square().mean()).item() == pytest.approx(gain, abs=0.05)


def test_the_advice_names_what_the_run_can_change():
    """The encoder and the patches of given weights are what they are."""
    out = "denoising_loss_weight 0 leaves the term out"
    for (width, decoder_width), start, said, advice in [
        ((768, 512), None, "decoder_hidden_size=512 is narrower", "lower patch_size, or raise decoder_hidden_size; "),
        ((384, 256), None, "hidden_size=384 and decoder_hidden_size=256 are", "patch_size, or raise hidden_size and "),
        ((384, 256), "weights", "hidden_size=384 and", "raise decoder_hidden_size; "),
        ((384, 384), "weights", "hidden_size=384 and", f"values of a patch; {out}"),
    ]:
        config = CANConfig(hidden_size=width, num_attention_heads=4, decoder_hidden_size=decoder_width)
        text = noise_limit(Recipe(config=config, max_steps=1, model_name_or_path=start))
        assert said in text and advice in text and text.endswith(f"; {out}")
        assert start is None or "patch_size" not in text
    without = CANConfig(hidden_size=384, num_attention_heads=4, denoising_loss_weight=0)
    assert noise_limit(Recipe(config=without, max_steps=1)) is None


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="noise_head='none' is not one of own, shared"):
        tiny_config(noise_head="none")


def test_drawn_noise_is_normal_with_a_level_of_its_own_for_each_view():
    model = tiny_model(noise_std_max=0.2)
    noise, level = model._draw_noise(torch.zeros(400, 2, 3, 32, 48), None, None)
    assert 0 <= level.min() < 0.01 and 0.19 < level.max() <= 0.2
    assert level.mean().item() == pytest.approx(0.1, abs=0.01) and (level[:, 0] != level[:, 1]).any()
    e = noise / level[:, :, None, None, None]
    assert abs(e.mean()) < 0.01 and e.std().item() == pytest.approx(1, abs=0.01)
    assert (e.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.002)
