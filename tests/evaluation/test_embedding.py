"""Embeddings of whole sources: right, complete and never twice, whatever was killed when; and what is refused."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from faulty_server import FaultyServer
from testing_utils import ROOT, add_to_tar, encoded_image
from tqdm import tqdm

from modeling_can import progress
from modeling_can.data import ImageSource
from modeling_can.data.bad_samples import BadImage
from modeling_can.data.decoding import decode
from modeling_can.evaluation import embed as embedding
from modeling_can.evaluation import (
    part_files,
)
from modeling_can.evaluation.embed import embed, end_with


NUM_IMAGES, PER_SHARD = 90, 18
COLORS = [(i, 255 - i, i * 37 % 251) for i in range(NUM_IMAGES)]
FACTS = {"weights": "sha256:0", "image_size": (30, 40)}


def prepare(encoded: bytes) -> torch.Tensor:
    return torch.from_numpy(decode(encoded)).permute(2, 0, 1)


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """The color, divided so that float16 holds it exactly."""
    return pixels[:, :, 0, 0] / 4


def embeddings(ids: dict[str, int], labels: bool = False) -> dict[str, tuple]:
    """What `read` must give, of images by id."""
    return {name: (i % 7 if labels else None, [value / 4 for value in COLORS[i]]) for name, i in ids.items()}


def places_of(rows_per_shard: int) -> dict[str, int]:
    return {f"{i // rows_per_shard}:{i % rows_per_shard}": i for i in range(NUM_IMAGES)}


def write_parquet(path: Path, images: list[bytes], first: int = 0):
    features = {"image": ImageFeature(), "label": ClassLabel(names=list("abcdefg")), "key": Value("int64")}
    features["box"] = datasets.List(Value("int64"))
    index = range(first, first + len(images))
    rows = {"image": [{"bytes": encoded, "path": None} for encoded in images]}
    rows |= {"label": [i % 7 for i in index], "key": [i + 1000 for i in index], "box": [[i] for i in index]}
    Dataset.from_dict(rows, features=Features(features)).to_parquet(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same 90 images in five parquet shards, in one, in three tar shards, and in a folder."""
    folder = tmp_path_factory.mktemp("places")
    images = [encoded_image(color=color, format="PNG") for color in COLORS]
    for shard, first in enumerate(range(0, NUM_IMAGES, PER_SHARD)):
        write_parquet(folder / f"shard-{shard}.parquet", images[first : first + PER_SHARD], first)
    write_parquet(folder / "one.parquet", images)
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for i in range(shard * 30, shard * 30 + 30):
                add_to_tar(archive, f"{i:03}.png", images[i])
                add_to_tar(archive, f"{i:03}.cls", str(i % 7).encode())
    for i, encoded in enumerate(images):
        path = folder / "images" / str(i % 7) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return folder


