"""The rows of a folder: those of the plain way of listing it, in the same order, with and without their cache."""

import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
from testing_utils import encoded_image, identity

from modeling_can import progress
from modeling_can.data import ImageSource, ViewStream, listing, resume, view_loader
from modeling_can.data.folders import hash_of, image_extensions


def plain_listing(folder: str) -> tuple[list[str], str]:
    """The order of the images of a folder and its fingerprint, in Python lists."""
    seen, paths = set(), []
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in files if not name.startswith(".")]
    paths = sorted(path for path in paths if os.path.splitext(path)[1].lower() in image_extensions())
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]
    names = [
        [os.path.relpath(path, folder), os.stat(path).st_size if os.path.exists(path) else None] for path in paths
    ]
    return paths, hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def plain_source(folder: str) -> ImageSource:
    """An `ImageSource` whose rows are a list in memory."""
    source = ImageSource(data_dir=folder)
    paths, source.fingerprint = plain_listing(folder)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    source.dataset = source._undecoded(datasets.Dataset.from_dict({"image": paths}, features=features))
    return source


def paths_of(source: ImageSource) -> list[str]:
    return [image["path"] for block, _ in source.blocks(source.dataset) for image in source.images(block)]


def cached_files() -> list[Path]:
    return sorted((Path(datasets.config.HF_DATASETS_CACHE) / "modeling_can").glob("*"))


@pytest.fixture()
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, which keeps lists of any length."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(listing, "_CACHED_FROM", 1)
    return tmp_path / "cache"


@pytest.fixture()
def images(tmp_path) -> Path:
    """A folder of 90 images in three class folders."""
    folder = tmp_path / "images"
    for number in range(90):
        path = folder / f"class {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(color=(number, 9, 200), format="PNG"))
    return folder


@pytest.fixture()
def odd(tmp_path) -> Path:
    """Hidden files, links, upper-case extensions, names that sort around a slash or beyond 16 bits, empty folders."""
    folder = tmp_path / "odd"
    names = ["a/1.jpg", "a-b/1.jpg", "a.b/1.jpg", "a!/1.jpg", "a0.jpg", "a/b/1.JPEG", "a/b.PnG", "1.jpg", "10.jpg",
             "Z.TGA", "\U0001f600.jpg", "\uffee.jpg", "é/ü.webp", "x/.hidden.jpg", ".trash/1.jpg", "no extension",
             "notes.txt", "x/1.2.840", "dots...jpg", "x/figures/1.png", "two\nlines.jpg", "[x]/*.jpg",
             "a.jpg/inside.png"]  # fmt: skip
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * number)
    (folder / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "far.jpg").write_bytes(b"far")
    links = {"loop": folder, "out": tmp_path / "outside", "out again": tmp_path / "outside", "x/up": folder / "a",
             "gone.jpg": tmp_path / "no", "link.jpg": folder / "1.jpg", "gone": tmp_path / "neither"}  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.close(os.open(os.fsencode(folder) + b"/text \xff.txt", os.O_CREAT))  # no UTF-8, and no image
    return folder


# --- The order -------------------------------------------------------------------------------------------------------


def test_an_odd_tree_is_listed_as_in_the_plain_way(odd, cache):
    expected, fingerprint = plain_listing(str(odd))
    assert len(expected) == 21
    for _ in range(2):  # without its cache, and with it
        source = ImageSource(data_dir=odd)
        assert paths_of(source) == expected and source.fingerprint == fingerprint
        assert source.left_out == {"hidden": 2, "without extension": 3, ".txt": 2}


def test_an_image_that_is_not_named_in_utf8_is_refused(odd):
    os.close(os.open(os.fsencode(odd) + b"/image \xff.jpg", os.O_CREAT))
    with pytest.raises(ValueError, match=r"data_dir=.*image \\udcff\.jpg', a name that is not UTF-8 text; rename"):
        ImageSource(data_dir=odd)


@pytest.mark.parametrize("number", [0, 1, 4095, 4096, 4097, 9000])
def test_the_hash_of_a_list_is_that_of_its_json(number):
    values = [[f"é {i}", i if i % 3 else None] for i in range(number)]
    assert hash_of(iter(values)) == hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@pytest.mark.parametrize("num_workers", [1, 3, 70])  # by shards, and by rows
