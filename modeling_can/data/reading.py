"""The encoded bytes of one image, wherever they lie; and which errors of reading may pass."""

import asyncio
import functools
import os
import sys
import zlib

import datasets
import fsspec
from PIL import Image, UnidentifiedImageError

from .bad_samples import BadImage


__all__ = ["connection_errors", "encoded", "image_name", "is_gone", "located", "open_archive", "read_bytes"]


def image_name(image: dict) -> str:
    """What an image is called in messages: its path, or the CRC-32 of its bytes."""
    return image["path"] or f"crc32:{zlib.crc32(image['bytes']):08x}"


def encoded(image) -> dict:
    """`{"bytes": ..., "path": ...}` of anything that datasets takes for an image; a decoded one as PNG or TIFF."""
    if isinstance(image, dict):
        return image
    if isinstance(image, Image.Image):
        # A copy has no format, which may be one that loses something; TIFF, which palettes become, no transparency.
        image = image.convert("RGBA") if "transparency" in image.info else image.copy()
    try:
        return datasets.Image().encode_example(image)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a {type(image).__name__} is no image; .map() to images, arrays, paths or bytes") from error


def read_bytes(image: dict | None) -> bytes:
    """
    The encoded file behind a row of a `datasets.Image(decode=False)` column, `{"bytes": ..., "path": ...}`; the path
    may also be one that fsspec reads (`https://...`, `zip://a.jpg::b.zip`, `hf://...`).

    Raises:
        BadImage: `empty` for a row or file without a byte, `missing` for a file that is not there or not to be read.
        One of `connection_errors()`: for a remote file that cannot be read now, but perhaps later.
    """
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise BadImage("empty", "the row holds no image")
    encoded, path = image["bytes"], image["path"]
    if encoded is None:
        is_remote = "://" in path
        try:
            with _open_file(path) if is_remote else open(path, "rb") as file:
                encoded = file.read()
        except Exception as error:  # anything from a broken archive to a protocol that there is not
            if is_remote and isinstance(error, connection_errors()) and not is_gone(error):
                open_archive.cache_clear()  # the next attempt opens the archive anew
                raise
            raise BadImage("missing", f"{type(error).__name__}: {error}") from error
    if not encoded:
        raise BadImage("empty", "the file has 0 bytes")
    return encoded


def _open_file(path: str):
    """A file of a file system that fsspec knows; of an archive, whose index is read once and not for every file."""
    inner, *archive = path.split("::", 1)
    if not archive or "://" not in inner:
        return fsspec.open(path, "rb")
    protocol, name = inner.split("://", 1)
    return open_archive(os.getpid(), protocol, archive[0]).open(name, "rb")


@functools.lru_cache(maxsize=4)
def open_archive(process_id: int, protocol: str, archive: str) -> fsspec.AbstractFileSystem:
    """The opened archive of this process: processes that share an open file move each other's position in it."""
    return fsspec.core.url_to_fs(f"{protocol}://::{archive}")[0]


def connection_errors() -> tuple[type[Exception], ...]:
    """What a remote read raises that may pass. The HTTP clients are asked only where they were imported."""
    clients = {"aiohttp": "ClientError", "httpx": "RequestError", "httpx2": "RequestError"}
    imported = (getattr(sys.modules[module], name) for module, name in clients.items() if module in sys.modules)
    return (OSError, asyncio.TimeoutError, EOFError, *imported)


def is_gone(error: Exception) -> bool:
    """
    Whether trying again is in vain: a server says that there is no such file, or none for us; or a file system that
    there is none. (fsspec says so of an HTTP server that does not answer as well, and names the reason.)
    """
    if isinstance(error, UnidentifiedImageError):  # met by datasets, while it decoded an image for a .filter()
        return True
    reason = error.__cause__ or error
    status = getattr(reason, "status", None)
    if status is not None:
        return status in (401, 403, 404, 410)
    return isinstance(reason, FileNotFoundError | PermissionError | IsADirectoryError)


def located(image: dict | None, folder: str | None) -> dict | None:
    """
    An image whose relative path was found: in the folder of the table that names it, or else in the working directory.
    """
    path = image and image["bytes"] is None and image["path"]
    if not path or not folder or os.path.isabs(path) or "://" in path:
        return image
    for place in (os.path.join(folder, path), path):
        if os.path.exists(place):
            return {**image, "path": place}
    raise BadImage(
        "missing", f"{path} is neither in {folder}, where the table lies, nor in {os.getcwd()}, the working directory"
    )
