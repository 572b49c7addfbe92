"""
Three and four views on the quickstart's tiles, at the FLOPs and the steps of its two: the more views, the fewer images
a step. (On CIFAR-10: stage `views` of experiments/cifar10/study.py.)

    python experiments/views.py        # minutes on two CPU cores

Writes experiments/views.json. The runs with two views are those of model_cards/can-quickstart/results.json.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import yaml


sys.path.insert(0, str(Path(__file__).parents[1]))  # the root of the repository, which need not be installed
from experiments.commands import ROOT, as_flags, run_script  # noqa: E402
from experiments.keeping import without_paths  # noqa: E402
from modeling_can.files import write  # noqa: E402


QUICKSTART = ROOT / "model_cards" / "can-quickstart"
RESULTS = Path(__file__).with_suffix(".json")


def run(num_views: int, seed: int) -> dict:
    recipe = yaml.safe_load((QUICKSTART / "recipe.yaml").read_text())
    flags = {
        "num_views": num_views,
        "per_device_train_batch_size": round(2 * recipe["per_device_train_batch_size"] / num_views),
        "base_learning_rate": float(recipe["base_learning_rate"]) * num_views / 2,  # the same peak
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        run_script(2, "run_pretraining.py", *as_flags({**flags, "output_dir": folder}))
        return json.loads(without_paths((Path(folder) / "results.json").read_text(), {folder: "OUT", str(ROOT): "."}))


def table() -> str:
    """Mean and standard deviation over the seeds, from the JSONs alone."""
    done = {2: json.loads((QUICKSTART / "results.json").read_text())}
    done |= {int(views): runs for views, runs in json.loads(RESULTS.read_text()).items()}
    lines = ["| views | seeds | linear probe | k-NN | TFLOP in all |", "|---|---|---|---|---|"]
    for num_views, runs in done.items():
        cells = []
        for task in ("linear_probe", "knn"):
            values = [100 * run["probe"]["CAN, pre-trained"][task] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        flops = f"{runs[0]['train_flops'] / 1e12:.1f}"
        lines.append(f"| {num_views} | {len(runs)} | {' | '.join(cells)} | {flops} |")
    return "\n".join(lines)


def main():
    write(RESULTS, json.dumps({views: [run(views, seed) for seed in range(3)] for views in (3, 4)}, indent=1) + "\n")
    print(table())


if __name__ == "__main__":
    main()
