"""One run of the study: pre-trained, kept and judged, each by the scripts that a user starts."""

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import load_dataset

from experiments.cifar10.runs import Run, path_of, settings_of
from experiments.commands import ROOT, as_flags, data_flags, evaluate, run_script
from experiments.keeping import keep, without_paths
from modeling_can.files import new_folder, write


__all__ = ["judge", "of_the_log", "pretrain_and_judge", "pretrain_and_keep", "probe_data"]

# MAE's recipe is made for large images and a hundred epochs: without mixing and erasing, for five
FINE_TUNING = (
    "--finetune_num_epochs 5 --finetune_batch_size 256 --finetune_base_learning_rate 1e-3 --finetune_layer_decay 0.75 "
    "--finetune_mixup_alpha 0 --finetune_cutmix_alpha 0 --finetune_randaugment_magnitude 0 "
    "--finetune_random_erasing_probability 0 --finetune_drop_path_rate 0"
).split()
# Corrupting takes longer than all the rest: a fifth of the test images, the same ones for all rows
ROBUSTNESS = "--corruptions noise blur weather digital --test_split test[:20%]".split()


def pretrain(folder: Path, settings: dict, flags: list[str], arguments, threads: int, **options):
    recipe = str(Path(__file__).with_name("recipe.yaml"))
    flags = [*data_flags(arguments), *as_flags(settings), *flags, "--log_with", "none", "--output_dir", str(folder)]
    run_script(threads, "run_pretraining.py", recipe, *flags, **options)


def pretrain_and_judge(run: Run, arguments, threads: int):
    """Of the scale toy. Takes a main row's weights where they are still there; leaves the JSON."""
    of_main = replace(run, stage="main").name if run.stage == "downstream" else run.name
    folder = Path(arguments.output_dir) / run.scale / of_main
    settings = settings_of(run)
    if "max_steps" in settings:
        del settings["num_train_epochs"]
    if run.stage != "downstream" or not (folder / "results.json").exists():
        flags = ["--resume_from_checkpoint", "latest"]
        if run.stage == "main":
            flags += ["--probe_dataset_name", str(probe_data(arguments)), "--probe_every", str(arguments.probe_every)]
        pretrain(folder, settings, flags, arguments, threads, log=folder.with_name(f"{folder.name}.log"))
    judge(run, folder, settings, arguments, threads)


def pretrain_and_keep(run: Run, arguments, threads: int):
    """Of a fixed list. Every minute, what there is of the run comes into --weights."""
    folder = Path(arguments.output_dir) / run.scale / run.name
    kept = Path(arguments.weights) / run.name
    for partial_file in kept.glob("*.partial"):  # of a call that was killed
        partial_file.unlink()
    settings = settings_of(run)
    length = {"num_train_epochs": arguments.epochs or settings["num_train_epochs"]}
    if arguments.seconds:
        length = length_in(folder, settings, arguments, threads)
        print(f"{run.name}: {length}", flush=True)
    settings["num_train_epochs"] = length["num_train_epochs"]
    flags = ["--probe_dataset_name", str(probe_data(arguments, of_training=run.stage == "trial"))]
    flags += ["--resume_from_checkpoint", "latest"]
    keeping = partial(keep, folder, kept, run.stage == "main", places(arguments), length=length)
    every = 1 if run.scale == "smoke" else 60
    try:
        pretrain(folder, settings, flags, arguments, threads, meanwhile=keeping, every=every)
    finally:
        keeping()
    if not (folder / "results.json").exists():
        raise SystemExit(f"{run.name} was stopped; the same command goes on with it, if {folder} is still there")


