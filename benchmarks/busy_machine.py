"""
What does another busy process cost a run on a CPU, with threads that spin while they wait and with threads that sleep?

    python benchmarks/busy_machine.py

Spinning: what GNU OpenMP and OpenBLAS do by default. Sleeping: what our commands set before PyTorch is imported. Both
idle and beside a process that computes without a pause, in turns, each in a fresh process: steps of the quickstart, as
its log times them, and a linear probe of 1,000 images of 768 features. Medians, written to busy_machine.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from records import ROOT, add_out, facts, save

from modeling_can.command_line import ENVIRONMENT


SPINNING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "300000", "OPENBLAS_THREAD_TIMEOUT": "26"}
PROBE = """
import time
import numpy as np
from modeling_can.evaluation.linear import linear_probe
generator = np.random.default_rng(0)
features, labels = generator.standard_normal((1000, 768), dtype=np.float32), generator.integers(10, size=1000)
began = time.perf_counter()
linear_probe(features, labels, num_classes=10)
print(time.perf_counter() - began)
"""


@contextlib.contextmanager
def another_process(is_busy: bool):
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def step_seconds(environment: dict, num_steps: int) -> float:
    """Of the second half of the steps."""
    with tempfile.TemporaryDirectory() as folder:
        half = num_steps // 2
        command = [sys.executable, str(ROOT / "run_pretraining.py"), f"--max_steps={num_steps}", "--log_with=none",
                   f"--logging_steps={half}", "--probe_dataset_name=none", f"--output_dir={folder}/out"]  # fmt: skip
        subprocess.run(command, env=environment, check=True, capture_output=True)
        *_, line = (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()
        batch_size = json.loads((Path(folder) / "out" / "results.json").read_text())["global_batch_size"]
        return batch_size / json.loads(line)["images_per_second"]


def probe_seconds(environment: dict) -> float:
    answer = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, check=True, capture_output=True, text=True, cwd=ROOT
    )
    return float(answer.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_steps", type=int, default=12)
    add_out(parser)
    arguments = parser.parse_args()
    report = {**facts(seed=0), "num_steps": arguments.num_steps, "rounds": arguments.rounds}
    usual = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    seconds = {}
    for _ in range(arguments.rounds):
        for load in ("idle", "busy"):
            for name, environment in {"spinning": usual | SPINNING, "sleeping": usual | ENVIRONMENT}.items():
                with another_process(load == "busy"):
                    found = {
                        "step": step_seconds(environment, arguments.num_steps),
                        "probe": probe_seconds(environment),
                    }
                for what, value in found.items():
                    seconds.setdefault(f"{what}, {load}, {name}", []).append(value)
                print(load, name, found, flush=True)
    report["load_at_the_end"] = os.getloadavg()[0]  # of this benchmark's own processes, on an idle machine
    report["seconds"] = seconds
    report["medians"] = {name: statistics.median(values) for name, values in seconds.items()}
    save("busy_machine", report, arguments.out)


if __name__ == "__main__":
    main()
