"""
Local files and folders: what they are called for `datasets`, which images a folder holds, and what is left out of it.
Nothing is left out in silence: it is counted by kind, and a line says so.
"""

import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from huggingface_hub import metadata_load
from PIL import Image

from ..files import literal_pattern
from ..progress import tell
from .arrays import ARRAY_EXTENSION


__all__ = [
    "SAMPLE_DATA", "counts", "fingerprint", "hash_of", "image_extensions", "image_paths", "images_below",
    "left_out_of_split", "load_arguments", "refuse_braces", "refuse_misread_folders", "resolve_name",
    "say_that_listing_is_slow", "sentence", "size_of", "split_names", "suffix_of",
]  # fmt: skip


SAMPLE_DATA = "sample_data"  # the name under which the bundled tiles are a data set
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # containers and vector graphics
_TEXT = {".csv", ".json", ".jsonl", ".md", ".parquet", ".txt", ".yaml", ".yml"}  # what describes images
_IN_NO_SPLIT, _IN_LINKS, _UNREADABLE = "in no split", "behind links to folders", "unreadable folders"
_MANY = 10_000  # images, which take datasets about ten seconds to list
_NUM_SHOWN = 8  # kinds, or folders, that a line names


# --- Names -----------------------------------------------------------------------------------------------------------


def resolve_name(name: str) -> str:
    """The name of a data set: where the folder or the bundled tiles lie, or itself."""
    path = Path(__file__).parent / SAMPLE_DATA if name == SAMPLE_DATA else Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def load_arguments(name: str, config_name: str | None = None) -> dict:
    """
    What `datasets.load_dataset` takes to load a data set by its name. It would take the path of a folder with brackets
    for a glob; of a folder in a folder it takes one.
    """
    path = Path(resolve_name(name))
    if not path.is_dir() or glob.escape(str(path)) == str(path):
        return {"path": resolve_name(name), "name": config_name}
    if config_name or _has_configs(path):
        raise ValueError(
            f"dataset_name={name} has configurations, and brackets, * or ? in its path, which datasets takes for a "
            "pattern; rename the folder"
        )
    outer = next(parent for parent in path.parents if glob.escape(str(parent)) == str(parent))
    return {"path": str(outer), "data_dir": glob.escape(str(path.relative_to(outer)))}


def _has_configs(folder: Path) -> bool:
    """Whether the README.md of a data set says which files make its splits."""
    card = folder / "README.md"
    return card.is_file() and bool((metadata_load(card) or {}).get("configs"))


def refuse_braces(files: list[str]):
    """`webdataset` expands them, `datasets` does not."""
    for file in files:
        if re.search(r"[{}]", file) and ("://" in file or not glob.glob(literal_pattern(file))):
            advice = re.sub(r"\{[^{}]*\}?|[^{}]*\}", "*", file)
            raise ValueError(f"data_files={file} has braces, which are not expanded; write *: {advice}")


def suffix_of(file: str) -> str:
    """Of a path, or of the path in a URL."""
    return Path(file.split("?")[0] if "://" in file else file).suffix


def split_names(split: str) -> list[str]:
    """`train[:10%]+test` -> `["train", "test"]`."""
    return re.sub(r"\[.*?\]", "", split).split("+")


def fingerprint(files: Iterable[str], folder: str = "", sizes: Iterable[int | None] | None = None) -> str:
    """
    Tells changed sources: of local files the names, below `folder` if they lie there, and the sizes (`size_of`, where
    they are not given); of remote ones the URLs. The same folder in another place has the same fingerprint.
    """
    start = os.path.join(folder, "") if folder else ""

    def identity(file: str, size: int | None):
        if "://" in file:
            return file.split("?")[0]  # a signature, which is another one each time
        name = file.removeprefix(start) if start and file.startswith(start) else os.path.basename(file)
        return [name, size]

    if sizes is None:
        files = list(files)
        sizes = (None if "://" in file else size_of(file) for file in files)
    return hash_of(itertools.starmap(identity, zip(files, sizes, strict=True)))


def size_of(file: str) -> int | None:
    """Bytes; None for a link that leads nowhere."""
    try:
        return os.stat(file).st_size
    except OSError:
        return None


def hash_of(values: Iterable) -> str:
    """The hash of the list of these values as JSON, which is never held as a whole."""
    values, digest, separator = iter(values), hashlib.sha256(b"["), b""
    while part := list(itertools.islice(values, 4096)):
        digest.update(separator + json.dumps(part)[1:-1].encode())
        separator = b", "
    digest.update(b"]")
    return digest.hexdigest()[:16]


# --- Images of a folder ----------------------------------------------------------------------------------------------


