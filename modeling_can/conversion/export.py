"""
Our encoder as models that need none of our code: `to_dinov2`, `to_dinov3_vit`, `to_vit` and `to_timm`. `convert`
writes these, a CAN or an ONNX graph into a folder. Each is checked against the source before it is handed out.
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from ..configuration_can import ENCODER_VARIANTS, CANConfig
from ..files import check_new_folder, new_folder
from ..hub import export_card
from ..modeling_can import CANForImageClassification, CANForPreTraining, CANModel, CANPreTrainedModel
from .importing import copy_weights, gated_width, to_can
from .names import (
    DINOV2,
    DINOV2_GATED,
    DINOV3,
    ENCODER_FIELDS,
    TIMM,
    TIMM_ACTIVATIONS,
    VIT,
    join_qkv,
    their_name,
)
from .onnx import to_onnx
from .processors import preprocessing, timm_preprocessing
from .reading import encoder_config, from_timm


__all__ = [
    "accept_colors",
    "check_dinov2",
    "convert",
    "encoder_weights",
    "export_kind",
    "native_kind",
    "to_dinov2",
    "to_dinov3_vit",
    "to_timm",
    "to_vit",
]


_DINOV2 = {
    "dinov2": (Dinov2Config, Dinov2Model, Dinov2ForImageClassification),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        Dinov2WithRegistersForImageClassification,
    ),
}
# Which of ENCODER_VARIANTS the classes have, those of grids that need not be square first
_VARIANTS = {
    "vit": (),
    "timm": (),
    "dinov3_vit": ENCODER_VARIANTS,  # without a table of positions, none is resized
    "dinov2": ("gated_mlp",),
    "dinov2_with_registers": ("gated_mlp", "num_register_tokens", "interpolate_antialias"),
}


def export_kind(config: CANConfig) -> str:
    """`native_kind` where an export to it will do, else ONNX, which takes all."""
    kind = native_kind(config)
    return "onnx" if _misfit(kind, config) else kind


def native_kind(config: CANConfig) -> str:
    """Which of DINOv2, DINOv2 with registers and DINOv3 has the positions and registers of an encoder."""
    if config.position_embedding_type == "rotary":
        return "dinov3_vit"
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def _lacks(target: str, config: CANConfig) -> list[str]:
    """What the encoder has and the class of an export has not."""
    if target == "dinov3_vit" and config.position_embedding_type != "rotary":
        return ["position_embedding_type"]
    return [
        name
        for name in ENCODER_VARIANTS
        if name not in _VARIANTS[target] and getattr(config, name) != getattr(CANConfig, name)
    ]


def _check(target: str, config: CANConfig):
    """Raises ValueError for an encoder that is none of the export, with the exports that it can be."""
    if reason := _misfit(target, config):
        others = ", ".join(other for other in _VARIANTS if not _misfit(other, config))
        raise ValueError(f"{reason}; export to {f'{others} or onnx' if others else 'onnx'}")


def _misfit(target: str, config: CANConfig) -> str | None:
    """What of the encoder the class of an export has not, in words; `None` if it can be that."""
    if lacks := _lacks(target, config):
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in lacks)
        return f"{values} is nothing that {target} has"
    if target == "dinov2_with_registers" and not config.interpolate_antialias:
        return (
            "interpolate_antialias=False, but DINOv2 with registers resizes positions with antialiasing (write "
            '"interpolate_antialias": true into config.json, which changes the outputs at other sizes than '
            f"{config.image_size} alone)"
        )
    if target in _DINOV2:
        return _misfit_of_dinov2(config)
    if target == "timm" and config.layer_norm_eps != 1e-6:
        return f"layer_norm_eps={config.layer_norm_eps}, but timm's ViT has 1e-6"
    if target == "timm" and config.hidden_act not in TIMM_ACTIVATIONS:
        return f"hidden_act={config.hidden_act!r} is none of timm's"
    return None


def _misfit_of_dinov2(config: CANConfig) -> str | None:
    """Of its sizes."""
    rows, columns = config.grid_shape
    if rows != columns:
        return (
            f"image_size={config.image_size} with patch_size={config.patch_size} makes a grid of {rows} x {columns} "
            "patches, and DINOv2's positions need a square one"
        )
    width, ratio = config.hidden_size, _mlp_ratio(config)
    if config.gated_mlp and config.hidden_act != "silu":
        return f"hidden_act={config.hidden_act!r}, but DINOv2's gate has 'silu'"
    if config.gated_mlp and gated_width(width, ratio) != config.intermediate_size:
        return (
            f"intermediate_size={config.intermediate_size} is none that DINOv2's gated MLPs have with "
            f"hidden_size={width}"
        )
    if not config.gated_mlp and config.intermediate_size % width:
        return (
            f"intermediate_size={config.intermediate_size} is no multiple of hidden_size={width}, as DINOv2 needs it"
        )
    return None


def to_dinov2(model: CANPreTrainedModel, head: nn.Linear | None = None, model_type: str = "dinov2") -> PreTrainedModel:
    """
    The same encoder as transformers' DINOv2, which loads it as `Dinov2Model`, `Dinov2Backbone` and, with a classifier,
    `Dinov2ForImageClassification`. Dropout and stochastic depth, which DINOv2 has in other places, are left at 0.

    Args:
        model (`CANPreTrainedModel`): Any of our models; the classifier of a `CANForImageClassification` goes along.
        head (`nn.Linear` from `2 * hidden_size` numbers, *optional*):
            A classifier of the class token and, beside it, the mean of the patch tokens. Its classes are those of
            `model.config.id2label`.
        model_type (`str`, defaults to `"dinov2"`): Or `"dinov2_with_registers"`, `Dinov2WithRegistersModel` and so on.

    Returns:
        The model in evaluation mode, in the dtype of `model`, checked against it on random pixels of three sizes.

    Raises:
        ValueError: for an encoder that the class cannot be: a grid of patches that is not square, another width of
            the MLPs, or `ENCODER_VARIANTS` that it has not. The message says what else it can be.
    """
    config, given_head = model.config, head
    check_dinov2(config, model_type)
    if head is None and isinstance(model, CANForImageClassification):
        head = nn.Linear(2 * config.hidden_size, config.num_labels)
        head.weight.data = nn.functional.pad(model.classifier.weight.detach(), (config.hidden_size, 0))
        head.bias.data = model.classifier.bias.detach()
    config_class, encoder_class, classifier_class = _DINOV2[model_type]
    fields = _shared_fields(config) | {"mlp_ratio": _mlp_ratio(config), "use_swiglu_ffn": config.gated_mlp}
    if model_type == "dinov2_with_registers":
        fields["num_register_tokens"] = config.num_register_tokens
    if given_head is not None:
        fields["problem_type"] = "single_label_classification"
    theirs = (encoder_class if head is None else classifier_class)(config_class(**fields))
    _load_dino(theirs.base_model, encoder_weights(model, DINOV2_GATED if config.gated_mlp else DINOV2))
    if head is not None:
        theirs.classifier.load_state_dict(head.state_dict())
    theirs = theirs.to(model.dtype).eval()

    def ours(encoder: CANModel, pixels: torch.Tensor, other_size: bool) -> torch.Tensor:
        tokens = encoder(pixels, interpolate_pos_encoding=other_size).last_hidden_state
        if head is None:
            return tokens
        class_token, mean = tokens[:, 0], tokens[:, config.num_prefix_tokens :].mean(dim=1)
        if given_head is None:
            return copy.deepcopy(model.classifier).to(tokens)(mean)
        return copy.deepcopy(given_head).to(tokens)(torch.cat([class_token, mean], dim=1))

    _check_equal(model, ours, theirs, lambda twin, pixels, other_size: twin(pixels)[0], all_sizes=True)
    return theirs


def _load_dino(theirs: PreTrainedModel, weights: dict[str, torch.Tensor]):
    """Beside our weights, layer scales of 1 and a mask token of 0."""
    own = {
        key: torch.ones_like(tensor) if key.endswith("lambda1") else torch.zeros_like(tensor)
        for key, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(own | weights)


def check_dinov2(config: CANConfig, model_type: str = "dinov2"):
    """Raises ValueError for an encoder that DINOv2's class cannot be; see `to_dinov2`."""
    _check(model_type, config)


