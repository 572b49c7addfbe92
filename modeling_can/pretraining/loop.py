"""A run: recipe -> source -> model -> loop -> results."""

import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..data import ImageSource, ViewStream, mean_and_std
from ..evaluation.processes import end_training
from ..files import make_folder
from ..former_names import current_names
from ..hub.push import STOP_SECONDS, Push
from ..progress import tell
from ..provenance import run_facts
from ..random_state import rng_state, set_rng_state
from . import results
from .batch_size import measured_batch_size
from .builders import (
    compilation,
    image_processor,
    image_source,
    probe_of,
    processes,
    trained_model,
    view_maker,
)
from .checkpoints import Checkpoints, changed_fields, restore, whole_state
from .choosing import check_open, choose, tell_range, tell_time
from .feed import Feed
from .plan import Plan
from .preflight import Preflight
from .presets import SOURCE, begun
from .probing import Probing
from .recipe import Recipe
from .run import Run
from .run_folder import lock, prepare_folder, refuse_other_run, unlock
from .run_log import RunLog
from .step import TrainStep
from .stopping import StoppedWaiting, StopSignals


__all__ = ["Run", "earlier_augmentation", "run", "train"]


def run(recipe: Recipe, dataset=None, command: list[str] = ()) -> dict:
    """
    Runs a recipe; returns what `results.json` holds. A run that a signal stopped has saved a checkpoint and returns
    `{"stopped_by": name of the signal, "step": ...}`, a preflight `{"ready": bool}`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): Instead of the recipe's source.
        command (`list[str]`): What the user typed, for the card.

    Raises:
        ValueError: for what the user can fix.
        FloatingPointError: if a gradient is not finite, and the recipe says stop.
        OSError: if the images cannot be read, or the model cannot be written into the folder.
        InterruptedError: if a signal came while the run waited for data.
    """
    began, output_dir = time.perf_counter(), Path(recipe.output_dir)
    if dataset is not None:
        recipe = replace(recipe, **dict.fromkeys(SOURCE))
    if recipe.given is not None:
        check_open(recipe)
    finished = None if recipe.overwrite_output_dir else refuse_other_run(recipe, output_dir)  # before it takes time
    if finished:
        return finished

    # --- Processes and folder
    accelerator = processes(recipe)
    is_main = accelerator.is_main_process
    own_folder = lock(output_dir) if is_main and not recipe.preflight else None
    checkpoints = _checkpoints(recipe, accelerator)
    checkpoint = recipe.resume_from_checkpoint and checkpoints.find(recipe.resume_from_checkpoint)
    push = Push(output_dir, recipe.repo_id, recipe.hub_private) if recipe.push_to_hub and is_main else None
    _tell(push and push.check())

    # --- Data
    _tell(is_main and "looking at the images ...")
    source = image_source(recipe, dataset)
    _tell(is_main and source.left_out_line)
    recipe = _settled(recipe, source, accelerator, checkpoint)
    compiled = compilation(recipe, accelerator)
    feed = Feed(recipe, source, accelerator, compiled)
    _tell(is_main and feed.remark)
    probe = probe_of(recipe, accelerator.device) if is_main else None

    # --- Length, model, step
    plan = Plan.of(recipe, source.num_images(), accelerator.num_processes)
    if checkpoint:
        _refuse_shorter(recipe, plan, checkpoint)
    trained = trained_model(recipe, plan, accelerator, compiled, warm=not checkpoint)
    train_step = TrainStep(
        model=trained.model,
        optimizer=trained.optimizer,
        accelerator=accelerator,
        config=recipe.config,
        learning_rate=plan.learning_rate,
        caching=plan.caching,
        max_grad_norm=recipe.max_grad_norm,
    )

    # --- Where the run stands
    weights, shared, own = _where_it_stands(recipe, accelerator, feed, checkpoints=checkpoints, checkpoint=checkpoint)
    progress = shared["progress"]
    parts = Run(
        recipe=recipe,
        command=list(command),
        accelerator=accelerator,
        compiled=compiled,
        source=source,
        feed=feed,
        plan=plan,
        trained=trained,
        train_step=train_step,
        checkpoints=checkpoints,
        log=RunLog(recipe=recipe, plan=plan, accelerator=accelerator, guard=train_step.guard, progress=progress),
        probing=Probing(probe, trained, accelerator, is_warm=bool(recipe.model_name_or_path)),
        processor=image_processor(recipe),
        stop=StopSignals(_sum_over(accelerator), accelerator.device),
        push=push,
        facts=run_facts(accelerator.device, ("torch", "transformers", "accelerate", "datasets")),
    )
    first_step = progress.get("step", 0)
    results.tell_plan(parts)

    # --- Preflight, or the loop and its results
    if not recipe.preflight:
        parts.log.open_trackers(first_step)
    exact = feed.start([process["loader"] for process in own])  # first: starting workers draws a random number
    if checkpoint:
        remarks = _resume(run=parts, first_step=first_step, weights=weights, shared=shared, own=own, exact=exact)
        _tell(is_main and f"resumed from {checkpoint} at step {first_step}; {remarks}")
    del weights, shared, own  # as large as the model and its optimizer once more
    if recipe.preflight:
        return _preflight(parts, plan.max_steps - first_step)
    if recipe.probe_dataset_name and not checkpoint:
        parts.log.probes |= parts.probing.baselines()
    parts.log.open_files()
    found = train(parts, first_step) or results.finish(parts, began)
    if own_folder:
        unlock(own_folder)
    return found