def image_extensions() -> set[str]:
    """Those of the images that Pillow reads, with its plugins; lower case."""
    Image.init()
    read = {*Image.OPEN, "MPO"} - _NO_IMAGES  # MPO is opened as JPEG
    return {extension for extension, kind in Image.registered_extensions().items() if kind in read}


def _walk(folder: str, left_out: Counter, unreadable: list[str]) -> Iterator[tuple[str, list[str]]]:
    """
    The files below a folder, through symbolic links too, each folder once: its path and their names. Hidden files and
    folders are left out, as `datasets` does: they hold thumbnails, earlier versions and files of macOS; their images
    are counted.
    """
    seen, extensions = set(), image_extensions()

    def num_images(files: list[str]) -> int:
        return sum(os.path.splitext(file)[1].lower() in extensions for file in files)

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=lambda e: unreadable.append(e.filename)):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        for hidden in [name for name in folders if name.startswith(".")]:
            folders.remove(hidden)
            left_out["hidden"] += sum(num_images(names) for *_, names in os.walk(os.path.join(parent, hidden)))
        left_out["hidden"] += num_images([file for file in files if file.startswith(".")])
        yield parent, [file for file in files if not file.startswith(".")]
    if unreadable:
        left_out[_UNREADABLE] = len(unreadable)


def _paths(folder: str, left_out: Counter, unreadable: list[str]) -> Iterator[str]:
    for parent, files in _walk(folder, left_out, unreadable):
        yield from (os.path.join(parent, file) for file in files)


