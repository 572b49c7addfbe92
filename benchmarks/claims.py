"""
The claims of the paper at a scale that runs here: CAN, SimCLR and MAE as three recipes of the same code.

    python benchmarks/claims.py --data CIFAR10_FOLDER --stage search main      # hours on two CPU cores
    python benchmarks/claims.py --stage report                                 # tables and figures from the JSONs
    bash benchmarks/gpu_study.sh --out FOLDER --data CIFAR10_FOLDER main-can-0 --seconds 340    # on a GPU
    python benchmarks/claims.py --data CIFAR10_FOLDER --scale tiny --stage evaluate report --weights FOLDER

--data is a folder of parquet shards with train and test splits (columns image and label), or a Hub id
(uoft-cs/cifar10). All rows see the same unlabelled training images with the same encoder,
batch, optimiser, augmentation and number of epochs. Stages of the scale `toy`, in this order:

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

The scale `tiny` is a fixed list of runs for a GPU, without a search; `smoke` is the same list in seconds on a CPU.
Stages, each of which takes only the runs whose names match --runs:

trial       CAN, SimCLR and MAE with each of --rates, judged on training images
main        the runs of the study, in the order of their worth; --epochs fixes their length, or --seconds fixes it
            from a speed that is measured first. Every minute, what there is of a run comes into --weights/RUN, at most
            6 small files, of which none is half written: metrics, and the weights in bfloat16
evaluate    anywhere: the JSONs, from what lies in --weights
downstream  as above, from what lies in --weights
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from datasets import load_dataset
from matplotlib.figure import Figure


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "claims"
sys.path.insert(0, str(ROOT))  # for run_pretraining.py
SCALES = {
    # The toy trial that two CPU cores finish: 16 patches, 0.9 M parameters in the encoder
    "toy": {
        "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 512, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 256, "num_train_epochs": 8,
        "noise_head": "shared", "norm_noise_loss": False,
    },
    # ViT-tiny, 64 patches: for a GPU. An epoch of CIFAR-10 is 49 steps: k-NN every 20 epochs, a checkpoint every 80.
    "tiny": {
        "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
        "intermediate_size": 768, "decoder_hidden_size": 192, "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": 6, "decoder_intermediate_size": 768, "dataloader_num_workers": 12,
        "per_device_train_batch_size": 1024, "torch_compile": "cudagraph", "data_on_device": True,
        "logging_steps": 100, "probe_every": 977, "save_steps": 3908, "num_train_epochs": 200,
    },
    # Do the runs of `tiny` work?
    "smoke": {
        "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "dataloader_num_workers": 0,
        "per_device_train_batch_size": 64, "torch_compile": False, "data_on_device": True,
        "logging_steps": 2, "probe_every": 4, "save_steps": 4, "num_train_epochs": 0.3,
    },
}  # fmt: skip
EPOCHS = {"search": 2, "short": 4, "long": 24}
# The second encoder of the scaling stage
LARGER = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 768}
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
# Of k-NN along the way: which method gets there first
ACCURACIES = {"toy": (0.3, 0.4, 0.45, 0.5, 0.55), "tiny": (0.5, 0.6, 0.7, 0.8, 0.85), "smoke": (0.1,)}


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
    label: str = ""  # of a run in a fixed list

    @property
    def name(self) -> str:
        if self.label:
            return f"{self.stage}-{self.label}-{self.seed}"
        words = [f"{key}={value}" for key, value in sorted(self.settings.items())]
        words = [self.stage, self.method.replace(" ", "-").replace(",", ""), *words, f"seed={self.seed}"]
        return "_".join(re.sub(r"[^\w.='-]", "", word.replace(",", "-")) for word in words)


def search(scale: str) -> list[Run]:
    """The learning rate with each method's own settings, then the rest at the best one, then CAN's rate again."""
    short = {"num_train_epochs": EPOCHS["search"]}
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
    settings = {**found(scale)[method], "num_train_epochs": EPOCHS["short"], **changes}
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
    epochs = EPOCHS["long"]
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
    epochs = EPOCHS["short"]
    changes = {
        "10 %": {"dataset_split": "train[:10%]", "streaming": False, "num_train_epochs": epochs * 10},
        "30 %": {"dataset_split": "train[:30%]", "streaming": False, "num_train_epochs": round(epochs / 0.3, 2)},
        "100 %": {},
        "larger encoder": LARGER,
    }
    return [short(scale, method, title, **change) for title, change in changes.items() for method in METHODS]


def downstream(scale: str) -> list[Run]:
    return [Run("downstream", run.method, run.settings, run.seed) for run in main_rows(scale)]


# --- The scale tiny: a fixed list ------------------------------------------------------------------------------------

# The toy search found 2e-3 for CAN and 4e-3 for SimCLR and MAE, at a batch of 256. These give the same peak, as the
# trainer multiplies by batch / 256: four times the batch would ask for more, three times the depth for less. A trial
# of a factor of two to either side decides.
RATES = {"CAN": 5e-4, "SimCLR": 1e-3, "MAE": 1e-3}
# What benchmarks/noise.py says: noise that the head can learn to remove, at little cost to the features
NOISE = {"noise_std_max": 0.25, "denoising_loss_weight": 0.3}
PAPERS_NOISE = {
    "noise_std_max": 0.05, "noise_head": "shared", "norm_noise_loss": False,
    "denoising_loss_weight": contrastive_weight(0.3)["denoising_loss_weight"],
}  # fmt: skip


def listed(stage: str, label: str, method: str, seed: int = 0, **changes) -> Run:
    own = {**contrastive_weight(0.3), **NOISE} if method.startswith("CAN") else {}  # 0.3 as in the toy search
    settings = {"base_learning_rate": RATES[method.split(",")[0]], **own, **changes}
    tasks = () if stage == "trial" else ("knn", "linear_probe", "few_shot")
    return Run(stage, method, settings, seed, tasks, label=label)


def tiny_rows() -> list[Run]:
    return [
        listed("main", "can", "CAN"),
        listed("main", "simclr", "SimCLR"),
        listed("main", "mae", "MAE"),
        listed("main", "can-quarter", "CAN, mask 0.25", mask_ratio=0.25),
        listed("main", "can", "CAN", 1),
        listed("main", "simclr", "SimCLR", 1),
        listed("main", "can", "CAN", 2),
        listed("main", "simclr", "SimCLR", 2),
        listed("main", "can-no-noise", "CAN, no noise", denoising_loss_weight=0, noise_std_max=0),
        listed("main", "can-paper-noise", "CAN, paper's noise", **PAPERS_NOISE),
    ]


def trial(rates: list[float] | None = None) -> list[Run]:
    return [
        listed("trial", f"{method.lower()}-{rate:g}", method, base_learning_rate=rate)
        for method in METHODS
        for rate in rates or [RATES[method] * factor for factor in (0.5, 1, 2)]
    ]


STAGES = {
    "search": search, "main": main_rows, "rate": rate, "ablations": ablations, "order": order, "scaling": scaling,
    "downstream": downstream,
}  # fmt: skip


def runs_of(scale: str, stage: str) -> list[Run]:
    """Of a stage, in its order."""
    if scale == "toy":
        return STAGES[stage](scale)
    rows = tiny_rows()
    lists = {"trial": trial(), "main": rows, "downstream": [replace(run, stage="downstream") for run in rows]}
    return lists.get(stage, [])


def folder_of(scale: str) -> Path:
    """Of the JSONs."""
    return Path("out/claims/smoke") if scale == "smoke" else RESULTS / scale


def path_of(scale: str, run: Run) -> Path:
    return folder_of(scale) / f"{run.name}.json"


def read(scale: str, run: Run) -> dict | None:
    path = path_of(scale, run)
    return json.loads(path.read_text()) if path.exists() else None


def accuracy(result: dict, task: str = "linear_probe") -> float:
    figures = result["evaluation"]["results"][task]
    return figures["20"]["accuracy"] if task == "knn" else figures["accuracy"]


def settings_of(scale: str, run: Run) -> dict:
    return {**SCALES[scale], **METHODS[run.method.split(",")[0]], **run.settings, "seed": run.seed}


def data_flags(arguments) -> list[str]:
    return ["--dataset_name", arguments.data, "--image_column", arguments.image_column]


def pretrain(folder: Path, settings: dict, flags: list[str], arguments, threads: int, **options):
    flags = [*(word for name, value in settings.items() for word in (f"--{name}", str(value))), *flags]
    flags += ["--log_with", "none", "--output_dir", str(folder)]
    recipe = str(Path(__file__).with_suffix(".yaml"))
    python(threads, "run_pretraining.py", recipe, *data_flags(arguments), *flags, **options)


def do(run: Run, arguments, threads: int):
    """Pre-trains, or takes a main row's weights where they are still there, and evaluates; leaves the JSON."""
    of_main = replace(run, stage="main").name if run.stage == "downstream" else run.name
    folder = Path(arguments.output_dir) / arguments.scale / of_main
    settings = settings_of(arguments.scale, run)
    if "max_steps" in settings:
        del settings["num_train_epochs"]
    if run.stage != "downstream" or not (folder / "results.json").exists():
        flags = ["--resume_from_checkpoint", "latest"]
        if run.stage == "main":
            flags += ["--probe_dataset_name", str(probe_data(arguments)), "--probe_every", str(arguments.probe_every)]
        pretrain(folder, settings, flags, arguments, threads, log=folder.parent / f"{folder.name}.log")
    judge(run, folder, settings, arguments, threads)


