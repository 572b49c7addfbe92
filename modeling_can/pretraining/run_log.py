"""What a run tells of itself: averages, metrics.jsonl, bar or lines, trackers, images, findings, and the clock."""

import contextlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..averages import MetricAverage
from ..evaluation.encoders import feature_maps
from ..files import write
from ..modeling_can import CANForPreTraining
from ..optimization import NonFiniteGuard
from ..plots import displayed, feature_sheet, reconstruction_sheet, true_colors
from ..progress import duration, progress_bar, tell
from ..random_state import interlude
from .feed import Feed
from .health import TERMS, embedding_health, findings, trivial_losses, verdict
from .plan import Plan
from .probing import START, TRAINED, UNTRAINED
from .recipe import Recipe
from .step import StepOutput, step_metrics


__all__ = ["RunLog", "log_image", "refuse_non_finite"]

_SILENT_SECONDS = 120  # without a line, which are too many


class RunLog:
    """
    Args:
        guard (`NonFiniteGuard`): Of the steps, which it reports here.
        progress (`dict`): What `state_dict` of the run that goes on had given; empty for a new one.

    Attributes:
        lines (`list[dict]`): Those of metrics.jsonl.
        probes (`dict`): Accuracies before and after training, by what was measured.
        num_nonfinite (`int`): Updates that did not take place.
        num_samples (`int`): Images seen, over all processes; a step may have had another number before a resume.
    """

    def __init__(self, recipe: Recipe, plan: Plan, accelerator: Accelerator, guard: NonFiniteGuard, progress: dict):
        self.recipe, self.plan, self.accelerator, self.guard = recipe, plan, accelerator, guard
        self.output_dir, self.is_main = Path(recipe.output_dir), accelerator.is_main_process
        self.average = MetricAverage(lambda tensor: accelerator.reduce(tensor, "mean"))
        self.lines, self.probes = progress.get("metrics", []), progress.get("probe", {})
        self.num_nonfinite = progress.get("nonfinite", 0)
        self.num_samples = progress.get("num_samples", progress.get("step", 0) * plan.global_batch_size)
        self._seconds_before = progress.get("train_seconds", 0.0)
        self._known_findings, self.bar, self._file, self._started = set(), None, None, None

    def state_dict(self) -> dict:
        """What `progress` is; a checkpoint keeps that of the main process."""
        state = {"metrics": self.lines, "probe": self.probes, "nonfinite": self.num_nonfinite}
        return state | {"train_seconds": self.train_seconds, "num_samples": self.num_samples}

    # --- Files, trackers and the bar ---------------------------------------------------------------------------------

    def open_trackers(self, first_step: int):
        settings = self.recipe.to_dict()
        self.accelerator.init_trackers(
            self.output_dir.resolve().name,
            {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()},
            {"tensorboard": {"purge_step": first_step + 1}},  # what came after the checkpoint is repeated
        )

    def open_files(self):
        if self.is_main:
            path, text = self.output_dir / "recipe.yaml", self.recipe.to_yaml()
            if path.exists() and not self.recipe.chosen:  # a run that goes on: the reasons of its choices stay
                lines = path.read_text().splitlines(keepends=True)
                text = "".join(itertools.takewhile(lambda line: line.startswith("#"), lines)) + text
            write(path, text)
            self._file = open(self.output_dir / "metrics.jsonl", "w")
            self._file.writelines(json.dumps(line) + "\n" for line in self.lines)

    def close(self):
        if self._file:
            self._file.close()

    def steps(self, first_step: int) -> Iterator[int]:
        """The steps that are to be done, 0-based, along a bar where there is a terminal; starts the clock."""
        self._logged_step, self._logged_at = first_step, time.perf_counter()
        self._started = self._logged_at
        steps, total = range(first_step, self.plan.max_steps), self.plan.max_steps
        self.bar = progress_bar(steps, "pre-training", total, initial=first_step, unit="steps", is_shown=self.is_main)
        for step in self.bar:
            began = time.perf_counter()
            yield step
            if step == first_step + 1:  # the first one compiles
                self._tell_early(step + 1, time.perf_counter() - began)
        self._seconds_before, self._started = self.train_seconds, None

    def _tell_early(self, step: int, seconds: float):
        """What is left by one step, where no bar says it and the first line of the log is minutes away."""
        next_line = min(self.recipe.logging_steps * (step // self.recipe.logging_steps + 1), self.plan.max_steps)
        if self.is_main and self.bar.disable and (next_line - step) * seconds > _SILENT_SECONDS:
            left = duration((self.plan.max_steps - step) * seconds)
            tell(f"step {step} of {self.plan.max_steps} took {seconds:.3g} s, so that about {left} are left")

    @property
    def train_seconds(self) -> float:
        """Of all of the run, without probes and images; those of this process's clock."""
        running = self._started and time.perf_counter() - self._started
        return self._seconds_before + (running or 0.0)

    @contextlib.contextmanager
    def paused(self):
        """Around probes and images: their time does not count in the speed."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if self._started is not None:
            self._logged_at, self._started = self._logged_at + seconds, self._started + seconds

    # --- Lines -------------------------------------------------------------------------------------------------------

    def update(self, output: StepOutput):
        """Called after every step; does not wait for the device."""
        self.num_samples += self.plan.global_batch_size
        self.average.update(step_metrics(output.terms, self.recipe.config, output.grad_norm), output.finite)

    def log(self, step: int, output: StepOutput, feed: Feed, measure: Callable[[], float] | None = None):
        """
        After so many steps; called by all processes. Waits for the device.

        Args:
            measure (callable, *optional*): Gives the k-NN accuracy, alike on all processes.
        """
        self.report_nonfinite()
        averages = self.average.compute()
        refuse_non_finite(step, averages, self.recipe.on_nonfinite)
        now = time.perf_counter()
        line = {"step": step, **averages}
        line |= {
            "learning_rate": self.plan.learning_rate(step - 1),
            "images_per_second": (step - self._logged_step) * self.plan.global_batch_size / (now - self._logged_at),
            "data_wait": feed.wait.seconds() / (now - self._logged_at),
            "num_bad": feed.bad.total(),
            "num_nonfinite": self.num_nonfinite,
        }
        embeds = output.terms.get("image_embeds")
        if embeds is not None and len(embeds) > 1 and embeds.isfinite().all():
            line |= embedding_health(embeds)
        trivial = trivial_losses(self.recipe.config, feed.pixel_values, self.plan.num_contrasted)
        line |= {f"{term}_trivial": value for term, value in trivial.items()}
        line = {name: value for name, value in line.items() if math.isfinite(value)}  # of a step that was left out
        self._logged_at, self._logged_step = now, step
        if measure:
            with self.paused():
                line["knn"] = measure()
        self.lines.append(line)
        found = self._judge(findings)
        line["health"] = list(found.values())
        if self.is_main:
            self._tell(line, feed.bad, self.verdict() if found.keys() != self._known_findings else None)
        self._known_findings = set(found)

    def _tell(self, line: dict, bad: Counter, sentences: list[str] | None):
        step, max_steps = line["step"], self.plan.max_steps
        text = _progress_text(line, bad, self.probes.get(START))
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            seconds_left = (max_steps - step) * self.plan.global_batch_size / line["images_per_second"]
            tell(f"step {step} of {max_steps}: {text}, {duration(seconds_left)} left")
        health = sentences and "; ".join(sentences)
        if health:
            tell(f"step {step}, health: {health}")
        numbers = {name: value for name, value in line.items() if name not in ("step", "health")}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self.accelerator.log(numbers | ({"health": health} if health else {}), step)
        except OSError as error:  # a full disk ends no run: the lines are in the checkpoints as well
            tell(f"step {step} could not be logged: {error}")

    def report_nonfinite(self):
        """Counts and tells updates that did not take place, or ends the run, as the recipe says."""
        sentences = self.guard.report()
        self.num_nonfinite += len(sentences)
        if sentences and self.recipe.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{sentences[0]}. Lower base_learning_rate, set max_grad_norm, look "
                "at the images, or go on without such steps: --on_nonfinite skip"
            )
        for sentence in sentences:
            tell(f"process {self.accelerator.process_index}: {sentence}")

    # --- Judgment ----------------------------------------------------------------------------------------------------

    def verdict(self) -> list[str]:
        return self._judge(verdict)

    def _judge(self, judge):
        before = [(name, self.probes[name]["knn"]) for name in (UNTRAINED, START) if self.probes.get(name)]
        lines, after = self.lines, self.probes.get(TRAINED)
        if after:
            lines = [*lines[:-1], {**lines[-1], "knn": after["knn"]}]
        return judge(lines, self.plan.frozen_steps + self.plan.warmup_steps, self.plan.max_steps, *before)

    @property
    def best(self) -> dict | None:
        """The line with the highest k-NN accuracy, the first of several."""
        return max((line for line in self.lines if "knn" in line), key=lambda line: line["knn"], default=None)

    # --- Images ------------------------------------------------------------------------------------------------------

    def draw(self, step: int, whole: CANForPreTraining | None, pixel_values: torch.Tensor):
        """
        What the model reconstructs and what its features tell apart by now, into the folder and the trackers.

        Args:
            whole (`CANForPreTraining`, *optional*): `None` on the other processes.
            pixel_values (`torch.Tensor` of shape `(batch_size, num_views, num_channels, height, width)`): Normalized.
        """
        if whole is None or not self.is_main:
            return
        pixels, mean, std = pixel_values[:6, 0], self.recipe.image_mean, self.recipe.image_std
        channels = self.recipe.display_channels
        drawn = {name: self.output_dir / "figures" / f"{name}.png" for name in ("reconstructions", "features")}
        whole.eval()
        try:
            with interlude():
                if self.recipe.config.uses_decoder:
                    reconstruction_sheet(
                        model=whole,
                        pixel_values=pixels,
                        mean=mean,
                        std=std,
                        path=drawn["reconstructions"],
                        channels=channels,
                    )
                else:
                    del drawn["reconstructions"]
                images = displayed(true_colors(pixels, mean, std), channels)
                feature_sheet(images, *feature_maps(whole.can, pixels), drawn["features"])
            for name, path in drawn.items():
                image = np.asarray(Image.open(path).convert("RGB"))
                for tracker in self.accelerator.trackers:
                    log_image(tracker, name, image, step)
        except OSError as error:
            tell(f"the images of step {step} could not be drawn: {error}")
        finally:
            whole.train()


def log_image(tracker: GeneralTracker, name: str, image: np.ndarray, step: int):
    """
    To one of accelerate's trackers, in the form that it takes. Comet, DVCLive and MLflow take none from accelerate.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8.
    """
    if tracker.name == "tensorboard":
        tracker.log_images({name: image[None]}, step, dataformats="NHWC")
    elif tracker.name == "trackio":  # no `log_images`; accelerate hands on what `trackio.log` takes
        import trackio

        tracker.log({name: trackio.Image(image)}, step)
    elif tracker.name in ("aim", "clearml"):  # one image a name
        tracker.log_images({name: image}, step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step)


def refuse_non_finite(step: int, averages: dict[str, float], on_nonfinite: str):
    """Raises FloatingPointError on all processes, as averages are alike there; those of left-out steps are NaN."""
    bad = [name for name, value in averages.items() if not math.isfinite(value)]
    if bad and on_nonfinite == "stop":
        raise FloatingPointError(
            f"{', '.join(bad)} not finite by step {step}: "
            + ", ".join(f"{name} {value}" for name, value in averages.items() if name.endswith("loss"))
            + "; lower base_learning_rate, set max_grad_norm, or look at the last images"
        )


def _progress_text(line: dict, bad: Counter, start: dict | None) -> str:
    terms = [f"{short} {line[f'{term}_loss']:.4g}" for term, short in TERMS.items() if f"{term}_loss" in line]
    text = f"{' '.join(terms)}, {line['images_per_second']:.0f} images/s, {line['data_wait']:.0%} waiting for data"
    if "knn" in line:
        text += f", k-NN {100 * line['knn']:.1f} %" + (f" (the start: {100 * start['knn']:.1f} %)" if start else "")
    return text + "".join(f", {count} {reason}" for reason, count in bad.most_common())
