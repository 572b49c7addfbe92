"""What README.md and docs/ tell people to type, and where their links lead."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from testing_utils import ROOT, free_port

from modeling_can import CANConfig, CANForPreTraining


NOTEBOOK = ROOT / "docs" / "first-steps.ipynb"
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


BLOCKS = [block for page in PAGES if page != "first-steps.md" for block in blocks(page, "bash")]
LINES = [line for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if "run_pretraining" in line or " pretrain " in line))
EVALUATIONS = list(dict.fromkeys(line for line in LINES if "run_eval" in line))
TOY = ("--max_steps 2 --per_device_train_batch_size 4 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 "
       "--intermediate_size 64 --decoder_hidden_size 16 --decoder_num_hidden_layers 1 --decoder_num_attention_heads 2 "
       "--image_size 32 --patch_size 8 --dataloader_num_workers 0 --probe_dataset_name none")  # fmt: skip


TOY_EVALUATION = (
    "--batch_size 32 --dataloader_num_workers 0 --finetune_num_epochs 1 --finetune_batch_size 16 --shots 1"
)


def test_there_are_commands():
    assert len(COMMANDS) >= 4 and len(EVALUATIONS) >= 4


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK.name, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            place = path.parent / target if target else path
            assert place.exists(), link
            assert not anchor or anchor in anchors(place.read_text()), link


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if "pip install" not in command])
def test_every_command_runs_at_toy_size(command, tmp_path):
    """But the quickstart's, which tests/pretraining/test_loop.py runs in full."""
    (tmp_path / "images").mkdir()
    for index in range(16):
        image = Image.effect_noise((60, 50), 60).convert("RGB")
        if "--num_channels 4" in command:
            image.putalpha(Image.effect_noise((60, 50), 60))
        image.save(tmp_path / "images" / f"{index}.png")
    command = command.split("#")[0].replace("FOLDER", str(tmp_path / "images"))
    command = command.replace("modeling-can ", f"{sys.executable} -m modeling_can ")
    if "--config_file" in command:
        command = command.replace("--num_processes 8", f"--num_processes 2 --main_process_port {free_port()}")
    toy = TOY
    if "WEIGHTS" in command:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        CANForPreTraining(CANConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "weights")
        command = command.replace("WEIGHTS", str(tmp_path / "weights")).replace("LABELED", "sample_data")
        toy = TOY.replace("--probe_dataset_name none", "")
    said = run(f"{command} {toy} --output_dir {tmp_path / 'out'}")
    assert "Model, card and figures" in said or "preflight: ready" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", EVALUATIONS)
def test_every_evaluation_runs_at_toy_size(command, tmp_path, models, colors):  # noqa: F811
    command = re.sub("out/(can-quickstart|base)", models["can"], command)
    if "MASKED_FOLDER" in command:
        command = command.replace("MASKED_FOLDER", str(tmp_path / "masked"))
        for kind, image in (("images", Image.effect_noise((60, 50), 60)), ("masks", Image.new("L", (60, 50)))):
            (tmp_path / "masked" / kind).mkdir(parents=True)
            image.paste(1, (0, 0, 30, 50))
            for index in range(10):
                image.save(tmp_path / "masked" / kind / f"{index}.png")
    command = command.replace("FOLDER", colors).replace("shards/*", f"{colors}/train-*")
    said = run(f"{command} {TOY_EVALUATION} --feature_cache none --output_dir {tmp_path / 'out'}")
    assert "results.json" in said


@pytest.mark.slow
def test_two_hundred_images_become_a_classifier(tmp_path):
    """The walk-through, then the ways to fine-tune and the first screen's snippet, on the model that it leaves."""
    for name in ("run_pretraining.py", "run_eval.py", "modeling_can", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiles = load_dataset(
        "parquet", data_files=str(ROOT / "modeling_can/data/sample_data/train-*.parquet"), split="train"
    )
    for label, name in enumerate(tiles.features["label"].names[:10]):
        rows = np.random.default_rng(0).permutation(np.flatnonzero(np.array(tiles["label"]) == label))[:20]
        for index, row in enumerate(rows):
            folder = tmp_path / "my-images" / ("train" if index < 15 else "test") / name
            folder.mkdir(parents=True, exist_ok=True)
            tiles[int(row)]["image"].save(folder / f"{index}.jpg", quality=95)
    tiles[0]["image"].save(tmp_path / "photo.jpg")
    for block in blocks("first-steps.md", "bash"):
        said = run(block, tmp_path)
    assert "out/mine -> out/mine-dinov2" in said
    (use,) = blocks("first-steps.md", "python")
    (fine_tune,) = blocks("fine-tuning.md", "python")
    first_screen, *_ = blocks("README.md", "python")
    checks = (
        "assert len(tokens) == 65 and len(tokens[0]) == 128 and set(classify.model.config.id2label.values()) == %r\n"
    )
    checks %= set(tiles.features["label"].names[:10])
    checks += "assert scores['accuracy'] > 0.3, scores\nassert embedding.shape == (1, 128)\n"
    code = f"{use}\n{fine_tune}\n{first_screen}\n{checks}"
    (tmp_path / "snippets.py").write_text(code)
    run("python snippets.py", tmp_path)
    merged = json.loads((tmp_path / "out/lora-merged/config.json").read_text())
    assert merged["architectures"] == ["CANForImageClassification"]


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Its code needs no notebook: it has no magics."""
    (tmp_path / "modeling_can").symlink_to(ROOT / "modeling_can")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    checks = (
        "assert answers[0]['label'] in names and len(embeddings) == 1440 and nearest[0] == 0, answers",
        "assert evaluation['results']['can']['linear_probe']['accuracy'] > 0.7 and evaluation['advice']['can']",
    )
    (tmp_path / "notebook.py").write_text("\n".join([*("".join(cell["source"]) for cell in cells), *checks]))
    assert "has no test split" in run("TMPDIR=$PWD python notebook.py", tmp_path)


def run(command: str, folder: Path = ROOT) -> str:
    """What a command prints; `accelerate launch` without a configuration as one process on the CPU."""
    if "--config_file" not in command:
        one = f"accelerate launch --cpu --num_processes 1 --main_process_port {free_port()}"
        command = "set -e\n" + command.replace("accelerate launch", one)
    answer = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout
