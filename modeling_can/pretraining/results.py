"""What a run says before it begins, and leaves at its end: model, card, figures, results.json, the Hub."""

import json
import math
import time
from functools import partial
from pathlib import Path

from ..conversion.export import export_kind
from ..data.folders import SAMPLE_DATA
from ..evaluation.processes import end_training
from ..files import write
from ..hub import write_card
from ..hub.push import LAST_CHECKPOINT, WAIT_SECONDS, unfinished_card
from ..plots import curves
from ..progress import duration, quiet, tell
from .checkpoints import whole_state
from .cost import peak_memory, training_flops
from .feed import reasons
from .health import reachable_gain
from .probing import TRAINED
from .recipe import Recipe
from .run import Run
from .run_folder import save_model
from .stopping import StopSignals


__all__ = ["finish", "noise_limit", "push_unfinished", "tell_plan"]


def tell_plan(run: Run):
    """Size, length and learning rate, and what the user should know of them."""
    if not run.is_main:
        return
    recipe, plan, frozen = run.recipe, run.plan, run.trained.frozen
    tell(
        f"{run.trained.num_parameters / 1e6:.2f} M parameters; {plan.num_images or 'unknown number of'} images from "
        f"{run.source.name}; {plan.max_steps} steps of {plan.global_batch_size} on {run.accelerator.num_processes} "
        f"process(es), {run.accelerator.device}; learning rate {plan.peak_learning_rate:.3g} after "
        f"{plan.warmup_steps} steps of warm-up"
        + (f"; frozen, because nothing trains them: {', '.join(frozen)}" if frozen else "")
    )
    if limit := noise_limit(recipe):
        tell(limit)
    if run.compiled:
        tell(f"the first step compiles (torch_compile: {run.compiled}), which takes seconds to a minute")
    if plan.num_images and plan.num_images < plan.num_contrasted and recipe.config.contrastive_loss_weight > 0:
        tell(
            f"of {plan.num_contrasted} images that are contrasted only {plan.num_images} can differ, and the same "
            "image counts as its own negative; lower per_device_train_batch_size"
        )


def noise_limit(recipe: Recipe) -> str | None:
    """
    By how much the noise can be weakened at most, and what this run can change about it: its encoder and its patches
    are those of the weights that it begins with. `None` where the widths set no limit, or noise is not predicted.
    """
    config = recipe.config
    if config.denoising_loss_weight == 0 or math.isinf(gain := reachable_gain(config)):
        return None
    widths = {name: getattr(config, name) for name in ("hidden_size", "decoder_hidden_size")}
    narrow = [name for name, width in widths.items() if width < config.pixels_per_patch]
    if not recipe.model_name_or_path:
        for_more = f"for more, lower patch_size, or raise {' and '.join(narrow)}; "
    else:
        for_more = "for more, raise decoder_hidden_size; " * (config.decoder_hidden_size < config.hidden_size)
    return (
        f"the noise can be weakened by {gain:.1f} dB at most: "
        + " and ".join(f"{name}={widths[name]}" for name in narrow)
        + f" {'is' if len(narrow) == 1 else 'are'} narrower than the {config.pixels_per_patch} values of a patch; "
        f"{for_more}denoising_loss_weight 0 leaves the term out"
    )


def finish(run: Run, began: float) -> dict:
    """
    Called by all processes; returns what `results.json` holds, whole on the main process.

    Args:
        began (`float`): When, by `time.perf_counter`.
    """
    recipe, log, accelerator = run.recipe, run.log, run.accelerator
    weights, _ = whole_state(run.trained.model)
    results = _facts(run)
    if run.is_main:  # first: nothing that follows may cost the weights
        save_model(
            run.output_dir,
            partial(run.trained.bare.save_pretrained, state_dict=weights),
            run.processor.save_pretrained,
        )
        log.close()
    if recipe.probe_dataset_name:
        if run.is_main:
            tell("measuring the trained encoder: k-NN and linear probe ...")
        log.probes[TRAINED] = run.probing.encoder()
        results["probe"] = log.probes
    whole = run.trained.in_one_piece()
    if run.is_main:
        results |= _outcome(run, began)
        log.draw(run.plan.max_steps, whole, run.feed.pixel_values)
        curves(log.lines, run.output_dir / "figures" / "curves.png")
        repo_id = recipe.repo_id if recipe.push_to_hub else None
        write_card(run.output_dir, recipe.to_dict(), recipe.config, results, repo_id=repo_id)
        _write(run.output_dir, results)  # last: it marks the run as finished
        _tell_summary(run.output_dir, recipe, results)
    accelerator.wait_for_everyone()
    end_training(accelerator)
    if run.push:  # the other processes need not wait for it
        results["hub"] = _push_finished(run)
        _write(run.output_dir, results)
    return results


