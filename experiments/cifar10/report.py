"""The tables and the figure of the study, from its JSONs alone."""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from experiments.cifar10.runs import PAPERS_WEIGHTS, accuracy, folder_of, read, runs_of
from modeling_can.files import write


__all__ = ["downstream_table", "report", "results", "table"]

# Of k-NN along the way: which method gets there first
ACCURACIES = {"toy": (0.3, 0.4, 0.45, 0.5, 0.55), "tiny": (0.5, 0.6, 0.7, 0.8, 0.85), "smoke": (0.1,)}


def results(scale: str, stage: str) -> dict[str, list[dict]]:
    """Row of the table -> its runs, of a stage, in its order; what is done of them."""
    done = {}
    for run in runs_of(scale, stage):
        if result := read(run):
            done.setdefault(run.title or run.method, []).append(result)
    return done


def mean_and_spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def measured(scale: str, method: str, fact: str) -> float | None:
    """Images a second, peak memory: medians from the stage, or of the scale, that has the machine to itself."""
    if scale == "toy":
        same_cost = ("CAN, paper's weights", "CAN, own noise head")  # as CAN's: the form of a loss costs nothing
        runs = results(scale, "rate").get("CAN" if method in same_cost else method)
    else:  # at the speed after compiling
        runs = [{"pretraining": {**run["pretraining"], **run}} for run in results(scale, "main").get(method, [])]
    return statistics.median(run["pretraining"][fact] for run in runs) if runs else None


def table(scale: str, stage: str, columns: tuple[str, ...] = ()) -> str:
    """All columns in which something has been measured, or those of these names."""
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
            minutes = facts["train_flops"] / facts["flops_per_image"] / rate / 60
            row |= {"images/s": f"{rate:.0f}", "minutes": f"{minutes:.1f}", "GB at most": f"{memory / 1e9:.2f}"}
        rows.append(row)
    names = ("", *columns) if columns else list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(row.get(name, '') for name in names)} |" for row in rows]
    return "\n".join(lines)


def reached(scale: str) -> str:
    """
    Which method is first: the mean training until the first k-NN test along the way that gives so much, over the
    seeds; empty where one of them never does.
    """
    goals = ACCURACIES[scale]
    lines = [
        f"| k-NN of | {' | '.join(f'{100 * goal:.0f} %' for goal in goals)} |",
        "|---" * (1 + len(goals)) + "|",
    ]
    for method, runs in results(scale, "main").items():
        rate, cells = measured(scale, method, "images_per_second"), []
        for goal in goals:
            first = [next((n for n in run["along_the_way"] if n["knn"] >= goal), None) for run in runs]
            if None in first:
                cells.append("")
                continue
            facts = runs[0]["pretraining"]
            images = statistics.mean(line["step"] for line in first) * facts["global_batch_size"]
            cells.append(f"{images * facts['flops_per_image'] / 1e12:.0f} TFLOP")
            if scale != "toy":
                cells[-1] += f", {statistics.mean(line['seconds'] for line in first) / 60:.1f} min"
            elif rate:
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
            *(
                [accuracy({"evaluation": f["transfer"]}, task) for f in found if "transfer" in f]
                for task in ("linear_probe", "knn")
            ),
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


def tried(scale: str) -> str:
    lines = ["| on training images | learning rate | k-NN | linear probe |", "|---|---|---|---|"]
    runs = [json.loads(path.read_text()) for path in folder_of(scale).glob("trial/*.json")]  # with whatever --rates
    for run in sorted(runs, key=lambda run: (run["method"], run["settings"]["base_learning_rate"])):
        figures = run["pretraining"]["probe"]["CAN, pre-trained"]  # as the trainer calls every model
        figures = " | ".join(f"{100 * figures[task]:.1f}" for task in ("knn", "linear_probe"))
        lines.append(f"| {run['method']} | {run['settings']['base_learning_rate']} | {figures} |")
    return "\n".join(lines)


def figure(scale: str, path: Path):
    """k-NN accuracy along the way, over training FLOPs and over time."""
    found = results(scale, "main")
    has_rates = all(measured(scale, method, "images_per_second") for method in found)
    drawn = Figure(figsize=(5 + 5 * has_rates, 4))
    axes = drawn.subplots(1, 1 + has_rates, sharey=True, squeeze=False)
    for method, runs in found.items():
        for index, run in enumerate(runs):
            images = [line["step"] * run["pretraining"]["global_batch_size"] for line in run["along_the_way"]]
            knn = [100 * line["knn"] for line in run["along_the_way"]]
            style = {"color": f"C{list(found).index(method)}", "label": method if index == 0 else None, "alpha": 0.8}
            axes[0][0].plot([n * run["pretraining"]["flops_per_image"] / 1e12 for n in images], knn, **style)
            if has_rates:
                rate = measured(scale, method, "images_per_second")
                minutes = [n / rate / 60 for n in images]
                if scale != "toy":
                    minutes = [line["seconds"] / 60 for line in run["along_the_way"]]
                axes[0][1].plot(minutes, knn, **style)
    labels = ["TFLOP of training"]
    if has_rates:
        of_times = results(scale, "rate" if scale == "toy" else "main")
        labels.append(f"minutes on {next(iter(of_times.values()))[0]['pretraining']['machine']}")
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("k-NN accuracy, %")
    axes[0][0].legend(fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


def report(scale: str):
    """README.md and figure.png of a scale, from its JSONs alone."""
    folder = folder_of(scale)
    if not any(folder.glob("*/*.json")):
        print(f"no results at scale {scale} yet")
        return
    parts = [
        f"# Claims at scale `{scale}`",
        f"Written by `python experiments/cifar10/study.py --scale {scale} --stage report`.",
    ]
    if results(scale, "main"):
        figure(scale, folder / "figure.png")
        parts.append(f"## Main\n\n{table(scale, 'main')}\n\n![k-NN along the way](figure.png)")
        parts.append(f"## Which is first\n\n{reached(scale)}")
    if results(scale, "downstream"):
        parts.append(f"## Downstream\n\n{downstream_table(scale)}")
    for stage in ("order", "ablations", "views", "scaling"):
        if results(scale, stage):
            parts.append(f"## {stage.capitalize()}\n\n{table(scale, stage)}")
    if results(scale, "search"):
        parts.append(f"## Search\n\n{searched(scale)}")
    if any(folder.glob("trial/*.json")):
        parts.append(f"## Trial\n\n{tried(scale)}")
    text = "\n\n".join(parts)
    write(folder / "README.md", text + "\n")
    print(text)
