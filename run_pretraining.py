"""
Pre-trains CAN on images: recipe -> config -> data -> model -> loop -> results.

    python run_pretraining.py                                             # the quickstart, minutes on two CPU cores
    python run_pretraining.py --data_dir ~/photos --max_steps 2000        # its recipe on your own images
    accelerate launch run_pretraining.py model_cards/can-vit-base-patch16-224/recipe.yaml --output_dir out

Every key of a recipe is a flag, and flags count last; `--help` lists them all.
"""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import ViTImageProcessor
from transformers.utils import logging as transformers_logging

from modeling_can import CANForPreTraining
from modeling_can.augmentations import Augmentation
from modeling_can.data import ImageSource, ViewStream, ledger_lines, mean_and_std, resume, view_loader
from modeling_can.evaluation import Probe, raw_pixels
from modeling_can.hub import model_card
from modeling_can.losses import contrastive_loss
from modeling_can.recipe import Recipe, parse_arguments
from modeling_can.rendezvous import INIT_METHOD
from modeling_can.training import (
    Checkpoints,
    MetricAverage,
    NonFiniteGuard,
    StopSignals,
    accumulated_backward,
    cached_backward,
    embedding_spread,
    learning_rate,
    parameter_groups,
    rng_state,
    set_rng_state,
)
from modeling_can.views import TwoViews
from modeling_can.visualization import curves, reconstruction_sheet


QUICKSTART = Path(__file__).parent / "model_cards" / "can-quickstart" / "recipe.yaml"