def _mlp_ratio(config: CANConfig) -> int:
    """DINOv2's, of gated MLPs the inverse of `gated_width` if there is one."""
    if config.gated_mlp:
        return round(1.5 * config.intermediate_size / config.hidden_size)
    return config.intermediate_size // config.hidden_size


def to_dinov3_vit(model: CANPreTrainedModel) -> DINOv3ViTModel:
    """
    The same encoder as transformers' `DINOv3ViTModel`, in training too: its coordinates are not rescaled at random.
    Any grid will do. Dropout and stochastic depth are left at 0.

    Args:
        model (`CANPreTrainedModel`): Any of our models; a classifier is left out, as transformers has none for DINOv3.

    Returns:
        The model in evaluation mode, in the dtype of `model`, checked against it on random pixels of three sizes.

    Raises:
        ValueError: for an encoder whose positions are not rotary.
    """
    config = model.config
    _check("dinov3_vit", config)
    fields = _shared_fields(config)
    has_bias = fields.pop("qkv_bias")
    theirs = DINOv3ViTModel(
        DINOv3ViTConfig(
            **fields,
            intermediate_size=config.intermediate_size,
            query_bias=has_bias,
            key_bias=has_bias and config.key_bias,
            value_bias=has_bias,
            use_gated_mlp=config.gated_mlp,
            num_register_tokens=config.num_register_tokens,
            rope_theta=config.rope_theta,
            pos_embed_rescale=None,
        )
    )
    _load_dino(theirs, encoder_weights(model, DINOV3))
    theirs = theirs.to(model.dtype).eval()

    def ours(encoder: CANModel, pixels: torch.Tensor, other_size: bool) -> torch.Tensor:
        return encoder(pixels, interpolate_pos_encoding=other_size).last_hidden_state

    _check_equal(model, ours, theirs, lambda twin, pixels, other_size: twin(pixels)[0], all_sizes=True)
    return theirs


