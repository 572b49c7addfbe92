"""
The runs of the study: scales, methods, and which run belongs to which stage.

A run of the scale `toy` may depend on what earlier ones found: `search` asks for further learning rates until the best
one is neither the smallest nor the largest, and the other stages take the best settings of the search. The runs of
`tiny` and `smoke` are fixed lists.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from modeling_can.configuration_can import MAE, SIMCLR


__all__ = [
    "METHODS", "PAPERS_WEIGHTS", "SCALES", "TOY_STAGES", "Run", "accuracy", "contrastive_weight",
    "folder_of", "path_of", "read", "runs_of", "settings_of", "trial",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
SCALES = {
    # What two CPU cores finish: 16 patches, 0.9 M parameters in the encoder
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
SEEDS = (0, 1, 2)
PAPERS_WEIGHTS = {"contrastive_loss_weight": 0.03, "reconstruction_loss_weight": 0.67, "denoising_loss_weight": 0.3}
METHODS = {"CAN": {"mask_ratio": 0.5}, "SimCLR": SIMCLR, "MAE": MAE}
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
CONTRASTIVE_WEIGHTS = (0.1, 0.3, 0.6, 0.9)
MASK_RATIOS = (0.25, 0.5)  # of MAE, beside its own 0.75
# What experiments/noise says: noise that the head can learn to remove, at little cost to the features
NOISE = {"noise_std_max": 0.25, "denoising_loss_weight": 0.3}


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
    scale: str = "toy"

    @property
    def file_stem(self) -> str:
        """
        Of its JSON: method, seed and a hash of the settings in which it differs from its scale and its method, so that
        a run that is done is found by computing its name.
        """
        method = re.sub(r"[^a-z0-9.]+", "-", self.method.lower().replace("'", ""))
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return f"{method}-seed{self.seed}-{digest[:8]}"

    @property
    def name(self) -> str:
        """Of the folder with its weights, and for --runs."""
        return f"{self.stage}-{self.label}-{self.seed}" if self.label else f"{self.stage}-{self.file_stem}"


def settings_of(run: Run) -> dict:
    """All that a run sets beside recipe.yaml, its seed included."""
    return {**SCALES[run.scale], **METHODS[run.method.split(",")[0]], **run.settings, "seed": run.seed}


def folder_of(scale: str) -> Path:
    """Of the JSONs and their report. That of `smoke` is no result to keep."""
    return Path("out/cifar10/results/smoke") if scale == "smoke" else RESULTS / scale


def path_of(run: Run) -> Path:
    """Of the JSON of a run."""
    return folder_of(run.scale) / run.stage / f"{run.file_stem}.json"


def read(run: Run) -> dict | None:
    """What is known of a run; None while it is not done."""
    path = path_of(run)
    return json.loads(path.read_text()) if path.exists() else None


def accuracy(result: dict, task: str = "linear_probe") -> float:
    """Top-1, in [0, 1]; of k-NN with k = 20."""
    figures = result["evaluation"]["results"][task]
    return figures["20"]["accuracy"] if task == "knn" else figures["accuracy"]


# --- The scale toy: each stage from what the earlier ones found ------------------------------------------------------


def search() -> list[Run]:
    """The learning rate with each method's own settings, then the rest at the best one, then CAN's rate again."""
    short = {"num_train_epochs": EPOCHS["search"]}
    runs = []
    for method in METHODS:
        rates = sorted(LEARNING_RATES)
        while True:
            own = [Run("search", method, {**short, "base_learning_rate": rate}) for rate in rates]
            if not all(read(run) for run in own):
                break
            chosen = best(method, own)["base_learning_rate"]
            if rates[0] < chosen < rates[-1]:
                further = [contrastive_weight(weight) for weight in CONTRASTIVE_WEIGHTS] if method == "CAN" else []
                further += [{"mask_ratio": ratio} for ratio in MASK_RATIOS] if method == "MAE" else []
                own += [Run("search", method, {**short, "base_learning_rate": chosen, **more}) for more in further]
                if method == "CAN" and all(read(run) for run in own):  # the best weight may want another rate
                    settings = {**short, **best("CAN", own)}
                    own += [Run("search", "CAN", {**settings, "base_learning_rate": chosen * f}) for f in (0.5, 2)]
                break
            rates = sorted({*rates, chosen * 2, chosen / 2})
        runs += own
    return runs


def best(method: str, runs: list[Run]) -> dict:
    """The settings, beside the method's own, that classify the held-out part of the training images best."""
    done = [run for run in runs if run.method == method and read(run)]
    chosen = max(done, key=lambda run: accuracy(read(run)))
    return {key: value for key, value in chosen.settings.items() if key != "num_train_epochs"}


