"""Tiny encoders of transformers with random numbers in every tensor, and what they make of pixels."""

import torch
from testing_utils import tiny_model
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)


SQUARE = dict(image_size=32, patch_size=8)


SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layer_norm_eps=1e-6, **SQUARE)


VIT_SIZES = dict(**SIZES, intermediate_size=64)


DECODER_SIZES = dict(
    decoder_hidden_size=16,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
)


def randomized(model):
    """Numbers everywhere, positions, biases, norms and layer scale included, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        around_one = "norm" in name and name.endswith("weight") or "lambda" in name
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + around_one)
    return model.eval()


def vit(model_class=ViTModel, **changes):
    return randomized(model_class(ViTConfig(**{**VIT_SIZES, **changes})))


def vit_mae(model_class=ViTMAEForPreTraining, **changes):
    return randomized(model_class(ViTMAEConfig(**{**VIT_SIZES, **DECODER_SIZES, **changes})))


def dinov2(model_class=Dinov2Model, **changes):
    return randomized(model_class(Dinov2Config(**{**SIZES, "mlp_ratio": 2, **changes})))


def dinov2_with_registers(model_class=Dinov2WithRegistersModel, **changes):
    values = {**SIZES, "mlp_ratio": 2, "num_register_tokens": 3, **changes}
    return randomized(model_class(Dinov2WithRegistersConfig(**values)))


def dinov3(model_class=DINOv3ViTModel, **changes):
    values = {**VIT_SIZES, "num_register_tokens": 2, **changes}
    return randomized(model_class(DINOv3ViTConfig(**values)))


def can(model_class=None, **changes):
    model = tiny_model(**changes)
    return randomized(model if model_class is None else model_class(model.config))


def tokens(source, pixels: torch.Tensor) -> torch.Tensor:
    """The last hidden state of any of the sources, whatever its head and the size of the pixels."""
    encoder, arguments = source.base_model, {"interpolate_pos_encoding": True}
    if encoder.config.model_type.startswith("dino"):
        arguments = {}  # it always interpolates
    if encoder.config.model_type == "dinov3_vit":
        encoder = source  # whose base_model is its blocks alone
    if encoder.config.model_type == "vit_mae":
        encoder.config.mask_ratio = 0.0
        patches = (pixels.shape[2] // 8) * (pixels.shape[3] // 8)
        arguments["noise"] = torch.arange(patches).expand(len(pixels), -1)  # keeps the order
    with torch.no_grad():
        return encoder(pixels, **arguments).last_hidden_state


def pixels_of(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(4))


OTHER_SIZES = ((32, 32), (48, 48), (40, 64), (16, 64))


def equal(a: torch.Tensor, b: torch.Tensor):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def features(model, pixels: torch.Tensor) -> torch.Tensor:
    return model.base_model(pixels, interpolate_pos_encoding=True).last_hidden_state
