"""
Checkpoints of other models: a folder or Hub id of transformers' or timm's, or a file of weights under names like
timm's, as the authors of MAE, CAN, DINOv2 and DINOv3 have published them.

Weights are read from safetensors. What there is in other files alone is a pickle, which could execute anything; only
here is it read, by `torch.load(weights_only=True)`, and a warning says so.
"""

import argparse
import contextlib
import logging
import math
import os
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTMAEForPreTraining,
    ViTModel,
)
from transformers.utils import cached_file

from ..configuration_can import CANConfig
from ..files import refuse_missing_path
from ..modeling_can import CANForPreTraining, CANModel
from ..progress import quiet
from .names import (
    CAN,
    DINOV2,
    DINOV2_GATED,
    DINOV2_LAYER_SCALE,
    DINOV3,
    DINOV3_LAYER_SCALE,
    MAE_FILE,
    TIMM_ACTIVATIONS,
    TIMM_LAYER_SCALE,
    VIT,
    VIT_MAE,
    in_one_form,
    their_name,
)


__all__ = [
    "Checkpoint",
    "Source",
    "as_pair",
    "encoder_config",
    "from_timm",
    "no_conversion_service",
    "read_checkpoint",
    "is_file_of_weights",
    "read_config",
    "read_weights",
    "their_keys",
    "wrong_config",
]


logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A kind of checkpoint: the class that reads it, our names -> its names, our linear layers -> its layer scales."""

    model_class: type[PreTrainedModel] | None  # None: a file of weights
    names: dict[str, str]
    layer_scales: dict[str, str] = {}
    remarks: tuple[str, ...] = ()


class Checkpoint(NamedTuple):
    """A source that was read: its kind, its configuration, and its weights in fp32 by its names."""

    source: Source
    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]


_FILES = (".safetensors", ".pth", ".pt", ".bin")
_REMARKS = ("layer scale folded into the output projections", "mask token left out")
_SOURCES = {
    "can": Source(CANForPreTraining, CAN),
    "vit_mae": Source(ViTMAEForPreTraining, VIT_MAE),
    "vit": Source(ViTModel, VIT),
    "dinov2": Source(Dinov2Model, DINOV2, DINOV2_LAYER_SCALE, _REMARKS),
    "dinov2_with_registers": Source(Dinov2WithRegistersModel, DINOV2, DINOV2_LAYER_SCALE, _REMARKS),
    "dinov3_vit": Source(DINOv3ViTModel, DINOV3, DINOV3_LAYER_SCALE, _REMARKS),
}
_OF_ENCODER = re.compile(r"^(?!\w*(?:decode|head|neck))(?:.*\.)?(?:layers?\.\d+\.|register_tokens$)")
# The numbers of heads of the published ViTs, by their widths
_PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}


def read_checkpoint(
    name_or_path: str, num_attention_heads: int | None = None, decoder_num_attention_heads: int = 16
) -> Checkpoint:
    """
    Args:
        name_or_path (`str`): As in `warm_start`.
        num_attention_heads (`int`, *optional*): Of a file, which does not tell; `None`: those of the published ViTs.
        decoder_num_attention_heads (`int`): Likewise; the default is MAE's.

    Raises:
        ValueError: for what cannot be read or is of another kind; the message names the fix.
    """
    if is_file_of_weights(name_or_path):
        refuse_missing_path("model_name_or_path", name_or_path)
        return _read_file(Path(name_or_path), {}, num_attention_heads, decoder_num_attention_heads)
    source, config = read_config(name_or_path)
    if source is None:
        try:
            file = Path(cached_file(name_or_path, "model.safetensors"))
        except OSError as error:
            raise _unreadable(name_or_path, error) from error
        return _read_file(file, config, num_attention_heads, decoder_num_attention_heads)
    return Checkpoint(source, config, read_weights(name_or_path, source))


def is_file_of_weights(name_or_path: str) -> bool:
    """Whether it is one of the authors' files, and no folder or Hub id."""
    return Path(name_or_path).suffix in _FILES and not Path(name_or_path).is_dir()


def read_config(name_or_path: str) -> tuple[Source, PreTrainedConfig] | tuple[None, dict]:
    """The kind of a folder or Hub id, and its configuration; of timm's ViTs `None` and its arguments."""
    refuse_missing_path("model_name_or_path", name_or_path)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except OSError as error:
        raise _unreadable(name_or_path, error) from error
    if not values:
        raise _unreadable(
            name_or_path, OSError("it has no config.json; of a run's checkpoints, resume_from_checkpoint takes care")
        )
    model_type = values.get("model_type")
    if "architecture" in values and model_type in (None, "timm_wrapper"):
        return None, values.get("model_args", {})
    if model_type not in _SOURCES:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has model_type={model_type!r} in its config.json; CAN can start "
            f"from {', '.join(_SOURCES)}, or timm's ViTs"
        )
    source = _SOURCES[model_type]
    try:
        config = source.model_class.config_class.from_dict(values)
    except StrictDataclassError as error:
        raise wrong_config(name_or_path, error) from error
    if source.names is DINOV2 and config.use_swiglu_ffn:
        source = source._replace(names=DINOV2_GATED)
    return source, config


