"""Names that moved to `modeling_can.data`."""

from .data.crops import RandomCrops, random_box
from .data.decoding import DECODING, BadImage, decode


__all__ = ["DECODING", "BadImage", "RandomCrops", "decode", "random_box"]