def read(folder: Path) -> dict[str, tuple]:
    """`{id: (label, embedding)}`, of which none is there twice."""
    rows = [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert max(Counter(row["id"] for row in rows).values(), default=1) == 1
    return {row["id"]: (row.get("label"), row["embedding"]) for row in rows}


def load(folder: Path) -> Dataset:
    files, cache = f"{folder}/part-*.parquet", str(folder / "cache")
    return datasets.load_dataset("parquet", data_files=files, cache_dir=cache, split="train")


def logged(folder: Path) -> list[dict]:
    path = folder / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- What is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes, num_workers", [(1, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("kind", ["parquet", "one shard", "tar", "folder"])
def test_every_image_is_embedded_once_with_its_id_and_label(places, tmp_path, kind, num_processes, num_workers):
    place, label_column, id_column, ids = {
        "parquet": ({"data_files": f"{places}/shard-*.parquet"}, "label", None, places_of(PER_SHARD)),
        "one shard": ({"data_files": f"{places}/one.parquet"}, "label", None, places_of(NUM_IMAGES)),
        "tar": ({"data_files": f"{places}/*.tar"}, "cls", "__key__", {f"{i:03}": i for i in range(NUM_IMAGES)}),
        "folder": (
            {"data_dir": f"{places}/images"},
            None,
            None,
            {f"{places}/images/{i % 7}/{i}.png": i for i in range(NUM_IMAGES)},
        ),
    }[kind]
    source = ImageSource(**place, extra_columns=filter(None, (label_column, id_column)))
    options = {"batch_size": 4, "rows_per_file": 8, "id_column": id_column, "label_column": label_column}
    options |= {"num_processes": num_processes, "num_workers": num_workers}
    results = [
        embed(source, prepare, encode, tmp_path, FACTS, process_index=index, **options)
        for index in range(num_processes)
    ]
    assert read(tmp_path) == embeddings(ids, labels=label_column is not None)
    files = sorted(tmp_path.glob("part-*"))
    assert max(pq.read_metadata(path).num_rows for path in files) == (2 if kind == "folder" else 8)
    assert [result["done"] for result in results] == [False] * (num_processes - 1) + [True]
    assert results[-1]["num_images"] == sum(result["new_images"] for result in results) == NUM_IMAGES
    assert results[-1]["files"] == len(files) and results[-1]["bad"] == {} and not logged(tmp_path)
    assert min(result["new_images"] for result in results) >= NUM_IMAGES / num_processes - PER_SHARD
    if kind == "one shard":  # it is shared by as many workers as there are
        assert len({path.name.split("-")[1] for path in files}) == num_processes * max(1, num_workers)


def test_the_files_are_a_data_set(places, tmp_path):
    source = ImageSource(data_files=f"{places}/shard-*.parquet", extra_columns=("label", "key"))
    embed(source, prepare, encode, tmp_path, FACTS, id_column="key", label_column="label", dtype="float32")
    rows, label = load(tmp_path), source.dataset.features["label"]
    kinds = {"id": Value("string"), "label": label, "embedding": datasets.List(Value("float32"), length=3)}
    assert rows.features == kinds and label.names == list("abcdefg")
    assert rows["id"][:] == [str(i + 1000) for i in range(NUM_IMAGES)]
    assert rows[7]["embedding"] == [value / 4 for value in COLORS[7]]


def test_embeddings_do_not_wait_for_a_full_file_for_ever(places, tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "SAVE_SECONDS", 0)
    source = ImageSource(data_files=f"{places}/one.parquet")
    assert embed(source, prepare, encode, tmp_path, FACTS, batch_size=9)["files"] >= 10
    assert read(tmp_path) == embeddings(places_of(NUM_IMAGES))


def test_progress_is_in_images_their_rate_and_the_time_left(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    source = ImageSource(data_files=f"{places}/shard-*.parquet")
    embed_until_killed(source, tmp_path, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("embedding: 0 of 90 images") and len(lines) > 6
    embed(source, prepare, encode, tmp_path, FACTS, batch_size=6)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("embedding: 36 of 90 images") and lines[-1].startswith("embedding: 90 of 90 images")
    assert "images/s, 00:00 left" in lines[-1]
    embed(source, prepare, encode, tmp_path / "b", FACTS, process_index=1, num_processes=2)
    assert capsys.readouterr().err == ""  # the first process speaks for all


# --- Interrupted -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def embed_until_killed(source, folder: Path, num_images: int, prepare=prepare, **options):
    """Comes to an end when the encoder is given more images than that."""
    seen = 0

    def encode_some(pixels):
        nonlocal seen
        seen += len(pixels)
        if seen > num_images:
            raise Killed
        return encode(pixels)

    with pytest.raises(Killed):
        embed(source, prepare, encode_some, folder, FACTS, **{"batch_size": 6, **options})


def start(*arguments, **options) -> multiprocessing.Process:
    """`embed` in a process of its own."""

    def run():
        os.setpgrp()
        tqdm.set_lock(threading.RLock())  # its own is shared with forks, and stays locked if one is killed
        embed(*arguments, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def prepare_slowly(encoded: bytes) -> torch.Tensor:
    time.sleep(0.005)
    if encoded == b"text":
        raise BadImage("not_an_image", f"seen at {time.monotonic_ns()}")  # not the same twice
    return prepare(encoded)


@pytest.mark.parametrize("kind, rows_per_file", [("five shards", 100), ("five shards", 8), ("one shard", 8)])
def test_killed_at_any_moment_nothing_is_lost_and_nothing_twice(tmp_path, kind, rows_per_file):
    bad = {5: b"text", 21: b"text", 22: b"", 60: b"", 89: b"text"}
    images = [bad.get(i, encoded_image(color=color, format="PNG")) for i, color in enumerate(COLORS)]
    rows_per_shard = PER_SHARD if kind == "five shards" else NUM_IMAGES
    for first in range(0, NUM_IMAGES, rows_per_shard):
        write_parquet(tmp_path / f"{first:02}.parquet", images[first : first + rows_per_shard], first)
    source, folder = ImageSource(data_files=f"{tmp_path}/*.parquet", extra_columns=("label",)), tmp_path / "out"
    options = {"rows_per_file": rows_per_file, "batch_size": 4, "label_column": "label", "max_bad_fraction": 0.5}
    chance, num_kills, stages = random.Random(0), 0, set()
    for attempt in range(50):
        num_processes, num_workers = chance.choice([(1, 0), (2, 0), (3, 0), (1, 1), (2, 2)])
        options |= {"num_processes": num_processes, "num_workers": num_workers}
        num_files = len(list(folder.glob("*.parquet")))
        processes = [
            start(source, prepare_slowly, encode, folder, FACTS, process_index=index, **options)
            for index in range(num_processes)
        ]
        while attempt % 3 and len(list(folder.glob("*.parquet"))) == num_files:
            if not any(process.is_alive() for process in processes):
                break
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.04))
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        assert set(codes) <= {0, -signal.SIGKILL}
        num_kills += codes.count(-signal.SIGKILL)
        stages.add(len(read(folder)))
        if not any(codes):
            break
    else:
        pytest.fail("it comes to no end")
    assert num_kills >= 2 and len(stages) >= 3, (num_kills, stages)
    ids = places_of(rows_per_shard)
    good = {name: i for name, i in ids.items() if i not in bad}
    assert read(folder) == embeddings(good, labels=True)
    assert sorted(ids[record["row"]] for record in logged(folder)) == sorted(bad)
    result = embed(source, prepare_slowly, encode, folder, FACTS, **options | {"num_processes": 1})
    assert result["done"] and result["new_images"] == 0 and not list(folder.glob("part-*.partial"))
    assert result["num_images"] == len(good) and result["bad"] == {"not_an_image": 3, "empty": 2}


@pytest.mark.parametrize("process_index", range(3))
def test_the_share_of_a_process_is_done_by_any_others(places, tmp_path, process_index):
    source = ImageSource(data_files=f"{places}/one.parquet")
    embed(source, prepare, encode, tmp_path, FACTS, process_index=process_index, num_processes=3)
    assert len(read(tmp_path)) == 30
    for index in range(2):
        embed(source, prepare, encode, tmp_path, FACTS, process_index=index, num_processes=2, num_workers=2)
    assert read(tmp_path) == embeddings(places_of(NUM_IMAGES))


def prepare_for_ever(folder: Path, encoded: bytes):
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def is_running(process_id: str) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["the process is killed", "Ctrl-C"])
def test_no_worker_outlives_its_process(places, tmp_path, number):
    code = (  # no fork of this process, which has threads
        "import functools, sys\nfrom pathlib import Path\nfrom test_embedding import *\nplaces, place = sys.argv[1:]\n"
        "prepare = functools.partial(prepare_for_ever, Path(place))\n"
        "source = ImageSource(data_files=f'{places}/shard-*.parquet')\n"
        "embed(source, prepare, encode, f'{place}/out', FACTS, num_workers=2)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(places), str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, env=environment, start_new_session=True)
    while (
        process.poll() is None
        and len(workers := [path.name for path in tmp_path.iterdir() if path.name.isdigit()]) < 2
    ):
        time.sleep(0.01)
    assert all(map(is_running, workers))
    if number == signal.SIGKILL:
        process.kill()
    for _ in range(6 if number == signal.SIGINT else 0):  # again, as Python drops one in a destructor
        if process.poll() is None:
            os.killpg(process.pid, number)  # a terminal sends it to the group
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
    assert process.wait(30)
    deadline = time.monotonic() + 15
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_whose_process_was_killed_before_it_began_ends():
    worker = multiprocessing.get_context("fork").Process(target=lambda: (end_with(1, 0), time.sleep(60)))
    worker.start()
    worker.join(10)
    assert worker.exitcode == 1


def test_no_file_skips_a_row_that_is_not_in_the_log_yet(with_bad, monkeypatch):
    source, folder = with_bad

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "append_line", killed)
        with pytest.raises(Killed):
            embed(source, prepare, encode, folder, FACTS, max_bad_fraction=1)
    assert len(read(folder)) == 10  # the shard before
    embed(source, prepare, encode, folder, FACTS, max_bad_fraction=1)
    assert len(read(folder)) == 89 and len(logged(folder)) == 11


def test_what_a_kill_left_half_written_does_no_harm(tmp_path):
    images = [b"text", *(encoded_image(color=color, format="PNG") for color in COLORS[1:20])]
    write_parquet(tmp_path / "rows.parquet", images)
    source, folder = ImageSource(data_files=f"{tmp_path}/rows.parquet"), tmp_path / "out"
    embed_until_killed(source, folder, 6, max_bad_fraction=0.5)
    line = (folder / "bad_samples.jsonl").read_text()
    (folder / "bad_samples.jsonl").write_text(line[:-20])
    names = ["part-000000-000003.parquet.partial", "part-000007-000000.parquet.partial"]
    for name in names:
        (folder / name).write_bytes(b"PAR1")
    result = embed(source, prepare, encode, folder, FACTS, max_bad_fraction=0.5)
    assert result["num_images"] == len(read(folder)) == 19
    assert [path.name for path in folder.glob("*.partial")] == names[1:]  # that one may be another process's
    assert (folder / "bad_samples.jsonl").read_text() == line[:-20] + "\n" + line


def test_rows_that_are_done_are_not_decoded_again(places, tmp_path):
    source, prepared = ImageSource(data_files=f"{places}/one.parquet"), []

    def counting(encoded):
        prepared.append(encoded)
        return prepare(encoded)

    embed_until_killed(source, tmp_path, 50, rows_per_file=12)
    assert len(read(tmp_path)) == 36
    assert embed(source, counting, encode, tmp_path, FACTS)["new_images"] == len(prepared) == NUM_IMAGES - 36


def test_every_row_comes_once_through_a_faulty_connection(places, tmp_path, impatient):  # noqa: F811
    with FaultyServer(places) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = ImageSource(data_files=[f"{server.url}/shard-{shard}.parquet" for shard in range(5)])
        server.faults, server.gone = ["drop", "503", None, "stall", "drop"], {"shard-3.parquet"}
        source.num_images = lambda: None  # would be the first to ask for the one that is gone
        with pytest.raises(OSError, match=r"shard-3\.parquet.*no image was skipped"):
            embed(source, prepare, encode, tmp_path, FACTS, batch_size=7)
        assert len(server.befallen) == 4 and len(read(tmp_path)) == 54
        server.faults, server.gone = [None, "drop", "503"], set()
        embed(source, prepare, encode, tmp_path, FACTS, batch_size=5)
        server.shutdown()
    assert read(tmp_path) == embeddings(places_of(PER_SHARD))


# --- Bad images ------------------------------------------------------------------------------------------------------


@pytest.fixture()
def with_bad(tmp_path):
    """Ten shards of ten images, of which the second has none that is good, and the last one that is bad."""
    images = [encoded_image(color=(i, 2, 3), format="PNG") for i in range(100)]
    images[10:20], images[95] = [b"text"] * 10, images[95][:50]
    for shard in range(10):
        write_parquet(tmp_path / f"{shard}.parquet", images[shard * 10 : shard * 10 + 10], shard * 10)
    return ImageSource(data_files=f"{tmp_path}/*.parquet", extra_columns=("key",)), tmp_path / "out"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_skipped_and_in_the_log(with_bad, num_workers):
    source, folder = with_bad
    options = {"num_workers": num_workers, "id_column": "key", "max_bad_fraction": 0.2}
    result = embed(source, prepare, encode, folder, FACTS, **options)
    assert result["bad"] == {"not_an_image": 10, "damaged": 1} and result["num_images"] == 89
    assert {int(name) - 1000 for name in read(folder)} == {i for i in range(100) if not 10 <= i < 20 and i != 95}
    records = {record["row"]: record for record in logged(folder)}
    assert len(logged(folder)) == 11 and records.keys() == {"9:5", *(f"1:{i}" for i in range(10))}
    damaged = records["9:5"]
    assert damaged["reason"] == "damaged" and damaged["id"] == "1095" and damaged["detail"]
    assert damaged["path"] is None and len(damaged["sha256"]) == 64 and damaged["source"] == source.name


def test_a_unit_without_a_good_image_has_an_empty_file(with_bad, tmp_path):
    folder = with_bad[1]
    source = ImageSource(data_files=[f"{tmp_path}/1.parquet", f"{tmp_path}/0.parquet"])
    options = {"max_bad_fraction": 1, "dtype": "float32"}
    embed(source, prepare, encode, folder, FACTS, num_processes=2, **options)
    assert [pq.read_metadata(path).num_rows for path in folder.glob("*.parquet")] == [0]
    assert embed(source, prepare, encode, folder, FACTS, **options)["done"]
    rows = load(folder)
    assert rows.features == {"id": Value("string"), "embedding": datasets.List(Value("float32"), length=3)}
    assert rows["id"][:] == [f"1:{i}" for i in range(10)] and len(logged(folder)) == 10


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_stop_the_run(with_bad, num_workers):
    source, folder = with_bad
    for _ in range(2):  # the second time, nothing is left to be read
        with pytest.raises(
            ValueError, match=r"11 of 100 images .* more than max_bad_fraction=0.1; .*bad_samples.jsonl"
        ):
            embed(source, prepare, encode, folder, FACTS, max_bad_fraction=0.1, num_workers=num_workers)
        assert len(logged(folder)) == 11
    result = embed(source, prepare, encode, folder, FACTS, max_bad_fraction=0.11)
    assert result["done"] and result["new_images"] == 0 and result["num_images"] == 89


def test_too_many_bad_images_stop_the_run_after_a_thousand(tmp_path):
    write_parquet(tmp_path / "rows.parquet", [encoded_image(format="PNG"), *[b"text"] * 1500])
    source, folder = ImageSource(data_files=f"{tmp_path}/rows.parquet"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"1024 of 1025 images .* The last: .*0:1024.*no image in"):
        embed(source, prepare, encode, folder, FACTS, batch_size=128)
    assert len(logged(folder)) == 1024


def test_the_images_before_a_kill_count_in_the_share_of_bad_ones(with_bad):
    source, folder = with_bad
    embed_until_killed(source, folder, 82, batch_size=5, max_bad_fraction=0.2)
    assert len(read(folder)) == 80  # of the ten rows that are left, one is bad
    with pytest.raises(ValueError, match="11 of 100 images"):
        embed(source, prepare, encode, folder, FACTS, max_bad_fraction=0.1)


def test_a_row_that_the_log_has_stays_bad(places, tmp_path):
    def prepare_then(encoded):
        if encoded == encoded_image(color=COLORS[3], format="PNG"):
            raise BadImage("missing", "a server refuses, and later no more")
        return prepare(encoded)

    source = ImageSource(data_files=f"{places}/one.parquet")
    options = {"rows_per_file": 6, "max_bad_fraction": 0.5}
    embed_until_killed(source, tmp_path, 6, prepare_then, **options)
    result = embed(source, prepare, encode, tmp_path, FACTS, batch_size=6, **options)
    assert [record["row"] for record in logged(tmp_path)] == ["0:3"] and result["bad"] == {"missing": 1}
    assert read(tmp_path) == embeddings({name: i for name, i in places_of(NUM_IMAGES).items() if i != 3})


# --- What is refused -------------------------------------------------------------------------------------------------


def test_a_folder_that_was_begun_otherwise_is_refused(places, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded_image(color=COLORS[i], format="PNG"))

    def go_on(facts=FACTS, place=tmp_path / "images", **options):
        return embed(ImageSource(data_dir=str(place)), prepare, encode, tmp_path / "out", facts, **options)

    go_on()
    assert go_on(num_processes=2, num_workers=2, batch_size=1, rows_per_file=1)["done"]  # all that may change
    with pytest.raises(ValueError, match=r"weights='sha256:1' \(there: 'sha256:0'\); set another --output_dir"):
        go_on({**FACTS, "weights": "sha256:1"})
    with pytest.raises(ValueError, match=r"pooling='mean' \(there: None\)"):
        go_on({**FACTS, "pooling": "mean"})
    with pytest.raises(ValueError, match=r"embedding_dtype='float32' \(there: 'float16'\)"):
        go_on(dtype="float32")
    with pytest.raises(ValueError, match=r"source='.*/places\d+/images'"):
        go_on(place=places / "images")
    (tmp_path / "images" / "2.png").rename(tmp_path / "images" / "3.png")
    with pytest.raises(ValueError, match="source_fingerprint="):
        go_on()
    (tmp_path / "out" / "embedding.json").unlink()
    with pytest.raises(ValueError, match="part files but no embedding.json"):
        go_on()


def test_a_lost_file_is_missed(places, tmp_path):
    source = ImageSource(data_files=f"{places}/shard-*.parquet")
    embed(source, prepare, encode, tmp_path, FACTS, batch_size=4, rows_per_file=4)
    (tmp_path / "part-000002-000001.parquet").unlink()
    with pytest.raises(ValueError, match="lacks part-000002-000001.parquet"):
        embed(source, prepare, encode, tmp_path, FACTS)


def test_numbers_that_are_not_finite_are_refused_by_id(places, tmp_path):
    source = ImageSource(data_files=f"{places}/one.parquet")

    def broken(factor):
        def encode_some(pixels):
            features = encode(pixels)
            features[(pixels[:, 0, 0, 0] == 7).nonzero(), 1] *= factor
            return features

        return encode_some

    with pytest.raises(ValueError, match="embedding of 0:7 is not finite; .*without mixed precision"):
        embed(source, prepare, broken(float("nan")), tmp_path / "a", FACTS, batch_size=5, rows_per_file=5)
    assert not read(tmp_path / "a")
    with pytest.raises(
        ValueError, match="embedding of 0:7 has a 124000, and dtype='float16' ends at 65504; set dtype to float32"
    ):
        embed(source, prepare, broken(2000), tmp_path / "a", FACTS, batch_size=5)
    embed(source, prepare, broken(2000), tmp_path / "b", FACTS, dtype="float32")
    assert read(tmp_path / "b")["0:7"][1][1] == 124000


@pytest.mark.parametrize(
    "extra, options, message",
    [
        (("label",), {"label_column": "key"}, r"label_column='key' is not among the extra_columns=\('label',\)"),
        (("box",), {"label_column": "box"}, "label_column='box' .* is List.*; choose a column of single values"),
        (("box",), {"id_column": "box"}, "id_column='box' .* is List"),
        ((), {"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ((), {"rows_per_file": 8, "batch_size": 9}, "batch_size=9 must be from 1 to rows_per_file=8"),
    ],
)
def test_what_cannot_be_kept_is_refused(places, tmp_path, extra, options, message):
    source = ImageSource(data_files=f"{places}/one.parquet", extra_columns=extra)
    with pytest.raises(ValueError, match=message):
        embed(source, prepare, encode, tmp_path, FACTS, **options)


def test_a_row_without_an_id_is_refused(tmp_path):
    rows = {"image": [{"bytes": encoded_image(), "path": None}] * 2, "key": ["a", None]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "key": Value("string")})).to_parquet(
        tmp_path / "rows.parquet"
    )
    source = ImageSource(data_files=f"{tmp_path}/rows.parquet", extra_columns=("key",))
    with pytest.raises(ValueError, match="id_column='key' of .* is null in 0:1"):
        embed(source, prepare, encode, tmp_path / "out", FACTS, id_column="key")


def test_extra_columns_that_are_not_there_are_refused_by_name(places):
    with pytest.raises(ValueError, match=r"one.parquet has no column 'name', only \['image', 'label', 'key', 'box'\]"):
        ImageSource(data_files=f"{places}/one.parquet", extra_columns=("label", "name"))
    with pytest.raises(ValueError, match=r"images has no column 'label', only \['image'\]"):
        ImageSource(data_dir=f"{places}/images", extra_columns=("label",))


@pytest.mark.parametrize("bad", [0, 3])
def test_a_bad_row_of_an_earlier_run_stays_bad_wherever_it_is(tmp_path, bad):
    write_parquet(tmp_path / "one.parquet", [encoded_image(color=color, format="PNG") for color in COLORS])

    def prepare_then(encoded):
        if encoded == encoded_image(color=COLORS[bad], format="PNG"):
            raise BadImage("missing", "a server refuses, and later no more")
        return prepare(encoded)

    source = ImageSource(data_files=f"{tmp_path}/one.parquet")
    options = {"rows_per_file": 6, "max_bad_fraction": 0.5}
    embed_until_killed(source, tmp_path, 6, prepare_then, **options)
    result = embed(source, prepare, encode, tmp_path, FACTS, batch_size=6, **options)
    assert [record["row"] for record in logged(tmp_path)] == [f"0:{bad}"] and result["bad"] == {"missing": 1}
