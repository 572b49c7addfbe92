"""Many linear heads in one pass."""

import math

import numpy as np
import pytest
import torch
from colored_images import labeled_images
from torch import nn

from modeling_can.evaluation import linear_sgd
from modeling_can.evaluation.encoders import load_encoder
from modeling_can.evaluation.linear_sgd import Heads, linear_probe_sgd, train_step
from modeling_can.evaluation.sets import hold_out


def test_heads_in_one_pass_are_those_trained_one_at_a_time():
    widths, rates, classes = [5, 8], [0.03, 0.3, 1.0], 3
    heads = Heads(widths, len(rates), classes).train()
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=0.9)
    alone = [[nn.Linear(width, classes) for _ in rates] for width in widths]
    norms = [nn.BatchNorm1d(width, eps=1e-6, affine=False) for width in widths]
    optimizers = [[torch.optim.SGD(h.parameters(), lr=0.0, momentum=0.9) for h in group] for group in alone]
    for head in sum(alone, []):
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    for step in range(20):
        torch.manual_seed(step)
        features, labels = [3 + 2 * torch.randn(16, width) for width in widths], torch.randint(classes, (16,))
        rate = 0.5 * (1 + math.cos(step / 20 * math.pi))
        train_step(heads, optimizer, features, labels, torch.tensor(rates).repeat(2), rate)
        for x, norm, group, sgds in zip(features, norms, alone, optimizers, strict=True):
            normal = norm(x)
            for head, sgd, base in zip(group, sgds, rates, strict=True):
                sgd.param_groups[0]["lr"] = base * rate
                sgd.zero_grad()
                nn.functional.cross_entropy(head(normal), labels).backward()
                sgd.step()
    for group, weight, bias in zip(alone, heads.weights, heads.biases, strict=True):
        torch.testing.assert_close(torch.stack([head.weight for head in group]), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.stack([head.bias for head in group]), bias, rtol=1e-5, atol=1e-6)
    features = [torch.randn(4, width) for width in widths]
    expected = [h(norm.eval()(x)) for x, norm, g in zip(features, norms, alone, strict=True) for h in g]
    torch.testing.assert_close(heads.eval()(features), torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def probe(pretrained):
    encoder, train = load_encoder(pretrained("ViT")), labeled_images(80)
    before = encoder.digest()
    probe = linear_probe_sgd(encoder, train, 4, num_epochs=3, batch_size=16)
    assert encoder.digest() == before
    return probe


def test_the_probe_learns_with_heads_for_every_layer_pooling_and_rate(probe):
    kinds = {(row["layers"], row["pooling"]) for row in probe.table}
    assert kinds == {(n, pooling) for n in (1, 2) for pooling in ("mean", "cls", "both")}  # it has two blocks
    assert len(probe.table) == 6 * len(linear_sgd.BASE_LEARNING_RATES)
    held_out = [row["held_out_accuracy"] for row in probe.table]
    assert held_out[probe.chosen] == max(held_out) > min(held_out)
    test = labeled_images(40, seed=1)
    assert (probe.predict(test) == test.labels).mean() > 0.8


def test_the_heads_are_trained_as_they_say(pretrained, monkeypatch):
    rates, seen, step = (0.1, 1e-9), [], linear_sgd.train_step
    monkeypatch.setattr(linear_sgd, "train_step", lambda **options: seen.append(options) or step(**options))
    probe = linear_probe_sgd(
        load_encoder(pretrained("CAN")),
        labeled_images(40),
        4,
        3,
        batch_size=16,
        base_learning_rates=rates,
        layers=(1,),
    )
    defaults = seen[0]["optimizer"].defaults
    assert (defaults["momentum"], defaults["weight_decay"], defaults["nesterov"]) == (0.9, 0, False)
    num_steps = 3 * (36 // 16)
    expected = [16 / 256 * (1 + math.cos(math.pi * i / num_steps)) / 2 for i in range(num_steps)]
    assert [options["rate"] for options in seen] == pytest.approx(expected)
    for weight in probe.heads.weights:  # of each representation
        assert weight[0].abs().max() > 1e-3 and weight[1].abs().max() < 1e-8
    assert [row["base_learning_rate"] for row in probe.table] == [0.1, 1e-9] * 3


def test_representations_are_those_of_the_encoder(probe):
    encoder, pixels = probe.represent.encoder, torch.rand(3, 3, 16, 16)
    for (number, pooling), made in zip(probe.represent.kinds, probe.represent(pixels), strict=True):
        alone = encoder(pixels, number)
        expected = torch.cat([alone["cls"], alone["mean"]], 1) if pooling == "both" else alone[pooling]
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_the_test_set_has_no_say_in_the_choice(probe):
    """Labels planted so that another head is right on all test images: it is not the one that answers."""
    test = labeled_images(40, seed=2)
    everything = linear_sgd.head_predictions(probe.heads, probe.represent, test)
    worst = min(range(len(probe.table)), key=lambda head: probe.table[head]["held_out_accuracy"])
    test.labels = everything[:, worst]
    best_by_test = (everything == test.labels[:, None]).mean(axis=0).argmax()
    assert best_by_test != probe.chosen
    predictions = probe.predict(test)
    assert (predictions == everything[:, probe.chosen]).all() and (predictions == test.labels).mean() < 1


def test_the_probe_is_chosen_on_images_that_it_was_not_trained_on(pretrained, monkeypatch):
    """Labels without any meaning can be learned by heart, and held-out ones cannot be guessed."""
    train = labeled_images(120)
    train.labels = np.random.default_rng(0).permutation(train.labels)
    seen, make = [], linear_sgd.crop_loader
    monkeypatch.setattr(
        linear_sgd, "crop_loader", lambda part, *rest, **options: seen.append(part) or make(part, *rest, **options)
    )
    probe = linear_probe_sgd(load_encoder(pretrained("CAN")), train, 4, num_epochs=1, batch_size=32)
    held_out, fit = hold_out(train.labels, 0.1, 0)
    assert len(held_out) == 12 and len(seen[0]) == 108
    fitted = {seen[0].read(row) for row in range(len(seen[0]))}
    assert fitted.isdisjoint(train.read(row) for row in held_out)
    assert max(row["held_out_accuracy"] for row in probe.table) < 0.8


def test_the_probe_refuses_sets_of_which_nothing_can_be_held_out(pretrained):
    with pytest.raises(ValueError, match="no class has the 6 images"):
        linear_probe_sgd(load_encoder(pretrained("CAN")), labeled_images(20), 4)
