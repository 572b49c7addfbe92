"""
The page of `modeling-can demo`: what a pre-trained CAN sees, fills in, takes for noise and tells apart. Nothing is
sent anywhere.
"""

import argparse
import functools
import math
import os
import tempfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import torch
from transformers import AutoModelForPreTraining

from .data.bad_samples import BadImage
from .data.decoding import decode
from .evaluation.encoders import feature_maps, load_config, load_model
from .evaluation.preprocessors import load_preprocessor
from .evaluation.sets import load_split
from .plots import amplified_noise, errors_of, feature_columns, reconstruct, true_colors
from .progress import INSTALL, tell


__all__ = ["QUICKSTART", "Demo", "build", "enlarged", "main", "write_examples"]

QUICKSTART = "out/can-quickstart"
_SHOWN = 320  # pixels of the longer side of an image, at least
# Test tiles, which the quickstart did not train on: photograph -> which of its 60.
_EXAMPLES = {"chelsea": 48, "astronaut": 48, "coffee": 18, "rocket": 24, "retina": 15, "brick": 12}
_HELP = """
## What a CAN sees, fills in and takes for noise
Some patches of the image are masked (hatched), the rest gets a little noise. From that alone the model fills in
what is masked, and says what of the rest is noise.
"""
_NOTES = """
On visible patches the reconstruction is the input less the predicted noise. In the noise images gray is none; they
are amplified, so that the largest noise of training fills their range.
"""
_FEATURE_NOTES = """
5 and 6 are of the whole image, without noise. 5: similar colors are similar features (the first three principal
components of the patch tokens in this image). 6: where the class token looks in the last layer, the mean over the
heads; white is most.
"""
_CSS = """
.gradio-container { max-width: 1280px !important; padding-top: 0.5rem !important; }
.above label[data-testid="block-label"] { position: static; border: none; box-shadow: none; width: 100%; }
.image-shown img { width: 100%; height: auto; image-rendering: pixelated;
  background: repeating-linear-gradient(45deg, #8884 0 6px, #8882 6px 12px); }
#examples img { image-rendering: pixelated; }
#examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); padding: 0; }
#examples .thumbnail-item { min-width: 0; height: auto; aspect-ratio: 1; }
#again { white-space: pre-line; }
#examples .caption-label { font-size: 0.7rem; padding: 0 0.3rem; }
"""


