"""The batches of a run: from the source through views and augmentation onto the device."""

import json
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from ..data import ImageSource, ViewStream, bad_sample_lines
from ..data.loading import Patient, resume, view_loader
from ..data.resident import ResidentLoader, resident_images
from .builders import augmentation, view_maker
from .recipe import Recipe
from .stopping import StopSignals


__all__ = ["DataWait", "Feed", "reasons"]


class Feed:
    """
    The micro-batches of every step, for this process.

    Args:
        source (`ImageSource`): Split by process in `ViewStream`, so that its loader is never prepared by accelerate.
        compiled (`str`, *optional*): As of `builders.compilation`.

    Attributes:
        remark (`str` or `None`): What the user should know of where the images are.
        bad (`Counter`): Bad images by reason, of this process; on the main process also those of before a resume.
        pixel_values (`torch.Tensor` or `None`): The last micro-batch that was made, `(B, views, C, H, W)`.
        wait (`DataWait`): How long the device stood still for want of data.
    """

    def __init__(self, recipe: Recipe, source: ImageSource, accelerator: Accelerator, compiled: str | None):
        self.recipe, self.source, self.device = recipe, source, accelerator.device
        self.is_main = accelerator.is_main_process
        self.bad_sample_log = Path(recipe.output_dir) / "bad_samples.jsonl"
        place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        crops, batch_size, num_workers = (
            view_maker(recipe),
            recipe.per_device_train_batch_size,
            recipe.dataloader_num_workers,
        )
        self.resident, self.remark = resident_images(
            choice=recipe.data_on_device, source=source, crops=crops, device=self.device, num_workers=num_workers
        )
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # of decoding; that of training is reported
        if self.resident:
            self.loader = ResidentLoader(self.resident, crops, batch_size, num_workers, **place)
        else:
            stream = ViewStream(
                source,
                crops,
                recipe.seed,
                block_size=recipe.shuffle_block_size,
                max_bad_fraction=recipe.max_bad_fraction,
                bad_sample_log=None if recipe.preflight else self.bad_sample_log,
                **place,
            )
            pin_memory = self.device.type == "cuda"
            self.loader = view_loader(stream, batch_size, num_workers, pin_memory=pin_memory)
        self.augment = augmentation(recipe).to(self.device)
        if compiled and self.device.type != "cpu":  # where it is slower
            self.augment.compile_transform()
        self.batches, self.pixel_values, self.bad, self.wait = None, None, Counter(), DataWait(self.device)

    def cut_bad_sample_log(self, num_bytes: int):
        """
        Takes back what was written of bad images after a checkpoint; on the main process, before
        `read_bad_sample_log`.
        """
        if self.bad_sample_log.exists() and not self.recipe.preflight:
            os.truncate(self.bad_sample_log, min(num_bytes, self.bad_sample_log.stat().st_size))

    def read_bad_sample_log(self):
        """What is known of bad images; `ValueError` if there are too many among those on the device."""
        own = self.bad_sample_log if self.is_main and not self.recipe.preflight else None
        if self.resident:
            self.resident.log_bad(self.source.name, self.recipe.max_bad_fraction, own)
        self.bad = reasons(self.bad_sample_log) if self.is_main else Counter()
        if self.resident and self.recipe.preflight:
            self.bad.update(reason for reason, _ in self.resident.bad)

    def start(self, states: list[dict] | None = None) -> bool:
        """
        Starts the workers, which draws a random number; from where the `state_dict()` of all processes say. Returns
        whether the images will be exactly those of the uninterrupted run.
        """
        exact = True
        if states:
            exact = self.loader.resume(states) if self.resident else resume(self.loader, states)
        self.batches = iter(self.loader) if self.resident else Patient(self.loader)
        return exact

    def next_step(self, num_micro_batches: int, stop: StopSignals) -> tuple[list, list[str]]:
        """The micro-batches of a step, each a callable that makes the model's inputs; and the names of the images."""
        micro_batches, images = [], []
        for _ in range(num_micro_batches):
            with self.wait, stop.waiting():
                batch = next(self.batches)
            self.bad.update(batch["bad"])
            images += batch["images"]
            views = self.loader.views(batch) if self.resident else batch["views"].to(self.device, non_blocking=True)
            micro_batches.append(partial(self._make_inputs, views))
        return micro_batches, images

    def _make_inputs(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        self.pixel_values = self.augment(views)
        return {"pixel_values": self.pixel_values}

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    @property
    def bad_samples_bytes(self) -> int:
        return self.bad_sample_log.stat().st_size if self.bad_sample_log.exists() else 0

    def close(self):
        """Ends the workers; left to the garbage collector, each would take five seconds."""
        self.batches = self.loader = None


class DataWait:
    """
    How long the device stood still for want of data: on a GPU measured there, because the CPU, which runs ahead, also
    waits for data while the GPU still computes. `with` it around the reading of a batch.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.times = device.type == "cuda", []

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.began = self._now()  # on a GPU: when it is done with all that came before

    def __exit__(self, *_):
        self.times.append((self.began, self._now()))

    def seconds(self) -> float:
        """Since the last call, which waits for the device."""
        times, self.times = self.times, []
        if not self.on_gpu:
            return sum(end - begin for begin, end in times)
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in times) / 1000


def reasons(log: Path) -> Counter:
    return Counter(json.loads(line)["reason"] for line in bad_sample_lines(log))