def test_blocks_and_their_states_are_those_of_rows_in_memory(images, cache, monkeypatch, num_workers):
    monkeypatch.setattr(listing, "_CHUNK", 4)

    def states(source: ImageSource) -> list:
        found = []
        for worker in (0, num_workers - 1):
            stream = ViewStream(source, identity, 3, worker, num_workers, block_size=4)
            for sample in itertools.islice(stream, 100 // num_workers + 2):  # beyond an epoch
                found.append((sample["image"], stream.state_dict()))
        return found

    expected = states(plain_source(str(images)))
    shutil.rmtree(cache)
    assert states(ImageSource(data_dir=images)) == states(ImageSource(data_dir=images)) == expected


def test_more_paths_than_one_array_holds_are_several(images, cache, monkeypatch):
    monkeypatch.setattr(listing, "_MOST_BYTES", 1000)
    for _ in range(2):
        source = ImageSource(data_dir=images)
        assert paths_of(source) == plain_listing(str(images))[0]


def test_another_column_holds_the_same_rows(images, cache):
    named = ImageSource(data_dir=images, image_column="photo")
    assert named.image_columns == ["photo"] and paths_of(named) == plain_listing(str(images))[0]


# --- The cache -------------------------------------------------------------------------------------------------------


def change(images: Path, how: str):
    file = images / "class 1" / "1.png"
    if how == "added":
        shutil.copy(file, images / "class 1" / "new.png")
    elif how == "removed":
        file.unlink()
    elif how == "renamed":
        file.rename(file.with_name("other.png"))
    elif how == "replaced in place":
        file.write_bytes(file.read_bytes() + b"\0")
    elif how == "linked":
        (images / "more").symlink_to(images / "class 1" / "..", target_is_directory=True)
        (images / "more.png").symlink_to(file)


def test_a_list_is_kept_and_read_again(images, cache, monkeypatch):
    first = ImageSource(data_dir=images)
    (kept,) = cached_files()
    monkeypatch.setattr(listing, "_shuffled", None)  # is not called again
    again = ImageSource(data_dir=images)
    assert paths_of(again) == paths_of(first) and again.fingerprint == first.fingerprint
    assert cached_files() == [kept]


@pytest.mark.parametrize("how", ["added", "removed", "renamed", "replaced in place", "linked"])
def test_a_changed_folder_is_noticed_even_with_its_times_set_back(images, cache, how):
    before, places = ImageSource(data_dir=images), [images, *images.iterdir()]
    times = [place.stat().st_mtime_ns for place in places]
    change(images, how)
    for place, time in zip(places, times, strict=True):
        os.utime(place, ns=(time, time))
    after = ImageSource(data_dir=images)
    assert (paths_of(after), after.fingerprint) == plain_listing(str(images))
    assert after.fingerprint != before.fingerprint
    loader = view_loader(ViewStream(before, identity), 3)
    next(iter(loader))
    assert not resume(view_loader(ViewStream(after, identity), 3), [loader.state_dict()])


def test_small_folders_are_not_kept(images, cache, monkeypatch):
    monkeypatch.setattr(listing, "_CACHED_FROM", 91)
    ImageSource(data_dir=images)
    assert not cached_files()


def test_a_damaged_list_is_made_anew(images, cache):
    expected, fingerprint = plain_listing(str(images))
    ImageSource(data_dir=images)
    (kept,) = cached_files()
    whole = kept.read_bytes()
    damaged = [whole[:length] for length in (0, 1, 3, 4, 5, 100, len(whole) // 2, len(whole) - 5, len(whole) - 1)]
    for place in np.linspace(0, len(whole) - 1, 12).astype(int):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    damaged.append(whole + b"\0")
    for content in damaged:
        kept.write_bytes(content)
        source = ImageSource(data_dir=images)
        assert paths_of(source) == expected and source.fingerprint == fingerprint
        assert kept.read_bytes() == whole


@pytest.mark.parametrize("obstacle", ["a file in its place", "a full disk"])
def test_a_cache_that_cannot_be_written_is_no_error(images, cache, monkeypatch, obstacle):
    if obstacle == "a file in its place":
        cache.write_text("")
    else:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert paths_of(ImageSource(data_dir=images)) == plain_listing(str(images))[0]
    assert not cache.is_dir() or not cached_files()


def list_at(barrier, folder: str, answers):
    barrier.wait()
    source = ImageSource(data_dir=folder)
    answers.put((source.fingerprint, paths_of(source)))


def test_processes_that_list_at_once_agree(images, cache):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [context.Process(target=list_at, args=(barrier, str(images), answers)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected, fingerprint = plain_listing(str(images))
    assert found == 3 * [(fingerprint, expected)]
    assert [file.suffix for file in cached_files()] == [".arrow"]


@pytest.mark.parametrize("then", ["kept", "deleted", "not to be written"])
def test_resume_is_exact_whatever_became_of_the_cache(images, cache, then):
    def loader(source):
        return view_loader(ViewStream(source, identity, block_size=8), 4)

    uninterrupted = loader(plain_source(str(images)))  # as of a run before there was a cache
    batches = iter(uninterrupted)
    for _ in range(11):
        next(batches)
    state = uninterrupted.state_dict()
    expected = [batch["views"].flatten().tolist() for batch in itertools.islice(batches, 30)]
    assert cached_files()
    if then != "kept":
        shutil.rmtree(cache)
    if then == "not to be written":
        cache.write_text("")
    resumed = loader(ImageSource(data_dir=images))
    assert resume(resumed, [state])
    assert [batch["views"].flatten().tolist() for batch in itertools.islice(resumed, 30)] == expected


def test_a_run_goes_on_though_its_list_was_deleted(images, cache):
    source = ImageSource(data_dir=images)
    shutil.rmtree(cache)
    assert paths_of(source) == plain_listing(str(images))[0]


# --- Memory and waiting ----------------------------------------------------------------------------------------------


@pytest.fixture()
def many(cache, monkeypatch) -> list[int]:
    """Makes any folder look as if it held so many images; to be set."""
    number = [0]
    monkeypatch.setattr(listing, "image_paths", lambda *_: (f"/folder/{i:0100}.jpg" for i in range(number[0])))
    monkeypatch.setattr(listing, "size_of", len)
    return number


def test_no_list_of_python_objects_is_held(many):
    peaks = {}
    for many[0] in (40_000, 80_000):
        tracemalloc.start()
        found = listing.list_folder("/folder")
        peaks[many[0]] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found.rows) == many[0]
    assert peaks[80_000] - peaks[40_000] < 40_000 * 60  # bytes: numbers; a string takes 160


def test_a_worker_that_is_spawned_is_told_where_the_list_is(images, many):
    sizes = []
    for many[0] in (100, 10_000):
        rows = listing.list_folder("/folder").rows
        sizes.append(len(pickle.dumps(rows)))
        assert pickle.loads(pickle.dumps(rows))[:] == rows[:]
    assert sizes[1] < sizes[0] + 1000


@pytest.mark.parametrize("rank", ["0", "1"])
def test_listing_says_how_far_it_is(images, monkeypatch, capsys, rank):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    monkeypatch.setenv("RANK", rank)
    ImageSource(data_dir=images)
    assert ("listing: 90 images, " in capsys.readouterr().err) == (rank == "0")


def test_sizes_that_come_slowly_are_asked_for_side_by_side(images, monkeypatch):
    """After the first one, eight are answered when all of them have been asked for."""
    numbers, barrier = itertools.count(), threading.Barrier(8)
    monkeypatch.setattr(listing, "_CHUNK", 1)
    monkeypatch.setattr(listing, "_SLOW", 0)
    monkeypatch.setattr(listing, "size_of", lambda path: barrier.wait(timeout=30) if 0 < next(numbers) < 9 else 1)
    assert len(listing.list_folder(str(images)).rows) == 90


@pytest.mark.parametrize("slow", [0, 1])
def test_threads_change_nothing(odd, monkeypatch, slow):
    monkeypatch.setattr(listing, "_CHUNK", 2)
    monkeypatch.setattr(listing, "_SLOW", slow)
    source = ImageSource(data_dir=odd)
    assert (paths_of(source), source.fingerprint) == plain_listing(str(odd))
