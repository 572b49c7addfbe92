"""
CAN: contrastive learning (C) + masked autoencoding (A) + noise prediction (N) in one ViT.

"A simple, efficient and scalable contrastive masked autoencoder for learning visual representations", Mishra,
Robinson, Chang, Jacobs, Sarna, Maschinot, Krishnan, arXiv 2210.16870. The file follows the method: noise the pixels,
mask and embed the patches, encode, project and contrast, tell the decoder the noise level, decode, three losses,
weighted sum.

Legend of the shapes: B images, V views of each, N = B * V, L patches, K visible patches, D encoder width,
E decoder width, P pixels per patch (rows, columns, channels).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_can import CANConfig, num_visible_patches
from .losses import contrastive_loss, full_precision, masked_mean, normalize_patches, patch_errors


_TERMS = ("contrastive", "reconstruction", "denoising")


@dataclass
class CANModelOutput(ModelOutput):
    """
    Output of `CANModel`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`):
            Class token, register tokens if any (together `config.num_prefix_tokens`), then the visible patch tokens in
            image order (row by row), after the final layer norm.
        pooler_output (`torch.Tensor` of shape `(batch_size, hidden_size)`): Mean of the patch tokens.
        mask (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): 1 = masked. `None` when unmasked.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`, *optional*):
            For every patch of the image its place in the sequence (visible patches, masked patches), each part in
            image order. `None` when unmasked.
        hidden_states (`tuple(torch.Tensor)`, *optional*):
            Input of the first block and output of each, in the shape of `last_hidden_state`, before the final layer
            norm.
        attentions (`tuple(torch.Tensor)`, *optional*): Attention weights of each block, eager attention only.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CANForPreTrainingOutput(ModelOutput):
    """
    Output of `CANForPreTraining`. What a loss weight of zero makes superfluous is `None`.

    Args:
        loss (`torch.Tensor` of shape `()`):
            w_C C + w_A A + w_N N with the configuration's loss weights; N is divided by noise_std_max^2 / 3 with
            `norm_noise_loss`.
        contrastive_loss (`torch.Tensor` of shape `()`, *optional*): C, unweighted.
        reconstruction_loss (`torch.Tensor` of shape `()`, *optional*): A, unweighted.
        denoising_loss (`torch.Tensor` of shape `()`, *optional*): N, unweighted, in raw units.
        logits (`torch.Tensor` of shape `(batch_size, num_views, num_patches, pixels_per_patch)`, *optional*):
            Predicted pixels on masked patches (normalized per patch with `norm_pix_loss`), predicted noise sigma * e
            on visible ones. Pixels are laid out (row, column, channel), as in MAE.
        mask (`torch.Tensor` of shape `(batch_size, num_views, num_patches)`): 1 = masked.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_views, num_patches)`): As in `CANModelOutput`.
        image_embeds (`torch.Tensor` of shape `(batch_size, num_views, projection_size)`, *optional*):
            Contrastive embeddings of unit length, fp32.
        hidden_states (`tuple(torch.Tensor)`, *optional*):
            Of the encoder, each `(batch_size, num_views, num_tokens, hidden_size)`, as in `CANModelOutput`.
        attentions (`tuple(torch.Tensor)`, *optional*): Of the encoder, with the axis of the views likewise.
    """

    loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    denoising_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Patches, positions, masks
# ---------------------------------------------------------------------------------------------------------------------


def patchify(pixel_values: torch.Tensor, patch_shape: tuple[int, int]) -> torch.Tensor:
    """
    Cuts images into patches: `(..., num_channels, height, width)` -> `(..., num_patches, pixels_per_patch)`, patches
    row by row, the pixels of a patch as (row, column, channel). Height and width are multiples of the patch's.
    """
    *batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_shape[0], width // patch_shape[1]
    patches = pixel_values.reshape(-1, channels, rows, patch_shape[0], columns, patch_shape[1])
    patches = patches.permute(0, 2, 4, 3, 5, 1)  # (N, rows, columns, patch height, patch width, channels)
    return patches.reshape(*batch, rows * columns, patch_shape[0] * patch_shape[1] * channels)