def _kind_of(path: str) -> str:
    """`.heic`; the end of a name such as 1.2.840.17 is no extension."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix if re.fullmatch(r"\.(?=.*[a-z])\w{1,10}", suffix) else "without extension"


def _holds_figures(folder: str) -> bool:
    """Whether a folder holds the figures of a run of this project."""
    run, name = os.path.split(folder)
    marks = (f"{run}/recipe.yaml", f"{run}/results.json", f"{folder}/preflight.png")
    return name == "figures" and any(map(os.path.exists, marks))


def image_paths(folder: str, left_out: Counter, unreadable: list[str], arrays: bool = False) -> Iterator[str]:
    """
    The images below a folder, as they are found. At the end `left_out` has counted by kind what else is there, and
    `unreadable` has the folders that may not be read. The figures of runs that were written into the folder are no
    images of it. NumPy files are images where images are read as `arrays`.
    """
    extensions = image_extensions() | {ARRAY_EXTENSION} if arrays else image_extensions()
    for parent, files in _walk(folder, left_out, unreadable):
        start, images = os.path.join(parent, ""), []
        for file in files:  # perhaps a million: quicker than os.path.splitext and os.path.join
            if file[file.rfind(".") :].lower() in extensions:
                images.append(start + file)
            else:
                left_out[_kind_of(file)] += 1
        if images and parent != folder and _holds_figures(parent):
            left_out["in figures of runs"] += len(images)
        else:
            yield from images


@functools.cache
def say_that_listing_is_slow(folder: str, advice: str = ""):
    """Once, on the main process, and before: `datasets` looks for 66 patterns, each through the whole folder."""
    images = itertools.islice(image_paths(folder, Counter(), []), _MANY)
    if os.environ.get("RANK", "0") == "0" and sum(1 for _ in images) == _MANY:
        tell(f"{folder}: datasets lists files slowly, 10,000 in about 10 s{advice}")


def sentence(source: str, num_images: int, left_out: Counter, unreadable: list[str], unit: str = "images") -> str:
    """What is read of a source and what is not; empty if all of it is read."""
    parts = [f"{source}: reads {num_images:,} {unit}"]
    if counted := counts({kind: number for kind, number in left_out.items() if kind != _UNREADABLE}):
        parts.append(f"left out: {counted}")
    if unreadable:
        number = "1 folder" if len(unreadable) == 1 else f"{len(unreadable)} folders"
        parts.append(f"{number} may not be read: {', '.join(unreadable[:_NUM_SHOWN])}")
    return "; ".join(parts) if parts[1:] else ""


def counts(left_out: dict[str, int]) -> str:
    """`4 .heic, 3 hidden`, the most frequent kinds first."""
    kinds = sorted((-number, kind) for kind, number in left_out.items())
    shown = [f"{-number:,} {kind}" for number, kind in kinds[:_NUM_SHOWN]]
    rest = -sum(number for number, _ in kinds[_NUM_SHOWN:])
    return ", ".join(shown + ([f"{rest:,} of other kinds"] if rest else []))


# --- Files of a split ------------------------------------------------------------------------------------------------


def left_out_of_split(
    folder: str, split: str, data_files: dict[str, list[str]], labeled: bool = False
) -> tuple[dict[str, int], str]:
    """
    `datasets` makes splits of words such as train and test in the names of folders and files. Of a folder that it
    loads: the files that are in no split, or that are images in other splits because of their own names; and a
    sentence about that. Both are empty for a folder that is made of splits, or that says itself what they are.

    Raises:
        ValueError: if `datasets` takes the figures of a run of this project for images of the folder.
    """
    if _has_configs(Path(folder)):
        return {}, ""
    split_of = {str(file): str(name) for name, files in data_files.items() for file in files}
    for parent in {os.path.dirname(file) for file in split_of}:
        if _holds_figures(parent):
            raise ValueError(
                f"dataset_name={folder} holds the figures of a run, {parent}, which would be read as images; move the "
                "run to another place" + ("" if labeled else f", or give --data_dir '{folder}', which skips them")
            )
    left_out, unreadable, num_read, extensions = Counter(), [], 0, image_extensions()
    kinds = {os.path.splitext(file)[1].lower() for file in split_of}
    holds_images = bool(kinds & extensions)
    kinds = kinds & extensions if holds_images else kinds
    for path in _paths(folder, left_out, unreadable):
        extension, own = os.path.splitext(path)[1].lower(), split_of.get(path)
        if own in split_names(split):
            num_read += extension in kinds
        elif own is None and extension in kinds and os.path.basename(path) not in FILES_TO_IGNORE:
            left_out[_IN_LINKS if _is_behind_link(path, folder) else _IN_NO_SPLIT] += 1
        elif own and holds_images and not _in_folder_of(own, os.path.relpath(path, folder)):
            left_out[f"in split {own}"] += 1
        elif own is None and holds_images and extension not in _TEXT:
            left_out[_kind_of(path)] += 1
    del left_out["hidden"]
    left_out = +left_out
    unit = "images" if holds_images else "files"
    text = sentence(
        source=f"dataset_name={folder}, split {split}",
        num_images=num_read,
        left_out=left_out,
        unreadable=unreadable,
        unit=unit,
    )
    reasons = []
    if any(kind.startswith("in ") for kind in left_out):
        reasons.append("datasets takes words such as train and test in names for splits: rename the files or folders")
    if _IN_LINKS in left_out:
        reasons.append("datasets follows no links to folders: give the folders themselves")
    text = "; ".join([text, *reasons])
    text += (
        f", or give --data_dir '{folder}', which reads all images" if reasons and holds_images and not labeled else ""
    )
    return dict(left_out), text


def _is_behind_link(path: str, folder: str) -> bool:
    parent = os.path.dirname(path)
    plain = os.path.join(os.path.realpath(folder), os.path.relpath(parent, folder))
    return os.path.realpath(parent) != os.path.normpath(plain)


def _in_folder_of(split: str, path: str) -> bool:
    """Whether a folder in the path is called after the split, as in `test/cat/1.jpg`."""
    keywords = {str(name): words for name, words in SPLIT_KEYWORDS.items()}.get(split, [split])
    words = {word for part in path.split(os.sep)[:-1] for word in re.split(r"[-._ 0-9]", part)}
    return not words.isdisjoint(keywords)


_SPLIT_FOLDERS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}


def refuse_misread_folders(folder: Path):
    """
    `ValueError` for class folders one of which datasets takes for a split, or whose images it takes for those of two.
    Folders beside those of several splits are left out with a word (`left_out_of_split`).
    """
    if not folder.is_dir() or (folder / "README.md").exists():  # which may name the files of the splits
        return
    images = images_below(folder)
    splits = {image: sorted(_SPLIT_FOLDERS.intersection(image.parts[:-1])) for image in images}
    inside = next((image for image in images if splits[image]), None)
    outside = next((image for image in images if len(image.parts) > 1 and not splits[image]), None)
    if inside and outside and len({name for names in splits.values() for name in names}) == 1:
        raise ValueError(
            f"dataset_name={folder}: datasets takes the folder {splits[inside][0]} for a split and reads nothing of "
            f"others, such as {outside}. To train on all images whatever their folders: --data_dir {folder}. For a "
            "test with labels: train/CLASS/*.jpg and test/CLASS/*.jpg, and no class with the name of a split"
        )
    twice = next((image for image in images if len(splits[image]) > 1), None)
    if twice:
        raise ValueError(
            f"dataset_name={folder}: datasets takes {twice} for an image of the splits {' and '.join(splits[twice])}. "
            f"To train on all images whatever their folders: --data_dir {folder}. For a test with labels: rename the "
            "class that has the name of a split"
        )


def images_below(folder: Path) -> list[Path]:
    """The relative paths of the images of a folder."""
    extensions = image_extensions()
    paths = map(Path, _paths(str(folder), Counter(), []))
    return sorted(path.relative_to(folder) for path in paths if path.suffix.lower() in extensions)
