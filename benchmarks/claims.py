"""
The claims of the paper at a scale that runs here: CAN, SimCLR and MAE as three recipes of the same code.

    python benchmarks/claims.py --data CIFAR10_FOLDER --stage search main      # hours on two CPU cores
    python benchmarks/claims.py --stage report                                 # tables and figures from the JSONs
    python benchmarks/claims.py --data CIFAR10_FOLDER --scale tiny             # on a GPU

--data is a folder of parquet shards with train and test splits (columns image and label), or a Hub id
(uoft-cs/cifar10). All rows see the same unlabelled training images with the same encoder,
batch, optimiser, augmentation and number of epochs. Stages, in this order:

search      each method's learning rate, MAE's mask ratio and CAN's contrastive weight, at a shorter schedule; judged
            by a linear probe on a fifth of the training images, so that the test images have no say. The learning
            rate is searched on until the best is not the smallest or largest one tried.
main        CAN, SimCLR and MAE as searched and CAN with fewer patches masked, three seeds; CAN with the paper's
            weights and MAE with one view, one seed
rate        images a second and peak memory of the methods, nothing beside them, in turns
ablations   CAN without each term, noise without its loss, without the noise-level embedding, mask ratios, normalised
            targets; a shorter schedule
order       what may decide between CAN and SimCLR: mask, temperature, crops, batch, number of patches at a shorter
            schedule; a longer one
scaling     10 %, 30 %, 100 % of the images with equal steps, and a larger encoder; a shorter schedule
downstream  of the main rows' weights, pre-trained again where they are gone: fine-tuning, common corruptions (of a
            fifth of the test images), and the labels of --further_data

What is done is not done again: a JSON for each run in benchmarks/claims/SCALE, with command, machine, versions, commit
and seed. An interrupted run goes on from its checkpoint. Weights stay in --output_dir. With --jobs 2, two runs share
the machine, each with half of its cores: more gets done, and times mean less, which is why `rate` stands alone.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import matplotlib
from datasets import load_dataset


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
EPOCHS = {"toy": {"search": 2, "short": 4, "long": 24}, "tiny": {"search": 20, "short": 50, "long": 800}}
LARGER = {  # the second encoder of the scaling stage
    "toy": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768},
    "tiny": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}
CAN = {"mask_ratio": 0.5}
SIMCLR = {"mask_ratio": 0, "noise_std_max": 0, "contrastive_loss_weight": 1, "reconstruction_loss_weight": 0,
          "denoising_loss_weight": 0}  # fmt: skip
MAE = {"mask_ratio": 0.75, "noise_std_max": 0, "contrastive_loss_weight": 0, "reconstruction_loss_weight": 1,
       "denoising_loss_weight": 0}  # fmt: skip
SEEDS = (0, 1, 2)
# MAE's recipe is made for large pictures and a hundred epochs: without mixing and erasing, for five
FINE_TUNING = (
    "--finetune_num_epochs 5 --finetune_batch_size 256 --finetune_base_learning_rate 1e-3 --finetune_layer_decay 0.75 "
    "--finetune_mixup_alpha 0 --finetune_cutmix_alpha 0 --finetune_randaugment_magnitude 0 "
    "--finetune_random_erasing_probability 0 --finetune_drop_path_rate 0"
).split()
# Corrupting takes longer than all the rest: a fifth of the test images, the same ones for all rows
ROBUSTNESS = "--corruptions noise blur weather digital --test_split test[:20%]".split()
PAPERS_WEIGHTS = {"contrastive_loss_weight": 0.03, "reconstruction_loss_weight": 0.67, "denoising_loss_weight": 0.3}
METHODS = {"CAN": CAN, "SimCLR": SIMCLR, "MAE": MAE}
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
CONTRASTIVE_WEIGHTS = (0.1, 0.3, 0.6, 0.9)
MASK_RATIOS = (0.25, 0.5)  # of MAE, beside its own 0.75
ACCURACIES = (0.3, 0.4, 0.45, 0.5, 0.55)  # of k-NN along the way: which method gets there first


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
    """A recipe and what is measured of it."""

    stage: str
    method: str
    settings: dict = field(default_factory=dict)
    seed: int = 0
    tasks: tuple[str, ...] = ("knn", "linear_probe")
    title: str = ""  # where tables of several stages share a run

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in sorted(self.settings.items())]
        words = [self.stage, self.method.replace(" ", "-").replace(",", ""), *words, f"seed={self.seed}"]
        return "_".join(re.sub(r"[^\w.='-]", "", word.replace(",", "-")) for word in words)


def search(scale: str) -> list[Run]:
    """The learning rate with each method's own settings, then the rest at the best one, then CAN's rate again."""
    short = {"num_train_epochs": EPOCHS[scale]["search"]}
    runs = []
    for method in METHODS:
        rates = sorted(LEARNING_RATES)
        while True:
            own = [Run("search", method, {**short, "base_learning_rate": rate}) for rate in rates]
            if not all(read(scale, run) for run in own):
                break
            chosen = best(scale, method, own)["base_learning_rate"]
            if rates[0] < chosen < rates[-1]:
                further = [contrastive_weight(weight) for weight in CONTRASTIVE_WEIGHTS] if method == "CAN" else []
                further += [{"mask_ratio": ratio} for ratio in MASK_RATIOS] if method == "MAE" else []
                own += [Run("search", method, {**short, "base_learning_rate": chosen, **more}) for more in further]
                if method == "CAN" and all(read(scale, run) for run in own):  # the best weight may want another rate
                    settings = {**short, **best(scale, "CAN", own)}
                    own += [Run("search", "CAN", {**settings, "base_learning_rate": chosen * f}) for f in (0.5, 2)]
                break
            rates = sorted({*rates, chosen * 2, chosen / 2})
        runs += own
    return runs


def best(scale: str, method: str, runs: list[Run]) -> dict:
    """The settings, beside the method's own, with which the held-out part of the training images is told best."""
    done = [run for run in runs if run.method == method and read(scale, run)]
    chosen = max(done, key=lambda run: accuracy(read(scale, run)))
    return {key: value for key, value in chosen.settings.items() if key != "num_train_epochs"}


