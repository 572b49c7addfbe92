"""
Keeps a run of the study as a model folder: card, recipe, results, figures and the full pre-training model in bfloat16.

    python experiments/card.py out/can-toy-patch4-32-cifar10 --data CIFAR10_FOLDER --name can-toy-patch4-32-cifar10

What is measured are the rounded weights. The recipe names CIFAR-10 on the Hub in the place of the local folder. The
folder carries no code, as this repository is beside it; its images are the bundled tiles, which are free.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from datasets import load_dataset
from transformers import AutoImageProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))  # the root of the repository, which need not be installed
import run_eval  # noqa: E402
from experiments.commands import ROOT  # noqa: E402
from experiments.keeping import round_weights  # noqa: E402
from modeling_can import CANForPreTraining  # noqa: E402
from modeling_can.evaluation.encoders import feature_maps  # noqa: E402
from modeling_can.former_names import current_names  # noqa: E402
from modeling_can.hub import write_card  # noqa: E402
from modeling_can.plots import curves, feature_sheet, reconstruction_sheet, true_colors  # noqa: E402
from modeling_can.pretraining.recipe import Recipe  # noqa: E402


HUB = {"dataset_name": "uoft-cs/cifar10", "image_column": "img"}
COMMAND = "It ran from a local copy of the data set, on weights in fp32; this repeats it:\n"
TILES = ROOT / "modeling_can" / "data" / "sample_data"


def keep(run: Path, folder: Path, data: str):
    recipe = Recipe.from_dict(current_names(yaml.safe_load((run / "recipe.yaml").read_text())))
    recipe = replace(
        recipe, **HUB, probe_dataset_name=None, probe_every=0, resume_from_checkpoint=None, torch_compile="auto",
        data_on_device="auto", license="apache-2.0",
        output_dir=f"out/{folder.name}",
    )  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    for other in ("probe", "best_probe", "length"):  # measured on some images, or of the study
        results.pop(other, None)
    results["command"] = ["-m", "modeling_can", "pretrain", folder.name]

    (folder / "figures").mkdir(parents=True)
    round_weights(run / "model.safetensors", run / "recipe.yaml", folder)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves(metrics, folder / "figures" / "curves.png")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    model = CANForPreTraining.from_pretrained(folder).eval()
    tiles = load_dataset("parquet", data_files=str(TILES / "test-*.parquet"), split="train").shuffle(seed=0)
    pixels = AutoImageProcessor.from_pretrained(folder)(tiles[:6]["image"], return_tensors="pt").pixel_values
    torch.manual_seed(0)
    figures, mean, std = folder / "figures", recipe.image_mean, recipe.image_std
    sheet = figures / "reconstructions.png"
    reconstruction_sheet(model=model, pixel_values=pixels, mean=mean, std=std, path=sheet)
    feature_sheet(true_colors(pixels, mean, std), *feature_maps(model.can, pixels), figures / "features.png")

    write_card(folder, recipe.to_dict(), recipe.config, results)
    card = folder / "README.md"
    text = card.read_text().replace(", trust_remote_code=True", "")
    text = text.replace(
        "```python\nimport torch\n", "```python\nimport modeling_can  # the package of this repository\nimport torch\n"
    )
    text = text.replace("The command, as typed:\n", COMMAND)
    card.write_text(text)
    tasks = ["knn", "linear_probe", "few_shot", "reconstruction"]
    evaluation = folder.parent / "evaluation"
    flags = ["--baselines", "none", "--update_card", "--output_dir", str(evaluation)]
    run_eval.main(["--model_name_or_path", str(folder), "--dataset_name", data, "--task", *tasks, *flags])
    # Measured from the local folder, named as who has none can find it
    local, text = Path(data).name, card.read_text()
    text = text.replace(f": {local}\n", f": {HUB['dataset_name']}\n").replace(
        f"| {local} |", f"| {HUB['dataset_name']} |"
    )
    card.write_text(text)
    text = (evaluation / "results.json").read_text()
    for path, name in {data: HUB["dataset_name"], str(evaluation): "out", str(folder.parent): "model_cards"}.items():
        text = text.replace(path, name)
    (folder / "evaluation.json").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    kept = ROOT / "model_cards" / arguments.name
    with tempfile.TemporaryDirectory() as place:  # until all is done, so that the commit that is noted is clean
        keep(arguments.run, Path(place) / arguments.name, arguments.data)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(Path(place) / arguments.name, kept)


if __name__ == "__main__":
    main()
