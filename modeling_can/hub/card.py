"""
Model cards, written from recipe and results, so that no number in them was typed. Their words are in the templates
beside this file.
"""

import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from ..data.arrays import reads_arrays
from ..data.folders import SAMPLE_DATA, counts
from ..files import write
from ..progress import duration


__all__ = ["EXPORTS", "classifier_card", "export_card", "short_name", "update_card", "write_card"]


_CARD_TEMPLATE, _CLASSIFIER_TEMPLATE, _EXPORT_TEMPLATE = (
    Path(__file__).parent / "templates" / f"{name}.md" for name in ("card", "classifier", "export")
)
_EVALUATION = ("<!-- evaluation: written by run_eval.py -->", "<!-- end of evaluation -->")
_ADVICE = "Advice for `{}`: {}"
_PROBES = {"knn": "k-NN, k = 20", "linear_probe": "linear probe"}  # as `modeling-can eval` calls them
EXPORTS = {
    "can": "CAN's own class",
    "dinov2": "transformers' DINOv2, with no code to trust",
    "dinov2_with_registers": "transformers' DINOv2 with registers, with no code to trust",
    "dinov3_vit": "transformers' DINOv3, with no code to trust",
    "vit": "transformers' ViT, with no code to trust",
    "timm": "timm's `VisionTransformer`",
    "onnx": "an ONNX graph for batches of any size",
}


def update_card(folder: str, results: list[EvalResult], advice: dict[str, str] | None = None):
    """
    Merges results into the `model-index` of a model folder's README.md, and shows them as a table in its text, except
    those of the trainer's probe, which have a table of their own. A result of the same task, data and metric is
    replaced, the others stay. A card is made where there is none.

    Args:
        advice (`dict[str, str]`, *optional*): A sentence for a data set, which replaces an earlier one for the same.

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
    begin, end = _EVALUATION
    if begin not in card.text or end not in card.text:
        card.text = f"{card.text.rstrip()}\n\n## Evaluation\n\n{begin}\n{end}\n"
    before, after = card.text.split(begin)[0], card.text.split(end)[-1]
    earlier = dict(re.findall(_ADVICE.format("(.*?)", "(.*)"), card.text))
    lines = [_ADVICE.format(data, text) for data, text in {**earlier, **(advice or {})}.items()]
    shown = [result for result in card.data.eval_results if not _is_probe(result)]
    text = "\n\n".join([_evaluation_table(shown), *lines])
    card.text = f"{before}{begin}\n{text}\n{end}{after}"
    write(path, str(card))


def _is_probe(result: EvalResult) -> bool:
    """Whether `_probe_results` made it."""
    return "num_test_images" in (result.metric_args or {})


def _evaluation_table(results: list[EvalResult]) -> str:
    """Results of `modeling-can eval` as a table in Markdown; values as in the `model-index`."""
    lines = [
        "Measured by `modeling-can eval`: accuracies and mIoU from 0 to 1, and where it says so dB; in brackets "
        "95 % intervals over the test images.\n",
        "| data | split | metric | value |",
        "|---|---|---|---|",
    ]
    for result in results:
        interval = (result.metric_args or {}).get("interval_95")
        value = f"{result.metric_value}" + (f" ({interval[0]} to {interval[1]})" if interval else "")
        measure = result.metric_name or result.metric_type
        cells = (result.dataset_name, result.dataset_split or "not named", measure, value)
        lines.append(f"| {' | '.join(map(_escaped, cells))} |")
    return "\n".join(lines)


def write_card(folder: Path, recipe: dict, config: PreTrainedConfig, results: dict, repo_id: str | None = None):
    """
    README.md of an output folder; the figures that it shows must have been drawn.

    Args:
        recipe (`dict`): As `Recipe.to_dict` gives it.
        config (`CANConfig`): Of the model.
        results (`dict`): As in `results.json`, whose figures are the only ones in the card beside the recipe's.
        repo_id (`str`, *optional*): The repository that the run is pushed to.
    """
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    is_sample, is_probed = recipe["dataset_name"] == SAMPLE_DATA, "probe" in results
    source = recipe["dataset_name"] or recipe["data_dir"] or recipe["data_files"]
    source = ", ".join(source) if isinstance(source, list | tuple) else source
    named = f"`{source}`" if source else "a data set built in Python"
    images = _counted(results["num_images"], "image") if results["num_images"] else "an unknown number of images"
    images = f"{images} of {named}"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        # Of weights from other people's images or weights only their trainer can say under which license they are.
        license=recipe.get("license") or ("apache-2.0" if is_sample and not recipe["model_name_or_path"] else None),
        tags=["can", "self-supervised-learning", "masked-image-modeling", "contrastive-learning"],
        datasets=None if is_sample else _hub_id(recipe["dataset_name"]),
        base_model=_hub_id(recipe["model_name_or_path"]),
        model_name=name if is_probed else None,  # a word of model-index
        eval_results=_probe_results(recipe, results) if is_probed else None,
    )
    card = ModelCard.from_template(
        data,
        _CARD_TEMPLATE,
        name=name,
        repo_id=repo_id if repo_id and "/" in repo_id else None,
        recipe=recipe,
        config=config,
        as_arrays=reads_arrays(config.num_channels, recipe.get("pixel_range")),
        in_unit_range=_in_unit_range(recipe.get("pixel_range")),
        results=results,
        is_sample=is_sample,
        source=source,
        images=images,
        layers=_counted(config.num_hidden_layers, "layer"),
        start=f", from the weights of `{_start(recipe)}`," if recipe["model_name_or_path"] else "",
        probe_name=short_name(recipe["probe_dataset_name"]) if is_probed else None,
        probe_rows=_probe_rows(results) if is_probed else None,
        evaluation=_EVALUATION,
        training_rows=_training_rows(recipe, config, results, images).items(),
        command=shlex.join(results["command"]),
        launch=_launcher(results["num_processes"]),
    )
    write(folder / "README.md", f"{card}\n")


def _in_unit_range(pixel_range: list[float] | None) -> str:
    """What the pixels of arrays have become before they are normalized."""
    if pixel_range is None:
        return "All values of the type, uint8 or uint16, became [0, 1]."
    return f"Values from {' to '.join(map(str, pixel_range))} became [0, 1]."


def short_name(name: str) -> str:
    """A Hub id as it is; of a folder or file its own name, for nobody else has the rest of the path."""
    return Path(name).resolve().name if Path(name).exists() else name


def _escaped(text: str) -> str:
    """Any text as Markdown shows it as it is, in one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _start(recipe: dict) -> str:
    """A Hub id, or the last part of a path: the rest is of the machine."""
    path = Path(recipe["model_name_or_path"])
    return path.name if path.is_absolute() else str(path)


