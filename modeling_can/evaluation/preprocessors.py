"""The image processor of a model, in two steps: the geometry where images are decoded, the numbers on the device."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor

from .. import __version__
from ..conversion.processors import dinov3_processor
from ..data.arrays import encode_array, reads_arrays
from ..data.decoding import DECODING, decode
from ..plots import displayed
from ..progress import quiet
from ..provenance import installed_versions


__all__ = [
    "ArrayPreprocessor", "Preprocessor", "load_preprocessor", "load_processor", "preprocessor_of", "takes_arrays",
]  # fmt: skip


class Preprocessor:
    """
    The processor that was saved with a model, in two steps: the geometry of an image (resize, crop), where images are
    decoded, and the numbers (rescale, normalize), in batch on the device. Together they are the processor.

    A processor that does anything else is applied as a whole in the first step.

    Args:
        processor: A transformers image processor.
        image_size (`(int, int)`, *optional*): Height and width that the model gets, instead of the processor's own.
        decoding (`dict`, *optional*):
            `transparent_background`, `high_bit_depth` and `pixel_range` of `decode`, instead of what the processor
            says, to which the trainer adds those that are not the default.
    """

    reads_arrays = False
    blank = None  # an encoded image of one color, where a gray PNG is none that it takes

    def __init__(self, processor, image_size: tuple[int, int] | None = None, decoding: dict | None = None):
        self.processor, self.num_channels = processor, _num_channels(processor)
        self.decoding = _decoding(processor, decoding)
        self.sizes = self._sizes(image_size)
        self.in_two_steps = True
        image = np.random.default_rng(0).integers(0, 256, (40, 50, self.num_channels), dtype=np.uint8)
        expected = self._process(image)
        try:
            two_steps = self.normalize(self(image)[None])[0]
            self.in_two_steps = two_steps.shape == expected.shape and bool((two_steps - expected).abs().max() < 1e-4)
        except Exception:  # whatever another kind of processor makes of it
            self.in_two_steps = False

    def _sizes(self, image_size: tuple[int, int] | None) -> dict:
        """
        The processor's options for that size, in the proportions of its own: those with which an upright and a lying
        image both come out in it.
        """
        name = type(self.processor).__name__
        if image_size is None:
            shapes = {self._shape(40, 50, {}), self._shape(50, 40, {})}
            if len(shapes) > 1:
                raise ValueError(
                    f"the {name} makes images of different sizes, which fit in no batch; give the one to use: "
                    "--image_size HEIGHT,WIDTH"
                )
            return {}
        (height, width), side, own = image_size, max(image_size), self.processor.to_dict()
        crop = {"height": height, "width": width}
        candidates = [{"size": crop}, {"size": {"shortest_edge": side}}]
        if own.get("do_center_crop"):
            before = max(own["crop_size"].values())
            scaled = {key: round(edge * side / before) for key, edge in own["size"].items() if edge}
            candidates.insert(0, {"size": scaled, "crop_size": crop})
        for options in candidates:
            if self._shape(40, 50, options) == self._shape(50, 40, options) == tuple(image_size):
                return options
        raise ValueError(f"image_size={image_size}: the {name} cannot make images of that size; try a square one")

    def _shape(self, height: int, width: int, sizes: dict) -> tuple[int, ...] | None:
        image = np.zeros((height, width, self.num_channels), np.uint8)
        try:
            return tuple(self.processor([image], return_tensors="pt", **sizes)["pixel_values"].shape[-2:])
        except Exception:  # sizes in words that this one does not know
            return None

    def _process(self, pixels: np.ndarray, **options) -> torch.Tensor:
        return self.processor([pixels], return_tensors="pt", **self.sizes, **options)["pixel_values"][0]

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 `(height, width, channels)` -> uint8 `(channels, height, width)` of the model's size."""
        return (
            self._process(pixels, do_rescale=False, do_normalize=False) if self.in_two_steps else self._process(pixels)
        )

    def decode(self, encoded: bytes, index: int | None = None) -> torch.Tensor:
        """The same for an encoded image, whatever its index; raises what `data.decoding.decode` raises."""
        return self(decode(encoded, self.num_channels, **self.decoding))

    def shown(self, encoded: bytes) -> torch.Tensor:
        """An encoded image to be looked at, uint8 `(channels, height, width)` of the model's size."""
        return self.decode(encoded) if self.in_two_steps else self.whole(encoded)

    def whole(self, encoded: bytes) -> torch.Tensor:
        """
        The whole of an encoded image, squeezed into the model's size where the processor would crop it, uint8
        `(channels, height, width)`, bilinear; for `normalize`, if `in_two_steps`.
        """
        pixels = torch.from_numpy(decode(encoded, self.num_channels, **self.decoding)).permute(2, 0, 1)
        return interpolate(pixels[None], self.image_size, mode="bilinear", antialias=True)[0]

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `__call__` returned, in batch `(B, C, H, W)`, -> the model's pixel values in fp32."""
        if not self.in_two_steps:
            return pixels
        pixels = pixels.float()
        if self.processor.do_rescale and not self.reads_arrays:  # those are in [0, 1]
            pixels = pixels * self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = (
                torch.tensor(numbers, dtype=torch.float32, device=pixels.device)[:, None, None]
                for numbers in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = (pixels - mean) / std
        return pixels

    @functools.cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the model gets of a square image."""
        return tuple(self(np.zeros((64, 64, self.num_channels), np.uint8)).shape[-2:])

    def in_color(self) -> "Preprocessor":
        """Of one for gray images, one that treats the three colors alike."""
        values = self.processor.to_dict()
        values |= {name: list(values[name]) * 3 for name in ("image_mean", "image_std")} | {"do_convert_rgb": True}
        return Preprocessor(type(self.processor).from_dict({**values, **self.sizes, **self.decoding}))

    def save_pretrained(self, folder: Path):
        """The processor, for images of this size and decoded like this."""
        values = {**self.processor.to_dict(), **self.sizes, **self.decoding}
        type(self.processor).from_dict(values).save_pretrained(folder)

    def facts(self) -> dict:
        """Everything that its result depends on."""
        versions = {"modeling-can": __version__, **installed_versions(("transformers", "pillow", "simplejpeg"))}
        numbers = json.loads(self.processor.to_json_string())
        kind = type(self.processor).__name__
        return {**numbers, **self.sizes, "class": kind, "decoding": self.decoding, "versions": versions}


_MODES = {2: "bilinear", 3: "bicubic"}
# Options of a processor that are followed for arrays, or have no meaning there; any other must be off
_FOLLOWED = {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
             "do_normalize", "image_mean", "image_std", "do_convert_rgb", *DECODING}  # fmt: skip
_METADATA = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "data_format",
             "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square"}  # fmt: skip


class ArrayPreprocessor(Preprocessor):
    """
    Of images that are read as arrays, fp32 in [0, 1]: what the processor says is done here, because transformers does
    not resize any number of channels. Resizing is with antialiasing, as in `RandomCrops`.

    Raises:
        ValueError: for a processor that does anything else than resize, crop the center and normalize.
    """

    reads_arrays = True

    def __init__(self, processor, image_size: tuple[int, int] | None = None, decoding: dict | None = None):
        self.processor, self.num_channels = processor, _num_channels(processor)
        self.decoding, self.in_two_steps = _decoding(processor, decoding), True
        if others := self._not_followed():
            raise self._refused(", ".join(f"{name}={value}" for name, value in others.items()))
        self.sizes = self._sizes(image_size)
        self._compare()

    def _not_followed(self) -> dict:
        options = self.processor.to_dict()
        others = {name: value for name, value in options.items() if value and not name.startswith("_")}
        others = {name: value for name, value in others.items() if name not in _FOLLOWED | _METADATA}
        size, crop_size = (
            {name for name, edge in (options.get(key) or {}).items() if edge} for key in ("size", "crop_size")
        )
        if options.get("do_resize"):
            if options.get("resample") not in _MODES:
                others["resample"] = options.get("resample")
            if size not in ({"height", "width"}, {"shortest_edge"}):
                others["size"] = options.get("size")
        if options.get("do_center_crop") and crop_size != {"height", "width"}:
            others["crop_size"] = options.get("crop_size")
        if options.get("do_rescale") and not math.isclose(options["rescale_factor"], 1 / 255, rel_tol=1e-4):
            others["rescale_factor"] = options["rescale_factor"]
        return others

    def _compare(self):
        """With the processor itself, of three channels, but for its rounding: some do more than their options say."""
        image = np.random.default_rng(0).integers(64, 192, (40, 50, 3), dtype=np.uint8)  # bicubic clips nothing
        ours = 255 * self._resized(image / np.float32(255), self.sizes)
        numbers = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        theirs = self.processor([image], **numbers, **self.sizes)["pixel_values"][0]
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > 2:
            raise self._refused("a way of its own to resize or crop")

    def _refused(self, what: str) -> ValueError:
        return ValueError(
            f"the {type(self.processor).__name__} has {what}, which is not done to images read as arrays; name a "
            "model whose processor resizes (bilinear or bicubic), crops the center and normalizes, and no more: "
            "--processor_name_or_path"
        )

    def _shape(self, height: int, width: int, sizes: dict) -> tuple[int, ...]:
        return tuple(self._resized(np.zeros((height, width, self.num_channels), np.float32), sizes).shape[-2:])

    def _process(self, pixels: np.ndarray, **options) -> torch.Tensor:
        return self._resized(pixels, self.sizes)

    def _resized(self, pixels: np.ndarray, sizes: dict) -> torch.Tensor:
        """`(height, width, channels)` in [0, 1] -> `(channels, height, width)` of the processor's size."""
        wanted, images = {**self.processor.to_dict(), **sizes}, torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        if wanted.get("do_resize"):
            size = (wanted["size"].get("height"), wanted["size"].get("width"))
            if edge := wanted["size"].get("shortest_edge"):
                short = min(images.shape[-2:])
                size = tuple(int(edge * side / short) for side in images.shape[-2:])
            images = interpolate(images, size, mode=_MODES[wanted["resample"]], antialias=True).clamp_(0, 1)
        if wanted.get("do_center_crop"):
            height, width = wanted["crop_size"]["height"], wanted["crop_size"]["width"]
            top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
            images = images[..., top : top + height, left : left + width]
        return images[0]

    def shown(self, encoded: bytes) -> torch.Tensor:
        return (255 * displayed(self.decode(encoded))).round().to(torch.uint8)

    @property
    def blank(self) -> bytes:
        return encode_array(np.zeros((self.num_channels, 512, 512), np.uint8))


def _num_channels(processor) -> int:
    return len(processor.image_mean or (0, 0, 0))


def _decoding(processor, decoding: dict | None) -> dict:
    """What `decode` is told: by the processor, or else by `decoding`."""
    named = {name: getattr(processor, name) for name in DECODING if getattr(processor, name, None)}
    return {**named, **(decoding or {})}


def takes_arrays(processor, decoding: dict | None = None) -> bool:
    """Whether images for it are read as arrays."""
    return reads_arrays(_num_channels(processor), _decoding(processor, decoding).get("pixel_range"))


def preprocessor_of(
    processor, image_size: tuple[int, int] | None = None, decoding: dict | None = None
) -> Preprocessor:
    """The one that suits the channels; the arguments are those of `Preprocessor`."""
    kind = ArrayPreprocessor if takes_arrays(processor, decoding) else Preprocessor
    return kind(processor, image_size, decoding)


def load_preprocessor(
    name: str, image_size: tuple[int, int] | None = None, trust_remote_code=False, decoding: dict | None = None
) -> Preprocessor:
    """Raises ValueError where there is none, or none that can be applied."""
    return preprocessor_of(load_processor(name, trust_remote_code), image_size, decoding)


def load_processor(name: str, trust_remote_code=False):
    """DINOv3's as `dinov3_processor` makes it without torchvision. Raises ValueError where there is none."""
    with quiet():
        try:
            return AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as error:
            if isinstance(error, ImportError) and (found := dinov3_processor(name)):
                return found
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name} has no image processor that can be loaded ({reason}); name a model that "
                "was trained on images prepared alike: --processor_name_or_path"
            ) from error
