"""Files that are written whole or not at all."""

import os
from pathlib import Path


__all__ = ["flush_to_disk", "write"]


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