def unpatchify(
    patches: torch.Tensor, patch_shape: tuple[int, int], grid_shape: tuple[int, int], num_channels: int
) -> torch.Tensor:
    """
    The inverse of `patchify`: `(..., num_patches, pixels_per_patch)` -> `(..., num_channels, height, width)`.

    Raises:
        ValueError: if the number of patches is not that of `grid_shape`.
    """
    *batch, num_patches, _ = patches.shape
    if num_patches != grid_shape[0] * grid_shape[1]:
        raise ValueError(f"{num_patches} patches do not fill a grid of {grid_shape[0]} x {grid_shape[1]}")
    pixels = patches.reshape(-1, *grid_shape, *patch_shape, num_channels)
    pixels = pixels.permute(0, 5, 1, 3, 2, 4)  # (N, channels, rows, patch height, columns, patch width)
    return pixels.reshape(*batch, num_channels, grid_shape[0] * patch_shape[0], grid_shape[1] * patch_shape[1])


def sincos_positions(grid_shape: tuple[int, int], width: int) -> torch.Tensor:
    """
    Fixed 2-D sin-cos positions of shape `(1, 1 + rows * columns, width)`, a row of zeros for the class token first.
    A vector is [sin column | cos column | sin row | cos row], each a quarter, with frequencies 10000^(-4i / width).
    The column comes first as in MAE's code (arXiv 2111.06377), so that its tables and ours are the same.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid_shape), indexing="ij"))
    angles = [axis[:, None] * frequencies for axis in (column, row)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return nn.functional.pad(table, (0, 0, 1, 0)).float()[None]


def rotary_angles(grid_shape: tuple[int, int], head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """
    The angles `(1, rows * columns, head_dim)` by which queries and keys are turned, twice [row | column], in fp32. The
    centers of the patches lie in [-1, 1] whatever the grid; frequencies are theta^(-4i / head_dim).
    Deviation: DINOv3 (arXiv 2508.10104) rescales the coordinates at random in training.
    """
    count = partial(torch.arange, dtype=torch.float32, device=device)
    axes = [2 * (count(0.5, n) / n) - 1 for n in grid_shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (L, 2)
    frequencies = 1 / theta ** (count(head_dim // 4) * 4 / head_dim)
    return (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)[None]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns queries or keys `(batch_size, heads, tokens, head_dim)`: number i with number i + head_dim / 2."""
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def resize_positions(
    table: torch.Tensor, grid_shape: tuple[int, int], new_grid_shape: tuple[int, int], antialias: bool = False
) -> torch.Tensor:
    """Resamples a position table `(1, 1 + L, width)` to another grid: bicubic, in two dimensions, in fp32."""
    if new_grid_shape == grid_shape:
        return table
    class_row, rows = table[:, :1], table[:, 1:]
    with full_precision(table):
        grid = rows.float().unflatten(1, grid_shape).permute(0, 3, 1, 2)  # (1, width, rows, columns)
        grid = nn.functional.interpolate(grid, size=new_grid_shape, mode="bicubic", antialias=antialias)
    return torch.cat([class_row, grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def random_masking(scores: torch.Tensor, num_visible: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The `num_visible` patches with the smallest scores stay visible.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_patches)`): Independent uniform numbers give MAE's masking.
        num_visible (`int`): K.

    Returns:
        ids_keep `(batch_size, K)` in image order (unlike MAE, whose order is that of the scores: a token can be placed
        without a second look-up, and hiding nothing changes nothing); ids_restore `(batch_size, num_patches)`;
        mask `(batch_size, num_patches)`, 1 = masked.
    """
    ids_keep = scores.argsort(dim=1, stable=True)[:, :num_visible]
    mask = torch.ones_like(scores, dtype=torch.float32).scatter(1, ids_keep, 0.0)
    ids_shuffle = mask.argsort(dim=1, stable=True)  # the visible patches, then the masked ones
    return ids_shuffle[:, :num_visible], ids_shuffle.argsort(dim=1), mask


def gather_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Picks tokens `(batch_size, ids.shape[1], width)` by their place in the sequence."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


class CANPatchLinear(nn.Module):
    """
    A linear layer from or to the P values of a patch. Of a class of its own, so that quantizers, which look for
    `nn.Linear`, leave it in full precision, as they do the convolution of other ViTs: P need not fit their blocks.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(patches, self.weight, self.bias)


class CANEmbeddings(nn.Module):
    """Pixels -> class, register and visible patch tokens with their positions. Masked patches are never embedded."""

    def __init__(self, config: CANConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        count = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, count, config.hidden_size)) if count else None
        # Not the usual convolution, because it can be applied to some of the patches.
        self.patch_embeddings = CANPatchLinear(config.pixels_per_patch, config.hidden_size)
        # A buffer, because transformers 5 gives loaded parameters their gradient back; a saved one, because a warm
        # start may bring a learned table.
        self.register_buffer("position_embeddings", None)
        if config.position_embedding_type == "absolute":
            positions = sincos_positions(config.grid_shape, config.hidden_size)
            self.position_embeddings = positions.to(torch.get_default_dtype())

    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_ratio: float | None = None,
        masking_scores: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        config, grid_shape = self.config, self.check_size(pixel_values, interpolate_pos_encoding)
        patches = patchify(pixel_values, config.patch_shape)  # (N, L, P)
        is_rotary = config.position_embedding_type == "rotary"
        if is_rotary:
            head_dim = config.hidden_size // config.num_attention_heads
            patch_positions = rotary_angles(grid_shape, head_dim, config.rope_theta, patches.device)
        else:
            table, antialias = self.position_embeddings, config.interpolate_antialias
            positions = resize_positions(table, config.grid_shape, grid_shape, antialias)
            class_position, patch_positions = positions[:, :1], positions[:, 1:]
        mask = ids_restore = rotary = None
        if mask_ratio is not None:
            if masking_scores is None:
                masking_scores = torch.rand(patches.shape[:2], device=patches.device)
            if masking_scores.shape != patches.shape[:2]:
                raise ValueError(
                    f"masking_scores has shape {tuple(masking_scores.shape)}; give one score a patch, "
                    f"{tuple(patches.shape[:2])} for these pixels"
                )
            num_visible = num_visible_patches(patches.shape[1], mask_ratio)
            ids_keep, ids_restore, mask = random_masking(masking_scores, num_visible)
            patches = gather_tokens(patches, ids_keep)  # (N, K, P)
            patch_positions = gather_tokens(patch_positions.expand(patches.shape[0], -1, -1), ids_keep)
        # Not the dtype of the layer's weight: a quantizer stores that as integers.
        class_token, patch_tokens = self.cls_token, self.patch_embeddings(patches.to(self.cls_token.dtype))
        if is_rotary:  # what comes before the patches has no place, and is not turned
            angles = nn.functional.pad(patch_positions, (0, 0, config.num_prefix_tokens, 0))
            rotary = torch.stack([angles.cos(), angles.sin()])[:, :, None]  # (2, N or 1, 1, prefix + K, head_dim)
        else:
            class_token, patch_tokens = class_token + class_position, patch_tokens + patch_positions
        prefix = [class_token] if self.register_tokens is None else [class_token, self.register_tokens]
        prefix = [tokens.expand(patches.shape[0], -1, -1) for tokens in prefix]
        return torch.cat([*prefix, patch_tokens], dim=1), mask, ids_restore, rotary  # (N, prefix + K, D)

    def check_size(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """The patch grid of these pixels; raises ValueError where they do not fit the model."""
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values is {pixel_values.dtype}; give normalized pixels, e.g. from the processor")
        channels, height, width = pixel_values.shape[1:]
        patch_height, patch_width = self.config.patch_shape
        if channels != self.config.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channels but the model was built with num_channels="
                f"{self.config.num_channels}; convert the images, or build the model with num_channels={channels}"
            )
        if (height, width) != self.config.image_shape and not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values is {height} x {width} but the model was built with image_size={self.config.image_shape}"
                "; resize the images, or pass interpolate_pos_encoding=True"
            )
        if height % patch_height or width % patch_width or not height or not width:
            raise ValueError(
                f"pixel_values is {height} x {width}, not a multiple of patch_size={self.config.patch_shape}; "
                "resize or crop the images"
            )
        return height // patch_height, width // patch_width


# ---------------------------------------------------------------------------------------------------------------------
# The transformer block, shared by encoder and decoder
# ---------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / sqrt(d)) v, softmax in fp32. All tokens see all tokens: there is no mask to add."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer does nothing but `linear(x, weight, bias)`: no adapter, quantizer or hook in it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    is_plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    return is_plain and not any(hooks) and "forward" not in vars(layer)


class CANAttention(nn.Module):
    def __init__(self, config: CANConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, rotary: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projected.view(split).transpose(1, 2)  # (N, heads, tokens, head_dim)
            for projected in self.project(hidden_states)
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(context.flatten(2)), weights

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Query, key and value, each `(N, tokens, D)`, as one product: the input is read once instead of three times.
        There are still three layers, which peft and the converters expect. They are called one by one where one of
        them has been replaced, wrapped or hooked.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if not all(map(is_plain_linear, layers)):
            return tuple(layer(hidden_states) for layer in layers)
        weight = torch.cat([layer.weight for layer in layers])
        bias = None
        if self.config.qkv_bias:
            key_bias = self.k_proj.bias if self.config.key_bias else torch.zeros_like(self.q_proj.bias)
            bias = torch.cat([self.q_proj.bias, key_bias, self.v_proj.bias])
        return nn.functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)


class CANMLP(nn.Module):
    def __init__(self, config: CANConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size) if config.gated_mlp else None
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is not None:
            return self.fc2(self.activation_fn(self.gate_proj(hidden_states)) * self.fc1(hidden_states))
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CANDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): leaves a residual branch out for some images of a batch."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return hidden_states
        keep = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * keep.to(hidden_states.dtype) / (1 - self.rate)


class CANLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(
        self,
        config: CANConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = CANAttention(config, hidden_size, num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = CANMLP(config, hidden_size, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CANDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        # Attention
        context, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(context))

        # MLP
        update = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(update))


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive head and decoder
# ---------------------------------------------------------------------------------------------------------------------


class CANProjectionHead(nn.Module):
    """Pooled features -> contrastive embedding: a 2-layer MLP with ReLU, without batch norm, then unit length."""

    def __init__(self, config: CANConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.projection_hidden_size)
        self.fc2 = nn.Linear(config.projection_hidden_size, config.projection_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        embeds = self.fc2(nn.functional.relu(self.fc1(pooled)))
        return nn.functional.normalize(embeds.float(), dim=-1)


class CANNoiseLevelEmbedding(nn.Module):
    """
    Noise level sigma -> vector of decoder width: sinusoidal embedding, then a 2-layer MLP with ReLU.

    Deviation: the authors' release feeds sigma itself, 0.05 say, into frequencies made for diffusion steps up to
    1,000, which moves the embedding by about 1 %. Here sigma / noise_std_max is stretched to [0, 1000], so that the
    level can be read (tests/model/test_modeling.py measures it).
    """

    def __init__(self, config: CANConfig):
        super().__init__()
        self.scale = 1000 / config.noise_std_max
        self.half_width = config.decoder_hidden_size // 2
        self.fc1 = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.fc2 = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)

    def sinusoidal(self, noise_level: torch.Tensor) -> torch.Tensor:
        """`(batch_size,)` -> `(batch_size, decoder_hidden_size)`, [sin | cos], in fp32."""
        exponents = torch.arange(self.half_width, device=noise_level.device, dtype=torch.float32) / self.half_width
        angles = noise_level.float()[:, None] * self.scale * 10000.0**-exponents
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def forward(self, noise_level: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        hidden = self.fc1(self.sinusoidal(noise_level).to(dtype))
        return self.fc2(nn.functional.relu(hidden))


class CANNoiseHead(CANPatchLinear):
    """
    Decoder tokens of visible patches -> the noise e in them. Starts at zero, and N at the loss of predicting no noise.

    Deviation: in the paper one layer serves both targets. What it learns of the pixels then appears on the visible
    patches as well.
    """


class CANDecoder(nn.Module):
    """
    Visible tokens and noise level -> one prediction of P pixels per patch.

    Deviation: the authors' release adds the noise-level embedding in encoder width to the visible and class tokens,
    before the linear embedding. Here it is added after it, to all patch tokens and not to the class token: the same
    family of functions, and it reaches the mask tokens too.
    """

    def __init__(self, config: CANConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(config.grid_shape, width)
        self.register_buffer("position_embeddings", positions.to(torch.get_default_dtype()))
        told = config.noise_std_max > 0 and config.noise_level_embedding
        self.noise_level_embedding = CANNoiseLevelEmbedding(config) if told else None
        self.layers = nn.ModuleList(
            CANLayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = CANPatchLinear(width, config.pixels_per_patch)
        self.noise_head = CANNoiseHead(width, config.pixels_per_patch) if config.has_noise_head else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        ids_restore: torch.Tensor,
        grid_shape: tuple[int, int],
        noise_level: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden_states = self.embed(hidden_states)  # (N, prefix + K, E)
        class_token, visible = hidden_states[:, :1], hidden_states[:, self.config.num_prefix_tokens :]
        num_hidden = ids_restore.shape[1] - visible.shape[1]
        mask_tokens = self.mask_token.expand(visible.shape[0], num_hidden, -1)
        patch_tokens = gather_tokens(torch.cat([visible, mask_tokens], dim=1), ids_restore)  # (N, L, E), image order
        if self.noise_level_embedding is not None:
            patch_tokens = patch_tokens + self.noise_level_embedding(noise_level, patch_tokens.dtype)[:, None]
        table, config = self.position_embeddings, self.config
        positions = resize_positions(table, config.grid_shape, grid_shape, config.interpolate_antialias)
        hidden_states = torch.cat([class_token, patch_tokens], dim=1) + positions
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        patch_tokens = self.layernorm(hidden_states)[:, 1:]
        if self.noise_head is None:
            return self.head(patch_tokens)  # (N, L, P)
        visible, hidden = gather_tokens(patch_tokens, ids_restore.argsort(dim=1)).tensor_split(
            [visible.shape[1]], dim=1
        )
        noise = noise_level.to(visible.dtype)[:, None, None] * self.noise_head(visible)  # sigma times the predicted e
        return gather_tokens(torch.cat([noise, self.head(hidden)], dim=1), ids_restore)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class CANPreTrainedModel(PreTrainedModel):
    config: CANConfig
    config_class = CANConfig
    base_model_prefix = "can"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # or transformers' Trainer would not divide by its accumulation steps
    # Not CANEmbeddings: accelerate's FSDP2 shards these and the patch projection, and one must not lie in the other.
    _no_split_modules = ["CANLayer", "CANDecoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CANLayer, "attentions": CANAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # MAE's scheme: Xavier-uniform linear layers (the patch projection is one), N(0, 0.02) tokens, fixed positions.
        if isinstance(module, CANNoiseHead):
            initialization.zeros_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.Linear | CANPatchLinear):
            initialization.xavier_uniform_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, CANEmbeddings):
            initialization.normal_(module.cls_token, std=self.config.initializer_range)
            if module.register_tokens is not None:
                initialization.normal_(module.register_tokens, std=self.config.initializer_range)
            if module.position_embeddings is not None:
                positions = sincos_positions(self.config.grid_shape, self.config.hidden_size)
                initialization.copy_(module.position_embeddings, positions)
        elif isinstance(module, CANDecoder):
            initialization.normal_(module.mask_token, std=self.config.initializer_range)
            positions = sincos_positions(self.config.grid_shape, self.config.decoder_hidden_size)
            initialization.copy_(module.position_embeddings, positions)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.patch_embeddings


class CANModel(CANPreTrainedModel):
    """
    The ViT encoder. Unmasked by default, so that it is deterministic and every patch has its token: this is what turns
    images into features downstream.
    """

    # A pre-training checkpoint holds more than the encoder; leaving that behind is the purpose, not a fault.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^projection_head\.", r"^classifier\."]

    def __init__(self, config: CANConfig):
        super().__init__(config)
        self.embeddings = CANEmbeddings(config)
        self.layers = nn.ModuleList(
            CANLayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                drop_path_rate=config.drop_path_rate * index / max(1, config.num_hidden_layers - 1),
            )
            for index in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_ratio: float | None = None,
        masking_scores: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CANModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalized pixels.
            mask_ratio (`float`, *optional*): Fraction of the patches to mask, in [0, 1); `None` masks none.
            masking_scores (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*):
                The patches with the smallest scores stay visible; drawn from U[0, 1] if `None`.
            interpolate_pos_encoding (`bool`, defaults to `False`): Accept sizes other than `config.image_size`.

        Raises:
            ValueError: for a wrong shape, or a mask ratio outside [0, 1); the message names the fix.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; CANModel takes single images as "
                "(batch_size, num_channels, height, width)"
            )
        if mask_ratio is not None and not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio={mask_ratio} is outside [0, 1); pass None to hide nothing")
        if mask_ratio is None and masking_scores is not None:
            raise ValueError(f"masking_scores without mask_ratio; pass mask_ratio={self.config.mask_ratio} with them")
        hidden_states, mask, ids_restore, rotary = self.embeddings(
            pixel_values, mask_ratio, masking_scores, interpolate_pos_encoding
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary=rotary, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        # Deviation: the authors' release averages the class token along with the patch tokens.
        return CANModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1),
            mask=mask,
            ids_restore=ids_restore,
        )


def _unflatten(tensors, shape: torch.Size):
    """Gives a tensor, or those of a tuple, its axis of views back; `None` for what was not asked for."""
    if isinstance(tensors, tuple):
        return tuple(_unflatten(tensor, shape) for tensor in tensors)
    return None if tensors is None else tensors.unflatten(0, shape)


class CANForPreTraining(CANPreTrainedModel):
    """CAN: one encoder under a contrastive head and a decoder that reconstructs pixels and predicts noise."""

    def __init__(self, config: CANConfig):
        super().__init__(config)
        self.can = CANModel(config)
        self.projection_head = CANProjectionHead(config)
        self.decoder = CANDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        masking_scores: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        terms: tuple[str, ...] = _TERMS,
        return_loss: bool = True,  # by this transformers' Trainer knows that there is a loss without labels
        **kwargs: Unpack[TransformersKwargs],
    ) -> CANForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_views, num_channels, height, width)`):
                Augmented views of each image, normalized; never modified. The paper has two. One view is accepted
                when the contrastive weight is 0.
            pixel_noise (`torch.Tensor` of the same shape, *optional*): e, drawn from N(0, I) if `None`.
            noise_level (`torch.Tensor` of shape `(batch_size, num_views)`, *optional*):
                sigma, in units of normalized pixels, drawn from U[0, noise_std_max] if `None`.
            masking_scores (`torch.Tensor` of shape `(batch_size, num_views, num_patches)`, *optional*):
                In each view the patches with the smallest scores stay visible; drawn from U[0, 1] if `None`.
            interpolate_pos_encoding (`bool`, defaults to `False`): Accept sizes other than `config.image_size`.
            terms (`tuple[str, ...]`, defaults to all three):
                Those of the losses to be computed, of `"contrastive"`, `"reconstruction"` and `"denoising"`, and
                summed in `loss`. Where a step has several batches, the contrastive term compares the embeddings of
                all of them, outside of the model: the first pass needs the embeddings alone, `()`, the second the
                other two (`pretraining.gradient_caching.cached_backward`).
            return_loss (`bool`, defaults to `True`): Whether to compute the losses; `False` leaves them `None`.

        Raises:
            ValueError: for a wrong number of axes, views, channels or pixels, or a batch without negatives.
        """
        self._check_views(pixel_values)
        if unknown := [term for term in terms if term not in _TERMS]:
            raise ValueError(f"terms={terms} names {unknown[0]!r}, which is not one of {', '.join(_TERMS)}")
        noise, noise_level = self._draw_noise(pixel_values, pixel_noise, noise_level)  # sigma * e, sigma (B, V)
        noised = pixel_values if noise is None else pixel_values + noise
        encoded = self._encode(noised, masking_scores, interpolate_pos_encoding, **kwargs)
        views = partial(_unflatten, shape=pixel_values.shape[:2])  # (B * V, ...) -> (B, V, ...)
        mask, image_embeds, logits = views(encoded.mask), None, None

        if self.config.contrastive_loss_weight > 0:
            image_embeds = views(self.projection_head(encoded.pooler_output))
        if self.config.uses_decoder and terms:
            logits = views(self._decode(encoded, pixel_values, noise_level))

        losses = {}
        if return_loss and terms:
            losses = self._losses(
                pixel_values=pixel_values,
                noise=noise,
                mask=mask,
                image_embeds=image_embeds,
                logits=logits,
                terms=terms,
            )
        return CANForPreTrainingOutput(
            **losses,
            logits=logits,
            mask=mask,
            ids_restore=views(encoded.ids_restore),
            image_embeds=image_embeds,
            hidden_states=views(encoded.hidden_states),
            attentions=views(encoded.attentions),
        )

    def _losses(self, pixel_values, noise, mask, image_embeds, logits, terms) -> dict[str, torch.Tensor]:
        """The terms, each unweighted, and `loss`, their weighted sum."""
        config, losses = self.config, {}
        if config.contrastive_loss_weight > 0 and "contrastive" in terms:  # C
            losses["contrastive_loss"] = contrastive_loss(image_embeds, config.temperature)

        if logits is not None:  # the clean pixels where the encoder saw nothing, the noise where it saw it
            # Deviation: the authors' release takes the noised image as the target of masked patches, whose noise
            # nothing that the encoder sees can tell.
            target = patchify(pixel_values.float(), config.patch_shape)
            target = normalize_patches(target) if config.norm_pix_loss else target
            if noise is not None:
                target = torch.where(mask[..., None] == 1, target, patchify(noise, config.patch_shape))
            errors = patch_errors(logits, target)
            if config.reconstruction_loss_weight > 0 and "reconstruction" in terms:  # A
                losses["reconstruction_loss"] = masked_mean(errors, mask)
            if config.denoising_loss_weight > 0 and "denoising" in terms:  # N
                losses["denoising_loss"] = masked_mean(errors, 1 - mask)
        loss = sum(config.loss_weights[name] * value for name, value in losses.items())
        return {"loss": loss, **losses} if losses else {}

    def freeze_unused_parameters(self) -> list[str]:
        """
        Switches the gradient off for the parts that the configured objective never runs, so that DDP has no unused
        parameters and weight decay leaves them alone.

        Returns:
            The names of the frozen parts.
        """
        config, unused = self.config, {}
        hides_none = num_visible_patches(config.num_patches, config.mask_ratio) == config.num_patches
        if config.contrastive_loss_weight == 0:
            unused["projection_head"] = self.projection_head
        if not config.uses_decoder:
            unused["decoder"] = self.decoder
        elif hides_none:
            unused["decoder.mask_token"] = self.decoder.mask_token
        if config.has_noise_head and (hides_none or config.reconstruction_loss_weight == 0):
            unused["decoder.head"] = self.decoder.head
        for part in unused.values():
            part.requires_grad_(False)
        return list(unused)

    def _encode(self, pixel_values, masking_scores, interpolate_pos_encoding, **kwargs) -> CANModelOutput:
        """All views in one batch through the encoder."""
        if masking_scores is not None and masking_scores.shape[:2] != pixel_values.shape[:2]:
            raise ValueError(
                f"masking_scores has shape {tuple(masking_scores.shape)}; give (batch_size, num_views, num_patches) "
                f"with {tuple(pixel_values.shape[:2])} in front"
            )
        return self.can(
            pixel_values.flatten(0, 1),
            mask_ratio=self.config.mask_ratio,
            masking_scores=None if masking_scores is None else masking_scores.flatten(0, 1),
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,  # whatever the configuration says
            **kwargs,
        )

    def _decode(self, encoded: CANModelOutput, pixel_values: torch.Tensor, noise_level: torch.Tensor | None):
        """Predictions `(batch_size * num_views, num_patches, pixels_per_patch)`."""
        (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], self.config.patch_shape
        return self.decoder(
            encoded.last_hidden_state,
            encoded.ids_restore,
            grid_shape=(height // patch_height, width // patch_width),
            noise_level=None if noise_level is None else noise_level.flatten(),
        )

    def _draw_noise(
        self, pixel_values: torch.Tensor, pixel_noise: torch.Tensor | None, noise_level: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """sigma * e in fp32 and sigma, one level a view, drawn where not given; (None, None) without noise."""
        if self.config.noise_std_max == 0:
            if pixel_noise is not None or noise_level is not None:
                raise ValueError("pixel_noise and noise_level need noise_std_max > 0, but the model was built with 0")
            return None, None
        device = pixel_values.device
        if pixel_noise is None:
            pixel_noise = torch.randn(pixel_values.shape, device=device)
        if noise_level is None:
            noise_level = torch.rand(pixel_values.shape[:2], device=device) * self.config.noise_std_max
        for name, tensor, shape in (
            ("pixel_noise", pixel_noise, pixel_values.shape),
            ("noise_level", noise_level, pixel_values.shape[:2]),
        ):
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but these pixels need {tuple(shape)}")
        return noise_level[:, :, None, None, None].float() * pixel_noise.float(), noise_level

    def _check_views(self, pixel_values: torch.Tensor):
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; CANForPreTraining takes the views of each image "
                "as (batch_size, num_views, num_channels, height, width), e.g. torch.stack([view_1, view_2], dim=1)"
            )
        if not pixel_values.is_floating_point():  # before noise makes it one
            raise ValueError(f"pixel_values is {pixel_values.dtype}; give normalized pixels, e.g. from the processor")
        if pixel_values.shape[1] == 1 and self.config.contrastive_loss_weight > 0:
            raise ValueError(
                "pixel_values has 1 view, but the contrastive term (contrastive_loss_weight="
                f"{self.config.contrastive_loss_weight}) compares 2; give two views or set contrastive_loss_weight=0"
            )


class CANForImageClassification(CANPreTrainedModel):
    """
    The encoder with a linear classifier on the mean of the patch tokens after the final norm. There is no further
    norm, so that the classifier can be folded into a native export.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^projection_head\."]

    def __init__(self, config: CANConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.can = CANModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalized pixels.
            labels (`torch.Tensor`, *optional*):
                `(batch_size,)` class indices, or `(batch_size, num_labels)` targets, as `config.problem_type` says.
            interpolate_pos_encoding (`bool`, defaults to `False`): Accept sizes other than `config.image_size`.
        """
        encoded = self.can(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(encoded.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


__all__ = [
    "CANAttention", "CANDecoder", "CANDropPath", "CANEmbeddings", "CANForImageClassification", "CANForPreTraining",
    "CANForPreTrainingOutput", "CANLayer", "CANMLP", "CANModel", "CANModelOutput", "CANNoiseHead",
    "CANNoiseLevelEmbedding", "CANPatchLinear", "CANPreTrainedModel", "CANProjectionHead", "eager_attention_forward",
    "gather_tokens", "is_plain_linear", "patchify", "random_masking", "resize_positions", "rotary_angles", "rotate",
    "sincos_positions", "unpatchify",
]  # fmt: skip
