"""What the JSON of a benchmark says of itself, and where it goes."""

import argparse
import json
import platform
import re
import sys
from pathlib import Path

import torch

from modeling_can.files import write
from modeling_can.provenance import run_facts


__all__ = ["ROOT", "add_out", "facts", "save"]

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "numpy", "scikit-learn", "pillow")


def facts(seed: int | None, device: str | torch.device = "cpu") -> dict:
    """
    Command, seed, machine, versions and commit, the first keys of a report; to be called before anything takes time,
    so that they are those of the start. `commit` is that of `run_facts`.
    """
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    command = " ".join(["python", str(script), *sys.argv[1:]])
    found = run_facts(torch.device(device), PACKAGES)
    return {
        "command": re.sub(r" --out[ =]\S+", "", command),  # where it lies is no part of the result
        "seed": seed,
        "machine": found["machine"],
        "versions": {"python": platform.python_version(), **found["versions"]},
        "commit": found["git_commit"],
    }


def add_out(parser: argparse.ArgumentParser):
    """The option --out, which `save` understands."""
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the JSON, or its name if it ends in .json")


def save(name: str, report: dict, out: Path):
    """Writes the JSON whole or not at all, as `out` says (see `add_out`)."""
    path = out if out.suffix == ".json" else out / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(report, indent=2) + "\n")
    print(f"Written to {path.name}")
