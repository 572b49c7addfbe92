"""
Weights from other models and for them.

- `warm_start` continues from a CAN, ViT-MAE, ViT or DINOv2 checkpoint, or from a file of weights under timm's names:
  timm's own, those of MAE's and CAN's authors.
- `to_can` makes such weights an encoder of ours.
- `to_dinov2`, `to_vit`, `to_timm`, `to_onnx` make an encoder of ours one that needs no code of ours:

    python -m modeling_can.conversion SOURCE --to can|dinov2|vit|timm|onnx OUT

The encoders are the same under other names, with these differences:
- Their patch projection is a convolution over (channel, row, column), ours a linear layer over (row, column, channel).
- DINOv2 multiplies the output of attention and of MLP by learnt vectors (layer scale). They are folded into the last
  linear layer of each, and are one in what we write.
- timm keeps the projections to queries, keys and values in one matrix.
- Positions belong to the source's patch grid. They are resized to ours and, learnt or not, go into our frozen table,
  with the class token's row as it is.
- DINOv2's classifier reads the class token and, beside it, the mean of the patch tokens, ours the mean alone.

Weights are read from and written to safetensors. What there is in other files alone is a pickle, which could execute
anything; only here is it read, by `torch.load(weights_only=True)`, and a warning says so.
"""

import argparse
import copy
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from ..configuration_can import CANConfig
from ..encoders import quiet
from ..hub import EXPORTS, check_new_folder, export_card, new_folder
from ..modeling_can import CANForImageClassification, CANForPreTraining, CANModel, CANPreTrainedModel, resize_positions
from ..recipe import INSTALL
from .names import CAN, DINOV2, ENCODER_FIELDS, TIMM, TIMM_ACTIVATIONS, VIT, join_qkv, their_name
from .processors import preprocessing, timm_preprocessing
from .reading import (
    Checkpoint,
    Source,
    as_pair,
    encoder_config,
    from_timm,
    read_checkpoint,
    read_config,
    read_weights,
    their_keys,
)


_DECODER_FIELDS = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)
# The parts that are taken as a whole or not at all, how their tensors' names begin, and the fields that must agree.
_PARTS = (
    ("encoder", r"can\.", ENCODER_FIELDS),
    ("projection head", r"projection_head\.", ("projection_hidden_size", "projection_size")),
    ("decoder", r"decoder\.(?!noise_)", _DECODER_FIELDS),
    ("noise-level embedding", r"decoder\.noise_level_embedding\.", _DECODER_FIELDS),
    ("noise head", r"decoder\.noise_head\.", _DECODER_FIELDS),
)


# ---------------------------------------------------------------------------------------------------------------------
# Warm start
# ---------------------------------------------------------------------------------------------------------------------


