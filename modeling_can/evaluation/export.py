"""The fine-tuned model, or the encoder with the probe on it, as a classifier that transformers loads by itself."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..configuration_can import CANConfig
from ..conversion import accept_colors, can_config, check_dinov2, native_kind, to_can, to_dinov2
from ..data.decoding import decode
from ..files import check_new_folder, new_folder, write
from ..hub import classifier_card
from ..modeling_can import CANPreTrainedModel
from ..progress import quiet
from .classifier import class_predictions
from .encoders import load_model
from .features import Extractor
from .finetuning import tuned_folder
from .linear import LinearClassifier
from .preprocessors import Preprocessor
from .protocol import Entry, Setup
from .report import card_results


__all__ = ["NUM_EXAMPLES", "NUM_SCORES", "check_export", "export", "is_exported", "on_class_token_and_mean"]

NUM_EXAMPLES = 3  # images beside the classifier
NUM_SCORES = 5  # of each, as many as a pipeline gives


def is_exported(setup: Setup, entry: Entry) -> bool:
    return entry.path == os.path.normpath(setup.settings.model_name_or_path[0])


def check_export(setup: Setup, entry: Entry):
    """Raises ValueError for what cannot be exported, before anything takes time."""
    folder, config = Path(setup.settings.export_classifier).resolve(), entry.encoder.model.config
    if folder in (setup.output_dir.resolve(), *setup.output_dir.resolve().parents):
        raise ValueError(f"export_classifier={folder} is or holds output_dir; give a folder of its own")
    check_new_folder(folder)
    if entry.preprocessor.reads_arrays:
        raise ValueError(
            f"export_classifier: {entry.name} takes arrays of {entry.preprocessor.num_channels} channels, and what is "
            "exported is for pipelines and widgets, which give RGB images; use what --task finetune leaves"
        )
    if "finetune" not in setup.settings.task:
        _check_encoder(entry.name, can_config(entry.path))
    elif config.model_type == "can":  # it is fine-tuned at this size
        values = {**can_config(entry.path).to_dict(), "image_size": entry.preprocessor.image_size}
        _check_encoder(entry.name, CANConfig(**values))
    elif "auto_map" in config.to_dict():
        raise ValueError(
            f"export_classifier: {entry.name} has code of its own, without which it could not be loaded; export a "
            "probe instead (--task linear_probe), or use what --task finetune leaves"
        )


def export(setup: Setup, entry: Entry, results: dict) -> dict:
    """
    Writes the fine-tuned model, or else the encoder with the probe on it, as a model that transformers loads by
    itself, with processor, card and example images; all or nothing. Returns what it scores on the test images.
    """
    settings, data, folder = setup.settings, setup.data, Path(setup.settings.export_classifier)
    is_tuned = "finetune" in settings.task
    with quiet():
        if is_tuned:
            path = str(tuned_folder(setup, entry))
            is_ours = entry.encoder.model.config.model_type == "can"
            model = _to_dinov2(to_can(path)) if is_ours else load_model(path, AutoModelForImageClassification)
        else:
            encoder, probe = to_can(entry.path).base_model, entry.probe
            encoder.config.id2label = dict(enumerate(data.class_names))
            encoder.config.label2id = {name: index for index, name in enumerate(data.class_names)}
            model = _to_dinov2(encoder, on_class_token_and_mean(probe, settings.pooling))
        preprocessor = entry.preprocessor
        if preprocessor.num_channels == 1:  # pipelines and widgets give images in color
            model, preprocessor = accept_colors(model), preprocessor.in_color()
    alone = Extractor(settings.batch_size, settings.dataloader_num_workers)  # the other processes have nothing to do
    predictions = class_predictions(model.to(setup.device), preprocessor, data.test, alone)
    head = "fine-tuned" if is_tuned else "linear probe"
    figures = {**setup.score(predictions), "folder": str(folder), "source": entry.path, "head": head}
    figures["model_type"] = entry.encoder.model.config.model_type
    with new_folder(folder) as partial:
        (partial / "examples").mkdir()
        model.save_pretrained(partial)
        preprocessor.save_pretrained(partial)
        examples = []
        for number, label in enumerate(np.unique(data.test.labels)[:NUM_EXAMPLES], start=1):
            row = int(np.flatnonzero(data.test.labels == label)[0])
            path = f"examples/{number}.jpg"
            image = Image.fromarray(decode(data.test.read(row), num_channels=3, **preprocessor.decoding))
            image.save(partial / path, quality=95)
            output = _answers(model, preprocessor, (partial / path).read_bytes())
            examples.append({"src": path, "example_title": data.class_names[label], "output": output})
        entries = card_results(results, {"exported": figures}, entry.name)
        figures["test_images_seen_without_labels"] = results["models"][entry.name]["test_images_seen_without_labels"]
        card = classifier_card(
            name=folder.resolve().name, results=results, figures=figures, examples=examples, eval_results=entries
        )
        write(partial / "README.md", card)
    return figures


def _check_encoder(name: str, config: CANConfig):
    kind = native_kind(config)
    if kind == "dinov3_vit":
        raise ValueError(
            f"export_classifier: {name} has rotary positions, as DINOv3, and transformers has no classifier for it; "
            "use what --task finetune leaves"
        )
    check_dinov2(config, kind)


def _to_dinov2(model: CANPreTrainedModel, head: torch.nn.Linear | None = None) -> PreTrainedModel:
    return to_dinov2(model, head, native_kind(model.config))


@torch.no_grad()
def _answers(model: torch.nn.Module, preprocessor: Preprocessor, encoded: bytes) -> list[dict]:
    """The likeliest classes of an image, in the form that transformers' pipeline and the Hub have."""
    pixels = preprocessor.normalize(preprocessor.decode(encoded)[None].to(model.device))
    scores, labels = model(pixel_values=pixels).logits[0].softmax(-1).sort(descending=True)
    shown = list(zip(scores.tolist(), labels.tolist(), strict=True))[:NUM_SCORES]
    return [{"label": model.config.id2label[label], "score": round(score, 4)} for score, label in shown]


def on_class_token_and_mean(probe: LinearClassifier, pooling: str) -> torch.nn.Linear:
    """A probe of either or both as a layer on the class token and, beside it, the mean of the patch tokens."""
    weight = torch.from_numpy(probe.weight).float()
    width = weight.shape[1]
    padding = {"mean": (width, 0), "cls": (0, width), "both": (0, 0)}[pooling]
    weight = torch.nn.functional.pad(weight, padding)
    head = torch.nn.Linear(weight.shape[1], len(weight))
    # A class without training images has a bias of minus infinity, which half precision and formats do not bear.
    head.load_state_dict({"weight": weight, "bias": torch.from_numpy(probe.bias).float().clamp(min=-1e4)})
    return head
