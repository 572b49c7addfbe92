"""
Puts the figures into README.md, CONTRIBUTING.md and docs/, from the JSONs that benchmarks and experiments wrote:

    python benchmarks/fill_documents.py

rewrites what stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`; a test checks that nothing would
change.
"""

import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

from modeling_can.files import write  # noqa: E402


FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))  # which need not be installed
import experiments.cifar10.report as cifar10  # noqa: E402
import experiments.noise.report as noise  # noqa: E402
import experiments.views as views  # noqa: E402


DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
SECTION = re.compile(r"(<!-- figures: (\S+) -->(\n?))(.*?)(<!-- end of figures -->)", re.DOTALL)


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def by_size(name: str, *sizes: str) -> tuple[str, dict[str, dict]]:
    """The machine, and of the sizes those measured. ValueError for two machines: the rows of a table are compared."""
    names = {size: f"{name}-{size}-cpu" for size in sizes}
    reports = {size: read(name) for size, name in names.items() if (FOLDER / f"{name}.json").exists()}
    (machine,) = {report["machine"] for report in reports.values()}
    return machine, reports


def train_step() -> str:
    machine, reports = by_size("train_step", "small", "base", "large")
    lines = [
        f"| at 224, {machine} | batch | images/s | fraction of the peak matmul throughput "
        "| speed over ViT-MAE | over straightforward |",
        "|---|---|---|---|---|---|",
    ]
    for size, report in reports.items():
        for name, result in report["results"].items():
            ratios = (
                f"{report['speed_of_can_over_vit_mae']:.3f} | {report['speed_of_can_over_straightforward']:.3f}"
                if name == "CAN"
                else " | "
            )
            lines.append(
                f"| ViT-{size.capitalize()}: {name} | {report['batch_size']} | {result['images_per_second']:.2f} "
                f"| {result['share_of_product_rate']:.0%} | {ratios} |".replace("%", " %")
            )
    return "\n".join(lines)


def variants(study: str, size: str) -> str:
    report = read(f"variants-{study}-{size}-cpu")
    first, *_ = report["results"]
    factor = 2 if study == "embedding" else 1  # there the views of a pair are two images
    lines = [
        f"| ViT-{size.capitalize()}, {report['machine']} | images/s "
        f"{'| predicted over ' + first + ' ' if study == 'tried' else ''}| over {first} | GiB at most |",
        "|---|---|---|---|" + "---|" * (study == "tried"),
    ]
    for name, result in report["results"].items():
        predicted = f"| {result['predicted_speed_over_first']:.2f} " if study == "tried" else ""
        lines.append(
            f"| {name} | {factor * result['images_per_second']:.2f} {predicted}| {result['speed_over_first']:.2f} "
            f"| {result['peak_memory_gib']:.2f} |"
        )
    return "\n".join(lines)


