"""
Measures vision encoders: any that transformers can load, on any labelled set that `datasets.load_dataset` reads.

    python run_eval.py --model_name_or_path out/can-quickstart --dataset_name sample_data --output_dir out/eval
    python run_eval.py --model_name_or_path MINE OTHERS --task knn,linear_probe,few_shot --dataset_name FOLDER ...
    accelerate launch run_eval.py --model_name_or_path MINE --task finetune --dataset_name FOLDER ...
    python run_eval.py --model_name_or_path MINE --task linear_probe --dataset_name FOLDER --export_classifier DIR
    accelerate launch run_eval.py --model_name_or_path MINE --task embed --data_files 'shards/*.parquet' ...

Tasks: knn, linear_probe, linear_probe_sgd, few_shot, finetune, robustness, reconstruction, retrieval; and embed, which
needs no labels and stands alone. Every setting is a flag; `--help` lists them all.
"""

import sys
from pathlib import Path

from modeling_can.evaluation.command import run
from modeling_can.evaluation.settings import parse
from modeling_can.progress import report_errors


def main(argv: list[str] | None = None) -> dict:
    """
    Runs the tasks of a command line; returns what `results.json` holds. Raises ValueError for what the user can mend.

    Args:
        argv (`list[str]`, *optional*): The command line; that of the process if `None`.
    """
    settings, fine_tuning = parse(argv, __doc__)
    return run(settings, fine_tuning, [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    with report_errors("run_eval.py"):
        main()
