"""The demo: its images and words against the model, odd images, refusals; and the page, in a real browser."""

import io
import json
import re
import shutil
import struct
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gradio.components import Component
from huggingface_hub import metadata_load
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from testing_utils import ROOT, tiny_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from demo.screenshot import chromium, running_app, wait_for_images
from modeling_can.configuration_can import MAE, SIMCLR, num_visible_patches
from modeling_can.data.bad_samples import BadImage
from modeling_can.demo import QUICKSTART, Demo, build, enlarged, main, write_examples
from modeling_can.evaluation.encoders import feature_maps
from modeling_can.plots import principal_components, reconstruct, true_colors


DENOISER = dict(reconstruction_loss_weight=0, denoising_loss_weight=1)


def save(folder: Path, model, **processor) -> str:
    model.save_pretrained(folder)
    ViTImageProcessorPil(**{"size": {"height": 32, "width": 48}, **processor}).save_pretrained(folder)
    return str(folder)


def encoded_image(width: int = 60, height: int = 50, mode: str = "RGB", suffix: str = "PNG", **options) -> bytes:
    """An image without any symmetry."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, suffix, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that claims to be of 65536 x 65536 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 65536, 65536, 8, 2, 0, 0, 0)
    return encoded_image()[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded_image()[33:]


def masked_fraction(shown: np.ndarray) -> float:
    return 1 - (shown[..., 3] == 255).mean()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(
        tmp_path_factory.mktemp("demo") / "can", tiny_model(noise_head="shared")
    )  # predicts some noise untrained


@pytest.fixture(scope="module")
def demo(folder) -> Demo:
    return Demo(folder)


def test_images_and_words_are_those_of_reconstruct(demo):
    shown, words = demo(encoded_image(), 0.5, 0.03, seed=7)
    pixels, generator = demo.pixel_values(encoded_image()), torch.Generator().manual_seed(7)
    noise = torch.randn(1, 3, 32, 48, generator=generator)
    made = reconstruct(demo.model, pixels, 0.03, noise, torch.rand(1, 24, generator=generator))
    for name in ("input", "reconstruction"):
        colors = true_colors(made[name], (0.5,) * 3, (0.5,) * 3)[0].permute(1, 2, 0).numpy()
        small = shown[name][3::7, 3::7]  # 7 x 48 is the first multiple from 320 pixels on
        seen = small[..., 3] == 255
        assert shown[name].shape == (7 * 32, 7 * 48, 4) and seen.any()
        np.testing.assert_allclose(small[seen][:, :3] / 255, colors[seen], atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(seen, ~made[name][0, 0].isnan().numpy())

    hidden = made["input"].isnan()
    error = ((made["reconstruction"] - pixels)[hidden] / 2).square().mean()
    color = torch.stack([pixels[0, c][~hidden[0, c]].mean() for c in range(3)])[:, None, None]
    plain = ((color - pixels)[hidden] / 2).square().mean()
    left = (made["noise"] - made["predicted_noise"])[~hidden].square().mean() / made["noise"][~hidden].square().mean()
    said = [float(number) for number in re.findall(r"(-?\d+\.\d) dB", words)]
    expected = [-10 * error.log10(), -10 * plain.log10(), 10 * (error / plain).log10().abs(), 10 * left.log10().abs()]
    np.testing.assert_allclose(said, expected, atol=0.051)
    assert ("dB better" in words) == bool(error < plain) and ("weaker" in words) == bool(left < 1)


def test_features_are_those_of_the_whole_image(demo):
    pixels = demo.pixel_values(encoded_image())
    tokens, attention = feature_maps(demo.model.can, pixels)
    shown = demo.features(encoded_image())
    colors = principal_components(tokens)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(shown["tokens"][27::54, 27::54, :3] / 255, colors, atol=0.5 / 255 + 1e-6)
    gray = shown["attention"][27::54, 27::54]  # 54 x 6 patches is the first multiple from 320 pixels on
    assert gray.shape == (4, 6, 4) and gray.max(initial=0, where=[True] * 3 + [False]) == 255
    assert gray[..., 0].argmax() == attention.argmax() and gray[..., 0].argmin() == attention.argmin()
    assert demo.model.config._attn_implementation == "sdpa"  # as before


def test_same_seed_same_images_whatever_was_shown_between(demo):
    first, words = demo(encoded_image(), 0.5, 0.05, seed=1)
    other, _ = demo(encoded_image(), 0.5, 0.05, seed=2)
    again, words_again = demo(encoded_image(), 0.5, 0.05, seed=1)
    assert words == words_again
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert (name == "image") == np.array_equal(values, other[name]), name


def test_noise_level_scales_one_pattern_under_one_mask(demo):
    weak, strong = (demo(encoded_image(), 0.5, level, seed=3)[0]["noise"].astype(float) for level in (0.02, 0.04))
    np.testing.assert_array_equal(weak[..., 3], strong[..., 3])
    seen = strong[..., 3] == 255
    weak, strong = weak[seen][:, :3], strong[seen][:, :3]
    inside = (strong > 0) & (strong < 255)
    assert inside.mean() > 0.9 and strong.std() > 20
    np.testing.assert_allclose(2 * (weak - 127.5)[inside], (strong - 127.5)[inside], atol=1.6)


def test_without_noise_none_is_shown(demo):
    shown, words = demo(encoded_image(), 0.5, 0.0, seed=3)
    assert set(np.unique(shown["noise"][..., :3])) == {128} and "**Noise:** none." in words  # mid-gray
    seen = shown["input"][..., 3] == 255
    np.testing.assert_array_equal(shown["input"][seen], shown["image"][seen])


def test_mask_ratio_hides_that_share_and_more_hides_more(demo):
    before = None
    for ratio in (0, 0.25, 0.5, 0.95):
        shown, words = demo(encoded_image(), ratio, 0.05, seed=0)
        for name in ("input", "noise", "predicted_noise"):
            assert masked_fraction(shown[name]) == pytest.approx(1 - num_visible_patches(24, ratio) / 24)
        assert masked_fraction(shown["image"]) == masked_fraction(shown["reconstruction"]) == 0
        assert ("**Masked patches:** none." in words) == (ratio == 0)
        hidden = shown["input"][..., 3] == 0
        assert before is None or (hidden >= before).all()
        before = hidden


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm_pix_loss": True}, "its mean and contrast are the true ones"),
        ({**MAE, "norm_pix_loss": True}, "not trained to predict it"),
        (DENOISER, "not trained to fill them in"),
        ({"num_channels": 1}, "below the full range"),
        ({"mask_ratio": 0.97}, "below the full range"),
    ],
    ids=["norm_pix_loss", "mae", "denoiser", "grayscale", "one patch"],
)
def test_every_kind_of_model_is_shown(changes, said, tmp_path):
    gray = {"image_mean": [0.4], "image_std": [0.2]} if "num_channels" in changes else {}
    demo = Demo(save(tmp_path, tiny_model(**changes), **gray))
    shown, words = demo(encoded_image(), 0.5, demo.config.noise_std_max, seed=0)
    assert said in words and "nan" not in words and "inf" not in words
    assert all(values.shape == (224, 336, 4) and values.dtype == np.uint8 for values in shown.values())
    assert not gray or all((values[..., 0] == values[..., 2]).all() for values in shown.values())
    features = demo.features(encoded_image())
    assert all(values.shape == (216, 324, 4) and values.dtype == np.uint8 for values in features.values())
    page = build(demo, write_examples(tmp_path))
    blocks = {block.elem_id: block for block in page.blocks.values() if isinstance(block, Component)}
    assert blocks["noise_level"].visible == blocks["noise"].visible == (demo.config.noise_std_max > 0)
    assert blocks["predicted_noise"].visible == (demo.config.denoising_loss_weight > 0)
    for name, value in (("mask_ratio", demo.config.mask_ratio), ("noise_level", demo.config.noise_std_max)):
        assert blocks[name].preprocess(blocks[name].value) == value  # gradio refuses what is out of a slider's range


def test_odd_images_are_shown_as_what_they_are(demo):
    plain = demo(encoded_image(), 0.5, 0.05, 0)[0]["image"]
    np.testing.assert_array_equal(demo(encoded_image(mode="RGBA"), 0.5, 0.05, 0)[0]["image"], plain)
    palette = demo(encoded_image(mode="P"), 0.5, 0.05, 0)[0]["image"].astype(float)
    assert np.abs(palette - plain).mean() < 25
    turned = Image.open(io.BytesIO(encoded_image())).transpose(Image.Transpose.ROTATE_90)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(demo(buffer.getvalue(), 0.5, 0.05, 0)[0]["image"], plain)
    for size in ((8, 8), (8, 1500), (1200, 900)):
        shown, words = demo(encoded_image(*size), 0.5, 0.05, 0)
        assert shown["reconstruction"].shape == (224, 336, 4) and "dB" in words


@pytest.mark.parametrize(
    "encoded, said",
    [
        (b"just words", "no image in its 10 bytes: text, 'just words'"),
        (encoded_image(3, 20), "20 x 3 pixels, less than 8 x 8"),
        (encoded_image()[:200], "[A-Z].*: .+"),
        (bomb(), "exceeds limit of 178956970 pixels; cut it into smaller images"),
    ],
    ids=["text", "tiny", "cut off", "bomb"],
)
def test_what_is_no_image_is_told_in_words(demo, encoded, said):
    with pytest.raises(BadImage, match=said):
        demo(encoded, 0.5, 0.05, 0)


def test_a_model_that_cannot_be_shown_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="trained to reconstruct or to denoise, and this is one that was not"):
        Demo(save(tmp_path / "simclr", tiny_model(**SIMCLR)))
    vit = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    with pytest.raises(ValueError):
        Demo(save(tmp_path / "vit", ViTForImageClassification(vit)))
    shutil.copytree(folder, tmp_path / "misfit")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "misfit")
    with pytest.raises(ValueError, match=r"images of \(24, 24\) and the model takes \(32, 48\)"):
        Demo(str(tmp_path / "misfit"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL_NAME_OR_PATH", raising=False)
    with pytest.raises(
        ValueError, match=f"{QUICKSTART}: no finished run is there yet.*run `modeling-can pretrain` first"
    ):
        main([])
    with pytest.raises(ValueError, match="no folder, and no model that the Hub gives"):
        main(["--model_name_or_path", "out/none"])


def test_enlarging_repeats_pixels():
    values = torch.rand(1, 1, 3, 200)
    big = enlarged(values, torch.ones_like(values))
    assert big.shape == (6, 400, 4)
    np.testing.assert_array_equal(big[::2, ::2, 1], (255 * values[0, 0]).round().numpy())
    np.testing.assert_array_equal(big[::2], big[1::2])
    assert enlarged(torch.rand(1, 3, 400, 300), torch.ones(1, 3, 400, 300)).shape == (400, 300, 4)


def test_the_space_names_the_version_that_is_tested_and_its_model():
    card = metadata_load(ROOT / "demo" / "README.md")
    assert f"gradio=={card['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    (model,) = card["models"]
    validate_repo_id(model)
    assert (ROOT / "model_cards" / model.removeprefix("OWNER/") / "model.safetensors").is_file()
    assert card["sdk"] == "gradio" and (ROOT / "demo" / card["app_file"]).is_file()


# --- In a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)
def test_the_page_in_a_browser(folder, demo, tmp_path, monkeypatch):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    examples = write_examples(tmp_path)
    tiles = [Path(path).read_bytes() for path, _ in examples]
    (tmp_path / "mine.png").write_bytes(encoded_image())
    (tmp_path / "words.png").write_text("just words")
    with running_app(folder) as address, chromium(1280, 800) as browser:

        def find(selector):
            return browser.find_element(By.CSS_SELECTOR, selector)

        def sources():
            images = "[...document.querySelectorAll('.image-shown')].map(x => [x.id, x.querySelector('img')?.src])"
            return dict(browser.execute_script(f"return {images}"))

        def fits(encoded, mask_ratio, noise_level, seed):
            """Whether the page shows what the model makes of this."""
            shown, words = demo(encoded, mask_ratio, noise_level, seed)
            shown |= demo.features(encoded)
            for name, source in sources().items():
                with urllib.request.urlopen(source) as answer:
                    pixels = np.asarray(Image.open(answer).convert("RGBA")).astype(int)
                if pixels.shape != shown[name].shape or np.abs(pixels - shown[name]).max() > 1:
                    return False
            plain = words.replace("*", "").split("\n\n")
            return all(line in find("#words").text for line in plain)

        def expect(*arguments):
            WebDriverWait(browser, 20, ignored_exceptions=[Exception]).until(lambda _: fits(*arguments))
            return sources()

        def changed(before, after):
            return {name for name in before if before[name] != after[name]}

        browser.get(address)
        WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".image-shown"))
        wait_for_images(browser)
        everything = {"image", "input", "reconstruction", "noise", "predicted_noise"}
        shown = expect(tiles[0], 0.5, 0.05, 0)
        assert set(shown) == everything | {"tokens", "attention"}

        browser.find_elements(By.CSS_SELECTOR, "#examples button.thumbnail-item")[2].click()
        last, shown = shown, expect(tiles[2], 0.5, 0.05, 0)
        assert {"image", "input", "reconstruction", "predicted_noise"} <= changed(last, shown)

        find("input[type=file]").send_keys(str(tmp_path / "mine.png"))
        last, shown = shown, expect(encoded_image(), 0.5, 0.05, 0)
        assert {"image", "tokens", "attention"} <= changed(last, shown)

        find("#mask_ratio input[type=range]").send_keys(Keys.ARROW_LEFT * 5)
        last, shown = shown, expect(encoded_image(), 0.25, 0.05, 0)
        assert changed(last, shown) == everything - {"image"}

        find("#noise_level input[type=range]").send_keys(Keys.ARROW_LEFT * 10)
        last, shown = shown, expect(encoded_image(), 0.25, 0.04, 0)
        assert changed(last, shown) == everything - {"image"}

        find("#again").click()
        last, shown = shown, expect(encoded_image(), 0.25, 0.04, 1)
        assert changed(last, shown) == everything - {"image"}

        # A file that is no image: told in words, and the page goes on with the image that was there.
        find("input[type=file]").send_keys(str(tmp_path / "words.png"))
        toast = WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".toast-body"))
        assert "This file cannot be used: no image in its 10 bytes: text, 'just words'." in toast[0].text
        assert sources() == shown
        find("#again").click()
        expect(encoded_image(), 0.25, 0.04, 2)

        # A narrow screen: nothing sticks out to the right.
        size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        WebDriverWait(browser, 20).until(
            lambda _: browser.execute_script("return document.documentElement.scrollWidth <= 390")
        )

        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not severe, severe
        sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = [entry["params"]["request"]["url"] for entry in sent if entry["method"] == "Network.requestWillBeSent"]
        away = [url for url in urls if urllib.parse.urlsplit(url).scheme not in ("data", "blob")
                and urllib.parse.urlsplit(url).hostname != "127.0.0.1"]  # fmt: skip
        assert len(urls) > 20 and not away, away