def found(scale: str) -> dict[str, dict]:
    runs = search(scale)
    return {method: best(scale, method, runs) for method in METHODS}


def rows(scale: str) -> dict[str, dict]:
    """The rows of the main table."""
    settings = found(scale)
    own = [run for run in search(scale) if run.method == "CAN" and "contrastive_loss_weight" not in run.settings]
    return {
        "CAN": settings["CAN"],
        "SimCLR": settings["SimCLR"],
        "MAE": settings["MAE"],
        "CAN, mask 0.25": {**settings["CAN"], "mask_ratio": 0.25},
        "CAN, paper's weights": best(scale, "CAN", own),
        "MAE, one view": {**settings["MAE"], "num_views": 1},
    }


def main_rows(scale: str) -> list[Run]:
    tasks = ("knn", "linear_probe", "few_shot")
    return [
        Run("main", method, more, seed, tasks)
        for seed in SEEDS
        for method, more in rows(scale).items()
        if method in (*METHODS, "CAN, mask 0.25") or seed == 0
    ]


def rate(scale: str) -> list[Run]:
    return [
        Run("rate", method, {**more, "max_steps": 60}, seed, ())
        for seed in SEEDS
        for method, more in rows(scale).items()
        if method != "CAN, paper's weights"
    ]


def short(scale: str, method: str, title: str, **changes) -> Run:
    settings = {**found(scale)[method], "num_train_epochs": EPOCHS[scale]["short"], **changes}
    return Run("short", method, settings, title=f"{method}, {title}")


def ablations(scale: str) -> list[Run]:
    changes = {
        "as searched": {},
        "no contrast": {"contrastive_loss_weight": 0},
        "no reconstruction": {"reconstruction_loss_weight": 0},
        "no noise": {"denoising_loss_weight": 0, "noise_std_max": 0},
        "noise without its loss": {"denoising_loss_weight": 0},
        "no noise-level embedding": {"noise_level_embedding": False},
        "mask 25 %": {"mask_ratio": 0.25},
        "mask 75 %": {"mask_ratio": 0.75},
        "normalised targets": {"norm_pix_loss": True},
    }
    return [short(scale, "CAN", title, **change) for title, change in changes.items()]


