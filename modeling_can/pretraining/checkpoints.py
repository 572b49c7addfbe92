"""What a run leaves to go on from, and what it needs of that."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ..configuration_can import EARLIER
from ..files import free_space, put_in_place
from ..former_names import current_names
from .recipe import Recipe, model_fields, training_fields


__all__ = ["Checkpoints", "changed_fields", "describe_file", "in_one_piece", "is_sharded", "restore", "whole_state"]


class Checkpoints:
    """
    The folder of a run's checkpoints, `step-N/`: each is complete or not there at all, whenever the run is killed.

    A checkpoint holds `model.safetensors`, `shared.pt` (optimizer and progress), `process-N.pt` for every process
    (random generators, place in the data) and `manifest.json` (size and SHA-256 of each file). The `.pt` files are
    pickles, the user's own and trusted.

    Args:
        folder (`Path`): Where they lie.
        limit (`int`): How many to keep, the newest ones; one more may be asked for.
        process_index, num_processes (`int`): This process among those that save together.
        all_agree (callable): Whether what it is given is true on all processes, each of which calls it.
    """

    def __init__(self, folder: Path, limit: int, process_index: int = 0, num_processes: int = 1, all_agree=bool):
        self.folder, self.limit = Path(folder), limit
        self.process_index, self.num_processes, self.all_agree = process_index, num_processes, all_agree

    def save(self, step: int, model_state: dict, shared: dict, own: dict, best: int | None = None) -> Path:
        """
        Called by every process. Written under another name and renamed when everything is on the disk; then the old
        ones go, but for the one of step `best`.

        Raises:
            OSError: on all processes, if one cannot write; the checkpoints that were there stay.
        """
        path, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"
        is_main = self.process_index == 0

        def prepare():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def write_shared():
            safetensors.torch.save_file(model_state, partial / "model.safetensors", {"format": "pt"})
            torch.save(shared, partial / "shared.pt")

        def complete():
            manifest = {file.name: describe_file(file) for file in sorted(partial.iterdir())}
            manifest = {"step": step, "num_processes": self.num_processes, "files": manifest}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            put_in_place(partial, path)
            place = self.paths().index(path) + 1
            later = self.paths()[place:]  # where this run was resumed from an earlier one: they took another course
            old = [p for p in self.paths()[: max(0, place - self.limit)] if p.name != f"step-{best}"]
            for superseded in later + old:
                shutil.rmtree(superseded)

        stages = [
            (prepare, is_main),
            (lambda: torch.save(own, partial / f"process-{self.process_index:05}.pt"), True),
            (write_shared, is_main),
            (complete, is_main),
        ]
        for stage, is_mine in stages:
            error = None
            try:
                if is_mine:
                    stage()
            except Exception as caught:  # whatever it is: the others wait to hear of it
                error = caught
            if not self.all_agree(error is None):
                free = free_space(self.folder)  # torch does not say that a disk is full
                if is_main:
                    shutil.rmtree(partial, ignore_errors=True)
                raise OSError(
                    f"the checkpoint {path} could not be written ({free / 1e6:.3g} MB were free there): "
                    f"{error or 'another process failed'}"
                ) from error
        return path

    def paths(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        paths = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))

    def find(self, wanted: str) -> Path | None:
        """
        The checkpoint that is meant: a path, or `"latest"`, the newest, which is `None` if there is none yet.

        Raises:
            ValueError: if it is not there, or damaged.
        """
        if wanted == "latest":
            paths = self.paths()
            if not paths:
                return None
            path = paths[-1]
        else:
            path = Path(wanted)
        if not (path / "manifest.json").is_file():
            raise ValueError(f"resume_from_checkpoint={path} is no checkpoint; give a folder .../checkpoints/step-N")
        manifest = json.loads((path / "manifest.json").read_text())
        for name, description in manifest["files"].items():
            if not (path / name).is_file() or describe_file(path / name) != description:
                raise ValueError(
                    f"the checkpoint {path} is damaged: {name} is not what was written; resume from another one "
                    f"({', '.join(str(p) for p in self.paths() if p != path) or 'there is none'})"
                )
        return path

    @staticmethod
    def step(path: Path) -> int:
        """After how many steps it was written."""
        return json.loads((path / "manifest.json").read_text())["step"]

    @staticmethod
    def load(path: Path) -> tuple[dict, dict, list[dict]]:
        """Weights, what was shared, and what each process had, in the order of their rank; on the CPU."""
        weights = safetensors.torch.load_file(path / "model.safetensors")
        shared = torch.load(path / "shared.pt", map_location="cpu", weights_only=False)
        # Not whatever is there: in a repository on the Hub those of an earlier, larger number of processes stay.
        num_processes = json.loads((path / "manifest.json").read_text())["num_processes"]
        files = [path / f"process-{index:05}.pt" for index in range(num_processes)]
        own = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
        return weights, shared, own


def describe_file(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- Model and optimizer, perhaps spread over the processes ----------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def in_one_piece(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part; called by all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model, optimizer=None) -> tuple[dict, dict | None]:
    """
    Weights and the optimizer's state by the names of the unwrapped model, in one piece, on the CPU of the main process
    (elsewhere empty); called by all.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options) if optimizer else None
    return get_model_state_dict(model, options=options), state


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, optimizer_state: dict):
    """Called by all processes. The groups of the optimizer and their settings stay those of the recipe."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    names = {parameter: name for name, parameter in getattr(model, "module", model).named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, {**optimizer_state, "param_groups": groups}, options=options)


def changed_fields(recipe: Recipe, shared: dict, weights: dict, model) -> list[str]:
    """
    What of a recipe has changed since a checkpoint, but for settings that do not touch what is computed. Raises
    ValueError where its weights no longer fit, or where its optimizer did not know what is now trained.
    """
    # What an earlier version did not know yet, it did as the default does now, or as EARLIER says.
    fields = [*training_fields(), *model_fields()]
    before = {field.name: field.default for field in fields} | EARLIER | current_names(shared["recipe"])
    harmless = ("output_dir", "save_steps", "save_total_limit", "logging_steps", "log_with", "model_name_or_path",
                "dataloader_num_workers", "gradient_checkpointing", "data_on_device",
                "display_channels")  # fmt: skip
    now = recipe.to_dict()
    changed = [
        f"{name} was {before[name]}, is {value}"
        for name, value in now.items()
        if value != before[name] and name not in harmless and not name.startswith("probe_")
    ]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != shapes:
        raise ValueError(f"the checkpoint is of another model: {'; '.join(changed)}; give it the same settings")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if new := trained - shared["optimizer"]["state"].keys():
        parts = ", ".join(sorted({name.split(".")[0] for name in new}))
        raise ValueError(
            f"the checkpoint did not train the {parts}: {'; '.join(changed)}; give it the same settings, or begin a "
            "new run from its weights with --model_name_or_path"
        )
    return changed