def profile() -> str:
    machine, reports = by_size("profile_step", "base", "large")
    titles = [f"ViT-{size.capitalize()}, batch {report['batch_size']}" for size, report in reports.items()]
    lines = [
        f"| share of the step, {machine} | {' | '.join(titles)} |",
        "|---|" + "---|" * len(reports),
    ]
    for name in reports["base"]["shares"]:
        shares = [f"{100 * report['shares'][name]:.1f} %" for report in reports.values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def traffic() -> str:
    report = read("traffic")
    one, three = (report[f"{name} product{'s' * (name == 'three')}"]["gb_per_step"] for name in ("one", "three"))
    return f"{three - one:.0f} GB less than with three products, of {three:.0f} GB (counted, not timed)."


def gradient_caching() -> str:
    report = read("gradient_caching-base-cpu")
    return f"{report['cached_over_plain_time']:.2f} times the time"


def trainer() -> str:
    report = read("trainer-small-cpu")
    return (
        f"From JPEGs on the disk to the log, a step of `run_pretraining.py` takes {report['trainer_over_bare']:.3f} "
        f"times a bare step with\naugmentation (ViT-S/16, batch {report['batch_size']}, {report['machine']}), "
        f"{report['trainer_over_bare_without_wait']:.3f} times without the "
        f"{100 * report['data_wait']:.1f} % that it waits for\ndata. The first step is done "
        f"{report['seconds_to_first_step']:.0f} s after the command. Two processes of one thread take "
        f"{report['step_of_all_over_one']:.2f} times the step of\none, for twice the images."
    )


def busy_machine() -> str:
    report = read("busy_machine")
    lines = [
        f"| {report['machine']} | step, s | linear probe, s |",
        "|---|---|---|",
    ]
    for load in ("idle", "busy"):
        for threads in ("spinning", "sleeping"):
            step, probe = (report["medians"][f"{what}, {load}, {threads}"] for what in ("step", "probe"))
            lines.append(f"| {load}, threads {threads} | {step:.2f} | {probe:.2f} |")
    return "\n".join(lines)


def gpu(*names: str) -> list[dict]:
    """The reports that gpu_speed.sh wrote under these names, of those that are there."""
    return [read(f"gpu/{name}") for name in names if (FOLDER / "gpu" / f"{name}.json").exists()]


def or_not_measured(figures):
    """Of a function of GPU reports: its text, or a sentence where there is no report."""
    return lambda *names: figures(*reports) if (reports := gpu(*names)) else "Not measured on a GPU yet."


def title(report: dict) -> str:
    size = "Tiny, 32 x 32" if report["size"] == "cifar" else report["size"].capitalize()
    return f"ViT-{size}, batch {report['batch_size']}"


@or_not_measured
def gpu_train_step(*reports: dict) -> str:
    lines = [
        "| step, bf16 | GPU | images/s | TFLOP/s | of a large product | over straightforward | GiB | first step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for name, result in report["results"].items():
            label = f"| {title(report)}: {name} | {report['machine']} "
            if "error" in result:
                lines.append(f"{label}| failed: {result['error'].splitlines()[0][:80]} | | | | | |")
                continue
            lines.append(
                f"{label}| {result['images_per_second']:,.0f} | {result['tflops']:.0f} "
                f"| {100 * result['share_of_large_product']:.0f} % | {result['speed_over_straightforward']:.2f} "
                f"| {result['memory_gib']:.1f} | {result['first_step_seconds']:.1f} |"
            )
    return "\n".join(lines)


@or_not_measured
def gpu_profile(report: dict) -> str:
    how = "compiled" if report["compiled"] else "eager"
    lines = [f"| share of the kernels' time, {report['machine']} | {title(report)}, {how} |", "|---|---|"]
    lines += [f"| {name} | {100 * share:.1f} % |" for name, share in report["shares"].items()]
    lines.append(f"| no kernel runs, of the step of {1000 * report['step_seconds']:.1f} ms "
                 f"| {100 * report['idle_share']:.1f} % |")  # fmt: skip
    return "\n".join(lines)


@or_not_measured
def gpu_trainer(report: dict) -> str:
    return (
        f"From JPEGs on the disk to the log, `run_pretraining.py` takes {report['images_per_second']:,.0f} images/s, "
        f"{report['trainer_over_bare']:.3f} times\nthe bare step with augmentation ({title(report)}, "
        f"{report['machine']}); it waits for data {100 * report['data_wait']:.1f} % of the time.\nThe first step is "
        f"done {report['seconds_to_first_step']:.0f} s after the command."
    )


@or_not_measured
def gpu_caching(report: dict) -> str:
    plain, cached = report["results"]["plain"], report["results"]["cached"]
    return (
        f"{report['cached_over_plain_time']:.2f} times the time, {cached['peak_memory_gib']:.1f} GiB instead of "
        f"{plain['peak_memory_gib']:.1f} ({report['machine']})"
    )


@or_not_measured
def gpu_largest(report: dict) -> str:
    largest = {name: result["batch_size"] for name, result in report["results"].items()}
    unit = report["command"].split()[-1]
    return (
        f"Of ViT-{report['size'].capitalize()}, {largest['CAN']:,} images fit into the memory of one "
        f"{report['machine']} (in multiples of {unit}), {largest['gradient checkpointing']:,} with\n"
        f"gradient checkpointing, and {largest['straightforward CAN']:,} of the straightforward CAN."
    )


def input_pipeline() -> str:
    report = read("input_pipeline")
    by_key = {(line["pipeline"], line["workers"]): line for line in report["pipelines"]}
    names = {
        "baseline": "decode and two full pipelines in Pillow, floats",
        "ours, bicubic": "ours, bicubic",
        "ours": "ours, bilinear (the default)",
    }
    lines = [f"| {report['machine']} | images/s and core | with 2 workers | |", "|---|---|---|---|"]
    for key, name in names.items():
        times = report["per_core_over_baseline"][key]
        lines.append(
            f"| {name} | {by_key[key, 0]['images_per_cpu_second']:.0f} "
            f"| {by_key[key, 2]['images_per_second']:.0f} | {times:.1f} x |"
        )
    return "\n".join(lines)


def image_folder() -> str:
    report = read("image_folder")
    lines = [
        f"| {report['machine']} | listing, s: first, again | its peak, MB | first step, s: first, again "
        "| the run, MB | of a worker alone, MB |",
        "|---|---|---|---|---|---|",
    ]
    for number, result in report["results"].items():
        first, again = result["first"], result["again"]
        lines.append(
            f"| {int(number):,} images | {first['list_seconds']:.1f}, {again['list_seconds']:.1f} "
            f"| {first['list_peak_mb']:.0f} | {first['first_step_seconds']:.1f}, {again['first_step_seconds']:.1f} "
            f"| {again['run_mb']:.0f} | {again['worker_mb']:.0f} |"
        )
    served = report["results"]["10000"]["again"]["server_list_seconds"]
    lines.append(
        f"\nIf a server took 0.5 ms more for each size (simulated), 10,000 images would be listed in {served:.1f} s."
    )
    return "\n".join(lines)


def photometric() -> str:
    return f"{read('input_pipeline')['augmentation']['cpu']['images_per_second']:.0f} images/s"


def evaluation() -> str:
    report = read("evaluation")
    ours, theirs, probe = report["protocols"].values()
    return (
        f"Evaluation, {report['train'][0]:,} training and {report['test'][0]:,} test features of width "
        f"{report['train'][1]}, {report['machine']}: k-NN for five values of k\nin {ours['seconds']:.1f} s with "
        f"{ours['gib_beyond_features']:.2f} GiB beyond the features, against {theirs['seconds']:.1f} s and "
        f"{theirs['gib_beyond_features']:.1f} GiB for scikit-learn's with one; the linear\nprobe of ten classes in "
        f"{probe['seconds']:.1f} s."
    )


def quickstart() -> str:
    runs = json.loads((ROOT / "model_cards/can-quickstart/results.json").read_text())
    lines = ["| features | k-NN | linear probe |", "|---|---|---|"]
    for name in runs[0]["probe"]:
        means = (
            statistics.mean(100 * run["probe"][name][metric] for run in runs) for metric in ("knn", "linear_probe")
        )
        lines.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def claims(stage: str, scale: str = "toy") -> str:
    return cifar10.table(scale, stage) if cifar10.results(scale, stage) else "Not measured on a GPU yet."


FIGURES = {
    "train_step": train_step,
    "choices": partial(variants, "choices", "base"),
    "profile": profile,
    "traffic": traffic,
    "tried": partial(variants, "tried", "base"),
    "batch": partial(variants, "batch", "small"),
    "image_size": partial(variants, "image_size", "small"),
    "embedding": partial(variants, "embedding", "base"),
    "gradient_caching": gradient_caching,
    "trainer": trainer,
    "busy_machine": busy_machine,
    "input_pipeline": input_pipeline,
    "image_folder": image_folder,
    "gpu_train_step": partial(
        gpu_train_step,
        *(f"train_step-{name}" for name in ("base", "base-cudagraph", "best-base", "large", "best-large")),
        *("train_step-tiny256", "train_step-tiny1024"),
    ),
    "gpu_profile": partial(gpu_profile, "profile_step-large"),
    "gpu_trainer": partial(gpu_trainer, "trainer-large"),
    "gpu_caching": partial(gpu_caching, "gradient_caching-base"),
    "gpu_largest": partial(gpu_largest, "variants-largest-base"),
    "photometric": photometric,
    "evaluation": evaluation,
    "noise": partial(noise.table, "cifar10"),
    "quickstart": quickstart,
    "claims": partial(claims, "main"),
    "results": partial(cifar10.table, "toy", "main", ("seeds", "linear probe", "k-NN", "TFLOP in all", "images/s")),
    "claims_tiny": partial(claims, "main", "tiny"),
    "order": partial(claims, "order"),
    "views": partial(claims, "views"),
    "views_tiles": views.table,
    "downstream": partial(cifar10.downstream_table, "toy"),
    "scaling": partial(claims, "scaling"),
}


def filled_in(document: str) -> str:
    """A document with all its figures as the JSONs have them. Raises KeyError for a name that is none of FIGURES."""
    return SECTION.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}{found[3]}{found[5]}", document)


def main():
    for name in DOCUMENTS:
        path = ROOT / name
        write(path, filled_in(path.read_text()))


if __name__ == "__main__":
    main()
