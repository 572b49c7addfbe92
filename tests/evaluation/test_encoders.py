"""Every kind of vision encoder: loaded, pooled, normalized as its processor does; and refused in words."""

import io
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from testing_utils import TINY, tiny_model
from transformers import BertConfig, BertModel, ConvNextImageProcessorPil, ViTImageProcessorPil

from modeling_can import CANForImageClassification
from modeling_can.conversion import convert, to_can
from modeling_can.evaluation.encoders import feature_maps, load_config, load_encoder, load_model, pooled, untrained
from modeling_can.evaluation.preprocessors import Preprocessor


VIT = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)
STAGES = dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
KINDS = {  # class, its configuration, and how many tokens come before those of the patches
    "ViTModel": (VIT, 1),
    "ViTForImageClassification": (VIT, 1),
    "ViTMAEForPreTraining": (VIT, 1),
    "Dinov2Model": (VIT, 1),
    "Dinov2WithRegistersModel": (VIT | {"num_register_tokens": 4}, 5),
    "DINOv3ViTModel": (VIT | {"num_register_tokens": 2}, 3),
    "BeitModel": (VIT, 1),
    "Data2VecVisionModel": (VIT, 1),
    "SiglipVisionModel": (VIT, 0),
    "SwinModel": (dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4), 0),
    "ConvNextModel": (STAGES, 0),
    "ResNetModel": (STAGES | {"embedding_size": 8}, 0),
}


def processor(**changes) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(**{"size": {"height": 32, "width": 32}, **changes})


def saved(folder, model, **changes) -> str:
    model.save_pretrained(folder)
    processor(**changes).save_pretrained(folder)
    return str(folder)


def build(kind: str):
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**KINDS[kind][0])).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_mean_of_its_patches_and_its_class_token(kind, tmp_path):
    model, num_before = build(kind), KINDS[kind][1]
    encoder = load_encoder(saved(tmp_path, model))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encoder(pixels)
        again = encoder(pixels)
        more = encoder(pixels, num_layers=2)
        if kind == "ViTMAEForPreTraining":  # hides nothing, keeps the order; a plain ViT has the same weights
            plain = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
            state = plain(pixels).last_hidden_state
        else:
            state = (model.vit if hasattr(model, "vit") else model)(pixels).last_hidden_state
    tokens = state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
    torch.testing.assert_close(features["mean"], tokens[:, num_before:].mean(1), atol=1e-5, rtol=0)
    assert ("cls" in features) == (num_before > 0)
    if num_before:
        torch.testing.assert_close(features["cls"], tokens[:, 0], atol=1e-5, rtol=0)
        assert pooled(features, "both", kind).shape == (2, 2 * features["mean"].shape[1])
    else:
        with pytest.raises(ValueError, match="no class token.*--pooling mean"):
            pooled(features, "cls", kind)
    for name in features:
        assert torch.equal(features[name], again[name])
        width = features[name].shape[1]
        assert more[name].shape[1] > width and torch.allclose(more[name][:, -width:], features[name], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_tokens_in_their_places_and_its_attention_where_it_has_one(kind, tmp_path):
    num_before = KINDS[kind][1]
    encoder = load_encoder(saved(tmp_path, build(kind)))
    pixels, model = torch.randn(2, 3, 32, 32), encoder.model
    implementation = model.config._attn_implementation
    tokens, attention = feature_maps(model, pixels)
    with torch.no_grad():
        torch.testing.assert_close(tokens.mean((2, 3)), encoder(pixels)["mean"], rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == implementation
    assert (attention is not None) == (num_before > 0 and kind != "Data2VecVisionModel")  # which returns none
    if kind in ("ViTModel", "Dinov2WithRegistersModel"):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            output = model(pixels, output_attentions=True)
        for row in range(4):
            for column in range(4):
                place = num_before + 4 * row + column
                expected = output.last_hidden_state[:, place]
                torch.testing.assert_close(tokens[:, :, row, column], expected, rtol=1e-4, atol=1e-5)
                expected = sum(output.attentions[-1][:, head, 0, place] for head in range(2)) / 2
                torch.testing.assert_close(attention[:, row, column], expected, rtol=1e-4, atol=1e-6)


ROTARY = {"position_embedding_type": "rotary", "num_register_tokens": 3}


@pytest.mark.parametrize("changes", [{}, ROTARY], ids=["class token", "class token and registers"])
def test_changing_a_patch_changes_its_token_most(changes):
    """The grid is that of the image, also where it is not square."""
    model, pixels = tiny_model(**changes), torch.randn(1, 3, 32, 48)
    changed = pixels.clone()
    changed[:, :, 8:16, 32:40] += 1  # row 1, column 4
    (before, _), (after, attention) = (feature_maps(model.can, images) for images in (pixels, changed))
    difference = (after - before).abs().sum(1)[0]
    assert attention.shape == (1, 4, 6) and difference.argmax() == 6 * 1 + 4


@pytest.mark.parametrize("changes", [{}, ROTARY], ids=["class token", "class token and registers"])
def test_can_gives_its_pooler_output_and_leaves_decoder_and_classifier_behind(changes, tmp_path):
    model = tiny_model(**changes)
    classifier = CANForImageClassification(model.config).eval()
    classifier.can.load_state_dict(model.can.state_dict())
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = model.can(pixels).pooler_output
        for name, source in {"pre-trained": model, "classifier": classifier}.items():
            folder = saved(tmp_path / name, source, size={"height": 32, "width": 48})
            encoder = load_encoder(folder)
            torch.testing.assert_close(encoder(pixels)["mean"], expected, atol=1e-6, rtol=0)


def test_the_digest_is_of_the_weights_not_of_their_place(tmp_path):
    first = load_encoder(saved(tmp_path / "a", build("ViTModel")))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_encoder(str(tmp_path / "b")).digest() == first.digest()
    with torch.no_grad():
        first.model.layernorm.bias[0] += 1e-3
    assert load_encoder(str(tmp_path / "b")).digest() != first.digest()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))  # same weights
    assert load_encoder(str(tmp_path / "b")).digest() != load_encoder(str(tmp_path / "a")).digest()


