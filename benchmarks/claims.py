"""
The claims of the paper at a scale that runs here: CAN, SimCLR and MAE as three recipes of the same code.

    python benchmarks/claims.py --data CIFAR10_FOLDER --stage search main      # hours on two CPU cores
    python benchmarks/claims.py --stage report                                 # tables and figures from the JSONs
    python benchmarks/claims.py --data CIFAR10_FOLDER --scale tiny             # on a GPU

--data is a folder of parquet shards with train and test splits (columns image and label), or a Hub id
(uoft-cs/cifar10, with --image_column img). All rows see the same unlabelled training images with the same encoder,
batch, optimiser, augmentation and number of epochs. Stages, in this order:

search     each method's learning rate, MAE's mask ratio and CAN's contrastive weight, at a shorter schedule; judged by
           a linear probe on a fifth of the training images, so that the test images have no say
main       CAN (searched, and with the paper's weights), SimCLR, MAE with two views and with one; three seeds
scaling    10 %, 30 % of the images
ablations  CAN without each term, noise without its loss, mask ratios, normalised targets

What is done is not done again: a JSON for each run in benchmarks/claims/SCALE, with command, machine, versions, commit
and seed. An interrupted run goes on from its checkpoint. Weights stay in --output_dir.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "claims"
SCALES = {
    # The toy trial that two CPU cores finish: 16 patches, 0.9 M parameters in the encoder
    "toy": {
        "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 512, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 256, "num_train_epochs": 8,
    },
    # ViT-tiny, 64 patches: for a GPU
    "tiny": {
        "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
        "intermediate_size": 768, "decoder_hidden_size": 192, "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": 6, "decoder_intermediate_size": 768, "num_train_epochs": 200,
        "dataloader_num_workers": 12,
    },
}  # fmt: skip
SEARCH_EPOCHS = {"toy": 3, "tiny": 20}
CAN = {"mask_ratio": 0.5}
SIMCLR = {"mask_ratio": 0, "noise_std_max": 0, "contrastive_loss_weight": 1, "reconstruction_loss_weight": 0,
          "denoising_loss_weight": 0}  # fmt: skip
MAE = {"mask_ratio": 0.75, "noise_std_max": 0, "contrastive_loss_weight": 0, "reconstruction_loss_weight": 1,
       "denoising_loss_weight": 0}  # fmt: skip
METHODS = {"CAN": CAN, "SimCLR": SIMCLR, "MAE": MAE}
LEARNING_RATES = (5e-4, 1e-3, 2e-3)


def contrastive_weight(weight: float) -> dict:
    """The rest is shared by reconstruction and noise prediction as in the paper's authors' release, 0.67 to 0.30."""
    rest = 1 - weight
    return {
        "contrastive_loss_weight": weight,
        "reconstruction_loss_weight": round(rest * 0.67 / 0.97, 4),
        "denoising_loss_weight": round(rest * 0.30 / 0.97, 4),
    }


@dataclass(frozen=True)
class Run:
    """A row of a table: a recipe and what is measured of it."""

    stage: str
    method: str
    settings: dict = field(default_factory=dict)
    seed: int = 0
    tasks: tuple[str, ...] = ("knn", "linear_probe")

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in sorted(self.settings.items())]
        return "_".join([self.stage, self.method.replace(" ", "-").replace(",", ""), *words, f"seed={self.seed}"])


def search(scale: str) -> list[Run]:
    """First the learning rate with each method's own settings, then the rest at the best one."""
    short = {"num_train_epochs": SEARCH_EPOCHS[scale]}
    runs = [
        Run("search", method, {**short, "base_learning_rate": rate}) for method in METHODS for rate in LEARNING_RATES
    ]
    if all(read(scale, run) for run in runs):
        for weight in (0.1, 0.3, 0.6):
            runs.append(Run("search", "CAN", {**best(scale, "CAN", runs), **short, **contrastive_weight(weight)}))
        for ratio in (0.5, 0.6):
            runs.append(Run("search", "MAE", {**best(scale, "MAE", runs), **short, "mask_ratio": ratio}))
    return runs


