"""
The whole trainer, from JPEG files on the disk to a checkpoint, over a bare step with augmentation.

    python benchmarks/trainer.py                              # ViT-S/16 at 224, batches of 4, on CPU
    python benchmarks/trainer.py --size large --batch_size 64 --num_steps 60 --rounds 2 \\
        --dataloader_num_workers 12                           # a GPU

Bare: uint8 views -> augmentation -> forward -> backward -> AdamW, in a loop of six lines. Trainer:
`run_pretraining.py` on 256 JPEGs of 500 x 375, its steps as its own log times them, with and without the time in which
it waits for data, and on a GPU the share of the time in which it is busy. Each in fresh processes, in turn; the second
half of the steps counts.

Start-up: from the command to the end of the first step, in a fresh process. World size: as many images for each
process, one thread a process on a CPU, under `torchrun` (2 processes on a CPU, all GPUs otherwise): 1.0 would be
perfect. Writes trainer-SIZE-DEVICE.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from records import ROOT, add_out, facts, save
from tqdm import tqdm
from train_step import SIZES, recipe_arguments


sys.path.insert(0, str(ROOT))

from modeling_can import CANForPreTraining  # noqa: E402
from modeling_can.optimization import parameter_groups  # noqa: E402
from modeling_can.pretraining.builders import augmentation  # noqa: E402
from modeling_can.pretraining.compiling import compile_model, how_to_compile  # noqa: E402
from modeling_can.pretraining.recipe import parse_arguments  # noqa: E402


def write_images(folder: Path, number: int = 256):
    """Smooth colors with some grain: JPEGs of about the size that photographs have."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(number):
        colors = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = rng.normal(0, 8, (375, 500, 1))
        pixels = np.clip(np.asarray(colors) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)


def bare(argv: list[str], num_steps: int) -> dict:
    recipe = parse_arguments(argv, "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = CANForPreTraining(recipe.config).to(device).train()
    augment = augmentation(recipe).to(device)
    compiled = how_to_compile(recipe.torch_compile, device, recipe.config.drop_path_rate)
    if compiled:
        compile_model(model, compiled)
        augment.compile_transform()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, fused=True)
    batch = (recipe.per_device_train_batch_size, 2, 3, *recipe.config.image_shape)
    views = torch.randint(256, batch, dtype=torch.uint8, device=device)
    for step in range(num_steps):
        if step == num_steps // 2:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        pixel_values = augment(views)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pixel_values).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss.item()
    return {"step_seconds": (time.perf_counter() - started) / (num_steps - num_steps // 2)}


def trainer(
    argv: list[str], num_steps: int, launcher: tuple[str, ...] = (), processes: int = 1, threads: str = ""
) -> dict:
    """Seconds of a step, the fraction of them in which it waits for data, and that in which a GPU is busy."""
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        command = [*(launcher or (sys.executable,)), str(ROOT / "run_pretraining.py"), *argv, "--log_with=none",
                   f"--logging_steps={num_steps // 2}", f"--output_dir={folder}/out"]  # fmt: skip
        environment = {**os.environ, **({"OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"} if threads else {})}
        metrics, log, busy = Path(folder) / "out" / "metrics.jsonl", Path(folder) / "log.txt", []
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if on_gpu and len(logged(metrics)) == 1:  # the half that is timed
                    busy.append(utilization())
                time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
        line = logged(metrics)[1]
    batch = parse_arguments(argv, "").per_device_train_batch_size * processes
    return {"step_seconds": batch / line["images_per_second"], "data_wait": line["data_wait"],
            "gpu_busy": statistics.mean(busy) if busy else None}  # fmt: skip


def logged(metrics: Path) -> list[dict]:
    """The whole lines of a log that may be being written."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line) for line in lines]


def utilization() -> float:
    """Fraction of the last moments in which the busiest GPU ran some kernel, as the driver tells it."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return max(map(float, lines)) / 100


def start_up(argv: list[str]) -> float:
    """Seconds from the command to the log of the first step, with which the run is ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-u", str(ROOT / "run_pretraining.py"), *argv, "--log_with=none", "--max_steps=2",
                   "--logging_steps=1", f"--output_dir={folder}/out"]  # fmt: skip
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for text in process.stdout:
                if text.startswith("step 1 of"):
                    seconds = time.perf_counter() - started
                    process.kill()
                    return seconds
    raise SystemExit(f"{' '.join(command)} failed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--num_steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataloader_num_workers", type=int, default=1)
    add_out(parser)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    provenance = facts(seed=0, device="cuda" if on_gpu else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        argv = [*recipe_arguments(arguments.size), f"--data_dir={folder}/images",
                f"--per_device_train_batch_size={arguments.batch_size}", f"--max_steps={arguments.num_steps}",
                f"--dataloader_num_workers={arguments.dataloader_num_workers}"]  # fmt: skip
        world_size = torch.cuda.device_count() if on_gpu else 2
        threads = "" if on_gpu else "1"
        rounds = {"bare": [], "trainer": [], "1 process": [], f"{world_size} processes": []}
        for _ in tqdm(range(arguments.rounds)):
            with get_context("spawn").Pool(1) as pool:
                rounds["bare"].append(pool.apply(bare, (argv, arguments.num_steps)))
            rounds["trainer"].append(trainer(argv, arguments.num_steps))
            for size in {1, world_size} if world_size > 1 else ():
                launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}")
                rounds[f"{size} process{'es' * (size > 1)}"].append(
                    trainer(argv, arguments.num_steps, launcher, size, threads)
                )
        first_step = [start_up(argv) for _ in range(1 if on_gpu else arguments.rounds)]

    def ratio(of: str, to: str, key: str = "step_seconds") -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(rounds[of], rounds[to], strict=True))

    for line in rounds["trainer"]:
        line["step_seconds_without_wait"] = line["step_seconds"] * (1 - line["data_wait"])
    for line in rounds["bare"]:
        line["step_seconds_without_wait"] = line["step_seconds"]
    busy = [line["gpu_busy"] for line in rounds["trainer"] if line["gpu_busy"] is not None]
    report = {
        **provenance,
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "num_steps": arguments.num_steps,
        "rounds": rounds,
        "trainer_over_bare": ratio("trainer", "bare"),
        "trainer_over_bare_without_wait": ratio("trainer", "bare", "step_seconds_without_wait"),
        "data_wait": statistics.median(line["data_wait"] for line in rounds["trainer"]),
        "gpu_busy": statistics.median(busy) if busy else None,
        "images_per_second": statistics.median(
            arguments.batch_size / line["step_seconds"] for line in rounds["trainer"]
        ),
        "world_size": world_size,
        "step_of_all_over_one": ratio(f"{world_size} processes", "1 process") if world_size > 1 else None,
        "seconds_to_first_step": statistics.median(first_step),
    }
    save(f"trainer-{arguments.size}-{'cuda' if on_gpu else 'cpu'}", report, arguments.out)
    for name in ("trainer_over_bare", "trainer_over_bare_without_wait", "data_wait", "gpu_busy",
                 "step_of_all_over_one", "seconds_to_first_step"):  # fmt: skip
        print(f"{name:34}{report[name]}")


if __name__ == "__main__":
    main()
