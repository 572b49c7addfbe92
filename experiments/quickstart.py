"""
The quickstart over three seeds, one after the other, as its card reports it:

    python experiments/quickstart.py

Writes model_cards/can-quickstart/results.json (the results of all runs) and README.md (the card, made from them).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from datasets import load_dataset


sys.path.insert(0, str(Path(__file__).parents[1]))  # the root of the repository, which need not be installed
from experiments.commands import ROOT  # noqa: E402
from experiments.noise.study import TILES, gains  # noqa: E402


FOLDER = ROOT / "model_cards" / "can-quickstart"
SEEDS = (0, 1, 2)


def run(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_pretraining.py"), "--seed", str(seed), "--output_dir", folder]
        subprocess.run(command, check=True)
        results = json.loads((Path(folder) / "results.json").read_text().replace(folder, "OUT"))
        tiles = load_dataset(str(TILES), split="test")["image"]
        return results | {"noise_weaker_by": gains(Path(folder), tiles)}


def card(runs: list[dict]) -> str:
    def cell(features: str, metric: str) -> str:
        values = [100 * run["probe"][features][metric] for run in runs]
        return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"

    rows = [f"| {name} | {cell(name, 'knn')} | {cell(name, 'linear_probe')} |" for name in runs[0]["probe"]]
    weaker = {level: [run["noise_weaker_by"][level] for run in runs] for level in runs[0]["noise_weaker_by"]}
    weaker = {
        level: f"{statistics.mean(gains):.1f} dB ({', '.join(f'{gain:.1f}' for gain in gains)})"
        for level, gains in weaker.items()
    }
    seconds = [f"{run['total_seconds']:.0f}" for run in runs]
    health = "\n".join(f"- seed {seed}: {'; '.join(run['health'])}" for seed, run in zip(SEEDS, runs, strict=True))
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
license: apache-2.0
---

# can-quickstart

What `modeling-can pretrain` does without arguments: CAN ([arXiv 2210.16870](https://arxiv.org/abs/2210.16870)) with a
ViT of width 96 and 3 layers on 2,880 tiles of twelve free photos, offline, at 32 x 32 pixels. It shows that the code
works; the encoder is of no further use. There are no weights here, because the run makes them in minutes.

## Results

Top-1 accuracy in % on 720 test tiles (which of the 12 photos is this from?), which come from the other half of each
photo. Mean over the seeds {", ".join(map(str, SEEDS))} and, in brackets, each of them.

| features | k-NN | linear probe |
|---|---|---|
{chr(10).join(rows)}

k-NN is weighted (k = 20, cosine, temperature 0.07); both read the mean of the patch tokens. One seed's 720 tiles leave
an uncertainty of about 1.5 points (one standard deviation).

Subtracting the noise that the model predicts makes the noise in the test tiles weaker by {weaker["uniform"]}, over
sigma ~ U[0, 0.5] as in training; at 0.5 by {weaker["largest"]}.

The contrastive weight (0.1 rather than 0.03) was chosen on these test tiles with seed 0, and seeds 0 and 1 were seen
before the recipe was settled; seed 2 was not. Patches of 4, the noise, its weight, and the number of layers and steps
were chosen later on seeds 0 and 1. Read the gain with that in mind.

## Health

{health}

{runs[0]["num_steps"]} steps of {runs[0]["global_batch_size"]} images; {", ".join(seconds)} s in all on \
{runs[0]["machine"]}, {runs[0]["images_per_second"]:.0f} images/s at seed 0. `recipe.yaml` is the exact input,
`results.json` the exact output of the three runs; `python experiments/quickstart.py` in a checkout repeats them.
"""


def main():
    runs = [run(seed) for seed in SEEDS]
    (FOLDER / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
    (FOLDER / "README.md").write_text(card(runs))
    print(card(runs))


if __name__ == "__main__":
    main()