def _facts(run: Run) -> dict:
    plan = run.plan
    return {
        "command": run.command,
        "seed": run.recipe.seed,
        "num_images": plan.num_images,
        "left_out": run.source.left_out,
        "num_parameters": run.trained.num_parameters,
        "frozen": run.trained.frozen,
        "num_processes": run.accelerator.num_processes,
        "global_batch_size": plan.global_batch_size,
        "num_steps": plan.max_steps,
        "warmup_steps": plan.warmup_steps,
        "learning_rate": plan.peak_learning_rate,
        "mixed_precision": run.accelerator.mixed_precision,
        "compiled": run.compiled,
        **run.facts,
    }


def _outcome(run: Run, began: float) -> dict:
    lines, best, num_samples = run.log.lines, run.log.best, run.log.num_samples
    flops = training_flops(run.recipe.config, run.recipe.num_views)
    outcome = {
        "flops_per_image": flops,
        "train_flops": flops * num_samples,
        "final_losses": {name: lines[-1][name] for name in lines[-1] if name.endswith("loss")},
        "health": run.log.verdict(),
        "images_per_second": num_samples / run.log.train_seconds,
        "data_wait": sum(line["data_wait"] for line in lines) / len(lines),
        "peak_memory": peak_memory(run.accelerator.device),
        "bad_samples": dict(reasons(run.feed.bad_sample_log)),
        "nonfinite_steps": run.log.num_nonfinite,
        "train_seconds": run.log.train_seconds,
        "total_seconds": time.perf_counter() - began,
    }
    return outcome | ({"best_probe": {"step": best["step"], "knn": best["knn"]}} if best else {})


def _write(output_dir: Path, results: dict):
    write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")


# --- The Hub ---------------------------------------------------------------------------------------------------------


def push_unfinished(run: Run, step: int, saved: Path):
    """The model as a checkpoint has it, in a form that can be loaded, to the Hub; on the main process."""
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.flush()
    also = {"model.safetensors": saved / "model.safetensors"}
    if run.recipe.hub_strategy == "checkpoint":
        also[LAST_CHECKPOINT] = saved
    run.push.hand_over(f"Training in progress, step {step}", partial(_fill_snapshot, run, step), also)


def _fill_snapshot(run: Run, step: int, snapshot: Path):
    with quiet():
        run.trained.bare.save_pretrained(snapshot, state_dict={})  # all but the weights, which the checkpoint has
    run.processor.save_pretrained(snapshot)
    name = run.recipe.repo_id.split("/")[-1]
    write(snapshot / "README.md", unfinished_card(name, step, run.plan.max_steps))


def _push_finished(run: Run) -> dict:
    push = run.push
    newest = run.recipe.hub_strategy == "checkpoint" and run.checkpoints.find("latest")
    push.hand_over(f"End of training, step {run.plan.max_steps}", also={LAST_CHECKPOINT: newest} if newest else None)
    tell(f"\nwaiting for the upload to {push.repo_id}, at most {duration(WAIT_SECONDS)}; Ctrl-C gives it up")
    with StopSignals(None, run.accelerator.device) as stop:
        answer = push.finish(WAIT_SECONDS, stop.wanted)
    if push.error:
        tell(f"the upload to {push.repo_id} failed: {push.error}\nTo upload the same later:\n  {push.command()}")
    else:
        tell(f"uploaded to {push.repo_id}, commit {push.commit}")
    return answer


# --- The summary -----------------------------------------------------------------------------------------------------


def _tell_summary(output_dir: Path, recipe: Recipe, results: dict):
    if "probe" in results:
        tell(f"\nAccuracy on the test images of {recipe.probe_dataset_name}:")
        tell(f"{'%':32}{'k-NN':>8}{'linear probe':>15}")
        for name, accuracy in results["probe"].items():
            tell(f"{name:32}{100 * accuracy['knn']:8.1f}{100 * accuracy['linear_probe']:15.1f}")
    tell("\n" + "\n".join(results["health"]))
    figures = [f"{name}.png" for name in ("curves", "features", "reconstructions")]
    kind = export_kind(recipe.config)
    figures = [name for name in figures if (output_dir / "figures" / name).exists()]
    has_demo = "reconstructions.png" in figures and not recipe.reads_arrays
    tell(
        f"\n{results['num_steps']} steps in {results['train_seconds']:.0f} s of training "
        f"({results['images_per_second']:.0f} images/s, {results['data_wait']:.0%} of the time waiting for data), "
        f"{results['total_seconds']:.0f} s since the start. Model, card and figures: {output_dir}\n\n"
        "Next:\n"
        f"  look at it              {output_dir}/figures/{', '.join(figures)}"
        f"{f'; modeling-can demo --model_name_or_path {output_dir}' * has_demo}\n"
        f"  measure it              modeling-can eval --model_name_or_path {output_dir} --dataset_name LABELED_SET\n"
        f"  export it               modeling-can convert {output_dir} --to {kind} {output_dir}-{kind}\n"
        f"  use it                  AutoModel.from_pretrained({str(output_dir)!r}) after `import modeling_can`"
    )
    if recipe.dataset_name == SAMPLE_DATA:
        tell(
            "  your own images         modeling-can pretrain --data_dir FOLDER --output_dir out/mine\n"
            "  a full-size encoder     accelerate launch -m modeling_can pretrain "
            "can-vit-base-patch16-224 --data_dir FOLDER"
        )
