"""From a recipe to the parts of a run: processes, source, views, augmentation, processor, probe, model, optimizer."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed
from torch import nn
from transformers import ViTImageProcessor

from ..conversion import normalization, warm_start
from ..data import ImageSource
from ..data.augmentations import Augmentation
from ..data.crops import RandomCrops
from ..evaluation.preprocessors import preprocessor_of
from ..evaluation.probe import Probe
from ..evaluation.processes import check_processes, forget_settings
from ..modeling_can import CANForPreTraining
from ..optimization import layer_groups, mixed_precision, parameter_groups
from ..progress import quiet, tell
from ..random_state import interlude
from ..rendezvous import INIT_METHOD
from .checkpoints import is_sharded, whole_state
from .compiling import compile_model, how_to_compile
from .plan import Plan
from .recipe import Recipe


__all__ = [
    "Trained", "augmentation", "compilation", "image_processor", "image_source", "keep_sharding_exact", "probe_of",
    "processes", "trained_model", "view_maker",
]  # fmt: skip


# --- Processes -------------------------------------------------------------------------------------------------------


def processes(recipe: Recipe) -> Accelerator:
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)) != 1:
        raise ValueError(
            "accelerate's own gradient_accumulation_steps would divide the loss once more; give "
            "--gradient_accumulation_steps after the script's name, and 1 in accelerate's configuration"
        )
    output_dir = Path(recipe.output_dir)
    forget_settings()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(recipe.mixed_precision),
        log_with=_trackers(recipe.log_with),
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "tensorboard")),
        # The only buffers are the position tables, the same everywhere: nothing to send around before every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process probes.
            InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(hours=2)),
        ],
    )
    check_processes(accelerator)
    if accelerator.is_fsdp2:
        keep_sharding_exact(accelerator.state.fsdp_plugin)
    if accelerator.device.type == "cuda":  # the one way that compiling bears
        torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
    return accelerator


def keep_sharding_exact(plugin):
    """Settings of accelerate's FSDP2 with which a sharded run computes what an unsharded one does."""
    # Its own half precision casts inputs and outputs too: targets, noise levels and losses. Autocast does not.
    plugin.mixed_precision_policy = None
    # Every process builds the model from the seed; this would take it from the first and cannot deal with buffers.
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _trackers(names: str | None) -> list[str] | None:
    """accelerate's names; it leaves out unknown and missing packages without a word."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    known = set(LoggerType.list()) - {"all"}
    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in wanted:
        if name not in known:
            raise ValueError(f"log_with={names}: {name!r} is not one of {', '.join(sorted(known))} and none")
        if name not in installed:
            raise ValueError(f"log_with={names}: {name} is not installed; pip install {name}, or --log_with none")
    return wanted or None


def compilation(recipe: Recipe, accelerator: Accelerator) -> str | None:
    """What `compile_model` is to do, or `None`."""
    what = how_to_compile(recipe.torch_compile, accelerator.device, recipe.config.drop_path_rate)
    if what == "cudagraph" and (accelerator.num_processes > 1 or accelerator.device.type != "cuda"):
        raise ValueError(
            f"torch_compile=cudagraph is for one process on a GPU, and this is one of {accelerator.num_processes} on "
            f"{accelerator.device.type}; set it to model or auto"
        )
    return what


# --- Data ------------------------------------------------------------------------------------------------------------


def image_source(recipe: Recipe, dataset=None) -> ImageSource:
    return ImageSource(
        dataset_name=recipe.dataset_name,
        data_dir=recipe.data_dir,
        data_files=recipe.data_files,
        split=recipe.dataset_split,
        image_column=recipe.image_column,
        streaming=recipe.streaming,
        dataset=dataset,
        config_name=recipe.dataset_config_name,
        arrays=recipe.reads_arrays,
    )


def view_maker(recipe: Recipe) -> RandomCrops:
    config = recipe.config
    return RandomCrops(
        image_shape=config.image_shape,
        num_channels=config.num_channels,
        scale=recipe.crop_scale,
        ratio=recipe.crop_ratio,
        resample=recipe.resample,
        seed=recipe.seed,
        num_views=recipe.num_views,
        min_size=config.patch_shape,
        **recipe.decoding,
    )


def augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(
        mean=recipe.image_mean,
        std=recipe.image_std,
        flip_probability=recipe.flip_probability,
        vertical_flip_probability=recipe.vertical_flip_probability,
        quarter_turn_probability=recipe.quarter_turn_probability,
        color_jitter=recipe.color_jitter,
        color_jitter_probability=recipe.color_jitter_probability,
        grayscale_probability=recipe.grayscale_probability,
        blur_probability=recipe.blur_probability,
        blur_sigma=recipe.blur_sigma,
        blur_kernel_size=max(3, min(recipe.config.image_shape) // 10 // 2 * 2 + 1),
        solarize_probability=recipe.solarize_probability,
    )


def image_processor(recipe: Recipe) -> ViTImageProcessor:
    """
    What prepares an image downstream: the shortest edge to 256/224 of the size, center crop, the recipe's mean. For
    `preprocessors.Preprocessor` it also says how to decode, where that is not the usual way. Arrays come to it in
    [0, 1], and transformers does not resize any number of channels; `preprocessors.ArrayPreprocessor` does.
    """
    height, width = recipe.config.image_shape
    decoding = {name: value for name, value in recipe.decoding.items() if value != "skip"}  # a choice of images
    with quiet():
        return ViTImageProcessor(
            do_convert_rgb=recipe.config.num_channels == 3,
            do_resize=True,
            do_rescale=not recipe.reads_arrays,
            size={"shortest_edge": round(max(height, width) * 256 / 224)},
            do_center_crop=True,
            crop_size={"height": height, "width": width},
            image_mean=list(recipe.image_mean),
            image_std=list(recipe.image_std),
            resample={"bilinear": 2, "bicubic": 3}[recipe.resample],
            **decoding,
        )


def probe_of(recipe: Recipe, device: torch.device) -> Probe | None:
    """The labeled images on which the features are measured, where the recipe names some."""
    if not recipe.probe_dataset_name:
        return None
    return Probe(
        dataset_name=recipe.probe_dataset_name,
        config_name=recipe.probe_dataset_config_name,
        train_split=recipe.probe_train_split,
        test_split=recipe.probe_test_split,
        image_column=recipe.probe_image_column or recipe.image_column,
        label_column=recipe.probe_label_column,
        preprocessor=preprocessor_of(image_processor(recipe)),
        device=device,
    )


# --- Model and optimizer ---------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """
    What is trained, on this process.

    Args:
        model, optimizer: As accelerate has prepared them.
        bare (`CANForPreTraining`): The model without what accelerate put around it.
        frozen (`list[str]`): The parts that nothing trains.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    bare: CANForPreTraining
    frozen: list[str]
    accelerator: Accelerator

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.bare.parameters())

    def in_one_piece(self) -> CANForPreTraining | None:
        """The model for the main process to look at; called by all processes, for each may hold a part of it."""
        if not is_sharded(self.bare):
            return self.bare
        weights, _ = whole_state(self.model)
        if not self.accelerator.is_main_process:
            return None
        with interlude():
            whole = CANForPreTraining(self.bare.config)
        whole.load_state_dict(weights)
        return whole.to(self.accelerator.device)


