"""
Is it worth it to go on from a model on one's own images, and how? The model that comes with the code, on photographs.

    python experiments/adapting/study.py --data PHOTOS        # a folder of parquet shards: columns image and label

It takes 1,000 photographs about two hours on two CPU cores. All runs see all images without their labels; k-NN and
linear probe learn from the labels of one half and are tested on the other. A run whose JSON is in
experiments/adapting/results is not done again. README.md gets the table.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the root of the repository, which need not be installed
from experiments.commands import as_flags, evaluate, run_script  # noqa: E402
from experiments.keeping import without_paths  # noqa: E402
from modeling_can.conversion.export import convert  # noqa: E402
from modeling_can.files import write  # noqa: E402
from modeling_can.pretraining.sizes import sizes_of_start  # noqa: E402


RESULTS, README = Path(__file__).parent / "results", Path(__file__).parent / "README.md"
KEPT = ROOT / "model_cards" / "can-toy-patch4-32-cifar10"
NEW = {"layer_decay": 1, "frozen_encoder_ratio": 0}  # as of new weights
# Row of the table: where it starts (the whole model, its encoder alone, or new weights), what differs from can-adapt,
# and the number of seeds. "chosen": without a recipe, all other settings are chosen for the images.
ROWS = {
    "can-adapt": ("model", {}, 3),
    "new weights": ("new", NEW, 3),
    "nothing held back": ("model", NEW, 3),
    "its encoder alone": ("encoder", {}, 1),
    "its encoder alone, nothing frozen": ("encoder", {"frozen_encoder_ratio": 0}, 1),
    "a quarter of the rate": ("model", {"base_learning_rate": 5e-4}, 1),
    "a quarter of the rate, the same for all blocks": ("model", {"base_learning_rate": 5e-4, "layer_decay": 1}, 1),
    "automatic choices, 100 epochs": ("chosen", {"num_train_epochs": 100, "dataloader_num_workers": 0}, 1),
}
# Rows above the runs, measured once: which baseline of run_eval.py it is; None: the start itself
BEFORE = {
    "raw pixels": "pixels",
    "an untrained encoder like the start": "untrained",
    "the start, not trained further": None,
}


def runs() -> list[tuple[str, int]]:
    """The first seed of all rows, then the others."""
    return [(row, seed) for seed in range(3) for row, (_, _, num_seeds) in ROWS.items() if seed < num_seeds]


def path_of(row: str, seed: int) -> Path:
    return RESULTS / f"{row.replace(' ', '-').replace(',', '')}-seed{seed}.json"


def before_path(baseline: str | None) -> Path:
    return RESULTS / f"{baseline or 'start'}.json"


def do(row: str, seed: int, arguments):
    start, settings, _ = ROWS[row]
    place = Path(arguments.output_dir).resolve()
    folder = place / path_of(row, seed).stem
    encoder = place / "encoder"
    if start == "encoder" and not encoder.exists():
        convert(str(KEPT), "vit", encoder)
    sizes = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in sizes_of_start(str(KEPT), {}).items()
    }
    begin = {
        "model": {"model_name_or_path": str(KEPT)},
        "encoder": {"model_name_or_path": str(encoder)},
        "new": {**sizes, "base_learning_rate": 2e-3},
        "chosen": {},
    }
    flags = as_flags({**begin[start], **settings, "seed": seed, "dataset_name": arguments.data})
    flags += as_flags({"output_dir": str(folder), "log_with": "none", "resume_from_checkpoint": "latest"})
    recipe = [] if start == "chosen" else ["can-adapt"]
    run_script(arguments.threads, "run_pretraining.py", *recipe, *flags, log=folder.with_suffix(".log"))
    measured = {"evaluation": of_half(folder, place, arguments)}
    measured |= {"row": row, "seed": seed, "settings": settings, "start": start}
    measured["pretraining"] = json.loads((folder / "results.json").read_text())
    keep(path_of(row, seed), measured, place, arguments)


def of_half(model: Path, place: Path, arguments, baseline: str | None = None) -> dict:
    flags = ["--dataset_name", arguments.data, "--test_size", "0.5"]
    name = f"{model.name}-{baseline}" if baseline else model.name
    return evaluate(model, place / name, ("knn", "linear_probe"), flags, arguments.threads, baseline)


def keep(path: Path, measured: dict, place: Path, arguments):
    RESULTS.mkdir(exist_ok=True)
    places = {str(place): "OUT", arguments.data: "PHOTOS", str(ROOT): "."}
    write(path, without_paths(json.dumps(measured, indent=1), places) + "\n")


def cell(found: list[dict], task: str) -> str:
    """Mean over the seeds, and half the 95 % interval of the test images."""
    figures = [each["evaluation"]["results"][task] for each in found]
    figures = [figure["20"] if task == "knn" else figure for figure in figures]
    values = [100 * figure["accuracy"] for figure in figures]
    half = statistics.mean(50 * (figure["interval"][1] - figure["interval"][0]) for figure in figures)
    each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f} ± {half:.1f}{each}"


def table() -> str:
    lines = ["| run | k-NN | linear probe |", "|---|---|---|"]
    paths = {row: [before_path(baseline)] for row, baseline in BEFORE.items()}
    paths |= {row: [path_of(row, seed) for seed in range(num_seeds)] for row, (_, _, num_seeds) in ROWS.items()}
    for row, places in paths.items():
        if found := [json.loads(path.read_text()) for path in places if path.exists()]:
            lines.append(f"| {row} | {cell(found, 'knn')} | {cell(found, 'linear_probe')} |")
    return "\n".join(lines) + "\n"


def report():
    begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
    before, _, rest = README.read_text().partition(begin)
    write(README, before + begin + table() + end + rest.partition(end)[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of labeled images that datasets.load_dataset reads")
    parser.add_argument("--output_dir", default="out/adapting", help="for weights and logs")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    arguments = parser.parse_args()
    arguments.data = str(Path(arguments.data).resolve())
    place = Path(arguments.output_dir).resolve()
    for baseline in BEFORE.values():
        if not before_path(baseline).exists():
            measured = {"evaluation": of_half(KEPT, place, arguments, baseline)}
            keep(before_path(baseline), measured, place, arguments)
    for row, seed in runs():
        if not path_of(row, seed).exists():
            print(f"=== {row}, seed {seed} ===", flush=True)
            do(row, seed, arguments)
            report()


if __name__ == "__main__":
    main()
