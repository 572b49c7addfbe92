"""CAN (arXiv 2210.16870) for transformers: importing this package registers it with the Auto classes."""

from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .configuration_can import CANConfig
from .modeling_can import CANForImageClassification, CANForPreTraining, CANModel, CANPreTrainedModel


if TYPE_CHECKING:
    from .api import embed, evaluate, pretrain


AutoConfig.register("can", CANConfig, exist_ok=True)
AutoModel.register(CANConfig, CANModel, exist_ok=True)
AutoModelForPreTraining.register(CANConfig, CANForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(CANConfig, CANForImageClassification, exist_ok=True)

__all__ = [
    "CANConfig",
    "CANForImageClassification",
    "CANForPreTraining",
    "CANModel",
    "CANPreTrainedModel",
    "embed",
    "evaluate",
    "pretrain",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`pretrain`, `evaluate` and `embed` on demand: they need more packages than the models do."""
    if name not in ("embed", "evaluate", "pretrain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .progress import quiet

    with quiet():
        from . import api

    return getattr(api, name)
