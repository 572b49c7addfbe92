"""Sources that cannot be read, each in one sentence that names the file or folder, and what fixes it."""

import contextlib
import errno
import io
import os
import re
import tarfile
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .arrays import dtype_of
from .tars import damaged


__all__ = [
    "builder_of", "configurations_in", "is_empty_tar", "load", "local_files", "refuse_cut_off_file",
    "refuse_damaged_file", "refuse_other_than_images", "refuse_unwritable_cache", "refused_arrays", "without_bars",
]  # fmt: skip


@contextlib.contextmanager
def without_bars(arguments: dict):
    """
    No bars of `datasets` for what is on this machine, which they call a download; `arguments` of `load_dataset`. Those
    of a user who sets HF_DATASETS_DISABLE_PROGRESS_BARS stay as they are.
    """
    places = arguments.get("data_files") or [arguments["path"]]
    is_local = all("://" not in place for place in places) and ("data_files" in arguments or os.path.exists(places[0]))
    is_set = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if not is_local or is_set or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def builder_of(arguments: dict) -> datasets.DatasetBuilder:
    with without_bars(arguments):
        return datasets.load_dataset_builder(**arguments)


def load(arguments: dict, split: str, name: str) -> datasets.Dataset:
    """`datasets.load_dataset`; `ValueError` that names the damaged file, or the damaged member of a tar."""
    try:
        with without_bars(arguments):
            return datasets.load_dataset(**arguments, split=split)
    except Exception as error:  # also of json's, numpy's and torch's decoders
        refuse_unwritable_cache(error)
        for path in local_files(builder_of(arguments)):
            refuse_damaged_file(path)
        # The first comes of empty jsonl files, in which datasets looks for the columns.
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise ValueError(f"{name} has no rows") from error
        if isinstance(error, DatasetGenerationError):
            refuse_unwritable_cache(error.__cause__)
            raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
        raise


def configurations_in(error: ValueError) -> str | None:
    """Those of a set, as datasets names them where none or an unknown one was asked for; None of other errors."""
    found = re.search(r"(?:available configs|Available): \[(.*?)\]", str(error), re.DOTALL)
    return found and found[1]


def local_files(builder: datasets.DatasetBuilder) -> list[str]:
    """The files of all its splits that are on this machine."""
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    return [file for file in files if "://" not in file]


def refuse_cut_off_file(path: str):
    """Python's tarfile takes a local archive that was cut off between two files for a shorter one."""
    if path.endswith((".parquet", ".arrow", ".tar")) and not os.path.getsize(path):
        raise ValueError(f"{path} has 0 bytes; copy it once more, or remove it")
    if path.endswith(".tar"):
        with open(path, "rb") as file:
            file.seek(-min(1024, Path(path).stat().st_size), io.SEEK_END)
            if file.read() != bytes(1024):
                raise ValueError(f"{path} is cut off: it lacks the 1,024 zero bytes that end a tar; copy it once more")


def is_empty_tar(path: str) -> bool:
    if "://" in path or not path.endswith(".tar"):
        return False
    with tarfile.open(path) as archive:
        return archive.next() is None


def refuse_damaged_file(path: str):
    """`ValueError` for a local parquet file, or a member of a local tar, that datasets cannot read."""
    if path.endswith(".parquet"):
        try:
            pyarrow.parquet.read_metadata(path)
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{path} cannot be read: {str(error).rstrip('.')}; copy it once more, or remove it"
            ) from error
    if path.endswith(".tar"):
        refuse_cut_off_file(path)
        if is_empty_tar(path):
            raise ValueError(f"{path} is an empty tar, which needs --streaming true; remove it")
        with tarfile.open(path) as archive:
            for member in archive:
                decode = WebDataset.DECODERS.get(member.name.split(".")[-1].lower())
                try:
                    if decode and member.isfile():
                        decode(archive.extractfile(member).read())
                except Exception as error:  # numpy's, torch's, json's: anything on damaged members
                    raise damaged(path, member.name, error) from error


def refused_arrays(source_name: str, column: str, kind) -> ValueError:
    """What to raise for a column of arrays that is to be read as RGB or gray of 8 bits."""
    return ValueError(
        f"image_column={column} of {source_name} is of type {kind}, and arrays are read as RGB only if they are of "
        "(height, width, 3 or 4) uint8; set pixel_range to the two values that become 0 and 1, such as 0,255 of "
        "uint8, or num_channels if they have other than 1 or 3"
    )


def _is_read_as_rgb(kind) -> bool:
    """Whether datasets can make images of such arrays and keep their values; lists of Python's numbers are int64."""
    keeps_values = dtype_of(kind) in ("uint8", "int64")
    if isinstance(kind, datasets.Array3D):
        return keeps_values and kind.shape[-1] in (2, 3, 4)
    return keeps_values or isinstance(kind, datasets.Array2D) or not hasattr(kind.feature.feature, "feature")


def refuse_other_than_images(source_name: str, column: str, features: datasets.Features, arrays: bool = False):
    """
    `ValueError` for a column whose type cannot be one image in each row; with `arrays`, as of `ImageSource`, it can
    be any of arrays.
    """
    kind = features[column]
    if dtype_of(kind):
        if not (arrays or _is_read_as_rgb(kind)):
            raise refused_arrays(source_name, column, kind)
        return
    item = getattr(kind, "feature", None)  # of a list
    if isinstance(kind, datasets.Value):
        fits = kind.dtype in ("string", "large_string", "binary", "large_binary", "binary_view", "string_view")
    elif isinstance(kind, dict):
        fits = "bytes" in kind or "path" in kind
    else:  # a list of lists of numbers holds pixels
        is_stack = isinstance(kind, datasets.Array4D | datasets.Array5D)
        fits = not is_stack and (item is None or hasattr(item, "feature"))
    if fits:
        return
    others = [name for name in features if isinstance(features[name], datasets.Image)]
    fix = f"set image_column to one of {others}" if others else "set image_column to another column"
    if item is not None and not isinstance(item, datasets.Value):
        fix = f"make one row of each image, or {fix}"
    raise ValueError(
        f"image_column={column} of {source_name} is of type {kind}, and not one image in each row (type Image, a "
        f"path, bytes, or a mapping with bytes or path); {fix}"
    )


def refuse_unwritable_cache(error: BaseException | None):
    """`ValueError` for an error that comes of a cache folder of Hugging Face's libraries that cannot be written."""
    caches = {
        "HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE,
        "HF_HUB_CACHE": huggingface_hub.constants.HF_HUB_CACHE,
    }
    if getattr(error, "errno", None) not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return
    for variable, folder in caches.items():
        file = str(error.filename or "")
        if file and (file.startswith(str(folder)) or str(folder).startswith(file)):
            raise ValueError(
                f"the cache folder {folder} cannot be written ({error.strerror}: {file}); set HF_HOME, or {variable} "
                "alone, to a folder that can"
            ) from error