def _settled(recipe: Recipe, source: ImageSource, accelerator: Accelerator, checkpoint: Path | None) -> Recipe:
    """
    The recipe with what only images and device can tell: open choices, the batch size, mean and deviation. A run that
    goes on keeps its own.
    """
    given = recipe.given
    if given is not None:
        recipe = choose(recipe, source, accelerator)
    elif accelerator.is_main_process and not checkpoint and not source.is_remote:  # there, looking would take time
        tell_range(source, recipe)
    known = checkpoint and begun(recipe.resume_from_checkpoint, recipe.output_dir)
    before = yaml.safe_load(known.read_text()) if known else None
    if recipe.per_device_train_batch_size == "auto":
        if before:
            size = before["per_device_train_batch_size"]
        else:
            size = measured_batch_size(recipe, accelerator, source.num_images())
        recipe = replace(recipe, per_device_train_batch_size=size)
    if given is not None:
        tell_time(recipe, source, accelerator)
    if recipe.measure_mean_std:
        if before:
            mean, std = tuple(before["image_mean"]), tuple(before["image_std"])
            _tell(accelerator.is_main_process and f"image_mean and image_std stay those of {known}")
        else:
            _tell(accelerator.is_main_process and "measuring mean and standard deviation of the pixels ...")
            mean, std = mean_and_std(ViewStream(source, view_maker(recipe), max_bad_fraction=1.0))
        recipe = replace(recipe, image_mean=mean, image_std=std, measure_mean_std=False)
    return recipe


def _refuse_shorter(recipe: Recipe, plan: Plan, checkpoint: Path):
    """Raises ValueError where the length, as the user gave it, ends before the checkpoint: images may be gone."""
    if Checkpoints.step(checkpoint) < plan.max_steps:
        return
    length = f"{recipe.length}={getattr(recipe, recipe.length)}"
    if recipe.length != "max_steps":
        length += f", which is {plan.max_steps} steps of {plan.global_batch_size} images,"
    raise ValueError(f"{length} is not beyond {checkpoint}; raise {recipe.length}")