def test_the_digest_is_the_same_without_the_map_of_the_code_in_the_folder(tmp_path):
    folder = saved(tmp_path, tiny_model(), size={"height": 32, "width": 48})
    digest = load_encoder(folder).digest()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
    assert "auto_map" in config and load_encoder(folder).digest() == digest


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTMAEForPreTraining"])
def test_the_digest_of_a_model_that_lacks_a_pooler_is_always_the_same(kind, tmp_path):
    """Its own random one plays no part."""
    folder = saved(tmp_path, build(kind))
    first, second = load_encoder(folder), load_encoder(folder)
    assert first.digest() == second.digest()


@pytest.mark.parametrize("kind", ["ViTModel", "ViTMAEForPreTraining"])
def test_an_untrained_model_has_other_weights_and_knows_its_positions(kind, tmp_path):
    model = build(kind)
    if kind == "ViTMAEForPreTraining":  # as in a released checkpoint
        model.vit.embeddings.position_embeddings.data.normal_()
    encoder = load_encoder(saved(tmp_path, model))
    state = torch.get_rng_state()
    fresh = untrained(encoder, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh.digest() == untrained(encoder, seed=3).digest() != untrained(encoder, seed=4).digest()
    assert fresh.digest() != encoder.digest()
    pixels = torch.randn(1, 3, 32, 32)
    moved = pixels.roll(8, dims=3)  # a whole patch
    with torch.no_grad():
        assert (fresh(pixels)["cls"] - fresh(moved)["cls"]).abs().max() > 1e-4


# --- Preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, dict(size={"shortest_edge": 36}, do_center_crop=True, resample=3,
                                              crop_size={"height": 32, "width": 24}), dict(do_normalize=False),
                                     dict(image_mean=[0.5], image_std=[0.25])])  # fmt: skip
def test_two_steps_are_the_processor(changes):
    whole = processor(**changes)
    two = Preprocessor(whole)
    assert two.in_two_steps and two.num_channels == len(whole.image_mean)
    for seed, size in enumerate([(40, 60), (33, 32), (100, 50)]):
        image = np.random.default_rng(seed).integers(0, 256, (*size, two.num_channels), dtype=np.uint8)
        prepared = two(image)
        assert prepared.dtype == torch.uint8
        expected = whole([image], return_tensors="pt").pixel_values
        torch.testing.assert_close(two.normalize(prepared[None]), expected, atol=1e-6, rtol=1e-6)


def test_another_kind_of_processor_is_applied_as_a_whole():
    class Odd(ViTImageProcessorPil):
        def __call__(self, *arguments, **options):
            batch = super().__call__(*arguments, **options)
            batch["pixel_values"] = batch["pixel_values"].flip(-1) + 1
            return batch

    odd = Odd(size={"height": 32, "width": 32})
    whole, image = Preprocessor(odd), np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected = odd([image], return_tensors="pt").pixel_values
    assert not whole.in_two_steps and torch.equal(whole.normalize(whole(image)[None]), expected)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (250, 120, 10)).save(buffer, "PNG")
    shown = whole.shown(buffer.getvalue())  # not what the model gets, which is normalized
    assert shown.dtype == torch.uint8 and shown.shape == (3, 32, 32)
    assert shown.flatten(1).float().mean(1).tolist() == [250, 120, 10]


