"""The sizes of encoder and decoder, from a table or of the weights that a run begins with; and their learning rate."""

import functools

from ..configuration_can import CANConfig
from ..conversion import normalization
from ..conversion.importing import start_config
from ..conversion.names import ENCODER_FIELDS
from ..conversion.reading import is_file_of_weights


__all__ = ["ENCODERS", "OF_START", "rate_of", "sizes_of", "sizes_of_start"]

# Width, layers and heads of encoder and decoder
ENCODERS = {
    "a small ViT": ((128, 4, 4), (64, 2, 4)),
    "ViT-tiny": ((192, 12, 3), (192, 4, 6)),
    "ViT-small": ((384, 12, 6), (256, 4, 8)),
    "ViT-base": ((768, 12, 12), (512, 8, 16)),
}
# Learning rate by the width of the encoder, up to
_RATES = (
    (128, 2e-3, "the best in the search of the CIFAR-10 study, for this width"),
    (767, 5e-4, "as for ViT-tiny in the CIFAR-10 study"),
    (10**9, 2.5e-4, "the paper's authors', for ViT-base"),
)
# What of a CAN says how its decoder and heads are built
_HEADS = (
    "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size",
    "projection_hidden_size", "projection_size", "noise_head", "norm_noise_loss", "noise_std_max",
    "noise_level_embedding", "norm_pix_loss",
)  # fmt: skip
OF_START = (*ENCODER_FIELDS, "image_size", *_HEADS, "image_mean", "image_std", "base_learning_rate")


def sizes_of(name: str, given: dict) -> dict:
    """
    Of one of `ENCODERS`, by field of `CANConfig`.

    Args:
        given (`dict`): What the user set: what depends on a width follows it.
    """
    values = {}
    for prefix, (width, layers, heads) in zip(("", "decoder_"), ENCODERS[name], strict=True):
        width = given.get(f"{prefix}hidden_size", width)
        values |= {
            f"{prefix}hidden_size": width,
            f"{prefix}num_hidden_layers": layers,
            f"{prefix}num_attention_heads": next(number for number in range(heads, 0, -1) if width % number == 0),
            f"{prefix}intermediate_size": 4 * width,
        }
    return values


def rate_of(width: int) -> tuple[float, str]:
    """The learning rate for 256 images of an encoder of that width, and why."""
    return next((rate, reason) for most, rate, reason in _RATES if width <= most)


@functools.lru_cache(maxsize=1)  # a file is read for it
def _config_of(name_or_path: str, num_attention_heads: int | None) -> CANConfig:
    return start_config(name_or_path, num_attention_heads)


def sizes_of_start(name_or_path: str, given: dict) -> dict:
    """
    The encoder of these weights, its image size and its normalization, by key of a recipe; with the decoder and the
    heads that they have too, or a decoder for an encoder of about that width.

    Args:
        given (`dict`):
            What is set, by key: a normalization of other channels is none for these, and a file of weights does not
            tell its number of heads.

    Raises:
        ValueError: for what is no encoder that CAN can have.
    """
    config = _config_of(name_or_path, given.get("num_attention_heads"))
    values = {name: getattr(config, name) for name in (*ENCODER_FIELDS, "image_size")}
    if "CANForPreTraining" in (config.architectures or ()):
        values |= {name: getattr(config, name) for name in _HEADS}
        if not config.noise_std_max:  # trained without noise: whether there is some now is the recipe's to say
            del values["noise_std_max"]
    else:
        near = min(ENCODERS, key=lambda name: abs(ENCODERS[name][0][0] - config.hidden_size))
        values |= {name: value for name, value in sizes_of(near, {}).items() if name.startswith("decoder")}
    theirs = None if is_file_of_weights(name_or_path) else normalization(name_or_path)
    if theirs and len(theirs[0]) == given.get("num_channels", config.num_channels):
        values |= {"image_mean": tuple(theirs[0]), "image_std": tuple(theirs[1])}
    return values