def main(argv: list[str] | None = None, dataset=None) -> dict:
    """
    Runs a recipe; returns what `results.json` holds. Raises ValueError for what the user can mend.

    Args:
        argv (`list[str]`, *optional*): The command line; that of the process if `None`.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): Instead of the recipe's source.
    """
    started = time.perf_counter()
    recipe = parse_arguments(argv, QUICKSTART, __doc__)
    if dataset is not None:
        recipe = replace(recipe, dataset_name=None, data_dir=None, data_files=None)
    config = recipe.config
    output_dir = Path(recipe.output_dir)
    if not recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        refuse_other_run(output_dir)  # before anything takes time

    # --- Processes ---------------------------------------------------------------------------------------------------
    accelerator = Accelerator(
        mixed_precision=mixed_precision(recipe.mixed_precision),
        # The only buffers are the position tables, the same everywhere: nothing to send around before every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process probes.
            InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(hours=2)),
        ],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    checkpoints = Checkpoints(
        output_dir / "checkpoints",
        recipe.save_total_limit,
        accelerator.process_index,
        accelerator.num_processes,
        all_agree=lambda ok: not accelerator.reduce(torch.tensor(float(not ok), device=device), "sum").item(),
    )
    checkpoint = recipe.resume_from_checkpoint and checkpoints.find(recipe.resume_from_checkpoint)

    # --- Data: the stream is split by process in ViewStream, so its loader is never prepared -------------------------
    source = ImageSource(
        recipe.dataset_name,
        recipe.data_dir,
        recipe.data_files,
        recipe.dataset_split,
        recipe.image_column,
        recipe.streaming,
        dataset,
    )
    make_views = TwoViews(
        config.image_shape,
        config.num_channels,
        recipe.crop_scale,
        recipe.crop_ratio,
        recipe.resample,
        recipe.seed,
        transparent_background=recipe.transparent_background,
        high_bit_depth=recipe.high_bit_depth,
        min_size=config.patch_shape,
    )
    if recipe.measure_mean_std:
        mean, std = mean_and_std(ViewStream(source, make_views, max_bad_fraction=1.0))
        recipe = replace(recipe, image_mean=mean, image_std=std, measure_mean_std=False)
    stream = ViewStream(
        source,
        make_views,
        recipe.seed,
        accelerator.process_index,
        accelerator.num_processes,
        recipe.shuffle_block_size,
        recipe.max_bad_fraction,
        output_dir / "bad_samples.jsonl",
    )
    loader = view_loader(
        stream,
        recipe.per_device_train_batch_size,
        recipe.dataloader_num_workers,
        pin_memory=device.type == "cuda",
    )
    augment = Augmentation(
        recipe.image_mean,
        recipe.image_std,
        recipe.flip_probability,
        recipe.color_jitter,
        recipe.color_jitter_probability,
        recipe.greyscale_probability,
        recipe.blur_probability,
        recipe.blur_sigma,
        blur_kernel_size=max(3, min(config.image_shape) // 10 // 2 * 2 + 1),
        solarize_probability=recipe.solarize_probability,
    ).to(device)
    processor = image_processor(recipe)

    # --- Length and learning rate, derived once ----------------------------------------------------------------------
    num_micro_batches = recipe.gradient_accumulation_steps
    global_batch_size = recipe.per_device_train_batch_size * accelerator.num_processes * num_micro_batches
    num_images = source.num_images()
    max_steps = number_of_steps(recipe, global_batch_size, num_images)
    warmup_steps = round(recipe.warmup_ratio * max_steps)
    peak_learning_rate = recipe.base_learning_rate * global_batch_size / 256

    # --- Model: the same weights on every process, then different noise and masks ------------------------------------
    set_seed(recipe.seed)
    model = CANForPreTraining(config)
    frozen = model.freeze_unused_parameters()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=peak_learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        fused=True,
    )
    model, optimizer = accelerator.prepare(model.to(device), optimizer)
    unwrapped = accelerator.unwrap_model(model)
    set_seed(recipe.seed, device_specific=True)

    # --- What the features are worth before training -----------------------------------------------------------------
    def embed(pixel_values):
        unwrapped.eval()
        features = unwrapped.can(pixel_values.to(device)).pooler_output
        unwrapped.train()
        return features

    if is_main:
        prepare_folder(output_dir, keep=checkpoint is not None)
    accelerator.wait_for_everyone()  # every process writes its bad images there
    average = MetricAverage(lambda tensor: accelerator.reduce(tensor, "mean"))
    progress = {
        "step": 0,
        "metrics": [],
        "probe": {},
        "train_seconds": 0.0,
        "nonfinite": 0,
    }  # what a checkpoint carries on
    if checkpoint:
        weights, shared, own = checkpoints.load(checkpoint)
        progress = shared["progress"]
    elif recipe.resume_from_checkpoint and is_main:
        print(f"there is no checkpoint yet in {checkpoints.folder}: the run begins at step 0")
    probe, probe_results = None, progress["probe"]
    if recipe.probe_dataset_name and is_main:
        probe = Probe(recipe.probe_dataset_name, recipe.image_column, recipe.probe_label_column, processor)
        if not checkpoint:
            probe_results["raw pixels"] = probe.measure(raw_pixels)
            probe_results["untrained encoder"] = probe.measure(embed)

    results = {
        "command": [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)],
        "num_images": num_images,
        "num_parameters": sum(p.numel() for p in unwrapped.parameters()),
        "frozen": frozen,
        "num_processes": accelerator.num_processes,
        "global_batch_size": global_batch_size,
        "num_steps": max_steps,
        "warmup_steps": warmup_steps,
        "learning_rate": peak_learning_rate,
        "mixed_precision": accelerator.mixed_precision,
        "machine": machine(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "kornia")},
        "git_commit": git_commit(),
    }
    if is_main:
        write(output_dir / "recipe.yaml", recipe.to_yaml())
        metrics_file = open(output_dir / "metrics.jsonl", "w")
        metrics_file.writelines(json.dumps(line) + "\n" for line in progress["metrics"])
        print(
            f"{results['num_parameters'] / 1e6:.2f} M parameters; {num_images or 'unknown number of'} images from "
            f"{source.name}; {max_steps} steps of {global_batch_size} on {accelerator.num_processes} process(es), "
            f"{device}; learning rate {peak_learning_rate:.3g} after {warmup_steps} steps of warm-up"
            + (f"; frozen, as their loss weight is 0: {', '.join(frozen)}" if frozen else "")
        )

    # --- Resume: the data first, because starting its workers draws a random number --------------------------------
    first_step, metrics = progress["step"], progress["metrics"]
    bad_samples = reasons(ledger_lines(output_dir / "bad_samples.jsonl") if is_main else [])
    if checkpoint:
        exact = resume(loader, [process["loader"] for process in own])
    batches = iter(loader)
    if checkpoint:
        unwrapped.load_state_dict(weights)
        optimizer.load_state_dict(shared["optimizer"])
        if len(own) == accelerator.num_processes:
            set_rng_state(own[accelerator.process_index]["rng"])
            average.sums, average.num_steps = own[accelerator.process_index]["average"]
        if is_main:
            print(f"resumed from {checkpoint} at step {first_step}; " + (
                "from here on the run is what it would have been without the interruption"
                if exact
                else f"{len(own)} processes began it and {accelerator.num_processes} go on: weights and optimiser are "
                "exact, the order of the data and the random numbers are new"
            ))  # fmt: skip
        if first_step >= max_steps:
            raise ValueError(f"max_steps={max_steps} is not beyond {checkpoint}; give more")

    guard, num_nonfinite = NonFiniteGuard(optimizer.optimizer), progress["nonfinite"]

    def report_nonfinite():
        nonlocal num_nonfinite
        sentences = guard.report()
        num_nonfinite += len(sentences)
        if sentences and recipe.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{sentences[0]}. The weights are those before it. Lower base_learning_rate, set max_grad_norm, look "
                "at the images, or go on without such steps: --on_nonfinite skip"
            )
        for sentence in sentences:
            tqdm.write(f"process {accelerator.process_index}: {sentence}")

    def save(step):
        """After so many steps; called by all processes."""
        report_nonfinite()
        own = {"loader": loader.state_dict(), "rng": rng_state(), "average": (average.sums, average.num_steps)}
        seconds = progress["train_seconds"] + time.perf_counter() - train_started
        shared = {
            "optimizer": optimizer.state_dict(),
            "progress": {
                "step": step,
                "metrics": metrics,
                "probe": probe_results,
                "train_seconds": seconds,
                "nonfinite": num_nonfinite,
            },
        }
        checkpoints.save(step, unwrapped.state_dict(), shared, own)

    # --- The loop ----------------------------------------------------------------------------------------------------
    waited, logged_at, logged_step = 0.0, time.perf_counter(), first_step
    train_started = logged_at
    sum_up = partial(accelerator.reduce, reduction="sum") if accelerator.num_processes > 1 else None
    bar = tqdm(range(first_step, max_steps), "pre-training", max_steps, initial=first_step, disable=not is_main,
               dynamic_ncols=True)  # fmt: skip
    model.train()
    with StopSignals(sum_up, device) as stop:
        for step in bar:
            micro_batches, images = [], []
            for _ in range(num_micro_batches):
                fetched_at = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - fetched_at
                bad_samples.update(batch["bad"])
                images += batch["images"]
                views = batch["views"].to(device, non_blocking=True)
                micro_batches.append(lambda views=views: {"pixel_values": augment(views)})

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, max_steps, warmup_steps, peak_learning_rate)
            no_sync = partial(accelerator.no_sync, model)
            if num_micro_batches > 1 and recipe.gradient_caching and config.contrastive_loss_weight > 0:
                contrast = partial(contrastive_loss, temperature=config.temperature)
                terms = cached_backward(model, micro_batches, accelerator.backward, no_sync, contrast)
            else:
                terms = accumulated_backward(model, micro_batches, accelerator.backward, no_sync)
            if recipe.max_grad_norm > 0:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            else:
                grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            finite = guard.check(step, grad_norm, terms, images)
            optimizer.step()
            optimizer.zero_grad()

            average.update(step_metrics(terms, config, grad_norm), finite)
            if (step + 1) % recipe.logging_steps == 0 or step + 1 == max_steps:
                line = average.compute()  # waits for the device and the other processes
                now = time.perf_counter()
                num_steps, logged_step = step + 1 - logged_step, step + 1
                line |= {
                    "learning_rate": group["lr"],
                    "images_per_second": num_steps * global_batch_size / (now - logged_at),
                    "data_wait": waited / (now - logged_at),
                    "num_bad": bad_samples.total(),
                }
                metrics.append({"step": step + 1, **line})
                waited, logged_at = 0.0, now
                if is_main:
                    metrics_file.write(json.dumps(metrics[-1]) + "\n")
                    metrics_file.flush()
                    bar.set_postfix_str(progress_text(line, bad_samples))
                report_nonfinite()
                refuse_non_finite(metrics[-1])

            stopping = stop.wanted() and step + 1 < max_steps
            if stopping or ((step + 1) % recipe.save_steps == 0 and step + 1 < max_steps):
                try:
                    save(step + 1)
                except OSError as error:
                    if stopping:
                        raise
                    bar.write(f"{error}; training goes on, and tries again in {recipe.save_steps} steps")
            if stopping:
                bar.close()
                number = stop.received or signal.SIGTERM  # another process received it
                if is_main:
                    print(
                        f"stopped by {number.name} after step {step + 1}; go on with --resume_from_checkpoint latest"
                    )
                accelerator.end_training()
                sys.exit(130 if number is signal.SIGINT else 0)
    train_seconds = progress["train_seconds"] + time.perf_counter() - train_started
    accelerator.wait_for_everyone()
    num_bad = reasons(ledger_lines(output_dir / "bad_samples.jsonl"))

    # --- Results -----------------------------------------------------------------------------------------------------
    if is_main:
        metrics_file.close()
        unwrapped.save_pretrained(output_dir)  # first of all: nothing that follows may cost the weights
        processor.save_pretrained(output_dir)
        if probe:
            probe_results["CAN, pre-trained"] = probe.measure(embed)
            results["probe"] = probe_results
        last = metrics[-1]
        results |= {
            "final_losses": {name: last[name] for name in last if name.endswith("loss")},
            "images_per_second": max_steps * global_batch_size / train_seconds,
            "data_wait": sum(line["data_wait"] for line in metrics) / len(metrics),
            "bad_samples": dict(num_bad),
            "nonfinite_steps": num_nonfinite,
            "train_seconds": train_seconds,
            "total_seconds": time.perf_counter() - started,
        }
        save_output(output_dir, recipe, unwrapped.eval(), augment(views[:6])[:, 0], metrics, results)
        print_summary(output_dir, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


# --- Preparation -----------------------------------------------------------------------------------------------------


def refuse_other_run(output_dir: Path):
    for trace, state, choice in (
        ("results.json", "a finished run", ""),
        ("checkpoints/step-*", "an unfinished run", "continue it with --resume_from_checkpoint latest, "),
    ):
        if any(output_dir.glob(trace)):
            raise ValueError(
                f"output_dir={output_dir} already holds {state}; {choice}give another --output_dir, or replace it "
                "with --overwrite_output_dir"
            )


def prepare_folder(output_dir: Path, keep: bool):
    """An empty place, unless a run is resumed: what another run left there would mix with this one's."""
    (output_dir / "figures").mkdir(parents=True, exist_ok=True)
    (output_dir / "results.json").unlink(missing_ok=True)
    if keep:
        return
    shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
    results = ("metrics.jsonl", "bad_samples.jsonl", "README.md", "recipe.yaml")
    for pattern in (*results, "*.safetensors*", "*config.json"):
        for path in output_dir.glob(pattern):
            path.unlink()
    for path in (output_dir / "figures").glob("*.png"):
        path.unlink()


def mixed_precision(choice: str) -> str:
    """bf16 by default on GPUs that have it; never on a CPU, where it can be hundreds of times slower than fp32."""
    if choice == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return choice


def number_of_steps(recipe: Recipe, global_batch_size: int, num_images: int | None) -> int:
    if recipe.max_steps is not None:
        return recipe.max_steps
    num_samples = recipe.num_train_samples
    if recipe.num_train_epochs is not None:
        if num_images is None:
            raise ValueError(
                f"num_train_epochs={recipe.num_train_epochs}, but the source does not tell how many images it has; "
                "use --num_train_samples or --max_steps"
            )
        num_samples = recipe.num_train_epochs * num_images
    return max(1, round(num_samples / global_batch_size))


def image_processor(recipe: Recipe) -> ViTImageProcessor:
    """What prepares an image downstream: the shortest edge to 256/224 of the size, centre crop, the recipe's mean."""
    height, width = recipe.config.image_shape
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no word about torchvision, which this project does without
    processor = ViTImageProcessor(
        do_convert_rgb=recipe.config.num_channels == 3,
        do_resize=True,
        size={"shortest_edge": round(max(height, width) * 256 / 224)},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        image_mean=list(recipe.image_mean),
        image_std=list(recipe.image_std),
        resample={"bilinear": 2, "bicubic": 3}[recipe.resample],
    )
    transformers_logging.set_verbosity(verbosity)
    return processor


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout


# --- Within the loop -------------------------------------------------------------------------------------------------


def reasons(ledger: list[str]) -> Counter:
    return Counter(json.loads(line)["reason"] for line in ledger)


def step_metrics(terms: dict[str, torch.Tensor], config, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
    metrics = {name: value for name, value in terms.items() if name.endswith("loss")}
    metrics["loss"] = sum(getattr(config, f"{name}_weight") * value for name, value in metrics.items())
    metrics["grad_norm"] = grad_norm
    if "image_embeds" in terms:
        metrics["embedding_spread"] = embedding_spread(terms["image_embeds"])
    return metrics


def refuse_non_finite(line: dict):
    bad = [name for name, value in line.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite by step {line['step']}: "
            + ", ".join(f"{name} {value}" for name, value in line.items() if name.endswith("loss"))
            + "; lower base_learning_rate, set max_grad_norm, or look at the last images"
        )


def progress_text(line: dict, num_bad: Counter) -> str:
    names = {"contrastive_loss": "C", "reconstruction_loss": "A", "denoising_loss": "N"}
    terms = [f"{short} {line[name]:.4g}" for name, short in names.items() if name in line]
    text = f"{' '.join(terms)}, {line['images_per_second']:.0f} images/s, {line['data_wait']:.0%} waiting for data"
    return text + "".join(f", {count} {reason}" for reason, count in num_bad.most_common())


# --- Output ----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str):
    """All or nothing: a reader never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def save_output(output_dir, recipe, model, pixel_values, metrics, results):
    """Figures and card; results.json comes last and marks the run as finished."""
    curves(metrics, output_dir / "figures" / "curves.png")
    if model.config.uses_decoder:
        sheet = output_dir / "figures" / "reconstructions.png"
        reconstruction_sheet(model, pixel_values, recipe.image_mean, recipe.image_std, sheet)
    write(output_dir / "README.md", model_card(recipe, results, name=output_dir.resolve().name))
    write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")


def print_summary(output_dir: Path, results: dict):
    if "probe" in results:
        print(f"\n{'accuracy on the test images, %':32}{'k-NN':>8}{'linear probe':>15}")
        for name, accuracy in results["probe"].items():
            print(f"{name:32}{100 * accuracy['knn']:8.1f}{100 * accuracy['linear_probe']:15.1f}")
    print(
        f"\n{results['num_steps']} steps in {results['train_seconds']:.0f} s "
        f"({results['images_per_second']:.0f} images/s, {results['data_wait']:.0%} of the time waiting for data), "
        f"{results['total_seconds']:.0f} s in all. Model, card and figures: {output_dir}\n\n"
        "Next:\n"
        f"  look at                 {output_dir}/figures/reconstructions.png and curves.png\n"
        "  your own images         python run_pretraining.py --data_dir FOLDER --output_dir out-mine\n"
        "  a full-size encoder     accelerate launch run_pretraining.py "
        "model_cards/can-vit-base-patch16-224/recipe.yaml --data_dir FOLDER\n"
        f"  use it                  AutoModel.from_pretrained({str(output_dir)!r}) after `import modeling_can`"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        # Of an error in a loader's worker, what it says, without the traceback that torch puts around it.
        sys.exit(f"run_pretraining.py: {re.split(r'^[A-Za-z]*Error: ', str(error), flags=re.MULTILINE)[-1].strip()}")
    except RuntimeError as error:
        if not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        sys.exit(
            f"run_pretraining.py: another process of this run died, or cannot be reached: {error}\n"
            "Go on with --resume_from_checkpoint latest"
        )
