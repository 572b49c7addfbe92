"""Other people's files in ours: the same outputs, and nothing executed."""

import argparse
import logging
import os

import pytest
import torch
from other_encoders import (
    OTHER_SIZES,
    SQUARE,
    can,
    dinov2,
    equal,
    features,
    pixels_of,
    randomized,
    tokens,
    vit,
    vit_mae,
)
from safetensors.torch import save_file
from testing_utils import inputs, tiny_model
from torch import nn

from modeling_can.conversion import convert, join_qkv, split_qkv, to_can, to_dinov2, to_timm, to_vit, warm_start


# --- From files of MAE's and CAN's authors ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.attn["qkv"](self.norm1(x)).chunk(3, 2)
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class MAE(nn.Module):
    """MAE (arXiv 2111.06377) under the names of its authors' release; with the head of CAN's."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, 32)) for n in (1, 17))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 8, 8)})
        self.blocks, self.norm = nn.ModuleList(Block(32, 2) for _ in range(2)), nn.LayerNorm(32, eps=1e-6)
        self.projection_head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder_embed = nn.Linear(32, 16)
        self.mask_token, self.decoder_pos_embed = (nn.Parameter(torch.zeros(1, n, 16)) for n in (1, 17))
        self.decoder_blocks = nn.ModuleList(Block(16, 2) for _ in range(2))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(16, eps=1e-6), nn.Linear(16, 192)

    def forward(self, pixels, ids_keep=None):
        """Tokens of the encoder and, where some patches are masked, predictions of the decoder."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if ids_keep is not None:
            x = torch.stack([tokens[ids] for tokens, ids in zip(x, ids_keep, strict=True)])
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        encoded = self.norm(x)
        if ids_keep is None:
            return encoded
        x = self.decoder_embed(encoded)
        everywhere = self.mask_token.repeat(len(x), 16, 1)
        for row, ids in enumerate(ids_keep):
            everywhere[row, ids] = x[row, 1:]
        x = torch.cat([x[:, :1], everywhere], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return encoded, self.decoder_pred(self.decoder_norm(x))[:, 1:]


@pytest.fixture()
def mae_file(tmp_path):
    model = randomized(MAE())
    content = {
        "model": model.state_dict(),
        "optimizer": {"state": {}},
        "epoch": 799,
        "args": argparse.Namespace(lr=1e-3),
    }
    torch.save(content, tmp_path / "mae.pth")
    return model, tmp_path / "mae.pth"


def test_a_file_of_the_authors_gives_encoder_decoder_and_head(mae_file, caplog):
    theirs, path = mae_file
    model = tiny_model(**SQUARE, noise_std_max=0, denoising_loss_weight=0)
    with caplog.at_level(logging.WARNING):
        assert warm_start(model, str(path)) == (["encoder", "projection head", "decoder"], [])
    assert "mae.pth has no safetensors: its tensors were read from a pickle, with weights_only=True" in caplog.text
    batch = inputs(model.config)
    pixels, scores = batch["pixel_values"], batch["masking_scores"]
    with torch.no_grad():
        output = model(pixels, masking_scores=scores)
        ids_keep = [row.argsort()[:8].sort().values for row in scores.flatten(0, 1)]
        encoded, predicted = theirs(pixels.flatten(0, 1), torch.stack(ids_keep))
        equal(output.logits.flatten(0, 1), predicted)
        embeds = theirs.projection_head(encoded[:, 1:].mean(1))
        equal(output.image_embeds.flatten(0, 1), nn.functional.normalize(embeds, dim=-1))


def test_a_file_becomes_our_encoder_and_any_other(mae_file):
    theirs, path = mae_file
    model, pixels = to_can(str(path), num_attention_heads=2), pixels_of(32, 32)
    with torch.no_grad():
        expected = theirs(pixels)
        equal(model(pixels).last_hidden_state, expected)
        equal(to_dinov2(model)(pixels).last_hidden_state, expected)
        equal(to_vit(model)(pixels).last_hidden_state, expected)
    state, _ = to_timm(model)
    for name, tensor in state.items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    with pytest.raises(ValueError, match="is 32 wide and does not tell its number of attention heads; .*--num_att"):
        to_can(str(path))


def test_only_published_widths_have_heads_without_being_told(tmp_path):
    file = tmp_path / "weights.safetensors"
    for width, heads in ((192, 3), (1280, 16), (512, 16)):
        model = tiny_model(**SQUARE, hidden_size=width, num_attention_heads=heads, num_hidden_layers=1)
        save_file(to_timm(model)[0], file)
        if width != 512:
            assert to_can(str(file)).config.num_attention_heads == heads
    with pytest.raises(ValueError, match="is 512 wide and does not tell its number of attention heads; .*--num_att"):
        to_can(str(file))
    model.can.save_pretrained(tmp_path / "can")
    with pytest.raises(ValueError, match="num_attention_heads=8, but .* says that it has 16"):
        to_can(str(tmp_path / "can"), num_attention_heads=8)
    convert(str(tmp_path / "can"), "timm", tmp_path / "timm")
    with pytest.raises(ValueError, match="num_attention_heads is 16 there and 8 here"):
        warm_start(
            tiny_model(**SQUARE, hidden_size=512, num_attention_heads=8, num_hidden_layers=1), str(tmp_path / "timm")
        )


def test_an_encoder_alone_leaves_the_rest_new_and_layer_scale_is_folded(mae_file, tmp_path):
    theirs, _ = mae_file
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("decoder", "mask", "projection"))}
    for block in range(2):
        for half in (1, 2):
            state[f"blocks.{block}.ls{half}.gamma"] = torch.rand(32) + 0.5
    save_file(state, tmp_path / "timm.safetensors")
    model = tiny_model(**SQUARE)
    taken, new = warm_start(model, str(tmp_path / "timm.safetensors"))
    assert taken == ["encoder (layer scale folded into the output projections)"]
    assert new == ["projection head", "decoder", "noise-level embedding", "noise head"]
    for block in theirs.blocks:
        scales = [state.pop(f"blocks.{list(theirs.blocks).index(block)}.ls{half}.gamma") for half in (1, 2)]
        for layer, scale in zip((block.attn["proj"], block.mlp["fc2"]), scales, strict=True):
            layer.weight.data *= scale[:, None]
            layer.bias.data *= scale
    pixels = pixels_of(32, 32)
    with torch.no_grad():
        equal(model.can(pixels).last_hidden_state, theirs(pixels))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"blocks.0.attn.q_norm.weight": torch.ones(16)},
            "has parts that CAN's encoder has not, such as blocks.0.attn.q_norm",
        ),
        ({"blocks.0.gamma_1": torch.ones(32)}, r"lacks 3 tensors of its encoder.*blocks\.0\.ls2\.gamma"),
        ({"patch_embed.backbone.weight": torch.ones(32)}, "such as patch_embed.backbone.weight"),
        (
            {"blocks.1.mlp.fc2.weight": torch.ones(32, 48)},
            r"has a tensor of shape \(32, 48\) where CAN's can.layers.1.mlp",
        ),
        ({"pos_embed": torch.zeros(1, 15, 32)}, "has positions of 14 patches, which is no square"),
        ({"norm.bias": None}, r"lacks 1 tensors of its encoder.*norm\.bias"),
        ({"pos_embed": None}, "has no pos_embed, and is not DINOv3 either"),
        ({"cls_token": None}, "holds no ViT under timm's names"),
    ],
)
def test_files_that_are_no_vit_are_refused(mae_file, tmp_path, change, message):
    state = {**mae_file[0].state_dict(), **change}
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        warm_start(tiny_model(**SQUARE), str(tmp_path / "other.safetensors"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pth", "folder/pytorch_model.bin"])
def test_a_pickle_that_would_execute_something_is_refused(name, tmp_path):
    path = tmp_path / name
    source = can(**SQUARE)
    source.save_pretrained(path.parent if "folder" in name else tmp_path / "other")
    for file in (tmp_path / "folder").glob("*.safetensors"):
        file.unlink()
    torch.save({"model": source.state_dict(), "args": Payload(tmp_path / "executed")}, path)
    for read in (lambda source: warm_start(tiny_model(**SQUARE), source), to_can):
        with pytest.raises(ValueError):
            read(str(path.parent if "folder" in name else path))
        assert not (tmp_path / "executed").exists()


def test_weights_in_a_pickle_alone_are_read_with_a_warning(tmp_path, caplog):
    source = vit()
    source.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING):
        model = to_can(str(tmp_path))
    assert "has no safetensors: its tensors were read from a pickle" in caplog.text
    equal(features(model, pixels_of(40, 64)), tokens(source, pixels_of(40, 64)))


@pytest.mark.parametrize("content", [{"student": {"a": torch.ones(1)}, "teacher": {}, "epoch": 3}, [1, 2]])
def test_files_of_other_layouts_are_refused_in_words(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no ViT under timm's names"):
        to_can(str(tmp_path / "other.pth"))


def test_joining_is_the_inverse_of_splitting():
    state = {
        "blocks.0.attn.qkv.weight": torch.randn(6, 2),
        "blocks.0.attn.qkv.bias": torch.randn(6),
        "norm.bias": torch.ones(2),
    }
    split = split_qkv(state)
    assert torch.equal(split["blocks.0.attn.k.weight"], state["blocks.0.attn.qkv.weight"][2:4])
    joined = join_qkv(split)
    assert joined.keys() == state.keys() and all(torch.equal(joined[key], state[key]) for key in state)


# --- From transformers' own, of all ages -----------------------------------------------------------------------------

EARLIER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
EARLIER_VIT = {**EARLIER, "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layers.": "encoder.layer."}


@pytest.mark.parametrize(
    "make, names",
    [(vit, EARLIER_VIT), (vit_mae, {**EARLIER_VIT, "decoder_encoder.layer.": "decoder_layers."}), (dinov2, EARLIER)],
)
def test_names_of_before_transformers_5_are_read_and_exported(make, names, tmp_path):
    source = make()
    source.save_pretrained(tmp_path)
    state = {}
    for key, tensor in source.state_dict().items():
        for now, before in names.items():
            key = key.replace(now, before)
        state[key] = tensor
    assert len(state.keys() - source.state_dict().keys()) >= 16
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    model = to_can(str(tmp_path))
    for size in OTHER_SIZES:
        expected = tokens(source, pixels_of(*size))
        equal(features(model, pixels_of(*size)), expected)
        equal(tokens(to_dinov2(model), pixels_of(*size)), expected)
        equal(tokens(to_vit(model), pixels_of(*size)), expected)


def test_a_shard_that_is_missing_is_no_reason_to_open_a_pickle(tmp_path):
    source = vit()
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    torch.save({key: torch.zeros_like(x) for key, x in source.state_dict().items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        to_can(str(tmp_path))
