"""What the encoder tells apart in some test images, as a sheet to look at: patch tokens as colors, and attention."""

import numpy as np
import torch

from ..plots import feature_sheet
from .encoders import feature_maps
from .protocol import Entry, Features, Measure, Protocol, Setup, file_name


__all__ = ["FeatureMaps"]

_NUM_DRAWN = 8  # rows of the sheet


class FeatureMaps(Protocol):
    """The sheet alone. It uses no label, and has no metrics."""

    name = "features"

    def check(self, setup: Setup, entry: Entry):
        size = (1, entry.preprocessor.num_channels, *entry.preprocessor.image_size)
        feature_maps(entry.encoder.model, torch.zeros(size, device=setup.device), **entry.encoder.options)

    def run(self, setup: Setup, entry: Entry, features: Features) -> dict | None:
        if not setup.is_main:
            return None
        test, preprocessor = setup.data.test, entry.preprocessor
        rows = np.random.default_rng(setup.settings.seed).permutation(len(test))[:_NUM_DRAWN]
        encoded = [test.read(row) for row in rows]
        pixels = preprocessor.normalize(torch.stack([preprocessor.decode(image) for image in encoded]))
        tokens, attentions = feature_maps(entry.encoder.model, pixels.to(setup.device), **entry.encoder.options)
        path = setup.output_dir / "figures" / f"features-{file_name(entry.name)}.png"
        images = torch.stack([preprocessor.shown(image) for image in encoded]) / 255
        feature_sheet(images=images, tokens=tokens, attentions=attentions, path=path)
        return {"figure": str(path)}

    def rows(self, figures: dict, pooling: str) -> dict[str, Measure]:
        return {}
