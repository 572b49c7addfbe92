"""
Pre-trains CAN on images, from a checkout: what `modeling-can pretrain` does once the package is installed.

    python run_pretraining.py                                             # the quickstart, minutes on two CPU cores
    python run_pretraining.py --data_dir ~/photos --output_dir out/mine   # settings chosen for your images
    accelerate launch run_pretraining.py model_cards/can-vit-base-patch16-224/recipe.yaml --output_dir out
"""

import sys

from modeling_can.cli import exit_status, pretrain
from modeling_can.progress import report_errors


def main(argv: list[str] | None = None, dataset=None) -> dict:
    """
    Runs a recipe; returns what `results.json` holds. Raises ValueError for what the user can fix.

    Args:
        argv (`list[str]`, *optional*): The command line; that of the process if `None`.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): Instead of the recipe's source.
    """
    return pretrain(argv, dataset, "run_pretraining.py")


if __name__ == "__main__":
    with report_errors("run_pretraining.py", "To go on, repeat the command with --resume_from_checkpoint latest"):
        found = main()
    sys.exit(exit_status(found))
