"""The folder of a run: one run at a time, and its weights in it, or elsewhere where it is full."""

import errno
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path


try:
    import fcntl
except ImportError:  # on Windows: no lock
    fcntl = None


def lock(folder: Path):
    """
    Keeps other processes, of other machines too where the file system can, from running in a folder while the object
    that is returned lives. The system itself lets go of it when its process ends, however that is.

    Raises:
        ValueError: if another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")  # hidden: nothing else opens it, which would let go of it
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            owner = json.loads(file.read() or "{}")
            raise ValueError(
                f"another run is using output_dir={folder} (process {owner.get('process')} on {owner.get('host')}); "
                "wait for its end, or give another --output_dir"
            ) from error
    file.truncate(0)  # from here on ours; or the file system knows no locks
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    file.flush()
    return file


def save_model(folder: Path, *parts):
    """
    Saves model, processor and so on into a folder, all or nothing of it.

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
            _save(target, parts)
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


def _save(folder: Path, parts):
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for save in parts:
            save(partial)
        for path in partial.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
