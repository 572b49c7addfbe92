"""
CAN as one writes it down: the yardstick of the benchmarks, not for use.

Textbook blocks with attention as softmax(q k^T) v; all patches embedded by a convolution and then masked, as in MAE; a
pass of encoder and decoder for each view; a loss after the other. Layers, sizes and losses are those of
`CANForPreTraining`, so that what differs is how they are computed
(tests/benchmarks/test_benchmarks.py holds the two equal).
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from modeling_can import CANConfig
from modeling_can.modeling_can import num_visible_patches, sincos_positions


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1)) * (width // self.num_heads) ** -0.5
        return self.proj((weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class StraightforwardCAN(nn.Module):
    def __init__(self, config: CANConfig):
        super().__init__()
        self.config = config
        width, decoder_width = config.hidden_size, config.decoder_hidden_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, config.patch_shape, config.patch_shape)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(config.grid_shape, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.num_attention_heads, config.intermediate_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.projection_head = nn.Sequential(
            nn.Linear(width, config.projection_hidden_size),
            nn.ReLU(),
            nn.Linear(config.projection_hidden_size, config.projection_size),
        )
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(config.grid_shape, decoder_width), requires_grad=False)
        self.level_embed = nn.Sequential(
            nn.Linear(decoder_width, decoder_width), nn.ReLU(), nn.Linear(decoder_width, decoder_width)
        )
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, config.pixels_per_patch)
        if config.has_noise_head:
            self.noise_pred = nn.Linear(decoder_width, config.pixels_per_patch)

    def patchify(self, images):
        (height, width), channels = self.config.patch_shape, self.config.num_channels
        rows, columns = self.config.grid_shape
        x = images.reshape(len(images), channels, rows, height, columns, width)
        x = torch.einsum("nchpwq->nhwpqc", x)
        return x.reshape(len(images), rows * columns, height * width * channels)

    def mask(self, x, scores):
        """The visible patches, the order that restores all, and the mask; as in MAE."""
        num_visible = num_visible_patches(self.config.num_patches, self.config.mask_ratio)
        ids_shuffle = scores.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, :num_visible]
        kept = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        mask = torch.ones_like(scores)
        mask[:, :num_visible] = 0
        return kept, ids_restore, torch.gather(mask, 1, ids_restore)

    def level(self, sigma):
        half = self.config.decoder_hidden_size // 2
        frequencies = 10000.0 ** -(torch.arange(half, device=sigma.device) / half)
        angles = 1000 / self.config.noise_std_max * sigma[:, None] * frequencies
        return self.level_embed(torch.cat([angles.sin(), angles.cos()], dim=1))

    def view(self, images, noise, sigma, scores):
        """One view of every image -> features, reconstruction loss, denoising loss."""
        noise = sigma[:, None, None, None] * noise
        x = self.patch_embed(images + noise).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x, ids_restore, mask = self.mask(x, scores)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        features = self.projection_head(x[:, 1:].mean(dim=1))

        x = self.decoder_embed(x)
        mask_tokens = self.mask_token.repeat(len(x), ids_restore.shape[1] + 1 - x.shape[1], 1)
        tokens = torch.cat([x[:, 1:], mask_tokens], dim=1)
        tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        tokens = tokens + self.level(sigma)[:, None]
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, 1:]
        predicted_pixels = predicted_noise = self.decoder_pred(x)
        if self.config.has_noise_head:
            predicted_noise = sigma[:, None, None] * self.noise_pred(x)

        reconstruction = ((predicted_pixels - self.patchify(images)) ** 2).mean(dim=-1)
        denoising = ((predicted_noise - self.patchify(noise)) ** 2).mean(dim=-1)
        visible = 1 - mask
        return features, (reconstruction * mask).sum() / mask.sum(), (denoising * visible).sum() / visible.sum()

    def contrast(self, first, second):
        embeds = F.normalize(torch.cat([first, second]).float(), dim=1)
        logits = embeds @ embeds.T / self.config.temperature
        logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), float("-inf"))
        n = len(first)
        labels = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(logits.device)
        return F.cross_entropy(logits, labels)

    def forward(self, pixel_values, pixel_noise=None, noise_level=None, masking_scores=None):
        """As `CANForPreTraining`: two views `(B, 2, C, H, W)` -> an object with the weighted `loss`."""
        config, device = self.config, pixel_values.device
        if pixel_noise is None:
            pixel_noise = torch.randn_like(pixel_values)
            noise_level = torch.rand(pixel_values.shape[:2], device=device) * config.noise_std_max
            masking_scores = torch.rand(*pixel_values.shape[:2], config.num_patches, device=device)
        views = [
            self.view(pixel_values[:, v], pixel_noise[:, v], noise_level[:, v], masking_scores[:, v]) for v in (0, 1)
        ]
        (first, a1, n1), (second, a2, n2) = views
        weights = config.loss_weights
        loss = weights["contrastive_loss"] * self.contrast(first, second)
        loss = loss + weights["reconstruction_loss"] * (a1 + a2) / 2
        return SimpleNamespace(loss=loss + weights["denoising_loss"] * (n1 + n2) / 2)


class StraightforwardSimCLR(StraightforwardCAN):
    """SimCLR in the same words: every patch, no noise, no decoder."""

    def __init__(self, config):
        super().__init__(config)
        for name in [name for name, _ in self.named_children() if name.startswith(("decoder", "level", "noise"))]:
            delattr(self, name)
        del self.mask_token, self.decoder_pos_embed

    def view(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.projection_head(self.norm(x)[:, 1:].mean(dim=1))

    def forward(self, pixel_values):
        return SimpleNamespace(loss=self.contrast(self.view(pixel_values[:, 0]), self.view(pixel_values[:, 1])))
