"""
Weights from other models in ours: `warm_start` continues from them in all parts that fit, `to_can` makes them an
encoder of ours.
"""

import re
from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from ..configuration_can import ENCODER_VARIANTS, CANConfig
from ..modeling_can import CANForImageClassification, CANForPreTraining, CANPreTrainedModel, resize_positions
from .names import CAN, ENCODER_FIELDS
from .reading import (
    Checkpoint,
    Source,
    as_pair,
    encoder_config,
    is_file_of_weights,
    read_checkpoint,
    read_config,
    read_weights,
    their_keys,
)


__all__ = ["can_config", "copy_weights", "gated_width", "has_classifier", "start_config", "to_can", "warm_start"]


_DECODER_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)
_HEADS = r"decoder\.(noise_)?head\."  # whose outputs are pixels of all channels
# The parts that are taken as a whole or not at all, how their tensors' names begin, and the fields that must agree.
_PARTS = (
    ("encoder", r"can\.", ENCODER_FIELDS),
    ("projection head", r"projection_head\.", ("projection_hidden_size", "projection_size")),
    ("decoder", r"decoder\.(?!noise_)", _DECODER_FIELDS),
    ("noise-level embedding", r"decoder\.noise_level_embedding\.", _DECODER_FIELDS),
    ("noise head", r"decoder\.noise_head\.", _DECODER_FIELDS),
)


def warm_start(model: CANForPreTraining, name_or_path: str) -> tuple[list[str], list[str]]:
    """
    Copies what fits from a CAN, ViT-MAE, ViT, DINOv2 or DINOv3 checkpoint, or a file under timm's names, into the
    parameters and position tables of `model`, in place and in their dtype. The encoder then gives the source's
    features; what was trainable stays so. From RGB, a model of other channels begins with the mean of the three
    filters for each channel, and with new heads of the decoder.

    Args:
        model (`CANForPreTraining`): Left as it was where an error is raised.
        name_or_path (`str`):
            A folder written by `save_pretrained`, the id of a model on the Hub (timm's too), or a file (`.pth`,
            `.safetensors`) of timm's, MAE's or CAN's authors. A file does not tell its numbers of attention heads:
            they are taken to be those of `model`.

    Returns:
        `tuple[list[str], list[str]]`: The parts that were taken and the parts that keep their new weights, as text.

    Raises:
        ValueError: for a checkpoint that cannot be read, is of another kind, has another encoder than `model`, or
            lacks some of it. The message names the fix.
    """
    heads = model.config.num_attention_heads, model.config.decoder_num_attention_heads
    checkpoint = read_checkpoint(name_or_path, *heads)
    _check_encoder(name_or_path, checkpoint.config, model.config)
    return copy_weights(checkpoint, model, name_or_path)


def copy_weights(checkpoint: Checkpoint, model: CANForPreTraining, name_or_path: str) -> tuple[list[str], list[str]]:
    """`warm_start` for a checkpoint that was read and whose encoder has the sizes of `model`'s."""
    source, config, theirs = checkpoint
    own = model.state_dict()  # shares memory with the model
    other_channels = _differences(config, model.config, ("num_channels",))
    weights, taken, new = {}, [], [f"heads of the decoder ({_in_words(other_channels)})"] if other_channels else []
    for part, pattern, fields in _PARTS:
        keys = {
            name: their_keys(name, source)
            for name in own
            if re.match(pattern, name) and not (other_channels and re.match(_HEADS, name))
        }
        wanted = {key for group in keys.values() for key in group}
        missing = sorted(wanted - theirs.keys())
        if part == "encoder" and missing:
            raise ValueError(
                f"model_name_or_path={name_or_path!r} lacks {len(missing)} tensors of its encoder, or holds them in "
                f"another shape than its config.json says, e.g. {missing[0]}; give a complete checkpoint"
            )
        if not keys:  # a model without noise has neither noise-level embedding nor noise head
            continue
        if wanted.isdisjoint(theirs):
            new.append(part)
        elif differences := _differences(
            config, model.config, [name for name in fields if name not in other_channels]
        ):
            new.append(f"{part} ({_in_words(differences)})")
        elif missing:
            new.append(f"{part} (the checkpoint lacks some of it, e.g. {missing[0]})")
        else:
            remarks = list(source.remarks) if part == "encoder" else []
            for name, group in keys.items():
                weights[name] = _in_our_layout(*(theirs[key] for key in group))
                if other_channels and name == "can.embeddings.patch_embeddings.weight":
                    weights[name] = _spread(weights[name], model.config.num_channels)
                    remarks.append(f"its mean filter over RGB for each of {model.config.num_channels} channels")
                if name.endswith("position_embeddings"):
                    weights[name], more = _fit_positions(weights[name], config, model.config)
                    remarks += more
            taken.append(f"{part} ({'; '.join(remarks)})" if remarks else part)

    # Nothing was touched so far, so that an error leaves the model whole.
    for name, tensor in weights.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"model_name_or_path={name_or_path!r} has a tensor of shape {tuple(tensor.shape)} where CAN's {name} "
                f"has {tuple(own[name].shape)}: it is another kind of encoder"
            )
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return taken, new