def warm_start(model: CANForPreTraining, name_or_path: str) -> tuple[list[str], list[str]]:
    """
    Copies what fits from a CAN, ViT-MAE, ViT or DINOv2 checkpoint, or a file under timm's names, into the parameters
    and position tables of `model`, in place and in their dtype. The encoder then gives the source's features; what was
    trainable stays so.

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
    weights, taken, new = {}, [], []
    for part, pattern, fields in _PARTS:
        keys = {name: their_keys(name, source) for name in own if re.match(pattern, name)}
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
    for name, tensor in weights.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"model_name_or_path={name_or_path!r} has a tensor of shape {tuple(tensor.shape)} where CAN's {name} "
                f"has {tuple(own[name].shape)}: it is another kind of encoder"
            )
    for name, tensor in weights.items():
        own[name].copy_(tensor)
    return taken, new


def _refuse_gates(name_or_path: str, config: PreTrainedConfig):
    if config.model_type == "dinov2" and config.use_swiglu_ffn:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} has use_swiglu_ffn=True, but CAN's MLPs have no gate; give a "
            "DINOv2 without SwiGLU, such as facebook/dinov2-large"
        )


def _check_encoder(name_or_path: str, config: PreTrainedConfig, own_config: CANConfig):
    _refuse_gates(name_or_path, config)
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
        return as_pair(config.patch_size)
    if name == "intermediate_size" and config.model_type == "dinov2":
        return int(config.hidden_size * config.mlp_ratio)
    return getattr(config, name)


def _as_word(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value if value[0] != value[1] else value[:1]))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _in_words(differences: dict[str, tuple]) -> str:
    return ", ".join(f"{name} is {_as_word(a)} there and {_as_word(b)} here" for name, (a, b) in differences.items())


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
    return resize_positions(table, grid, own_grid), remarks


# ---------------------------------------------------------------------------------------------------------------------
# Import: any of the sources as our encoder
# ---------------------------------------------------------------------------------------------------------------------


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
    """What `to_can` makes of the config.json of a CAN, ViT, ViT-MAE or DINOv2; raises ValueError as that."""
    source, config = read_config(name_or_path)
    if source is None:
        raise ValueError(
            f"{name_or_path} is timm's; write it anew first: python -m modeling_can.conversion ... --to can"
        )
    return _as_can(name_or_path, config)


def _as_can(name_or_path: str, config: PreTrainedConfig) -> CANConfig:
    _refuse_gates(name_or_path, config)
    if isinstance(config, CANConfig):
        return config
    return encoder_config(**{field: _value(config, field) for field in (*ENCODER_FIELDS, "image_size")})


# ---------------------------------------------------------------------------------------------------------------------
# Export: our encoder as models that need none of our code
# ---------------------------------------------------------------------------------------------------------------------


def to_dinov2(model: CANPreTrainedModel, head: nn.Linear | None = None) -> Dinov2Model | Dinov2ForImageClassification:
    """
    The same encoder as transformers' DINOv2, which loads it as `Dinov2Model`, `Dinov2Backbone` and, with a classifier,
    `Dinov2ForImageClassification`. Dropout and stochastic depth, which DINOv2 has in other places, are left at 0.

    Args:
        model (`CANPreTrainedModel`): Any of our models; the classifier of a `CANForImageClassification` goes along.
        head (`nn.Linear` from `2 * hidden_size` numbers, *optional*):
            A classifier of the class token and, beside it, the mean of the patch tokens. Its classes are those of
            `model.config.id2label`.

    Returns:
        The model in evaluation mode, in the dtype of `model`, checked against it on random pixels of three sizes.

    Raises:
        ValueError: for a grid of patches that is not square, or an MLP whose width is no multiple of the encoder's,
            which DINOv2 cannot have; `to_vit` can.
    """
    config, given_head = model.config, head
    check_dinov2(config)
    if head is None and isinstance(model, CANForImageClassification):
        head = nn.Linear(2 * config.hidden_size, config.num_labels)
        head.weight.data = nn.functional.pad(model.classifier.weight.detach(), (config.hidden_size, 0))
        head.bias.data = model.classifier.bias.detach()
    model_class = Dinov2Model if head is None else Dinov2ForImageClassification
    fields = _shared_fields(config)
    if given_head is not None:
        fields["problem_type"] = "single_label_classification"
    theirs = model_class(Dinov2Config(**fields, mlp_ratio=config.intermediate_size // config.hidden_size))
    weights = {
        key: torch.ones_like(tensor) if key.endswith("lambda1") else torch.zeros_like(tensor)  # of the mask token
        for key, tensor in theirs.base_model.state_dict().items()
    }
    theirs.base_model.load_state_dict(weights | encoder_weights(model, DINOV2))
    if head is not None:
        theirs.classifier.load_state_dict(head.state_dict())
    theirs = theirs.to(model.dtype).eval()

    def ours(encoder: CANModel, pixels: torch.Tensor, other_size: bool) -> torch.Tensor:
        tokens = encoder(pixels, interpolate_pos_encoding=other_size).last_hidden_state
        if head is None:
            return tokens
        class_token, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
        if given_head is None:
            return copy.deepcopy(model.classifier).to(tokens)(mean)
        return copy.deepcopy(given_head).to(tokens)(torch.cat([class_token, mean], dim=1))

    _check_equal(model, ours, theirs, lambda twin, pixels, other_size: twin(pixels)[0], all_sizes=True)
    return theirs


def check_dinov2(config: CANConfig):
    """Raises ValueError for an encoder that DINOv2's class cannot be; see `to_dinov2`."""
    rows, columns = config.grid_shape
    if rows != columns:
        raise ValueError(
            f"image_size={config.image_size} with patch_size={config.patch_size} makes a grid of {rows} x {columns} "
            "patches, and DINOv2's positions need a square one; export to vit, timm or onnx"
        )
    if config.intermediate_size % config.hidden_size:
        raise ValueError(
            f"intermediate_size={config.intermediate_size} is no multiple of hidden_size={config.hidden_size}, as "
            "DINOv2 needs it; export to vit, timm or onnx"
        )