def judge(run: Run, folder: Path, settings: dict, arguments, threads: int):
    """Evaluates the model in a folder and leaves the JSON."""
    result = {"stage": run.stage, "method": run.method, "seed": run.seed, "settings": settings, "threads": threads}
    result["pretraining"] = json.loads((folder / "results.json").read_text())
    if length := result["pretraining"].pop("length", None):  # of a run in a fixed list
        settings["num_train_epochs"] = length.pop("num_train_epochs")
        result |= length
    if run.stage == "downstream":
        data = data_flags(arguments)
        result["evaluation"] = {
            "finetune": evaluate(run, folder, arguments, threads, ["finetune"], [*data, *FINE_TUNING]),
            "robustness": evaluate(run, folder, arguments, threads, ["robustness"], [*data, *ROBUSTNESS]),
        }
        if arguments.further_data:
            flags = ["--dataset_name", arguments.further_data, "--test_size", "0.5"]
            tasks = ["knn", "linear_probe"]
            result["evaluation"]["transfer"] = evaluate(run, folder, arguments, threads, tasks, flags)
    else:
        result |= of_the_log(folder / "metrics.jsonl", result["pretraining"]["global_batch_size"])
        if run.tasks:
            held_out = "--train_split train[:80%] --test_split train[80%:]".split() if run.stage == "search" else []
            flags = [*data_flags(arguments), *held_out]
            result["evaluation"] = evaluate(run, folder, arguments, threads, run.tasks, flags)
    path = path_of(arguments.scale, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, without_paths(json.dumps(result, indent=1), arguments) + "\n")


