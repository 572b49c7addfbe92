"""Recipes: every key is a flag, every wrong one is refused with the right one."""

import pytest
import yaml
from testing_utils import KEPT, ROOT

from modeling_can.fields import parse_value
from modeling_can.pretraining.recipe import Recipe, model_fields, parse_arguments, training_fields


QUICKSTART = ROOT / "model_cards" / "can-quickstart" / "recipe.yaml"


def parse(*argv: str) -> Recipe:
    return parse_arguments(list(argv), "")


@pytest.mark.parametrize("path", sorted(ROOT.glob("model_cards/*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_recipes_on_disk_are_valid_and_survive_yaml(path):
    start = [f"--model_name_or_path={KEPT}"] if path.parent.name == "can-adapt" else []  # without which it is refused
    recipe = parse(str(path), *start)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_presets_are_the_published_sizes():
    sizes = {"tiny-patch16": (192, 12, 3), "small-patch16": (384, 12, 6), "base-patch16": (768, 12, 12),
             "large-patch16": (1024, 24, 16), "huge-patch14": (1280, 32, 16)}  # fmt: skip
    for name, size in sizes.items():
        config = parse(str(ROOT / "model_cards" / f"can-vit-{name}-224" / "recipe.yaml")).config
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == size
        assert (config.mask_ratio, config.noise_std_max, config.intermediate_size) == (0.5, 0.05, 4 * size[0])


def test_the_command_line_counts_last():
    recipe = parse("can-quickstart", "--base_learning_rate", "1e-3", "--image_size=64,32", "--crop_scale", "0.5,1",
                   "--norm_pix_loss", "--temperature=1", "--probe_dataset_name=none", "--data_dir", "x")  # fmt: skip
    assert recipe.base_learning_rate == 1e-3 and recipe.config.image_size == (64, 32)
    assert recipe.crop_scale == (0.5, 1.0) and recipe.config.norm_pix_loss is True and recipe.config.temperature == 1
    assert recipe.probe_dataset_name is None
    assert recipe.data_dir == "x" and recipe.dataset_name is None  # one source replaces the other
    assert parse("--num_train_epochs", "2").max_steps is None  # and one length the other


OTHER = {"model_name_or_path": "e", "probe_image_column": "f",
         "on_nonfinite": "skip", "resume_from_checkpoint": "latest", "transparent_background": "#102030",
         "high_bit_depth": "stretch", "hub_model_id": "me/model", "hub_strategy": "end", "license": "mit",
         "dataset_name": "a", "data_dir": "b", "data_files": "c.parquet", "probe_dataset_name": "d",
         "torch_compile": "model", "data_on_device": True, "noise_head": "shared",
         "position_embedding_type": "rotary",
         "num_train_epochs": 2.0, "num_train_samples": 64, "resample": "bilinear", "mixed_precision": "bf16",
         "dataset_config_name": "g", "probe_dataset_config_name": "h",
         "crop_scale": (0.5, 0.75), "crop_ratio": (0.5, 1.0), "blur_sigma": (0.5, 1.0), "hidden_act": "relu",
         "pixel_range": (0, 4095), "display_channels": (2,),
         "color_jitter": (0.1, 0.1, 0.1, 0.1), "image_mean": (0.1, 0.1, 0.1), "image_std": (0.5, 0.5, 0.5),
         "image_size": 64, "patch_size": 8, "hidden_size": 192, "num_attention_heads": 6, "max_steps": 7,
         "decoder_hidden_size": 128, "decoder_num_attention_heads": 8, "projection_hidden_size": 12}  # fmt: skip


def test_every_field_is_a_flag():
    for field in [*training_fields(), *model_fields()]:
        before = parse("can-quickstart")
        holder = before if field in training_fields() else before.config
        value = getattr(holder, field.name)
        if field.name in ("num_channels", "num_views"):
            continue  # change together with image_mean, or the contrastive weight; the script's tests have them
        if field.name in OTHER:
            wanted = OTHER[field.name]
        elif isinstance(value, bool):
            wanted = not value
        elif isinstance(value, str):
            wanted = "other"
        else:
            wanted = value + 1 if isinstance(value, int) else value / 4 + 0.01
        needed = ["--push_to_hub"] if field.name in ("hub_model_id", "hub_private") else []
        needed += ["--model_name_or_path=other"] if field.name == "frozen_encoder_ratio" else []
        text = ",".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
        after = parse("can-quickstart", f"--{field.name}={text}", *needed)
        holder = after if field in training_fields() else after.config
        assert getattr(holder, field.name) == wanted != value, field.name


def test_numbers_are_read_as_their_field_says():
    assert parse_value("x", "1e-3", float) == 1e-3 and parse_value("x", "1e3", int) == 1000
    assert parse_value("x", 0, float | int) == 0 and parse_value("x", "0.5", float | int) == 0.5
    assert parse_value("x", "224", int | list[int] | tuple[int, int]) == 224
    assert parse_value("x", "8,16", int | list[int] | tuple[int, int]) == (8, 16)
    assert parse_value("x", "false", bool) is False
    for value, annotation in (("ten", int), (0.5, int), ("yes!", bool), ("a,b", tuple[float, ...])):
        with pytest.raises(ValueError, match="x="):
            parse_value("x", value, annotation)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_views", "1"], "num_views=1 must be at least 2, or contrastive_loss_weight 0"),
        (["--mask_ration", "0.75"], "unknown key 'mask_ration'; did you mean 'mask_ratio'"),
        (["--batch_size=7"], "unknown key 'batch_size'; did you mean"),
        (["--batch_size=7"], "did you mean 'per_device_train_batch_size'"),
        (["--batchsize=7"], "did you mean 'per_device_train_batch_size'"),
        (["--lr=7"], "did you mean 'base_learning_rate'"),
        (["--resume=latest"], "did you mean 'resume_from_checkpoint'"),
        (["recipe.yaml"], "no recipe recipe.yaml"),
        ([str(QUICKSTART), "stray"], "unexpected 'stray'"),
        (["--max_steps", "0"], "max_steps=0 must be at least 1"),
        (["--num_train_epochs", "three"], "num_train_epochs='three' must be a number"),
        (["--mask_ratio", "75"], r"mask_ratio=75.0 is outside \[0, 1\); give a number from 0 to below 1"),
        (["--image_size", "big"], "image_size='big' must be a whole number or values with commas between"),
        (["--max_steps", "many"], "max_steps='many' must be a whole number"),
        (["--seed"], "seed='true' must be a whole number"),
        (["--image_mean", "0.5,nan,0.5"], "image_mean=nan must be finite"),
        (["--image_std", "0.5,inf,0.5"], "image_std=inf must be finite"),
        (["--image_std", "0.5,0,0.5"], "image_std=.*greater than 0"),
        (["--image_mean", "0.5"], r"image_mean=\(0.5,\) must have 3 values, one for each channel"),
        (["--crop_scale", "0.9,0.1"], r"crop_scale=\(0.9, 0.1\) must not decrease"),
        (["--crop_scale", "0.5,1.5"], r"crop_scale=1.5 is outside \(0, 1\]"),
        (["--quarter_turn_probability=0.5", "--image_size=32,48"], "quarter_turn_probability=0.5 .* image_size=32,48"),
        (["--flip_probability", "2"], r"flip_probability=2.0 is outside \[0, 1\]"),
        (["--max_grad_norm", "-1"], "max_grad_norm=-1.0 must be at least 0"),
        (["--seed", "-1"], "seed=-1"),
        (["--base_learning_rate", "inf"], "base_learning_rate=inf"),
        (["--max_steps", "inf"], "max_steps='inf' must be a whole number"),
        (["--color_jitter", "0.4,0.4"], "must have 4 values, not 2 .*brightness,contrast,saturation,hue"),
        (["--resample", "nearest"], "'nearest' is not one of bilinear, bicubic"),
        (["--data_dir", "a", "--data_files", "b"], "give one source"),
        (["--image_size", "33"], "image_size=33 is not a multiple"),
    ],
)
def test_wrong_words_are_refused_with_the_fix(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    "line, message",
    [
        ("max_steps: true", "max_steps=True must be a whole number"),
        ("mixed_precision: no", "mixed_precision=False must be text; put words in quotes"),
        ("crop_scale: true", "crop_scale=True must be values with commas between"),
    ],
)
def test_words_of_yaml_are_no_numbers(tmp_path, line, message):
    (tmp_path / "recipe.yaml").write_text(f"data_dir: a\n{line}\n")
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(tmp_path / "recipe.yaml")], "")