def order(scale: str) -> list[Run]:
    epochs = EPOCHS[scale]["long"]
    changes = {
        "as searched": {},
        "temperature 0.2": {"temperature": 0.2},
        "crops from 8 %": {"crop_scale": "0.08,1"},
        "batch 128": {"per_device_train_batch_size": 128},
        "4 x the patches": {"patch_size": SCALES[scale]["patch_size"] // 2},
    }
    return [
        *(short(scale, "CAN", f"mask {100 * ratio:.0f} %", mask_ratio=ratio) for ratio in (0.25, 0.75)),
        *(short(scale, method, title, **change) for title, change in changes.items() for method in ("CAN", "SimCLR")),
        *(
            Run(
                "long", method, {**rows(scale)[method], "num_train_epochs": epochs}, title=f"{method}, {epochs} epochs"
            )
            for method in ("CAN", "SimCLR", "CAN, mask 0.25")
        ),
    ]


def scaling(scale: str) -> list[Run]:
    epochs = EPOCHS[scale]["short"]
    changes = {
        "10 %": {"dataset_split": "train[:10%]", "streaming": False, "num_train_epochs": epochs * 10},
        "30 %": {"dataset_split": "train[:30%]", "streaming": False, "num_train_epochs": round(epochs / 0.3, 2)},
        "100 %": {},
        "larger encoder": LARGER[scale],
    }
    return [short(scale, method, title, **change) for title, change in changes.items() for method in METHODS]


def downstream(scale: str) -> list[Run]:
    return [Run("downstream", run.method, run.settings, run.seed) for run in main_rows(scale)]


STAGES = {
    "search": search, "main": main_rows, "rate": rate, "ablations": ablations, "order": order, "scaling": scaling,
    "downstream": downstream,
}  # fmt: skip


def path_of(scale: str, run: Run) -> Path:
    return RESULTS / scale / f"{run.name}.json"


def read(scale: str, run: Run) -> dict | None:
    path = path_of(scale, run)
    return json.loads(path.read_text()) if path.exists() else None


def accuracy(result: dict, task: str = "linear_probe") -> float:
    figures = result["evaluation"]["results"][task]
    return figures["20"]["accuracy"] if task == "knn" else figures["accuracy"]


def do(run: Run, arguments, threads: int):
    """Pre-trains, or takes a main row's weights where they are still there, and evaluates; leaves the JSON."""
    of_main = replace(run, stage="main").name if run.stage == "downstream" else run.name
    folder = Path(arguments.output_dir) / arguments.scale / of_main
    settings = {**SCALES[arguments.scale], **METHODS[run.method.split(",")[0]], **run.settings, "seed": run.seed}
    if "max_steps" in settings:
        del settings["num_train_epochs"]
    result = {"stage": run.stage, "method": run.method, "seed": run.seed, "settings": settings, "threads": threads}
    data = ["--dataset_name", arguments.data, "--image_column", arguments.image_column]
    if run.stage != "downstream" or not (folder / "results.json").exists():
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        if run.stage == "main":
            flags += ["--probe_dataset_name", str(probe_data(arguments)), "--probe_every", str(arguments.probe_every)]
        flags += ["--resume_from_checkpoint", "latest", "--log_with", "none", "--output_dir", str(folder)]
        recipe = str(Path(__file__).with_suffix(".yaml"))
        python(threads, "run_pretraining.py", recipe, *data, *flags, log=folder.parent / f"{folder.name}.log")
    result["pretraining"] = json.loads((folder / "results.json").read_text())
    if run.stage == "downstream":
        result["evaluation"] = {
            "finetune": evaluate(folder, threads, ["finetune"], [*data, *FINE_TUNING]),
            "robustness": evaluate(folder, threads, ["robustness"], [*data, *ROBUSTNESS]),
        }
        if arguments.further_data:
            flags = ["--dataset_name", arguments.further_data, "--test_size", "0.5"]
            result["evaluation"]["transfer"] = evaluate(folder, threads, ["knn", "linear_probe"], flags)
    else:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result["along_the_way"] = [{key: line[key] for key in ("step", "knn")} for line in lines if "knn" in line]
        if run.tasks:
            held_out = "--train_split train[:80%] --test_split train[80%:]".split() if run.stage == "search" else []
            result["evaluation"] = evaluate(folder, threads, run.tasks, [*data, *held_out])
    text = json.dumps(result, indent=1)
    places = {
        str(Path(arguments.output_dir)): "OUT",
        arguments.data: "DATA",
        arguments.further_data: "FURTHER_DATA",
        str(ROOT): ".",
    }
    for place, word in places.items():  # the paths of this machine are no part of the result
        text = re.sub(rf"(?<![\w/-]){re.escape(place)}(?![\w-])", word, text) if place else text
    path = path_of(arguments.scale, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".partial").write_text(text + "\n")
    path.with_suffix(".partial").replace(path)


def probe_data(arguments) -> Path:
    """5,000 training and 2,000 test images, for k-NN along the way."""
    folder = Path(arguments.output_dir) / "probe_data"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        splits = load_dataset(arguments.data)
        for name, number in (("train", 5000), ("test", 2000)):
            some = splits[name].shuffle(seed=0).select(range(number))
            some.to_parquet(partial / f"{name}-00000-of-00001.parquet")
        partial.replace(folder)
    return folder


def evaluate(folder: Path, threads: int, tasks: tuple[str, ...] | list[str], flags: list[str]) -> dict:
    """run_eval.py's results.json of one model."""
    output_dir = folder / "-".join(["evaluation", *tasks])
    flags = ["--task", *tasks, "--baselines", "none", "--output_dir", str(output_dir), *flags]
    log = folder.parent / f"{folder.name}.log"
    python(threads, "run_eval.py", "--model_name_or_path", str(folder), *flags, log=log)
    result = json.loads((output_dir / "results.json").read_text())
    result["results"] = result["results"][folder.name]
    return result


def python(threads: int, script: str, *words: str, log: Path):
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        command = [sys.executable, str(ROOT / script), *words]
        if subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"{' '.join(command)} failed; see {log}")