def wrong_config(name_or_path: str, error: StrictDataclassError) -> ValueError:
    """Of a value of a wrong type; the error names field and value."""
    return ValueError(f"model_name_or_path={name_or_path}: {' '.join(str(error).split())}; correct its config.json")


@contextlib.contextmanager
def no_conversion_service():
    """Or transformers would ask a service to convert a pickle on the Hub, which opens a public pull request there."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    is_ours = name not in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if is_ours:
            del os.environ[name]


def read_weights(name_or_path: str, source: Source) -> dict[str, torch.Tensor]:
    """What is truly in the file, in fp32 under the source's names: no tensor that transformers has drawn instead."""

    def has(file: str) -> bool:
        return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False) is not None

    try:
        has_safetensors = has("model.safetensors") or has("model.safetensors.index.json")
        with quiet(), no_conversion_service():
            model, info = source.model_class.from_pretrained(
                name_or_path,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=has_safetensors,  # else a pickle, which transformers opens with weights_only
            )
        if not has_safetensors:
            _warn_of_pickle(name_or_path)
    except (OSError, SafetensorError, pickle.UnpicklingError) as error:
        raise _unreadable(name_or_path, error) from error
    # Poolers, classifiers and other models' decoders may stay behind, but nothing that the encoder computes with.
    left_out = [key for key in sorted(info["unexpected_keys"]) if _OF_ENCODER.search(key)]
    if left_out:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has {len(left_out)} tensors in its file for which its config.json "
            f"has no place, e.g. {left_out[0]}; make config.json say what the file has (number of layers, gates, "
            "biases, registers)"
        )
    drawn = info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in drawn}