def _spread(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """
    A patch projection `(D, row x column x channel)` from RGB for other channels: each gets the mean over the three,
    scaled by 3 / C, so that the output of channels that are alike is that of a gray image.
    """
    mean = weight.unflatten(1, (-1, 3)).mean(dim=2, keepdim=True)
    return (3 / num_channels * mean).expand(-1, -1, num_channels).flatten(1)


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
    (height, width), patch = as_pair(config.image_size), as_pair(config.patch_size)
    grid, own_grid, remarks = (height // patch[0], width // patch[1]), own_config.grid_shape, []
    if grid != own_grid:
        remarks.append(f"positions resized from {grid[0]} x {grid[1]} to {own_grid[0]} x {own_grid[1]}")
    if not table[:, 1:].any():  # as in a ViT-MAE that transformers 5 has built from a config
        remarks.append("positions are all zero, so that it cannot tell where a patch lies")
    return resize_positions(table, grid, own_grid, own_config.interpolate_antialias), remarks


def to_can(name_or_path: str, num_attention_heads: int | None = None) -> CANPreTrainedModel:
    """
    The encoder of any source that `warm_start` takes, in fp32; of a `CANForImageClassification` the whole model.

    Args:
        name_or_path (`str`), num_attention_heads (`int`, *optional*): As in `read_checkpoint`.

    Raises:
        ValueError: as `warm_start`.
    """
    checkpoint = read_checkpoint(name_or_path, num_attention_heads)
    config = _as_can(name_or_path, checkpoint.config)
    if num_attention_heads and num_attention_heads != config.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={num_attention_heads}, but {name_or_path} says that it has "
            f"{config.num_attention_heads}; leave the flag out"
        )
    model = CANForPreTraining(config)
    copy_weights(checkpoint, model, name_or_path)
    if not (checkpoint.source.names is CAN and has_classifier(config)):
        return model.can.eval()
    classifier = CANForImageClassification(config)
    classifier.can = model.can
    weights = read_weights(name_or_path, Source(CANForImageClassification, CAN))
    if not {"classifier.weight", "classifier.bias"} <= weights.keys():
        raise ValueError(f"{name_or_path} lacks its classifier, or has one of another number of classes")
    classifier.classifier.load_state_dict({key: weights[f"classifier.{key}"] for key in ("weight", "bias")})
    return classifier.eval()


def has_classifier(config: PreTrainedConfig) -> bool:
    """Whether a model was saved with a classifier, of whatever class."""
    return any("ForImageClassification" in name for name in config.architectures or [])


def can_config(name_or_path: str) -> CANConfig:
    """What `to_can` makes of the config.json of a CAN, ViT, ViT-MAE, DINOv2 or DINOv3; raises ValueError as that."""
    source, config = read_config(name_or_path)
    if source is None:
        raise ValueError(
            f"{name_or_path} is timm's; write it anew first: python -m modeling_can.conversion ... --to can"
        )
    return _as_can(name_or_path, config)


def start_config(name_or_path: str, num_attention_heads: int | None = None) -> CANConfig:
    """
    As `can_config`, also of what `warm_start` takes besides: a file of weights, or timm's ViTs, which are read for it.

    Args:
        num_attention_heads (`int`, *optional*): As in `read_checkpoint`.
    """
    source = None
    if not is_file_of_weights(name_or_path):
        source, config = read_config(name_or_path)
    if source is None:
        config = read_checkpoint(name_or_path, num_attention_heads).config
    return _as_can(name_or_path, config)


def _as_can(name_or_path: str, config: PreTrainedConfig) -> CANConfig:
    _refuse_other_biases(name_or_path, config)
    if isinstance(config, CANConfig):
        return config
    return encoder_config(**{field: _value(config, field) for field in (*ENCODER_FIELDS, "image_size")})


def _refuse_other_biases(name_or_path: str, config: PreTrainedConfig):
    if config.model_type != "dinov3_vit":
        return
    biases = {f"{name}_bias": getattr(config, f"{name}_bias") for name in ("query", "key", "value", "proj", "mlp")}
    query, key, value, *others = biases.values()
    if query != value or key > query or not all(others):
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has {biases}; CAN's encoder has biases everywhere, or not in "
            "query, key and value, or not in the key; give a checkpoint like facebook/dinov3-vits16-pretrain-lvd1689m"
        )