def of_the_log(log: Path, batch_size: int) -> dict:
    """k-NN along the way over the seconds of training, of which the first ones compile; and the speed after them."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    step, seconds, along_the_way = 0, 0.0, []
    for line in lines:
        seconds += (line["step"] - step) * batch_size / line["images_per_second"]
        step = line["step"]
        if "knn" in line:
            along_the_way.append({"step": step, "knn": line["knn"], "seconds": seconds})
    return {
        "along_the_way": along_the_way,
        "images_per_second": statistics.median(line["images_per_second"] for line in lines),
    }


def without_paths(text: str, arguments) -> str:
    """The paths of this machine are no part of a result."""
    places = {
        arguments.weights: "WEIGHTS",
        str(Path(arguments.output_dir)): "OUT",
        arguments.data: "DATA",
        arguments.further_data: "FURTHER_DATA",
        str(ROOT): ".",
    }
    for place, word in places.items():
        text = re.sub(rf"(?<![\w/-]){re.escape(place)}(?![\w-])", word, text) if place else text
    return text


def train(run: Run, arguments, threads: int):
    """Pre-trains a run of a fixed list; every minute, what there is of it comes into --weights."""
    folder, kept = (
        Path(place) / run.name for place in (f"{arguments.output_dir}/{arguments.scale}", arguments.weights)
    )
    is_smoke = arguments.scale == "smoke"
    for partial_file in kept.glob("*.partial"):  # of a call that was killed
        partial_file.unlink()
    settings = settings_of(arguments.scale, run)
    length = {"num_train_epochs": arguments.epochs or settings["num_train_epochs"]}
    if arguments.seconds:
        length = length_in(folder, settings, arguments, threads)
        print(f"{run.name}: {length}", flush=True)
    settings["num_train_epochs"] = length["num_train_epochs"]
    flags = ["--probe_dataset_name", str(probe_data(arguments, of_training=run.stage == "trial"))]
    flags += ["--resume_from_checkpoint", "latest"]
    keeping = partial(keep, folder, kept, run.stage == "main", length, arguments)
    try:
        pretrain(folder, settings, flags, arguments, threads, meanwhile=keeping, every=1 if is_smoke else 60)
    finally:
        keeping()
    if not (folder / "results.json").exists():
        raise SystemExit(f"{run.name} was stopped; the same command goes on with it, if {folder} is still there")


def length_in(folder: Path, settings: dict, arguments, threads: int) -> dict:
    """The epochs that so many seconds hold at the speed of a short run, which compiles for the long one too."""
    path = folder / "length.json"
    if not path.exists():  # else the run goes on, at the length with which it began
        short = Path(f"{folder}-speed")
        settings = {**settings, "max_steps": 3 * settings["logging_steps"], "probe_every": 0}
        pretrain(short, settings, ["--overwrite_output_dir", "true"], arguments, threads)
        results = json.loads((short / "results.json").read_text())
        lines = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
        rate = statistics.mean(line["images_per_second"] for line in lines[1:])  # the first one compiles
        epochs = max(1, int(arguments.seconds * rate / results["num_images"]))
        folder.mkdir(parents=True, exist_ok=True)
        length = {"num_train_epochs": epochs, "seconds": arguments.seconds, "measured_images_per_second": rate}
        write(path, json.dumps(length) + "\n")
    return json.loads(path.read_text())


def keep(folder: Path, kept: Path, with_weights: bool, length: dict, arguments):
    """What there is of a run, perhaps unfinished, in files that are whole and small."""
    if not (folder / "metrics.jsonl").exists():
        return
    kept.mkdir(parents=True, exist_ok=True)
    lines = (folder / "metrics.jsonl").read_text()
    write(kept / "metrics.jsonl", lines[: lines.rfind("\n") + 1])
    is_done = (folder / "results.json").exists()
    if with_weights:
        write(kept / "recipe.yaml", without_paths((folder / "recipe.yaml").read_text(), arguments))
        checkpoints = list(folder.glob("checkpoints/step-*[0-9]"))
        newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("step-")), default=None)
        if is_done or newest:
            try:
                round_weights((folder if is_done else newest) / "model.safetensors", folder / "recipe.yaml", kept)
            except FileNotFoundError:  # a newer one has just taken its place, and is for the next time
                assert not is_done
    if is_done:  # last: it says that the rest is there
        results = json.loads((folder / "results.json").read_text()) | {"length": length}
        write(kept / "results.json", without_paths(json.dumps(results, indent=2), arguments) + "\n")


def write(path: Path, text: str):
    """All or nothing. That of modeling_can.files would import torch, which costs seconds before a run begins."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def round_weights(weights: Path, recipe: Path, folder: Path):
    """A model folder with weights in bfloat16, which from_pretrained loads as float32, and computes with."""
    import torch  # here, as a run has begun by now
    import yaml
    from safetensors.torch import load_file, save_file

    from modeling_can import CANForPreTraining
    from modeling_can.pretraining.builders import image_processor
    from modeling_can.recipe import Recipe

    recipe = Recipe.from_dict(yaml.safe_load(recipe.read_text()))
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    partial = folder / "model.safetensors.partial"
    save_file(rounded, partial, {"format": "pt"})
    partial.replace(folder / "model.safetensors")
    # `dtype` is what from_pretrained loads into
    config = json.loads(recipe.config.to_json_string()) | {
        "architectures": [CANForPreTraining.__name__], "dtype": "float32",
    }  # fmt: skip
    write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write(folder / "preprocessor_config.json", image_processor(recipe).to_json_string())


