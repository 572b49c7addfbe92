"""
Weights from other models and for them:

    python -m modeling_can.conversion SOURCE --to can|dinov2|dinov2_with_registers|dinov3_vit|vit|timm|onnx OUT

- `names`: what they call the same tensors.
- `reading`: a folder, a Hub id or a file as a configuration and weights.
- `importing`: `warm_start` continues from a CAN, ViT-MAE, ViT, DINOv2 or DINOv3 checkpoint, or from a file of weights
  under names like timm's: timm's own, those of the authors of MAE, CAN, DINOv2 and DINOv3. `to_can` makes such weights
  an encoder of ours.
- `export`: `to_dinov2`, `to_dinov3_vit`, `to_vit` and `to_timm` make an encoder of ours one that needs no code of
  ours. `convert` writes it, or the graph of `onnx`, into a folder.
- `processors`: the image processor that goes along.

The encoders are the same under other names, with these differences:
- Their patch projection is a convolution over (channel, row, column), ours a linear layer over (row, column, channel).
- DINOv2 and DINOv3 multiply the output of attention and of MLP by learned vectors (layer scale). They are folded into
  the last linear layer of each, and are one in what we write. The function is the same and one kind of parameter
  less; training it further is not: where a scale is s, the same step of AdamW on the folded weights moves the output
  1 / s times as far, and weight decay acts on the product.
- DINOv3's positions are rotary, and its keys have no bias: fields of CANConfig (`ENCODER_VARIANTS`) say so, and which
  registers and gates there are. In training it rescales its coordinates at random; ours does not, and what we write
  does not either.
- timm and the authors keep the projections to queries, keys and values in one matrix, some also a gate and what it
  gates.
- Positions belong to the source's patch grid. They are resized to ours and, learned or not, go into our frozen table,
  with the class token's row as it is.
- DINOv2's classifier reads the class token and, beside it, the mean of the patch tokens, ours the mean alone.
"""

from .export import (
    accept_colors,
    check_dinov2,
    convert,
    encoder_weights,
    native_kind,
    to_dinov2,
    to_dinov3_vit,
    to_timm,
    to_vit,
)
from .importing import can_config, to_can, warm_start
from .names import (
    DINOV2,
    DINOV2_GATED,
    DINOV2_LAYER_SCALE,
    DINOV3,
    DINOV3_LAYER_SCALE,
    MAE_FILE,
    VIT,
    VIT_MAE,
    join_qkv,
    split_qkv,
    their_name,
)
from .onnx import to_onnx
from .processors import normalization


__all__ = [
    "DINOV2",
    "DINOV2_GATED",
    "DINOV2_LAYER_SCALE",
    "DINOV3",
    "DINOV3_LAYER_SCALE",
    "MAE_FILE",
    "VIT",
    "VIT_MAE",
    "accept_colors",
    "can_config",
    "check_dinov2",
    "convert",
    "encoder_weights",
    "join_qkv",
    "native_kind",
    "normalization",
    "split_qkv",
    "their_name",
    "to_can",
    "to_dinov2",
    "to_dinov3_vit",
    "to_onnx",
    "to_timm",
    "to_vit",
    "warm_start",
]
