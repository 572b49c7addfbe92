"""
Weights from other models: `warm_start` continues from a CAN, ViT-MAE, ViT or DINOv2 checkpoint.

Their encoders are ours under other names, with these differences:
- Their patch projection is a convolution over (channel, row, column), ours a linear layer over (row, column, channel).
- DINOv2 multiplies the output of attention and of MLP by learnt vectors (layer scale). They are folded into the last
  linear layer of each.
- Positions belong to the source's patch grid. They are resized to ours and, learnt or not, go into our frozen table,
  with the class token's row as it is.
"""

import re
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    Dinov2Model,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ViTMAEForPreTraining,
    ViTModel,
)

from .configuration_can import CANConfig
from .modeling_can import CANForPreTraining, resize_positions


# ---------------------------------------------------------------------------------------------------------------------
# Names: ours on the left, to be read in either direction; {} is the number of a layer
# ---------------------------------------------------------------------------------------------------------------------

_SHARED = {
    "can.embeddings.cls_token": "embeddings.cls_token",
    "can.embeddings.position_embeddings": "embeddings.position_embeddings",
    "can.embeddings.patch_embeddings": "embeddings.patch_embeddings.projection",
    "can.layernorm": "layernorm",
}
VIT = {**_SHARED, "can.layers.{}": "layers.{}"}
DINOV2 = {
    **_SHARED,
    "can.layers.{}.layernorm_before": "encoder.layer.{}.norm1",
    "can.layers.{}.attention": "encoder.layer.{}.attention",
    "can.layers.{}.layernorm_after": "encoder.layer.{}.norm2",
    "can.layers.{}.mlp": "encoder.layer.{}.mlp",
}
DINOV2_LAYER_SCALE = {
    "can.layers.{}.attention.o_proj": "encoder.layer.{}.layer_scale1.lambda1",
    "can.layers.{}.mlp.fc2": "encoder.layer.{}.layer_scale2.lambda1",
}
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
# What DINOv2's class in transformers 5.17 calls the parts of its attention; later ones use ViT's names.
_EARLIER_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Source(NamedTuple):
    """A kind of checkpoint: the class that reads it, our names -> its names, our linear layers -> its layer scales."""

    model_class: type[PreTrainedModel]
    names: dict[str, str]
    layer_scales: dict[str, str] = {}
    remarks: tuple[str, ...] = ()