def test_a_configuration_goes_with_its_data_set(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset_name: a\ndataset_config_name: b\nmax_steps: 5\n")
    for flags, expected in (
        ([], ("a", "b")),
        (["--dataset_name=c"], ("c", None)),
        (["--data_dir=c"], (None, None)),
        (["--dataset_config_name=c"], ("a", "c")),
    ):
        recipe = parse_arguments([str(tmp_path / "recipe.yaml"), *flags], "")
        assert (recipe.dataset_name, recipe.dataset_config_name) == expected


def test_a_recipe_without_a_length_is_refused():
    with pytest.raises(ValueError, match="max_steps, num_train_epochs or num_train_samples"):
        Recipe.from_dict({"data_dir": "photos"})


def test_a_probe_on_the_recipes_own_data_goes_with_them():
    assert parse("can-quickstart", "--data_dir=x").probe_dataset_name is None
    assert parse().probe_dataset_name == "sample_data"
    assert parse("can-quickstart", "--data_dir=x", "--probe_dataset_name=y").probe_dataset_name == "y"


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_steps: 4\n\tdata_dir: x\n", r"line 2: 'data_dir: x'.*replace the tab by spaces"),
        ("data_dir:\tx\n", "line 1: .*replace the tab by spaces"),
        ("max_steps: 4\noutput_dir: out: mine\n", "line 2: .*put the value in quotes, output_dir: 'out: mine'"),
        ("data_files: *.parquet\n", r"line 1: .*put the value in quotes, data_files: '\*.parquet'"),
        ("max_steps: 4\ndata_dir: 'x\nseed: 1\n", "line 2: .*check that what begins with ' ends"),
        ("data_files: [a, b\nmax_steps: 4\n", r"line 1: .*check that what begins with \[ ends"),
        ("- max_steps\n- 4\n", "line 1: this is a list; write `key: value` lines"),
        ("hello\n", "line 1: this is the single value 'hello'"),
        ("", "is empty; write `key: value` lines"),
        ("# nothing\n", "is empty"),
        ("max_steps: 4\nseed: 1\nmax_steps: 5\n", "line 3: .*the key 'max_steps' is given twice; remove one"),
        ("max_steps: 4\n---\nseed: 1\n", "line 2: .*remove the line ---"),
        ("1: 2\n", "the key 1 is not a word"),
        ("max_steps: 4\noutput_dir: caf\udce9\n", "is not UTF-8 text .*save it as UTF-8"),
        ("max_steps: 4\n\0", "is not YAML: unacceptable character #x0000"),
        ("max_steps: 4\ndata_dir: {photos}\n", "data_dir={'photos': None} must be text"),
    ],
)
def test_a_recipe_that_is_no_mapping_is_refused_with_file_line_and_fix(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([str(tmp_path / "mine.yaml"), "--max_steps=4"], "")
    assert "mine.yaml" in str(caught.value) or "must be" in str(caught.value)
