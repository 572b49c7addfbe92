"""
Sources of images, and the endless stream of view pairs that the trainer reads from them.

Order: the shards of a source are shuffled for every epoch and dealt to the readers (processes x loader workers); where
there are fewer shards than readers, the rows are dealt instead. A reader passes over its own rows exactly once an
epoch, in shuffled blocks, and goes on into the next epoch without a gap. So every batch is full on every process, and
nobody waits for a reader that ran dry.

Resume: a reader's state is where its block began in the source, and how far into the block it is. Restored to as many
readers it continues with exactly the samples, in exactly the order, of a run that was never interrupted.

Faults: a connection that fails is opened again where it broke off; an image that cannot be used is passed over and
reported; a shard that is gone stops the run.
"""

import asyncio
import copy
import functools
import hashlib
import itertools
import json
import logging
import os
import sys
import tarfile
import time
import zlib
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image, UnidentifiedImageError

from .faults import (
    is_empty_tar,
    load,
    local_files,
    refuse_cut_off_file,
    refuse_damaged_file,
    refuse_other_than_images,
    refuse_unwritable_cache,
)
from .folders import (
    fingerprint,
    hash_of,
    left_out_of_split,
    list_images,
    literal_pattern,
    load_arguments,
    refuse_braces,
    refuse_misread_folders,
    resolve_name,
    split_names,
    suffix_of,
)
from .loading import resume, view_loader  # noqa: F401  to be imported from here too
from .tars import PartlyDecoded
from .views import BadImage


logger = logging.getLogger(__name__)

FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".jsonl": "json"}
RETRY_SECONDS = (1, 5, 20, 60, 120)  # waits before a connection is tried again
MAX_EMPTY_EPOCHS = 20  # in a row: a reader may be given nothing but empty shards by chance
STALL_SECONDS = 60  # of silence, after which a connection counts as failed

# datasets reads a broken connection up to 20 times more, 5 s apart, which a tar stream never survives. Instead, the
# readers here open it anew from where the block began.
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0