SOURCES = {
    "can": Source(CANForPreTraining, CAN),
    "vit_mae": Source(ViTMAEForPreTraining, VIT_MAE),
    "vit": Source(ViTModel, VIT),
    "dinov2": Source(
        Dinov2Model,
        DINOV2,
        DINOV2_LAYER_SCALE,
        remarks=("layer scale folded into the output projections", "mask token left out"),
    ),
}

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
)
DECODER_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)
# The parts that are taken as a whole or not at all, how their tensors' names begin, and the fields that must agree.
PARTS = (
    ("encoder", r"can\.", ENCODER_FIELDS),
    ("projection head", r"projection_head\.", ("projection_hidden_size", "projection_size")),
    ("decoder", r"decoder\.(?!noise_level_embedding\.)", DECODER_FIELDS),
    ("noise-level embedding", r"decoder\.noise_level_embedding\.", DECODER_FIELDS),
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


def current_name(key: str) -> str:
    """A source's key as the tables have it, whichever version of transformers has built the model."""
    for earlier, current in _EARLIER_NAMES.items():
        key = key.replace(earlier, current)
    return key


# ---------------------------------------------------------------------------------------------------------------------
# Warm start
# ---------------------------------------------------------------------------------------------------------------------


def warm_start(model: CANForPreTraining, name_or_path: str) -> tuple[list[str], list[str]]:
    """
    Copies what fits from a CAN, ViT-MAE, ViT or DINOv2 checkpoint into the parameters and position tables of `model`,
    in place and in their dtype. The encoder then gives the source's features; what was trainable stays so.

    Args:
        model (`CANForPreTraining`): Left as it was where an error is raised.
        name_or_path (`str`): A folder written by `save_pretrained`, or the id of a model on the Hub.

    Returns:
        `tuple[list[str], list[str]]`: The parts that were taken and the parts that keep their new weights, as text.

    Raises:
        ValueError: for a checkpoint that cannot be read, is of another kind, has another encoder than `model`, or
            lacks some of it. The message names the fix.
    """
    source, config = _read_config(name_or_path)
    _check_encoder(name_or_path, config, model.config)
    theirs = _read_weights(name_or_path, source)
    own = model.state_dict()  # shares memory with the model
    weights, taken, new = {}, [], []
    for part, pattern, fields in PARTS:
        keys = {name: _their_keys(name, source) for name in own if re.match(pattern, name)}
        wanted = {key for group in keys.values() for key in group}
        missing = sorted(wanted - theirs.keys())
        if part == "encoder" and missing:
            raise ValueError(
                f"model_name_or_path={name_or_path!r} lacks {len(missing)} tensors of its encoder, or holds them in "
                f"another shape than its config.json says, e.g. {missing[0]}; give a complete checkpoint"
            )
        if not keys:  # a model without noise has no noise-level embedding
            continue
        if wanted.isdisjoint(theirs):
            new.append(part)
        elif differences := _differences(config, model.config, fields):
            new.append(f"{part} ({_in_words(differences)})")
        elif missing:
            new.append(f"{part} (the checkpoint lacks some of it, e.g. {missing[0]})")
        else:
            remarks = list(source.remarks) if part == "encoder" else []
            for name, group in keys.items():
                weights[name] = _in_our_layout(*(theirs[key] for key in group))
                if name.endswith("position_embeddings"):
                    weights[name], more = _fit_positions(weights[name], config, model.config)
                    remarks += more
            taken.append(f"{part} ({'; '.join(remarks)})" if remarks else part)

    # Nothing was touched so far, so that an error leaves the model whole.
    assert all(own[name].shape == tensor.shape for name, tensor in weights.items())
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return taken, new


def normalisation(name_or_path: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation that the images of a checkpoint were normalised with; `None` if it does not say."""
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError:
        return None
    if "image_mean" not in values or "image_std" not in values:
        return None
    return values["image_mean"], values["image_std"]


def _read_config(name_or_path: str) -> tuple[Source, PreTrainedConfig]:
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except OSError as error:
        raise _unreadable(name_or_path, error) from error
    if not values:
        raise _unreadable(
            name_or_path, OSError("it has no config.json; of a run's checkpoints, resume_from_checkpoint takes care")
        )
    model_type = values.get("model_type")
    if model_type not in SOURCES:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has model_type={model_type!r} in its config.json; CAN can start "
            f"from {', '.join(SOURCES)}"
        )
    source = SOURCES[model_type]
    return source, source.model_class.config_class.from_dict(values)


def _read_weights(name_or_path: str, source: Source) -> dict[str, torch.Tensor]:
    """What is truly in the file, in fp32 under the source's names: no tensor that transformers has drawn instead."""
    try:
        model, info = source.model_class.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise _unreadable(name_or_path, error) from error
    drawn = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    return {current_name(key): tensor for key, tensor in model.state_dict().items() if key not in drawn}


def _unreadable(name_or_path: str, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(
        f"model_name_or_path={name_or_path!r} cannot be read ({reason}); give a folder written by save_pretrained, or "
        "the id of a model on the Hub, which needs a network or an earlier download"
    )


def _check_encoder(name_or_path: str, config: PreTrainedConfig, own_config: CANConfig):
    if config.model_type == "dinov2" and config.use_swiglu_ffn:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has use_swiglu_ffn=True, but CAN's MLPs have no gate; give a "
            "DINOv2 without SwiGLU, such as facebook/dinov2-large"
        )
    if differences := _differences(config, own_config, ENCODER_FIELDS):
        flags = " ".join(f"--{name} {_as_word(theirs)}" for name, (theirs, _) in differences.items())
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has another encoder: {_in_words(differences)}; add {flags}"
        )


def _differences(config: PreTrainedConfig, own_config: CANConfig, fields: tuple[str, ...]) -> dict[str, tuple]:
    """Field -> (the source's value, ours), where they differ."""
    pairs = {name: (_value(config, name), _value(own_config, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _value(config: PreTrainedConfig, name: str):
    if name == "patch_size":
        return _pair(config.patch_size)
    if name == "intermediate_size" and config.model_type == "dinov2":
        return int(config.hidden_size * config.mlp_ratio)
    return getattr(config, name)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _as_word(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value if value[0] != value[1] else value[:1]))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_words(differences: dict[str, tuple]) -> str:
    return ", ".join(f"{name} is {_as_word(a)} there and {_as_word(b)} here" for name, (a, b) in differences.items())


def _their_keys(name: str, source: Source) -> list[str]:
    """The source's tensors that make our tensor `name`: its counterpart, and the layer scale over it if any."""
    keys = [their_name(name, source.names), their_name(name.rpartition(".")[0], source.layer_scales)]
    return [key for key in keys if key is not None]


def _in_our_layout(tensor: torch.Tensor, layer_scale: torch.Tensor | None = None) -> torch.Tensor:
    if tensor.ndim == 4:  # a convolution (D, channel, row, column) -> a linear layer (D, row x column x channel)
        tensor = tensor.permute(0, 2, 3, 1).flatten(1)
    if layer_scale is not None:  # s * (W x + b) = (s W) x + s b
        tensor = tensor * (layer_scale[:, None] if tensor.ndim == 2 else layer_scale)
    return tensor


def _fit_positions(
    table: torch.Tensor, config: PreTrainedConfig, own_config: CANConfig
) -> tuple[torch.Tensor, list[str]]:
    """The position table of the source on our grid, and what there is to say about it."""
    (height, width), patch = _pair(config.image_size), _pair(config.patch_size)
    grid, own_grid, remarks = (height // patch[0], width // patch[1]), own_config.grid_shape, []
    if grid != own_grid:
        remarks.append(f"positions resized from {grid[0]} x {grid[1]} to {own_grid[0]} x {own_grid[1]}")
    if not table[:, 1:].any():  # as in a ViT-MAE that transformers 5 has built from a config
        remarks.append("positions are all zero, so that it cannot tell where a patch lies")
    return resize_positions(table, grid, own_grid), remarks
