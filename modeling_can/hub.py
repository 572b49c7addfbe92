"""
What a run leaves for others to read: where and with what it ran, and the model card, written from its recipe and its
results, so that no number in it was typed.
"""

import os
import platform
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .data import SAMPLE_DATA
from .recipe import Recipe


CLASSIFIER_TEMPLATE, EXPORT_TEMPLATE = (
    Path(__file__).parent / f"{name}_template.md" for name in ("classifier", "export")
)
EXPORTS = {
    "can": "CAN's own class",
    "dinov2": "transformers' DINOv2, with no code to trust",
    "vit": "transformers' ViT, with no code to trust",
    "timm": "timm's `VisionTransformer`",
    "onnx": "an ONNX graph for batches of any size",
}


def write(path: Path, text: str):
    """All or nothing: a reader never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def run_facts(device: torch.device, packages: tuple[str, ...]) -> dict:
    """Machine, versions of packages and git commit, under the names that they have in `results.json`."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout


def update_card(folder: str, results: list[EvalResult]):
    """
    Merges results into the `model-index` of a model folder's README.md: one of the same task, data and metric is
    replaced, the others stay. A card is made where there is none.

    Raises:
        ValueError: if it is no folder.
    """
    path = Path(folder) / "README.md"
    if not path.parent.is_dir():
        raise ValueError(
            f"update_card: {folder} is no folder; download the model (hf download {folder} --local-dir FOLDER), "
            "measure that, and upload its README.md"
        )
    name = path.parent.resolve().name
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {name}\n")

    def identity(result: EvalResult) -> tuple:
        return *result.unique_identifier, result.metric_type, result.metric_name

    new = {identity(result) for result in results}
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [r for r in card.data.eval_results or [] if identity(r) not in new] + results
    write(path, str(card))


def probe_table(results: dict) -> str:
    """Markdown table of k-NN and linear probe for raw pixels, untrained and trained encoder, in per cent."""
    lines = ["| features | k-NN | linear probe |", "|---|---|---|"]
    for name, accuracy in results["probe"].items():
        lines.append(f"| {name} | {100 * accuracy['knn']:.1f} | {100 * accuracy['linear_probe']:.1f} |")
    return "\n".join(lines)


def model_card(recipe: Recipe, results: dict, name: str) -> str:
    """README.md of an output folder: front matter for the Hub, use, results, objective, training, pictures."""
    config = recipe.config
    source = recipe.dataset_name or recipe.data_dir or recipe.data_files
    probe = ""
    if "probe" in results:
        probe = (
            f"## Results\n\nTop-1 accuracy in % on the test split of `{recipe.probe_dataset_name}`: weighted k-NN "
            f"(k = 20, cosine, temperature 0.07) and linear probe on the mean of the patch tokens.\n\n"
            f"{probe_table(results)}\n\n"
        )
    # Of weights from other people's images only their trainer can say under which licence they are.
    licence = "license: apache-2.0\n" if recipe.dataset_name == SAMPLE_DATA else ""
    processes = results["num_processes"]
    launch = "python" if processes == 1 else f"accelerate launch --multi_gpu --num_processes {processes}"
    losses = {
        "contrastive": config.contrastive_loss_weight,
        "reconstruction": config.reconstruction_loss_weight,
        "denoising": config.denoising_loss_weight,
    }
    health = "\n".join(f"- {sentence}" for sentence in results["health"])
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
{licence}tags:
- can
- self-supervised-learning
- masked-image-modeling
- contrastive-learning
---

# {name}

