"""
Which noise, which weight and which head make N remove noise, and what that does to the features: one factor at a time.

    python experiments/noise/study.py --jobs 2                    # the quickstart's tiles: half an hour on two cores
    python experiments/noise/study.py --scale cifar10 --data CIFAR10_FOLDER                     # hours on two cores
    python experiments/noise/study.py --scale cifar10 --data CIFAR10_FOLDER --stage train --jobs 12 --minutes 5.8 \\
        --weights FOLDER                                                                        # a GPU
    python experiments/noise/study.py --scale cifar10 --data CIFAR10_FOLDER --stage evaluate report --weights FOLDER

Scale `quickstart`: the recipe of the quickstart. Scale `cifar10`: the encoder of experiments/cifar10, scale `toy`, but
with patches of 4, 2,000 steps of 512 images. The first run of a scale is its base; every other one says in its name
what differs from it. Stages:

train       pre-trains, --jobs at a time; --weights gets a folder for each run that is done: metrics, and the weights
            in bfloat16. After --minutes what still runs is given up, and a second call does what is missing.
evaluate    a JSON for each run in experiments/noise/results: by how many dB the noise gets weaker on test images, at
            sigma_max, at half of it and over sigma ~ U[0, sigma_max]; k-NN and linear probe; the probe under the
            noise group of the common corruptions, on CIFAR-10 of a fifth of the test images
report      the tables in experiments/noise/README.md
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor


sys.path.insert(0, str(Path(__file__).parents[2]))  # the root of the repository, which need not be installed
from experiments.commands import ROOT, as_flags, data_flags  # noqa: E402
from experiments.commands import evaluate as run_eval  # noqa: E402
from experiments.keeping import keep, without_paths  # noqa: E402
from experiments.noise.report import RESULTS, report  # noqa: E402
from experiments.noise.runs import RUNS, runs  # noqa: E402
from modeling_can import CANForPreTraining  # noqa: E402
from modeling_can.files import write  # noqa: E402
from modeling_can.plots import reconstruct  # noqa: E402


__all__ = ["TILES", "gains"]

TILES = ROOT / "modeling_can" / "data" / "sample_data"


def path_of(name: str, arguments) -> Path:
    """Of the JSON of a run."""
    return RESULTS / f"{arguments.scale}-{name}.json"


def is_done(name: str, arguments) -> bool:
    """Whether all is measured of a run; an earlier version measured no noise on the tiles."""
    path = path_of(name, arguments)
    return path.exists() and "noise" in json.loads(path.read_text())


def train(name: str, settings: dict, arguments):
    folder = Path(arguments.output_dir) / name
    if (folder / "results.json").exists() or is_done(name, arguments):
        return
    flags = [*as_flags(settings), "--log_with", "none", "--save_steps", "100000"]
    flags += ["--output_dir", str(folder), "--overwrite_output_dir", "true"]
    if arguments.scale == "cifar10":
        flags += ["--data_on_device", "true", "--torch_compile", "false", "--logging_steps", "100"]
        flags += ["--dataloader_num_workers", "0"]
        flags = [str(ROOT / "experiments" / "cifar10" / "recipe.yaml"), *data_flags(arguments), *flags]
    command = [sys.executable, str(ROOT / "run_pretraining.py"), *flags]
    began = time.monotonic()
    with Path(f"{folder}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = process.wait(max(0.0, arguments.ends - began))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    if status == 0:
        keep(folder, Path(arguments.weights) / name, True, places(arguments))
    print(f"{name}: status {status} after {time.monotonic() - began:.0f} s", flush=True)


def gains(folder: Path, images: list) -> dict[str, float]:
    """By how many dB the noise gets weaker on visible patches: at sigma_max, half of it, over U[0, sigma_max]."""
    model = CANForPreTraining.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    fractions = {"largest": [1.0], "mean": [0.5], "uniform": [0.05 + 0.1 * step for step in range(10)]}
    found = {}
    for name, levels in fractions.items():
        noise = residual = 0.0
        for level in levels:
            torch.manual_seed(0)
            made = reconstruct(model, pixels, noise_level=level * model.config.noise_std_max)
            noise += made["noise"].nan_to_num().square().sum().item()
            residual += (made["noise"] - made["predicted_noise"]).nan_to_num().square().sum().item()
        found[name] = 10 * math.log10(noise / residual)
    return found


def evaluate(name: str, settings: dict, arguments):
    path, folder = path_of(name, arguments), Path(arguments.weights) / name
    if is_done(name, arguments) or not (folder / "results.json").exists():
        return
    RESULTS.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "name": name,
        "scale": arguments.scale,
        "seed": settings["seed"],
        "settings": settings,
        "pretraining": json.loads((folder / "results.json").read_text()),
        "losses": {key: statistics.mean(line[key] for line in lines[-3:]) for key in lines[-1] if "loss" in key},
    }
    is_quickstart = arguments.scale == "quickstart"
    if settings["denoising_loss_weight"] > 0:
        data, split = (str(TILES), "test") if is_quickstart else (arguments.data, "test[:2000]")
        result["gain"] = gains(folder, load_dataset(data, split=split)["image"])
    place = Path(arguments.output_dir) / folder.name
    flags = ["--dataset_name", "sample_data"] if is_quickstart else data_flags(arguments)
    if not is_quickstart:
        result["features"] = run_eval(folder, place, ("knn", "linear_probe"), flags, arguments.threads)
        flags += ["--test_split", "test[:20%]"]
    result["noise"] = run_eval(folder, place, ("robustness",), [*flags, "--corruptions", "noise"], arguments.threads)
    write(path, without_paths(json.dumps(result, indent=1), places(arguments)) + "\n")
    print(name, flush=True)


def places(arguments) -> dict[str | None, str]:
    """Path of this machine -> its word in a result."""
    return {arguments.weights: "WEIGHTS", arguments.output_dir: "OUT", arguments.data: "DATA", str(ROOT): "."}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=RUNS, default="quickstart")
    parser.add_argument("--data", default="uoft-cs/cifar10", help="cifar10: folder of parquet shards, or Hub id")
    parser.add_argument("--image_column", default="image", help="image, or img for uoft-cs/cifar10")
    parser.add_argument("--stage", nargs="+", choices=["train", "evaluate", "report"])
    parser.add_argument("--runs", nargs="+", help="these alone: base no-noise")
    parser.add_argument("--output_dir", help="for checkpoints and logs; out/noise/SCALE unless given")
    parser.add_argument("--weights", help="a folder for each run: what is kept of it; OUTPUT_DIR/weights unless given")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of training; then it stops")
    arguments = parser.parse_args()
    arguments.output_dir = str(Path(arguments.output_dir or f"out/noise/{arguments.scale}").resolve())
    arguments.weights = str(Path(arguments.weights or f"{arguments.output_dir}/weights").resolve())
    if Path(arguments.data).exists():
        arguments.data = str(Path(arguments.data).resolve())
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    arguments.ends = time.monotonic() + 60 * arguments.minutes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    todo = {
        name: settings
        for name, settings in runs(arguments.scale).items()
        if not arguments.runs or name.rsplit("-seed-")[0] in arguments.runs
    }
    for stage in arguments.stage or ["train", "evaluate", "report"]:
        if stage == "report":
            report()
            continue
        with ThreadPoolExecutor(arguments.jobs) as pool:
            do = partial({"train": train, "evaluate": evaluate}[stage], arguments=arguments)
            list(pool.map(do, todo, todo.values()))


if __name__ == "__main__":
    main()
