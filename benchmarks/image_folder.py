"""
What do many image files in a folder cost a run before its first step, and what do its processes hold of them?

    python benchmarks/image_folder.py                       # folders of 10^3, 10^4, 10^5 and 10^6 small JPEGs
    python benchmarks/image_folder.py --before COMMIT       # also as of another commit, in turn

Each folder has class folders of 1,000 files, under the folder for temporary files; a million need 4 GB. Measured with
an empty cache (`first`) and with the list in it (`again`), medians of the rounds:

- `list_seconds`, `list_cpu_seconds`, `list_peak_mb`: of `ImageSource(data_dir=FOLDER)` in a fresh process, and by how
  much its peak memory exceeds what it had before.
- `first_step_seconds`: from the command `run_pretraining.py`, with a tiny model and two workers, to its first step.
- `run_mb` and `worker_mb`: after each worker has read a block: the memory of main process and workers, what they share
  counted once; and what a worker shares with nobody.
- `server_list_seconds`, of the two smaller folders: the same listing if each size took half a millisecond more, as
  on a server in the network.

The operating system has just written all names and sizes and still holds them: after a boot, a first listing also
waits for the disk. Written to image_folder.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from records import ROOT, add_out, facts, save
from tqdm import tqdm


RUN = ["can-quickstart", "--probe_dataset_name=none", "--log_with=none", "--max_steps=1000", "--logging_steps=1",
       "--per_device_train_batch_size=64", "--dataloader_num_workers=2", "--hidden_size=32", "--num_hidden_layers=1",
       "--num_attention_heads=2", "--intermediate_size=64"]  # fmt: skip
LAST_STEP = 34  # by then each of two workers has read 1,024 images, a block, and more
LIST = """
import json, os, sys, time
from modeling_can.data import ImageSource

def memory(name):
    return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

stat, seconds = os.stat, float(sys.argv[2])
if seconds:
    os.stat = lambda *place, **options: time.sleep(seconds) or stat(*place, **options)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # from here on the peak is counted anew
before, began, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
source = ImageSource(data_dir=sys.argv[1])
print(json.dumps({"list_seconds": time.perf_counter() - began, "list_cpu_seconds": time.process_time() - cpu,
                  "list_peak_mb": (memory("VmHWM") - before) / 1e6, "fingerprint": source.fingerprint}))
"""
DELAY, MOST_DELAYED = 0.0005, 10_000  # seconds for each size, and images


def write_images(folder: Path, number: int):
    rng, encoded = np.random.default_rng(0), []
    for _ in range(64):
        file = BytesIO()
        colors = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((48, 48), 3)
        colors.save(file, "JPEG", quality=int(rng.integers(70, 95)))
        encoded.append(file.getvalue())
    for index in tqdm(range(number), f"writing {number:,} images"):
        place = folder / f"class_{index // 1000:04}"
        if index % 1000 == 0:
            place.mkdir(parents=True, exist_ok=True)
        (place / f"image_{index:08}.jpg").write_bytes(encoded[index % 64])


def environment(checkout: Path, cache: Path) -> dict[str, str]:
    return {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(checkout)}


def measure_list(checkout: Path, images: Path, cache: Path, delay: float = 0) -> dict[str, float]:
    """Of one checkout of this repository, whose list `cache` may hold already."""
    command = [sys.executable, "-c", LIST, str(images), str(delay)]
    options = {"env": environment(checkout, cache), "cwd": checkout, "check": True}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, **options).stdout)


def measure_run(checkout: Path, images: Path, cache: Path) -> dict[str, float]:
    options = {"env": environment(checkout, cache), "cwd": checkout, "stderr": subprocess.DEVNULL, "text": True}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-u", str(checkout / "run_pretraining.py"), *RUN, f"--data_dir={images}",
                   f"--output_dir={folder}/out"]  # fmt: skip
        found, began = {}, time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
            for line in process.stdout:
                if line.startswith("step 1 of"):
                    found["first_step_seconds"] = time.perf_counter() - began
                if line.startswith(f"step {LAST_STEP} of"):
                    main = psutil.Process(process.pid)
                    own, *workers = [one.memory_full_info() for one in (main, *main.children())]
                    found["run_mb"] = sum(one.pss for one in (own, *workers)) / 1e6
                    found["worker_mb"] = max(one.uss for one in workers) / 1e6
                    process.kill()
        if "worker_mb" not in found:
            raise SystemExit(f"{' '.join(command)} failed")
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--images", type=Path, help="folder to write the images to, and keep them for another time")
    parser.add_argument("--before", help="a commit that is measured too")
    parser.add_argument("--rounds", type=int, default=3)
    add_out(parser)
    arguments = parser.parse_args()
    provenance = facts(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        git, checkouts = ["git", "-C", str(ROOT), "worktree"], {"now": ROOT}
        if arguments.before:
            subprocess.run([*git, "add", "--detach", folder / "before", arguments.before], check=True)
            checkouts = {"before": folder / "before", **checkouts}
        try:
            results = {}
            for number in arguments.numbers:
                images = (arguments.images or folder).resolve() / str(number)
                if not images.exists():
                    write_images(images, number)
                results[number] = of_a_folder(images, checkouts, arguments.rounds)
                print(number, json.dumps(results[number], indent=2))
        finally:
            if arguments.before:
                subprocess.run([*git, "remove", "--force", folder / "before"], check=True)
    report = {"before": arguments.before, "rounds": arguments.rounds, "results": results}
    save("image_folder", {**provenance, **report}, arguments.out)


def of_a_folder(images: Path, checkouts: dict[str, Path], num_rounds: int) -> dict[str, dict]:
    """By `before`, `first` and `again`: the medians. All must find the same images in the same order."""
    rounds, fingerprints = {}, set()
    for _ in tqdm(range(num_rounds), images.name):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as cache:
                for when in ("before",) if name == "before" else ("first", "again"):
                    list_cache, run_cache = Path(cache) / "list", Path(cache) / "run"
                    found = measure_list(checkout, images, list_cache) | measure_run(checkout, images, run_cache)
                    fingerprints.add(found.pop("fingerprint"))
                    if int(images.name) <= MOST_DELAYED:
                        delayed = measure_list(checkout, images, Path(cache) / "delayed", DELAY)
                        found["server_list_seconds"] = delayed["list_seconds"]
                    rounds.setdefault(when, []).append(found)
    if len(fingerprints) > 1:
        raise SystemExit(f"{images}: fingerprints {fingerprints}")
    return {when: medians(found) for when, found in rounds.items()}


if __name__ == "__main__":
    main()
