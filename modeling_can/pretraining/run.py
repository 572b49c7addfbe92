"""The parts of a run, which the loop and its results share."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import ViTImageProcessor

from ..data import ImageSource
from ..hub.push import Push
from .builders import Trained
from .checkpoints import Checkpoints
from .feed import Feed
from .plan import Plan
from .probing import Probing
from .recipe import Recipe
from .run_log import RunLog
from .step import TrainStep
from .stopping import StopSignals


__all__ = ["Run"]


@dataclass
class Run:
    """The parts of a run on this process, each the owner of what it changes."""

    recipe: Recipe
    command: list[str]
    accelerator: Accelerator
    compiled: str | None
    source: ImageSource
    feed: Feed
    plan: Plan
    trained: Trained
    train_step: TrainStep
    checkpoints: Checkpoints
    log: RunLog
    probing: Probing
    processor: ViTImageProcessor
    stop: StopSignals
    push: Push | None  # on the main process
    facts: dict  # machine, versions and commit, as they are when the run begins

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output_dir)
