"""
Pre-trains CAN on images: recipe -> config -> data -> model -> loop -> results.

    python run_pretraining.py                                             # the quickstart, minutes on two CPU cores
    python run_pretraining.py --data_dir ~/photos --output_dir out/mine   # its recipe on your own images
    accelerate launch run_pretraining.py model_cards/can-vit-base-patch16-224/recipe.yaml --output_dir out

Every key of a recipe is a flag, and flags count last; `--help` lists them all.
"""

import sys
from dataclasses import replace
from pathlib import Path

from modeling_can.pretraining.loop import run
from modeling_can.pretraining.recipe import SOURCE, parse_arguments
from modeling_can.progress import report_errors


QUICKSTART = Path(__file__).parent / "model_cards" / "can-quickstart" / "recipe.yaml"


def main(argv: list[str] | None = None, dataset=None) -> dict:
    """
    Runs a recipe; returns what `results.json` holds. Raises ValueError for what the user can mend.

    Args:
        argv (`list[str]`, *optional*): The command line; that of the process if `None`.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): Instead of the recipe's source.
    """
    recipe = parse_arguments(argv, QUICKSTART, __doc__)
    if dataset is not None:
        recipe = replace(recipe, **dict.fromkeys(SOURCE))
    return run(recipe, dataset, [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    with report_errors("run_pretraining.py", "Go on with --resume_from_checkpoint latest"):
        main()