def length_in(folder: Path, settings: dict, arguments, threads: int) -> dict:
    """The epochs that so many seconds hold at the speed of a short run, which compiles for the long one too."""
    path = folder / "length.json"
    if not path.exists():  # else the run goes on, at the length with which it began
        short = folder.with_name(f"{folder.name}-speed")
        settings = {**settings, "max_steps": 3 * settings["logging_steps"], "probe_every": 0}
        pretrain(short, settings, ["--overwrite_output_dir", "true"], arguments, threads)
        results = json.loads((short / "results.json").read_text())
        lines = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
        rate = statistics.mean(line["images_per_second"] for line in lines[1:])  # the first one compiles
        epochs = max(1, int(arguments.seconds * rate / results["num_images"]))
        folder.mkdir(parents=True, exist_ok=True)
        length = {"num_train_epochs": epochs, "seconds": arguments.seconds, "measured_images_per_second": rate}
        write(path, json.dumps(length) + "\n")
    return json.loads(path.read_text())


def judge(run: Run, folder: Path, settings: dict, arguments, threads: int):
    """Evaluates the model in a folder and leaves the JSON."""
    result = {"stage": run.stage, "method": run.method, "seed": run.seed, "settings": settings, "threads": threads}
    result["pretraining"] = json.loads((folder / "results.json").read_text())
    if length := result["pretraining"].pop("length", None):  # of a run in a fixed list
        settings["num_train_epochs"] = length.pop("num_train_epochs")
        result |= length
    place = Path(arguments.output_dir) / run.scale / folder.name
    data = data_flags(arguments)
    if run.stage == "downstream":
        result["evaluation"] = {
            "finetune": evaluate(folder, place, ("finetune",), [*data, *FINE_TUNING], threads),
            "robustness": evaluate(folder, place, ("robustness",), [*data, *ROBUSTNESS], threads),
        }
        if arguments.further_data:
            flags = ["--dataset_name", arguments.further_data, "--test_size", "0.5"]
            result["evaluation"]["transfer"] = evaluate(folder, place, ("knn", "linear_probe"), flags, threads)
    else:
        result |= of_the_log(folder / "metrics.jsonl", result["pretraining"]["global_batch_size"])
        if run.tasks:
            held_out = "--train_split train[:80%] --test_split train[80%:]".split() if run.stage == "search" else []
            result["evaluation"] = evaluate(folder, place, run.tasks, [*data, *held_out], threads)
    path = path_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, without_paths(json.dumps(result, indent=1), places(arguments)) + "\n")


def of_the_log(log: Path, batch_size: int) -> dict:
    """k-NN along the way over the seconds of training, of which the first ones compile; and the speed after them."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    step, seconds, along_the_way = 0, 0.0, []
    for line in lines:
        seconds += (line["step"] - step) * batch_size / line["images_per_second"]
        step = line["step"]
        if "knn" in line:
            along_the_way.append({"step": step, "knn": line["knn"], "seconds": seconds})
    return {
        "along_the_way": along_the_way,
        "images_per_second": statistics.median(line["images_per_second"] for line in lines),
    }


def places(arguments) -> dict[str | None, str]:
    """Path of this machine -> its word in a result."""
    return {
        arguments.weights: "WEIGHTS",
        arguments.output_dir: "OUT",
        arguments.data: "DATA",
        arguments.further_data: "FURTHER_DATA",
        str(ROOT): ".",
    }


def probe_data(arguments, of_training: bool = False) -> Path:
    """5,000 training and 2,000 test images, for k-NN along the way; perhaps these are training images too."""
    folder = Path(arguments.output_dir) / ("probe_data_of_training" if of_training else "probe_data")
    if not folder.exists():
        splits = load_dataset(arguments.data)
        train, test = (splits[name].shuffle(seed=0) for name in ("train", "test"))
        num_train, num_test = (200, 100) if arguments.scale == "smoke" else (5000, 2000)
        parts = {"train": train.select(range(num_train)), "test": test.select(range(num_test))}
        if of_training:
            parts["test"] = train.select(range(num_train, num_train + num_test))
        with new_folder(folder) as partial:
            for name, some in parts.items():
                some.to_parquet(partial / f"{name}-00000-of-00001.parquet")
    return folder
