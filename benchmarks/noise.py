"""
Which noise, which weight and which head make N remove noise, and what that does to the features: CAN on CIFAR-10, one
factor at a time.

    python benchmarks/noise.py --data CIFAR10_FOLDER                # hours on two CPU cores; goes on where it stopped
    python benchmarks/noise.py --data CIFAR10_FOLDER --stage train --jobs 10 --minutes 4 --weights FOLDER   # on a GPU
    python benchmarks/noise.py --data CIFAR10_FOLDER --stage evaluate report --weights FOLDER

All runs have the encoder of `claims.py`, scale toy, but patches of 4, and the same images, views, batch and number of
steps. The first is the base; every other one says in its name what differs from it. Stages:

train       pre-trains, --jobs at a time; --weights gets a folder for each run that is done: metrics, and the weights
            in bfloat16. After --minutes what still runs is given up.
evaluate    a JSON for each run in benchmarks/noise: by how many dB the noise gets weaker on test images, at sigma_max,
            at half of it and over sigma ~ U[0, sigma_max]; k-NN and linear probe; the probe under the noise group of
            the common corruptions, on a fifth of the test images
report      the table in benchmarks/noise/README.md
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
from pathlib import Path

import torch
from claims import ROOT, SCALES, accuracy, contrastive_weight, data_flags, keep, mean_and_spread, without_paths, write
from datasets import load_dataset
from transformers import AutoImageProcessor


sys.path.insert(0, str(ROOT))
import run_pretraining  # noqa: E402, F401  what the threads below would import at the same time
from modeling_can import CANForPreTraining  # noqa: E402
from modeling_can.visualization import reconstruct  # noqa: E402


RESULTS = Path(__file__).parent / "noise"
OWN = {"noise_head": "own", "norm_noise_loss": True}
SHARED = {"noise_head": "shared", "norm_noise_loss": True}
PAPER = {"noise_head": "shared", "norm_noise_loss": False, "noise_std_max": 0.05, "denoising_loss_weight": 0.2165}
BASE = {
    **SCALES["toy"], "patch_size": 4, **contrastive_weight(0.3), **OWN, "noise_std_max": 0.5,
    "denoising_loss_weight": 1, "per_device_train_batch_size": 512, "base_learning_rate": 1e-3, "max_steps": 2000,
}  # fmt: skip
del BASE["num_train_epochs"]
NONE = {"noise_std_max": 0, "denoising_loss_weight": 0}
NO_LOSS = {"denoising_loss_weight": 0}
NO_C = {"contrastive_loss_weight": 0}
RUNS = {  # name: what differs from BASE, in the order of worth
    "base": {},
    "sigma-0.05": {"noise_std_max": 0.05},
    "sigma-0.1": {"noise_std_max": 0.1},
    "sigma-0.25": {"noise_std_max": 0.25},
    "sigma-1": {"noise_std_max": 1},
    "no-noise": NONE,
    "paper": PAPER,
    "no-loss": NO_LOSS,
    "no-level": {"noise_level_embedding": False},
    "shared": SHARED,
    "weight-0.1": {"denoising_loss_weight": 0.1},
    "weight-0.3": {"denoising_loss_weight": 0.3},
    "weight-3": {"denoising_loss_weight": 3},
    "raw-0.3": {"norm_noise_loss": False, "denoising_loss_weight": 0.3},
    "sigma-0.05-weight-10": {"noise_std_max": 0.05, "denoising_loss_weight": 10},
    "sigma-0.05-own-raw": {**PAPER, "noise_head": "own"},
    "no-c": NO_C,
    "no-c-sigma-0.05": {**NO_C, "noise_std_max": 0.05},
    "no-c-paper": {**PAPER, **NO_C},
    "patch-8": {"patch_size": 8},
    "decoder-32": {"decoder_hidden_size": 32, "decoder_intermediate_size": 128},
    "decoder-128": {"decoder_hidden_size": 128, "decoder_intermediate_size": 512},
    "encoder-64": {"hidden_size": 64, "intermediate_size": 256},
    "encoder-192": {"hidden_size": 192, "intermediate_size": 768},
    "mask-0.25": {"mask_ratio": 0.25},
    "sigma-0.25-no-loss": {**NO_LOSS, "noise_std_max": 0.25},
    "sigma-0.25-no-level": {"noise_std_max": 0.25, "noise_level_embedding": False},
    "sigma-0.25-shared": {**SHARED, "noise_std_max": 0.25},
}
ABLATIONS = ("base", "no-noise", "no-loss", "no-level", "shared", "paper", "sigma-0.25")  # with seeds 1 and 2 too
NOISE = "--corruptions noise --test_split test[:20%]".split()


def runs() -> dict[str, dict]:
    """Name with seed -> settings."""
    seeded = [(name, 0) for name in RUNS] + [(name, seed) for seed in (1, 2) for name in ABLATIONS]
    return {f"{name}-seed-{seed}": {**BASE, **RUNS[name], "seed": seed} for name, seed in seeded}


def train(name: str, settings: dict, arguments):
    folder = Path(arguments.output_dir) / name
    if (folder / "results.json").exists():
        return
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    flags += ["--data_on_device", "true", "--torch_compile", "false", "--log_with", "none", "--dataloader_num_workers"]
    flags += ["0", "--logging_steps", "100", "--save_steps", "100000", "--output_dir", str(folder)]
    recipe = Path(__file__).with_name("claims.yaml")
    command = [sys.executable, str(ROOT / "run_pretraining.py"), str(recipe), *data_flags(arguments), *flags]
    command += ["--overwrite_output_dir", "true"]
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
        keep(folder, Path(arguments.weights) / name, True, {}, arguments)
    print(f"{name}: status {status} after {time.monotonic() - began:.0f} s", flush=True)


def gains(folder: Path, images: list) -> dict[str, float]:
    """By how many dB the noise gets weaker on visible patches: at sigma_max, half of it, over U[0, sigma_max]."""
    model = CANForPreTraining.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    shares = {"largest": [1.0], "mean": [0.5], "uniform": [0.05 + 0.1 * step for step in range(10)]}
    found = {}
    for name, levels in shares.items():
        noise = residual = 0.0
        for level in levels:
            torch.manual_seed(0)
            pictures = reconstruct(model, pixels, noise_level=level * model.config.noise_std_max)
            noise += pictures["noise"].nan_to_num().square().sum().item()
            residual += (pictures["noise"] - pictures["predicted_noise"]).nan_to_num().square().sum().item()
        found[name] = 10 * math.log10(noise / residual)
    return found


def evaluate(name: str, settings: dict, arguments):
    path, folder = RESULTS / f"{name}.json", Path(arguments.weights) / name
    if path.exists() or not (folder / "results.json").exists():
        return
    RESULTS.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = {
        "name": name,
        "seed": settings["seed"],
        "settings": settings,
        "pretraining": json.loads((folder / "results.json").read_text()),
        "losses": {key: statistics.mean(line[key] for line in lines[-3:]) for key in lines[-1] if "loss" in key},
    }
    if settings["denoising_loss_weight"] > 0:
        images = load_dataset(arguments.data, split="test[:2000]")[arguments.image_column]
        result["gain"] = gains(folder, images)
    place = Path(arguments.output_dir) / name
    for task, more in {"features": ["--task", "knn", "linear_probe"], "noise": ["--task", "robustness", *NOISE]}.items():
        output = place / f"evaluation-{task}"
        command = [sys.executable, str(ROOT / "run_eval.py"), "--model_name_or_path", str(folder), *more]
        command += ["--baselines", "none", "--output_dir", str(output), *data_flags(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        with place.with_suffix(".eval.log").open("a") as log:
            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
        result[task] = json.loads((output / "results.json").read_text())
        result[task]["results"] = result[task]["results"][folder.name]
    write(path, without_paths(json.dumps(result, indent=1), arguments) + "\n")
    print(name, flush=True)


def row(name: str, found: list[dict]) -> str:
    def mean(path: str, digits: int = 1) -> str:
        values = []
        for result in found:
            for key in path.split("/"):
                result = result.get(key, {})
            values += [result] if result != {} else []
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""

    features = [{"evaluation": result["features"]} for result in found]
    robust = [result["noise"]["results"]["robustness"] for result in found]
    cells = [
        name,
        str(len(found)),
        *(mean(f"gain/{level}", 2) for level in ("largest", "mean", "uniform")),
        *(mean_and_spread([accuracy(result, task) for result in features]) for task in ("knn", "linear_probe")),
        mean_and_spread([result["clean"]["accuracy"] for result in robust]),
        mean_and_spread([result["accuracy"] for result in robust]),
        mean("losses/reconstruction_loss", 3),
    ]
    return f"| {' | '.join(cells)} |"


def report():
    done = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    lines = [
        "# The noise term, one factor at a time",
        "",
        "Written by `python benchmarks/noise.py --stage report`. Noise weaker by so many dB on 2,000 test images, at "
        "the largest level, at half of it, and over sigma ~ U[0, sigma_max]; accuracies in %.",
        "",
        "| run | seeds | dB, largest | dB, mean | dB, over all | k-NN | probe | probe, a fifth of the test images | "
        "under noise | A |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        found = [result for result in done if result["name"].rsplit("-seed-")[0] == name]
        lines += [row(name, found)] if found else []
    text = "\n".join(lines) + "\n"
    write(RESULTS / "README.md", text)
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="folder of parquet shards, or Hub id")
    parser.add_argument("--image_column", default="image", help="image, or img for uoft-cs/cifar10")
    parser.add_argument("--stage", nargs="+", choices=["train", "evaluate", "report"])
    parser.add_argument("--runs", nargs="+", help="these alone: base no-noise")
    parser.add_argument("--output_dir", default="out/noise", help="for checkpoints and logs")
    parser.add_argument("--weights", default="out/noise/weights", help="a folder for each run: what is kept of it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of training; then it stops")
    parser.add_argument("--max_steps", type=int, default=BASE["max_steps"])
    arguments = parser.parse_args()
    for name in ("data", "output_dir", "weights"):
        if name != "data" or Path(arguments.data).exists():
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    arguments.further_data = None
    arguments.ends = time.monotonic() + 60 * arguments.minutes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    BASE["max_steps"] = arguments.max_steps
    todo = {n: s for n, s in runs().items() if not arguments.runs or n.rsplit("-seed-")[0] in arguments.runs}
    for stage in arguments.stage or ["train", "evaluate", "report"]:
        if stage == "report":
            report()
            continue
        with ThreadPoolExecutor(arguments.jobs) as pool:
            do = {"train": train, "evaluate": evaluate}[stage]
            list(pool.map(lambda item: do(*item, arguments), todo.items()))


if __name__ == "__main__":
    main()
