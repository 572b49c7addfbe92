"""
What a run on one's own images gets where no recipe is named: chosen from the images, the device and the processes.

docs/recipes.md has the tables, their reasons, and what of it is measured.
"""

import os
import statistics
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..configuration_can import CANConfig
from ..data import ImageSource
from ..data.arrays import read_array, reads_arrays
from ..data.bad_samples import BadImage
from ..data.decoding import DECODING, decode, largest_of_16_bits, upright_size
from ..progress import duration, tell
from .batch_size import largest_step
from .cost import step_seconds
from .plan import Plan
from .recipe import LENGTH, Recipe, model_fields
from .sizes import rate_of, sizes_of, sizes_of_start


__all__ = [
    "Choice", "Images", "Machine", "check_open", "choices", "choose", "filled", "look_at", "tell_range", "tell_time"
]  # fmt: skip

_NUM_LOOKED_AT = 32  # images
_COLOR_DIFFERENCE = 4  # of 255: what the channels of a gray JPEG may differ by

_PATCHES = {32: 4, 64: 8, 128: 8, 224: 16}  # image size -> patch size
# The encoder on a GPU: from so many images and so many GB of memory on
_ON_GPU = (("ViT-base", 1_000_000, 16), ("ViT-small", 100_000, 8), ("ViT-tiny", 0, 0))
# Images seen, and the most epochs, on a CPU and on a GPU; a GPU does at least _MIN_EPOCHS
_NUM_SEEN, _MAX_EPOCHS, _MIN_EPOCHS = {"cpu": 1_000_000, "cuda": 5_000_000}, {"cpu": 400, "cuda": 800}, 100
_UNKNOWN_NUMBER = 100_000  # what a source counts as that does not tell how many images it has
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Images:
    """
    What is known of the images: their number, the median of their shorter sides, whether all are gray, and the largest
    value of those of 16 bits whose range is not set, 0 if there are none.
    """

    number: int | None
    side: int
    is_gray: bool
    largest: int = 0


@dataclass(frozen=True)
class Machine:
    """Whose row of the table (`"cpu"` or `"cuda"`), processes, CPU cores and GPU memory in GB of each."""

    device: str
    num_processes: int = 1
    num_cores: int = 1
    memory: float = 0.0


_GPUS = (Machine("cuda", num_cores=8, memory=24.0), Machine("cuda", num_cores=8, memory=6.0))  # that users have


class Choice(NamedTuple):
    values: dict  # by key of a recipe
    reason: str


def choose(recipe: Recipe, source: ImageSource, accelerator: Accelerator) -> Recipe:
    """
    The recipe with all that the user left open; called by all processes. What is chosen, and why, is printed, and
    stands at the top of `recipe.yaml`.

    Raises:
        ValueError: if what the user set does not go with what is chosen; it names the fields. If none of the images
            looked at can be read.
    """
    answer, given = [None], recipe.given
    if accelerator.is_main_process:
        try:
            images, machine = look_at(source, **_decoding(given)), _machine(accelerator)
            answer = [(images, machine, choices(images, machine, given))]
        except ValueError as error:  # the others wait for an answer
            answer = [str(error)]
    (answer,) = broadcast_object_list(answer)
    if isinstance(answer, str):
        raise ValueError(answer)
    images, machine, found = answer
    place = _described_device(accelerator.device.type, machine)
    head = f"no recipe is named; chosen for {_described(images)} from {source.name}, on {place}:"
    recipe = filled(recipe, found, head)
    if recipe.reads_arrays and not source.arrays:  # the number is that of model_name_or_path
        number = recipe.config.num_channels
        raise ValueError(f"num_channels={number} of {recipe.model_name_or_path} must be said: --num_channels {number}")
    if accelerator.is_main_process:
        tell("\n  ".join(recipe.chosen))
        _tell_range(images.largest, recipe)
        if accelerator.device.type == "cpu":
            tell(_on_a_gpu(images, given))
    return recipe


