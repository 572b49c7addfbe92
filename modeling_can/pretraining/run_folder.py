"""The folder of a run: refusals, a lock, preparation, and the weights in it, or elsewhere where it is full."""

import errno
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import yaml

from ..files import make_folder, new_files
from ..former_names import current_names
from ..progress import quiet, tell
from .presets import LENGTH
from .recipe import Recipe


__all__ = ["lock", "prepare_folder", "refuse_other_run", "save_model", "unlock"]

try:
    import fcntl
except ImportError:  # on Windows: no lock
    fcntl = None


def refuse_other_run(recipe: Recipe, output_dir: Path) -> dict | None:
    """
    Raises ValueError where a run would destroy another one; returns the results of one that needs no more, so that a
    job that is started again after its end does no harm.
    """
    source = Path(recipe.model_name_or_path or "")
    if recipe.model_name_or_path and source.is_dir() and source.resolve() == output_dir.resolve():
        raise ValueError(
            f"output_dir={output_dir} is model_name_or_path, whose weights it would replace; give another"
        )
    choice = "give another --output_dir, or replace it with --overwrite_output_dir"
    wanted, checkpoints = recipe.resume_from_checkpoint, output_dir / "checkpoints"
    own = wanted == "latest" or (wanted and Path(wanted).resolve().parent == checkpoints.resolve())
    if not (output_dir / "results.json").exists():
        if not own and any(checkpoints.glob("step-*")):
            raise ValueError(
                f"output_dir={output_dir} already holds an unfinished run; continue it with --resume_from_checkpoint "
                f"latest, {choice}"
            )
        return None
    results = json.loads((output_dir / "results.json").read_text(), object_hook=current_names)
    if "num_steps" not in results:
        raise ValueError(
            f"output_dir={output_dir} holds a results.json that is not of a pre-training run; give another"
        )
    before = current_names(yaml.safe_load((output_dir / "recipe.yaml").read_text()))
    length = next(name for name in LENGTH if before.get(name) is not None)  # the one that counts
    is_longer = recipe.length == length and getattr(recipe, length) > before[length]
    is_longer = is_longer or (recipe.max_steps or 0) > results["num_steps"]
    has_checkpoint = any(checkpoints.glob("step-*"))
    longer, from_weights = f"To make it longer raise {' or '.join(dict.fromkeys((length, 'max_steps')))}. ", ""
    if not has_checkpoint:
        longer = ""
        from_weights = (
            f". It kept no checkpoint: to train on from its weights, --model_name_or_path {output_dir} "
            "--output_dir NEW"
        )
    if wanted == "latest" and not is_longer:
        tell(f"the run in {output_dir} is finished: nothing to do. {longer}For another one {choice}{from_weights}")
        return results
    if not own or not has_checkpoint:
        raise ValueError(f"output_dir={output_dir} already holds a finished run; {choice}{from_weights}")
    return None


def prepare_folder(output_dir: Path, keep: bool):
    """An empty place, unless a run is resumed: what another run left there would mix with this one's."""
    (output_dir / "results.json").unlink(missing_ok=True)
    if keep:
        return
    (output_dir / "bad_samples.jsonl").unlink(missing_ok=True)  # also of a run that was killed before its first line
    if not (output_dir / "metrics.jsonl").exists():  # no run's folder: the rest may be somebody else's
        return
    for folder in ("checkpoints", "tensorboard"):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
    results = ("metrics.jsonl", "README.md", "recipe.yaml")
    for pattern in (*results, "*.safetensors*", "*config.json"):
        for path in output_dir.glob(pattern):
            path.unlink()
    for path in (output_dir / "figures").glob("*.png"):
        path.unlink()


def lock(folder: Path):
    """
    Keeps other processes, of other machines too where the file system can, from running in a folder until the file
    that is returned is given to `unlock`. The system itself lets go of it when its process ends, however that is.

    Raises:
        ValueError: if another process has it, or no such folder can be made or written to.
    """
    make_folder("output_dir", folder)
    file = open(folder / ".lock", "a+")  # hidden: nothing else opens it, which would let go of it
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise ValueError(
                f"another run is using output_dir={folder} ({file.read()}); wait for its end, or give another "
                "--output_dir"
            ) from error
    file.truncate(0)  # from here on ours; or the file system knows no locks
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        raise ValueError(
            f"output_dir={folder} cannot be written to: {error.strerror}; make room, or give another --output_dir"
        ) from error
    return file


def unlock(file):
    os.unlink(file.name)
    file.close()


def save_model(folder: Path, *parts):
    """
    Saves model, processor and so on into a folder: all of them, or none where one cannot be saved.

    Args:
        parts (callable): Each is given a folder to save into.

    Raises:
        OSError: if they could be saved in another place only, which it names, or in none.
    """
    places = [folder, folder / "checkpoints", Path(tempfile.gettempdir())]
    errors = []
    for place in places:
        target = folder if place == folder else place / f"{folder.resolve().name}-{os.getpid()}"
        try:
            with new_files(target) as partial, quiet():
                for save in parts:
                    save(partial)
        except Exception as error:  # safetensors' own is no OSError
            errors.append(f"{place}: {error}")
            continue
        if errors:
            raise OSError(
                f"the trained model could not be saved in {errors[0]}. It is in {target}: make room, and move it to "
                f"{folder}. Probe, figures and card are missing"
            )
        return
    raise OSError(
        f"the trained model could not be saved ({'; '.join(errors)}); make room, and repeat the last steps with "
        "--resume_from_checkpoint latest"
    )
