"""An earlier place of `RandomCrops`, which is now in `modeling_can.data.crops`."""

from .data.crops import RandomCrops


__all__ = ["RandomCrops"]
