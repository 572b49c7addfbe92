"""`modeling_can.pretrain`, `evaluate` and `embed`: what the commands do, from Python and notebooks."""

from pathlib import Path
from typing import Unpack

from .evaluation import command
from .evaluation.settings import make_settings
from .keywords import Evaluation, Pretraining
from .pretraining.loop import run
from .pretraining.presets import SOURCE
from .pretraining.recipe import make_recipe


__all__ = ["embed", "evaluate", "pretrain"]


def pretrain(recipe: str | Path | dict | None = None, *, dataset=None, **fields: Unpack[Pretraining]) -> dict:
    """
    Pre-trains CAN on images.

    ```python
    modeling_can.pretrain(data_dir="photos", output_dir="out/mine", num_train_epochs=100)
    modeling_can.pretrain("can-vit-small-patch16-224", dataset=my_dataset, max_steps=10_000)
    ```

    Args:
        recipe (`str`, `Path` or `dict`, *optional*): The name of a preset, a YAML file, or values by key. Without
            one, settings are chosen for your images; without images of yours, it is the quickstart.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): Instead of the recipe's source.
        fields: Any key of a recipe, which counts last; `modeling-can pretrain --help` explains them.

    Returns:
        What `results.json` in `output_dir` holds. After a keyboard interrupt, which saves a checkpoint first,
        `{"stopped_by": "SIGINT", "step": ...}`; with `preflight=True`, `{"ready": bool}`.

    Raises:
        ValueError: for what the user can fix.
        FloatingPointError: if a gradient is not finite, and `on_nonfinite` is `"stop"`.
        OSError: if the images cannot be read, or the model cannot be written.
    """
    values = dict(fields) if dataset is None else {**fields, **dict.fromkeys(SOURCE)}
    made = make_recipe(recipe, values, has_dataset=dataset is not None)
    named = [] if recipe is None or isinstance(recipe, dict) else [str(recipe)]
    return run(made, dataset, ["-m", "modeling_can", "pretrain", *named, *_words(fields)])


def evaluate(**fields: Unpack[Evaluation]) -> dict:
    """
    Measures vision encoders on a labeled set.

    ```python
    modeling_can.evaluate(model_name_or_path="out/mine", dataset_name="my-images", task="knn,linear_probe")
    ```

    Args:
        fields: Named like the flags, which `modeling-can eval --help` explains.

    Returns:
        What `results.json` in `output_dir` holds.

    Raises:
        ValueError: for what the user can fix.
    """
    settings, fine_tuning = make_settings(dict(fields))
    return command.run(settings, fine_tuning, ["-m", "modeling_can", "eval", *_words(fields)])


def embed(**fields: Unpack[Evaluation]) -> dict:
    """
    Writes the embeddings of many images to parquet files; `evaluate` with the task `embed`, which needs no labels.

    ```python
    modeling_can.embed(model_name_or_path="out/mine", data_dir="photos", output_dir="out/embeddings")
    ```
    """
    return evaluate(**fields, task="embed")


def _words(fields: dict) -> list[str]:
    """The same on a command line, for cards and results."""
    return [f"--{name}={','.join(map(str, v)) if isinstance(v, list | tuple) else v}" for name, v in fields.items()]
