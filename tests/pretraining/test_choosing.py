"""What is chosen where no recipe is named: the table, and a run of it."""

import json

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from PIL import Image
from testing_utils import encoded, identity, image_file, noise_file, read, tiny_model

import modeling_can
from modeling_can.data import ImageSource, ViewStream
from modeling_can.pretraining.batch_size import largest_step, largest_that_fits, measured_batch_size
from modeling_can.pretraining.choosing import Images, Machine, check_open, choices, choose, filled, look_at
from modeling_can.pretraining.recipe import make_recipe


CPU, GPU = Machine("cpu", num_cores=8), Machine("cuda", num_cores=16, memory=80)
SMALL_GPU = Machine("cuda", num_cores=2, memory=6)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
         "log_with": "none"}  # fmt: skip
SHOWN = ("hidden_size", "num_hidden_layers", "decoder_hidden_size", "image_size", "patch_size",
         "per_device_train_batch_size", "base_learning_rate", "num_train_epochs",
         "dataloader_num_workers")  # fmt: skip


def chosen(images: Images, machine: Machine, **given) -> dict:
    return {name: value for choice in choices(images, machine, given) for name, value in choice.values.items()}


@pytest.mark.parametrize(
    ("images", "machine", "expected"),
    [
        (Images(200, 400, False), CPU, (128, 4, 64, 64, 8, 32, 2e-3, 400.0, 2)),
        (Images(1000, 400, False), CPU, (128, 4, 64, 64, 8, 128, 2e-3, 400.0, 2)),
        (Images(50_000, 32, False), CPU, (128, 4, 64, 32, 4, 256, 2e-3, 20.0, 2)),
        (Images(5_000_000, 50, False), CPU, (128, 4, 64, 32, 4, 256, 2e-3, 0.2, 2)),
        (Images(1000, 400, False), GPU, (192, 12, 192, 224, 16, "auto", 5e-4, 800.0, 8)),
        (Images(50_000, 32, False), GPU, (192, 12, 192, 32, 4, "auto", 5e-4, 100.0, 8)),
        (Images(300_000, 150, False), GPU, (384, 12, 256, 128, 8, "auto", 5e-4, 100.0, 8)),
        (Images(1_300_000, 400, False), GPU, (768, 12, 512, 224, 16, "auto", 2.5e-4, 100.0, 8)),
        (Images(1_300_000, 400, False), SMALL_GPU, (192, 12, 192, 224, 16, "auto", 5e-4, 100.0, 1)),
    ],
)  # fmt: skip
def test_the_table_of_choices(images, machine, expected):
    found = chosen(images, machine)
    assert tuple(found[name] for name in SHOWN) == expected


def test_a_source_of_unknown_length_gets_a_number_of_images_to_see():
    assert chosen(Images(None, 224, False), CPU)["num_train_samples"] == 2_000_000
    assert "num_train_epochs" not in chosen(Images(None, 224, False), GPU)


@pytest.mark.parametrize("machine", [CPU, GPU, Machine("cuda", 8, 8, 80)])
@pytest.mark.parametrize("number", [1, 30, 999, 70_000, 10**8, None])
@pytest.mark.parametrize("side", [8, 40, 64, 100, 300])
def test_every_choice_is_a_valid_recipe(number, side, machine):
    recipe = make_recipe(None, {"data_dir": "photos"})
    for is_gray in (True, False):
        made = filled(recipe, choices(Images(number, side, is_gray), machine, recipe.given), "why")
        assert made.data_dir == "photos" and made.output_dir == "out/photos" and made.given is None
        assert made.to_yaml().startswith("# why\n") and made.length
        assert type(made).from_dict(yaml.safe_load(made.to_yaml())).to_dict() == made.to_dict()


@pytest.mark.parametrize("side, is_enlarged", [(6, True), (31, True), (32, False)])
def test_images_below_the_smallest_size_are_said_to_be_enlarged(side, is_enlarged):
    found = choices(Images(1000, side, False), CPU, {})
    (reason,) = [choice.reason for choice in found if "image_size" in choice.values]
    expected = f"the smallest size; the images have {side} pixels on their shorter side and are enlarged"
    assert (reason == expected) == is_enlarged and ("half of the images" in reason) != is_enlarged


