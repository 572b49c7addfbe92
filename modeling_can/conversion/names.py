"""
The names of one thing in different models: ours on the left, theirs on the right, to be read in either direction.

A table holds modules and tensors; {} is the number of a layer. Files of timm's and of the authors of DINOv2 and DINOv3
have several spellings of timm's names, and keep some matrices in one: they are brought to one form before.
"""

import re

import torch

from ..configuration_can import ENCODER_VARIANTS


__all__ = [
    "CAN",
    "DINOV2",
    "DINOV2_GATED",
    "DINOV2_LAYER_SCALE",
    "DINOV3",
    "DINOV3_LAYER_SCALE",
    "ENCODER_FIELDS",
    "MAE_FILE",
    "TIMM",
    "TIMM_ACTIVATIONS",
    "TIMM_LAYER_SCALE",
    "VIT",
    "VIT_MAE",
    "in_one_form",
    "join_qkv",
    "split_qkv",
    "their_name",
]


_SHARED = {
    "can.embeddings.cls_token": "embeddings.cls_token",
    "can.embeddings.position_embeddings": "embeddings.position_embeddings",
    "can.embeddings.patch_embeddings": "embeddings.patch_embeddings.projection",
    "can.layernorm": "layernorm",
}
VIT = {**_SHARED, "can.layers.{}": "layers.{}"}
DINOV2 = {
    **_SHARED,
    "can.embeddings.register_tokens": "embeddings.register_tokens",
    "can.layers.{}.layernorm_before": "encoder.layer.{}.norm1",
    "can.layers.{}.attention": "encoder.layer.{}.attention",
    "can.layers.{}.layernorm_after": "encoder.layer.{}.norm2",
    "can.layers.{}.mlp": "encoder.layer.{}.mlp",
}
DINOV2_GATED = {
    "can.layers.{}.mlp.fc1": "encoder.layer.{}.mlp.up_proj",
    "can.layers.{}.mlp.fc2": "encoder.layer.{}.mlp.down_proj",
    **DINOV2,
}
DINOV2_LAYER_SCALE = {
    "can.layers.{}.attention.o_proj": "encoder.layer.{}.layer_scale1.lambda1",
    "can.layers.{}.mlp.fc2": "encoder.layer.{}.layer_scale2.lambda1",
}
DINOV3 = {
    "can.embeddings": "embeddings",
    "can.layers.{}.layernorm_before": "model.layer.{}.norm1",
    "can.layers.{}.attention": "model.layer.{}.attention",
    "can.layers.{}.layernorm_after": "model.layer.{}.norm2",
    "can.layers.{}.mlp.fc1": "model.layer.{}.mlp.up_proj",
    "can.layers.{}.mlp.fc2": "model.layer.{}.mlp.down_proj",
    "can.layers.{}.mlp": "model.layer.{}.mlp",
    "can.layernorm": "norm",
}
DINOV3_LAYER_SCALE = {ours: theirs.replace("encoder", "model") for ours, theirs in DINOV2_LAYER_SCALE.items()}
VIT_MAE = {
    **{ours: f"vit.{theirs}" for ours, theirs in VIT.items()},
    "decoder.embed": "decoder.decoder_embed",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.position_embeddings": "decoder.decoder_pos_embed",
    "decoder.layers.{}": "decoder.decoder_layers.{}",
    "decoder.layernorm": "decoder.decoder_norm",
    "decoder.head": "decoder.decoder_pred",
}
CAN = {part: part for part in ("can", "projection_head", "decoder")}
TIMM = {
    "can.embeddings.cls_token": "cls_token",
    "can.embeddings.position_embeddings": "pos_embed",
    "can.embeddings.patch_embeddings": "patch_embed.proj",
    "can.layers.{}.layernorm_before": "blocks.{}.norm1",
    "can.layers.{}.attention.q_proj": "blocks.{}.attn.q",  # of "blocks.{}.attn.qkv", which `split_qkv` splits
    "can.layers.{}.attention.k_proj": "blocks.{}.attn.k",
    "can.layers.{}.attention.v_proj": "blocks.{}.attn.v",
    "can.layers.{}.attention.o_proj": "blocks.{}.attn.proj",
    "can.layers.{}.layernorm_after": "blocks.{}.norm2",
    "can.layers.{}.mlp": "blocks.{}.mlp",
    "can.layernorm": "norm",
}
TIMM_LAYER_SCALE = {
    "can.layers.{}.attention.o_proj": "blocks.{}.ls1.gamma",
    "can.layers.{}.mlp.fc2": "blocks.{}.ls2.gamma",
}
# Further parts of facebookresearch/dinov2, mae and, with the head, shlokk/mae-contrastive. That one contrasts the mean
# of all tokens, the class token included, and tells the noise level to the encoder's tokens, by layers that ours has
# not.
MAE_FILE = {
    **TIMM,
    "can.embeddings.register_tokens": "register_tokens",
    "projection_head.fc1": "projection_head.0",
    "projection_head.fc2": "projection_head.2",
    "decoder.embed": "decoder_embed",
    "decoder.mask_token": "mask_token",
    "decoder.position_embeddings": "decoder_pos_embed",
    **{
        ours.replace("can.layers", "decoder.layers"): theirs.replace("blocks", "decoder_blocks")
        for ours, theirs in TIMM.items()
        if "layers" in ours
    },
    "decoder.layernorm": "decoder_norm",
    "decoder.head": "decoder_pred",
}
# What timm (in its Eva, as which it has DINOv3) and facebookresearch/dinov2 and dinov3 call parts of timm's ViT
_OTHER_SPELLINGS = (
    (r"^(reg_token|storage_tokens)$", "register_tokens"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.mlp\.(w1|fc1_g)\.", ".mlp.gate_proj."),
    (r"\.mlp\.(w2|w12|fc1_x)\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# transformers' names of activations -> timm's
TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
# What must agree for two configurations to mean the same encoder
ENCODER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    *ENCODER_VARIANTS,
)


def their_name(name: str, table: dict[str, str]) -> str | None:
    """The counterpart of our `name` in a table of modules and tensors; `None` if there is none."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    for ours, theirs in table.items():
        if layer:
            ours, theirs = ours.format(layer[1]), theirs.format(layer[1])
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return None


def in_one_form(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The tensors of a file of weights under the names of `MAE_FILE`: queries, keys and values apart, gates apart from
    what they gate, and without the biases that DINOv3 masks out.
    """
    renamed = {}
    for key, tensor in split_qkv(state).items():
        for theirs, name in _OTHER_SPELLINGS:
            key = re.sub(theirs, name, key)
        renamed[key] = tensor
    for key in [key for key in renamed if key.endswith(".bias_mask")]:
        if not renamed.pop(key).any():
            del renamed[key.removesuffix("_mask")]
    for key in [key for key in renamed if key.endswith(".mlp.fc2.weight")]:
        mlp, width = key.removesuffix("fc2.weight"), renamed[key].shape[1]
        for name in ("weight", "bias"):
            both = renamed.get(f"{mlp}fc1.{name}", ())
            if len(both) == 2 * width:  # SiLU(first half) * second half
                renamed[f"{mlp}gate_proj.{name}"], renamed[f"{mlp}fc1.{name}"] = both.chunk(2)
    return renamed


def split_qkv(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's `...attn.qkv` as three tensors, `...attn.q`, `...attn.k`, `...attn.v`."""
    split = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            split |= {
                key.replace(".qkv.", f".{part}."): third for part, third in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            split[key] = tensor
    return split


def join_qkv(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `split_qkv`."""
    joined = {}
    for key, tensor in state.items():
        if ".attn.q." in key:
            parts = [state[key.replace(".q.", f".{part}.")] for part in "qkv"]
            joined[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not re.search(r"\.attn\.[kv]\.", key):
            joined[key] = tensor
    return joined