class Demo:
    """
    A model, and what is shown of it.

    Args:
        name (`str`): A folder or Hub id of a CAN that was trained to reconstruct or to denoise.

    Raises:
        ValueError: if it cannot be loaded, has no decoder that was trained, or a processor that does not fit.
    """

    def __init__(self, name: str):
        if name == QUICKSTART and not Path(name, "config.json").exists():
            raise ValueError(
                f"model_name_or_path={name}: no finished run is there yet; run `modeling-can pretrain` first, "
                "which makes it in a few minutes, or name another model: --model_name_or_path FOLDER_OR_HUB_ID"
            )
        self.config = load_config(name)
        if self.config.model_type != "can" or not self.config.uses_decoder:
            kind = "one that was not" if self.config.model_type == "can" else f"a {self.config.model_type}"
            raise ValueError(
                f"model_name_or_path={name}: the demo needs a CAN that was trained to reconstruct or to denoise, and "
                f"this is {kind}; train one with reconstruction_loss_weight or denoising_loss_weight above 0"
            )
        self.model = load_model(name, AutoModelForPreTraining)
        self.preprocessor = load_preprocessor(name)
        if self.preprocessor.reads_arrays:
            raise ValueError(
                f"model_name_or_path={name}: the demo shows RGB and gray images, and this model takes arrays of "
                f"{self.preprocessor.num_channels} channels; its run draws figures/reconstructions.png"
            )
        if not self.preprocessor.in_two_steps:
            raise ValueError(
                f"model_name_or_path={name}: its processor does more than resize, crop, rescale and normalize, which "
                "the demo cannot take back; fix preprocessor_config.json"
            )
        if self.preprocessor.image_size != self.config.image_shape:
            raise ValueError(
                f"model_name_or_path={name}: its processor makes images of {self.preprocessor.image_size} and the "
                f"model takes {self.config.image_shape}; fix preprocessor_config.json"
            )
        self.pixel_values = functools.lru_cache(maxsize=8)(self.pixel_values)  # sliders move, the image stays

    def pixel_values(self, encoded: bytes) -> torch.Tensor:
        """A file -> `(1, C, H, W)`, normalized; raises BadImage where that is impossible."""
        options = {"min_size": self.config.patch_shape, **self.preprocessor.decoding}
        pixels = decode(encoded, self.config.num_channels, **options)
        return self.preprocessor.normalize(self.preprocessor(pixels)[None])

    def __call__(
        self, encoded: bytes, mask_ratio: float, noise_level: float, seed: int
    ) -> tuple[dict[str, np.ndarray], str]:
        """
        Args:
            encoded (`bytes`): An image, as a file.
            mask_ratio (`float`): Fraction of the patches to mask, in [0, 1).
            noise_level (`float`): sigma, in [0, noise_std_max].
            seed (`int`): Of noise and mask, which depend on nothing else.

        Returns:
            RGBA images (uint8, masked patches transparent) of what the model gets, of `input`, `reconstruction`,
            `noise` and `predicted_noise`; and the errors in words.
        """
        pixels, generator = self.pixel_values(encoded), torch.Generator().manual_seed(seed)
        noise = torch.randn(pixels.shape, generator=generator)
        scores = torch.rand(1, self.config.num_patches, generator=generator)
        made = reconstruct(
            model=self.model,
            pixel_values=pixels,
            noise_level=noise_level,
            pixel_noise=noise,
            masking_scores=scores,
            mask_ratio=mask_ratio,
        )
        mean, std = self.preprocessor.processor.image_mean, self.preprocessor.processor.image_std
        shown = {
            name: enlarged(
                amplified_noise(values, self.config.noise_std_max) if "noise" in name
                else true_colors(values, mean, std), ~values.isnan()
            )
            for name, values in {"image": pixels, **made}.items()
        }  # fmt: skip
        return shown, self.words(errors_of(made, pixels, std, self.config), noise_level)

    def features(self, encoded: bytes) -> dict[str, np.ndarray]:
        """RGBA images of the whole image's `tokens` and of the class token's `attention`, a square for each patch."""
        columns = feature_columns(*feature_maps(self.model.can, self.pixel_values(encoded)))
        return {
            name: enlarged(column, torch.ones_like(column))
            for name, column in zip(("tokens", "attention"), columns.values(), strict=True)
        }

    def words(self, errors: dict[str, torch.Tensor], noise_level: float) -> str:
        errors, lines = {name: error.item() for name, error in errors.items()}, []
        if "masked" not in errors:
            lines.append("**Masked patches:** this model was not trained to fill them in.")
        elif math.isnan(errors["masked"]):
            lines.append("**Masked patches:** none.")
        else:
            guess = "the mean color of the visible patches"
            if self.config.norm_pix_loss:
                guess = "the patch's own true mean"
            ours, plain = _decibels(1, errors["masked"]), _decibels(1, errors["plain"])
            lines.append(
                f"**Masked patches:** the error is {ours:.1f} dB below the full range. A plain guess, {guess}, is "
                f"{plain:.1f} dB below it: the model is {abs(ours - plain):.1f} dB "
                f"{'better' if ours > plain else 'worse'}."
            )
            if self.config.norm_pix_loss:
                lines.append("This model learned the pattern of a patch; its mean and contrast are the true ones.")
        if "noise" not in errors:
            lines.append("**Noise:** this model was not trained to predict it.")
        elif noise_level == 0:
            lines.append("**Noise:** none.")
        else:
            change = _decibels(errors["noise"], errors["residual"])
            lines.append(
                f"**Noise:** taking away what the model predicts makes it {abs(change):.1f} dB "
                f"{'weaker' if change > 0 else 'stronger; predicting none would be better'}."
            )
        return "\n\n".join(lines)


def _decibels(signal: float, error: float) -> float:
    return 10 * math.log10(signal / max(error, 1e-20))


def enlarged(image: torch.Tensor, visible: torch.Tensor) -> np.ndarray:
    """Values in [0, 1] and where they count, `(1, C, H, W)` both -> RGBA, enlarged by nearest neighbors."""
    rgba = torch.cat([image.expand(-1, 3, -1, -1), visible[:, :1].float()], dim=1)[0]
    scale = math.ceil(_SHOWN / max(rgba.shape[-2:]))
    rgba = rgba.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    return (255 * rgba).round().byte().permute(1, 2, 0).numpy()


def write_examples(folder: Path) -> list[tuple[str, str]]:
    """Writes the tiles of _EXAMPLES as files; returns (path, photograph) of each."""
    tiles, names = load_split("sample_data", split="test")
    examples = []
    for name, number in _EXAMPLES.items():
        row = np.flatnonzero(tiles.labels == names.index(name))[number]
        path = folder / f"{name}.jpg"
        path.write_bytes(tiles.read(row))
        examples.append((str(path), name))
    return examples


