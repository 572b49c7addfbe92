"""
What the machine itself can do: a copy in memory and one large matrix product, with the versions of its software.

    python benchmarks/ceilings.py

Copy: GB/s, bytes read and written, within the device's memory (two buffers of 8 GB on a GPU, of 0.25 GB on a CPU).
Product: TFLOP/s on random data (8192^3 in bf16 on a GPU, 2048^3 in fp32 on a CPU). Medians of 8. Takes seconds; writes
ceilings-DEVICE.json.
"""

import argparse
import statistics
import subprocess
from functools import partial

import torch
from records import add_out, facts, save
from train_step import large_product_tflops, timed

from modeling_can.provenance import installed_versions


PACKAGES = ("pyarrow", "simplejpeg", "torchdata", "evaluate", "peft", "huggingface_hub", "tokenizers", "pytest")


def copy_rate(device) -> float:
    """GB/s, bytes read and written."""
    source = torch.ones(8_000_000_000 if device.type == "cuda" else 250_000_000, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    return 2 * source.nbytes / statistics.median([timed(copy, device) for _ in range(10)][2:]) / 1e9


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = facts(seed=None, device=device)
    report["versions"] |= installed_versions(PACKAGES)
    report |= {
        "cuda": torch.version.cuda,
        "driver": driver(),
        "copy_gb_per_second": copy_rate(device),
        "large_product_tflops": large_product_tflops(device),
    }
    save(f"ceilings-{device.type}", report, arguments.out)
    for name, value in report.items():
        print(f"{name:24}{value}")


if __name__ == "__main__":
    main()
