"""Tiny models of the three classes, and arguments of a forward pass of each."""

import torch
from testing_utils import inputs, tiny_config

from modeling_can import CANForImageClassification, CANForPreTraining, CANModel


MODELS = [CANModel, CANForPreTraining, CANForImageClassification]


def build(kind, **changes):
    torch.manual_seed(0)
    return kind(tiny_config(num_labels=5, **changes)).eval()


def example(model, batch_size: int = 4) -> dict:
    """Arguments of a forward pass with nothing left to chance; a classifier's with labels."""
    batch = inputs(model.config, batch_size)
    if isinstance(model, CANForPreTraining):
        return batch
    pixels = {"pixel_values": batch["pixel_values"][:, 0]}
    return pixels if isinstance(model, CANModel) else pixels | {"labels": torch.arange(batch_size) % 5}


def scalar(output) -> torch.Tensor:
    """The loss, or of a model without one a number that depends on all tokens, which a layer norm gives one square."""
    return output.loss if "loss" in output else output.last_hidden_state.pow(3).mean()


EXACT = dict(atol=0, rtol=0)


CLOSE = dict(atol=1e-5, rtol=1e-5)  # another order of the same sums in fp32


def assert_same(left, right, **tolerance):
    assert list(left) == list(right)
    for name, value in left.items():
        if isinstance(value, tuple):
            for one, other in zip(value, right[name], strict=True):
                torch.testing.assert_close(one, other, **tolerance)
        else:
            torch.testing.assert_close(value, right[name], **tolerance)
