"""
Cuts the bundled tiles from photographs that the scikit-image wheel ships:

    python modeling_can/data/sample_data/build.py

Needs scikit-image, which nothing else in this project does. Training tiles come from the left half of each photograph,
test tiles from the right half, so that no pixel is in both. Writes train-*.parquet and test-*.parquet beside itself.
"""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PIL
from skimage import data

from modeling_can.progress import tell


__all__ = ["main"]


_PHOTOGRAPHS = {  # label: loader. Sources and licenses: README.md
    "astronaut": data.astronaut,
    "brick": data.brick,
    "camera": data.camera,
    "cell": data.cell,
    "chelsea": data.chelsea,
    "clock": data.clock,
    "coffee": data.coffee,
    "grass": data.grass,
    "gravel": data.gravel,
    "hubble": data.hubble_deep_field,
    "retina": data.retina,
    "rocket": data.rocket,
}
_TILE = 40  # pixels
_LONGEST_SIDE = 640  # pixels; larger photographs are reduced, or their tiles would show next to nothing
_TRAIN_TILES, _TEST_TILES = 240, 60  # of each photograph
_TRAIN_SHARDS = 4


def _encode(tile: PIL.Image) -> bytes:
    buffer = io.BytesIO()
    tile.save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return buffer.getvalue()


def _cut(photograph: PIL.Image, count: int) -> list[bytes]:
    """`count` tiles on the coarsest square grid that has as many, evenly thinned out."""
    width, height = photograph.size
    for stride in range(_TILE, 0, -1):
        corners = [(x, y) for y in range(0, height - _TILE + 1, stride) for x in range(0, width - _TILE + 1, stride)]
        if len(corners) >= count:
            break
    chosen = [corners[i] for i in np.linspace(0, len(corners) - 1, count).round().astype(int)]
    return [_encode(photograph.crop((x, y, x + _TILE, y + _TILE))) for x, y in chosen]


def main():
    folder = Path(__file__).parent
    train, test = [], []
    for label, load in enumerate(_PHOTOGRAPHS.values()):
        photograph = PIL.fromarray(load()).convert("RGB")
        photograph.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), PIL.Resampling.LANCZOS)
        width, height = photograph.size
        train += [(tile, label) for tile in _cut(photograph.crop((0, 0, width // 2, height)), _TRAIN_TILES)]
        test += [(tile, label) for tile in _cut(photograph.crop((width - width // 2, 0, width, height)), _TEST_TILES)]

    features = Features({"image": Image(), "label": ClassLabel(names=list(_PHOTOGRAPHS))})
    order = np.random.default_rng(0).permutation(len(train))
    shards = [(f"train-{i:05d}-of-{_TRAIN_SHARDS:05d}", [train[k] for k in order[i::_TRAIN_SHARDS]])
              for i in range(_TRAIN_SHARDS)]  # fmt: skip
    for name, rows in [*shards, ("test-00000-of-00001", test)]:
        columns = {"image": [{"bytes": tile, "path": None} for tile, _ in rows], "label": [y for _, y in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
        tell(f"{name}: {len(rows)} tiles, {(folder / f'{name}.parquet').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
