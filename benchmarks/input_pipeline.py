"""
How many images a second come out of the input pipeline, from encoded photographs to batches of two views?

    python benchmarks/input_pipeline.py PHOTOS.parquet [MORE.parquet ...]
    python benchmarks/input_pipeline.py PHOTOS.parquet --num_images 500 --soak 200000

Per core, from wall and CPU time of this process and its loader workers, with 0, 1 and 2 workers:

- baseline: what most trainers do, decode in Pillow and two full pipelines in Pillow and numpy to float tensors (random
  resized crop, bicubic; flip, color jitter, grayscale, blur, normalize; SimCLR's probabilities); and the same with
  the image decoded for each view;
- ours: decode once, two crops as uint8, bilinear and bicubic; the photometric steps run in batch on the device, and
  are timed by themselves.

The 500 first images of a run are not counted: the processes start. --soak N reads N more and notes the memory of the
worker at every tenth. Result: a table and input_pipeline.json.
"""

import argparse
import io
import os
import random
import resource
import statistics
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from records import add_out, facts, save
from tqdm import tqdm

from modeling_can.data import ImageSource, ViewStream, view_loader
from modeling_can.data.augmentations import Augmentation
from modeling_can.data.crops import RandomCrops, random_box


SIZE, BATCH_SIZE = 224, 50
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


class PillowPipelines:
    """Encoded image -> two augmented views, float32 (2, 3, 224, 224), everything in Pillow."""

    def __init__(self, decode_once: bool):
        self.decode_once = decode_once

    def __call__(self, encoded: bytes, epoch: int) -> np.ndarray:
        if not self.decode_once:
            return np.stack([self.view(self.decode(encoded)) for _ in range(2)])
        image = self.decode(encoded)
        return np.stack([self.view(image) for _ in range(2)])

    def decode(self, encoded):
        return Image.open(io.BytesIO(encoded)).convert("RGB")

    def view(self, image):
        rng = np.random.default_rng()
        box = random_box(image.size, (0.2, 1.0), (3 / 4, 4 / 3), rng)
        image = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        if random.random() < 0.8:
            steps = [
                lambda i: ImageEnhance.Brightness(i).enhance(random.uniform(0.6, 1.4)),
                lambda i: ImageEnhance.Contrast(i).enhance(random.uniform(0.6, 1.4)),
                lambda i: ImageEnhance.Color(i).enhance(random.uniform(0.6, 1.4)),
                self.hue,
            ]
            random.shuffle(steps)
            for step in steps:
                image = step(image)
        if random.random() < 0.2:
            image = image.convert("L").convert("RGB")
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        pixels = np.asarray(image, dtype=np.float32) / 255
        return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))

    def hue(self, image):
        hue, saturation, value = image.convert("HSV").split()
        shift = round(random.uniform(-0.1, 0.1) * 255)
        hue = Image.fromarray(np.asarray(hue) + np.array(shift).astype(np.uint8))
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


PIPELINES = {
    "baseline": PillowPipelines(decode_once=True),
    "baseline, decoded twice": PillowPipelines(decode_once=False),
    "ours, bicubic": RandomCrops((SIZE, SIZE), resample="bicubic"),
    "ours": RandomCrops((SIZE, SIZE)),
}


def read(source, make_views, num_workers, num_images) -> dict:
    """Images a second of wall time and of CPU time (this process and its workers), the first batches left out."""
    loader = view_loader(ViewStream(source, make_views, block_size=256), BATCH_SIZE, num_workers)
    batches = iter(loader)
    for _ in range(500 // BATCH_SIZE):
        next(batches)
    started, cpu_started = time.perf_counter(), cpu_seconds()
    for _ in range(num_images // BATCH_SIZE):
        next(batches)
    wall, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
    return {"images_per_second": num_images / wall, "images_per_cpu_second": num_images / cpu}


def cpu_seconds() -> float:
    """Of this process and its living children, from /proc."""
    tick = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in path.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def augmentation(device: str) -> dict:
    """Images (of two views) a second through the augmentation on a device."""
    views = torch.randint(0, 256, (BATCH_SIZE, 2, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    augment = Augmentation().to(device)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        augment(views).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {"images_per_second": BATCH_SIZE / statistics.median(seconds[1:]), "threads": torch.get_num_threads()}


def soak(source, num_images) -> list[dict]:
    """Resident memory of a worker in this process over a long stream of small views."""
    stream = iter(view_loader(ViewStream(source, RandomCrops((32, 32)), block_size=256), BATCH_SIZE))
    memory = []
    for step in tqdm(range(num_images // BATCH_SIZE), desc="soak", unit="batch"):
        next(stream)
        if (step + 1) % max(1, num_images // BATCH_SIZE // 20) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append({"images": (step + 1) * BATCH_SIZE, "mib": pages * resource.getpagesize() / 2**20})
    return memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_files", nargs="+", help="parquet files with a column of images")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--num_images", type=int, default=1000, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0, help="images to stream for the memory measurement")
    add_out(parser)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    source = ImageSource(data_files=arguments.data_files, image_column=arguments.image_column)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's worker
    measured = {(name, workers): [] for name in PIPELINES for workers in (0, 1, 2)}
    for _ in tqdm(range(arguments.rounds), desc="rounds"):  # interleaved: machines drift
        for (name, workers), results in measured.items():
            num_images = arguments.num_images // (5 if name.startswith("baseline") else 1)
            results.append(read(source, PIPELINES[name], workers, num_images))
    pipelines = [
        {"pipeline": name, "workers": workers}
        | {key: statistics.median(result[key] for result in results) for key in results[0]}
        for (name, workers), results in measured.items()
    ]
    per_core = {
        name: statistics.median(
            ours["images_per_cpu_second"] / base["images_per_cpu_second"]
            for ours, base in zip(measured[name, 0], measured["baseline", 0], strict=True)
        )
        for name in PIPELINES
    }
    torch.set_num_threads(threads)
    by_key = {(line["pipeline"], line["workers"]): line for line in pipelines}
    report = {
        **facts(seed=None),
        "source": [Path(file).name for file in arguments.data_files],
        "num_images": arguments.num_images,
        "rounds": arguments.rounds,
        "cpu_count": os.cpu_count(),
        "pipelines": pipelines,
        "per_core_over_baseline": per_core,
        "cpu_time_two_workers_over_one": by_key["ours", 1]["images_per_cpu_second"]
        / by_key["ours", 2]["images_per_cpu_second"],
        "augmentation": {device: augmentation(device) for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]},
        "memory": soak(source, arguments.soak) if arguments.soak else None,
    }
    for place in arguments.data_files:  # where they lie is no part of the result
        report["command"] = report["command"].replace(place, Path(place).name)
    save("input_pipeline", report, arguments.out)

    print(f"\n{'':24}{'workers':>8}{'images/s':>10}{'images/CPU s':>14}{'x baseline per core':>21}")
    for line in pipelines:
        times = f"{per_core[line['pipeline']]:.1f}" if line["workers"] == 0 else ""
        print(f"{line['pipeline']:24}{line['workers']:8}{line['images_per_second']:10.0f}"
              f"{line['images_per_cpu_second']:14.0f}{times:>21}")  # fmt: skip
    print(f"CPU time an image, two workers over one: {report['cpu_time_two_workers_over_one']:.2f}")
    for device, result in report["augmentation"].items():
        print(f"augmentation on {device}: {result['images_per_second']:.0f} images/s")
    if report["memory"]:
        print("memory, MiB: " + ", ".join(f"{m['mib']:.0f} at {m['images']:,}" for m in report["memory"]))


if __name__ == "__main__":
    main()
