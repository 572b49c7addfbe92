"""DINOv3 and DINOv2 with registers, in and out: tokens and gradients of transformers' classes, masked ones too."""

import json
import re
from functools import partial

import pytest
import torch
from other_encoders import SQUARE, can, dinov2, dinov2_with_registers, dinov3, randomized, tokens
from safetensors.torch import save_file
from testing_utils import TINY, tiny_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTModel,
)

from modeling_can import CANConfig, CANForImageClassification, CANForPreTraining, CANModel
from modeling_can.conversion import (
    DINOV2,
    DINOV2_GATED,
    DINOV2_LAYER_SCALE,
    DINOV3,
    DINOV3_LAYER_SCALE,
    can_config,
    convert,
    their_name,
    to_can,
    to_dinov2,
    to_dinov3_vit,
    to_timm,
    to_vit,
    warm_start,
)
from modeling_can.conversion.__main__ import main


SOURCES = {
    "dinov3": lambda: dinov3(),
    "dinov3 gated": lambda: dinov3(use_gated_mlp=True, hidden_act="silu", rope_theta=50.0),
    "dinov3 without registers, with every bias": lambda: dinov3(num_register_tokens=0, key_bias=True),
    "dinov3 without bias": lambda: dinov3(query_bias=False, value_bias=False),
    "dinov3, oblong patches": lambda: dinov3(patch_size=(8, 4), image_size=(32, 48)),
    "dinov2 with registers": lambda: dinov2_with_registers(),
    "dinov2 with registers, gated": lambda: dinov2_with_registers(use_swiglu_ffn=True),
    "dinov2 gated": lambda: dinov2(use_swiglu_ffn=True),
}
TABLES = {
    "dinov3_vit": (DINOV3, DINOV3_LAYER_SCALE),
    "dinov2_with_registers": (DINOV2, DINOV2_LAYER_SCALE),
    "dinov2": (DINOV2, DINOV2_LAYER_SCALE),
}
CLOSE = dict(atol=1e-5, rtol=1e-5)  # in fp64: their frequencies and angles are in fp32, some of ours in another order


def every(*quick: str):
    """Each kind of source; but for the quick ones in the slow stage."""
    marked = [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in SOURCES]
    return pytest.mark.parametrize("kind", marked)