def _where_it_stands(
    recipe: Recipe, accelerator: Accelerator, feed: Feed, checkpoints: Checkpoints, checkpoint: Path | None
) -> tuple[dict, dict, list[dict]]:
    """Prepares the folder; what `Checkpoints.load` gives, or nothing yet."""
    output_dir, is_main = Path(recipe.output_dir), accelerator.is_main_process
    make_folder("output_dir", output_dir)
    (output_dir / "figures").mkdir(exist_ok=True)
    if is_main and not recipe.preflight:
        prepare_folder(output_dir, keep=bool(checkpoint))
    accelerator.wait_for_everyone()  # every process writes its bad images there
    weights, shared, own = checkpoints.load(checkpoint) if checkpoint else ({}, {"progress": {}}, [])
    if checkpoint and is_main:
        feed.cut_bad_sample_log(current_names(shared["progress"])["bad_samples_bytes"])
    if recipe.resume_from_checkpoint and not checkpoint:
        _tell(is_main and f"there is no checkpoint yet in {checkpoints.folder}: the run begins at step 0")
    accelerator.wait_for_everyone()  # until the log of bad samples is cut
    feed.read_bad_sample_log()
    return weights, shared, own


def _preflight(run: Run, num_steps: int) -> dict:
    parts = (run.recipe, run.accelerator, run.feed, run.trained, run.train_step, run.stop)
    is_ready = Preflight(*parts, num_steps)()
    run.feed.close()
    end_training(run.accelerator)
    return {"ready": is_ready}


def train(run: Run, first_step: int) -> dict | None:
    """The loop, from step `first_step` on. Where a signal stops it: what `run` returns."""
    recipe, log, feed = run.recipe, run.log, run.feed
    run.trained.model.train()
    with run.stop:
        for step in log.steps(first_step):
            try:
                micro_batches, images = feed.next_step(run.plan.num_micro_batches, run.stop)
            except StoppedWaiting:
                _stop_waiting(run, step)
            output = run.train_step(step, micro_batches, images)
            log.update(output)

            done, is_last = step + 1, step + 1 == run.plan.max_steps
            probing = recipe.probe_every > 0 and done % recipe.probe_every == 0
            if done % recipe.logging_steps == 0 or probing or is_last:
                log.log(done, output, feed, run.probing.knn if probing else None)

            stopping = run.stop.wanted() and not is_last
            regular = done % recipe.save_steps == 0
            if (stopping or regular or (probing and log.best["step"] == done)) and not is_last:
                _save(run, done, stopping, regular)
            if stopping:
                return _end_early(run, done)
    feed.close()
    run.accelerator.wait_for_everyone()
    return None


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoints(recipe: Recipe, accelerator: Accelerator) -> Checkpoints:
    return Checkpoints(
        Path(recipe.output_dir) / "checkpoints",
        recipe.save_total_limit,
        accelerator.process_index,
        accelerator.num_processes,
        all_agree=partial(_all_agree, accelerator),
    )


def _save(run: Run, step: int, stopping: bool, regular: bool):
    """A checkpoint after so many steps; called by all processes. One that fails ends the run only where it stops."""
    saved = None
    try:
        saved = _checkpoint(run, step)
    except OSError as error:
        if stopping:
            raise
        _tell(run.is_main and f"{error}; training goes on, and tries again at the next one")
    if regular and not stopping:
        with run.log.paused():
            run.log.draw(step, run.trained.in_one_piece(), run.feed.pixel_values)
    if saved and run.push and run.recipe.hub_strategy != "end":
        results.push_unfinished(run, step, saved)


def _checkpoint(run: Run, step: int) -> Path:
    run.log.report_nonfinite()
    weights, optimizer_state = whole_state(run.trained.model, run.trained.optimizer.optimizer)
    own = {"loader": run.feed.state_dict(), "rng": rng_state(), "average": run.log.average.state_dict()}
    progress = {"step": step, "bad_samples_bytes": run.feed.bad_samples_bytes, **run.log.state_dict()}
    shared = {"optimizer": optimizer_state, "progress": progress, "recipe": run.recipe.to_dict()}
    best = run.log.best
    return run.checkpoints.save(step=step, model_state=weights, shared=shared, own=own, best=best and best["step"])