def found() -> dict[str, dict]:
    runs = search()
    return {method: best(method, runs) for method in METHODS}


def rows() -> dict[str, dict]:
    """The rows of the main table."""
    settings = found()
    own = [run for run in search() if run.method == "CAN" and "contrastive_loss_weight" not in run.settings]
    return {
        "CAN": settings["CAN"],
        "SimCLR": settings["SimCLR"],
        "MAE": settings["MAE"],
        "CAN, mask 0.25": {**settings["CAN"], "mask_ratio": 0.25},
        "CAN, paper's weights": best("CAN", own),
        "MAE, one view": {**settings["MAE"], "num_views": 1},
    }


# The form of the noise term that new models have, where the rows above have the paper's
OWN_NOISE_HEAD = {"noise_head": "own", "norm_noise_loss": True, **NOISE}


def main_rows() -> list[Run]:
    tasks = ("knn", "linear_probe", "few_shot")
    runs = [
        Run("main", method, more, seed, tasks)
        for seed in SEEDS
        for method, more in rows().items()
        if method in (*METHODS, "CAN, mask 0.25") or seed == 0
    ]
    own = {**rows()["CAN"], **OWN_NOISE_HEAD}
    return [*runs, *(Run("main", "CAN, own noise head", own, seed, tasks) for seed in SEEDS)]


def rate() -> list[Run]:
    more_views = {f"CAN, {number} views": {**found()["CAN"], **of_views(number)} for number in (2, 3, 4)}
    for settings in more_views.values():
        settings.pop("num_train_epochs", None)
    return [
        Run("rate", method, {**more, "max_steps": 60}, seed, ())
        for seed in SEEDS
        for method, more in {**rows(), **more_views}.items()
        if method != "CAN, paper's weights"
    ]


def short(method: str, title: str, **changes) -> Run:
    settings = {**found()[method], "num_train_epochs": EPOCHS["short"], **changes}
    return Run("short", method, settings, title=f"{method}, {title}")


def ablations() -> list[Run]:
    changes = {
        "as searched": {},
        "no contrast": {"contrastive_loss_weight": 0},
        "no reconstruction": {"reconstruction_loss_weight": 0},
        "no noise": {"denoising_loss_weight": 0, "noise_std_max": 0},
        "noise without its loss": {"denoising_loss_weight": 0},
        "no noise-level embedding": {"noise_level_embedding": False},
        "mask 25 %": {"mask_ratio": 0.25},
        "mask 75 %": {"mask_ratio": 0.75},
        "normalized targets": {"norm_pix_loss": True},
    }
    return [short("CAN", title, **change) for title, change in changes.items()]