# --- The report ------------------------------------------------------------------------------------------------------


def results(scale: str, stage: str) -> dict[str, list[dict]]:
    """Row of the table -> its runs, of a stage, in its order; what is done of them."""
    done = {}
    for run in STAGES[stage](scale):
        if result := read(scale, run):
            done.setdefault(run.title or run.method, []).append(result)
    return done


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def measured(scale: str, method: str, fact: str) -> float | None:
    """Images a second, peak memory: medians from the stage that has the machine to itself."""
    runs = results(scale, "rate").get(method.removesuffix(", paper's weights"))
    return statistics.median(run["pretraining"][fact] for run in runs) if runs else None


def table(scale: str, stage: str) -> str:
    """Columns in which nothing has been measured are left out."""
    rows = []
    for method, runs in results(scale, stage).items():
        few = [run["evaluation"]["results"].get("few_shot") for run in runs]
        facts = runs[0]["pretraining"]
        rate, memory = (measured(scale, method, fact) for fact in ("images_per_second", "peak_memory"))
        row = {"": method, "seeds": str(len(runs))}
        row["linear probe"] = mean_and_spread([accuracy(run) for run in runs])
        row["k-NN"] = mean_and_spread([accuracy(run, "knn") for run in runs])
        for share in ("1%", "10%") if all(few) else ():
            row[f"{share.replace('%', ' %')} of labels"] = mean_and_spread([f[share]["accuracy"] for f in few])
        row["MFLOP an image"] = f"{facts['flops_per_image'] / 1e6:.0f}"
        row["TFLOP in all"] = f"{facts['train_flops'] / 1e12:.0f}"
        if rate:
            row |= {"images/s": f"{rate:.0f}", "GB at most": f"{memory / 1e9:.2f}"}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(row.get(name, '') for name in names)} |" for row in rows]
    return "\n".join(lines)


def reached(scale: str) -> str:
    """
    Which method is first: the mean training until the first k-NN test along the way that gives so much, over the
    seeds; empty where one of them never does.
    """
    lines = [
        f"| k-NN of | {' | '.join(f'{100 * goal:.0f} %' for goal in ACCURACIES)} |",
        "|---" * (1 + len(ACCURACIES)) + "|",
    ]
    for method, runs in results(scale, "main").items():
        rate, cells = measured(scale, method, "images_per_second"), []
        for goal in ACCURACIES:
            first = [next((n["step"] for n in run["along_the_way"] if n["knn"] >= goal), None) for run in runs]
            if None in first:
                cells.append("")
                continue
            facts = runs[0]["pretraining"]
            images = statistics.mean(first) * facts["global_batch_size"]
            cells.append(f"{images * facts['flops_per_image'] / 1e12:.0f} TFLOP")
            if rate:
                cells[-1] += f", {images / rate / 60:.0f} min"
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def downstream_table(scale: str) -> str:
    lines = [
        "|  | seeds | fine-tuned | probe, a fifth of the test images | corrupted | photographs: probe | k-NN |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in results(scale, "downstream").items():
        found = [run["evaluation"] for run in runs]
        figures = [
            [f["finetune"]["results"]["finetune"]["accuracy"] for f in found],
            [f["robustness"]["results"]["robustness"]["clean"]["accuracy"] for f in found],
            [f["robustness"]["results"]["robustness"]["accuracy"] for f in found],
            *([accuracy({"evaluation": f["transfer"]}, task) for f in found] for task in ("linear_probe", "knn")),
        ]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(map(mean_and_spread, figures))} |")
    return "\n".join(lines)


