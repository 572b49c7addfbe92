"""FLOPs of forward and backward, counted on the meta device with eager attention (CPU sdpa hides its products)."""

from functools import cache

import torch

from modeling_can import CANConfig, CANForPreTraining
from modeling_can.configuration_can import MAE, SIMCLR
from modeling_can.pretraining.cost import training_flops


LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


@cache
def gflop_per_image(**settings) -> float:
    return training_flops(CANConfig(**settings)) / 1e9


def test_vit_base_stays_within_its_budget():
    assert 160 < gflop_per_image() <= 169


def test_simclr_costs_70_per_cent_more_than_can():
    assert 1.65 <= gflop_per_image(**LARGE, **SIMCLR) / gflop_per_image(**LARGE) <= 1.80


def test_the_readmes_scaling_table_counts_these():
    assert round(gflop_per_image()) == 168 and round(gflop_per_image(**LARGE)) == 430
    for settings, millions in (({}, 113), (LARGE, 331)):
        with torch.device("meta"):
            model = CANForPreTraining(CANConfig(**settings))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_weights_of_zero_skip_their_work():
    full = gflop_per_image()
    assert gflop_per_image(contrastive_loss_weight=0) < full
    no_decoder = gflop_per_image(reconstruction_loss_weight=0, denoising_loss_weight=0)
    assert no_decoder < 0.7 * full


def test_one_view_costs_half():
    config = CANConfig(**MAE)
    assert training_flops(config, num_views=1) == training_flops(config) / 2