def order() -> list[Run]:
    epochs = EPOCHS["long"]
    changes = {
        "as searched": {},
        "temperature 0.2": {"temperature": 0.2},
        "crops from 8 %": {"crop_scale": "0.08,1"},
        "batch 128": {"per_device_train_batch_size": 128},
        "4 x the patches": {"patch_size": SCALES["toy"]["patch_size"] // 2},
    }
    return [
        *(short("CAN", f"mask {100 * ratio:.0f} %", mask_ratio=ratio) for ratio in (0.25, 0.75)),
        *(short(method, title, **change) for title, change in changes.items() for method in ("CAN", "SimCLR")),
        *(
            Run("long", method, {**rows()[method], "num_train_epochs": epochs}, title=f"{method}, {epochs} epochs")
            for method in ("CAN", "SimCLR", "CAN, mask 0.25")
        ),
    ]


def of_views(number: int) -> dict:
    """Equal FLOPs in equal steps: the more views, the fewer images a step. The peak of the learning rate stays."""
    if number == 2:
        return {}
    return {
        "num_views": number,
        "per_device_train_batch_size": round(2 * 256 / number),
        "num_train_epochs": round(2 * EPOCHS["short"] / number, 3),
        "base_learning_rate": found()["CAN"]["base_learning_rate"] * number / 2,
    }


def views() -> list[Run]:
    return [
        replace(short("CAN", f"{number} views", **of_views(number)), seed=seed)
        for seed in SEEDS
        for number in (2, 3, 4)
    ]


def scaling() -> list[Run]:
    epochs = EPOCHS["short"]
    changes = {
        "10 %": {"dataset_split": "train[:10%]", "streaming": False, "num_train_epochs": epochs * 10},
        "30 %": {"dataset_split": "train[:30%]", "streaming": False, "num_train_epochs": round(epochs / 0.3, 2)},
        "100 %": {},
        "larger encoder": LARGER,
    }
    return [short(method, title, **change) for title, change in changes.items() for method in METHODS]


def downstream() -> list[Run]:
    rows = [run for run in main_rows() if run.method != "CAN, own noise head"]
    return [Run("downstream", run.method, run.settings, run.seed) for run in rows]


TOY_STAGES = {
    "search": search, "main": main_rows, "rate": rate, "ablations": ablations, "order": order, "views": views,
    "scaling": scaling, "downstream": downstream,
}  # fmt: skip


# --- The scales tiny and smoke: a fixed list -------------------------------------------------------------------------

# The toy search found 2e-3 for CAN and 4e-3 for SimCLR and MAE, at a batch of 256. These give the same peak, as the
# trainer multiplies by batch / 256: four times the batch would ask for more, three times the depth for less. A trial
# of a factor of two to either side decides.
RATES = {"CAN": 5e-4, "SimCLR": 1e-3, "MAE": 1e-3}
PAPERS_NOISE = {
    "noise_std_max": 0.05, "noise_head": "shared", "norm_noise_loss": False,
    "denoising_loss_weight": contrastive_weight(0.3)["denoising_loss_weight"],
}  # fmt: skip


def listed(stage: str, label: str, method: str, seed: int = 0, **changes) -> Run:
    own = {**contrastive_weight(0.3), **NOISE} if method.startswith("CAN") else {}  # 0.3 as in the toy search
    settings = {"base_learning_rate": RATES[method.split(",")[0]], **own, **changes}
    tasks = () if stage == "trial" else ("knn", "linear_probe", "few_shot")
    return Run(stage, method, settings, seed, tasks, label=label)


def listed_rows() -> list[Run]:
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


def trial(scale: str, rates: list[float] | None = None) -> list[Run]:
    """Each method with each learning rate; unless given, those of RATES and a factor of two to either side."""
    return [
        replace(listed("trial", f"{method.lower()}-{rate:g}", method, base_learning_rate=rate), scale=scale)
        for method in METHODS
        for rate in rates or [RATES[method] * factor for factor in (0.5, 1, 2)]
    ]


def runs_of(scale: str, stage: str) -> list[Run]:
    """The runs of a stage, in its order; none where the scale has no such stage."""
    if scale == "toy":
        return TOY_STAGES[stage]()
    if stage == "trial":
        return trial(scale)
    rows = listed_rows() if stage in ("main", "downstream") else []
    return [replace(run, stage=stage, scale=scale) for run in rows]