def best(scale: str, method: str, runs: list[Run]) -> dict:
    """The settings, beside the method's own, with which the held-out part of the training images is told best."""
    done = [run for run in runs if run.method == method and read(scale, run)]
    chosen = max(done, key=lambda run: accuracy(read(scale, run)))
    return {key: value for key, value in chosen.settings.items() if key != "num_train_epochs"}


def main_rows(scale: str) -> list[Run]:
    runs, tasks = search(scale), ("knn", "linear_probe", "few_shot")
    found = {method: best(scale, method, runs) for method in METHODS}
    rate = {"base_learning_rate": found["CAN"]["base_learning_rate"]}
    rows = [("CAN", found["CAN"]), ("SimCLR", found["SimCLR"]), ("MAE", found["MAE"]), ("CAN, paper's weights", rate)]
    rows.append(("MAE, one view", {**found["MAE"], "num_views": 1}))
    return [Run("main", method, settings, seed, tasks) for seed in (0, 1, 2) for method, settings in rows]


def scaling(scale: str) -> list[Run]:
    runs, rows = search(scale), []
    for share in (10, 30):
        for method in METHODS:
            # As many steps as with all images
            rows.append(Run("scaling", method, {**best(scale, method, runs), "dataset_split": f"train[:{share}%]"}))
    return rows


def ablations(scale: str) -> list[Run]:
    found = best(scale, "CAN", search(scale))
    changes = {
        "no contrast": {"contrastive_loss_weight": 0},
        "no reconstruction": {"reconstruction_loss_weight": 0},
        "no noise": {"denoising_loss_weight": 0, "noise_std_max": 0},
        "noise without its loss": {"denoising_loss_weight": 0},
        "mask 25 %": {"mask_ratio": 0.25},
        "mask 75 %": {"mask_ratio": 0.75},
        "normalised targets": {"norm_pix_loss": True},
    }
    return [Run("ablations", f"CAN, {name}", {**found, **change}) for name, change in changes.items()]


STAGES = {"search": search, "main": main_rows, "scaling": scaling, "ablations": ablations}


def path_of(scale: str, run: Run) -> Path:
    return RESULTS / scale / f"{run.name}.json"


def read(scale: str, run: Run) -> dict | None:
    path = path_of(scale, run)
    return json.loads(path.read_text()) if path.exists() else None


def accuracy(result: dict, task: str = "linear_probe") -> float:
    figures = result["evaluation"]["results"][task]
    return figures["20"]["accuracy"] if task == "knn" else figures["accuracy"]