def to_vit(model: CANPreTrainedModel) -> ViTModel:
    """
    The same encoder as transformers' `ViTModel`, without its pooler. Any grid will do at the trained size; other sizes
    (`interpolate_pos_encoding=True`) need a square grid of square patches, with this class.

    Args:
        model (`CANPreTrainedModel`): Any of our models; a classifier is left out, as ViT's reads the class token.

    Returns:
        The model in evaluation mode, in the dtype of `model`, checked against it on random pixels.
    """
    config = model.config
    theirs = ViTModel(
        ViTConfig(**_shared_fields(config), intermediate_size=config.intermediate_size), add_pooling_layer=False
    )
    theirs.load_state_dict(encoder_weights(model, VIT))
    theirs = theirs.to(model.dtype).eval()

    def tokens(encoder: CANModel | ViTModel, pixels: torch.Tensor, other_size: bool) -> torch.Tensor:
        return encoder(pixels, interpolate_pos_encoding=other_size).last_hidden_state

    is_square = config.grid_shape[0] == config.grid_shape[1] and config.patch_shape[0] == config.patch_shape[1]
    _check_equal(model, tokens, theirs, tokens, all_sizes=is_square)
    return theirs


def accept_colours(model: Dinov2ForImageClassification) -> Dinov2ForImageClassification:
    """
    The same classifier of grey pictures for RGB ones, which pipelines and widgets give: it weighs the colours as
    Pillow's conversion to grey does. The processor must have the grey mean and deviation three times.
    """
    config = copy.deepcopy(model.config)
    config.num_channels = 3
    colour, weights = type(model)(config), model.state_dict()
    (key,) = (key for key in weights if key.endswith("patch_embeddings.projection.weight"))
    weights[key] = weights[key] * torch.tensor([0.299, 0.587, 0.114])[:, None, None].to(weights[key])
    colour.load_state_dict(weights)
    return colour.to(model.dtype).eval()


def to_timm(model: CANPreTrainedModel) -> tuple[dict[str, torch.Tensor], dict]:
    """
    The same encoder, with the classifier if there is one, as timm's `VisionTransformer` has it.

    Returns:
        Its state dict, and the `config.json` with which `timm.create_model("local-dir:FOLDER")` builds it. Pooling is
        the mean of the patch tokens after the final norm.

    Raises:
        ValueError: for another `layer_norm_eps` than timm's 1e-6, or an activation that timm has not.
    """
    config = model.config
    if config.layer_norm_eps != 1e-6:
        raise ValueError(f"layer_norm_eps={config.layer_norm_eps}, but timm's ViT has 1e-6; export to vit or onnx")
    if config.hidden_act not in TIMM_ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r} is none of timm's; export to vit, dinov2 or onnx")
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) != config.intermediate_size:  # as timm has it, and rounding can fall short
        ratio = (config.intermediate_size + 0.5) / config.hidden_size
    state = join_qkv(encoder_weights(model, TIMM))
    num_classes = 0
    if isinstance(model, CANForImageClassification):
        num_classes = config.num_labels
        state |= {f"head.{name}": tensor for name, tensor in model.classifier.state_dict().items()}
    arguments = {
        "img_size": list(config.image_shape),
        "patch_size": list(config.patch_shape),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "act_layer": TIMM_ACTIVATIONS[config.hidden_act],
        "global_pool": "avg",
        "fc_norm": False,  # or timm would normalise after pooling
        "num_classes": num_classes,
    }
    description = {
        "architecture": "vit_base_patch16_224",  # the class; the sizes are those below
        "num_classes": num_classes,
        "num_features": config.hidden_size,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.num_channels, *config.image_shape],
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if num_classes:
        description["pretrained_cfg"]["label_names"] = [config.id2label[index] for index in range(num_classes)]
    # What comes back must be what was given: as close to a check as there is one without timm.
    twin = CANForPreTraining(
        encoder_config(**{name: getattr(config, name) for name in (*ENCODER_FIELDS, "image_size")})
    )
    copy_weights(from_timm("timm", state, arguments, None, 1), twin, "timm")
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(twin.can.state_dict()[name], tensor.float().cpu()), f"{name} is not what it was"
    return state, description