def probe_data(arguments, of_training: bool = False) -> Path:
    """5,000 training and 2,000 test images, for k-NN along the way; perhaps these are training images too."""
    folder = Path(arguments.output_dir) / ("probe_data_of_training" if of_training else "probe_data")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        splits = load_dataset(arguments.data)
        train, test = (splits[name].shuffle(seed=0) for name in ("train", "test"))
        num_train, num_test = (200, 100) if arguments.scale == "smoke" else (5000, 2000)
        parts = {"train": train.select(range(num_train)), "test": test.select(range(num_test))}
        if of_training:
            parts["test"] = train.select(range(num_train, num_train + num_test))
        for name, some in parts.items():
            some.to_parquet(partial / f"{name}-00000-of-00001.parquet")
        partial.replace(folder)
    return folder


def evaluate(run: Run, folder: Path, arguments, threads: int, tasks: tuple | list, flags: list[str]) -> dict:
    """run_eval.py's results.json of one model."""
    place = Path(arguments.output_dir) / arguments.scale / folder.name  # not the model's: that may be read-only
    output_dir = place / "-".join(["evaluation", *tasks])
    flags = ["--task", *tasks, "--baselines", "none", "--output_dir", str(output_dir), *flags]
    log = place.parent / f"{folder.name}.log"
    python(threads, "run_eval.py", "--model_name_or_path", str(folder), *flags, log=log)
    result = json.loads((output_dir / "results.json").read_text())
    result["results"] = result["results"][folder.name]
    return result