def build(demo: Demo, examples: list[tuple[str, str]]):
    """The page, a `gradio.Blocks`."""
    gr, config = _gradio(), demo.config
    sigma_max = config.noise_std_max
    titles = {
        "image": "Image, as the model gets it",
        "input": "1. What the encoder sees",
        "reconstruction": "2. Reconstruction",
        "noise": "3. Noise in it, amplified",
        "predicted_noise": "4. Predicted noise, amplified",
    }
    feature_titles = {"tokens": "5. Patch tokens as colors", "attention": "6. Attention of the class token"}
    visible = {"noise": sigma_max > 0, "predicted_noise": config.denoising_loss_weight > 0}

    def show(encoded, mask_ratio, noise_level, seed):
        seed = seed or 0  # of a field that is empty, while a number is typed
        if not 0 <= seed < 2**32:
            raise gr.Error(f"The seed is {seed}; give a whole number from 0 to {2**32 - 1}.", print_exception=False)
        images, words = demo(encoded, mask_ratio, noise_level, seed)
        return [images[name] for name in titles] + [words]

    def show_features(encoded):
        return list(demo.features(encoded).values())

    def usable(encoded):  # else the image that was there stays
        try:
            demo.pixel_values(encoded)
        except BadImage as error:
            raise gr.Error(f"This file cannot be used: {error}.", print_exception=False) from error
        return encoded

    def example(event: gr.SelectData):
        return Path(examples[event.index][0]).read_bytes()

    # Images of visitors are deleted after a day.
    with gr.Blocks(title="CAN", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(_HELP)
        encoded = gr.State(Path(examples[0][0]).read_bytes())
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.UploadButton("Upload an image", type="binary", file_types=["image"], elem_id="upload")
                gallery = gr.Gallery(
                    examples, label="Examples", allow_preview=False, interactive=False, buttons=[], object_fit="cover",
                    height=246, elem_id="examples", elem_classes="above",
                )  # fmt: skip
                with gr.Group():
                    mask_ratio = gr.Slider(
                        0, max(0.95, config.mask_ratio), config.mask_ratio, step=0.05, label="Mask ratio",
                        elem_id="mask_ratio", info=f"of the {config.num_patches} patches",
                    )  # fmt: skip
                    noise_level = gr.Slider(
                        0, sigma_max or 1, sigma_max, step=(sigma_max or 1) / 50, label="Noise level",
                        info=f"in training 0 to {sigma_max:g}", visible=sigma_max > 0, elem_id="noise_level",
                    )  # fmt: skip
                    with gr.Row(equal_height=True):
                        seed = gr.Number(0, label="Seed", precision=0, min_width=90, elem_id="seed")
                        again = gr.Button("New mask\nand noise", size="sm", min_width=130, elem_id="again")
            with gr.Column(scale=3, min_width=280):

                def image(name, label):
                    return gr.Image(
                        label=label, format="png", min_width=150, buttons=[], interactive=False,
                        visible=visible.get(name, True), elem_id=name, elem_classes="image-shown above",
                    )  # fmt: skip

                with gr.Row():
                    outputs = [image(name, title) for name, title in list(titles.items())[:3]]
                with gr.Row():
                    outputs += [image(name, title) for name, title in list(titles.items())[3:]]
                    with gr.Column(min_width=150):
                        words = gr.Markdown(elem_id="words", container=True)
                        gr.Markdown(_NOTES)
                with gr.Row():
                    feature_outputs = [image(name, title) for name, title in feature_titles.items()]
                    with gr.Column(min_width=150):
                        gr.Markdown(_FEATURE_NOTES)

        gallery.select(example, None, encoded, show_progress="hidden")
        upload.upload(usable, upload, encoded, show_progress="hidden")
        again.click(None, seed, seed, js="seed => (seed ?? 0) + 1")
        # Where a slider is let go is always shown. One use of the model at a time, as attention weights need another
        # implementation of its attention.
        options = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_id": "model"}
        gr.on(
            [page.load, encoded.change, mask_ratio.change, noise_level.change, seed.change],
            show, [encoded, mask_ratio, noise_level, seed], [*outputs, words], **options,
        )  # fmt: skip
        gr.on([page.load, encoded.change], show_features, encoded, feature_outputs, **options)
    return page


def _gradio():
    """gradio, told to send nothing; `ValueError` where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"gradio is not installed: {INSTALL.format('demo')}") from error
    return gradio


def main(argv: list[str] | None = None, description: str | None = __doc__, program: str | None = None):
    """Serves the page until Ctrl-C. Port and address: the variables GRADIO_SERVER_PORT and GRADIO_SERVER_NAME."""
    gr = _gradio()
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_name_or_path",
        default=os.environ.get("MODEL_NAME_OR_PATH", QUICKSTART),  # a Space gives no arguments, but has variables
        help="folder or Hub id of a pre-trained CAN (default: $MODEL_NAME_OR_PATH, else %(default)s)",
    )
    name = parser.parse_args(argv).model_name_or_path
    demo = Demo(name)
    with tempfile.TemporaryDirectory() as folder:
        page = build(demo, write_examples(Path(folder)))
        _, address, _ = page.launch(
            server_name="0.0.0.0" if "SPACE_ID" in os.environ else None,  # None: this machine alone
            share=False,
            ssr_mode=False,  # the same page, whether or not there is a Node
            quiet=True,  # about sharing
            prevent_thread_lock=True,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_CSS,
            footer_links=[],
            max_file_size="50mb",
        )
        tell(f"{name} is shown at {address} until Ctrl-C")
        page.block_thread()
