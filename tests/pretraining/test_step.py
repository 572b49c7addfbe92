"""One update: what decays, what is averaged, what is logged."""

import random

import numpy as np
import pytest
import torch
from testing_utils import tiny_config, tiny_model

from modeling_can.averages import MetricAverage
from modeling_can.optimization import parameter_groups
from modeling_can.pretraining import step as a_step
from modeling_can.random_state import interlude


def test_matrices_decay_and_nothing_else_does():
    model = tiny_model()
    decay, no_decay = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    decaying = {names[id(p)] for p in decay["params"]}
    assert decaying == {n for n in names.values() if n.endswith("weight") and "norm" not in n}
    assert decaying | {names[id(p)] for p in no_decay["params"]} == set(names.values())


def test_averages_begin_anew_after_each_look():
    average = MetricAverage(lambda tensor: tensor)
    for values, counts in (((1.0, 3.0), (True, True)), ((5.0, float("nan")), (True, False))):
        for value, count in zip(values, counts, strict=True):
            average.update({"loss": torch.tensor(value)}, torch.tensor(count))
        assert average.compute() == {"loss": 2.0 if values[0] == 1 else 5.0}


def test_every_generator_of_random_numbers_is_kept_apart():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    with interlude():
        first = draw()
    assert draw() == first


def test_the_logged_loss_is_the_weighted_sum():
    config = tiny_config()
    terms = {
        "contrastive_loss": torch.tensor(5.0),
        "reconstruction_loss": torch.tensor(0.5),
        "denoising_loss": torch.tensor(2.0),
    }
    metrics = a_step.step_metrics(terms, config, torch.tensor(1.0))
    assert metrics["loss"].item() == pytest.approx(0.03 * 5 + 0.67 * 0.5 + 0.3 * 2 / (0.05**2 / 3))
