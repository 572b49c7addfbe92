"""Sources of images."""

import itertools
import logging
import os
import tarfile
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..files import literal_pattern, refuse_missing_files, refuse_missing_folder
from .arrays import ARRAY_EXTENSION, arrays_of, dtype_of, encode_array
from .faults import (
    builder_of,
    configurations_in,
    is_empty_tar,
    load,
    local_files,
    refuse_cut_off_file,
    refuse_damaged_file,
    refuse_other_than_images,
    refuse_unwritable_cache,
    refused_arrays,
)
from .folders import (
    fingerprint,
    hash_of,
    left_out_of_split,
    load_arguments,
    refuse_braces,
    refuse_misread_folders,
    resolve_name,
    say_that_listing_is_slow,
    split_names,
    suffix_of,
)
from .listing import COLUMN, list_folder
from .reading import connection_errors, encoded, is_gone, located, read_bytes
from .tars import PartlyDecoded


__all__ = ["RETRY_SECONDS", "STALL_SECONDS", "ImageSource"]


logger = logging.getLogger(__name__)

_FORMATS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".jsonl": "json"}
RETRY_SECONDS = (1, 5, 20, 60, 120)  # waits before a connection is tried again
STALL_SECONDS = 60  # of silence, after which a connection counts as failed


def _retry_here_alone():
    """
    datasets reads a broken connection up to 20 times more, 5 s apart, which a tar stream never survives. Instead, the
    workers here open it anew from where the block began.
    """
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
            As it is. Of a stream with `.map()` or `.filter()` the images come decoded, and are encoded anew here; a
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
        arrays (`bool`):
            Images are read as arrays: `data_dir` takes NumPy files too, and the column may be one of arrays or of
            nested lists (`Array2D`, `Array3D`, `List`).
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
        arrays=False,
    ):
        _retry_here_alone()
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
        self.arrays = arrays
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
        refuse_missing_folder("data_dir", folder)
        rows, self.fingerprint, self.left_out, self.left_out_line = list_folder(str(folder), self.arrays)
        if rows is None:
            raise ValueError(
                f"data_dir={folder} holds no images; for parquet or tar files use "
                f"--data_files '{folder}/*.parquet' or --dataset_name {folder}"
                + (f". {self.left_out_line}" if self.left_out else "")
                + ("; NumPy arrays are read where pixel_range is set" if ARRAY_EXTENSION in self.left_out else "")
            )
        if self.image_column != COLUMN:
            rows = rows.rename_column(COLUMN, self.image_column)
        return self._undecoded(rows)

    def _build(self, dataset_name, config_name, data_files, streaming) -> datasets.IterableDataset:
        folder = None  # a local one, of which the names make the splits
        if data_files:
            first = data_files if isinstance(data_files, str) else data_files[0]
            suffix = suffix_of(first)
            if suffix not in _FORMATS:
                raise ValueError(
                    f"data_files={data_files} ends in {suffix!r}; known are {', '.join(_FORMATS)}. Write a list of "
                    'paths as .jsonl, with a line {"image": "PATH"} for each, and unpack archives other than .tar'
                )
            files = [data_files] if isinstance(data_files, str) else data_files
            refuse_braces(files)
            refuse_missing_files(files)
            arguments = {"path": _FORMATS[suffix], "data_files": list(map(literal_pattern, files))}
            if str(first).startswith(("http://", "https://")):
                import aiohttp  # slow, and only this needs it

                timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
                options = {"client_kwargs": {"timeout": timeout}}
                arguments["storage_options"] = {"http": options, "https": options}
            self.split = "train"
        else:
            arguments, folder = load_arguments(dataset_name, config_name), Path(resolve_name(dataset_name))
            if folder.is_file():
                advice = "unpack an archive, or name tables and tars with --data_files"
                raise ValueError(f"dataset_name={dataset_name} is a file and not a folder; {advice}")
            self.is_remote = not folder.exists()
            say_that_listing_is_slow(str(folder), f"; --data_dir '{folder}' lists all images of a folder in seconds")
        local = []
        try:
            self._builder = builder_of(arguments)
            local = local_files(self._builder)
            folders = {os.path.dirname(os.path.abspath(path)) for path in local}
            self._tables_folder = folders.pop() if len(folders) == 1 else None
            for path in local:
                refuse_cut_off_file(path)
            if isinstance(self._builder, FolderBasedBuilder):
                for files in self._builder.config.data_files.values():  # sorted: a block would be of one class
                    files[:] = [files[index] for index in np.random.default_rng(0).permutation(len(files))]
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
            if found := configurations_in(error):
                message = f"{self.name} has the configurations {found}; set dataset_config_name to one of them"
                raise ValueError(message) from error
            if not str(error).startswith(("Bad split", "Unknown split")):
                raise
            advice = " A part of one, or several, needs --streaming false." if streaming else ""
            if self.left_out:
                advice += f" {self.left_out_line}"
            raise ValueError(f"dataset_split={self.split}: {str(error).rstrip('.')}.{advice}") from error
        except ImportError as error:  # fsspec names the package
            raise ValueError(f"{self.name} needs a package that is not installed: {error}") from error

    def _undecoded(self, dataset) -> datasets.IterableDataset:
        """The images, still encoded: an image that datasets failed to decode would end the stream."""
        if isinstance(dataset, datasets.Dataset):
            self._num_images = len(dataset)
            self.fingerprint = self.fingerprint or hash_of([len(dataset)])
            if not len(dataset):
                raise ValueError(f"{self.name} has no rows")
            dataset = dataset.to_iterable_dataset(num_shards=min(len(dataset), 64))
        if not isinstance(dataset, datasets.IterableDataset):
            raise ValueError(f"dataset is a {type(dataset).__name__}; give one split, a Dataset or IterableDataset")
        if any(name.startswith("BufferShuffled") for name, _ in _steps(dataset)):
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
            refuse_other_than_images(self.name, name, dataset.features, self.arrays)
        for name in self.extra_columns:
            if name not in names:
                raise ValueError(f"extra_columns: {self.name} has no column {name!r}, only {names}")
        self.image_columns = columns
        # datasets assigns the number of rows to skip or take to the shards: other rows for any number of workers
        counted = [is_part for name, is_part in _steps(dataset) if name.startswith(("SkipExamples", "TakeExamples"))]
        if any(counted):
            raise ValueError(
                "dataset joins parts that were made by .skip() or .take(), which then begin and end elsewhere; use "
                "one part, or make them from a Dataset by .select()"
            )
        self.num_shards = 1 if counted else dataset.num_shards
        dataset = dataset.select_columns(list(dict.fromkeys((*columns, *self.extra_columns))))
        if self.arrays and any(dtype_of(self.features.get(name)) for name in columns):
            return dataset.with_format("arrow")  # lists of Python numbers would be slow, and would lose the type
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
        if isinstance(self._builder, FolderBasedBuilder):
            names = {os.path.basename(file) for file in files}
            if not names.isdisjoint(self._builder.METADATA_FILENAMES) or any(name.endswith(".zip") for name in names):
                return None  # what is in them says which images there are
            return sum(suffix_of(file).lower() in self._builder.EXTENSIONS for file in files)
        if files and not self.is_remote and all(suffix_of(file) == ".jsonl" for file in files):
            return _num_lines(files)
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
                    yield self._columns(block), rows_state
                return
            except GeneratorExit:  # at the end of Python, when the names in the next line may be gone
                raise
            except TypeError as error:  # of datasets, for lists whose shape their type does not tell
                for name in self.image_columns:
                    if not self.arrays and dtype_of(self.features.get(name)):
                        raise refused_arrays(self.name, name, self.features[name]) from error
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
            images.append(self._encoded(filled[0]) if filled else None)
        return images

    def _encoded(self, image) -> dict:
        if self.arrays and (isinstance(image, list) or hasattr(image, "__array__")):
            return {"bytes": encode_array(image), "path": None}
        return encoded(image)

    def _columns(self, block: dict | pyarrow.Table) -> dict:
        if isinstance(block, dict):
            return block
        names = {name for name in self.image_columns if dtype_of(self.features[name])}
        return {
            name: arrays_of(block[name]) if name in names else block[name].to_pylist() for name in block.column_names
        }

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
                f"{self.name} cannot be read: {type(error).__name__}: {error}; no image was skipped. "
                "Fix the file or remove it from the source, then start again"
            ) from error
        logger.warning("%s: %r; trying again in %g s", self.name, error, RETRY_SECONDS[num_failures])
        time.sleep(RETRY_SECONDS[num_failures])


def _num_lines(files: list[str]) -> int | None:
    """Of tables with a row on each line; None if one is a single list of rows, which datasets reads too."""
    count = 0
    for path in files:
        with open(path, "rb") as file:
            for line in file:
                if not count and line.lstrip().startswith(b"["):
                    return None
                count += bool(line.strip())
    return count


def _steps(dataset: datasets.IterableDataset):
    """What this data set was made by, each as the name of datasets' class for it and whether it made a part of it."""
    waiting = [(dataset._ex_iterable, False)]
    while waiting:
        step, is_part = waiting.pop()
        yield type(step).__name__, is_part
        waiting += [(step.ex_iterable, is_part)] if hasattr(step, "ex_iterable") else []
        waiting += [(part, True) for part in getattr(step, "ex_iterables", [])]  # joined or interleaved
