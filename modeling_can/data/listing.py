"""
A folder of images as rows, in bounded time and memory: a million files must not be a million Python objects.

Every start reads all names and sizes, so that no change of the folder is missed, whatever its file system says of
times. What follows from them, the shuffled rows and their fingerprint, is kept in the cache of `datasets`, as a file
that all processes and workers map into their memory.
"""

import hashlib
import itertools
import logging
import os
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from datasets.table import InMemoryTable, MemoryMappedTable

from ..files import new_file
from ..progress import progress_bar
from .folders import fingerprint, hash_of, image_paths, sentence, size_of


__all__ = ["COLUMN", "Listing", "list_folder"]

logger = logging.getLogger(__name__)

COLUMN = "image"
_SCHEMA = datasets.Features({COLUMN: datasets.Image(decode=False)}).arrow_schema
_FORMAT = 1  # of the cached files
_CACHED_FROM = 10_000  # images: fewer are sorted faster than a file is worth
_CHUNK = 256  # paths that are looked at together
_MOST_BYTES = 2**31  # of paths in one array
_NUM_THREADS = 16  # that ask for sizes where they have to be waited for, as on a server
_SLOW = 1e-4  # seconds for a size, from which on threads gain more than they cost
_QUIET_SECONDS = 2  # of listing, before a bar appears


class Listing(NamedTuple):
    rows: datasets.Dataset | None  # one column `image` of `{"bytes": None, "path": ...}`; None if there are no images
    fingerprint: str | None  # see `folders.fingerprint`
    left_out: dict[str, int]  # what else is there, by kind
    left_out_line: str  # a sentence about that, empty if there is nothing else


def list_folder(folder: str, arrays: bool = False) -> Listing:
    """
    The images anywhere below a folder, sorted by path and then shuffled, always in the same way: the files of a class
    lie together, beyond the reach of a block. NumPy files are images where images are read as `arrays`.

    Raises:
        ValueError: if the path of an image is not UTF-8 text.
    """
    left_out, unreadable = Counter(), []
    table = _table(folder, image_paths(folder, left_out, unreadable, arrays))
    pyarrow.default_memory_pool().release_unused()  # what it took to make the table
    left_out, number = +left_out, 0 if table is None else len(table)  # without zeros
    line = sentence(f"data_dir={folder}", number, left_out, unreadable)
    if table is None:
        return Listing(None, None, dict(left_out), line)
    found = table.schema.metadata[b"fingerprint"].decode()
    # Without a fingerprint, datasets would hash the table.
    return Listing(datasets.Dataset(table, fingerprint=found), found, dict(left_out), line)


def _table(folder: str, images: Iterator[str]) -> MemoryMappedTable | InMemoryTable | None:
    paths, sizes, digest = _paths_and_sizes(folder, images)
    if not len(paths):
        return None
    file = _cache_file(folder, digest)
    table = _read(file)
    if table is not None:
        return table
    table = _shuffled(folder, paths.combine_chunks(), sizes)
    return table if len(paths) < _CACHED_FROM else _kept(table, file)


# --- Names and sizes -------------------------------------------------------------------------------------------------


def _paths_and_sizes(folder: str, paths: Iterator[str]) -> tuple[pyarrow.ChunkedArray, np.ndarray, str]:
    """The paths as they come, their sizes (-1 for a link that leads nowhere), and a hash of both."""
    chunks, is_main = iter(lambda: list(itertools.islice(paths, _CHUNK)), []), os.environ.get("RANK", "0") == "0"
    found, sizes, digest = [], [], hashlib.sha256()
    bar = progress_bar(description="listing", unit="images", is_shown=is_main, lines=True, delay=_QUIET_SECONDS)
    try:
        with bar:
            for some_paths, some_sizes in _looked_at(chunks):
                found.append(some_paths)
                sizes.append(some_sizes)
                for buffer in (*some_paths.buffers()[1:], some_sizes):
                    digest.update(buffer)
                bar.update(len(some_paths))
    except UnicodeEncodeError as error:
        message = f"data_dir={folder} holds {error.object!r}, a name that is not UTF-8 text; rename the file"
        raise ValueError(message) from error
    found = pyarrow.chunked_array(found, pyarrow.large_string())
    return found, np.concatenate([np.empty(0, np.int64), *sizes]), digest.hexdigest()[:16]