def to_onnx(model: CANPreTrainedModel, path: Path):
    """
    Writes the encoder, or the classifier, in fp32 for pictures of the trained size in batches of any size, and checks
    it in onnxruntime. Input `pixel_values`; outputs `last_hidden_state` and `pooler_output`, or `logits`.

    Raises:
        ValueError: if the packages of the extra `onnx` are missing.
        AssertionError: if onnxruntime computes anything else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which torch needs
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: {INSTALL.format('onnx')}") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # no word about torchvision, which is not needed
    twin = copy.deepcopy(model if isinstance(model, CANForImageClassification) else model.base_model).float().eval()
    names = ["logits"] if isinstance(twin, CANForImageClassification) else ["last_hidden_state", "pooler_output"]

    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, pixel_values):
            output = self.twin(pixel_values)
            return tuple(output[name] for name in names)

    config, outputs = model.config, Outputs().eval()
    pixels = torch.randn(3, config.num_channels, *config.image_shape, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        outputs,
        (pixels[:2],),
        input_names=["pixel_values"],
        output_names=names,
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch_size")}},
        dynamo=True,
        verbose=False,
    )
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph:
            node.metadata_props.clear()  # where in the code it comes from, with the paths of this machine
    program.save(path, external_data=sum(p.numel() for p in twin.parameters()) > 4e8)  # a file holds 2 GB at most
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(outputs).double()
    for batch in (pixels[:1], pixels):
        with torch.no_grad():
            expected, rounded = exact(batch.double()), outputs(batch)
        computed = session.run(names, {"pixel_values": batch.numpy()})
        for name, truth, ours, theirs in zip(names, expected, rounded, computed, strict=True):
            error, own_error = ((torch.as_tensor(x) - truth).abs().max().item() for x in (theirs, ours))
            bound = max(1e-5 * max(1, truth.abs().max().item()), 4 * own_error)  # of fp32, which deep encoders amplify
            assert error <= bound, f"{name} differs by {error:.1e} in onnxruntime, and by {own_error:.1e} in torch"


def encoder_weights(model: CANPreTrainedModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of the encoder under the names of a table, in the layout of a ViT whose patches are convolved."""
    weights, config = {}, model.config
    for name, tensor in model.base_model.state_dict().items():
        if name == "embeddings.patch_embeddings.weight":  # the inverse of `_in_our_layout`
            tensor = tensor.unflatten(1, (*config.patch_shape, config.num_channels)).permute(0, 3, 1, 2)
        weights[their_name(f"can.{name}", names)] = tensor.detach().contiguous()
    return weights


def _shared_fields(config: CANConfig) -> dict:
    """What the configurations of ViT and DINOv2 have in common with ours."""
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
              "num_channels", "qkv_bias", "initializer_range", "id2label", "label2id", "problem_type")  # fmt: skip
    sizes = {"image_size": config.image_shape, "patch_size": config.patch_shape}
    # An int where it can be one: ViT divides by it.
    sizes = {name: size[0] if size[0] == size[1] else list(size) for name, size in sizes.items()}
    return {**{name: getattr(config, name) for name in fields}, **sizes}