def _check_encoder(name_or_path: str, config: PreTrainedConfig, own_config: CANConfig):
    _refuse_other_biases(name_or_path, config)
    differences = _differences(config, own_config, ENCODER_FIELDS)
    if differences.get("num_channels", (0,))[0] == 3:  # whose filters become those of other channels
        del differences["num_channels"]
    if differences:
        flags = " ".join(f"--{name} {_as_word(theirs)}" for name, (theirs, _) in differences.items())
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has another encoder: {_in_words(differences)}; use the recipe "
            f"can-adapt, or none, and leave out {' '.join(f'--{name}' for name in differences)}; with another recipe, "
            f"add {flags}"
        )


def _differences(config: PreTrainedConfig, own_config: CANConfig, fields: Iterable[str]) -> dict[str, tuple]:
    """Field -> (the source's value, ours), where they differ."""
    pairs = {name: (_value(config, name), _value(own_config, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _value(config: PreTrainedConfig, name: str):
    """A field of `CANConfig` of any source."""
    values = _translated(config)
    if name == "patch_size":
        return as_pair(config.patch_size)
    return values[name] if name in values else getattr(config, name)


def _translated(config: PreTrainedConfig) -> dict:
    """The fields of `CANConfig` for which a source's configuration has other words, or none."""
    if isinstance(config, CANConfig):
        return {}
    values = {name: getattr(CANConfig, name) for name in ENCODER_VARIANTS}
    if config.model_type in ("dinov2", "dinov2_with_registers"):
        values["intermediate_size"] = int(config.hidden_size * config.mlp_ratio)
        if config.use_swiglu_ffn:
            width = gated_width(config.hidden_size, config.mlp_ratio)
            values |= {"gated_mlp": True, "hidden_act": "silu", "intermediate_size": width}
    if config.model_type == "dinov2_with_registers":
        values |= {"num_register_tokens": config.num_register_tokens, "interpolate_antialias": True}
    if config.model_type == "dinov3_vit":
        same = ("key_bias", "num_register_tokens", "rope_theta")
        values |= {name: getattr(config, name) for name in same}
        values |= {"qkv_bias": config.query_bias, "gated_mlp": config.use_gated_mlp}
        values["position_embedding_type"] = "rotary"
    return values


def gated_width(hidden_size: int, mlp_ratio: float) -> int:
    """`intermediate_size` of DINOv2's gated MLPs: two thirds of what the others have, in multiples of 8."""
    return (int(int(hidden_size * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def _as_word(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value if value[0] != value[1] else value[:1]))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_words(differences: dict[str, tuple]) -> str:
    return ", ".join(f"{name} is {_as_word(a)} there and {_as_word(b)} here" for name, (a, b) in differences.items())
