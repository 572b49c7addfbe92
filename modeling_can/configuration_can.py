"""Configuration of CAN (arXiv 2210.16870): contrastive learning, masked autoencoding, noise prediction in one ViT."""

import difflib
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


logger = logging.get_logger(__name__)

if TYPE_CHECKING:  # never runs: transformers reads it, and so ships the models with every configuration
    from .modeling_can import CANModel  # noqa: F401

# transformers' own map would name only the class that is saved; one folder serves all of them.
AUTO_MAP = {
    "AutoConfig": "configuration_can.CANConfig",
    "AutoModel": "modeling_can.CANModel",
    "AutoModelForPreTraining": "modeling_can.CANForPreTraining",
    "AutoModelForImageClassification": "modeling_can.CANForImageClassification",
}

# What a saved configuration that does not say it, because it is older than the field, was trained with: the paper's.
EARLIER = {"noise_head": "shared", "norm_noise_loss": False}

# What the encoders of other models have instead; a default is left out of what is saved.
ENCODER_VARIANTS = (
    "key_bias",
    "gated_mlp",
    "num_register_tokens",
    "position_embedding_type",
    "rope_theta",
    "interpolate_antialias",
)


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """K, the number of patches that stay visible when `mask_ratio` of `num_patches` are masked; at least one."""
    return max(1, int(num_patches * (1 - mask_ratio)))


