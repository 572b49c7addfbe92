"""Images of a few colors, encoders that are pre-trained on nothing, and a short fine-tuning of them."""

import io

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from modeling_can import CANConfig, CANForPreTraining
from modeling_can.evaluation.finetuning import FineTuning, finetune
from modeling_can.evaluation.preprocessors import load_preprocessor
from modeling_can.evaluation.sets import Split


COLORS = {"red": (220, 60, 60), "green": (60, 220, 60), "blue": (60, 60, 220), "gray": (120, 120, 120)}


NAMES = list(COLORS)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
             patch_size=8)  # fmt: skip


PRETRAINED = {
    "CAN": lambda: CANForPreTraining(CANConfig(**SMALL)),
    "ViT": lambda: ViTModel(ViTConfig(**SMALL)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "ViT-MAE": lambda: ViTMAEForPreTraining(ViTMAEConfig(**SMALL)),
}


# Short, and with few augmentations: what is learned here is the color.
QUICK = FineTuning(
    num_epochs=8,
    batch_size=16,
    base_learning_rate=0.1,
    layer_decay=0.9,
    drop_path_rate=0.0,
    randaugment_magnitude=0.0,
    random_erasing_probability=0.0,
    mixup_alpha=0.2,
    cutmix_alpha=0.0,
)


def labeled_images(num_images: int, seed: int = 0, names=NAMES, channels: int = 3) -> Split:
    """Noise around a color, the label."""
    rng, encoded = np.random.default_rng(seed), []
    labels = np.arange(num_images) % len(names)
    for label in labels:
        noisy = np.clip(rng.normal(COLORS[names[label]], 60, (20, 24, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy if channels == 3 else noisy[:, :, 0]).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    rows = datasets.Dataset.from_dict({"image": encoded}).cast_column("image", datasets.Image(decode=False))
    return Split("colors", rows, labels)


def tune(name: str, output_dir, recipe=QUICK, train=None, size=None, **options):
    train = labeled_images(64) if train is None else train
    return finetune(
        name, train, NAMES, load_preprocessor(name, size), Accelerator(cpu=True), output_dir, recipe, **options
    )
