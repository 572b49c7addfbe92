"""
The command `modeling-can`; also `python -m modeling_can`, which `accelerate launch -m modeling_can` starts on many
GPUs.

Each command is a function of its words that returns what it found and raises ValueError for what the user can fix.
What a command needs is imported when it is called.
"""

import contextlib
import difflib
import sys

from .command_line import look_at_evaluation, look_at_pretraining, set_environment
from .progress import quiet, report_errors, tell


__all__ = ["COMMANDS", "convert", "demo", "embed", "evaluate", "exit_status", "main", "pretrain"]

_RESUME = "To go on, repeat the command with --resume_from_checkpoint latest"


def pretrain(argv: list[str] | None = None, dataset=None, program: str = "modeling-can pretrain") -> dict:
    """
    Pre-trains CAN on images.

        modeling-can pretrain                                             # the quickstart, minutes on two CPU cores
        modeling-can pretrain --data_dir ~/photos --output_dir out/mine   # settings chosen for your own images
        accelerate launch -m modeling_can pretrain can-vit-base-patch16-224 --data_dir ~/photos --output_dir out

    Every key of a recipe is a flag, and flags count last.
    """
    argv = sys.argv[1:] if argv is None else argv
    look_at_pretraining(argv, program, dataset is not None)
    with _importing():
        from .pretraining.loop import run
        from .pretraining.recipe import parse_arguments

    recipe = parse_arguments(argv, _description(pretrain), program, has_dataset=dataset is not None)
    return run(recipe, dataset, _words(program, argv))


def evaluate(argv: list[str] | None = None, program: str = "modeling-can eval") -> dict:
    """
    Measures vision encoders on a labeled set beside baselines, and says whether they are worth it.

        modeling-can eval --model_name_or_path out/can-quickstart --dataset_name sample_data --output_dir out/eval
        modeling-can eval --model_name_or_path MINE OTHERS --task knn,linear_probe --dataset_name FOLDER
        modeling-can eval --model_name_or_path MINE --task linear_probe --dataset_name FOLDER --export_classifier DIR

    Tasks: knn, linear_probe, linear_probe_sgd, few_shot, finetune, robustness, reconstruction, retrieval, features,
    segmentation; and embed, which needs no labels and stands alone.
    """
    argv = sys.argv[1:] if argv is None else argv
    look_at_evaluation(argv, program)
    with _importing():
        from .evaluation.command import run
        from .evaluation.settings import parse

    settings, fine_tuning = parse(argv, _description(evaluate), program)
    return run(settings, fine_tuning, _words(program, argv))


def embed(argv: list[str] | None = None) -> dict:
    """
    Writes the embeddings of many images to parquet files.

        modeling-can embed --model_name_or_path out/mine --data_dir ~/photos --output_dir out/embeddings
        modeling-can embed --model_name_or_path out/mine --data_files 'shards/*.parquet' --output_dir out/embeddings
        accelerate launch -m modeling_can embed --model_name_or_path out/mine --data_dir ~/photos --output_dir out

    The flags are those of `modeling-can eval --task embed`.
    """
    program, argv = "modeling-can embed", sys.argv[1:] if argv is None else argv
    look_at_evaluation(argv, program)
    with _importing():
        from .evaluation.command import run
        from .evaluation.settings import parse

    settings, fine_tuning = parse(["--task=embed", *argv], _description(embed), program)
    return run(settings, fine_tuning, _words(program, argv))


def convert(argv: list[str] | None = None):
    """
    Writes weights for other libraries, or takes weights from them.

        modeling-can convert out/mine --to dinov2 out/mine-dinov2
        modeling-can convert out/mine --to onnx out/mine-onnx
        modeling-can convert facebook/dinov2-small --to can out/start
    """
    with _importing():
        from .conversion.__main__ import main as convert_weights

    convert_weights(argv, _description(convert), "modeling-can convert")


def demo(argv: list[str] | None = None):
    """
    Shows in a browser what a pre-trained CAN sees, fills in, takes for noise and tells apart.

        modeling-can demo                                                 # the quickstart's model, out/can-quickstart
        modeling-can demo --model_name_or_path out/mine
        GRADIO_SERVER_PORT=8000 modeling-can demo --model_name_or_path NAME/ON_THE_HUB
    """
    with _importing():
        from .demo import main as show

    show(argv, _description(demo), "modeling-can demo")


COMMANDS = {"pretrain": pretrain, "eval": evaluate, "embed": embed, "convert": convert, "demo": demo}


def main(argv: list[str] | None = None):
    """Runs a command line and ends the process with its status."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    with report_errors("modeling-can", _RESUME if name == "pretrain" else ""):
        if name in ("-h", "--help"):
            tell(_overview())
            return
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise ValueError(f"there is no command {name!r}; {hint}")
        found = COMMANDS[name](words)
    sys.exit(exit_status(found))


def exit_status(found: dict | None) -> int:
    """Of what a command found: 130 after Ctrl-C, as shells expect it; 1 after a preflight that is not ready."""
    if not found:
        return 0
    return 130 if found.get("stopped_by") == "SIGINT" else int(not found.get("ready", True))


def _overview() -> str:
    lines = [f"  {name:10}{_description(function).splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: modeling-can COMMAND ...", "", *lines, "", "modeling-can COMMAND --help says more."])


def _description(function) -> str:
    lines = function.__doc__.strip().splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


def _words(program: str, argv: list[str]) -> list[str]:
    """What stands behind `python` or `accelerate launch`, for cards and results."""
    return [*program.replace("modeling-can", "-m modeling_can").split(), *argv]


@contextlib.contextmanager
def _importing():
    """
    Around the imports of a command, which take seconds: CAN becomes known to transformers, which does not warn of an
    image processor for which torchvision is not installed.
    """
    set_environment()
    with quiet():
        from . import registration  # noqa: F401

        yield
