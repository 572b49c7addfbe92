"""
What does `import modeling_can` add to importing torch and transformers' own ViT model?

    python benchmarks/import_time.py

Fresh interpreters, one after the other; medians, written to import_time.json beside this file.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from evidence import facts, save


CODE = """
import time
started = time.perf_counter()
import torch
from transformers import ViTModel
middle = time.perf_counter()
import modeling_can
print(middle - started, time.perf_counter() - middle)
"""
ROOT = Path(__file__).parent.parent


def main(runs: int = 7):
    lines = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(runs)
    ]
    base, added = (
        statistics.median(column) for column in zip(*(map(float, line.split()) for line in lines), strict=True)
    )
    report = {"torch_and_vit_seconds": base, "modeling_can_adds_seconds": added, "runs": runs}
    save("import_time", {**facts(seed=None), **report})
    print(report)


if __name__ == "__main__":
    main()
