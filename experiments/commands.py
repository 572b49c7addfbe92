"""run_pretraining.py and run_eval.py, started as a user starts them: each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path


__all__ = ["ROOT", "as_flags", "data_flags", "evaluate", "run_script"]

ROOT = Path(__file__).parent.parent


def as_flags(settings: dict) -> list[str]:
    """Settings as a command line has them."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def data_flags(arguments) -> list[str]:
    """The data set of a study's own --data and --image_column."""
    return ["--dataset_name", arguments.data, "--image_column", arguments.image_column]


def run_script(
    threads: int,
    script: str,
    *words: str,
    log: Path | None = None,
    meanwhile: Callable | None = None,
    every: float | None = None,
):
    """
    Runs a script of the repository on so many threads, with its output in a log or in ours; `meanwhile` is called
    after every so many seconds. SystemExit where the script fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / script), *words]
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") if log else nullcontext() as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT if file else None)
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(every)
                break
            meanwhile()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; see {log or 'above'}")


def evaluate(
    model: Path, place: Path, tasks: tuple[str, ...], flags: list[str], threads: int, baseline: str | None = None
) -> dict:
    """
    run_eval.py's results.json of one model, or of the baseline that it is compared with. Its files go to `place`, not
    to the model's folder, which may be read-only; its output goes to a log beside `place`.
    """
    output_dir = place / "-".join(["evaluation", *tasks])
    flags = ["--task", *tasks, "--baselines", baseline or "none", "--output_dir", str(output_dir), *flags]
    log = place.with_name(f"{place.name}.log")
    run_script(threads, "run_eval.py", "--model_name_or_path", str(model), *flags, log=log)
    result = json.loads((output_dir / "results.json").read_text())
    return {**result, "results": result["results"][baseline or model.name]}