@strict
class CANConfig(PreTrainedConfig):
    r"""
    The configuration of `CANModel`, `CANForPreTraining` and `CANForImageClassification`. The defaults are CAN with a
    ViT-B/16 encoder at 224 x 224. Numbers come from the paper's abstract (mask ratio), from the authors' PyTorch
    release shlokk/mae-contrastive (noise, temperature, projection, decoder) and from bwconrad/can (loss weights).

    Args:
        hidden_size (`int`, defaults to 768): Width D of the encoder; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): Encoder blocks.
        num_attention_heads (`int`, defaults to 12): Attention heads of each encoder block.
        intermediate_size (`int`, defaults to 3072): Width of the encoder's MLPs.
        hidden_act (`str`, defaults to `"gelu"`): Activation in the MLPs of encoder and decoder.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after attention and MLP, in [0, 1).
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on attention weights, in [0, 1).
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth of the last encoder block, in [0, 1); it grows linearly from 0 at the first.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the class and mask tokens. Linear layers are Xavier-uniform, as in MAE.
        layer_norm_eps (`float`, defaults to 1e-6): As in MAE (transformers' `ViTMAEConfig` has 1e-12).
        image_size (`int` or `(height, width)`, defaults to 224): Pixels; a multiple of `patch_size`.
        patch_size (`int` or `(height, width)`, defaults to 16): Pixels.
        num_channels (`int`, defaults to 3): Channels of an image.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have a bias.
        key_bias (`bool`, defaults to `True`): `False` leaves it out of the key projections (DINOv3).
        gated_mlp (`bool`, defaults to `False`):
            Whether the MLPs of encoder and decoder are gated, `down(act(gate(x)) * up(x))` (DINOv3 S+, H+ and 7B;
            DINOv2 giant).
        num_register_tokens (`int`, defaults to 0):
            Learned tokens between class token and patch tokens in the encoder (arXiv 2309.16588). They are no part
            of the pooled features, and the decoder does not see them.
        position_embedding_type (`str`, defaults to `"absolute"`):
            `"absolute"`: a frozen table, filled with 2-D sin-cos, is added to the tokens. `"rotary"`: each layer of
            the encoder turns queries and keys of the patches by their row and column, as in DINOv3; the width of a
            head is then a multiple of 4. The decoder has a table in both cases.
        rope_theta (`float`, defaults to 100.0): Base of the frequencies of rotary positions, > 0.
        interpolate_antialias (`bool`, defaults to `False`):
            Whether a table of positions is resized to other grids with antialiasing (DINOv2 with registers).
        decoder_hidden_size (`int`, defaults to 512): Width; a multiple of 4 and of `decoder_num_attention_heads`.
        decoder_num_hidden_layers (`int`, defaults to 8): Decoder blocks.
        decoder_num_attention_heads (`int`, defaults to 16): Attention heads of each decoder block.
        decoder_intermediate_size (`int`, defaults to 2048): Width of the decoder's MLPs.
        mask_ratio (`float`, defaults to 0.5): Fraction of the patches that are masked, in [0, 1).
        noise_std_max (`float`, defaults to 0.05):
            sigma_max, in units of normalized pixels: each view's noise level is drawn from U[0, sigma_max].
            0 builds no noise-level embedding. 0.05 is the default of the authors' flag, which never reaches their
            model: that runs with 0.1. On CIFAR-10, noise is learned from 0.1 on (experiments/noise).
        noise_level_embedding (`bool`, defaults to `True`):
            Whether the decoder is told each view's noise level; `False` is for ablations.
        projection_hidden_size (`int`, *optional*): Hidden width of the contrastive head; `hidden_size` if `None`.
        projection_size (`int`, defaults to 128): Dimension of the contrastive embedding.
        temperature (`float`, defaults to 0.1): tau of InfoNCE, > 0.
        contrastive_loss_weight (`float`, defaults to 0.03): Weight of the contrastive term C, >= 0.
        reconstruction_loss_weight (`float`, defaults to 0.67): Weight of the reconstruction term A, >= 0.
        denoising_loss_weight (`float`, defaults to 0.30): Weight of the noise-prediction term N, >= 0.
        norm_pix_loss (`bool`, defaults to `False`):
            Whether the reconstruction target is normalized per patch (MAE, section 4). Never applied to the noise
            target, from which it would erase the noise level.
        noise_head (`str`, defaults to `"own"`):
            `"own"`: a linear layer of its own, which starts at zero, predicts e on the visible patches, and sigma
            times that is the predicted noise. `"shared"`: one layer predicts pixels and noise, as in the paper.
        norm_noise_loss (`bool`, defaults to `True`):
            Whether N counts relative to the loss of predicting no noise, noise_std_max^2 / 3, one constant for all
            noise levels: a head that has learned nothing then costs `denoising_loss_weight`. `False`, as in the paper,
            counts it in raw units.

    Raises:
        ValueError: for a value that cannot work; the message names the field, the value and the fix.
        StrictDataclassFieldValidationError: for a value of the wrong type.

    Example:

    ```python
    >>> from modeling_can import CANConfig, CANForPreTraining
    >>> from modeling_can.configuration_can import MAE, SIMCLR

    >>> model = CANForPreTraining(CANConfig())
    >>> simclr = CANForPreTraining(CANConfig(**SIMCLR))
    >>> mae = CANForPreTraining(CANConfig(**MAE))
    ```"""

    model_type = "can"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    key_bias: bool = True
    gated_mlp: bool = False
    num_register_tokens: int = 0
    position_embedding_type: str = "absolute"
    rope_theta: float | int = 100.0
    interpolate_antialias: bool = False
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    mask_ratio: float | int = 0.5
    noise_std_max: float | int = 0.05
    noise_level_embedding: bool = True
    projection_hidden_size: int | None = None
    projection_size: int = 128
    temperature: float | int = 0.1
    contrastive_loss_weight: float | int = 0.03
    reconstruction_loss_weight: float | int = 0.67
    denoising_loss_weight: float | int = 0.30
    norm_pix_loss: bool = False
    noise_head: str = "own"
    norm_noise_loss: bool = True

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        if self.projection_hidden_size is None:
            self.projection_hidden_size = self.hidden_size
        # JSON knows no tuples: one type before and after a save, so that configurations compare equal.
        for name in ("image_size", "patch_size"):
            shape = getattr(self, name)
            if not isinstance(shape, int):
                if len(shape) != 2:
                    raise ValueError(f"{name}={shape} has {len(shape)} entries; give one number or (height, width)")
                setattr(self, name, tuple(shape))
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_objective()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As in transformers, `from_pretrained` included, but for overrides, which are checked like all values, and for
        configurations from before `noise_head` and `norm_noise_loss`, which are read as `"shared"` and `False`.
        """
        cls._refuse_misspelt(kwargs)
        overrides = {name: kwargs.pop(name) for name in CANConfig.__annotations__ if name in kwargs}
        # What a user writes is refused; what a file holds, from another model perhaps, is kept as it is.
        foreign = {name: config_dict[name] for name in cls._misspelt(config_dict)}
        for name, near in cls._misspelt(config_dict).items():
            logger.warning("the configuration has a field %r, which CANConfig does not know; it has %r", name, near)
        own = {name: value for name, value in config_dict.items() if name not in foreign}
        made = super().from_dict({**EARLIER, **own, **overrides}, **kwargs)
        for name, value in foreign.items():
            setattr(made[0] if isinstance(made, tuple) else made, name, value)
        return made

    def to_dict(self):
        """As in transformers, but for `ENCODER_VARIANTS` at their defaults, which are left out."""
        values = super().to_dict()
        for field in fields(CANConfig):
            if field.name in ENCODER_VARIANTS and values[field.name] == field.default:
                del values[field.name]
        return values

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As in transformers, for a model's configuration too. The files that define CAN go into the folder, and its
        `config.json` names all their classes, so that every Auto class loads it without this package
        (`trust_remote_code=True`).
        """
        # A subclass that is registered to be shipped has put its name and its file there before. What the folder
        # that this was loaded from named besides does not come along.
        named = vars(self).get("auto_map") or {}
        shipped = {
            key: name for key, name in named.items() if Path(save_directory, f"{name.split('.')[0]}.py").exists()
        }
        self.auto_map = {**(AUTO_MAP if type(self) is CANConfig else {}), **shipped}
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return (self.patch_size, self.patch_size) if isinstance(self.patch_size, int) else self.patch_size

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of the patch grid."""
        return self.image_shape[0] // self.patch_shape[0], self.image_shape[1] // self.patch_shape[1]

    @property
    def num_patches(self) -> int:
        """L, the number of patches of an image."""
        return self.grid_shape[0] * self.grid_shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """How many of the encoder's tokens come before those of the patches: the class token and the registers."""
        return 1 + self.num_register_tokens

    @property
    def pixels_per_patch(self) -> int:
        """P = patch height x patch width x channels."""
        return self.patch_shape[0] * self.patch_shape[1] * self.num_channels

    @property
    def uses_decoder(self) -> bool:
        """Whether reconstruction or noise prediction is part of the objective."""
        return self.reconstruction_loss_weight > 0 or self.denoising_loss_weight > 0

    @property
    def has_noise_head(self) -> bool:
        """Whether a layer of its own predicts the noise. There is none where nothing is to be predicted."""
        return self.noise_head == "own" and self.denoising_loss_weight > 0 and self.noise_std_max > 0

    @property
    def loss_weights(self) -> dict[str, float]:
        """
        What each term is multiplied by, under its name in `CANForPreTrainingOutput`: its weight; for N, with
        `norm_noise_loss`, weight / (noise_std_max^2 / 3).
        """
        scale = 3 / self.noise_std_max**2 if self.norm_noise_loss and self.noise_std_max > 0 else 1
        return {
            "contrastive_loss": self.contrastive_loss_weight,
            "reconstruction_loss": self.reconstruction_loss_weight,
            "denoising_loss": self.denoising_loss_weight * scale,
        }

    @classmethod
    def _misspelt(cls, values: dict) -> dict[str, str]:
        """Keys that are no fields but look like one -> that field."""
        names = [field.name for field in fields(cls)]
        near = {
            key: difflib.get_close_matches(key, names, n=1, cutoff=0.85) for key in values if key not in set(names)
        }
        return {key: found[0] for key, found in near.items() if found}

    @classmethod
    def _refuse_misspelt(cls, kwargs):
        # transformers accepts any keyword, so `mask_ration=0.75` would quietly train with 0.5.
        for key, near in cls._misspelt(kwargs).items():
            raise ValueError(f"CANConfig has no field {key!r}; did you mean {near!r}?")

    def _check_sizes(self):
        positive = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"]
        positive += ["decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"]
        positive += ["decoder_intermediate_size", "projection_hidden_size", "projection_size"]
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for size, patch in zip(self.image_shape, self.patch_shape, strict=True):
            if patch < 1 or size < patch or size % patch:
                below, above = max(1, size // max(1, patch)) * patch, (size // max(1, patch) + 1) * patch
                raise ValueError(
                    f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                    f"use {below} or {above} instead of {size}"
                )
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            multiple = math.lcm(4, heads)
            above = width - width % multiple + multiple
            if width % heads:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not a multiple of {prefix}num_attention_heads={heads}; "
                    f"use a width of {above} or another number of heads"
                )
            if width % 4:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not a multiple of 4, which 2-D sin-cos positions need; "
                    f"use {above}"
                )
        self._check_positions()

    def _check_positions(self):
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens={self.num_register_tokens} must be at least 0")
        if self.position_embedding_type not in ("absolute", "rotary"):
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} is not one of absolute, rotary"
            )
        if not 0 < self.rope_theta < float("inf"):
            raise ValueError(f"rope_theta={self.rope_theta} must be finite and greater than 0; the default is 100")
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding_type == "rotary" and head_dim % 4:
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads={self.num_attention_heads} makes heads of "
                f"width {head_dim}, which rotary positions need to be a multiple of 4; use another number of heads"
            )

    def _check_objective(self):
        for name in ("mask_ratio", "drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1); give a number from 0 to below 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be finite and greater than 0; the default is 0.1")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} must be greater than 0; the default is 1e-6")
        if self.noise_head not in ("own", "shared"):
            raise ValueError(f"noise_head={self.noise_head!r} is not one of own, shared")
        if self.hidden_act not in ACT2FN:
            near = difflib.get_close_matches(self.hidden_act, ACT2FN, n=1, cutoff=0) or ["gelu"]
            raise ValueError(f"hidden_act={self.hidden_act!r} is not known; did you mean {near[0]!r}?")
        if not 0 <= self.noise_std_max < float("inf"):
            raise ValueError(f"noise_std_max={self.noise_std_max} must be finite and at least 0; 0 switches noise off")
        weights = {
            name: getattr(self, name)
            for name in ("contrastive_loss_weight", "reconstruction_loss_weight", "denoising_loss_weight")
        }
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}={weight} must be finite and at least 0; 0 switches the term off")
        if not any(weights.values()):
            raise ValueError(f"all three loss weights are 0: {weights}; give at least one a positive weight")
        hidden = self.num_patches - num_visible_patches(self.num_patches, self.mask_ratio)
        if self.reconstruction_loss_weight > 0 and hidden == 0:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} hides none of the {self.num_patches} patches, so "
                f"reconstruction_loss_weight={self.reconstruction_loss_weight} would be a mean over nothing; "
                "raise mask_ratio or set reconstruction_loss_weight=0"
            )
        if self.denoising_loss_weight > 0 and self.noise_std_max == 0:
            raise ValueError(
                f"denoising_loss_weight={self.denoising_loss_weight} with noise_std_max=0 has no noise to predict; "
                "raise noise_std_max or set denoising_loss_weight=0"
            )


CANConfig.register_for_auto_class()

# The special cases of CAN.
# SimCLR (arXiv 2002.05709, section 2.1) with a ViT: the contrastive loss alone, no mask and no noise
SIMCLR = {
    "mask_ratio": 0,
    "noise_std_max": 0,
    "contrastive_loss_weight": 1,
    "reconstruction_loss_weight": 0,
    "denoising_loss_weight": 0,
}
# MAE (arXiv 2111.06377, sections 3 and 4): the pixels of the masked 75 % alone; on both views unless `num_views` is 1
MAE = {
    "mask_ratio": 0.75,
    "noise_std_max": 0,
    "contrastive_loss_weight": 0,
    "reconstruction_loss_weight": 1,
    "denoising_loss_weight": 0,
}

__all__ = ["AUTO_MAP", "EARLIER", "ENCODER_VARIANTS", "MAE", "SIMCLR", "CANConfig", "num_visible_patches"]