def check_open(recipe: Recipe):
    """Raises ValueError for what the user set that goes with no choice, before the images are looked at."""
    errors, start = [], recipe.given.get("model_name_or_path")
    if start:
        _encoder_of(start, recipe.given)  # before the processes meet: not all of them look at it later
    for machine, side, is_gray in product((Machine("cpu"), *_GPUS), (32, 224), (False, True)):
        try:
            filled(recipe, choices(Images(10**6, side, is_gray), machine, recipe.given))
            return
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def filled(recipe: Recipe, found: list[Choice], head: str = "") -> Recipe:
    """The recipe with what is chosen, where the user set nothing else."""
    open_choices = [(_left(choice, recipe.given), choice.reason) for choice in found]
    values = {**recipe.given, **{name: value for chosen, _ in open_choices for name, value in chosen.items()}}
    in_model = {field.name for field in model_fields()}
    lines = [f"{_in_short(chosen)}: {reason}" for chosen, reason in open_choices if chosen]
    return replace(
        recipe,
        config=CANConfig(**{name: value for name, value in values.items() if name in in_model}),
        given=None,
        chosen=(head, *lines),
        **{name: value for name, value in values.items() if name not in in_model},
    )


def _decoding(given: dict) -> dict:
    return {name: given[name] for name in ("num_channels", *DECODING) if given.get(name)}


def look_at(source: ImageSource, num_channels: int = 3, **decoding) -> Images:
    """
    Reads the first `_NUM_LOOKED_AT` images. Those that cannot be read count later, in training.

    Args:
        num_channels (`int`): Of arrays.
        decoding: What else `decode` takes.

    Raises:
        ValueError: if none of them can be read, with the reason of the first; and what `decode` raises.
        OSError: as of `ImageSource.fetch`.
    """
    sides, is_gray, largest, bad = [], True, 0, []
    blocks = source.blocks(source.dataset, block_size=8)  # small ones: a stream may be slow
    for row in islice((row for block, _ in blocks for row in source.images(block)), _NUM_LOOKED_AT):
        try:
            encoded = source.fetch(row)
            if source.arrays:
                sides.append(min(decode(encoded, num_channels, **decoding).shape[:2]))
                is_gray = False
                if "pixel_range" not in decoding:
                    raw = read_array(encoded, num_channels)
                    largest = max(largest, int(raw.max())) if raw.dtype.name == "uint16" else largest
                continue
            pixels = decode(encoded, **decoding, shrink=lambda size: min(size) / 64)
            if "high_bit_depth" not in decoding:
                largest = max(largest, largest_of_16_bits(encoded))
            sides.append(min(upright_size(encoded)))
            image = Image.fromarray(pixels)
            image.thumbnail((64, 64))
            is_gray = is_gray and np.ptp(np.asarray(image).astype(int), axis=2).max() <= _COLOR_DIFFERENCE
        except BadImage as error:
            bad.append(f"{row['path']}: {error}" if row and row["path"] else error)
    if bad and not sides:
        raise ValueError(
            f"{source.name}: none of the first {len(bad)} images can be read. The reason of one: {bad[0]}"
        )
    side = round(statistics.median(sides)) if sides else 224
    return Images(source.num_images(), side, bool(is_gray and sides), largest)


def tell_range(source: ImageSource, recipe: Recipe):
    """Of a named recipe, on one process: whether the first images use little of their range."""
    with suppress(ValueError):  # that none of them can be read, training says better
        _tell_range(look_at(source, recipe.config.num_channels, **recipe.decoding).largest, recipe)


def _tell_range(largest: int, recipe: Recipe):
    if not 0 < largest < 65535 / 8:
        return
    line, fix = f"the largest value seen is {largest} of 65535", f"--pixel_range 0,{2 ** largest.bit_length() - 1}"
    if recipe.reads_arrays:
        tell(f"{line}: set {fix} if that is the range")
    else:
        tell(
            f"{line}, which is dark in 8 bits: set --num_channels 1 {fix} if that is the range, or --high_bit_depth "
            "stretch, each image's own"
        )