def searched(scale: str) -> str:
    lines = [
        "| | learning rate | mask ratio | weights of C, A, N | held-out linear probe | k-NN |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs in results(scale, "search").items():
        for run in sorted(runs, key=accuracy, reverse=True):
            settings = {**PAPERS_WEIGHTS, **run["settings"]}
            weights = ", ".join(f"{settings[weight]}" for weight in PAPERS_WEIGHTS)
            figures = " | ".join(f"{100 * accuracy(run, task):.1f}" for task in ("linear_probe", "knn"))
            rate, mask_ratio = settings["base_learning_rate"], settings["mask_ratio"]
            lines.append(f"| {method} | {rate} | {mask_ratio} | {weights} | {figures} |")
    return "\n".join(lines)


def figure(scale: str, path: Path):
    """k-NN accuracy along the way, over training FLOPs and over time."""
    found = results(scale, "main")
    has_rates = all(measured(scale, method, "images_per_second") for method in found)
    drawn, axes = plt.subplots(1, 1 + has_rates, figsize=(5 + 5 * has_rates, 4), sharey=True, squeeze=False)
    for method, runs in found.items():
        for index, run in enumerate(runs):
            images = [line["step"] * run["pretraining"]["global_batch_size"] for line in run["along_the_way"]]
            knn = [100 * line["knn"] for line in run["along_the_way"]]
            style = {"color": f"C{list(found).index(method)}", "label": method if index == 0 else None, "alpha": 0.8}
            axes[0][0].plot([n * run["pretraining"]["flops_per_image"] / 1e12 for n in images], knn, **style)
            if has_rates:
                rate = measured(scale, method, "images_per_second")
                axes[0][1].plot([n / rate / 60 for n in images], knn, **style)
    labels = ["TFLOP of training"]
    if has_rates:
        labels.append(f"minutes on {next(iter(results(scale, 'rate').values()))[0]['pretraining']['machine']}")
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("k-NN accuracy, %")
    axes[0][0].legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def report(scale: str):
    """README.md and figure.png of a scale, from its JSONs alone."""
    if not results(scale, "search"):
        print(f"no results at scale {scale} yet")
        return
    parts = [
        f"# Claims at scale `{scale}`",
        f"Written by `python benchmarks/claims.py --scale {scale} --stage report`.",
    ]
    if results(scale, "main"):
        figure(scale, RESULTS / scale / "figure.png")
        parts.append(f"## Main\n\n{table(scale, 'main')}\n\n![k-NN along the way](figure.png)")
        parts.append(f"## Which is first\n\n{reached(scale)}")
    if results(scale, "downstream"):
        parts.append(f"## Downstream\n\n{downstream_table(scale)}")
    for stage in ("order", "ablations", "scaling"):
        if results(scale, stage):
            parts.append(f"## {stage.capitalize()}\n\n{table(scale, stage)}")
    if results(scale, "search"):
        parts.append(f"## Search\n\n{searched(scale)}")
    text = "\n\n".join(parts)
    (RESULTS / scale / "README.md").write_text(text + "\n")
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="folder of parquet shards, or Hub id")
    parser.add_argument("--image_column", help="image, or img for uoft-cs/cifar10")
    parser.add_argument("--scale", choices=SCALES, default="toy")
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "report"], default=[*STAGES, "report"])
    parser.add_argument("--output_dir", default="out/claims", help="for weights and logs")
    parser.add_argument("--probe_every", type=int, default=195, help="steps between k-NN tests of the main rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--further_data", help="folder of labelled pictures to transfer to (downstream)")
    arguments = parser.parse_args()
    arguments.image_column = arguments.image_column or ("img" if arguments.data == "uoft-cs/cifar10" else "image")
    for name in ("data", "output_dir", "further_data"):  # absolute, so that nothing else is called so
        if getattr(arguments, name) and (name == "output_dir" or Path(getattr(arguments, name)).exists()):
            setattr(arguments, name, str(Path(getattr(arguments, name)).resolve()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stage in arguments.stage:
        if stage == "report":
            report(arguments.scale)
            continue
        jobs = 1 if stage == "rate" else arguments.jobs
        threads = max(1, os.cpu_count() // jobs)
        while todo := [run for run in STAGES[stage](arguments.scale) if not read(arguments.scale, run)]:
            print(f"=== {stage}: {len(todo)} to do ===", flush=True)
            if stage == "main":
                probe_data(arguments)  # before the runs share it
            with ThreadPoolExecutor(jobs) as pool:
                for run, _ in zip(
                    todo, pool.map(partial(do, arguments=arguments, threads=threads), todo), strict=True
                ):
                    print(f"{time.strftime('%H:%M')} {run.name}", flush=True)


if __name__ == "__main__":
    main()