def test_what_the_user_sets_stays_and_the_rest_follows_it():
    given = {"data_dir": "x", "image_size": "96", "max_steps": "10", "mask_ratio": "0.6", "hidden_size": "64"}
    recipe = make_recipe(None, given)
    made = filled(recipe, choices(Images(5000, 400, False), GPU, recipe.given))
    config = made.config
    assert (config.image_size, config.patch_size, config.mask_ratio) == (96, 8, 0.6)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 2, 256)
    assert made.max_steps == 10 and made.num_train_epochs is None
    text = " ".join(made.chosen)
    assert "image_size" not in text and "epochs" not in text and "patch_size 8" in text  # only what was chosen


def test_the_learning_rate_is_that_of_the_encoder_and_the_batch_that_of_a_step():
    images = Images(5000, 400, False)
    assert chosen(images, CPU, hidden_size=768)["base_learning_rate"] == 2.5e-4
    assert chosen(images, GPU, hidden_size=128)["base_learning_rate"] == 2e-3
    assert chosen(images, CPU, gradient_accumulation_steps=8)["per_device_train_batch_size"] == 32
    assert chosen(images, Machine("cpu", 4))["per_device_train_batch_size"] == 64
    recipe = make_recipe("can-quickstart", {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 4})
    assert measured_batch_size(recipe, Accelerator(cpu=True), 5000) == 64