def choices(images: Images, machine: Machine, given: dict) -> list[Choice]:
    """
    The table. A value in `given` is not asked again: what depends on it follows it.

    Args:
        given (`dict`): What the user set, by key of a recipe.
    """
    on_gpu, number = machine.device == "cuda", images.number or _UNKNOWN_NUMBER
    start = given.get("model_name_or_path")
    if start:
        found = [_encoder_of(start, given)]
    else:
        found = [_encoder(images, machine, given), _image_size(images, on_gpu, given)]
    values = {**{name: value for choice in found for name, value in choice.values.items()}, **given}
    return [
        *found,
        *_views(images, values),
        _objective(on_gpu),
        _batch(number, machine, given),
        _learning_rate(values["hidden_size"]),
        _length(images, machine),
        _workers(machine),
    ]


# --- The table -------------------------------------------------------------------------------------------------------


def _encoder_name(images: Images, machine: Machine) -> str:
    number = images.number or _UNKNOWN_NUMBER
    if machine.device != "cuda":
        return "a small ViT"
    return next(name for name, least, memory in _ON_GPU if number >= least and machine.memory >= memory)


def _encoder(images: Images, machine: Machine, given: dict) -> Choice:
    name = _encoder_name(images, machine)
    if machine.device != "cuda":
        return Choice(sizes_of(name, given), f"{name}, which a CPU trains within hours")
    return Choice(sizes_of(name, given), f"{name}: larger ones want more images or more memory")


def _encoder_of(start: str, given: dict) -> Choice:
    return Choice(sizes_of_start(start, given), f"those of {start}")


def _image_size(images: Images, on_gpu: bool, given: dict) -> Choice:
    allowed = _PATCHES if on_gpu else [size for size in _PATCHES if size <= 64]
    size = max([size for size in allowed if size <= images.side], default=min(_PATCHES))
    asked = given.get("image_size")
    if asked:  # its patches follow it
        side = min(asked) if isinstance(asked, tuple) else asked
        patch = _PATCHES[max([size for size in _PATCHES if size <= side], default=min(_PATCHES))]
        return Choice({"patch_size": patch}, "patches that suit the image size")
    reason = f"half of the images have {images.side} pixels or more on their shorter side"
    if images.side < size:
        reason = f"the smallest size; the images have {images.side} pixels on their shorter side and are enlarged"
    if not on_gpu and images.side >= 128:
        reason += "; larger ones take a CPU days"
    return Choice({"image_size": size, "patch_size": _PATCHES[size]}, reason)


def _views(images: Images, values: dict) -> list[Choice]:
    """Of the values so far, the user's among them."""
    found, size = [], values["image_size"]
    number = values.get("num_channels", 3)
    is_rgb = number == 3 and not reads_arrays(number, values.get("pixel_range"))
    if not is_rgb and not {"image_mean", "image_std"} & values.keys():
        reason = "the images are not RGB" if number != 3 else "arrays have no usual mean, also of 3 channels"
        found.append(Choice({"measure_mean_std": True}, reason))
    if images.is_gray:
        gray = {"color_jitter": (0.4, 0.4, 0.0, 0.0), "grayscale_probability": 0.0, "measure_mean_std": True}
        if "image_mean" in values or "image_std" in values:
            del gray["measure_mean_std"]
        found.append(Choice(gray, "the images are gray; they stay RGB, as all tools take it"))
    if (min(size) if isinstance(size, tuple) else size) <= 64:
        found.append(Choice({"blur_probability": 0.0, "resample": "bicubic"}, "views this small bear no blur"))
    return found


def _objective(on_gpu: bool) -> Choice:
    values = {
        "contrastive_loss_weight": 0.3,
        "noise_std_max": 0.25,
        "mask_ratio": 0.5 if on_gpu else 0.25,
        "reconstruction_loss_weight": 0.4835,
        "denoising_loss_weight": 0.3,
    }
    if on_gpu:
        return Choice(values, "the paper's mask; weights and noise of the model that was trained on CIFAR-10")
    return Choice(values, "as the model that was trained on CIFAR-10 (can-toy-patch4-32-cifar10)")