A vision encoder pre-trained with CAN (contrastive learning, masked autoencoding and noise prediction in one ViT,
[arXiv 2210.16870](https://arxiv.org/abs/2210.16870)) on `{source}`. This folder holds the full pre-training model,
decoder included.

## Use

```python
import modeling_can  # registers CAN with the Auto classes
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."  # or wherever this folder lies
processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
inputs = processor(Image.open("photo.jpg"), return_tensors="pt")
with torch.no_grad():
    embedding = model(**inputs).pooler_output  # (1, {config.hidden_size})
```

{probe}## Training

| | |
|---|---|
| encoder | width {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, \
patch {config.patch_size}, image {config.image_size} |
| loss weights | {", ".join(f"{term} {weight}" for term, weight in losses.items())} |
| mask ratio, largest noise | {config.mask_ratio}, {config.noise_std_max} |
| steps x global batch | {results["num_steps"]} x {results["global_batch_size"]} |
| learning rate at its peak | {results["learning_rate"]:.3g} |
| seed | {recipe.seed} |
| time | {results["train_seconds"]:.0f} s on {results["machine"]}, {results["num_processes"]} process(es) |
| bad images passed over | {", ".join(f"{count} {reason}" for reason, count in results["bad_samples"].items()) or 0} |
| final losses | {", ".join(f"{k.removesuffix('_loss')} {v:.4f}" for k, v in results["final_losses"].items())} |

## Health

{health}

`recipe.yaml` is the exact input and `results.json` the exact output of the run. To repeat it:

```bash
{launch} run_pretraining.py recipe.yaml --output_dir NEW
```

![losses](figures/curves.png)
{"![reconstructions](figures/reconstructions.png)" if config.uses_decoder else ""}
"""


def classifier_card(
    name: str, results: dict, figures: dict, examples: dict[str, str], eval_results: list[EvalResult]
) -> str:
    """
    The card of a classifier that `run_eval.py --export_classifier` writes.

    Args:
        name (`str`): Of its folder.
        results (`dict`): The evaluation, as in `results.json`.
        figures (`dict`): What the classifier scores there, where its encoder is from, what kind of head it has.
        examples (`dict[str, str]`): Pictures in the folder -> their classes.
        eval_results (`list[EvalResult]`): Its entries in `model-index`.
    """
    data = results["data"]
    short = {name: Path(name).resolve().name if Path(name).exists() else name
             for name in (figures["source"], data["dataset_name"])}  # fmt: skip
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["can", "self-supervised-learning"],
        widget=[{"src": path, "example_title": label} for path, label in examples.items()],
        model_name=name,
        eval_results=eval_results,
    )
    return str(
        ModelCard.from_template(
            card_data,
            CLASSIFIER_TEMPLATE,
            name=name,
            figures=figures,
            examples=examples,
            data=data,
            data_name=short[data["dataset_name"]],
            source=short[figures["source"]],
            classes=data["class_names"],
            machine=results["machine"],
            software=", ".join(f"{package} {number}" for package, number in results["versions"].items()),
            command=shlex.join(results["command"]),
        )
    )


def export_card(name: str, target: str, source: str, config: PreTrainedConfig, is_classifier: bool) -> str:
    """
    The card of what `modeling_can.conversion` writes.

    Args:
        name (`str`): Of its folder.
        target (`str`): Which of `EXPORTS` it is.
        source (`str`): The folder, file or Hub id that it was made of.
        config (`CANConfig`): Of the encoder.
        is_classifier (`bool`): Whether it has a classifier.
    """
    is_local = Path(source).exists()
    card_data = ModelCardData(
        library_name={"timm": "timm", "onnx": "onnx"}.get(target, "transformers"),
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        base_model=None if is_local else source,
    )
    checked = ", which compared its outputs with the source's on random pixels: equal to 1e-5"
    return str(
        ModelCard.from_template(
            card_data,
            EXPORT_TEMPLATE,
            name=name,
            target=target,
            source=Path(source).resolve().name if is_local else source,
            described=EXPORTS[target],
            config=config,
            is_classifier=is_classifier,
            model_class="ViTModel" if target == "vit" else "AutoModel",
            trust=", trust_remote_code=True" if target == "can" else "",
            check=checked if target in ("dinov2", "vit", "onnx") else "",
        )
    )