def _in_all(results: dict) -> str:
    """`total_seconds` is of the start that finished the run; one that was resumed has trained before."""
    is_resumed = results["train_seconds"] > results["total_seconds"]
    return "in several starts" if is_resumed else f"{duration(results['total_seconds'])} in all"


def _counted(number: int, noun: str) -> str:
    """`1 layer`, `1,234 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def _own_license(source: str) -> str | None:
    """The license that the card in a folder states, if there is one."""
    path = Path(source) / "README.md"
    return ModelCard.load(path, ignore_metadata_errors=True).data.license if path.exists() else None


def _launcher(num_processes: int) -> str:
    return "python" if num_processes == 1 else f"accelerate launch --multi_gpu --num_processes {num_processes}"


def _hub_id(name: str | None) -> str | None:
    """A name that was loaded, if it is one of the Hub's and no local path."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None  # a path that is gone
    return name


def _probe_results(recipe: dict, results: dict) -> list[EvalResult]:
    """The trained encoder's figures as entries of `model-index`."""
    where, figures = short_name(recipe["probe_dataset_name"]), results["probe"]["CAN, pre-trained"]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=where,
            dataset_name=where,
            dataset_split=recipe["probe_test_split"],
            metric_type="accuracy",
            metric_name=title,
            metric_value=round(figures[probe], 4),
            metric_args={
                "interval_95": [round(end, 4) for end in figures[f"{probe}_interval"]],
                "num_test_images": figures["num_test"],
            },
        )
        for probe, title in _PROBES.items()
    ]


def _probe_rows(results: dict) -> list[list[str]]:
    """For raw pixels, untrained and trained encoder: k-NN and linear probe in per cent, with their intervals."""

    def cell(figures: dict, probe: str) -> str:
        low, high = figures[f"{probe}_interval"]
        return f"{100 * figures[probe]:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    return [[name, *(cell(figures, probe) for probe in _PROBES)] for name, figures in results["probe"].items()]


