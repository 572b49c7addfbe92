"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
from pathlib import Path


__all__ = ["check_new_folder", "flush_to_disk", "new_folder", "write"]


def write(path: Path, text: str):
    """All or nothing: a reader never meets half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path):
    """A renamed file may otherwise be empty after a power cut. Some file systems cannot flush a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_new_folder(folder: Path):
    """Raises ValueError unless `folder` can be made: it does not exist yet, or is empty."""
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")


@contextlib.contextmanager
def new_folder(folder: Path):
    """A folder to fill, which takes its name only when all went well, and else leaves nothing behind."""
    check_new_folder(folder)
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}-{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()  # it is empty
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
