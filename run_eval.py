"""
Measures vision encoders, from a checkout: what `modeling-can eval` does once the package is installed.

    python run_eval.py --model_name_or_path out/can-quickstart --dataset_name sample_data --output_dir out/eval
    python run_eval.py --model_name_or_path MINE OTHERS --task knn,linear_probe,few_shot --dataset_name FOLDER ...
    accelerate launch run_eval.py --model_name_or_path MINE --task finetune --dataset_name FOLDER ...
    python run_eval.py --model_name_or_path MINE --task linear_probe --dataset_name FOLDER --export_classifier DIR
    accelerate launch run_eval.py --model_name_or_path MINE --task embed --data_files 'shards/*.parquet' ...
"""

from modeling_can.cli import evaluate
from modeling_can.progress import report_errors


def main(argv: list[str] | None = None) -> dict:
    """
    Runs the tasks of a command line; returns what `results.json` holds. Raises ValueError for what the user can fix.

    Args:
        argv (`list[str]`, *optional*): The command line; that of the process if `None`.
    """
    return evaluate(argv, "run_eval.py")


if __name__ == "__main__":
    with report_errors("run_eval.py"):
        main()
