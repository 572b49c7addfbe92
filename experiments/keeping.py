"""What is kept of a run of run_pretraining.py: few and small files, none of which is ever half written."""

import json
import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from modeling_can import CANForPreTraining
from modeling_can.files import new_file, write
from modeling_can.pretraining.builders import image_processor
from modeling_can.pretraining.recipe import Recipe


__all__ = ["keep", "round_weights", "without_paths"]


def without_paths(text: str, places: dict[str | None, str]) -> str:
    """The paths of this machine are no part of a result: each of `places` gives way to its word."""
    for place, word in places.items():
        text = re.sub(rf"(?<![\w/-]){re.escape(place)}(?![\w-])", word, text) if place else text
    return text


def keep(folder: Path, kept: Path, with_weights: bool, places: dict[str | None, str], **more):
    """
    What there is of the run in `folder`, perhaps unfinished, goes to `kept`. results.json, with `more` in it, comes
    last and only when the run is done.
    """
    if not (folder / "metrics.jsonl").exists():
        return
    kept.mkdir(parents=True, exist_ok=True)
    lines = (folder / "metrics.jsonl").read_text()
    write(kept / "metrics.jsonl", lines[: lines.rfind("\n") + 1])
    is_done = (folder / "results.json").exists()
    if with_weights:
        write(kept / "recipe.yaml", without_paths((folder / "recipe.yaml").read_text(), places))
        checkpoints = list(folder.glob("checkpoints/step-*[0-9]"))
        newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("step-")), default=None)
        if is_done or newest:
            try:
                round_weights((folder if is_done else newest) / "model.safetensors", folder / "recipe.yaml", kept)
            except FileNotFoundError:  # a newer one has just taken its place, and is for the next time
                assert not is_done
    if is_done:
        results = json.loads((folder / "results.json").read_text()) | more
        write(kept / "results.json", without_paths(json.dumps(results, indent=2), places) + "\n")


def round_weights(weights: Path, recipe: Path, folder: Path):
    """A model folder with weights in bfloat16, which from_pretrained loads as float32, and computes with."""
    recipe = Recipe.from_dict(yaml.safe_load(recipe.read_text()))
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    with new_file(folder / "model.safetensors") as partial:
        save_file(rounded, partial, {"format": "pt"})
    # `dtype` is what from_pretrained loads into
    config = json.loads(recipe.config.to_json_string()) | {
        "architectures": [CANForPreTraining.__name__], "dtype": "float32",
    }  # fmt: skip
    write(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write(folder / "preprocessor_config.json", image_processor(recipe).to_json_string())
