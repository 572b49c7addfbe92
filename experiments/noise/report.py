"""The tables of the study, from its JSONs alone."""

import json
import statistics
from pathlib import Path

from experiments.cifar10.runs import accuracy
from experiments.noise.runs import RUNS
from modeling_can.files import write


__all__ = ["RESULTS", "report", "table"]

RESULTS = Path(__file__).parent / "results"
TASKS = ("knn", "linear_probe")


def figures(result: dict) -> dict[str, float]:
    """Column of the table -> figure, of one run."""
    found = {f"dB, {level}": gain for level, gain in result.get("gain", {}).items()}
    if "features" in result:
        found["k-NN"], found["probe"] = (100 * accuracy({"evaluation": result["features"]}, task) for task in TASKS)
    else:
        probe = result["pretraining"]["probe"]["CAN, pre-trained"]
        found["k-NN"], found["probe"] = (100 * probe[task] for task in TASKS)
    if "noise" in result:
        found["probe under noise"] = 100 * result["noise"]["results"]["robustness"]["accuracy"]
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
    """README.md of the study."""
    parts = [
        "# The noise term, one factor at a time",
        "Written by `python experiments/noise/study.py --stage report`. By how many dB the noise in test images gets "
        "weaker: at\nthe largest level, at half of it (mean), and over sigma ~ U[0, sigma_max] (uniform). Accuracies "
        "in %; under noise on\nCIFAR-10 on a fifth of the test images. A: mean "
        "square error on masked patches, while training.\n\n"
        "The base has a noise head of its own, N relative to its trivial loss with weight 1, sigma_max 0.5 and "
        "patches of 4.\n`sigma-0.05` and so on say what differs.",
        f"## CIFAR-10: 2,000 steps of 512 images, encoder 128 x 4, decoder 64 x 2\n\n{table('cifar10')}",
        f"## The quickstart's tiles: 240 steps of 128 images\n\n{table('quickstart')}",
    ]
    text = "\n\n".join(parts) + "\n"
    write(RESULTS.parent / "README.md", text)
    print(text)
