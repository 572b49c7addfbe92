"""
Which noise, which weight and which head make N remove noise, and what that does to the features: one factor at a time.

    python benchmarks/noise.py --jobs 2                             # the quickstart's tiles: half an hour on two cores
    python benchmarks/noise.py --scale cifar10 --data CIFAR10_FOLDER                  # hours on two cores
    python benchmarks/noise.py --scale cifar10 --data CIFAR10_FOLDER --stage train --jobs 12 --minutes 5.8 \\
        --weights FOLDER                                                              # a GPU
    python benchmarks/noise.py --scale cifar10 --data CIFAR10_FOLDER --stage evaluate report --weights FOLDER

Scale `quickstart`: the recipe of the quickstart. Scale `cifar10`: the encoder of `claims.py`, scale toy, but with
patches of 4, 2,000 steps of 512 images. The first run of a scale is its base; every other one says in its name what
differs from it. Stages:

train       pre-trains, --jobs at a time; --weights gets a folder for each run that is done: metrics, and the weights
            in bfloat16. After --minutes what still runs is given up, and a second call does what is missing.
evaluate    a JSON for each run in benchmarks/noise: by how many dB the noise gets weaker on test images, at sigma_max,
            at half of it and over sigma ~ U[0, sigma_max]; k-NN and linear probe; on CIFAR-10 also the probe under the
            noise group of the common corruptions, of a fifth of the test images
report      the tables in benchmarks/noise/README.md
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
from claims import ROOT, SCALES, accuracy, contrastive_weight, data_flags, keep, without_paths, write
from datasets import load_dataset
from transformers import AutoImageProcessor


sys.path.insert(0, str(ROOT))
import run_pretraining  # noqa: E402, F401  what the threads below would import at the same time
from modeling_can import CANForPreTraining  # noqa: E402
from modeling_can.plots import reconstruct  # noqa: E402


RESULTS = Path(__file__).parent / "noise"
OWN = {"noise_head": "own", "norm_noise_loss": True}
SHARED = {"noise_head": "shared", "norm_noise_loss": True}
PAPER = {"noise_head": "shared", "norm_noise_loss": False, "noise_std_max": 0.05, "denoising_loss_weight": 0.2165}
NO_C = {"contrastive_loss_weight": 0}
NO_LOSS = {"denoising_loss_weight": 0}
NO_NOISE = {"noise_std_max": 0, "denoising_loss_weight": 0}
NO_LEVEL = {"noise_level_embedding": False}
COMMON = {  # name: what differs from the base, in the order of worth
    "base": {},
    **{f"sigma-{sigma}": {"noise_std_max": sigma} for sigma in (0.05, 0.1, 0.25, 1)},
    "no-noise": NO_NOISE,
    "paper": PAPER,
    "no-loss": NO_LOSS,
    "no-level": NO_LEVEL,
    "shared": SHARED,
    **{f"weight-{weight}": {"denoising_loss_weight": weight} for weight in (0.1, 0.3, 3)},
    "raw-0.3": {"norm_noise_loss": False, "denoising_loss_weight": 0.3},
    "sigma-0.05-weight-10": {"noise_std_max": 0.05, "denoising_loss_weight": 10},
    "sigma-0.05-own-raw": {**PAPER, "noise_head": "own"},
    "no-c": NO_C,
    "no-c-sigma-0.05": {**NO_C, "noise_std_max": 0.05},
    "no-c-paper": {**PAPER, **NO_C},
    "patch-8": {"patch_size": 8},
    "decoder-32": {"decoder_hidden_size": 32, "decoder_intermediate_size": 128},
    "decoder-128": {"decoder_hidden_size": 128, "decoder_intermediate_size": 512},
    "mask-0.25": {"mask_ratio": 0.25},
}
CIFAR10 = {
    **{key: value for key, value in SCALES["toy"].items() if key != "num_train_epochs"}, **contrastive_weight(0.3),
    **OWN, "patch_size": 4, "noise_std_max": 0.5, "denoising_loss_weight": 1, "per_device_train_batch_size": 512,
    "base_learning_rate": 1e-3, "max_steps": 2000,
}  # fmt: skip
BASES = {"quickstart": {**OWN, "noise_std_max": 0.5, "denoising_loss_weight": 1}, "cifar10": CIFAR10}
RUNS = {
    "quickstart": {
        **COMMON,
        "encoder-48": {"hidden_size": 48, "intermediate_size": 192},
        "encoder-192": {"hidden_size": 192, "intermediate_size": 768},
    },
    "cifar10": {
        **COMMON,
        "encoder-64": {"hidden_size": 64, "intermediate_size": 256},
        "encoder-192": {"hidden_size": 192, "intermediate_size": 768},
        "sigma-0.25-no-loss": {**NO_LOSS, "noise_std_max": 0.25},
        "sigma-0.25-no-level": {**NO_LEVEL, "noise_std_max": 0.25},
        "sigma-0.25-shared": {**SHARED, "noise_std_max": 0.25},
    },
}
ABLATIONS = ("base", "no-noise", "no-loss", "no-level", "shared", "paper")  # with seeds 1 and 2 too
TASKS = ("knn", "linear_probe")
NOISE = "--corruptions noise --test_split test[:20%]".split()


def runs(scale: str) -> dict[str, dict]:
    """Name with seed -> settings."""
    seeded = [(name, 0) for name in RUNS[scale]] + [(name, seed) for seed in (1, 2) for name in ABLATIONS]
    return {f"{name}-seed-{seed}": {**BASES[scale], **RUNS[scale][name], "seed": seed} for name, seed in seeded}


def train(name: str, settings: dict, arguments):
    folder = Path(arguments.output_dir) / name
    if (folder / "results.json").exists():
        return
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    flags += ["--log_with", "none", "--save_steps", "100000"]
    flags += ["--output_dir", str(folder), "--overwrite_output_dir", "true"]
    if arguments.scale == "cifar10":
        flags += ["--data_on_device", "true", "--torch_compile", "false", "--logging_steps", "100"]
        flags += ["--dataloader_num_workers", "0"]
        flags = [str(Path(__file__).with_name("claims.yaml")), *data_flags(arguments), *flags]
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
    path, folder = RESULTS / f"{arguments.scale}-{name}.json", Path(arguments.weights) / name
    if path.exists() or not (folder / "results.json").exists():
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
        data = (
            (str(ROOT / "modeling_can" / "data" / "sample_data"), "test")
            if is_quickstart
            else (arguments.data, "test[:2000]")
        )
        result["gain"] = gains(folder, load_dataset(data[0], split=data[1])["image"])
    if not is_quickstart:
        result["features"] = evaluation(folder, ["--task", "knn", "linear_probe"], arguments)
        result["noise"] = evaluation(folder, ["--task", "robustness", *NOISE], arguments)
    write(path, without_paths(json.dumps(result, indent=1), arguments) + "\n")
    print(name, flush=True)


def evaluation(folder: Path, flags: list[str], arguments) -> dict:
    """run_eval.py's results.json of one model."""
    place = Path(arguments.output_dir) / folder.name
    output = place / flags[1]
    command = [sys.executable, str(ROOT / "run_eval.py"), "--model_name_or_path", str(folder), *flags]
    command += ["--baselines", "none", "--output_dir", str(output), *data_flags(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with place.with_suffix(".eval.log").open("a") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    result = json.loads((output / "results.json").read_text())
    return {**result, "results": result["results"][folder.name]}


# --- The report ------------------------------------------------------------------------------------------------------


def figures(result: dict) -> dict[str, float]:
    """Column of the table -> figure, of one run."""
    found = {f"dB, {level}": gain for level, gain in result.get("gain", {}).items()}
    if "features" in result:
        robust = result["noise"]["results"]["robustness"]
        found["k-NN"], found["probe"] = (100 * accuracy({"evaluation": result["features"]}, task) for task in TASKS)
        found["probe under noise"] = 100 * robust["accuracy"]
    else:
        probe = result["pretraining"]["probe"]["CAN, pre-trained"]
        found["k-NN"], found["probe"] = (100 * probe[task] for task in TASKS)
    if "reconstruction_loss" in result["losses"]:
        found["A"] = result["losses"]["reconstruction_loss"]
    return found


def table(scale: str) -> str:
    """Mean and standard deviation over the seeds, of what is done of a scale."""
    done = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{scale}-*.json"))]
    columns = ["dB, largest", "dB, mean", "dB, uniform", "k-NN", "probe", "probe under noise", "A"]
    columns = [name for name in columns if any(name in figures(result) for result in done)]
    lines = [f"| run | seeds | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name in RUNS[scale]:
        found = [figures(result) for result in done if result["name"].rsplit("-seed-")[0] == name]
        if found:
            cells = [spread([run[column] for run in found if column in run], column) for column in columns]
            lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], column: str) -> str:
    if not values:
        return ""
    digits = 3 if column == "A" else 1
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def report():
    parts = [
        "# The noise term, one factor at a time",
        "Written by `python benchmarks/noise.py --stage report`. By how many dB the noise in test images gets weaker: "
        "at the\nlargest level, at half of it (mean), and over sigma ~ U[0, sigma_max] (uniform). Accuracies in %; "
        "under noise on a fifth\nof the test images. A: mean square error on masked patches, while training.\n\n"
        "The base has a noise head of its own, N relative to its trivial loss with weight 1, sigma_max 0.5 and "
        "patches of 4.\n`sigma-0.05` and so on say what differs.",
        f"## CIFAR-10: 2,000 steps of 512 images, encoder 128 x 4, decoder 64 x 2\n\n{table('cifar10')}",
        f"## The quickstart's tiles: 240 steps of 128 images\n\n{table('quickstart')}",
    ]
    text = "\n\n".join(parts) + "\n"
    write(RESULTS / "README.md", text)
    print(text)


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
    arguments.further_data = None  # which claims.py has
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
