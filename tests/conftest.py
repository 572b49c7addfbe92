import os
import signal


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
# Read when torch is imported: small models are no faster with more, and two processes give the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import ClassLabel, Dataset, Features, Image  # noqa: E402
from testing_utils import NAMES, VIT, encoded, save, tiny_config  # noqa: E402
from transformers import (  # noqa: E402
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_can import CANForPreTraining  # noqa: E402
from modeling_can.data import sources as sources_of_images  # noqa: E402


@pytest.fixture()
def impatient(monkeypatch):
    """The waits and time-outs of tests."""
    monkeypatch.setattr(sources_of_images, "RETRY_SECONDS", (0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.8))
    monkeypatch.setattr(sources_of_images, "STALL_SECONDS", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    return {
        "can": save(folder / "can", CANForPreTraining(tiny_config(image_size=32))),
        "dinov2": save(folder / "dinov2", Dinov2Model(Dinov2Config(**VIT))),
        "classifier": save(folder / "classifier", ViTForImageClassification(ViTConfig(**VIT, **names))),
    }


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> str:
    """A set of plain images of three classes, 90 to learn from and 31 to be tested on, which color tells apart."""
    folder = tmp_path_factory.mktemp("sets") / "colors"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, num in (("train", 90), ("test", 31)):
        labels = np.arange(num) % 3
        shades = 100 * np.eye(3)[labels] + rng.integers(20, 140, (num, 3))
        images = [{"bytes": encoded(shade), "path": None} for shade in shades]
        features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)