def trained_model(recipe: Recipe, plan: Plan, accelerator: Accelerator, compiled: str | None, warm: bool) -> Trained:
    """
    The same weights on every process, then different noise and masks.

    Args:
        compiled (`str`, *optional*): What `compilation` says.
        warm (`bool`): Whether to begin from `model_name_or_path`, where the recipe has one.
    """
    set_seed(recipe.seed)
    model = CANForPreTraining(recipe.config)
    if recipe.model_name_or_path and warm:
        with accelerator.local_main_process_first():  # which downloads it
            taken, new = warm_start(model, recipe.model_name_or_path)
        if accelerator.is_main_process:
            _tell_of_warm_start(recipe, taken, new)
    frozen = model.freeze_unused_parameters()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_model(model, compiled)
    if recipe.layer_decay < 1 or plan.frozen_steps:
        groups = layer_groups(
            model, recipe.weight_decay, recipe.layer_decay, encoder="can.", frozen_steps=plan.frozen_steps
        )
    else:
        groups = parameter_groups(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(
        groups,
        lr=plan.peak_learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        fused=True,
    )
    prepared, optimizer = accelerator.prepare(model.to(accelerator.device), optimizer)
    set_seed(recipe.seed, device_specific=True)
    return Trained(
        model=prepared,
        optimizer=optimizer,
        bare=accelerator.unwrap_model(prepared),
        frozen=frozen,
        accelerator=accelerator,
    )


def _tell_of_warm_start(recipe: Recipe, taken: list[str], new: list[str]):
    tell(f"taken from {recipe.model_name_or_path}: {', '.join(taken)}; new: {', '.join(new) or 'nothing'}")
    theirs = normalization(recipe.model_name_or_path)
    if theirs is None:
        mean, std = (
            ", ".join(f"{number:g}" for number in numbers) for numbers in (recipe.image_mean, recipe.image_std)
        )
        tell(
            f"{recipe.model_name_or_path} has no image processor that says its normalization: images are normalized "
            f"by mean {mean}, std {std}; set --image_mean and --image_std if it was trained otherwise"
        )
    elif len(theirs[0]) == recipe.config.num_channels and theirs != (list(recipe.image_mean), list(recipe.image_std)):
        mean, std = (",".join(map(str, numbers)) for numbers in theirs)
        tell(f"its images were normalized otherwise; to do so as well: --image_mean {mean} --image_std {std}")