def test_gray_images_keep_three_channels_and_get_their_own_normalization():
    found = chosen(Images(100, 64, True), CPU)
    assert found["measure_mean_std"] is True and found["color_jitter"][2:] == (0, 0)
    assert "num_channels" not in found
    assert "measure_mean_std" not in chosen(Images(100, 64, True), CPU, image_mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("arrays", [{"num_channels": 1}, {"num_channels": 4}, {"pixel_range": (0, 4095)}])
def test_images_other_than_rgb_of_8_bits_get_their_own_normalization(arrays):
    images = Images(100, 64, False)
    assert chosen(images, CPU, **arrays)["measure_mean_std"] is True
    mean = (0.5,) * arrays.get("num_channels", 3)
    assert "measure_mean_std" not in chosen(images, CPU, image_mean=mean, **arrays)
    assert "measure_mean_std" not in chosen(images, CPU, num_channels=3)


def test_weights_to_start_from_decide_the_encoder(tmp_path):
    tiny_model().can.save_pretrained(tmp_path)
    found = chosen(Images(1000, 400, False), GPU, model_name_or_path=str(tmp_path))
    assert (found["hidden_size"], found["num_hidden_layers"], found["image_size"]) == (32, 2, (32, 48))


def test_images_are_looked_at(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(noise_file(number, size=(70, 50)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert look_at(ImageSource(data_dir=str(tmp_path))) == Images(21, 50, False)
    gray = [{"bytes": image_file(Image.effect_noise((80, 90), 60), "JPEG"), "path": None} for _ in range(3)]
    assert look_at(ImageSource(dataset=Dataset.from_dict({"image": gray}))) == Images(3, 80, True)


def test_nothing_is_chosen_for_images_of_which_none_can_be_read(tmp_path, capfd):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.zeros((5, 40, 40), np.uint16))
    message = (
        r"none of the first 3 images can be read\. .*\d\.npy: 5 channels .*; the model takes 4; set num_channels to"
    )
    with pytest.raises(ValueError, match=message):
        modeling_can.pretrain(data_dir=str(tmp_path), num_channels=4, output_dir=str(tmp_path / "out"), max_steps=1)
    assert "median" not in capfd.readouterr().out
    pages = Image.fromarray(np.zeros((40, 40), np.uint16))
    for number in range(3):
        (tmp_path / f"{number}.npy").unlink()
        pages.save(tmp_path / f"{number}.tif", save_all=True, append_images=[pages] * 4)
    with pytest.raises(
        ValueError, match=r"\d\.tif: a TIFF of 5 pages, of which 1 would be read; set num_channels to 5"
    ):
        look_at(ImageSource(data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("dtype", "largest", "given", "is_told"),
    [
        ("uint16", 4000, {}, True),
        ("uint16", 4000, {"pixel_range": [0, 4095]}, False),
        ("uint16", 9000, {}, False),
        ("uint8", 20, {}, False),
    ],
)
def test_a_run_tells_that_the_images_use_little_of_their_range(dtype, largest, given, is_told, tmp_path, capfd):
    pixels = np.random.default_rng(0).integers(0, largest, (4, 4, 40, 40))
    pixels[2, 1, 20, 7] = largest
    for number, image in enumerate(pixels):
        np.save(tmp_path / f"{number}.npy", image.astype(dtype))
    recipe = make_recipe(None, {"data_dir": str(tmp_path), "num_channels": 4, **given})
    choose(recipe, ImageSource(data_dir=str(tmp_path), arrays=True), Accelerator(cpu=True))
    line = "the largest value seen is 4000 of 65535: set --pixel_range 0,4095 if that is the range"
    assert (line in capfd.readouterr().out) == is_told


@pytest.mark.parametrize(
    ("largest", "given", "is_told"),
    [(4000, {}, True), (4000, {"high_bit_depth": "stretch"}, False), (9000, {}, False)],
)
@pytest.mark.parametrize("recipe", [None, "can-quickstart"])
def test_dark_16_bit_images_are_told_with_and_without_a_recipe(recipe, largest, given, is_told, tmp_path, capfd):
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, largest + 1, (40, 40)).astype(np.uint16)
        pixels[20, 7] = largest
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    settings = {**SMALL, "data_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), "max_steps": 1, **given}
    settings |= {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "dataloader_num_workers": 0}
    modeling_can.pretrain(recipe, **settings, per_device_train_batch_size=4)
    line = (
        "the largest value seen is 4000 of 65535, which is dark in 8 bits: set --num_channels 1 --pixel_range 0,4095"
    )
    assert (line in capfd.readouterr().out) == is_told


@pytest.mark.parametrize("kind", ["folder", "parquet", "generator"])
def test_looking_takes_nothing_away_from_training(tmp_path, kind):
    """The order of the images is that of a source at which nobody looked."""
    files = [noise_file(number) for number in range(70)]
    if kind == "folder":
        for number, file in enumerate(files):
            (tmp_path / f"{number}.png").write_bytes(file)
    rows = Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files]})
    if kind == "parquet":
        rows.to_parquet(tmp_path / "0.parquet")
    stream = IterableDataset.from_generator(lambda: iter(rows))

    def order(is_looked_at: bool) -> list[int]:
        given = {"folder": {"data_dir": str(tmp_path)}, "parquet": {"data_files": str(tmp_path / "*.parquet")},
                 "generator": {"dataset": stream}}[kind]  # fmt: skip
        source = ImageSource(**given)
        if is_looked_at:
            look_at(source)
        return read(ViewStream(source, identity, block_size=16), 140)

    assert order(True) == order(False) and len(set(order(True))) == 70


# --- Batch size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 100, 128, 10_000])
def test_the_largest_power_of_two_that_fits(capacity):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= capacity

    assert largest_that_fits(fits, 512) == max(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= capacity)
    assert max(asked) <= 512 and sorted(set(asked)) == asked  # each once; none after the first that does not fit


def test_nothing_fits():
    with pytest.raises(ValueError, match="auto: not even one image fits.*gradient_checkpointing"):
        largest_that_fits(lambda size: False, 64)


def test_an_epoch_has_at_least_four_steps():
    assert largest_step(999, "cpu") == 128 and largest_step(10**9, "cpu") == 256 and largest_step(3, "cuda") == 16
    assert largest_step(10**9, "cuda") == 1024
    recipe = make_recipe("can-quickstart", {"per_device_train_batch_size": "auto"})
    assert measured_batch_size(recipe, Accelerator(cpu=True), 999) == 128  # a CPU has nothing to measure


def test_a_batch_size_is_a_number_or_auto():
    with pytest.raises(ValueError, match="per_device_train_batch_size='many' is neither a number nor auto"):
        make_recipe("can-quickstart", {"per_device_train_batch_size": "many"})


# --- A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(40):
        (tmp_path / "photos" / f"{number}.png").write_bytes(noise_file(number, size=(70, 50)))
    return tmp_path


def test_a_run_tells_what_it_chose_and_goes_on_with_it(folder, capfd):
    settings = {**SMALL, "data_dir": str(folder / "photos"), "output_dir": str(folder / "out")}
    results = modeling_can.pretrain(**settings, max_steps=2)
    told = capfd.readouterr().out
    assert "no recipe is named; chosen for 40 images, 50 pixels" in told and "image_size 32, patch_size 4:" in told
    assert "this takes about" in told
    assert "on a GPU the same command trains hidden_size 32, num_hidden_layers 1, image_size 32, max_steps 2" in told
    text = (folder / "out" / "recipe.yaml").read_text()
    assert text.startswith("# no recipe is named; chosen for 40 images") and "# image_size 32, patch_size 4" in text
    assert results["num_steps"] == 2 and results["global_batch_size"] == 16
    again = modeling_can.pretrain(**settings, max_steps=2, resume_from_checkpoint="latest")
    assert again == json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, "auto"])