def to_vit(model: CANPreTrainedModel) -> ViTModel:
    """
    The same encoder as transformers' `ViTModel`, without its pooler. Any grid will do at the trained size; other sizes
    (`interpolate_pos_encoding=True`) need a square grid of square patches, with this class.

    Args:
        model (`CANPreTrainedModel`): Any of our models; a classifier is left out, as ViT's reads the class token.

    Returns:
        The model in evaluation mode, in the dtype of `model`, checked against it on random pixels.

    Raises:
        ValueError: for `ENCODER_VARIANTS` that are not at their defaults.
    """
    config = model.config
    _check("vit", config)
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


def accept_colors(model: Dinov2ForImageClassification) -> Dinov2ForImageClassification:
    """
    The same classifier of gray images for RGB ones, which pipelines and widgets give: it weighs the colors as
    Pillow's conversion to gray does. The processor must have the gray mean and standard deviation three times.
    """
    config = copy.deepcopy(model.config)
    config.num_channels = 3
    color, weights = type(model)(config), model.state_dict()
    (key,) = (key for key in weights if key.endswith("patch_embeddings.projection.weight"))
    weights[key] = weights[key] * torch.tensor([0.299, 0.587, 0.114])[:, None, None].to(weights[key])
    color.load_state_dict(weights)
    return color.to(model.dtype).eval()


def to_timm(model: CANPreTrainedModel) -> tuple[dict[str, torch.Tensor], dict]:
    """
    The same encoder, with the classifier if there is one, as timm's `VisionTransformer` has it.

    Returns:
        Its state dict, and the `config.json` with which `timm.create_model("local-dir:FOLDER")` builds it. Pooling is
        the mean of the patch tokens after the final norm.

    Raises:
        ValueError: for another `layer_norm_eps` than timm's 1e-6, an activation that timm has not, or
            `ENCODER_VARIANTS` that are not at their defaults.
    """
    config = model.config
    _check("timm", config)
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
        "fc_norm": False,  # or timm would normalize after pooling
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
    returned = from_timm(name="timm", state=state, model_args=arguments, num_heads=None, num_decoder_heads=1)
    copy_weights(returned, twin, "timm")
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(twin.can.state_dict()[name], tensor.float().cpu()), f"{name} is not what it was"
    return state, description


def encoder_weights(model: CANPreTrainedModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of the encoder under the names of a table, in the layout of a ViT whose patches are convolved."""
    weights, config = {}, model.config
    for name, tensor in model.base_model.state_dict().items():
        if name == "embeddings.patch_embeddings.weight":  # the inverse of `importing._in_our_layout`
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
    with new_folder(folder) as made:
        processor = preprocessing(source)
        if target == "timm":
            state, description = to_timm(model)
            description["pretrained_cfg"] |= timm_preprocessing(processor)
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, made / "model.safetensors")
            (made / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        elif target == "onnx":
            to_onnx(model, made / "model.onnx")
            values = model.config.to_dict()
            values.pop("auto_map", None)  # which names files of code; a graph needs none
            (made / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        else:
            exports = {
                "can": lambda model: model,
                "dinov2": to_dinov2,
                "dinov2_with_registers": partial(to_dinov2, model_type=target),
                "dinov3_vit": to_dinov3_vit,
                "vit": to_vit,
            }
            exports[target](model).save_pretrained(made)
        if processor and target != "timm":
            (made / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        is_classifier = isinstance(model, CANForImageClassification) and target not in ("vit", "dinov3_vit")
        card = export_card(
            name=folder.resolve().name,
            target=target,
            source=source,
            config=model.config,
            is_classifier=is_classifier,
            processor=processor,
        )
        (made / "README.md").write_text(card)
    return model
