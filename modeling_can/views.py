"""Names that moved to `modeling_can.data`."""

from .data.crops import RandomCrops, random_box
from .data.decoding import DECODING, BadImage, check_decoding, decode


__all__ = ["DECODING", "BadImage", "RandomCrops", "check_decoding", "decode", "random_box"]
