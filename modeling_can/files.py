"""Paths as users write them, and files and folders that are written whole or not at all."""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


__all__ = [
    "check_new_folder", "expand_user", "free_space", "literal_pattern", "make_folder", "new_file", "new_files",
    "new_folder", "put_in_place", "refuse_missing_files", "refuse_missing_folder", "refuse_missing_path", "write",
]  # fmt: skip


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


def refuse_missing_folder(name: str, folder: Path):
    """Raises ValueError unless `folder`, the value of the setting `name`, is one."""
    if folder.is_file():
        raise ValueError(
            f"{name}={folder} is a file and not a folder; unpack an archive, or name tables and tars with --data_files"
        )
    if not folder.is_dir():
        raise ValueError(f"{name}={folder} is not a folder")


def refuse_missing_files(files: list[str]):
    """Raises ValueError for a local path or pattern of `data_files` that matches no file."""
    for file in files:
        if "://" not in file and not glob.glob(literal_pattern(file), recursive=True):
            where = "" if os.path.isabs(file) else f"; it begins at the working directory, {os.getcwd()}"
            raise ValueError(f"data_files={file} is no file, and matches none{where}")


def refuse_missing_path(name: str, value: str):
    """Raises ValueError for what can only be a path, and no id on the Hub, where there is nothing."""
    if value.startswith(("/", "./", "../", "~")) and not os.path.exists(expand_user(value)):
        raise ValueError(f"{name}={value}: there is no such file or folder")


def make_folder(name: str, folder: Path):
    """Makes `folder`, the value of the setting `name`, where it is missing; ValueError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "it cannot be written to"
    except OSError as error:
        file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
        reason = f"{file} is a file" if file else error.strerror
    if reason:
        raise ValueError(f"{name}={folder} cannot be used: {reason}; give another --{name}")


def free_space(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def write(path: Path, text: str):
    """A text file, as `new_file`."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """
    A path beside `path` to write to, which takes that name when all went well, and else leaves nothing behind. No two
    processes get the same, so that several may write the same file. What a killed one leaves ends in `.partial`.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _flush_to_disk(path: Path):
    """A renamed file may otherwise be empty after a power cut. Some systems cannot open or flush a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes no read-only file
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


def check_new_folder(folder: Path):
    """Raises ValueError unless `folder` can be made: it does not exist yet, or is empty."""
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when all went well, and else leaves nothing behind."""
    check_new_folder(folder)
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()  # it is empty
        put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """
    A folder to fill, whose files join those of `folder` when all went well and all of them are on the disk; else
    nothing is left behind, and no empty `folder`.
    """
    partial = folder / f".{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            _flush_to_disk(path)
        for path in partial.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def put_in_place(partial: Path, folder: Path):
    """Gives a complete folder its name, in the place of one that has it, when all of it is on the disk."""
    for path in (*partial.rglob("*"), partial):
        _flush_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _flush_to_disk(folder.parent)