def _training_rows(recipe: dict, config: PreTrainedConfig, results: dict, images: str) -> dict[str, str]:
    """What the run was, row by row: heading -> text."""
    bad = ", ".join(f"{count:,} {reason}" for reason, count in results["bad_samples"].items())
    weights = {
        "contrastive": config.contrastive_loss_weight,
        "reconstruction": config.reconstruction_loss_weight,
        "denoising": config.denoising_loss_weight,
    }
    precision = "fp32" if results["mixed_precision"] == "no" else results["mixed_precision"]
    software = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    losses = [f"{name.removesuffix('_loss')} {value:.4f}" for name, value in results["final_losses"].items()]
    rows = {
        "data": images,
        "files skipped": counts(results.get("left_out", {})),  # of a results.json from before it was counted
        "bad images skipped": bad or "none",
        "encoder": f"width {config.hidden_size}, {_counted(config.num_hidden_layers, 'layer')}, "
        f"{_counted(config.num_attention_heads, 'head')}, patches of {' x '.join(map(str, config.patch_shape))}",
        "loss weights": ", ".join(f"{term} {weight}" for term, weight in weights.items()),
        "noise prediction": ("a head of its own" if config.has_noise_head else "the head that predicts the pixels")
        + (", loss relative to predicting no noise" if config.norm_noise_loss else ", loss in raw units")
        if config.denoising_loss_weight > 0
        else "",
        "mask ratio, largest noise": f"{config.mask_ratio}, {config.noise_std_max}",
        "steps x global batch": f"{results['num_steps']:,} x {results['global_batch_size']:,}",
        "steps skipped, not finite": f"{results['nonfinite_steps']:,}" if results["nonfinite_steps"] else "",
        "peak learning rate": f"{results['learning_rate']:.3g}",
        "frozen, as no loss trains it": ", ".join(results["frozen"]),
        "seed": f"{results['seed']}",
        "hardware": f"{results['machine']}, {_counted(results['num_processes'], 'process')}, {precision}",
        "time": f"{duration(results['train_seconds'])} of training, {_in_all(results)}; "
        f"{results['images_per_second']:.0f} images/s",
        "peak memory": f"{results['peak_memory'] / 1e9:.1f} GB in the main process",
        "compute": f"{results['train_flops']:.1e} FLOPs of forward and backward, {results['flops_per_image']:.1e} "
        f"for {_counted(recipe['num_views'], 'view')} of an image".replace("e+0", "e").replace("e+", "e"),
        "software": software + (f"; commit {results['git_commit']}" if results["git_commit"] else ""),
        "final losses": ", ".join(losses) or "not finite",
    }
    return {name: text for name, text in rows.items() if text}


def classifier_card(
    name: str, results: dict, figures: dict, examples: list[dict], eval_results: list[EvalResult]
) -> str:
    """
    The card of a classifier that `--export_classifier` writes.

    Args:
        name (`str`): Of its folder.
        results (`dict`): The evaluation, as in `results.json`.
        figures (`dict`): What the classifier scores there, where its encoder is from, its kind and that of its head.
        examples (`list[dict]`):
            Images in the folder, as entries of the Hub's `widget`: their path `src`, the class `example_title`, and
            the `output` of the classifier. Without a provider that serves the model, the page shows these.
        eval_results (`list[EvalResult]`): Its entries in `model-index`.
    """
    data, source = results["data"], figures["source"]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["can", "self-supervised-learning"] if figures["model_type"] == "can" else None,
        base_model=_hub_id(source),
        datasets=_hub_id(data["dataset_name"]),
        widget=examples,
        model_name=name,
        eval_results=eval_results,
    )
    return str(
        ModelCard.from_template(
            card_data,
            _CLASSIFIER_TEMPLATE,
            name=name,
            figures=figures,
            examples=examples,
            data=data,
            train_images=_counted(data["num_train"], "labeled image"),
            test_images=_counted(data["num_test"], "test image"),
            data_name=short_name(data["dataset_name"]),
            source=short_name(source),
            classes=[_escaped(name) for name in data["class_names"]],
            baselines={
                name: tasks["linear_probe"]["accuracy"]
                for name, tasks in results["results"].items()
                if name not in results["models"] and "linear_probe" in tasks
            },
            launch=_launcher(results["num_processes"]),
            machine=results["machine"],
            software=", ".join(f"{package} {number}" for package, number in results["versions"].items()),
            command=shlex.join(results["command"]),
        )
    )


def export_card(
    name: str, target: str, source: str, config: PreTrainedConfig, is_classifier: bool, processor: dict
) -> str:
    """
    The card of what `modeling_can.conversion` writes.

    Args:
        name (`str`): Of its folder.
        target (`str`): Which of `EXPORTS` it is.
        source (`str`): The folder, file or Hub id that it was made of.
        config (`CANConfig`): Of the encoder.
        is_classifier (`bool`): Whether it has a classifier.
        processor (`dict`): The image processor that came with it; empty if none did.
    """
    card_data = ModelCardData(
        library_name={"timm": "timm", "onnx": "onnx"}.get(target, "transformers"),
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        base_model=_hub_id(source),
        tags=["can", "self-supervised-learning"],
        license=_own_license(source),
    )
    checked = ", which compared its outputs with the source's on random pixels: equal to 1e-5"
    if target == "onnx":
        checked += " of the largest, or as close as single precision is"
    return str(
        ModelCard.from_template(
            card_data,
            _EXPORT_TEMPLATE,
            name=name,
            target=target,
            source=source if _hub_id(source) else Path(source).resolve().name,
            is_file=Path(source).is_file(),
            has_processor=bool(processor),
            as_arrays=reads_arrays(config.num_channels, processor.get("pixel_range")),
            in_unit_range=_in_unit_range(processor.get("pixel_range")),
            described=EXPORTS[target],
            config=config,
            layers=_counted(config.num_hidden_layers, "layer"),
            is_classifier=is_classifier,
            model_class="ViTModel" if target == "vit" else f"AutoModel{'ForImageClassification' * is_classifier}",
            trust=", trust_remote_code=True" if target == "can" else "",
            check="" if target in ("can", "timm") else checked,
        )
    )
