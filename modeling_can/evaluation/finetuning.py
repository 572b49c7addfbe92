"""
Fine-tuning of the whole encoder, by MAE's recipe (arXiv 2111.06377, table 9) or with LoRA (arXiv 2106.09685). It is
given no test images: those are for `class_predictions`, once everything is chosen.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.utils import is_peft_available

from ..averages import MetricAverage
from ..fields import check, option
from ..files import check_new_folder
from ..optimization import NonFiniteGuard, layer_groups, learning_rate, peak_learning_rate
from ..progress import INSTALL, progress_bar
from ..random_state import interlude
from .classifier import class_predictions, freeze_unused, new_classifier, save, with_adapters
from .encoders import classifier_class
from .preprocessors import Preprocessor
from .protocol import Entry, Features, Measure, Protocol, Setup, file_name
from .sets import Split
from .training_images import STEP, Augmentation, Share, crop_loader, epochs, fitting_batch_size, mix


__all__ = ["LOG_STEPS", "FineTune", "FineTuned", "FineTuning", "finetune", "tuned_folder"]

# MAE's for ViT-B; and with adapters, by the quickstart's CAN at rank 8 on a held-out fifth of sample_data: 68.2, 74.1,
# 79.3, 44.1 % at 1.5e-3, 5e-3, 1.5e-2, 5e-2 (10 epochs, batch 128), 79.3 and 80.4 % at the first two (40, batch 1024)
_FULL, _LORA = {"base_learning_rate": 5e-4, "layer_decay": 0.65}, {"base_learning_rate": 5e-3, "layer_decay": 1.0}
LOG_STEPS = 10  # between looks at the loss, which wait for the device


@dataclass(frozen=True)
class FineTuning:
    """The recipe of `finetune`; the defaults are MAE's for ViT-B on ImageNet."""

    num_epochs: int = option(100, "passes over the training images", minimum=1)
    batch_size: int = option(1024, "images of one step, of all processes together", minimum=1)
    gradient_accumulation_steps: int = option(1, "parts of a step's batch, one after the other", minimum=1)
    base_learning_rate: float | None = option(None, "for 256 images a step; 5e-4 if none, with LoRA 5e-3", above=0)
    layer_decay: float | None = option(
        None, "learning rate of a layer relative to the next; 0.65 if none, with LoRA 1", above=0, maximum=1
    )
    warmup_ratio: float = option(0.05, "fraction of the steps with linear warm-up", minimum=0, maximum=1)
    weight_decay: float = option(0.05, "AdamW, on matrices only", minimum=0)
    drop_path_rate: float = option(
        0.1, "stochastic depth of the last layer, where the model has it", minimum=0, below=1
    )
    label_smoothing: float = option(0.1, "fraction of the target that goes to all classes alike", minimum=0, below=1)
    mixup_alpha: float = option(0.8, "mixing of two images: Beta(alpha, alpha); 0 is off", minimum=0)
    cutmix_alpha: float = option(1.0, "a box of one image in another: Beta(alpha, alpha); 0 is off", minimum=0)
    flip_probability: float = option(0.5, "of a horizontal flip", minimum=0, maximum=1)
    randaugment_magnitude: float = option(9.0, "level of RandAugment, of 10; 0 is off", minimum=0, maximum=10)
    random_erasing_probability: float = option(0.25, "of a box of noise", minimum=0, maximum=1)
    lora_rank: int = option(0, "of adapters, which are then trained instead of the encoder; 0 is off", minimum=0)

    def __post_init__(self):
        if self.lora_rank and self.layer_decay not in (None, 1):
            raise ValueError(
                f"layer_decay={self.layer_decay} with lora_rank={self.lora_rank}: adapters have one learning rate; "
                "leave out one of the two"
            )
        for name, default in (_LORA if self.lora_rank else _FULL).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check(self)

    @property
    def mixes(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


class FineTuned(NamedTuple):
    """The model as it was saved, in evaluation mode, on every process; and what there is to tell of its training."""

    model: nn.Module
    facts: dict


@interlude()
def finetune(
    name: str,
    train: Split,
    class_names: list[str],
    preprocessor: Preprocessor,
    accelerator,
    output_dir: Path,
    recipe: FineTuning = FineTuning(),  # noqa: B008  frozen
    seed: int = 0,
    num_workers: int = 0,
    trust_remote_code: bool = False,
) -> FineTuned:
    """
    Trains a classifier, all of it or adapters, and saves it with its processor in a folder that transformers'
    image-classification pipeline (of images in color) and `encoders.load_encoder` read; of a LoRA run the merged
    model, and the adapter under `adapter/`. Called by every process; DDP. Nothing is chosen: the model is the one
    after the last step.

    On N processes the weights are those of one, up to rounding, but for random erasing and drop path, which draw on
    each process.

    Args:
        name (`str`): Folder or Hub id of the encoder.
        class_names (`list[str]`): The labels of `train` are indices of it.
        accelerator (`accelerate.Accelerator`): The processes, device and precision.
        output_dir (`Path`): A folder that does not exist yet, or is empty; it is there when it is complete.

    Raises:
        ValueError: for what the user can fix.
        FloatingPointError: on all processes, if the gradient is not finite; no such update is made.
    """
    output_dir, device = Path(output_dir), accelerator.device
    index, count = accelerator.process_index, accelerator.num_processes
    num_parts = recipe.gradient_accumulation_steps
    check_new_folder(output_dir)
    pairs, why = (2, " x 2, as images are mixed in pairs") if recipe.mixes else (1, "")
    unit, why = count * num_parts * pairs, f"processes x gradient_accumulation_steps{why}"
    batch_size = fitting_batch_size(len(train), recipe.batch_size, unit, why)
    share, size = batch_size // count, batch_size // count // num_parts
    make_inputs = _input_maker(
        recipe=recipe, preprocessor=preprocessor, num_classes=len(class_names), batch_size=batch_size, seed=seed
    )

    torch.manual_seed(seed)
    model, optimizer = _model_and_optimizer(
        name=name,
        class_names=class_names,
        preprocessor=preprocessor,
        accelerator=accelerator,
        recipe=recipe,
        trust_remote_code=trust_remote_code,
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    steps = (len(train), batch_size, recipe.num_epochs, seed)
    num_steps = recipe.num_epochs * (len(train) // batch_size)
    warmup_steps = round(recipe.warmup_ratio * num_steps)
    peak = peak_learning_rate(recipe.base_learning_rate, batch_size)
    mine = slice(index * share, (index + 1) * share)
    loader = crop_loader(train, preprocessor, Share(mine, *steps), seed=seed, num_workers=num_workers)
    average = MetricAverage(lambda tensor: accelerator.reduce(tensor, "mean"))
    guard = NonFiniteGuard(optimizer.optimizer, count)
    report = _Report(num_steps, batch_size, accelerator.is_main_process)
    model.train()
    for step, ((epoch, rows), crops) in enumerate(zip(epochs(*steps), loader, strict=True)):
        torch.manual_seed(int(np.random.default_rng((seed, step, STEP, index)).integers(2**63)))  # erasing, drop path
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, num_steps, warmup_steps, peak)
        crops = crops[:, 0].to(device, non_blocking=True)
        labels = torch.from_numpy(train.labels[rows[mine]]).to(device, non_blocking=True)
        step_loss = 0.0
        for part in range(num_parts):
            here, first = slice(part * size, (part + 1) * size), mine.start + part * size
            pixel_values, targets = make_inputs(crops[here], labels[here], step, first)
            with accelerator.no_sync(model) if part + 1 < num_parts else contextlib.nullcontext():
                logits = model(pixel_values=pixel_values).logits.float()
                loss = nn.functional.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
                accelerator.backward(loss / num_parts)
            step_loss = step_loss + loss.detach() / num_parts
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        where = f"in rows {', '.join(map(str, rows[mine]))}"
        average.update({"loss": step_loss}, guard.check(step, norm, {"loss": step_loss}, [where]))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_STEPS == 0 or step + 1 == num_steps:  # waits for the device, and the processes
            for sentence in guard.report():
                raise FloatingPointError(f"{sentence}. Lower base_learning_rate, or look at the images")
            report(step + 1, epoch, average.compute()["loss"])
    facts = {
        **asdict(recipe),
        "batch_size": batch_size,
        "learning_rate": peak,
        "num_steps": num_steps,
        "num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **report.facts(),
    }
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    model = save(model, preprocessor, output_dir, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return FineTuned(model, facts)


def _input_maker(
    recipe: FineTuning, preprocessor: Preprocessor, num_classes: int, batch_size: int, seed: int
) -> Callable[[torch.Tensor, torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]:
    """
    `(crops, labels, step, first) -> (pixel_values, targets)`, augmented and mixed, of consecutive images of a step,
    which are its images from `first` on.
    """
    augment = Augmentation(
        preprocessor=preprocessor,
        batch_size=batch_size,
        seed=seed,
        flip_probability=recipe.flip_probability,
        randaugment_magnitude=recipe.randaugment_magnitude,
        random_erasing_probability=recipe.random_erasing_probability,
    )

    def make_inputs(crops, labels, step, first):
        pixel_values = augment(crops, step, first)
        targets = nn.functional.one_hot(labels, num_classes).float()
        if not recipe.mixes:
            return pixel_values, targets
        return mix(
            images=pixel_values,
            targets=targets,
            mixup_alpha=recipe.mixup_alpha,
            cutmix_alpha=recipe.cutmix_alpha,
            seed=seed,
            step=step,
            first_pair=first // 2,
        )

    return make_inputs


def _model_and_optimizer(
    name: str,
    class_names: list[str],
    preprocessor: Preprocessor,
    accelerator,
    recipe: FineTuning,
    trust_remote_code: bool,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The classifier, or one with adapters, on the device; and AdamW with a learning rate for each of its layers."""
    device = accelerator.device
    with accelerator.local_main_process_first():  # which downloads it
        model = new_classifier(
            name=name,
            class_names=class_names,
            image_size=preprocessor.image_size,
            drop_path_rate=recipe.drop_path_rate,
            trust_remote_code=trust_remote_code,
        ).to(device)
    freeze_unused(model, torch.zeros(2, preprocessor.num_channels, *preprocessor.image_size, device=device))
    if recipe.lora_rank:
        model = with_adapters(model, recipe.lora_rank)
    groups = layer_groups(model, recipe.weight_decay, recipe.layer_decay)
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


class _Report:
    """Loss and speed while training."""

    def __init__(self, num_steps: int, batch_size: int, is_main: bool):
        self.num_steps, self.batch_size, self.loss, self.seconds = num_steps, batch_size, 0.0, 0.0
        self.began = time.perf_counter()
        self.bar = progress_bar(description="fine-tuning", total=num_steps, unit="steps", is_shown=is_main, lines=True)

    def __call__(self, step: int, epoch: int, loss: float):
        self.loss, self.seconds = loss, time.perf_counter() - self.began
        speed = step * self.batch_size / self.seconds
        self.bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}, {speed:.0f} images/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if step == self.num_steps:
            self.bar.close()

    def facts(self) -> dict:
        speed = self.num_steps * self.batch_size / self.seconds
        return {"final_loss": self.loss, "train_seconds": self.seconds, "images_per_second": speed}


class FineTune(Protocol):
    """The whole encoder, fine-tuned; leaves the model in a folder of its own."""

    name, rank = "finetune", 0

    def check(self, setup: Setup, entry: Entry):
        folder = tuned_folder(setup, entry)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; give another --output_dir, or remove it")
        if setup.fine_tuning.lora_rank and not is_peft_available():
            raise ValueError(f"lora_rank needs a package that is not installed: {INSTALL.format('lora')}")
        classifier_class(entry.path, setup.settings.trust_remote_code)
        layer_groups(entry.encoder.model, setup.fine_tuning.weight_decay, setup.fine_tuning.layer_decay)

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        settings, folder = setup.settings, tuned_folder(setup, entry)
        model, facts = finetune(
            name=entry.path,
            train=setup.data.train,
            class_names=setup.data.class_names,
            preprocessor=entry.preprocessor,
            accelerator=setup.accelerator,
            output_dir=folder,
            recipe=setup.fine_tuning,
            seed=settings.seed,
            num_workers=settings.dataloader_num_workers,
            trust_remote_code=settings.trust_remote_code,
        )
        with setup.accelerator.autocast():
            predictions = class_predictions(
                model=model,
                preprocessor=entry.preprocessor,
                split=setup.data.test,
                extractor=setup.extractor,
                description=f"{entry.name}: fine-tuned",
            )
        return None if predictions is None else {**setup.score(predictions), "folder": str(folder), **facts}

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        return {"fine-tuned": Measure(figures["accuracy"], figures["interval"])}


def tuned_folder(setup: Setup, entry: Entry) -> Path:
    """Where the fine-tuned model goes."""
    return setup.output_dir / "finetuned" / file_name(entry.name)