def test_another_size_keeps_the_proportions_and_is_interpolated(tmp_path):
    changes = dict(size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    folder = saved(tmp_path, build("ViTModel"), **changes)
    encoder = load_encoder(folder, image_size=(48, 64))
    assert encoder.preprocessor.image_size == (48, 64) and encoder.preprocessor.sizes["size"] == {"shortest_edge": 80}
    assert encoder.options == {"interpolate_pos_encoding": True}
    assert load_encoder(folder).options == {}


def test_a_processor_without_crop_gets_a_size_that_it_knows(tmp_path):
    folder = saved(tmp_path, build("ResNetModel"), size={"height": 32, "width": 32})
    shortest = ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875)
    assert load_encoder(folder, image_size=(64, 48)).preprocessor.image_size == (64, 48)
    assert Preprocessor(shortest, (32, 32)).image_size == (32, 32)
    with pytest.raises(ValueError, match=r"image_size=\(32, 48\): the ConvNext.* cannot make images of that size"):
        Preprocessor(shortest, (32, 48))


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_refused_with_what_helps_offline(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing cannot be loaded: .*hf download nobody/nothing"):
        load_encoder("nobody/nothing")
    with pytest.raises(ValueError, match="is no AutoModel|cannot be loaded"):
        load_encoder(str(tmp_path))


def test_a_model_without_a_processor_can_borrow_one(tmp_path):
    build("ViTModel").save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "processor")
    with pytest.raises(ValueError, match="no image processor .*--processor_name_or_path"):
        load_encoder(str(tmp_path / "model"))
    assert load_encoder(str(tmp_path / "model"), str(tmp_path / "processor")).preprocessor.image_size == (32, 32)
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast"}  # which needs torchvision
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no image processor .*orchvision.*--processor_name_or_path"):
        load_encoder(str(tmp_path / "model"))


# As the Hub has it for DINOv3, but for the size and the mean
PUBLISHED = {
    "crop_size": None, "data_format": "channels_first", "default_to_square": True, "device": None,
    "disable_grouping": None, "do_center_crop": None, "do_convert_rgb": None, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.43, 0.411, 0.296],
    "image_processor_type": "DINOv3ViTImageProcessorFast", "image_std": [0.213, 0.156, 0.143],
    "input_data_format": None, "resample": 2, "rescale_factor": 0.00392156862745098, "return_tensors": None,
    "size": {"height": 32, "width": 32},
}  # fmt: skip


def test_dinov3s_processor_is_applied_without_torchvision(tmp_path):
    build("DINOv3ViTModel").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    encoder, image = load_encoder(str(tmp_path)), np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    # In the order of the original: to [0, 1], resize with antialiasing, normalize.
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    pixels = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(PUBLISHED[name])[:, None, None] for name in ("image_mean", "image_std"))
    made = encoder.preprocessor.normalize(encoder.preprocessor(image)[None])
    assert ((made - (pixels - mean) / std) * std).abs().max() <= 1.1 / 255  # rounded twice, once a direction
    assert encoder.preprocessor.in_two_steps and encoder.preprocessor.image_size == (32, 32)
    convert(str(tmp_path), "can", tmp_path / "can")
    again = load_encoder(str(tmp_path / "can")).preprocessor
    assert torch.equal(again.normalize(again(image)[None]), made)


def test_a_size_that_the_model_refuses_names_the_one_it_takes(tmp_path):
    folder = saved(tmp_path, tiny_model(), size={"height": 20, "width": 20})
    with pytest.raises(ValueError, match=r"refuses the 3 x 20 x 20 pixels .*--image_size 32,48"):
        load_encoder(folder)
    assert load_encoder(folder, image_size=(32, 48)).options == {}


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="makes images of different sizes.*--image_size HEIGHT,WIDTH"):
        Preprocessor(processor(size={"shortest_edge": 32}))


def test_models_that_do_not_tell_their_patches_are_refused(tmp_path):
    model = transformers.PvtModel(
        transformers.PvtConfig(image_size=32, hidden_sizes=[8, 16, 40, 64], depths=[1, 1, 1, 1])
    )
    with pytest.raises(ValueError, match="a PvtModel does not tell which of its tokens are patches"):
        load_encoder(saved(tmp_path, model))


def test_a_detector_whose_tokens_are_not_those_of_patches_alone_is_refused(tmp_path):
    sizes = VIT | {"image_size": [32, 32], "num_detection_tokens": 5}
    with pytest.raises(ValueError, match="a YolosModel is a detector, and has tokens of objects behind"):
        load_encoder(saved(tmp_path, transformers.YolosModel(transformers.YolosConfig(**sizes))))


