"""Does it work, what does it cost? Asked before a run, in the way of the loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..losses import contrastive_loss
from ..plots import reconstruction_sheet
from ..progress import duration, tell
from ..random_state import interlude
from .builders import Trained
from .checks import (
    check_disk,
    check_gradients,
    check_optimizer,
    check_pixels,
    check_positions,
    check_positives,
    check_shared_memory,
)
from .cost import peak_memory
from .feed import Feed
from .recipe import Recipe
from .step import TrainStep, total_norm
from .stopping import StopSignals


__all__ = ["Preflight"]


@dataclass
class Preflight:
    """
    Looks at real batches, model and machine, and prints a line for each check, estimates and a verdict.

    Args:
        num_steps (`int`): That the run has before it.
    """

    recipe: Recipe
    accelerator: Accelerator
    feed: Feed
    trained: Trained
    train_step: TrainStep
    stop: StopSignals
    num_steps: int

    def __call__(self) -> bool:
        """Whether all is well, alike on all processes. Leaves an image in the folder."""
        micro_batches, images = self._next_step()
        few = [make()["pixel_values"][:16] for make in micro_batches]
        seconds = self._backward_seconds(few)
        pixel_values = torch.cat(few)
        checks = self._checks(pixel_values, len(images))
        self.trained.optimizer.zero_grad()
        seconds, how = self._step_seconds(seconds, len(pixel_values), micro_batches, images)
        whole = self.trained.in_one_piece()
        failures = [(self.accelerator.process_index, name, text) for name, text in checks.items() if text]
        failures = gather_object(failures)
        if self.accelerator.is_main_process:
            image = Path(self.recipe.output_dir) / "figures" / "preflight.png"
            mean, std = self.recipe.image_mean, self.recipe.image_std
            with interlude():
                reconstruction_sheet(
                    model=whole.eval(),
                    pixel_values=pixel_values[:4].flatten(0, 1),
                    mean=mean,
                    std=std,
                    path=image,
                    channels=self.recipe.display_channels,
                )
            self._tell(
                checks=checks,
                failures=failures,
                seconds=seconds,
                how=how,
                images_per_step=len(images) * self.accelerator.num_processes,
                image=image,
            )
        return not failures

    def _next_step(self) -> tuple[list, list[str]]:
        return self.feed.next_step(self.recipe.gradient_accumulation_steps, self.stop)

    def _timed(self, function: Callable, *arguments) -> float:
        began = time.perf_counter()
        function(*arguments)
        self.accelerator.wait_for_everyone()
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    def _backward_seconds(self, few: list[torch.Tensor]) -> float:
        """Of forward and backward of some images; leaves a gradient in all parameters that get one."""
        model, optimizer = self.trained.bare.train(), self.trained.optimizer
        micro_batches = [lambda pixels=pixels: {"pixel_values": pixels} for pixels in few]
        if self.recipe.config.has_noise_head:  # which starts at zero, and then passes no gradient on
            torch.nn.init.normal_(model.decoder.noise_head.weight, std=1e-3)
        with interlude():  # uncompiled: these are other shapes than those of the run
            self._timed(self.train_step.backward, micro_batches)  # allocates
            optimizer.zero_grad()
            seconds = self._timed(self.train_step.backward, micro_batches)
            optimizer.zero_grad()
            model.eval()  # a dropped path gives its block no gradient
            self.train_step.backward(micro_batches)
            model.train()
        return seconds

    def _checks(self, pixel_values: torch.Tensor, num_images: int) -> dict[str, str | None]:
        """By name, `None` or what is wrong."""
        recipe, model = self.recipe, self.trained.bare
        batch_bytes = num_images // recipe.gradient_accumulation_steps * pixel_values[0].numel()
        batch_bytes *= 4 if recipe.reads_arrays else 1  # fp32 or uint8
        num_workers = 0 if self.feed.resident else self.feed.loader.num_workers  # else only boxes are handed over
        num_checkpoints = recipe.save_total_limit + bool(recipe.probe_every)
        checks = {
            "pixels are normalized, views differ": check_pixels(pixel_values),
            "every parameter gets a gradient": check_gradients(model, total_norm),
            "every parameter is in the optimizer": check_optimizer(model, self.trained.optimizer),
            "patches know their places": check_positions(model),
            "the disk has room for checkpoints": check_disk(
                Path(recipe.output_dir), num_checkpoints, model.parameters()
            ),
            "shared memory has room for batches": check_shared_memory(num_workers, batch_bytes),
        }
        if recipe.config.contrastive_loss_weight > 0:
            checks["positives are matched, on all processes"] = check_positives(
                contrastive_loss=contrastive_loss,
                batch_size=8,
                width=recipe.config.projection_size,
                process=self.accelerator.process_index,
                device=self.accelerator.device,
            )
        return checks

    def _step_seconds(
        self, seconds: float, num_timed: int, micro_batches: list, images: list[str]
    ) -> tuple[float, str]:
        """Of a step, measured where that takes but some seconds; and how. All processes take as many steps."""
        seconds *= len(images) / num_timed
        device = self.accelerator.device
        seconds = self.accelerator.reduce(torch.tensor(seconds, device=device), "mean").item()
        if seconds >= 8:
            return seconds, f"estimated from {num_timed} images a process"
        self.train_step(0, micro_batches, images)
        num_steps, waited, began = max(1, min(10, int(15 / seconds))), 0.0, time.perf_counter()
        for step in range(num_steps):
            fetched_at = time.perf_counter()
            micro_batches, images = self._next_step()
            waited += time.perf_counter() - fetched_at
            self._timed(self.train_step, step, micro_batches, images)
        seconds = (time.perf_counter() - began) / num_steps
        share = waited / num_steps / seconds
        return seconds, f"measured over {num_steps} steps, {share:.0%} of the time waiting for data"

    def _tell(self, checks: dict, failures: list, seconds: float, how: str, images_per_step: int, image: Path):
        memory = f"{peak_memory(self.accelerator.device) / 1e9:.1f}"
        if self.accelerator.device.type == "cuda":
            memory += f" of {torch.cuda.mem_get_info()[1] / 1e9:.0f}"
        failed = [name for _, name, _ in failures]
        for name in checks:
            tell(f"  {'FAIL' if name in failed else 'ok  '}  {name}")
        tell(
            f"  speed     {images_per_step / seconds:.4g} images/s ({how})\n"
            f"  memory    {memory} GB a process\n"
            f"  to finish {duration(self.num_steps * seconds)} for {self.num_steps} steps of {images_per_step} "
            "images\n"
            f"  bad       {self.feed.bad.total()} images so far\n"
            f"  figure    {image}: the views of four images, with noise and mask"
        )
        for process, name, text in failures:
            tell(f"  process {process}, {name}: {text}")
        tell(f"preflight: {f'NOT ready, {len(failures)} checks failed' if failures else 'ready'}")