def _batch(number: int, machine: Machine, given: dict) -> Choice:
    largest = largest_step(number, machine.device)
    if machine.device == "cuda":
        reason = f"what fits into the GPU's memory, at most {largest} images a step"
        return Choice({"per_device_train_batch_size": "auto"}, reason)
    parts = machine.num_processes * given.get("gradient_accumulation_steps", 1)
    return Choice({"per_device_train_batch_size": largest // parts or 1}, f"{largest} images a step")


def _learning_rate(width: int) -> Choice:
    rate, reason = rate_of(width)
    return Choice({"base_learning_rate": rate, "warmup_ratio": 0.1, "max_grad_norm": 3.0}, reason)


def _length(images: Images, machine: Machine) -> Choice:
    seen = _NUM_SEEN[machine.device]
    if images.number is None:
        return Choice({"num_train_samples": 2 * seen}, "the source does not tell how many images it has")
    epochs = min(_MAX_EPOCHS[machine.device], seen / images.number)
    if machine.device == "cuda":
        epochs = max(_MIN_EPOCHS, epochs)
    epochs = float(f"{epochs:.2g}")
    return Choice({"num_train_epochs": epochs}, f"{epochs * images.number:,.0f} images seen; more is better")


def _workers(machine: Machine) -> Choice:
    if machine.device == "cuda":
        number = max(1, min(_MOST_WORKERS, machine.num_cores - 1))
        return Choice({"dataloader_num_workers": number}, f"of {machine.num_cores} cores for each process")
    number = max(1, min(_MOST_WORKERS, machine.num_cores // 4))
    return Choice({"dataloader_num_workers": number}, "the other cores train")


# --- Around it -------------------------------------------------------------------------------------------------------


def _machine(accelerator: Accelerator) -> Machine:
    processes = accelerator.num_processes
    cores = os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    cores = max(1, cores // min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
    if accelerator.device.type != "cuda":  # also Apple's GPUs, for which nothing is measured
        return Machine("cpu", processes, cores)
    memory = torch.cuda.get_device_properties(accelerator.device).total_memory / 1e9
    return Machine("cuda", processes, cores, memory)


def _left(choice: Choice, given: dict) -> dict:
    """Without what the user set."""
    if set(LENGTH) & set(given) and set(choice.values) & set(LENGTH):
        return {}
    return {name: value for name, value in choice.values.items() if name not in given}


def _in_words(values: dict) -> str:
    return ", ".join(f"{name} {','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in values.items())


def _in_short(values: dict) -> str:
    """The first of them."""
    return _in_words(dict(islice(values.items(), 3))) + ", ..." * (len(values) > 3)


def _described(images: Images) -> str:
    number = "an unknown number of" if images.number is None else f"{images.number:,}"
    return f"{number} {'gray ' if images.is_gray else ''}images, {images.side} pixels on the shorter side (median),"


def _described_device(device_type: str, machine: Machine) -> str:
    if machine.device == "cuda":
        return f"{machine.num_processes} GPU(s) of {machine.memory:.0f} GB"
    name = "a CPU" if device_type == "cpu" else f"{device_type} (with the choices of a CPU)"
    return f"{name}, {machine.num_processes} process(es) of {machine.num_cores} cores"


def _on_a_gpu(images: Images, given: dict) -> str:
    shown = ("hidden_size", "num_hidden_layers", "image_size", *LENGTH)
    found = choices(images, _GPUS[0], given)
    values = {**{name: v for choice in found for name, v in _left(choice, given).items()}, **given}
    return f"on a GPU the same command trains {_in_words({name: values[name] for name in shown if name in values})}"


def tell_time(recipe: Recipe, source: ImageSource, accelerator: Accelerator):
    """How long a run with chosen settings takes, measured on some random images; and how to change them."""
    if not accelerator.is_main_process:
        return
    plan = Plan.of(recipe, source.num_images(), accelerator.num_processes)
    num_timed = min(16 if accelerator.device.type == "cpu" else 64, recipe.per_device_train_batch_size)
    text = "a flag changes a choice; recipe.yaml will hold all of them"
    try:
        num_steps = plan.max_steps * plan.global_batch_size / accelerator.num_processes / num_timed
        seconds = num_steps * step_seconds(recipe, accelerator, num_timed)
        text = f"this takes about {duration(seconds)} here; {text}"
    except torch.OutOfMemoryError:  # which training may do without
        pass
    finally:
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    tell(text)
