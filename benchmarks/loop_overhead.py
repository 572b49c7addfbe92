"""
What do the loop's duties (logs, health, guard, signals, trackers) cost, over a bare step with augmentation?

    python benchmarks/loop_overhead.py                                     # ViT-B/16 at 224, batches of 4, on CPU
    python benchmarks/loop_overhead.py --batch_size 128 --num_steps 60 --rounds 5      # a GPU

Bare: uint8 views -> augmentation -> forward -> backward -> AdamW, in a loop of six lines. Script: `run_pretraining.py`
on noise, its steps as its own log times them, without the time that it waits for data. Each in fresh processes, in
turn; the second half of the steps counts. Writes loop_overhead-SIZE-DEVICE.json beside this file.
"""

import argparse
import json
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm
from train_step import cpu_name

import run_pretraining
from modeling_can import CANForPreTraining
from modeling_can.recipe import parse_arguments
from modeling_can.training import parameter_groups


def bare(argv: list[str], num_steps: int) -> float:
    """Seconds a step."""
    recipe = parse_arguments(argv, run_pretraining.QUICKSTART, "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = CANForPreTraining(recipe.config).to(device).train()
    augment = run_pretraining.augmentation(recipe).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, fused=True)
    batch = (recipe.per_device_train_batch_size, 2, 3, *recipe.config.image_shape)
    views = torch.randint(256, batch, dtype=torch.uint8, device=device)
    for step in range(num_steps):
        if step == num_steps // 2:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(augment(views)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loss.item()
    return (time.perf_counter() - started) / (num_steps - num_steps // 2)


def script(argv: list[str], num_steps: int) -> float:
    """Seconds a step."""
    pictures = Dataset.from_dict({"image": [Image.effect_noise((300, 300), 60).convert("RGB")] * 64})
    with tempfile.TemporaryDirectory() as folder:
        run_pretraining.main([*argv, f"--logging_steps={num_steps // 2}", f"--output_dir={folder}/out"], pictures)
        lines = (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[1])
    recipe = parse_arguments(argv, run_pretraining.QUICKSTART, "")
    return (1 - line["data_wait"]) * recipe.per_device_train_batch_size / line["images_per_second"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=["tiny", "small", "base", "large", "huge"])
    parser.add_argument("--batch_size", type=int, default=4, help="images, each in two views")
    parser.add_argument("--num_steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    arguments = parser.parse_args()
    patch = 14 if arguments.size == "huge" else 16
    recipe = (
        Path(__file__).parent.parent / "model_cards" / f"can-vit-{arguments.size}-patch{patch}-224" / "recipe.yaml"
    )
    argv = [str(recipe), f"--per_device_train_batch_size={arguments.batch_size}", f"--max_steps={arguments.num_steps}",
            f"--dataloader_num_workers={arguments.dataloader_num_workers}"]  # fmt: skip
    seconds = {"bare": [], "script": []}
    for _ in tqdm(range(arguments.rounds)):
        for name, function in (("bare", bare), ("script", script)):
            with get_context("spawn").Pool(1) as pool:
                seconds[name].append(pool.apply(function, (argv, arguments.num_steps)))
    ratios = [s / b for s, b in zip(seconds["script"], seconds["bare"], strict=True)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "num_steps": arguments.num_steps,
        "step_seconds": seconds,
        "script_over_bare": statistics.median(ratios),
        "machine": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
    }
    path = Path(__file__).parent / f"loop_overhead-{arguments.size}-{device}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"script / bare: {report['script_over_bare']:.3f} (rounds: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
