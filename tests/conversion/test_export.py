"""Our encoder in other people's classes: the same outputs."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from other_encoders import OTHER_SIZES, SQUARE, can, equal, features, pixels_of, randomized, tokens, vit
from PIL import Image
from safetensors.torch import load_file
from testing_utils import ROOT
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2Model,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from modeling_can import CANConfig, CANForImageClassification, CANModel, conversion
from modeling_can.conversion import convert, export, join_qkv, processors, to_can, to_dinov2, to_onnx, to_timm, to_vit
from modeling_can.conversion.__main__ import main


# --- To transformers' classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [None, CANModel, CANForImageClassification])
def test_dinov2_gives_the_same_tokens_at_every_size(model_class, tmp_path):
    model = can(model_class, **SQUARE)
    to_dinov2(model).save_pretrained(tmp_path)
    loaded, info = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for size in OTHER_SIZES:
        equal(tokens(loaded, pixels_of(*size)), features(model, pixels_of(*size)))
    assert all((tensor == 1).all() for name, tensor in loaded.named_parameters() if "lambda" in name)


def test_a_classifier_becomes_the_half_of_dinov2s_that_reads_the_mean(tmp_path):
    model = can(**SQUARE)
    config = CANConfig(**{**model.config.to_dict(), "id2label": {0: "cat", 1: "dog", 2: "eel"}})
    model = randomized(CANForImageClassification(config))
    to_dinov2(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is Dinov2ForImageClassification and loaded.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    with torch.no_grad():
        equal(loaded(pixels_of(32, 32)).logits, model(pixels_of(32, 32)).logits)
    assert not loaded.classifier.weight[:, :32].any() and loaded.classifier.weight[:, 32:].any()


def test_a_head_on_class_token_and_mean_goes_along():
    model, head = can(CANModel, **SQUARE), nn.Linear(64, 2)
    exported, pixels = to_dinov2(model, head), pixels_of(40, 64)
    states = features(model, pixels)
    with torch.no_grad():
        equal(exported(pixels).logits, head(torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1)))


def test_a_backbone_gives_the_maps_of_every_block(tmp_path):
    model, pixels = can(CANModel, **SQUARE), pixels_of(40, 64)
    to_dinov2(model).save_pretrained(tmp_path)
    backbone = Dinov2Backbone.from_pretrained(tmp_path, out_indices=[1, 2])
    with torch.no_grad():
        states = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        maps = backbone(pixels).feature_maps
        for found, state in zip(maps, states[1:], strict=True):
            equal(found, model.layernorm(state)[:, 1:].transpose(1, 2).unflatten(2, (5, 8)))
        config = UperNetConfig(backbone_config=backbone.config, hidden_size=16, num_labels=3, use_auxiliary_head=False)
        segmenter = UperNetForSemanticSegmentation(config).eval()
        segmenter.backbone.load_state_dict(backbone.state_dict())
        assert segmenter(pixels).logits.shape == (2, 3, 40, 64)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-5}])
def test_vit_gives_the_same_tokens_at_every_size(changes, tmp_path):
    model = can(**SQUARE, **changes)
    to_vit(model).save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    for size in OTHER_SIZES:
        equal(tokens(loaded, pixels_of(*size)), features(model, pixels_of(*size)))


@pytest.mark.parametrize(
    "shapes", [{"image_size": (32, 48), "patch_size": 8}, {"image_size": 32, "patch_size": (8, 4)}]
)
def test_grids_that_are_not_square_are_for_vit_alone(shapes):
    model = can(**shapes)
    with pytest.raises(ValueError, match=r"grid of 4 x (6|8) patches, .*export to vit, timm or onnx"):
        to_dinov2(model)
    pixels = pixels_of(*model.config.image_shape)
    with torch.no_grad():
        equal(to_vit(model)(pixels).last_hidden_state, features(model, pixels))


def test_square_grids_of_patches_that_are_not_square():
    model, pixels = can(image_size=(16, 32), patch_size=(4, 8)), pixels_of(16, 32)
    for exported in (to_dinov2(model), to_vit(model)):
        with torch.no_grad():
            equal(exported(pixels).last_hidden_state, features(model, pixels))


def test_what_dinov2_and_timm_cannot_be_is_refused():
    with pytest.raises(ValueError, match="intermediate_size=80 is no multiple of hidden_size=32"):
        to_dinov2(can(**SQUARE, intermediate_size=80))
    with pytest.raises(ValueError, match="layer_norm_eps=1e-05, but timm's ViT has 1e-6"):
        to_timm(can(layer_norm_eps=1e-5))


@pytest.mark.parametrize("export", [to_dinov2, to_vit])
def test_half_precision_stays_and_is_exact(export):
    model = can(**SQUARE).bfloat16()
    exported = export(model)
    assert exported.dtype == torch.bfloat16
    pixels = pixels_of(32, 32)
    equal(tokens(exported.float(), pixels), features(model.float(), pixels))


@pytest.mark.parametrize(
    "name", ["layers.1.attention.k_proj.weight", "embeddings.position_embeddings", "layernorm.bias"]
)
@pytest.mark.parametrize("to_theirs", [to_dinov2, to_vit])
def test_an_export_that_differs_is_not_handed_out(to_theirs, name, monkeypatch):
    true_weights = export.encoder_weights

    def with_a_mistake(model, names):
        weights = true_weights(model, names)
        key = conversion.their_name(f"can.{name}", names)
        weights[key] = weights[key] * 1.001
        return weights

    monkeypatch.setattr(export, "encoder_weights", with_a_mistake)
    with pytest.raises(AssertionError, match="the export differs by"):
        to_theirs(can(**SQUARE))


# --- To timm and ONNX ------------------------------------------------------------------------------------------------


def test_timm_finds_its_names_and_shapes():
    """The list was written with timm itself, which cannot be installed everywhere that this must run."""
    listed = json.loads((Path(__file__).parent / "timm_vit.json").read_text())
    config = CANConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=5
    )
    state, description = to_timm(CANForImageClassification(config))
    assert {name: list(tensor.shape) for name, tensor in state.items()} == listed["shapes"]
    expected = {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4, **listed["arguments"]}
    assert expected.items() <= description["model_args"].items()


@pytest.mark.parametrize("shapes", [SQUARE, {"image_size": (32, 48), "patch_size": (8, 4)}])
def test_there_and_back_through_timm_changes_nothing(shapes, tmp_path):
    model = can(**shapes, qkv_bias=False)
    model.save_pretrained(tmp_path / "can")
    convert(str(tmp_path / "can"), "timm", tmp_path / "timm")
    with pytest.raises(ValueError, match="is timm's; write it anew first"):  # whose config.json does not tell it all
        conversion.can_config(str(tmp_path / "timm"))
    back = to_can(str(tmp_path / "timm"))
    assert back.config.num_attention_heads == 2 and back.config.image_shape == model.config.image_shape
    for name, tensor in model.can.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("model_class", [CANModel, pytest.param(CANForImageClassification, marks=pytest.mark.slow)])
def test_onnx_gives_the_same_for_every_size_of_batch(model_class, tmp_path):
    model = can(model_class)
    model.save_pretrained(tmp_path / "can")
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "can")
    convert(str(tmp_path / "can"), "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for batch_size in (1, 5):
        pixels = torch.randn(batch_size, 3, 32, 48)
        with torch.no_grad():
            expected = model(pixels)
        outputs = dict(
            zip(
                [o.name for o in session.get_outputs()],
                session.run(None, {"pixel_values": pixels.numpy()}),
                strict=True,
            )
        )
        assert outputs.keys() == ({"logits"} if "logits" in expected else {"last_hidden_state", "pooler_output"})
        for name, output in outputs.items():
            equal(torch.from_numpy(output), expected[name])
    names = run_the_cards_snippet(tmp_path / "onnx")
    assert names["embedding"].shape == (1, 32) if model_class is CANModel else names["logits"].shape == (1, 2)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture()
def source(tmp_path) -> Path:
    """A pre-training checkpoint with its processor."""
    can(**SQUARE).save_pretrained(tmp_path / "source")
    sizes = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    ViTImageProcessor(**sizes, image_mean=[0.1] * 3, image_std=[0.3] * 3).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "source"


def run_the_cards_snippet(folder: Path) -> dict:
    """The names that it leaves, after running in the folder with an image there."""
    Image.effect_noise((50, 40), 60).convert("RGB").save(folder / "photo.jpg")
    np.save(folder / "image.npy", np.zeros((4, 32, 32), np.float32))
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag and "None" not in card.content and "{{" not in card.content
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names, before = {}, os.getcwd()
    os.chdir(folder)
    try:
        exec(snippet, names)
    finally:
        os.chdir(before)
    return names


@pytest.mark.parametrize("target", ["can", "dinov2", "vit"])
def test_the_command_writes_what_pipelines_load(source, target, tmp_path, capsys):
    main([str(source), "--to", target, str(tmp_path / "out")])
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    code = {"configuration_can.py", "losses.py", "modeling_can.py"} if target == "can" else set()
    assert set(os.listdir(tmp_path / "out")) == files | code
    assert ", ".join(sorted(files | code)) in capsys.readouterr().out
    image = Image.effect_noise((50, 40), 60).convert("RGB")
    extracted = pipeline("image-feature-extraction", model=str(tmp_path / "out"))(image)
    pixels = ViTImageProcessor.from_pretrained(source)(image, return_tensors="pt")["pixel_values"]
    expected = features(AutoModel.from_pretrained(source), pixels)
    equal(torch.tensor(extracted), expected)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    names = run_the_cards_snippet(tmp_path / "out")
    assert names["embedding"].shape == (1, 32)
    equal(names["embedding"], features(AutoModel.from_pretrained(source), names["pixel_values"])[:, 1:].mean(1))


def test_the_command_takes_a_classifier_along(source, tmp_path):
    model = can(CANForImageClassification, **SQUARE)
    model.save_pretrained(source)
    for target in ("can", "dinov2", "timm"):
        main([str(source), "--to", target, str(tmp_path / target)])
        if target != "timm":
            assert len(run_the_cards_snippet(tmp_path / target)["answers"]) == 2
    assert load_file(tmp_path / "timm" / "model.safetensors").keys() >= {"head.weight", "head.bias"}
    back = AutoModelForImageClassification.from_pretrained(tmp_path / "can")
    with torch.no_grad():
        equal(back(pixels_of(32, 32)).logits, model(pixels_of(32, 32)).logits)


def test_the_command_gives_timm_its_preprocessing(source, tmp_path):
    main([str(source), "--to", "timm", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.1] * 3 and config["pretrained_cfg"]["crop_pct"] == 32 / 36
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors")["patch_embed.proj.weight"].shape == (32, 3, 8, 8)


def listing(folder: Path) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_command_refuses_in_words_and_leaves_nothing_behind(source, tmp_path):
    can().save_pretrained(tmp_path / "oblong")
    before = listing(tmp_path)
    for arguments, message in (
        ([str(source), "--to", "vit", str(source)], "source is not empty; give a new folder"),
        ([str(source), "--to", "vit", str(source / "config.json")], "config.json is a file; give a new folder"),
        (
            [str(tmp_path / "nowhere"), "--to", "vit", str(tmp_path / "out")],
            "nowhere: there is no such file or folder",
        ),
        ([str(tmp_path / "oblong"), "--to", "dinov2", str(tmp_path / "out")], "makes a grid of 4 x 6"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            main(arguments)
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_python_m_runs_the_command_without_a_warning(source, tmp_path):
    command = [sys.executable, "-m", "modeling_can.conversion", str(source), "--to", "can", str(tmp_path / "out")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and "CANModel, 2 layers of width 32 with 2 heads" in answer.stdout, answer.stderr
    assert "Warning" not in answer.stderr  # as runpy gives one where __init__ imports __main__


def test_an_empty_folder_and_a_link_to_one_are_filled(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    main([str(source), "--to", "vit", "link"])
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("target", ["can", "dinov2", "vit", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_the_snippets_of_sources_without_processor_or_color_run(target, num_channels, tmp_path):
    source = can(**SQUARE, num_channels=num_channels)
    source.save_pretrained(tmp_path / "source")
    if num_channels != 3:
        others = {"image_mean": [0.5] * num_channels, "image_std": [0.2] * num_channels, "do_convert_rgb": False}
        ViTImageProcessor(size={"height": 32, "width": 32}, **others).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), target, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("All values of the type, uint8 or uint16, became [0, 1]." in card) == (num_channels == 4)
    names = run_the_cards_snippet(tmp_path / "out")
    assert names["pixel_values"].shape == (1, num_channels, 32, 32) and names["embedding"].shape == (1, 32)


@pytest.mark.parametrize("target", ["can", "vit", "timm"])
def test_the_card_says_which_values_became_the_unit_range(source, target, tmp_path):
    path = source / "preprocessor_config.json"
    said = {}
    for name, changes in {"photos": {}, "scans": {"pixel_range": [-1000.0, 400.0]}}.items():
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        convert(str(source), target, tmp_path / name)
        said[name] = (tmp_path / name / "README.md").read_text()
    assert "Values from -1000.0 to 400.0 became [0, 1]." in said["scans"] and "became" not in said["photos"]
    assert ("modeling-can embed" in said["scans"]) == (target != "timm")  # which loads none of timm's
    assert "```\n\nValues" in said["scans"] or target == "timm"


def test_classifiers_that_are_left_out_are_mentioned(source, tmp_path, capsys):
    vit(ViTForImageClassification).save_pretrained(tmp_path / "vit")
    main([str(tmp_path / "vit"), "--to", "dinov2", str(tmp_path / "out")])
    assert "its classifier is left out" in capsys.readouterr().out
    main([str(source), "--to", "dinov2", str(tmp_path / "other")])
    assert "left out" not in capsys.readouterr().out


def test_timms_preprocessing_goes_there_and_back(source, tmp_path):
    convert(str(source), "timm", tmp_path / "timm")
    convert(str(tmp_path / "timm"), "can", tmp_path / "can")
    assert conversion.normalization(str(tmp_path / "timm")) == ([0.1] * 3, [0.3] * 3)
    image = Image.effect_noise((50, 40), 60).convert("RGB")
    there, back = (ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
                   for folder in (source, tmp_path / "can"))  # fmt: skip
    equal(back, there)
    for crop, edge in itertools.product(range(14, 200, 7), range(200, 400, 7)):
        crop_size = {"height": crop, "width": crop}
        ours = {"do_center_crop": True, "size": {"shortest_edge": edge}, "crop_size": crop_size, "resample": 3,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
        theirs = processors.timm_preprocessing(ours) | {"input_size": [3, crop, crop]}
        assert processors.from_timm_preprocessing(theirs).items() >= ours.items()
    theirs |= {"input_size": [3, 224, 224], "crop_pct": 0.9}
    assert processors.from_timm_preprocessing(theirs)["size"] == {"shortest_edge": 248}  # as timm resizes
    squashed = ViTImageProcessor(size={"height": 32, "width": 32}).to_dict()
    assert {"crop_pct": 1.0, "crop_mode": "squash"}.items() <= processors.timm_preprocessing(squashed).items()


@pytest.mark.slow
def test_a_file_of_an_onnx_graph_tells_nothing_of_this_machine(source, tmp_path):
    to_onnx(to_can(str(source)), tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, Path.home()):
        assert str(path).encode() not in content


def test_a_wrong_head_is_not_handed_out(monkeypatch):
    model = can(CANForImageClassification, **SQUARE)
    monkeypatch.setattr(nn.functional, "pad", lambda x, padding: torch.cat([x, torch.zeros_like(x)], dim=1))
    with pytest.raises(AssertionError, match="the export differs by"):
        to_dinov2(model)


def test_a_mistake_in_timms_layout_is_not_handed_out(monkeypatch):
    monkeypatch.setattr(export, "join_qkv", lambda state: {
        key: x.flip(0) if ".qkv." in key else x for key, x in join_qkv(state).items()
    })  # fmt: skip
    with pytest.raises(AssertionError, match="is not what it was"):
        to_timm(can(**SQUARE))
