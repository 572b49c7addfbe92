"""The models, registered with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .configuration_can import CANConfig
from .modeling_can import CANForImageClassification, CANForPreTraining, CANModel, CANPreTrainedModel


__all__ = ["CANConfig", "CANForImageClassification", "CANForPreTraining", "CANModel", "CANPreTrainedModel"]

AutoConfig.register("can", CANConfig, exist_ok=True)
AutoModel.register(CANConfig, CANModel, exist_ok=True)
AutoModelForPreTraining.register(CANConfig, CANForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(CANConfig, CANForImageClassification, exist_ok=True)