def _look_at(paths: list[str]) -> tuple[pyarrow.Array, np.ndarray]:
    sizes = [-1 if size is None else size for size in map(size_of, paths)]
    return pyarrow.array(paths, pyarrow.large_string()), np.array(sizes, np.int64)


def _looked_at(chunks: Iterator[list[str]]) -> Iterator[tuple[pyarrow.Array, np.ndarray]]:
    """`map(_look_at, chunks)`; once that turns out slow, in threads, a bounded number of chunks ahead."""
    for chunk in chunks:
        began = time.perf_counter()
        found = _look_at(chunk)
        is_slow = time.perf_counter() - began > _SLOW * len(chunk)
        yield found
        if is_slow:
            break
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_look_at, chunk))
            if len(waiting) > 2 * _NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- Rows ------------------------------------------------------------------------------------------------------------


def _shuffled(folder: str, paths: pyarrow.Array, sizes: np.ndarray) -> InMemoryTable:
    """The rows, with their fingerprint in the metadata of the schema."""
    order = pyarrow.compute.sort_indices(paths).to_numpy()
    order = order[np.random.default_rng(0).permutation(len(order))]
    paths, sizes = paths.take(order), sizes[order]
    metadata = {**_SCHEMA.metadata, b"fingerprint": fingerprint(_each(paths), folder, _each_size(sizes)).encode()}
    # In one piece, as the states of streams count the pieces; unless the 32-bit offsets of Arrow do not reach so far.
    num_bytes = paths.buffers()[2].size
    num_pieces = 1 if num_bytes < _MOST_BYTES else 2 * num_bytes // _MOST_BYTES
    pieces = []
    for some in np.array_split(np.arange(len(paths)), num_pieces):
        some = paths[some[0] : some[-1] + 1].cast(pyarrow.string())
        columns = [pyarrow.nulls(len(some), pyarrow.binary()), some]
        image = pyarrow.StructArray.from_arrays(columns, fields=list(_SCHEMA.field(COLUMN).type))
        pieces.append(pyarrow.record_batch([image], schema=_SCHEMA.with_metadata(metadata)))
    return InMemoryTable(pyarrow.Table.from_batches(pieces))


def _each(paths: pyarrow.Array) -> Iterator[str]:
    for start in range(0, len(paths), _CHUNK):
        yield from paths[start : start + _CHUNK].to_pylist()


def _each_size(sizes: np.ndarray) -> Iterator[int | None]:
    for start in range(0, len(sizes), _CHUNK):
        yield from (None if size < 0 else size for size in sizes[start : start + _CHUNK].tolist())


# --- Cache -----------------------------------------------------------------------------------------------------------


def _cache_file(folder: str, digest: str) -> Path:
    """
    Named by the folder and by all that the rows depend on, so that it is never out of date. That of a folder as it was
    stays: another run may be reading it, which would crash on a network file system.
    """
    place = hash_of([_FORMAT, os.path.realpath(folder), folder])
    return Path(datasets.config.HF_DATASETS_CACHE) / "modeling_can" / f"{place}-{digest}.arrow"


def _kept(table: InMemoryTable, file: Path) -> MemoryMappedTable | InMemoryTable:
    """The table from the cache, after it was written there; as it is where the cache cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as partial:
            with pyarrow.ipc.new_stream(str(partial), table.schema) as stream:
                stream.write_table(table.table)
            with partial.open("r+b") as content:
                checksum = 0
                while part := content.read(1 << 20):
                    checksum = zlib.crc32(part, checksum)
                content.write(checksum.to_bytes(4, "big"))  # Arrow stops reading before it
    except OSError as error:
        logger.info("the list of images is not kept in %s: %s", file, error)
    return _read(file) or table


def _read(file: Path) -> MemoryMappedTable | None:
    """A table that was kept, or None where there is none that is whole."""
    try:
        content = pyarrow.memory_map(str(file)).read_buffer()
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "big"):
            return None
        return MemoryMappedTable(pyarrow.ipc.open_stream(content).read_all(), str(file))
    except (OSError, pyarrow.ArrowException):
        return None