def pixels_of(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


def tables(config) -> tuple[dict, dict]:
    names, scales = TABLES[config.model_type]
    return DINOV2_GATED if names is DINOV2 and config.use_swiglu_ffn else names, scales


def pair(source, folder) -> tuple:
    """A source and what we make of it, both in fp64."""
    source.save_pretrained(folder)
    return source.double(), to_can(str(folder)).double()


def masked(source, pixels: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
    """Their layers on the tokens of the kept patches, in the places that these have in the whole image."""
    num_prefix = 1 + getattr(source.config, "num_register_tokens", 0)
    rows = torch.arange(len(pixels))[:, None]
    states = source.embeddings(pixels)
    states = torch.cat([states[:, :num_prefix], states[:, num_prefix:][rows, ids_keep]], dim=1)
    if source.config.model_type != "dinov3_vit":
        return source.layernorm(source.encoder(states).last_hidden_state)
    cos, sin = (table[ids_keep][:, None] for table in source.rope_embeddings(pixels))
    for layer in source.model.layer:
        states = layer(states, position_embeddings=(cos, sin))
    return source.norm(states)


@every(*(kind for kind in SOURCES if kind not in ("dinov3 without bias", "dinov2 gated")))
def test_tokens_and_gradients_are_the_sources_masked_or_not_at_two_sizes(kind, tmp_path):
    source, ours = pair(SOURCES[kind](), tmp_path)
    names, scales = tables(source.config)
    for height, width in (ours.config.image_shape, (48, 24)):
        pixels = pixels_of(height, width).requires_grad_()
        num_patches = pixels[0, 0].numel() // (ours.config.patch_shape[0] * ours.config.patch_shape[1])
        scores = torch.rand(2, num_patches, generator=torch.Generator().manual_seed(5))
        for mask_ratio in (None, 0.5):
            given = {} if mask_ratio is None else {"mask_ratio": mask_ratio, "masking_scores": scores}
            output = ours(pixels, interpolate_pos_encoding=True, **given)
            if mask_ratio is None:
                expected = source(pixels).last_hidden_state
            else:
                ids_keep = (output.mask == 0).nonzero()[:, 1].view(2, -1)
                expected = masked(source, pixels, ids_keep)
            torch.testing.assert_close(output.last_hidden_state, expected, **CLOSE)
            patches = expected[:, ours.config.num_prefix_tokens :]
            torch.testing.assert_close(output.pooler_output, patches.mean(1), **CLOSE)
            factors = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
            gradients = []
            for model, made in ((ours, output.last_hidden_state), (source, expected)):
                model.zero_grad()
                pixels.grad = None
                (factors * made).sum().backward()
                gradients.append(pixels.grad)
            torch.testing.assert_close(*gradients, **CLOSE)
            check_gradients(ours, source, names, scales)


def check_gradients(ours: CANModel, source, names: dict, scales: dict):
    """Of W' = s W: the gradient of W is s times that of W', that of s the sum over W of W times that of W'."""
    theirs, seen = dict(source.named_parameters()), set()
    scale_gradients = {}
    for name, parameter in ours.named_parameters():
        key, scale = their_name(f"can.{name}", names), their_name(f"can.{name}".rpartition(".")[0], scales)
        gradient, expected = parameter.grad, theirs[key].grad
        seen.add(key)
        if expected.ndim == 4:
            expected = expected.permute(0, 2, 3, 1).flatten(1)
        if scale is not None:
            rows = theirs[key].unsqueeze(-1) if theirs[key].ndim == 1 else theirs[key]
            change = (gradient.view(rows.shape) * rows).sum(1).detach()
            scale_gradients[scale] = scale_gradients.get(scale, 0) + change
            gradient = (gradient.view(rows.shape) * theirs[scale][:, None]).view(gradient.shape)
        torch.testing.assert_close(gradient, expected, **CLOSE)
    for key, gradient in scale_gradients.items():
        torch.testing.assert_close(gradient, theirs[key].grad, **CLOSE)
    unused = {key for key, parameter in theirs.items() if parameter.grad is None or not parameter.grad.any()}
    left = theirs.keys() - seen - scale_gradients.keys()
    assert left <= unused | {"embeddings.position_embeddings"}, left  # ours are frozen
    assert len(scale_gradients) == 4


@every("dinov3 gated", "dinov2 with registers")
def test_out_and_into_transformers_own_class(kind, tmp_path):
    source, ours = pair(SOURCES[kind](), tmp_path / "source")
    convert(str(tmp_path / "source"), source.config.model_type, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(source) and not info["missing_keys"] and not info["unexpected_keys"]
    # In training ours has no jitter; a patch size is two numbers; the gate of DINOv2 does not look at hidden_act.
    other = {"pos_embed_rescale", "_name_or_path", "patch_size", "hidden_act"}
    theirs, made = source.config.to_dict(), loaded.config.to_dict()
    assert {name for name in theirs if theirs[name] != made[name]} <= other
    for size in (ours.config.image_shape, (48, 24)):
        expected = tokens(source, pixels_of(*size))
        torch.testing.assert_close(tokens(loaded.double(), pixels_of(*size)), expected, **CLOSE)
    assert all((tensor == 1).all() for name, tensor in loaded.named_parameters() if "lambda" in name)
    if source.config.model_type == "dinov3_vit":  # nothing differs in training either
        torch.testing.assert_close(loaded.train()(pixels_of(*size))[0], loaded.eval()(pixels_of(*size))[0])


def test_a_run_starts_from_dinov3_and_keeps_its_features(tmp_path):
    source, encoder = pair(dinov3(), tmp_path)
    sizes = {name: value for name, value in TINY.items() if name.startswith(("decoder", "projection"))}
    model = CANForPreTraining(CANConfig.from_dict({**can_config(str(tmp_path)).to_dict(), **sizes, "mask_ratio": 0.5,
                                                   "reconstruction_loss_weight": 0.67}))  # fmt: skip
    taken, new = warm_start(model, str(tmp_path))
    assert taken == ["encoder (layer scale folded into the output projections; mask token left out)"]
    assert "decoder" in new
    model = model.double().eval()
    assert torch.equal(model.can(pixels_of(32, 32))[0], encoder(pixels_of(32, 32))[0])
    model(torch.stack([pixels_of(32, 32), pixels_of(32, 32)], dim=1)).loss.backward()
    assert model.can.embeddings.register_tokens.grad.abs().max() > 0


def test_positions_of_registers_model_are_resized_as_it_does_it(tmp_path):
    source = dinov2_with_registers()
    source.save_pretrained(tmp_path)
    model = tiny_model(patch_size=8, image_size=(48, 24), num_register_tokens=3, interpolate_antialias=True)
    taken, _ = warm_start(model, str(tmp_path))
    assert "positions resized from 4 x 4 to 6 x 3" in taken[0]
    pixels = pixels_of(48, 24)
    torch.testing.assert_close(model.double().can(pixels)[0], tokens(source.double(), pixels), **CLOSE)


def test_a_classifier_and_a_head_go_to_dinov2_with_registers(tmp_path):
    fields = dict(**SQUARE, num_register_tokens=3, interpolate_antialias=True)
    model, pixels = can(CANForImageClassification, **fields), pixels_of(40, 64)
    to_dinov2(model, model_type="dinov2_with_registers").save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).double()
    assert type(loaded) is Dinov2WithRegistersForImageClassification
    expected = model.double()(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(loaded(pixels).logits, expected, **CLOSE)
    head = nn.Linear(64, 2)
    exported = to_dinov2(can(CANModel, **fields), head, "dinov2_with_registers").double()
    states = can(CANModel, **fields).double()(pixels, interpolate_pos_encoding=True)
    features = torch.cat([states.last_hidden_state[:, 0], states.pooler_output], dim=1)
    torch.testing.assert_close(exported(pixels).logits, head.double()(features), **CLOSE)


def test_the_tables_name_every_tensor():
    for source in (dinov3(use_gated_mlp=True), dinov2_with_registers(), dinov2_with_registers(use_swiglu_ffn=True)):
        names, scales = tables(source.config)
        gated = getattr(source.config, "use_gated_mlp", False) or getattr(source.config, "use_swiglu_ffn", False)
        rotary = "rotary" if source.config.model_type == "dinov3_vit" else "absolute"
        ours = can(CANModel, num_register_tokens=3, gated_mlp=gated, position_embedding_type=rotary,
                   key_bias=rotary == "absolute").state_dict()  # fmt: skip
        found = {their_name(f"can.{name}", names) for name in ours}
        found |= {their_name(f"can.{name}".rpartition(".")[0], scales) for name in ours} - {None}
        assert found == source.state_dict().keys() - {"embeddings.mask_token"}


# --- Files of weights ------------------------------------------------------------------------------------------------


def as_the_authors(source) -> dict[str, torch.Tensor]:
    """A state dict under the names of facebookresearch/dinov2 or dinov3."""
    is_third = source.config.model_type == "dinov3_vit"
    words = (
        (r"^embeddings\.patch_embeddings(\.projection)?\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.register_tokens", "storage_tokens" if is_third else "register_tokens"),
        (r"^embeddings\.", ""),
        (r"^(model|encoder)\.layer\.", "blocks."),
        (r"attention\.o_proj", "attn.proj"),
        (r"attention\.([qkv])_proj", r"attn.\1"),
        (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    )
    state = {}
    for key, tensor in source.state_dict().items():
        for theirs, name in words:
            key = re.sub(theirs, name, key)
        state[key] = tensor
    for layer in range(source.config.num_hidden_layers):
        mlp, attn = f"blocks.{layer}.mlp", f"blocks.{layer}.attn"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attn}.{part}.{kind}", None) for part in "qkv"]
            if is_third and kind == "bias":  # the keys' bias is masked out
                masks = [torch.ones_like(parts[0]), torch.zeros_like(parts[0]), torch.ones_like(parts[0])]
                parts[1], state[f"{attn}.qkv.bias_mask"] = torch.full_like(parts[0], 7), torch.cat(masks)
            state[f"{attn}.qkv.{kind}"] = torch.cat(parts)
            if f"{mlp}.gate_proj.{kind}" in state:
                gate, up, down = (state.pop(f"{mlp}.{part}_proj.{kind}") for part in ("gate", "up", "down"))
                gates = {"w1": gate, "w2": up} if is_third else {"w12": torch.cat([gate, up])}
                state |= {f"{mlp}.{name}.{kind}": tensor for name, tensor in {**gates, "w3": down}.items()}
            elif f"{mlp}.up_proj.{kind}" in state:
                state[f"{mlp}.fc1.{kind}"] = state.pop(f"{mlp}.up_proj.{kind}")
                state[f"{mlp}.fc2.{kind}"] = state.pop(f"{mlp}.down_proj.{kind}")
    if is_third:
        quarter = source.config.hidden_size // source.config.num_attention_heads // 4
        state["rope_embed.periods"] = 100 ** (torch.arange(quarter) / quarter)
    return state


def as_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' state dict as timm writes it, by timm.models.eva or timm.models.vision_transformer."""
    made = {}
    for key, tensor in state.items():
        if key.endswith((".periods", ".bias_mask", "mask_token")):
            continue
        if "storage_tokens" in state:
            if key.endswith("qkv.bias"):
                made[key.replace("qkv.bias", "q_bias")], _, made[key.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
                continue
            key = re.sub(r"ls([12])\.gamma", r"gamma_\1", key).replace("w1", "fc1_g").replace("w2", "fc1_x")
        made[re.sub(r"^(storage|register)_tokens", "reg_token", key.replace("w12", "fc1").replace("w3", "fc2"))] = (
            tensor
        )
    if "register_tokens" in state:  # the class token's position is part of it there
        made["cls_token"], made["pos_embed"] = made["cls_token"] + made["pos_embed"][:, :1], made["pos_embed"][:, 1:]
    return made


WIDE = dict(hidden_size=192, num_attention_heads=3, num_hidden_layers=2)  # by which the number of heads is known
FILES = {
    "dinov3": lambda: dinov3(**WIDE, layer_norm_eps=1e-5),
    "dinov3 gated": lambda: dinov3(**WIDE, layer_norm_eps=1e-5, use_gated_mlp=True, hidden_act="silu"),
    "dinov2 with registers": lambda: dinov2_with_registers(**WIDE),
    "dinov2 with registers, gated": lambda: dinov2_with_registers(**WIDE, use_swiglu_ffn=True),
    "dinov2 gated": lambda: dinov2(**WIDE, use_swiglu_ffn=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_the_authors_or_of_timm_is_what_transformers_has(kind, tmp_path):
    source = FILES[kind]()
    state = as_the_authors(source)
    torch.save(state, tmp_path / "authors.pth")
    save_file({key: tensor.contiguous() for key, tensor in as_timm(state).items()}, tmp_path / "timm.safetensors")
    source.save_pretrained(tmp_path / "transformers")
    expected = to_can(str(tmp_path / "transformers"))
    for file in ("authors.pth", "timm.safetensors"):
        made = to_can(str(tmp_path / file))
        theirs, ours = expected.config.to_dict(), made.config.to_dict()
        different = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
        assert different <= {"image_size"}  # of DINOv3's, a file does not tell
        assert made.config.image_shape == ((224, 224) if source.config.model_type == "dinov3_vit" else (32, 32))
        for size in ((32, 32), (48, 24)):
            expected_tokens = tokens(source.double(), pixels_of(*size))
            torch.testing.assert_close(tokens(made.double(), pixels_of(*size)), expected_tokens, **CLOSE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"register_tokens": None}, "has no pos_embed, and is not DINOv3 either"),
        ({"rope_embed.periods": 50 ** (torch.arange(16) / 16)}, "rotary positions of base 100"),
        ({"pos_embed": torch.ones(1, 17, 192)}, "rotary positions beside learned ones"),
        ({"cls_norm.weight": torch.ones(192)}, "has parts that CAN's encoder has not, such as cls_norm.weight"),
        ({"blocks.0.mlp.fc1.weight": None}, "has other MLPs than CAN's encoder: no blocks.0.mlp.fc1.weight"),
    ],
)
def test_files_that_are_near_to_dinov3_are_refused(change, message, tmp_path):
    state = {"register_tokens": None, **as_the_authors(FILES["dinov3"]()), **change}
    if "register_tokens" in change:
        del state["storage_tokens"]
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        to_can(str(tmp_path / "other.pth"))


GATED = {"gated_mlp": True, "hidden_act": "silu"}


@pytest.mark.parametrize(
    "export, changes, message",
    [
        (
            to_vit,
            {"num_register_tokens": 4, "interpolate_antialias": True},
            "=4, interpolate_antialias=True is nothing that vit has; export to dinov2_with_registers or onnx$",
        ),
        (to_vit, {"num_register_tokens": 4}, "=4 is nothing that vit has; export to onnx$"),
        (to_vit, {"gated_mlp": True}, "gated_mlp=True is nothing that vit has; export to onnx$"),  # GELU gates
        (to_timm, GATED, "gated_mlp=True is nothing that timm has; export to dinov2 or onnx$"),
        (
            to_dinov2,
            {"position_embedding_type": "rotary", "key_bias": False},
            "key_bias=False, position_embedding_type='rotary' is nothing that dinov2 has; export to dinov3_vit or",
        ),
        (to_dinov3_vit, {}, "_type='absolute' is nothing that dinov3_vit has; export to vit, timm, dinov2 or onnx$"),
        (to_timm, {"hidden_act": "quick_gelu"}, "'quick_gelu' is none of timm's; export to vit, dinov2 or onnx$"),
        (to_dinov2, {"gated_mlp": True}, "hidden_act='gelu', but DINOv2's gate has 'silu'; export to onnx"),
        (to_dinov2, GATED | {"intermediate_size": 72}, "intermediate_size=72 is none that DINOv2's gated MLPs have"),
        (
            partial(to_dinov2, model_type="dinov2_with_registers"),
            {"num_register_tokens": 4},
            'interpolate_antialias=False, but .*write "interpolate_antialias": true into config.json',
        ),
    ],
)
def test_what_a_class_cannot_be_is_refused_in_words(export, changes, message):
    with pytest.raises(ValueError, match=message):
        export(can(CANModel, **SQUARE, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated_mlp": True},
        GATED,
        {"num_register_tokens": 2},
        {"num_register_tokens": 2, "interpolate_antialias": True},
        {"interpolate_antialias": True, "image_size": (32, 48)},
        {"intermediate_size": 80, "layer_norm_eps": 1e-5},
        {"hidden_act": "quick_gelu", "image_size": (32, 48)},
        {"position_embedding_type": "rotary", "num_register_tokens": 2},
    ],
)
def test_the_exports_that_a_refusal_names_work(changes):
    model = can(CANModel, **SQUARE | changes)
    exports = {"dinov2": to_dinov2, "vit": to_vit, "timm": to_timm, "dinov3_vit": to_dinov3_vit}
    exports["dinov2_with_registers"] = partial(to_dinov2, model_type="dinov2_with_registers")
    refusals = {}
    for name, export in exports.items():
        try:
            export(model)
        except ValueError as error:
            refusals[name] = set(re.findall(r"\w+", str(error).rpartition("; export to ")[2])) - {"or", "onnx"}
    assert refusals and all(named == exports.keys() - refusals.keys() for named in refusals.values())


def test_the_command_says_that_a_classifier_stays_and_its_card_takes_the_mean_of_the_patches(tmp_path, capsys):
    fields = dict(**SQUARE, num_register_tokens=2, position_embedding_type="rotary")
    can(CANForImageClassification, **fields).save_pretrained(tmp_path / "source")
    main([str(tmp_path / "source"), "--to", "dinov3_vit", str(tmp_path / "out")])
    assert "its classifier is left out" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "last_hidden_state[:, 3:].mean(dim=1)" in card and "equal to 1e-5" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["DINOv3ViTModel"]
    made, pixels = AutoModel.from_pretrained(tmp_path / "out"), torch.randn(2, 3, 32, 32)
    assert type(made) is DINOv3ViTModel
    maps = DINOv3ViTBackbone.from_pretrained(tmp_path / "out")(pixels).feature_maps
    torch.testing.assert_close(maps[-1], made(pixels)[0][:, 3:].mT.unflatten(2, (4, 4)))


def test_the_command_writes_dinov2_with_registers(tmp_path):
    randomized(Dinov2WithRegistersModel(dinov2_with_registers().config)).save_pretrained(tmp_path / "source")
    main([str(tmp_path / "source"), "--to", "dinov2_with_registers", str(tmp_path / "out")])
    assert "last_hidden_state[:, 4:].mean(dim=1)" in (tmp_path / "out" / "README.md").read_text()
