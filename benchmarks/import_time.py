"""
What does `import modeling_can` add to importing torch and transformers' own ViT model?

    python benchmarks/import_time.py

Fresh interpreters, one after the other; medians, written to import_time.json.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from records import add_out, facts, save


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
RUNS = 7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    arguments = parser.parse_args()
    lines = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(RUNS)
    ]
    base, added = (
        statistics.median(column) for column in zip(*(map(float, line.split()) for line in lines), strict=True)
    )
    report = {"torch_and_vit_seconds": base, "modeling_can_adds_seconds": added, "runs": RUNS}
    save("import_time", {**facts(seed=None), **report}, arguments.out)
    print(report)


if __name__ == "__main__":
    main()
