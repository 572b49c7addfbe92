"""
Pre-trains CAN on images: recipe -> config -> data -> model -> loop -> results.

    python run_pretraining.py                                             # the quickstart, minutes on two CPU cores
    python run_pretraining.py --data_dir ~/photos --output_dir out/mine   # its recipe on your own images
    accelerate launch run_pretraining.py model_cards/can-vit-base-patch16-224/recipe.yaml --output_dir out

Every key of a recipe is a flag, and flags count last; `--help` lists them all.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, gather_object, set_seed
from PIL import Image
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import ViTImageProcessor
from transformers.utils import logging as transformers_logging

from modeling_can import CANForPreTraining
from modeling_can.augmentations import Augmentation
from modeling_can.configuration_can import EARLIER
from modeling_can.conversion import normalisation, warm_start
from modeling_can.data import ImageSource, ViewStream, ledger_lines, mean_and_std
from modeling_can.diagnostics import (
    TERMS,
    check_disk,
    check_gradients,
    check_optimizer,
    check_pixels,
    check_positions,
    check_positives,
    check_shared_memory,
    duration,
    embedding_health,
    embedding_spread,
    findings,
    peak_memory,
    reachable_gain,
    training_flops,
    trivial_losses,
    verdict,
)
from modeling_can.encoders import Preprocessor
from modeling_can.evaluation import Probe, raw_pixels
from modeling_can.folders import SAMPLE_DATA
from modeling_can.hub import run_facts, write, write_card
from modeling_can.loading import Patient, resume, view_loader
from modeling_can.losses import contrastive_loss
from modeling_can.progress import outlive_full_logs, tell
from modeling_can.push import LAST_CHECKPOINT, STOP_SECONDS, WAIT_SECONDS, Push, unfinished_card
from modeling_can.recipe import LENGTH, SOURCE, Recipe, model_fields, parse_arguments, training_fields
from modeling_can.rendezvous import INIT_METHOD
from modeling_can.resident import ResidentLoader, resident_images
from modeling_can.run_folder import lock, save_model
from modeling_can.training import (
    Checkpoints,
    DataWait,
    MetricAverage,
    NonFiniteGuard,
    StoppedWaiting,
    StopSignals,
    accumulated_backward,
    cached_backward,
    compile_model,
    how_to_compile,
    interlude,
    learning_rate,
    mixed_precision,
    parameter_groups,
    rng_state,
    set_rng_state,
)
from modeling_can.views import RandomCrops
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
        recipe = replace(recipe, **dict.fromkeys(SOURCE))
    config = recipe.config
    output_dir = Path(recipe.output_dir)
    if not recipe.overwrite_output_dir:  # before anything takes time
        finished = refuse_other_run(recipe, output_dir)
        if finished:
            return finished

    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)) != 1:
        raise ValueError(
            "accelerate's own gradient_accumulation_steps would divide the loss once more; give "
            "--gradient_accumulation_steps after the script's name, and 1 in accelerate's configuration"
        )

    # --- Processes ---------------------------------------------------------------------------------------------------
    accelerator = Accelerator(
        mixed_precision=mixed_precision(recipe.mixed_precision),
        log_with=trackers(recipe.log_with),
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "tensorboard")),
        # The only buffers are the position tables, the same everywhere: nothing to send around before every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # The others wait while the main process probes.
            InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=timedelta(hours=2)),
        ],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    own_folder = lock(output_dir) if is_main and not recipe.preflight else None
    compiled = how_to_compile(recipe.torch_compile, device, config.drop_path_rate)
    if compiled == "cudagraph" and (accelerator.num_processes > 1 or device.type != "cuda"):
        raise ValueError(
            f"torch_compile=cudagraph is for one process on a GPU, and this is one of {accelerator.num_processes} on "
            f"{device.type}; set it to model or auto"
        )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")  # the one way that compiling bears
    checkpoints = Checkpoints(
        output_dir / "checkpoints",
        recipe.save_total_limit,
        accelerator.process_index,
        accelerator.num_processes,
        all_agree=lambda ok: not accelerator.reduce(torch.tensor(float(not ok), device=device), "sum").item(),
    )
    checkpoint = recipe.resume_from_checkpoint and checkpoints.find(recipe.resume_from_checkpoint)
    if accelerator.is_fsdp2:
        keep_sharding_exact(accelerator.state.fsdp_plugin)
    push = Push(output_dir, recipe.repo_id, recipe.hub_private) if recipe.push_to_hub and is_main else None
    if push and (remark := push.check()):
        tell(remark)

    # --- Data: the stream is split by process in ViewStream, so its loader is never prepared -------------------------
    source = ImageSource(
        recipe.dataset_name,
        recipe.data_dir,
        recipe.data_files,
        recipe.dataset_split,
        recipe.image_column,
        recipe.streaming,
        dataset,
        config_name=recipe.dataset_config_name,
    )
    if source.left_out_line and is_main:
        tell(source.left_out_line)
    if recipe.measure_mean_std:
        mean, std = mean_and_std(ViewStream(source, view_maker(recipe), max_bad_fraction=1.0))
        recipe = replace(recipe, image_mean=mean, image_std=std, measure_mean_std=False)
    ledger = output_dir / "bad_samples.jsonl"
    stream = ViewStream(
        source,
        view_maker(recipe),
        recipe.seed,
        accelerator.process_index,
        accelerator.num_processes,
        recipe.shuffle_block_size,
        recipe.max_bad_fraction,
        None if recipe.preflight else ledger,
    )
    resident, remark = resident_images(
        recipe.data_on_device, source, view_maker(recipe), device, recipe.dataloader_num_workers
    )
    if remark and is_main:
        tell(remark)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of decoding; that of training is reported
    if resident:
        loader = ResidentLoader(
            resident,
            view_maker(recipe),
            recipe.per_device_train_batch_size,
            recipe.dataloader_num_workers,
            accelerator.process_index,
            accelerator.num_processes,
        )
    else:
        loader = view_loader(
            stream,
            recipe.per_device_train_batch_size,
            recipe.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        )
    augment = augmentation(recipe).to(device)
    processor, probe = image_processor(recipe), None
    if recipe.probe_dataset_name and is_main:
        probe = Probe(
            recipe.probe_dataset_name,
            recipe.probe_dataset_config_name,
            recipe.probe_train_split,
            recipe.probe_test_split,
            recipe.probe_image_column or recipe.image_column,
            recipe.probe_label_column,
            Preprocessor(processor),
            device,
        )

    # --- Length and learning rate, derived once ----------------------------------------------------------------------
    num_micro_batches = recipe.gradient_accumulation_steps
    global_batch_size = recipe.per_device_train_batch_size * accelerator.num_processes * num_micro_batches
    num_images = source.num_images()
    max_steps = number_of_steps(recipe, global_batch_size, num_images)
    warmup_steps = round(recipe.warmup_ratio * max_steps)
    peak_learning_rate = recipe.base_learning_rate * global_batch_size / 256
    if checkpoint and Checkpoints.step(checkpoint) >= max_steps:
        raise ValueError(f"max_steps={max_steps} is not beyond {checkpoint}; give more")

    # --- Model: the same weights on every process, then different noise and masks ------------------------------------
    set_seed(recipe.seed)
    model = CANForPreTraining(config)
    if recipe.model_name_or_path and not checkpoint:
        with accelerator.local_main_process_first():  # which downloads it
            taken, new = warm_start(model, recipe.model_name_or_path)
        if is_main:
            tell(f"taken from {recipe.model_name_or_path}: {', '.join(taken)}; new: {', '.join(new) or 'nothing'}")
            theirs = normalisation(recipe.model_name_or_path)
            if theirs and theirs != (list(recipe.image_mean), list(recipe.image_std)):
                mean, std = (",".join(map(str, numbers)) for numbers in theirs)
                tell(f"its images were normalised otherwise; to do so as well: --image_mean {mean} --image_std {std}")
    frozen = model.freeze_unused_parameters()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_model(model, compiled)
        if device.type != "cpu":  # where it is slower
            augment.compile_transform()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=peak_learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        fused=True,
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    model, optimizer = accelerator.prepare(model.to(device), optimizer)
    unwrapped = accelerator.unwrap_model(model)
    is_sharded = any(isinstance(p, DTensor) for p in unwrapped.parameters())  # FSDP2
    set_seed(recipe.seed, device_specific=True)
    caching = num_micro_batches > 1 and recipe.gradient_caching and config.contrastive_loss_weight > 0
    contrast = partial(contrastive_loss, temperature=config.temperature)
    backward = partial(cached_backward, contrast=contrast) if caching else accumulated_backward

    def forward(**inputs):
        with accelerator.autocast():  # which accelerate puts around a model by itself, but for a sharded one
            return model(**inputs)

    backward = partial(backward, forward, backward=accelerator.backward, no_sync=partial(accelerator.no_sync, model))
    num_contrasted = global_batch_size if caching else global_batch_size // num_micro_batches

    def in_one_piece() -> CANForPreTraining | None:
        """The model for the main process to look at; called by all processes, for each may hold a part of it."""
        if not is_sharded:
            return unwrapped
        weights, _ = whole_state(model)
        if not is_main:
            return None
        with interlude():
            whole = CANForPreTraining(config)
        whole.load_state_dict(weights)
        return whole.to(device)

    # --- The folder, and where the run stands ------------------------------------------------------------------------
    (output_dir / "figures").mkdir(parents=True, exist_ok=True)
    if is_main and not recipe.preflight:
        prepare_folder(output_dir, keep=checkpoint is not None)
    accelerator.wait_for_everyone()  # every process writes its bad images there
    average = MetricAverage(lambda tensor: accelerator.reduce(tensor, "mean"))
    # What a checkpoint carries on, beside weights, optimiser and random numbers
    progress = {"step": 0, "metrics": [], "probe": {}, "train_seconds": 0.0, "nonfinite": 0, "ledger_bytes": 0}
    if checkpoint:
        weights, shared, own = checkpoints.load(checkpoint)
        progress = shared["progress"]
        if is_main and ledger.exists() and not recipe.preflight:
            os.truncate(ledger, min(progress["ledger_bytes"], ledger.stat().st_size))
    elif recipe.resume_from_checkpoint and is_main:
        tell(f"there is no checkpoint yet in {checkpoints.folder}: the run begins at step 0")
    accelerator.wait_for_everyone()  # until the ledger is cut
    first_step, metrics, probe_results = progress["step"], progress["metrics"], progress["probe"]
    if resident:
        resident.log_bad(source.name, recipe.max_bad_fraction, ledger if is_main and not recipe.preflight else None)
    bad_samples = reasons(ledger_lines(ledger) if is_main else [])
    if resident and recipe.preflight:
        bad_samples.update(reason for reason, _ in resident.bad)

    results = {
        "command": [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)],
        "seed": recipe.seed,
        "num_images": num_images,
        "left_out": source.left_out,
        "num_parameters": num_parameters,
        "frozen": frozen,
        "num_processes": accelerator.num_processes,
        "global_batch_size": global_batch_size,
        "num_steps": max_steps,
        "warmup_steps": warmup_steps,
        "learning_rate": peak_learning_rate,
        "mixed_precision": accelerator.mixed_precision,
        "compiled": compiled,
        **run_facts(device, ("torch", "transformers", "accelerate", "datasets")),
    }
    if is_main:
        tell(
            f"{num_parameters / 1e6:.2f} M parameters; {num_images or 'unknown number of'} images from "
            f"{source.name}; {max_steps} steps of {global_batch_size} on {accelerator.num_processes} process(es), "
            f"{device}; learning rate {peak_learning_rate:.3g} after {warmup_steps} steps of warm-up"
            + (f"; frozen, because nothing trains them: {', '.join(frozen)}" if frozen else "")
        )
        if config.denoising_loss_weight > 0 and math.isfinite(gain := reachable_gain(config)):
            tell(
                f"the noise can be weakened by {gain:.1f} dB at most: hidden_size={config.hidden_size} and "
                f"decoder_hidden_size={config.decoder_hidden_size} are narrower than the {config.pixels_per_patch} "
                "values of a patch; for more, take smaller patches or wider layers"
            )
        if compiled:
            tell(f"the first step compiles (torch_compile: {compiled}), which takes seconds to a minute")
        if num_images and num_images < num_contrasted and config.contrastive_loss_weight > 0:
            tell(
                f"of {num_contrasted} images that are contrasted only {num_images} can differ, and the same image "
                "counts as its own negative; lower per_device_train_batch_size"
            )

    if not recipe.preflight:
        accelerator.init_trackers(
            output_dir.resolve().name,
            {
                name: value if isinstance(value, int | float) else str(value)
                for name, value in recipe.to_dict().items()
            },
            {"tensorboard": {"purge_step": first_step + 1}},  # what came after the checkpoint is repeated
        )

    # --- Resume: the data first, because starting its workers draws a random number ----------------------------------
    if checkpoint:
        states = [process["loader"] for process in own]
        exact = loader.resume(states) if resident else resume(loader, states)
    batches = iter(loader) if resident else Patient(loader)
    if checkpoint:
        changed = changed_fields(recipe, shared, weights, unwrapped)
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
        hyperparameters = [
            {name: group[name] for name in ("weight_decay", "betas")} for group in optimizer.param_groups
        ]
        set_optimizer_state_dict(
            model, optimizer.optimizer, shared["optimizer"], options=StateDictOptions(full_state_dict=True)
        )
        for group, of_recipe in zip(optimizer.param_groups, hyperparameters, strict=True):
            group.update(of_recipe)  # which the checkpoint has overwritten with its own
        remarks = [f"settings that changed since: {', '.join(changed)}"] if changed else []
        if "data_on_device" not in shared["recipe"]:
            remarks.append("an earlier version wrote it, whose augmentation drew other random numbers")
        if len(own) == accelerator.num_processes:
            set_rng_state(own[accelerator.process_index]["rng"])
            average.sums, average.num_steps = own[accelerator.process_index]["average"]
            if not exact:
                remarks.append("weights, optimiser and random numbers are exact, the order of the data is new")
        else:
            # Not the numbers of step 0 again
            set_seed((recipe.seed + 1_000_003 * first_step) % 2**31, device_specific=True)
            remarks.append(
                f"{len(own)} processes began it and {accelerator.num_processes} go on: weights and optimiser are "
                "exact, the order of the data and the random numbers are new"
            )
        if is_main:
            as_ever = "from here on the run is what it would have been without the interruption"
            tell(f"resumed from {checkpoint} at step {first_step}; {'; '.join(remarks) or as_ever}")
        del weights, shared, own  # as large as the model and its optimiser once more

    # --- What a step needs -------------------------------------------------------------------------------------------
    data_wait = DataWait(device)
    pixel_values = None  # of the last micro-batch, to look at
    sum_up = partial(accelerator.reduce, reduction="sum") if accelerator.num_processes > 1 else None
    stop = StopSignals(sum_up, device)
    guard, num_nonfinite = NonFiniteGuard(optimizer.optimizer, accelerator.num_processes), progress["nonfinite"]

    def make_inputs(views):
        nonlocal pixel_values
        pixel_values = augment(views)
        return {"pixel_values": pixel_values}

    def fetch() -> tuple[list, list[str]]:
        """The micro-batches of a step, and the names of their images."""
        micro_batches, images = [], []
        for _ in range(num_micro_batches):
            with data_wait, stop.waiting():
                batch = next(batches)
            bad_samples.update(batch["bad"])
            images += batch["images"]
            views = loader.views(batch) if resident else batch["views"].to(device, non_blocking=True)
            micro_batches.append(partial(make_inputs, views))
        return micro_batches, images

    def update(step: int, micro_batches: list, images: list[str]) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """The unweighted losses of a step, its gradient norm, and whether that is finite."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, max_steps, warmup_steps, peak_learning_rate)
        terms = backward(micro_batches)
        parameters = [p for p in model.parameters() if p.grad is not None]
        grad_norm = total_norm([p.grad for p in parameters])
        if recipe.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, recipe.max_grad_norm, grad_norm)
        finite = guard.check(step, grad_norm, terms, images)
        optimizer.step()
        optimizer.zero_grad()
        return terms, grad_norm, finite

    if recipe.preflight:
        is_ready = preflight(
            recipe,
            accelerator,
            bad_samples,
            model,
            in_one_piece,
            optimizer,
            fetch,
            update,
            backward,
            max_steps - first_step,
        )
        accelerator.end_training()
        sys.exit(0 if is_ready else 1)

    # --- What the features are worth before training -----------------------------------------------------------------
    def measure(linear: bool = True) -> dict | None:
        """k-NN and linear probe of the encoder as it is; on the main process, called by all."""
        with interlude():
            whole = in_one_piece()
            if not is_main:
                return None
            whole.eval()
            accuracy = probe.measure(lambda pixels: whole.can(pixels.to(device)).pooler_output, linear)
            whole.train()
            return accuracy

    if recipe.probe_dataset_name and not checkpoint:
        if is_main:
            probe_results["raw pixels"] = probe.measure(raw_pixels)
        probe_results["untrained encoder"] = measure()

    if is_main:
        write(output_dir / "recipe.yaml", recipe.to_yaml())
        metrics_file = open(output_dir / "metrics.jsonl", "w")
        metrics_file.writelines(json.dumps(line) + "\n" for line in metrics)

    def judge(judged_by) -> list[str] | dict[str, str]:
        untrained = (probe_results.get("untrained encoder") or {}).get("knn")
        return judged_by(metrics, warmup_steps, max_steps, untrained)

    def log(step: int, terms: dict[str, torch.Tensor], probing: bool):
        """After so many steps; called by all processes. Waits for the device."""
        nonlocal logged_at, logged_step, known_findings
        report_nonfinite()
        averages = average.compute()
        refuse_non_finite(step, averages, recipe.on_nonfinite)
        now = time.perf_counter()
        line = {"step": step, **averages}
        line |= {
            "learning_rate": learning_rate(step - 1, max_steps, warmup_steps, peak_learning_rate),
            "images_per_second": (step - logged_step) * global_batch_size / (now - logged_at),
            "data_wait": data_wait.seconds() / (now - logged_at),
            "num_bad": bad_samples.total(),
        }
        embeds = terms.get("image_embeds")
        if embeds is not None and len(embeds) > 1 and embeds.isfinite().all():
            line |= embedding_health(embeds)
        line |= {f"{term}_trivial": x for term, x in trivial_losses(config, pixel_values, num_contrasted).items()}
        line = {name: value for name, value in line.items() if math.isfinite(value)}  # of a step that was left out
        probe_began = time.perf_counter()
        if probing:
            accuracy = torch.tensor((measure(linear=False) or {"knn": 0.0})["knn"], device=device)
            line["knn"] = accelerator.reduce(accuracy, "sum").item()
        probe_seconds = time.perf_counter() - probe_began
        metrics.append(line)
        found = judge(findings)
        line["health"] = list(found.values())
        if is_main:
            sentences = "; ".join(judge(verdict)) if found.keys() != known_findings else None
            text = progress_text(line, bad_samples)
            bar.set_postfix_str(text)
            if bar.disable:
                seconds_left = (max_steps - step) * global_batch_size / line["images_per_second"]
                tell(f"step {step} of {max_steps}: {text}, {duration(seconds_left)} left")
            if sentences:
                tell(f"step {step}, health: {sentences}")
            numbers = {name: value for name, value in line.items() if name not in ("step", "health")}
            try:
                metrics_file.write(json.dumps(line) + "\n")
                metrics_file.flush()
                accelerator.log(numbers | ({"health": sentences} if sentences else {}), step)
            except OSError as error:  # a full disk ends no run: the lines are in the checkpoints as well
                tell(f"step {step} could not be logged: {error}")
        logged_at, logged_step, known_findings = now, step, set(found)
        not_training(probe_seconds)

    def not_training(seconds: float):
        """Probes and pictures do not count in the speed."""
        nonlocal logged_at, train_started
        logged_at, train_started = logged_at + seconds, train_started + seconds

    def report_nonfinite():
        nonlocal num_nonfinite
        sentences = guard.report()
        num_nonfinite += len(sentences)
        if sentences and recipe.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{sentences[0]}. Lower base_learning_rate, set max_grad_norm, look "
                "at the images, or go on without such steps: --on_nonfinite skip"
            )
        for sentence in sentences:
            tell(f"process {accelerator.process_index}: {sentence}")

    def best_probe() -> dict | None:
        """The logged line with the highest k-NN accuracy, the first of several."""
        return max((line for line in metrics if "knn" in line), key=lambda line: line["knn"], default=None)

    def save(step: int) -> Path:
        """A checkpoint after so many steps; called by all processes."""
        report_nonfinite()
        weights, optimizer_state = whole_state(model, optimizer.optimizer)
        own = {"loader": loader.state_dict(), "rng": rng_state(), "average": (average.sums, average.num_steps)}
        position = {
            "step": step,
            "metrics": metrics,
            "probe": probe_results,
            "train_seconds": progress["train_seconds"] + time.perf_counter() - train_started,
            "nonfinite": num_nonfinite,
            "ledger_bytes": ledger.stat().st_size if ledger.exists() else 0,
        }
        best = best_probe()
        return checkpoints.save(
            step,
            weights,
            {"optimizer": optimizer_state, "progress": position, "recipe": recipe.to_dict()},
            own,
            best and best["step"],
        )

    def push_unfinished(step: int, saved: Path):
        """The model as a checkpoint has it, in a form that can be loaded, to the Hub; on the main process."""
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.flush()

        def fill(snapshot: Path):
            transformers_logging.disable_progress_bar()
            unwrapped.save_pretrained(snapshot, state_dict={})  # all but the weights, which the checkpoint has
            transformers_logging.enable_progress_bar()
            processor.save_pretrained(snapshot)
            write(snapshot / "README.md", unfinished_card(recipe.repo_id.split("/")[-1], step, max_steps))

        also = {"model.safetensors": saved / "model.safetensors"}
        if recipe.hub_strategy == "checkpoint":
            also[LAST_CHECKPOINT] = saved
        push.hand_over(f"Training in progress, step {step}", fill, also)

    def draw(step: int, whole: CANForPreTraining | None):
        """What the model reconstructs by now, into the folder and the trackers; `None` on the other processes."""
        if whole is None or not is_main or not config.uses_decoder:
            return
        path = output_dir / "figures" / "reconstructions.png"
        try:
            with interlude():
                whole.eval()
                reconstruction_sheet(whole, pixel_values[:6, 0], recipe.image_mean, recipe.image_std, path)
                whole.train()
            picture = np.asarray(Image.open(path).convert("RGB"))[None]
            for tracker in accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"reconstructions": picture}, step, **options)
        except OSError as error:
            tell(f"the reconstructions could not be drawn: {error}")

    # --- The loop ----------------------------------------------------------------------------------------------------
    logged_step, logged_at, known_findings = first_step, time.perf_counter(), set()
    train_started = logged_at
    bar = tqdm(range(first_step, max_steps), "pre-training", max_steps, initial=first_step, dynamic_ncols=True,
               disable=not is_main or not sys.stderr.isatty())  # fmt: skip
    model.train()
    with stop:
        for step in bar:
            try:
                micro_batches, images = fetch()
            except StoppedWaiting:
                newest = checkpoints.paths()[-1:]
                advice = f"go on with --resume_from_checkpoint {newest[0]}" if newest else "nothing was saved"
                sys.exit(f"stopped by {stop.received.name} after step {step}, while the run waited for data; {advice}")
            terms, grad_norm, finite = update(step, micro_batches, images)
            average.update(step_metrics(terms, config, grad_norm), finite)

            done, is_last = step + 1, step + 1 == max_steps
            probing = recipe.probe_every > 0 and done % recipe.probe_every == 0
            if done % recipe.logging_steps == 0 or probing or is_last:
                log(done, terms, probing)

            stopping = stop.wanted() and not is_last
            is_best = probing and best_probe()["step"] == done
            if stopping or ((done % recipe.save_steps == 0 or is_best) and not is_last):
                saved = None
                try:
                    saved = save(done)
                except OSError as error:
                    if stopping:
                        raise
                    tell(f"{error}; training goes on, and tries again in {recipe.save_steps} steps")
                if not stopping and done % recipe.save_steps == 0:
                    begun = time.perf_counter()
                    draw(done, in_one_piece())
                    not_training(time.perf_counter() - begun)
                if saved and push and recipe.hub_strategy != "end":
                    push_unfinished(done, saved)
            if stopping:
                bar.close()
                number = stop.received or signal.SIGTERM  # another process received it
                if is_main:
                    tell(f"stopped by {number.name} after step {done}; go on with --resume_from_checkpoint latest")
                if push and push.finish(STOP_SECONDS)["error"]:
                    tell(f"{push.repo_id} is not up to date: {push.error}. It will be when the run goes on")
                accelerator.end_training()
                sys.exit(130 if number is signal.SIGINT else 0)
    train_seconds = progress["train_seconds"] + time.perf_counter() - train_started
    batches = loader = None  # ends its workers; left to the garbage collector, each would take five seconds
    accelerator.wait_for_everyone()

    # --- Results -----------------------------------------------------------------------------------------------------
    weights, _ = whole_state(model)
    if is_main:
        # First: nothing that follows may cost the weights
        save_model(output_dir, partial(unwrapped.save_pretrained, state_dict=weights), processor.save_pretrained)
        metrics_file.close()
    if recipe.probe_dataset_name:
        probe_results["CAN, pre-trained"] = measure()
        results["probe"] = probe_results
    whole = in_one_piece()
    if is_main:
        last, best, flops = metrics[-1], best_probe(), training_flops(config, recipe.num_views)
        results |= {
            "flops_per_image": flops,
            "train_flops": flops * max_steps * global_batch_size,
            "final_losses": {name: last[name] for name in last if name.endswith("loss")},
            "health": judge(verdict),
            "images_per_second": max_steps * global_batch_size / train_seconds,
            "data_wait": sum(line["data_wait"] for line in metrics) / len(metrics),
            "peak_memory": peak_memory(device),
            "bad_samples": dict(reasons(ledger_lines(ledger))),
            "nonfinite_steps": num_nonfinite,
            "train_seconds": train_seconds,
            "total_seconds": time.perf_counter() - started,
        }
        if best:
            results["best_probe"] = {"step": best["step"], "knn": best["knn"]}
        draw(max_steps, whole)
        curves(metrics, output_dir / "figures" / "curves.png")
        write_card(output_dir, recipe, results)
        write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")  # last: it marks the run as finished
        print_summary(output_dir, recipe, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if push:  # the other processes need not wait for it
        newest = recipe.hub_strategy == "checkpoint" and checkpoints.find("latest")
        push.hand_over(f"End of training, step {max_steps}", also={LAST_CHECKPOINT: newest} if newest else None)
        tell(f"\nwaiting for the upload to {push.repo_id}, at most {duration(WAIT_SECONDS)}; Ctrl-C gives it up")
        with StopSignals(None, device) as stop:
            results["hub"] = push.finish(WAIT_SECONDS, stop.wanted)
        write(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
        print_push(push)
    if own_folder:
        own_folder.close()
    return results


# --- Preparation -----------------------------------------------------------------------------------------------------


def refuse_other_run(recipe: Recipe, output_dir: Path) -> dict | None:
    """
    Raises ValueError where a run would destroy another one; returns the results of one that needs no more, so that a
    job that is started again after its end does no harm.
    """
    source = Path(recipe.model_name_or_path or "")
    if recipe.model_name_or_path and source.is_dir() and source.resolve() == output_dir.resolve():
        raise ValueError(
            f"output_dir={output_dir} is model_name_or_path, whose weights it would replace; give another"
        )
    choice = "give another --output_dir, or replace it with --overwrite_output_dir"
    wanted, checkpoints = recipe.resume_from_checkpoint, output_dir / "checkpoints"
    own = wanted == "latest" or (wanted and Path(wanted).resolve().parent == checkpoints.resolve())
    if not (output_dir / "results.json").exists():
        if not own and any(checkpoints.glob("step-*")):
            raise ValueError(
                f"output_dir={output_dir} already holds an unfinished run; continue it with --resume_from_checkpoint "
                f"latest, {choice}"
            )
        return None
    results = json.loads((output_dir / "results.json").read_text())
    if "num_steps" not in results:
        raise ValueError(
            f"output_dir={output_dir} holds a results.json that is not of a pre-training run; give another"
        )
    before = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    length = next(name for name in LENGTH if before.get(name) is not None)  # the one that counts
    is_longer = recipe.length == length and getattr(recipe, length) > before[length]
    is_longer = is_longer or (recipe.max_steps or 0) > results["num_steps"]
    if wanted == "latest" and not is_longer:
        tell(
            f"the run in {output_dir} is finished: nothing to do. To make it longer raise "
            f"{' or '.join(dict.fromkeys((length, 'max_steps')))}; for another one {choice}"
        )
        return results
    if not own or not any(checkpoints.glob("step-*")):
        raise ValueError(f"output_dir={output_dir} already holds a finished run; {choice}")
    return None


def changed_fields(recipe: Recipe, shared: dict, weights: dict, model) -> list[str]:
    """
    What of a recipe has changed since a checkpoint, but for settings that do not touch what is computed. Raises
    ValueError where its weights no longer fit, or where its optimiser did not know what is now trained.
    """
    # What an earlier version did not know yet, it did as the default does now, or as EARLIER says.
    fields = [*training_fields(), *model_fields()]
    before = {field.name: field.default for field in fields} | EARLIER | shared["recipe"]
    harmless = ("output_dir", "save_steps", "save_total_limit", "logging_steps", "log_with", "model_name_or_path",
                "dataloader_num_workers", "gradient_checkpointing", "data_on_device")  # fmt: skip
    now = recipe.to_dict()
    changed = [
        f"{name} was {before[name]}, is {value}"
        for name, value in now.items()
        if value != before[name] and name not in harmless and not name.startswith("probe_")
    ]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise ValueError(f"the checkpoint is of another model: {'; '.join(changed)}; give it the same settings")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if new := trained - shared["optimizer"]["state"].keys():
        parts = ", ".join(sorted({name.split(".")[0] for name in new}))
        raise ValueError(
            f"the checkpoint did not train the {parts}: {'; '.join(changed)}; give it the same settings, or begin a "
            "new run from its weights with --model_name_or_path"
        )
    return changed


def keep_sharding_exact(plugin):
    """Settings of accelerate's FSDP2 with which a sharded run computes what an unsharded one does."""
    # Its own half precision casts inputs and outputs too: targets, noise levels and losses. Autocast does not.
    plugin.mixed_precision_policy = None
    # Every process builds the model from the seed; this would take it from the first and cannot deal with buffers.
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def prepare_folder(output_dir: Path, keep: bool):
    """An empty place, unless a run is resumed: what another run left there would mix with this one's."""
    (output_dir / "results.json").unlink(missing_ok=True)
    if keep or not (output_dir / "metrics.jsonl").exists():  # which every run writes first: the rest is its own
        return
    for folder in ("checkpoints", "tensorboard"):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
    results = ("metrics.jsonl", "bad_samples.jsonl", "README.md", "recipe.yaml")
    for pattern in (*results, "*.safetensors*", "*config.json"):
        for path in output_dir.glob(pattern):
            path.unlink()
    for path in (output_dir / "figures").glob("*.png"):
        path.unlink()


def trackers(names: str | None) -> list[str] | None:
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


def view_maker(recipe: Recipe) -> RandomCrops:
    config = recipe.config
    return RandomCrops(
        config.image_shape,
        config.num_channels,
        recipe.crop_scale,
        recipe.crop_ratio,
        recipe.resample,
        recipe.seed,
        recipe.num_views,
        **recipe.decoding,
        min_size=config.patch_shape,
    )


def augmentation(recipe: Recipe) -> Augmentation:
    return Augmentation(
        recipe.image_mean,
        recipe.image_std,
        recipe.flip_probability,
        recipe.color_jitter,
        recipe.color_jitter_probability,
        recipe.greyscale_probability,
        recipe.blur_probability,
        recipe.blur_sigma,
        blur_kernel_size=max(3, min(recipe.config.image_shape) // 10 // 2 * 2 + 1),
        solarize_probability=recipe.solarize_probability,
    )


def image_processor(recipe: Recipe) -> ViTImageProcessor:
    """
    What prepares an image downstream: the shortest edge to 256/224 of the size, centre crop, the recipe's mean. For
    `encoders.Preprocessor` it also says how to decode, where that is not the usual way.
    """
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
        **{name: value for name, value in recipe.decoding.items() if value != "skip"},  # which is a choice of images
    )
    transformers_logging.set_verbosity(verbosity)
    return processor


# --- Model and optimiser, perhaps spread over the processes ----------------------------------------------------------


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of all gradients together, `()`, on the device; alike on all processes."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_state(model, optimizer=None) -> tuple[dict, dict | None]:
    """
    Weights and the optimiser's state by the names of the unwrapped model, in one piece, on the CPU of the main process
    (elsewhere empty); called by all.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options) if optimizer else None
    return get_model_state_dict(model, options=options), state


# --- Preflight -------------------------------------------------------------------------------------------------------


def preflight(
    recipe, accelerator, bad_samples, model, in_one_piece, optimizer, fetch, update, backward, num_steps
) -> bool:
    """
    Looks at real batches, model and machine in the way of the loop, prints a line for each check, estimates and a
    verdict, and saves a picture. Returns whether all is well, alike on all processes.
    """
    config, device, figures = recipe.config, accelerator.device, Path(recipe.output_dir) / "figures"
    unwrapped = accelerator.unwrap_model(model).train()

    def timed(function, *arguments) -> float:
        begun = time.perf_counter()
        function(*arguments)
        accelerator.wait_for_everyone()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    micro_batches, images = fetch()
    few = [make()["pixel_values"][:16] for make in micro_batches]
    pixel_values = torch.cat(few)
    few_batches = [lambda pixels=pixels: {"pixel_values": pixels} for pixels in few]
    if config.has_noise_head:  # which starts at zero, and then passes no gradient on
        torch.nn.init.normal_(unwrapped.decoder.noise_head.weight, std=1e-3)
    with interlude():  # uncompiled: these are other shapes than those of the run
        timed(backward, few_batches)  # allocates
        optimizer.zero_grad()
        seconds = timed(backward, few_batches)
        optimizer.zero_grad()
        unwrapped.eval()  # a dropped path gives its block no gradient
        backward(few_batches)
        unwrapped.train()
    checks = {
        "pixels are normalised, views differ": check_pixels(pixel_values),
        "every parameter gets a gradient": check_gradients(unwrapped, total_norm),
        "every parameter is in the optimiser": check_optimizer(unwrapped, optimizer),
        "patches know their places": check_positions(unwrapped),
        "the disk has room for checkpoints": check_disk(
            figures, recipe.save_total_limit + bool(recipe.probe_every), unwrapped.parameters()
        ),
        "shared memory has room for batches": check_shared_memory(
            recipe.dataloader_num_workers,
            len(images) // recipe.gradient_accumulation_steps * math.prod(pixel_values.shape[1:]),  # uint8
        ),
    }
    if config.contrastive_loss_weight > 0:
        checks["positives are matched, on all processes"] = check_positives(
            contrastive_loss, 8, config.projection_size, accelerator.process_index, device
        )
    optimizer.zero_grad()

    # All processes take the same number of steps, as many as fit into some seconds.
    images_per_step = len(images) * accelerator.num_processes
    seconds *= len(images) / len(pixel_values)
    seconds = accelerator.reduce(torch.tensor(seconds, device=device), "mean").item()
    how, waited = f"estimated from {len(pixel_values)} images a process", None
    if seconds < 8:
        update(0, micro_batches, images)
        num_timed, waited, begun = max(1, min(10, int(15 / seconds))), 0.0, time.perf_counter()
        for step in range(num_timed):
            fetched_at = time.perf_counter()
            micro_batches, images = fetch()
            waited += time.perf_counter() - fetched_at
            timed(update, step, micro_batches, images)
        seconds = (time.perf_counter() - begun) / num_timed
        how = f"measured over {num_timed} steps, {waited / num_timed / seconds:.0%} of the time waiting for data"
    whole = in_one_piece()
    failures = [(accelerator.process_index, name, text) for name, text in checks.items() if text]
    failures = gather_object(failures)
    if not accelerator.is_main_process:
        return not failures

    picture = figures / "preflight.png"
    with interlude():
        reconstruction_sheet(
            whole.eval(), pixel_values[:4].flatten(0, 1), recipe.image_mean, recipe.image_std, picture
        )
    memory = f"{peak_memory(device) / 1e9:.1f}"
    if device.type == "cuda":
        memory += f" of {torch.cuda.mem_get_info()[1] / 1e9:.0f}"
    for name in checks:
        tell(f"  {'ok  ' if name not in [failure[1] for failure in failures] else 'FAIL'}  {name}")
    tell(
        f"  speed     {images_per_step / seconds:.4g} images/s ({how})\n"
        f"  memory    {memory} GB a process\n"
        f"  to finish {duration(num_steps * seconds)} for {num_steps} steps of {images_per_step} images\n"
        f"  bad       {bad_samples.total()} images so far\n"
        f"  picture   {picture}: both views of four images, with noise and mask"
    )
    for process, name, text in failures:
        tell(f"  process {process}, {name}: {text}")
    tell(f"preflight: {f'NOT ready, {len(failures)} checks failed' if failures else 'ready'}")
    return not failures


# --- Within the loop -------------------------------------------------------------------------------------------------


def reasons(ledger: list[str]) -> Counter:
    return Counter(json.loads(line)["reason"] for line in ledger)


def step_metrics(terms: dict[str, torch.Tensor], config, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
    metrics = {name: value for name, value in terms.items() if name.endswith("loss")}
    metrics["loss"] = sum(config.loss_weights[name] * value for name, value in metrics.items())
    metrics["grad_norm"] = grad_norm
    if "image_embeds" in terms:
        metrics["embedding_spread"] = embedding_spread(terms["image_embeds"])
    return metrics


def refuse_non_finite(step: int, averages: dict[str, float], on_nonfinite: str):
    """Raises FloatingPointError on all processes, as averages are alike there; those of left-out steps are NaN."""
    bad = [name for name, value in averages.items() if not math.isfinite(value)]
    if bad and on_nonfinite == "stop":
        raise FloatingPointError(
            f"{', '.join(bad)} not finite by step {step}: "
            + ", ".join(f"{name} {value}" for name, value in averages.items() if name.endswith("loss"))
            + "; lower base_learning_rate, set max_grad_norm, or look at the last images"
        )


def progress_text(line: dict, num_bad: Counter) -> str:
    terms = [f"{short} {line[f'{term}_loss']:.4g}" for term, short in TERMS.items() if f"{term}_loss" in line]
    text = f"{' '.join(terms)}, {line['images_per_second']:.0f} images/s, {line['data_wait']:.0%} waiting for data"
    text += f", k-NN {100 * line['knn']:.1f} %" if "knn" in line else ""
    return text + "".join(f", {count} {reason}" for reason, count in num_bad.most_common())


# --- Output ----------------------------------------------------------------------------------------------------------


def print_summary(output_dir: Path, recipe: Recipe, results: dict):
    if "probe" in results:
        tell(f"\nAccuracy on the test images of {recipe.probe_dataset_name}:")
        tell(f"{'%':32}{'k-NN':>8}{'linear probe':>15}")
        for name, accuracy in results["probe"].items():
            tell(f"{name:32}{100 * accuracy['knn']:8.1f}{100 * accuracy['linear_probe']:15.1f}")
    tell("\n" + "\n".join(results["health"]))
    has_pictures = (output_dir / "figures" / "reconstructions.png").exists()
    tell(
        f"\n{results['num_steps']} steps in {results['train_seconds']:.0f} s "
        f"({results['images_per_second']:.0f} images/s, {results['data_wait']:.0%} of the time waiting for data), "
        f"{results['total_seconds']:.0f} s in all. Model, card and figures: {output_dir}\n\n"
        "Next:\n"
        f"  look at it              {output_dir}/figures/curves.png{' and reconstructions.png' * has_pictures}"
        f"{f', python demo/app.py --model_name_or_path {output_dir}' * has_pictures}\n"
        f"  measure it              python run_eval.py --model_name_or_path {output_dir} --dataset_name LABELLED_SET\n"
        f"  export it               python -m modeling_can.conversion {output_dir} --to dinov2 {output_dir}-dinov2\n"
        f"  use it                  AutoModel.from_pretrained({str(output_dir)!r}) after `import modeling_can`"
    )
    if recipe.dataset_name == SAMPLE_DATA:
        tell(
            "  your own images         python run_pretraining.py --data_dir FOLDER --output_dir out/mine\n"
            "  a full-size encoder     accelerate launch run_pretraining.py "
            "model_cards/can-vit-base-patch16-224/recipe.yaml --data_dir FOLDER"
        )


def print_push(push: Push):
    if push.error:
        tell(f"the upload to {push.repo_id} failed: {push.error}\nTo upload the same later:\n  {push.command()}")
    else:
        tell(f"uploaded to {push.repo_id}, commit {push.commit}")


if __name__ == "__main__":
    outlive_full_logs()
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
