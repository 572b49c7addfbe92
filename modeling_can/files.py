"""Paths as users write them, and files and folders that are written whole or not at all."""

import contextlib
import glob
import os
import shutil
from pathlib import Path


__all__ = ["check_new_folder", "expand_user", "flush_to_disk", "literal_pattern", "new_folder", "write"]


def expand_user(value):
    """A path, or several, with `~` as the home folder; None and names that are no paths stay as they are."""
    if isinstance(value, list | tuple):
        return type(value)(map(expand_user, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def literal_pattern(file: str) -> str:
    """A pattern for `datasets`: what exists of a path is meant by its name, whatever characters are in it."""
    if "://" in file or glob.escape(file) == file:
        return file
    path = Path(file)
    known = next(place for place in (path, *path.parents) if os.path.exists(place))
    return str(Path(glob.escape(str(known))) / path.relative_to(known))


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