def test_dinov3s_convnext_gives_its_map_and_not_the_token_of_the_whole_image(tmp_path):
    torch.manual_seed(0)
    model = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**STAGES)).eval()
    encoder = load_encoder(saved(tmp_path, model, size={"height": 64, "width": 96}))
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens, features = model(pixels).last_hidden_state[:, 1:], encoder(pixels, num_layers=2)
        torch.testing.assert_close(encoder.patch_tokens(pixels), tokens.mT.unflatten(2, (2, 3)))
        torch.testing.assert_close(encoder(pixels), {"mean": tokens.mean(1)})
    assert list(features) == ["mean"] and features["mean"].shape == (2, 16) and encoder.token_shape == (8, 2, 3)


def test_a_model_without_a_last_hidden_state_is_refused(tmp_path):
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "depths": [1] * 4, "num_heads": [1] * 4}
    backbone = transformers.SwinConfig(**KINDS["SwinModel"][0] | stages)
    decoder = transformers.DetrConfig(d_model=32, encoder_layers=1, decoder_layers=1)
    config = transformers.MaskFormerConfig(backbone_config=backbone, decoder_config=decoder)
    with pytest.raises(ValueError, match="a MaskFormerModel, which returns no last_hidden_state.*give an encoder"):
        load_encoder(saved(tmp_path, transformers.MaskFormerModel(config)))


def test_grayscale_images_for_a_color_model_are_refused(tmp_path):
    folder = saved(tmp_path, build("ViTModel"), image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match="refuses the 1 x 32 x 32 pixels"):
        load_encoder(folder)


def test_text_models_are_refused(tmp_path):
    tiny = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    folder = saved(tmp_path, BertModel(BertConfig(**tiny)))
    with pytest.raises(ValueError, match="takes input_ids and no images"):
        load_encoder(folder)


def test_missing_and_misshapen_weights_are_refused(tmp_path):
    folder = saved(tmp_path, build("ViTModel"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="lacks weights of a ViTModel.*layers.3"):
        load_encoder(folder)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(ValueError, match="mlp"):
        load_encoder(folder)


@pytest.mark.parametrize("kind", ["ViTModel", "CANModel"])
def test_a_config_with_a_value_of_a_wrong_type_is_refused_in_words(kind, tmp_path):
    folder = saved(tmp_path, build(kind) if kind == "ViTModel" else tiny_model().can)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "three"}))
    for load in (load_encoder, load_config, to_can):
        with pytest.raises(ValueError, match="num_hidden_layers.*expected int, got str .*'three'.*config.json"):
            load(folder)


REGISTERS = {"num_register_tokens": 4}


@pytest.mark.parametrize("kind, config, changes, named", [
    ("Dinov2WithRegistersModel", VIT | REGISTERS, {"model_type": "dinov2"}, "embeddings.register_tokens"),
    ("ViTModel", VIT, {"num_hidden_layers": 2}, r"layers\.2\.attention"),
    ("ViTForImageClassification", VIT, {"qkv_bias": False}, r"k_proj\.bias"),
    ("ConvNextModel", STAGES, {"layer_scale_init_value": 0.0}, "layer_scale_parameter"),
    ("CLIPVisionModel", VIT, {"num_hidden_layers": 2}, r"layers\.2\."),
])  # fmt: skip
def test_weights_that_the_class_has_no_place_for_are_refused(kind, config, changes, named, tmp_path):
    """It would compute something else without them."""
    model_class = getattr(transformers, kind)
    folder = saved(tmp_path, model_class(model_class.config_class(**config)))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(ValueError, match=f"weights for which a .* has no place: .*{named}.*make config.json say"):
        load_encoder(folder)


@pytest.mark.parametrize("kind, config", [
    ("ViTForMaskedImageModeling", VIT), ("ViTMAEForPreTraining", VIT), ("Dinov2ForImageClassification", VIT),
    ("BeitForMaskedImageModeling", VIT), ("BeitForMaskedImageModeling", VIT | {"use_mean_pooling": False}),
    ("SwinForMaskedImageModeling", KINDS["SwinModel"][0] | {"encoder_stride": 8}), ("DPTForDepthEstimation", VIT |
    {"backbone_out_indices": [0, 1, 2, 2], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}),
])  # fmt: skip
def test_heads_decoders_and_tables_of_older_versions_are_rightly_left_out(kind, config, tmp_path):
    model_class = getattr(transformers, kind)
    folder = saved(tmp_path, model_class(model_class.config_class(**config)))
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    prefix = next(key for key in tensors if "patch_embeddings.projection.weight" in key).partition("embeddings.")[0]
    for name in ("embeddings.position_ids", "encoder.layers.0.relative_coords_table"):
        tensors[prefix + name] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    assert "mean" in load_encoder(folder)(torch.randn(1, 3, 32, 32))


def test_a_new_classifier_may_be_missing_where_it_is_asked_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier.weight"):
        load_model(str(tmp_path), CANForImageClassification)
    model = load_model(str(tmp_path), CANForImageClassification, new=("classifier.",), num_labels=5)
    assert model.classifier.weight.shape == (5, TINY["hidden_size"])