def test_a_run_that_goes_on_keeps_what_was_chosen(folder, batch_size):
    """Also where there are more and larger images by now, for which a new run chooses otherwise."""
    out = folder / "out"
    settings = {**SMALL, "data_dir": str(folder / "photos"), "save_steps": 1}
    settings |= {"per_device_train_batch_size": batch_size} if batch_size else {}
    modeling_can.pretrain(**settings, output_dir=str(out), max_steps=2)
    for number in range(40, 200):
        (folder / "photos" / f"{number}.png").write_bytes(noise_file(number, size=(170, 170)))
    longer = modeling_can.pretrain(**settings, output_dir=str(out), max_steps=3, resume_from_checkpoint="latest")
    assert longer["num_steps"] == 3 and longer["global_batch_size"] == 16
    text = (out / "recipe.yaml").read_text()
    assert text.startswith("# no recipe is named; chosen for 40 images") and "image_size: 32\n" in text
    checkpoint = {"resume_from_checkpoint": str(out / "checkpoints" / "step-2")}
    branch = modeling_can.pretrain(**settings, output_dir=str(folder / "branch"), max_steps=3, **checkpoint)
    assert branch["global_batch_size"] == 16
    new = modeling_can.pretrain(**settings, output_dir=str(out), max_steps=1, overwrite_output_dir=True)
    assert new["global_batch_size"] == 32 and "image_size: 64\n" in (out / "recipe.yaml").read_text()


def test_a_run_that_goes_on_keeps_its_normalization(folder, capfd):
    out, settings = folder / "out", {**SMALL, "data_dir": str(folder / "photos"), "measure_mean_std": True}
    modeling_can.pretrain(**settings, output_dir=str(out), max_steps=2, save_steps=1)
    measured = yaml.safe_load((out / "recipe.yaml").read_text())
    for number in range(40):
        (folder / "photos" / f"dark-{number}.png").write_bytes(encoded((10, 20, 30 + number), size=(70, 50)))
    modeling_can.pretrain(**settings, output_dir=str(out), max_steps=3, resume_from_checkpoint="latest")
    after = yaml.safe_load((out / "recipe.yaml").read_text())
    assert [after[name] == measured[name] for name in ("image_mean", "image_std")] == [True, True]
    told = capfd.readouterr().out
    assert told.count("measuring mean") == 1 and f"image_mean and image_std stay those of {out}/recipe.yaml" in told


def test_what_a_checkpoint_is_not_yet_there_for_is_chosen_anew(folder):
    (folder / "out").mkdir()
    (folder / "out" / "recipe.yaml").write_text("max_steps: 3\ndata_dir: other\n")  # of a run that saved nothing
    given = {"data_dir": "photos", "output_dir": str(folder / "out"), "resume_from_checkpoint": "latest"}
    assert make_recipe(None, given).given is not None


def test_folders_of_one_name_do_not_share_a_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("a/train", "b/train", "out/train"):
        (folder / name).mkdir(parents=True)
    (folder / "out" / "train" / "recipe.yaml").write_text("max_steps: 3\ndata_dir: a/train\n")
    (folder / "out" / "train" / "results.json").write_text("{}")
    assert make_recipe(None, {"data_dir": "a/train"}).max_steps == 3
    with pytest.raises(ValueError, match="holds a run on a/train, not on b/train; give another --output_dir"):
        make_recipe(None, {"data_dir": "b/train"})
    monkeypatch.chdir(folder / "a" / "train")
    assert make_recipe(None, {"data_dir": "../.."}).output_dir == f"out/{folder.name}"


def test_wrong_settings_are_refused_before_the_images_are_read():
    with pytest.raises(ValueError, match="mask_ratio"):
        modeling_can.pretrain(data_dir="there/is/none", mask_ratio=2)
    with pytest.raises(ValueError, match="there/is/none is not a folder"):
        modeling_can.pretrain(data_dir="there/is/none")


@pytest.mark.parametrize(
    "given",
    [{"num_attention_heads": 12}, {"patch_size": 14}, {"num_channels": 1}, {"decoder_num_attention_heads": 12}],
)
def test_what_some_machine_could_do_is_not_refused_beforehand(given):
    check_open(make_recipe(None, {"data_dir": "photos", **given}))


def test_no_files_are_no_source():
    assert make_recipe(None, {"data_files": []}).given is None


def test_the_bundled_images_are_the_quickstarts():
    assert make_recipe(None, {"dataset_name": "sample_data"}).given is None
    assert make_recipe(None, {"max_steps": 3}).config.hidden_size == 96
    assert make_recipe(None, {}, has_dataset=True).output_dir == "out/mine"