def _read_file(path: Path, model_args: dict, num_heads: int | None, num_decoder_heads: int) -> Checkpoint:
    """A file of weights under timm's names; its sizes are those of its tensors, or timm's `model_args`."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # in which MAE keeps its flags
                state = torch.load(path, map_location="cpu", weights_only=True)
            _warn_of_pickle(path)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _unreadable(str(path), error) from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = state.items() if isinstance(state, dict) else ()
    state = {key.removeprefix("module."): x.float() for key, x in tensors if isinstance(x, torch.Tensor)}
    if not {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys():
        raise ValueError(
            f"model_name_or_path={str(path)!r} holds no ViT under timm's names, such as blocks.0.attn.qkv.weight, but "
            f"{', '.join(list(state)[:3]) or 'no tensors'}; give a file of timm's or of the authors of MAE, CAN, "
            "DINOv2 or DINOv3, or a folder with a config.json"
        )
    return from_timm(
        name=str(path), state=state, model_args=model_args, num_heads=num_heads, num_decoder_heads=num_decoder_heads
    )


def _warn_of_pickle(name):
    logger.warning("%s has no safetensors: its tensors were read from a pickle, with weights_only=True", name)


def _unreadable(name_or_path: str, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(
        f"model_name_or_path={name_or_path!r} cannot be read ({reason}); give a folder written by save_pretrained, or "
        "the id of a model on the Hub, which needs a network or an earlier download; or a file of weights"
    )


def from_timm(
    name: str, state: dict[str, torch.Tensor], model_args: dict, num_heads: int | None, num_decoder_heads: int
) -> Checkpoint:
    """
    A state dict under timm's names; its sizes are those of its tensors and, where they do not tell, of timm's
    `model_args`. Raises ValueError, in which it is called `name`, for what CAN's encoder cannot be.
    """
    state = in_one_form(state)
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    fc1, registers = state.get("blocks.0.mlp.fc1.weight"), state.get("register_tokens")
    if fc1 is None:
        raise ValueError(f"model_name_or_path={name!r} has other MLPs than CAN's encoder: no blocks.0.mlp.fc1.weight")
    activation = model_args.get("act_layer") or "gelu"
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": _num_blocks(state, "blocks"),
        "intermediate_size": len(fc1),
        "patch_size": tuple(patch),
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.q.bias" in state,
        "key_bias": "blocks.0.attn.k.bias" in state or "blocks.0.attn.q.bias" not in state,
        "hidden_act": {theirs: ours for ours, theirs in TIMM_ACTIVATIONS.items()}.get(activation, activation),
    }
    if "blocks.0.mlp.gate_proj.weight" in state:
        sizes |= {"gated_mlp": True, "hidden_act": "silu"}
    if registers is not None:
        sizes["num_register_tokens"] = registers.shape[1]
    if "pos_embed" in state:
        sizes["image_size"] = _add_class_position(name, state, patch, model_args.get("img_size"))
        sizes["interpolate_antialias"] = registers is not None  # as DINOv2's, which have them
    else:
        sizes |= _rotary(name, state, model_args)
    num_heads = model_args.get("num_heads") or sizes.get("num_attention_heads") or num_heads
    num_heads = num_heads or _PUBLISHED_HEADS.get(width)
    if not num_heads or width % num_heads:
        raise ValueError(
            f"model_name_or_path={name!r} is {width} wide and does not tell its number of attention heads; say it: "
            "--num_attention_heads"
        )
    sizes["num_attention_heads"] = num_heads
    decoder_width = len(state.get("decoder_embed.weight", ()))
    if not decoder_width:
        state.pop("mask_token", None)  # DINO's, of the encoder
    elif decoder_width % num_decoder_heads == 0:  # else the decoder does not fit, and stays new
        sizes["decoder_hidden_size"] = decoder_width
        sizes["decoder_num_hidden_layers"] = _num_blocks(state, "decoder_blocks")
        sizes["decoder_num_attention_heads"] = num_decoder_heads
        sizes["decoder_intermediate_size"] = len(state["decoder_blocks.0.mlp.fc1.weight"])
    if "projection_head.2.weight" in state:
        sizes["projection_size"], sizes["projection_hidden_size"] = state["projection_head.2.weight"].shape
    has_scales = "blocks.0.ls1.gamma" in state
    remarks = ("layer scale folded into the output projections",) if has_scales else ()
    source = Source(None, MAE_FILE, TIMM_LAYER_SCALE if has_scales else {}, remarks)
    config = encoder_config(**sizes)
    with torch.device("meta"):
        names = CANModel(config).state_dict()
    known = {key for ours in names for key in their_keys(f"can.{ours}", source)}
    foreign = [key for key in state if re.match(r"blocks\.|patch_embed\.|norm_pre|cls_norm", key) and key not in known]
    if foreign:
        raise ValueError(f"model_name_or_path={name!r} has parts that CAN's encoder has not, such as {foreign[0]}")
    return Checkpoint(source, config, state)


def _add_class_position(name: str, state: dict, patch: list[int], image_size) -> tuple[int, int]:
    """The image size of a table of positions, which gets a row of zeros for the class token if it has none."""
    positions = state["pos_embed"]
    if "rope.freqs" in state or "blocks.0.attn.v.bias" in state and "blocks.0.attn.k.bias" not in state:
        raise ValueError(
            f"model_name_or_path={name!r} has rotary positions beside learned ones, as CAN's encoder has not"
        )
    for has_class in (True, False):
        num_patches = positions.shape[1] - has_class
        side = math.isqrt(num_patches)
        size = as_pair(image_size or (side * patch[0], side * patch[1]))
        if num_patches and math.prod(pixels // each for pixels, each in zip(size, patch, strict=True)) == num_patches:
            if not has_class:
                state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
            return size
    raise ValueError(
        f"model_name_or_path={name!r} has positions of {positions.shape[1] - 1} patches, which is no square"
    )


def _rotary(name: str, state: dict, model_args: dict) -> dict:
    """The fields of DINOv3's positions, of whose authors' files the periods are checked; timm's do not tell them."""
    periods = state.get("rope_embed.periods")
    head_dim = 64 if periods is None else 4 * len(periods)
    expected = 100 ** (torch.arange(head_dim // 4) / (head_dim // 4))
    if "register_tokens" not in state or periods is not None and not torch.allclose(periods, expected, rtol=0.01):
        raise ValueError(
            f"model_name_or_path={name!r} has no pos_embed, and is not DINOv3 either, which has registers and rotary "
            "positions of base 100"
        )
    return {
        "position_embedding_type": "rotary",
        "num_attention_heads": state["cls_token"].shape[-1] // head_dim,
        "image_size": model_args.get("img_size", 224),  # any will do
        "layer_norm_eps": 1e-5,
    }


def _num_blocks(state: dict, name: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(rf"{name}\.(\d+)\.", key)))


def encoder_config(**sizes) -> CANConfig:
    """Of an encoder that was trained otherwise, with an objective that suits all sizes, down to a single patch."""
    return CANConfig(**sizes, mask_ratio=0, reconstruction_loss_weight=0)


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A configuration's size as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def their_keys(name: str, source: Source) -> list[str]:
    """The source's tensors that make our tensor `name`: its counterpart, and the layer scale over it if any."""
    keys = [their_name(name, source.names), their_name(name.rpartition(".")[0], source.layer_scales)]
    return [key for key in keys if key is not None]
