"""Weights from other models and for them."""

from .export import accept_colours, check_dinov2, convert, encoder_weights, to_dinov2, to_timm, to_vit
from .importing import can_config, to_can, warm_start
from .names import DINOV2, DINOV2_LAYER_SCALE, MAE_FILE, VIT, VIT_MAE, join_qkv, split_qkv, their_name
from .onnx import to_onnx
from .processors import normalisation


__all__ = [
    "DINOV2",
    "DINOV2_LAYER_SCALE",
    "MAE_FILE",
    "VIT",
    "VIT_MAE",
    "accept_colours",
    "can_config",
    "check_dinov2",
    "convert",
    "encoder_weights",
    "join_qkv",
    "normalisation",
    "split_qkv",
    "their_name",
    "to_can",
    "to_dinov2",
    "to_onnx",
    "to_timm",
    "to_vit",
    "warm_start",
]