@torch.no_grad()
def _check_equal(
    model: CANPreTrainedModel, ours: Callable, theirs: PreTrainedModel, exported: Callable, all_sizes: bool
):
    """
    Raises AssertionError unless both give the same to 1e-5, on random pixels of the trained size and of others. In
    fp64, in which rounding, that deep encoders amplify, does not hide an error of the conversion, nor looks like one.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    encoder, twin = copy.deepcopy(model.base_model).cpu().double().eval(), copy.deepcopy(theirs).cpu().double().eval()
    (rows, columns), (height, width) = config.grid_shape, config.patch_shape
    grids = [(rows, columns)] + [(rows + 1, columns + 2), (max(1, rows // 2), columns)] * all_sizes
    for grid in grids:
        shape = (2, config.num_channels, grid[0] * height, grid[1] * width)
        pixels = torch.randn(shape, generator=generator).double()
        other_size = grid != config.grid_shape
        error = (ours(encoder, pixels, other_size) - exported(twin, pixels, other_size)).abs().max()
        assert error <= 1e-5, f"the export differs by {error:.1e} at {shape[2]} x {shape[3]} pixels"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def convert(source: str, target: str, folder: Path, num_attention_heads: int | None = None) -> CANPreTrainedModel:
    """
    Writes the encoder of `source` into a new folder, all or nothing, with the image processor that came with it and a
    card.

    Args:
        source (`str`), num_attention_heads (`int`, *optional*): As in `to_can`.
        target (`str`): One of `hub.EXPORTS`.
        folder (`Path`): Must not exist, or be empty.

    Returns:
        The encoder, as ours.

    Raises:
        ValueError: for a folder with something in it, and as `to_can` and the function of the target.
    """
    check_new_folder(folder)
    model = to_can(source, num_attention_heads)
    with new_folder(folder) as partial:
        processor = preprocessing(source)
        if target == "timm":
            state, description = to_timm(model)
            description["pretrained_cfg"] |= timm_preprocessing(processor)
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, partial / "model.safetensors")
            (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        elif target == "onnx":
            to_onnx(model, partial / "model.onnx")
            values = model.config.to_dict()
            values.pop("auto_map", None)  # which names files of code; a graph needs none
            (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        else:
            {"can": lambda model: model, "dinov2": to_dinov2, "vit": to_vit}[target](model).save_pretrained(partial)
        if processor and target != "timm":
            (partial / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        is_classifier = isinstance(model, CANForImageClassification) and target != "vit"
        card = export_card(folder.resolve().name, target, source, model.config, is_classifier, bool(processor))
        (partial / "README.md").write_text(card)
    return model


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_can.conversion", description="Weights from other models and for them."
    )
    parser.add_argument(
        "source", help="folder or Hub id of a CAN, ViT, ViT-MAE, DINOv2 or timm ViT, or a .pth / .safetensors of MAE's"
    )
    parser.add_argument(
        "--to",
        choices=EXPORTS,
        required=True,
        dest="target",
        help="; ".join(f"{name}: {text}" for name, text in EXPORTS.items())
        + ". dinov2 needs a square grid of patches, onnx the extra [onnx]",
    )
    parser.add_argument("folder", type=Path, help="where to write it; must not exist, or be empty")
    parser.add_argument(
        "--num_attention_heads", type=int, help="of a file of weights, which does not tell, if its width is unusual"
    )
    arguments = parser.parse_args(argv)
    try:
        with quiet():
            model = convert(**vars(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"modeling_can.conversion: {error}")
    config, kind = model.config, type(model).__name__
    print(
        f"{arguments.source} -> {arguments.folder} ({arguments.target}): {kind}, {config.num_hidden_layers} layers of "
        f"width {config.hidden_size} with {config.num_attention_heads} heads, {model.num_parameters() / 1e6:.2f} M "
        f"parameters; {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}"
    )
    had_classifier = not Path(arguments.source).is_file() and _source_has_classifier(arguments.source)
    if had_classifier and (arguments.target == "vit" or not isinstance(model, CANForImageClassification)):
        print("its classifier is left out: only CAN's own goes along, and not to vit")
    if not preprocessing(arguments.source):
        print("no image processor came with it: normalise pictures as those that it was trained on")


def _source_has_classifier(name_or_path: str) -> bool:
    values, _ = PreTrainedConfig.get_config_dict(name_or_path)
    return values.get("num_classes", 0) > 0 or has_classifier(PreTrainedConfig.from_dict(values))