class ImageSource:
    """
    A set of encoded images: exactly one of a Hub id or folder that `datasets.load_dataset` reads, any folder of images
    (nested or flat, labels play no part), data files, or a data set that was built in Python.

    Args:
        dataset_name (`str`, *optional*): Hub id, local folder, or `"sample_data"`.
        config_name (`str`, *optional*): Which configuration of `dataset_name`, where it has several.
        data_dir (`str`, *optional*): A folder with images anywhere below it.
        data_files (`str` or `list[str]`, *optional*):
            Paths, globs or URLs (http, s3, hf, whatever fsspec reads) of parquet, WebDataset tar, arrow or jsonl.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            As it is. Of a stream with `.map()` or `.filter()` the pictures come decoded, and are encoded anew here; a
            damaged one ends it, and datasets itself encodes JPEGs anew, with loss, for `.remove_columns()` and
            `.rename_column()` after that. `.decode(False)` before all of them avoids it.
        split (`str`): Split of `dataset_name`; a part of one, such as `train[:10%]`, only where it is not streamed.
        image_column (`str`):
            Column that holds the images. Where there is no `"image"`, the default, it is the columns of type `Image`
            (a WebDataset has one for each file extension), of which a row fills at most one, or the stream ends in
            ValueError.
        streaming (`bool`):
            Read while training. `False` first downloads everything of `dataset_name` or `data_files` into the cache
            of `datasets`.
        extra_columns (`tuple[str, ...]`): Columns to be kept beside the images; `data_dir` has none.

    Raises:
        ValueError: if not exactly one source is given, if it holds no images, has no such split or column, or if
            fsspec needs a package that is not installed.
    """

    def __init__(
        self,
        dataset_name=None,
        data_dir=None,
        data_files=None,
        split="train",
        image_column="image",
        streaming=True,
        dataset=None,
        extra_columns=(),
        config_name=None,
    ):
        given = {"dataset_name": dataset_name, "data_dir": data_dir, "data_files": data_files, "dataset": dataset}
        given = {name: value for name, value in given.items() if value is not None and value != ""}
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of dataset_name, data_dir, data_files and dataset, got {given or 'none'}"
            )
        if config_name and not dataset_name:
            raise ValueError(
                f"dataset_config_name={config_name} is of a dataset_name, and {', '.join(given)} is given"
            )
        data_files = data_files if not data_files or isinstance(data_files, str) else list(data_files)
        self.name = str(dataset_name or data_dir or data_files or "the data set")
        self.image_column, self.extra_columns, self.is_folder = image_column, tuple(extra_columns), bool(data_dir)
        self.fingerprint = None  # of its files, or its number of rows: tells it from others of that name
        self.left_out, self.left_out_line = {}, ""  # files of a local folder that are not read, by kind; a sentence
        self._builder, self._num_images, self.split = None, None, split
        self._tables_folder = None  # what relative paths in tables begin at, where the tables lie in one folder
        files = data_files if isinstance(data_files, list) else [str(data_files)]
        self.is_remote = dataset is not None or any("://" in file for file in files)
        if data_dir:
            self.dataset = self._list_folder(Path(data_dir))
        elif dataset is not None:
            self.dataset = self._undecoded(dataset)
        else:
            self.dataset = self._build(dataset_name, config_name, data_files, streaming)

    def _list_folder(self, folder: Path) -> datasets.IterableDataset:
        if not folder.is_dir():
            raise ValueError(f"data_dir={folder} is not a folder")
        paths, self.left_out, self.left_out_line = list_images(str(folder))
        for path in paths:
            try:
                path.encode()
            except UnicodeEncodeError as error:
                message = f"data_dir={folder} holds {path!r}, a name that is not UTF-8 text; rename the file"
                raise ValueError(message) from error
        if not paths:
            raise ValueError(
                f"data_dir={folder} holds no images; for parquet or tar files use "
                f"--data_files '{folder}/*.parquet' or --dataset_name {folder}"
                + (f". {self.left_out_line}" if self.left_out else "")
            )
        # Files of a class lie together; a shuffled list mixes them beyond the reach of a block.
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
        self.fingerprint = fingerprint(paths, str(folder))
        features = datasets.Features({self.image_column: datasets.Image(decode=False)})
        return self._undecoded(datasets.Dataset.from_dict({self.image_column: paths}, features=features))

    def _build(self, dataset_name, config_name, data_files, streaming) -> datasets.IterableDataset:
        folder = None  # a local one, of which the names make the splits
        if data_files:
            first = data_files if isinstance(data_files, str) else data_files[0]
            suffix = suffix_of(first)
            if suffix not in FORMATS:
                raise ValueError(f"data_files={data_files} ends in {suffix!r}; known are {', '.join(FORMATS)}")
            files = [data_files] if isinstance(data_files, str) else data_files
            refuse_braces(files)
            arguments = {"path": FORMATS[suffix], "data_files": list(map(literal_pattern, files))}
            if str(first).startswith(("http://", "https://")):
                import aiohttp  # slow, and only this needs it

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
                options = {"client_kwargs": {"timeout": timeout}}
                arguments["storage_options"] = {"http": options, "https": options}
            self.split = "train"
        else:
            arguments, folder = load_arguments(dataset_name, config_name), Path(resolve_name(dataset_name))
            self.is_remote = not folder.exists()
        local = []
        try:
            self._builder = datasets.load_dataset_builder(**arguments)
            local = local_files(self._builder)
            folders = {os.path.dirname(os.path.abspath(path)) for path in local}
            self._tables_folder = folders.pop() if len(folders) == 1 else None
            for path in local:
                refuse_cut_off_file(path)
            self.fingerprint = fingerprint(self._files(), str(folder or "")) if self._files() else None
            if folder and folder.is_dir():
                if isinstance(self._builder, FolderBasedBuilder):
                    refuse_misread_folders(folder)
                self.left_out, self.left_out_line = left_out_of_split(
                    str(folder), self.split, self._builder.config.data_files or {}
                )
            if not streaming:
                return self._undecoded(load(arguments, self.split, self.name))
            if isinstance(self._builder, WebDataset):
                for files in self._builder.config.data_files.values():
                    files[:] = [file for file in files if not is_empty_tar(file)]  # the first one tells the columns
                if not self._files():
                    raise ValueError(f"{self.name} has no rows")
                self._builder.__class__ = PartlyDecoded
                self._builder.used = (self.image_column, *self.extra_columns)
            dataset = self._undecoded(self._builder.as_streaming_dataset(split=self.split))
            if not self.is_remote and not self.num_images() and next(iter(dataset), None) is None:
                raise ValueError(f"{self.name} has no rows")
            return dataset
        except FileNotFoundError as error:  # no such files, an empty folder, or no such set on the Hub
            raise ValueError(f"{'data_files' if data_files else 'dataset_name'}={self.name}: {error}") from error
        except StopIteration as error:  # of datasets, which looks into jsonl files for the columns
            raise ValueError(f"{self.name} has no rows") from error
        except OSError as error:
            refuse_unwritable_cache(error)
            raise
        except pyarrow.ArrowException as error:
            for path in local:
                refuse_damaged_file(path)
            raise ValueError(f"{self.name} cannot be read: {error}") from error
        except ValueError as error:
            if not str(error).startswith(("Bad split", "Unknown split")):
                raise
            advice = " A part of one, or several, needs --streaming false." if streaming else ""
            if self.left_out:
                advice += f" {self.left_out_line}"
            raise ValueError(f"dataset_split={self.split}: {str(error).rstrip('.')}.{advice}") from error
        except ImportError as error:  # fsspec names the package
            raise ValueError(f"{self.name} needs a package that is not installed: {error}") from error

    def _undecoded(self, dataset) -> datasets.IterableDataset:
        """The images, still encoded: a picture that datasets failed to decode would end the stream."""
        if isinstance(dataset, datasets.Dataset):
            self._num_images = len(dataset)
            self.fingerprint = self.fingerprint or hash_of([len(dataset)])
            if not len(dataset):
                raise ValueError(f"{self.name} has no rows")
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), 64))
        if not isinstance(dataset, datasets.IterableDataset):
            raise ValueError(f"dataset is a {type(dataset).__name__}; give one split, a Dataset or IterableDataset")
        if any(name.startswith("BufferShuffled") for name, _ in steps(dataset)):
            raise ValueError(
                "dataset has a shuffle buffer, whose images are lost when reading goes on after a fault or a resume; "
                "leave out .shuffle(), the images are shuffled here"
            )
        self.features, names = dataset.features or {}, list(dataset.features or next(iter(dataset), ()))
        if not names:
            raise ValueError(f"{self.name} has no rows")
        columns = [name for name in names if name == self.image_column]
        if not columns and self.image_column == "image":
            columns = [name for name, kind in (dataset.features or {}).items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise ValueError(f"{self.name} has no column {self.image_column!r}; set image_column to one of {names}")
        for name in columns if dataset.features else ():
            refuse_other_than_images(self.name, name, dataset.features)
        for name in self.extra_columns:
            if name not in names:
                raise ValueError(f"extra_columns: {self.name} has no column {name!r}, only {names}")
        self.image_columns = columns
        # datasets deals the number of rows to skip or take to the shards: other rows for any number of readers
        counted = [is_part for name, is_part in steps(dataset) if name.startswith(("SkipExamples", "TakeExamples"))]
        if any(counted):
            raise ValueError(
                "dataset joins parts that were made by .skip() or .take(), which then begin and end elsewhere; use "
                "one part, or make them from a Dataset by .select()"
            )
        self.num_shards = 1 if counted else dataset.num_shards
        dataset = dataset.select_columns(list(dict.fromkeys((*columns, *self.extra_columns))))
        for name in columns if dataset.features else ():  # .map() may leave them unknown
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        return dataset

    def shard(self, index: int) -> datasets.IterableDataset:
        """One of the `num_shards` parts of `dataset`."""
        return self.dataset if self.num_shards == 1 else self.dataset.shard(self.num_shards, index)

    def num_images(self) -> int | None:
        """How many images an epoch has, without reading them: None where only reading would tell."""
        if self._num_images is not None or self._builder is None:
            return self._num_images
        self._num_images = self._count()
        return self._num_images

    def _count(self) -> int | None:
        splits = self._builder.info.splits
        if splits and self.split in splits and splits[self.split].num_examples:
            return splits[self.split].num_examples
        files = self._files()
        if not files or any(suffix_of(file) != ".parquet" for file in files):
            return None
        count = 0
        for path in files:
            with fsspec.open(path) as file:
                count += pyarrow.parquet.read_metadata(file).num_rows
        return count

    def _files(self) -> list[str]:
        files = self._builder.config.data_files or {}
        return [str(file) for name in split_names(self.split) for file in files.get(name, [])]

    def blocks(self, rows: datasets.IterableDataset, rows_state: dict | None = None, block_size: int = 1024):
        """
        The rows of `dataset` or of a part of it: blocks of at most `block_size`, each a dict of columns, with the
        state that `rows` is in after it, from which to read on. A connection that fails is opened anew where the block
        began.

        Raises:
            OSError: when a shard cannot be read; for a remote one, after several attempts.
        """
        num_failures = 0
        while True:
            if rows_state is not None:
                rows.load_state_dict(rows_state)
            try:
                # iter(batch_size) is also the one way of reading that does not split among the workers a second time.
                for block in rows.iter(batch_size=block_size):
                    rows_state, num_failures = rows.state_dict(), 0
                    yield block, rows_state
                return
            except GeneratorExit:  # at the end of Python, when the names in the next line may be gone
                raise
            except (*connection_errors(), tarfile.TarError, pyarrow.ArrowException) as error:
                self._wait_or_give_up(error, num_failures, self.is_remote)
                num_failures += 1

    def images(self, block: dict) -> list[dict | None]:
        """For each row of a block `{"bytes": ..., "path": ...}`, either of which may be `None`, or `None`."""
        images = []
        for row in zip(*(block[name] for name in self.image_columns), strict=True):
            filled = [image for image in row if image is not None]
            if len(filled) > 1:
                raise ValueError(
                    f"{self.name} has rows with several images; set image_column to one of {self.image_columns}"
                )
            images.append(encoded(filled[0]) if filled else None)
        return images

    def fetch(self, image: dict | None) -> bytes:
        """What `read_bytes` says; a connection that fails is tried again, until it is an `OSError`."""
        for num_failures in itertools.count():
            try:
                return read_bytes(located(image, self._tables_folder))
            except connection_errors() as error:
                self._wait_or_give_up(error, num_failures, is_remote=True)

    def _wait_or_give_up(self, error: Exception, num_failures: int, is_remote: bool):
        if not is_remote or is_gone(error) or num_failures == len(RETRY_SECONDS):
            raise OSError(
                f"{self.name} cannot be read: {type(error).__name__}: {error}; no image was passed over. "
                "Mend the file or remove it from the source, then start again"
            ) from error
        logger.warning("%s: %r; trying again in %g s", self.name, error, RETRY_SECONDS[num_failures])
        time.sleep(RETRY_SECONDS[num_failures])


class ViewStream(torch.utils.data.IterableDataset):
    """
    One process's share of a source as an endless stream of `{"views": uint8 (2, C, H, W), "bad": [reason], "image":
    name}`, to be given to `view_loader` (never to `accelerator.prepare`, which would split it once more).

    An image that cannot be used is passed over. Each reader reports it once, however often the epochs bring it back:
    the reason in `bad` of the next sample, and at once a line in the ledger, JSON with source, path, SHA-256 of the
    bytes, reason and detail.

    Args:
        source (`ImageSource`): Where the images come from.
        make_views (callable): `(encoded bytes, epoch) -> (2, C, H, W)` uint8; raises `BadImage`.
        seed (`int`): Of the order.
        process_index, num_processes (`int`): This process among those that share the source.
        block_size (`int`): Encoded images that a reader holds and shuffles at a time.
        max_bad_fraction (`float`): Share of bad images above which a reader gives up.
        ledger (`Path`, *optional*): The file that all readers append bad images to.

    Raises:
        ValueError: while iterating, when more than `max_bad_fraction` of a reader's images are bad, once it has seen
            1,000 or come to the end of its own; or when none of them is good.
        OSError: while iterating, when a shard cannot be read; for a remote one, several attempts were in vain.
    """

    def __init__(
        self,
        source,
        make_views,
        seed=0,
        process_index=0,
        num_processes=1,
        block_size=1024,
        max_bad_fraction=0.01,
        ledger=None,
    ):
        self.source, self.make_views, self.seed = source, make_views, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.block_size, self.max_bad_fraction, self.ledger = block_size, max_bad_fraction, ledger
        self.order = (seed, block_size, source.fingerprint)  # what the order of the images depends on
        self.begin(epoch=0)

    def begin(self, epoch: int, num_rows: int = 0):
        """The next iteration starts in this epoch, each reader `num_rows` of its own rows into it."""
        self._state = {
            "epoch": epoch,
            "rows": None,  # where the source stood when the block was read
            "block": 0,
            "offset": 0,  # in the block
            "num_rows": 0,  # of this epoch, before the block
            "pass_length": None,  # rows of the last epoch that was finished
            "skip": num_rows,
            "order": self.order,
            "num_seen": 0,
            "num_bad": 0,
        }
        self._resumed = True

    def state_dict(self) -> dict:
        """Where this reader is: after the sample that it gave last."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict):
        self._state = copy.deepcopy(state)
        self._resumed = True

    def __iter__(self):
        if not self._resumed:  # a second iteration of the same object starts anew
            self.begin(epoch=0)
        self._resumed = False
        worker = torch.utils.data.get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        return self._read(self.process_index * num_workers + worker_id, self.num_processes * num_workers)

    def _read(self, reader: int, num_readers: int):
        dataset, state = self.source.dataset, self._state
        strategy = "shards" if self.source.num_shards >= num_readers else "examples"
        if strategy == "examples" and reader == 0:
            logger.warning(
                "%s has %d shards for %d readers: every reader reads everything and keeps its rows of it",
                self.source.name, self.source.num_shards, num_readers,
            )  # fmt: skip
        bad, line, num_empty = [], "", 0
        reported = {hash(known) for known in ledger_lines(self.ledger)}  # before this run was resumed
        while True:
            epoch = state["epoch"]
            rows = split_dataset_by_node(dataset, rank=reader, world_size=num_readers, strategy=strategy)
            # Shuffles the shards, then deals them, with this very number as the seed, alike on all readers. It must be
            # said to the split set, which starts at epoch 0 (file order) whatever its parent was told.
            rows.set_epoch(1 + self.seed + 1_000_003 * epoch)
            for block, rows_after in self.source.blocks(rows, state["rows"], self.block_size):
                images = self.source.images(block)
                order = np.random.default_rng((self.seed, epoch, reader, state["block"])).permutation(len(images))
                skipped = min(state["skip"], len(images))
                state["skip"] -= skipped
                for offset in range(max(skipped, state["offset"]), len(images)):
                    image = images[order[offset]]
                    state["offset"] = offset + 1
                    state["num_seen"] += 1
                    try:
                        views = self.make_views(self.source.fetch(image), epoch)
                    except BadImage as error:
                        state["num_bad"] += 1
                        place = {}
                        if not image or not (image["path"] or image["bytes"]):  # nothing else tells it from others
                            place["row"] = f"reader {reader}, {state['num_seen']}" if epoch == 0 else "met before"
                        line = ledger_line(self.source.name, image, error, **place)
                        if hash(line) not in reported:
                            reported.add(hash(line))
                            bad.append(error.reason)
                            append_line(self.ledger, line)
                        if state["num_seen"] >= 1000:
                            self._refuse_bad(line, reader, num_readers)
                        continue
                    yield {"views": torch.as_tensor(views), "bad": bad, "image": image_name(image)}
                    bad = []
                state["num_rows"] += len(images)
                state |= {"rows": rows_after, "block": state["block"] + 1, "offset": 0}
            num_empty = 0 if state["num_rows"] else num_empty + 1
            if num_empty == MAX_EMPTY_EPOCHS:  # or it would spin for ever
                raise ValueError(
                    f"{self.source.name} has no rows for reader {reader} of {num_readers}; start fewer processes, or "
                    "lower dataloader_num_workers"
                )
            if state["num_seen"] and (epoch == 0 or state["num_bad"] == state["num_seen"]):
                self._refuse_bad(line, reader, num_readers)
            state |= {"epoch": epoch + 1, "rows": None, "block": 0, "offset": 0, "skip": 0}
            state |= {"pass_length": state["num_rows"], "num_rows": 0}

    def _refuse_bad(self, last: str, reader: int, num_readers: int):
        num_bad, num_seen = self._state["num_bad"], self._state["num_seen"]
        if num_bad == num_seen:
            raise ValueError(
                f"{self.source.name} has no usable image among the {num_seen} rows of reader {reader} of {num_readers}"
                f"; use fewer readers, or check that the files are images. The last bad one: {last}"
            )
        refuse_bad(self.source.name, num_bad, num_seen, self.max_bad_fraction, last, self.ledger)


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
        raise ValueError(
            f"a {type(image).__name__} is no image; .map() to pictures, arrays, paths or bytes"
        ) from error


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
            with open_file(path) if is_remote else open(path, "rb") as file:
                encoded = file.read()
        except Exception as error:  # anything from a broken archive to a protocol that there is not
            if is_remote and isinstance(error, connection_errors()) and not is_gone(error):
                open_archive.cache_clear()  # the next attempt opens the archive anew
                raise
            raise BadImage("missing", f"{type(error).__name__}: {error}") from error
    if not encoded:
        raise BadImage("empty", "the file has 0 bytes")
    return encoded


def open_file(path: str):
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
    if isinstance(error, UnidentifiedImageError):  # met by datasets, while it decoded a picture for a .filter()
        return True
    reason = error.__cause__ or error
    status = getattr(reason, "status", None)
    if status is not None:
        return status in (401, 403, 404, 410)
    return isinstance(reason, FileNotFoundError | PermissionError | IsADirectoryError)


def steps(dataset: datasets.IterableDataset):
    """What this data set was made by, each as the name of datasets' class for it and whether it made a part of it."""
    waiting = [(dataset._ex_iterable, False)]
    while waiting:
        step, is_part = waiting.pop()
        yield type(step).__name__, is_part
        waiting += [(step.ex_iterable, is_part)] if hasattr(step, "ex_iterable") else []
        waiting += [(part, True) for part in getattr(step, "ex_iterables", [])]  # joined or interleaved


def ledger_line(source_name: str, image: dict | None, error: BadImage, **place) -> str:
    """What the ledger says of a bad image; `place` where it was met, to tell it from others."""
    image = image or {"bytes": None, "path": None}
    record = {"source": source_name, "path": image["path"]}
    record["sha256"] = hashlib.sha256(image["bytes"]).hexdigest() if image["bytes"] else None
    return json.dumps({**record, **place, "reason": error.reason, "detail": str(error)})


def append_line(ledger: Path | None, line: str):
    if ledger is not None:
        Path(ledger).parent.mkdir(parents=True, exist_ok=True)  # on another machine perhaps not yet there
        with open(ledger, "a") as file:  # in one write, so that the readers' lines do not mix
            file.write(line + "\n")


def refuse_bad(source_name, num_bad: int, num_seen: int, max_bad_fraction: float, last: str, ledger: Path | None):
    """`ValueError` where the share of bad images is above the limit; `last` is the ledger's line of one of them."""
    if num_bad > max_bad_fraction * num_seen:
        raise ValueError(
            f"{num_bad} of {num_seen} images of {source_name} are bad, more than max_bad_fraction={max_bad_fraction}; "
            f"mend them ({ledger or 'the ledger'} lists them), or raise --max_bad_fraction. The last: {last}"
        )


def ledger_lines(ledger: Path | None) -> list[str]:
    """The lines of a ledger, each once: two readers may have met the same image in different epochs."""
    if ledger is None or not Path(ledger).exists():
        return []
    return list(dict.fromkeys(Path(ledger).read_text().splitlines()))


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


def mean_and_std(stream: ViewStream, num_images: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the views, in [0, 1], over the first images of a stream."""
    count, total, squares = 0, 0.0, 0.0
    for sample in itertools.islice(stream, num_images):
        if count and stream.state_dict()["epoch"] > 0:
            break
        pixels = sample["views"].double().div(255).transpose(0, 1).flatten(1)  # (C, pixels of both views)
        count, total, squares = count + pixels.shape[1], total + pixels.sum(1), squares + pixels.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < 1e-3:
        raise ValueError(
            f"the standard deviations are {std.tolist()}: channel {int(std.argmin())} is the same everywhere, and the "
            "normalisation would divide by 0; give image_mean and image_std, with 1 for that channel"
        )
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())