def _resume(run: Run, first_step: int, weights: dict, shared: dict, own: list[dict], exact: bool) -> str:
    """
    Weights, optimizer and random numbers of a checkpoint; returns what is other than it would have been, in words.

    Args:
        weights, shared, own: As of `Checkpoints.load`.
        exact (`bool`): Whether the images are those of the uninterrupted run.
    """
    recipe, accelerator, trained = run.recipe, run.accelerator, run.trained
    changed = changed_fields(recipe, shared, weights, trained.bare)
    restore(trained.model, trained.optimizer.optimizer, weights, shared["optimizer"])
    remarks = [f"settings that changed since: {', '.join(changed)}"] if changed else []
    remarks += _other_step(shared["recipe"], len(own), run.plan.global_batch_size)
    remarks += earlier_augmentation(shared["recipe"])
    if len(own) == accelerator.num_processes:
        mine = own[accelerator.process_index]
        set_rng_state(mine["rng"])
        if not changed:  # losses of other settings have no mean in common, and some terms may be gone
            run.log.average.load_state_dict(mine["average"])
        if not exact:
            remarks.append("weights, optimizer and random numbers are exact, the order of the data is new")
    else:
        # Not the numbers of step 0 again
        set_seed((recipe.seed + 1_000_003 * first_step) % 2**31, device_specific=True)
        remarks.append(
            f"{len(own)} processes began it and {accelerator.num_processes} go on: weights and optimizer are exact, "
            "the order of the data and the random numbers are new"
        )
    return "; ".join(remarks) or "from here on the run is what it would have been without the interruption"


def _other_step(recipe: dict, num_processes: int, batch_size: int) -> list[str]:
    """
    That a step has another number of images than when a checkpoint was written.

    Args:
        recipe (`dict`), num_processes (`int`): The checkpoint's.
        batch_size (`int`): Images of a step now.
    """
    before = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * num_processes
    if before == batch_size:
        return []
    return [
        f"a step has {batch_size} images and had {before}: learning rate, length and the place in the schedule are "
        "those of the new number; to keep them, choose per_device_train_batch_size and gradient_accumulation_steps so "
        f"that a step has {before}"
    ]


def earlier_augmentation(recipe: dict) -> list[str]:
    """What the augmentation of the version that wrote a checkpoint did otherwise; `recipe` is the checkpoint's."""
    remarks = []
    if "data_on_device" not in recipe:
        remarks.append("an earlier version wrote it, whose augmentation drew other random numbers")
    is_jittered = recipe.get("color_jitter_probability", 0) > 0
    if recipe.get("num_channels") == 1 and "pixel_range" not in recipe and is_jittered:
        remarks.append(
            "an earlier version wrote it, which left brightness and contrast of one channel as they are; they change "
            "from here on (color_jitter_probability=0 leaves them)"
        )
    return remarks


# --- Stopping --------------------------------------------------------------------------------------------------------


def _end_early(run: Run, step: int) -> dict:
    """After a signal, and the checkpoint that it asked for."""
    run.log.bar.close()
    run.feed.close()
    number = run.stop.received or signal.SIGTERM  # another process received it
    advice = "repeat the command with --resume_from_checkpoint latest"
    _tell(run.is_main and f"stopped by {number.name} after step {step}; to go on, {advice}")
    if run.push and run.push.finish(STOP_SECONDS)["error"]:
        tell(f"{run.push.repo_id} is not up to date: {run.push.error}. It will be when the run goes on")
    end_training(run.accelerator)
    return {"stopped_by": number.name, "step": step}


def _stop_waiting(run: Run, step: int):
    """After a signal that came while data did not: other processes may wait elsewhere, so that nothing is saved."""
    newest = run.checkpoints.paths()[-1:]
    advice = (
        f"to go on, repeat the command with --resume_from_checkpoint {newest[0]}" if newest else "nothing was saved"
    )
    name = run.stop.received.name
    raise InterruptedError(f"stopped by {name} after step {step}, while the run waited for data; {advice}")


# --- Between processes -----------------------------------------------------------------------------------------------


def _all_agree(accelerator: Accelerator, ok: bool) -> bool:
    return not accelerator.reduce(torch.tensor(float(not ok), device=accelerator.device), "sum").item()


def _sum_over(accelerator: Accelerator):
    return partial(accelerator.reduce, reduction="sum") if accelerator.num_processes > 1 else None


def _tell(text: str | None):
    if text:
        tell(text)
