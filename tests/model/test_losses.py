"""The three terms against loops transcribed from the equations of the method."""

import math

import pytest
import torch
from testing_utils import inputs, tiny_model

from modeling_can.losses import contrastive_loss


def info_nce_by_loops(embeds, temperature):
    """The mean over ordered pairs of views of -log(e_ij / (e_ij + sum of e_ik of other images)), e = exp(z z / t)."""
    embeds, terms = embeds.double(), []
    for n, views in enumerate(embeds):
        for i in range(len(views)):
            others = [z for m, theirs in enumerate(embeds) if m != n for z in theirs]
            negatives = sum(math.exp(float(views[i] @ z) / temperature) for z in others)
            for j in range(len(views)):
                if j != i:
                    positive = math.exp(float(views[i] @ views[j]) / temperature)
                    terms.append(-math.log(positive / (positive + negatives)))
    return sum(terms) / len(terms)


def pixel_losses_by_loops(logits, clean, noise, mask, patch):
    """Mean over masked patches of the squared error to the clean pixels; over visible ones to sigma * e."""
    batch, views, channels, height, width = clean.shape
    reconstruction, denoising = [], []
    for b in range(batch):
        for v in range(views):
            for index in range(logits.shape[2]):
                row, column = divmod(index, width // patch)
                masked = bool(mask[b, v, index])
                target, error = (clean if masked else noise)[b, v], []
                for y in range(patch):
                    for x in range(patch):
                        for c in range(channels):
                            wanted = target[c, row * patch + y, column * patch + x]
                            got = logits[b, v, index, (y * patch + x) * channels + c]
                            error.append(float(got - wanted) ** 2)
                (reconstruction if masked else denoising).append(sum(error) / len(error))
    return sum(reconstruction) / len(reconstruction), sum(denoising) / len(denoising)


def test_losses_equal_loops_from_the_equations():
    model = tiny_model(noise_head="shared", norm_noise_loss=False)  # the paper's
    batch = inputs(model.config, batch_size=3)
    outputs = model(**batch)
    noise = batch["noise_level"][:, :, None, None, None] * batch["pixel_noise"]
    reconstruction, denoising = pixel_losses_by_loops(
        outputs.logits.detach(), batch["pixel_values"], noise, outputs.mask, patch=8
    )
    contrastive = info_nce_by_loops(outputs.image_embeds.detach(), model.config.temperature)
    assert outputs.contrastive_loss.item() == pytest.approx(contrastive, abs=1e-5)
    assert outputs.reconstruction_loss.item() == pytest.approx(reconstruction, abs=1e-5)
    assert outputs.denoising_loss.item() == pytest.approx(denoising, abs=1e-5)
    assert outputs.loss.item() == pytest.approx(0.03 * contrastive + 0.67 * reconstruction + 0.3 * denoising, abs=1e-5)


@pytest.mark.parametrize("num_views", [2, 3, 5])
def test_info_nce_of_any_number_of_views_equals_loops(num_views):
    embeds = torch.nn.functional.normalize(torch.randn(4, num_views, 8), dim=-1)
    assert contrastive_loss(embeds, 0.2).item() == pytest.approx(info_nce_by_loops(embeds, 0.2), abs=1e-5)


def test_two_views_are_simclrs_nt_xent_to_the_last_bit():
    embeds = torch.nn.functional.normalize(torch.randn(6, 2, 8), dim=-1)
    rows = embeds.flatten(0, 1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(float("-inf"))  # all but itself are in the denominator
    assert torch.equal(contrastive_loss(embeds, 0.1), torch.nn.functional.cross_entropy(logits, torch.arange(12) ^ 1))


def test_further_views_of_an_image_are_not_its_negatives():
    same = torch.eye(3)[:, None].expand(3, 4, 3)  # all views of an image alike, all images apart
    assert contrastive_loss(same, 0.05).item() < 1e-6
    embeds = torch.nn.functional.normalize(torch.randn(3, 4, 8), dim=-1)
    pairs = [contrastive_loss(embeds[:, [i, j]], 0.1) for i in range(4) for j in range(4) if i < j]
    assert contrastive_loss(embeds, 0.1) > torch.stack(pairs).mean()  # the views of other images are more negatives


def test_one_view_has_no_positive():
    with pytest.raises(ValueError, match="got 1; give pixel_values of shape"):
        contrastive_loss(torch.ones(3, 1, 8), 0.1)


def test_norm_pix_loss_normalizes_the_reconstruction_target_alone():
    raw, normalized = tiny_model(), tiny_model(norm_pix_loss=True)
    batch = inputs(raw.config)
    a, b = raw(**batch), normalized(**batch)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.denoising_loss, b.denoising_loss)
    patches = batch["pixel_values"].unfold(3, 8, 8).unfold(4, 8, 8)  # (B, V, C, rows, columns, 8, 8)
    patches = patches.permute(0, 1, 3, 4, 5, 6, 2).reshape(*b.mask.shape, -1)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = ((b.logits - target) ** 2).mean(-1)[b.mask.bool()].mean()
    torch.testing.assert_close(b.reconstruction_loss, expected)


def test_swapping_the_views_gives_the_same_info_nce():
    embeds = torch.nn.functional.normalize(torch.randn(5, 2, 8), dim=-1)
    torch.testing.assert_close(contrastive_loss(embeds.flip(1), 0.1), contrastive_loss(embeds, 0.1))


@pytest.mark.parametrize("num_images", [2, 7])
def test_identical_embeddings_give_log_of_all_others(num_images):
    embeds = torch.nn.functional.normalize(torch.ones(num_images, 2, 8), dim=-1)
    assert contrastive_loss(embeds, 0.1).item() == pytest.approx(math.log(2 * num_images - 1), abs=1e-5)


def test_perfect_pairs_give_nearly_nothing_and_wrong_pairs_a_lot():
    embeds = torch.eye(4)[:, None].expand(4, 2, 4)
    assert contrastive_loss(embeds, 0.05).item() < 1e-6
    assert contrastive_loss(embeds.flatten(0, 1).roll(1, 0).unflatten(0, (4, 2)), 0.05).item() > 10


def test_losses_stay_fp32_under_autocast():
    model = tiny_model()
    batch = inputs(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
        embeds = outputs.image_embeds
        assert torch.equal(contrastive_loss(embeds, 0.1), outputs.contrastive_loss)
    for term in (outputs.loss, outputs.contrastive_loss, outputs.reconstruction_loss, outputs.denoising_loss):
        assert term.dtype == torch.float32
    # The same embeddings without autocast: equal to the last bit only if no product was taken in bf16.
    assert torch.equal(contrastive_loss(embeds, 0.1), outputs.contrastive_loss)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4, 2))


def test_one_image_has_no_negatives():
    with pytest.raises(ValueError, match="batch of 1.*at least 2 images"):
        contrastive_loss(torch.ones(1, 2, 8), 0.1)