def do(run: Run, arguments):
    """Pre-trains and evaluates; leaves the JSON."""
    folder = Path(arguments.output_dir) / arguments.scale / run.name
    own = next(values for method, values in METHODS.items() if run.method.startswith(method))
    settings = {**SCALES[arguments.scale], **own, **run.settings, "seed": run.seed}
    columns = ["--image_column", arguments.image_column]
    data = ["--dataset_name", arguments.data, *columns]
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    if run.stage == "main":
        flags += ["--probe_dataset_name", arguments.data, "--probe_every", str(arguments.probe_every)]
    flags += ["--resume_from_checkpoint", "latest", "--log_with", "none", "--output_dir", str(folder)]
    script = [sys.executable, str(ROOT / "run_pretraining.py"), str(Path(__file__).with_suffix(".yaml"))]
    subprocess.run([*script, *data, *flags], check=True)
    flags = ["--task", *run.tasks, "--baselines", "none", "--output_dir", str(folder / "evaluation"), *data]
    flags += ["--test_size", "0.2"] * (run.stage == "search")
    script = [sys.executable, str(ROOT / "run_eval.py"), "--model_name_or_path", str(folder)]
    subprocess.run([*script, *flags], check=True)
    evaluation = json.loads((folder / "evaluation" / "results.json").read_text())
    evaluation["results"] = evaluation["results"][folder.name]
    result = {
        "stage": run.stage, "method": run.method, "seed": run.seed, "settings": settings,
        "pretraining": json.loads((folder / "results.json").read_text()),
        "along_the_way": [{key: line[key] for key in ("step", "knn")}
                          for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                          if "knn" in line],
        "evaluation": evaluation,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    for place, word in ((str(Path(arguments.output_dir)), "OUT"), (arguments.data, "DATA"), (str(ROOT), ".")):
        text = text.replace(place, word)  # the paths of this machine are no part of the result
    path_of(arguments.scale, run).parent.mkdir(parents=True, exist_ok=True)
    path_of(arguments.scale, run).write_text(text + "\n")


# --- The report ------------------------------------------------------------------------------------------------------


def results(scale: str, stage: str) -> dict[str, list[dict]]:
    """Method -> its runs, of a stage."""
    found = {}
    for path in sorted((RESULTS / scale).glob(f"{stage}_*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["method"], []).append(result)
    return found


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(found: dict[str, list[dict]]) -> str:
    lines = [
        "| | seeds | linear probe | k-NN | 1 % of labels | 10 % | TFLOPs | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in found.items():
        few = [run["evaluation"]["results"].get("few_shot") for run in runs]
        cells = [method, str(len(runs)), *(mean_and_spread([accuracy(run, task) for run in runs])
                                           for task in ("linear_probe", "knn"))]  # fmt: skip
        cells += [mean_and_spread([f[share]["accuracy"] for f in few]) if all(few) else "-" for share in ("1%", "10%")]
        cells.append(f"{runs[0]['pretraining']['train_flops'] / 1e12:.0f}")
        cells.append(f"{statistics.mean(run['pretraining']['train_seconds'] for run in runs) / 60:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def searched(scale: str) -> str:
    lines = ["| method | settings | held-out linear probe |", "|---|---|---|"]
    for method, runs in results(scale, "search").items():
        for run in sorted(runs, key=accuracy, reverse=True):
            kept = ("base_learning_rate", "mask_ratio", "contrastive_loss_weight")
            settings = ", ".join(f"{key} {run['settings'][key]}" for key in kept if key in run["settings"])
            lines.append(f"| {method} | {settings} | {100 * accuracy(run):.1f} |")
    return "\n".join(lines)


def figure(found: dict[str, list[dict]], path: Path):
    """k-NN accuracy along the way, over training FLOPs and over time."""
    drawn, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for method, runs in found.items():
        for index, run in enumerate(runs):
            facts = run["pretraining"]
            steps = [line["step"] / facts["num_steps"] for line in run["along_the_way"]]
            knn = [100 * line["knn"] for line in run["along_the_way"]]
            style = {"color": f"C{list(found).index(method)}", "label": method if index == 0 else None, "alpha": 0.7}
            axes[0].plot([step * facts["train_flops"] / 1e12 for step in steps], knn, **style)
            axes[1].plot([step * facts["train_seconds"] / 60 for step in steps], knn, **style)
    for axis, label in zip(axes, ("training TFLOPs", f"minutes on {facts['machine']}"), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("k-NN accuracy on the test images, %")
    axes[0].legend()
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def report(scale: str):
    """README.md and figure.png of a scale, from its JSONs alone."""
    found = {stage: results(scale, stage) for stage in STAGES}
    parts = [
        f"# Claims at scale `{scale}`\n\nWritten by `python benchmarks/claims.py --scale {scale} --stage report`."
    ]
    if found["main"]:
        figure(found["main"], RESULTS / scale / "figure.png")
        parts.append(f"## Main\n\n{table(found['main'])}\n\n![k-NN along the way](figure.png)")
    for stage in ("scaling", "ablations"):
        if found[stage]:
            parts.append(f"## {stage.capitalize()}\n\n{table(found[stage])}")
    if found["search"]:
        parts.append(f"## Search\n\n{searched(scale)}")
    (RESULTS / scale / "README.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="folder of parquet shards, or Hub id")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--scale", choices=SCALES, default="toy")
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "report"], default=[*STAGES, "report"])
    parser.add_argument("--output_dir", default="out/claims", help="for weights and logs")
    parser.add_argument("--probe_every", type=int, default=195, help="steps between k-NN tests of the main rows")
    parser.add_argument("--max_runs", type=int, help="stop after so many")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    num_done = 0
    for stage in arguments.stage:
        if stage == "report":
            report(arguments.scale)
            continue
        while todo := [run for run in STAGES[stage](arguments.scale) if not read(arguments.scale, run)]:
            if arguments.max_runs is not None and num_done >= arguments.max_runs:
                return
            print(f"\n=== {todo[0].name}, {len(todo)} to do in {stage} ===", flush=True)
            do(todo[0], arguments)
            num_done += 1


if __name__ == "__main__":
    main()