def python(
    threads: int, script: str, *words: str, log: Path | None = None, meanwhile=None, every: float | None = None
):
    """A script, with its output in a log or in ours; `meanwhile` is called after every so many seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / script), *words]
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") if log else nullcontext() as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT if file else None)
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(every)
                break
            meanwhile()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {log or 'above'}")


# --- The report ------------------------------------------------------------------------------------------------------


def results(scale: str, stage: str) -> dict[str, list[dict]]:
    """Row of the table -> its runs, of a stage, in its order; what is done of them."""
    done = {}
    for run in runs_of(scale, stage):
        if result := read(scale, run):
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
        runs = results(scale, "rate").get(method.removesuffix(", paper's weights"))
    else:  # at the speed after compiling
        runs = [{"pretraining": {**run["pretraining"], **run}} for run in results(scale, "main").get(method, [])]
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
    for path in sorted(folder_of(scale).glob("trial-*.json")):  # with whatever --rates
        run = json.loads(path.read_text())
        figures = run["pretraining"]["probe"]["CAN, pre-trained"]  # as the trainer calls every model
        figures = " | ".join(f"{100 * figures[task]:.1f}" for task in ("knn", "linear_probe"))
        lines.append(f"| {run['method']} | {run['settings']['base_learning_rate']} | {figures} |")
    return "\n".join(lines)


def figure(scale: str, path: Path):
    """k-NN accuracy along the way, over training FLOPs and over time."""
    found = results(scale, "main")
    has_rates = all(measured(scale, method, "images_per_second") for method in found)
    drawn = Figure((5 + 5 * has_rates, 4))
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
    if not any(folder.glob("*.json")):
        print(f"no results at scale {scale} yet")
        return
    parts = [
        f"# Claims at scale `{scale}`",
        f"Written by `python benchmarks/claims.py --scale {scale} --stage report`.",
    ]
    if results(scale, "main"):
        figure(scale, folder / "figure.png")
        parts.append(f"## Main\n\n{table(scale, 'main')}\n\n![k-NN along the way](figure.png)")
        parts.append(f"## Which is first\n\n{reached(scale)}")
    if results(scale, "downstream"):
        parts.append(f"## Downstream\n\n{downstream_table(scale)}")
    for stage in ("order", "ablations", "scaling"):
        if results(scale, stage):
            parts.append(f"## {stage.capitalize()}\n\n{table(scale, stage)}")
    if results(scale, "search"):
        parts.append(f"## Search\n\n{searched(scale)}")
    if any(folder.glob("trial-*.json")):
        parts.append(f"## Trial\n\n{tried(scale)}")
    text = "\n\n".join(parts)
    (folder / "README.md").write_text(text + "\n")
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="uoft-cs/cifar10", help="folder of parquet shards, or Hub id")
    parser.add_argument("--image_column", help="image, or img for uoft-cs/cifar10")
    parser.add_argument("--scale", choices=SCALES, default="toy")
    stages = [*STAGES, "trial", "evaluate", "report"]
    parser.add_argument("--stage", nargs="+", choices=stages, help="all of toy's, or main and trial")
    parser.add_argument("--output_dir", default="out/claims", help="for weights and logs")
    parser.add_argument("--probe_every", type=int, default=195, help="steps between k-NN tests of toy's main rows")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--further_data", help="folder of labelled pictures to transfer to (downstream)")
    lists = parser.add_argument_group("the scales tiny and smoke")
    lists.add_argument("--runs", default="*", help="only those of these names: main-can-0, 'trial-can-*'")
    lists.add_argument("--weights", default="out/claims/weights", help="a folder for each run: what is kept of it")
    lists.add_argument("--rates", type=float, nargs="+", help="learning rates of the trial")
    length = lists.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="of every run; 200 unless given")
    length.add_argument("--seconds", type=float, help="of training: a short run measures how many epochs they hold")
    arguments = parser.parse_args()
    arguments.image_column = arguments.image_column or ("img" if arguments.data == "uoft-cs/cifar10" else "image")
    for name in ("data", "output_dir", "further_data", "weights"):  # absolute, so that nothing else is called so
        value = getattr(arguments, name)
        if value and (name in ("output_dir", "weights") or Path(value).exists()):
            setattr(arguments, name, str(Path(value).resolve()))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.scale == "toy":
        toy(arguments)
    else:
        fixed_list(arguments)


def fixed_list(arguments):
    signal.signal(signal.SIGTERM, lambda *_: None)  # the trainer gets it too, and saves what there is to keep
    scale, threads = arguments.scale, 1 if arguments.scale == "smoke" else os.cpu_count()
    stages = {
        "trial": trial(arguments.rates),
        "main": runs_of(scale, "main"),
        "downstream": runs_of(scale, "downstream"),
    }
    stages["evaluate"] = stages["trial"] + stages["main"]
    names = [run.name for runs in stages.values() for run in runs]
    if not any(fnmatch(name, arguments.runs) for name in names):
        raise SystemExit(f"--runs {arguments.runs} is none of {', '.join(dict.fromkeys(names))}")
    for stage in arguments.stage or ["trial", "main"]:
        if stage == "report":
            report(scale)
            continue
        for run in stages.get(stage, []):
            kept = Path(arguments.weights) / replace(run, stage="main" if stage == "downstream" else run.stage).name
            is_done = (kept / "results.json").exists()
            if not fnmatch(run.name, arguments.runs):
                continue
            if stage in ("trial", "main") and not is_done:
                train(run, arguments, threads)
            elif stage in ("evaluate", "downstream") and is_done and not read(scale, run):
                judge(run, kept, settings_of(scale, run), arguments, threads)
            else:
                continue
            print(f"{time.strftime('%H:%M')} {stage}: {run.name}", flush=True)


def toy(arguments):
    for stage in arguments.stage or [*STAGES, "report"]:
        if stage == "report":
            report("toy")
            continue
        jobs = 1 if stage == "rate" else arguments.jobs
        threads = max(1, os.cpu_count() // jobs)
        while todo := [run for run in STAGES[stage]("toy") if not read("toy", run)]:
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
