"""An encoder under a new head: at another size, with adapters, its layers in groups; saved, and asked."""

import contextlib
import inspect
import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..files import new_folder
from ..modeling_can import resize_positions
from ..progress import INSTALL
from .encoders import classifier_class, load_config, load_model
from .features import Extractor, Images
from .preprocessors import Preprocessor
from .sets import Split


__all__ = ["at_size", "class_predictions", "freeze_unused", "new_classifier", "save", "with_adapters"]

logger = logging.getLogger(__name__)


def new_classifier(
    name: str,
    class_names: list[str],
    image_size: tuple[int, int],
    drop_path_rate: float = 0.0,
    trust_remote_code: bool = False,
) -> nn.Module:
    """
    The encoder under a new head, drawn from torch's global generator, for images of another size than the encoder's
    where its positions can be resampled.

    Raises:
        ValueError: what `load_model` raises; if its positions cannot be resampled.
    """
    options = {"id2label": dict(enumerate(class_names)), "label2id": {x: i for i, x in enumerate(class_names)}}
    options["num_labels"] = len(class_names)
    if hasattr(load_config(name, trust_remote_code), "drop_path_rate"):
        options["drop_path_rate"] = drop_path_rate
    elif drop_path_rate:
        logger.warning("drop_path_rate=%g is left out: the model of %s has no stochastic depth", drop_path_rate, name)
    kind = classifier_class(name, trust_remote_code)
    new = ("classifier.", "beit.pooler.", "data2vec_vision.pooler.")  # these poolers are norms under the classifier
    model = at_size(load_model(name, kind, trust_remote_code, new=new, **options), image_size)
    for part, module in model.named_modules():
        if part.startswith("classifier") and isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=2e-5)  # MAE's: the first gradients leave the encoder alone
            nn.init.zeros_(module.bias)
    return model


def at_size(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """
    The model with its position table resampled for images of that size, which then is its own, so that whoever loads
    it needs to know nothing; or the model itself, if it takes images of any size (DINOv2).
    """
    if "interpolate_pos_encoding" not in inspect.signature(model.forward).parameters:
        return model
    own = getattr(model.config, "vision_config", model.config)  # of a pair with a text encoder
    before, patch = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (own.image_size, own.patch_size)
    )
    if image_size == before:
        return model
    if own is not model.config:
        raise ValueError(
            f"a {type(model).__name__} made for {before} cannot be fine-tuned at {image_size}; use --image_size "
            f"{before[0]},{before[1]}"
        )
    config = type(model.config).from_dict({**model.config.to_dict(), "image_size": image_size})
    resized, state = type(model)(config), model.state_dict()
    for key, tensor in resized.state_dict().items():
        if tensor.shape == state[key].shape:
            continue
        old, new = ((size[0] // patch[0], size[1] // patch[1]) for size in (before, image_size))
        if not key.endswith("position_embeddings") or state[key].shape[1] != 1 + old[0] * old[1]:
            raise ValueError(
                f"a {type(model).__name__} made for {before} cannot be fine-tuned at {image_size}: {key} would not "
                f"fit; use --image_size {before[0]},{before[1]}"
            )
        antialias = config.model_type == "can" and config.interpolate_antialias
        state[key] = resize_positions(state[key], old, new, antialias)
    resized.load_state_dict(state)
    return resized


def freeze_unused(model: nn.Module, pixel_values: torch.Tensor):
    """Parameters that get no gradient (the mask token of DINOv2) are none to train: DDP would wait for theirs."""
    model.eval()(pixel_values=pixel_values).logits.sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """
    Freezes the encoder and puts LoRA on all of its linear layers that get a gradient, alpha = 2 * rank; the head is
    trained in full.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"lora_rank={rank} needs peft: {INSTALL.format('lora')}") from error
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and not name.startswith("classifier")
    ]
    if not linear:
        raise ValueError(f"lora_rank={rank} adapts linear layers, and a {type(model).__name__} has none; leave it out")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, modules_to_save=["classifier"])
    return get_peft_model(model, config)


def save(model: nn.Module, preprocessor: Preprocessor, output_dir: Path, is_main: bool) -> nn.Module:
    """The model, its adapters merged; the first process writes it into a new folder."""
    with new_folder(output_dir) if is_main else contextlib.nullcontext() as partial:
        if hasattr(model, "merge_and_unload"):
            if is_main:
                model.save_pretrained(partial / "adapter", save_embedding_layers=False)
                (partial / "adapter" / "README.md").unlink(missing_ok=True)  # peft's, empty but for a local path
            model = model.merge_and_unload()
        if is_main:
            model.save_pretrained(partial)
            preprocessor.save_pretrained(partial)
    return model


def class_predictions(
    model: nn.Module,
    preprocessor: Preprocessor,
    split: Split,
    extractor: Extractor = Extractor(),  # noqa: B008  frozen
    description: str = "",
) -> np.ndarray | None:
    """The class `(N,)` that a classifier sees in every image; on the first process, elsewhere `None`."""
    device = next(model.parameters()).device
    encode = lambda images: {"logits": model(pixel_values=preprocessor.normalize(images.to(device))).logits}  # noqa: E731
    made = extractor(encode, Images(split, preprocessor.decode), description)
    return None if made is None else made["logits"].argmax(axis=1)
