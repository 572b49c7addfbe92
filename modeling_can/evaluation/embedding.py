"""
The embeddings of all images of a source, in parquet files that any number of processes write beside each other.

Units: the work is done shard by shard; where there are fewer shards than readers (processes x loader workers) when a
folder is begun, a shard is several units, each with every so many-th of its rows. The units stay as they are, whoever
goes on with them. Every process knows from its own number which are its own, so that none has to hear of the others.

Resume: a file gets its name when it is on the disk, and its metadata say where its unit stands after it. A run goes on
from what the files say. So each row of the source is in exactly one file or, if its image is bad, in the ledger.
"""

import collections
import dataclasses
import functools
import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from tqdm import tqdm

from ..data import append_line, ledger_line, refuse_bad
from ..files import flush_to_disk
from ..loading import Patient, handed_over, worker_options
from ..views import BadImage


LEDGER = "bad_samples.jsonl"
KEY = b"unit"  # of a file's metadata
SAVE_SECONDS = 600  # that embeddings wait at most until they are written, if a file is not full before
LINE_SECONDS = 30  # between lines of progress where stderr is no terminal


@torch.no_grad()
def embed(
    source,
    prepare,
    encode,
    output_dir,
    facts,
    *,
    batch_size=256,
    num_workers=0,
    dtype="float16",
    rows_per_file=100_000,
    id_column=None,
    label_column=None,
    process_index=0,
    num_processes=1,
    max_bad_fraction=0.01,
) -> dict:
    """
    One process's share of the work, from where it stands in the folder; to be called by all, now or one after another.
    A run that is killed loses what waits to be written, and is started again as it was or with another number of
    processes or workers, once its own processes have ended.

    The files, `datasets.load_dataset("parquet", data_files=f"{folder}/part-*.parquet")`, have the columns `id`
    (string), `label` (if asked for, of its column's type) and `embedding` (list of fixed length). Bad images are in
    the ledger `bad_samples.jsonl`, as the trainer's, each with its `row`, `"{shard}:{row in shard}"`.

    Args:
        source (`ImageSource`): With the columns named here among its `extra_columns`.
        prepare (callable): Encoded bytes -> tensor; raises `BadImage`. Runs in the loader's workers.
        encode (callable): Those of a batch, stacked (pinned, if there is a GPU) -> features `(B, D)` on any device.
        output_dir (`str` or `Path`): The folder.
        facts (`dict`): Whatever the embeddings depend on besides (weights, pooling, preprocessing); kept in
            `embedding.json`, so that a folder holds embeddings of one kind.
        dtype (`str`): `"float16"` or `"float32"`.
        rows_per_file (`int`): At most; so many wait in memory for each worker.
        id_column (`str`, *optional*):
            Column of the ids. By default it is the path, for a folder of images, or else `"{shard}:{row in shard}"`.
        label_column (`str`, *optional*): Column of single values.
        process_index, num_processes (`int`): This process among those that share the work.
        max_bad_fraction (`float`): Share of bad images above which the process gives up.

    Returns:
        `totals` of the folder; `new_images` and `images_per_second` of this call.

    Raises:
        ValueError: for what cannot be kept; if the folder was begun otherwise; if a feature is not finite; when more
            than `max_bad_fraction` of the process's images are bad, once it has passed 1,000 or come to its end.
        OSError: when a shard cannot be read, as in `ViewStream`.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}; embeddings are kept as 'float16' or 'float32'")
    if not 0 < batch_size <= rows_per_file:
        raise ValueError(f"batch_size={batch_size} must be from 1 to rows_per_file={rows_per_file}")
    check_column(source, "id_column", id_column)
    check_column(source, "label_column", label_column)
    folder, num_shards = Path(output_dir), source.num_shards
    settings = {
        "source": source.name,
        "source_split": source.split,
        "source_fingerprint": source.fingerprint,
        "source_shards": num_shards,
        "embedding_dtype": dtype,
        "id_column": id_column,
        "label_column": label_column,
    }
    assert not facts.keys() & settings.keys(), "a fact has the name of a setting"
    num_parts = begin(folder, {**facts, **settings}, num_processes * max(1, num_workers), process_index)
    num_units, files = num_shards * num_parts, part_files(folder)
    units = {index: Unit(folder, index, files[index]) for index in range(process_index, num_units, num_processes)}
    for path in folder.glob("part-*.partial"):  # of a run that was killed
        if unit_of(path) in units:
            path.unlink()
    known_bad, last = read_ledger(folder / LEDGER, units, num_parts)

    todo = [(index, unit.next_row) for index, unit in units.items() if not unit.done]
    loader = torch.utils.data.DataLoader(
        Batches(source, prepare, todo, num_parts, known_bad, batch_size, id_column, label_column),
        batch_size=None,
        **worker_options(min(num_workers, len(todo))),
        in_order=False,  # of the workers: none waits for one whose connection has failed
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(end_with, os.getpid()),
    )
    num_before = num_good = sum(unit.num_images for unit in units.values())
    num_bad = sum(unit.bad.total() for unit in units.values())
    num_images = source.num_images() if process_index == 0 else None
    schema, start = None, time.monotonic()
    with progress_bar(num_images and num_images * len(units) // num_units, num_good + num_bad, process_index) as bar:
        for batch in Patient(loader):
            unit, ids = units[batch.unit], batch.ids
            embeddings = to_numpy(encode(batch.images), ids, dtype) if ids else None
            if schema is None and (ids or batch.done):
                size = embeddings.shape[1] if ids else embedding_size(prepare, encode)
                schema = schema_of(source, label_column, dtype, size)
            for last in batch.lines:  # not by the workers, which may outlive a process that was killed
                append_line(folder / LEDGER, last)
            unit.add(batch, embeddings, schema, rows_per_file)
            num_good, num_bad = num_good + len(ids), num_bad + len(batch.reasons)
            bar.update(len(ids) + len(batch.reasons))
            if num_good + num_bad >= 1000:
                refuse_bad(source.name, num_bad, num_good + num_bad, max_bad_fraction, last, folder / LEDGER)
    refuse_bad(source.name, num_bad, num_good + num_bad, max_bad_fraction, last, folder / LEDGER)
    new_images, seconds = num_good - num_before, time.monotonic() - start
    return {**totals(folder), "new_images": new_images, "images_per_second": new_images / seconds}


def totals(folder) -> dict:
    """`num_images` and `files` in the folder, `bad` images by reason, and whether all units are `done`."""
    begun, files = json.loads((Path(folder) / "embedding.json").read_text()), part_files(Path(folder))
    states = [read_state(paths[-1]) for paths in files.values()]
    return {
        "num_images": sum(state["num_images"] for state in states),
        "files": sum(map(len, files.values())),
        "bad": dict(sum((collections.Counter(state["bad"]) for state in states), collections.Counter())),
        "done": sum(state["done"] for state in states) == begun["source_shards"] * begun["units_per_shard"],
    }


# --- Reading: in the loader's workers --------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """
    The images of a unit's rows from `first_row` up to `next_row`, stacked, with their ids and labels; of the bad ones
    the reasons, and the ledger's lines on those that it lacks. The last batch of a unit, perhaps empty, is `done`.
    """

    unit: int
    first_row: int
    next_row: int = 0
    done: bool = False
    images: list | torch.Tensor = dataclasses.field(default_factory=list)
    ids: list[str] = dataclasses.field(default_factory=list)
    labels: list = dataclasses.field(default_factory=list)
    reasons: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)

    def close(self, next_row: int, done: bool = False):
        self.next_row, self.done = next_row, done
        if self.images:
            self.images = handed_over(torch.stack(self.images))
        return self

    def pin_memory(self):  # called by the loader
        if self.ids:
            self.images = self.images.pin_memory()
        return self


class Batches(torch.utils.data.IterableDataset):
    """The batches of the units in `todo`, `(index, first row)`, unit by unit; they are dealt to the workers."""

    def __init__(self, source, prepare, todo, num_parts, known_bad, batch_size, id_column, label_column):
        self.source, self.prepare, self.todo, self.num_parts = source, prepare, todo, num_parts
        self.known_bad, self.batch_size = known_bad, batch_size
        self.id_column, self.label_column = id_column, label_column

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for unit, first_row in self.todo[worker.id :: worker.num_workers] if worker else self.todo:
            yield from self._read(unit, first_row)

    def _read(self, unit: int, first_row: int):
        shard, part = divmod(unit, self.num_parts)
        batch, row = Batch(unit, first_row), 0
        for block, _ in self.source.blocks(self.source.shard(shard), block_size=self.batch_size):
            images = self.source.images(block)
            ids, labels = (block.get(name, [None] * len(images)) for name in (self.id_column, self.label_column))
            for image, own_id, label in zip(images, ids, labels, strict=True):
                if row >= first_row and row % self.num_parts == part:
                    self._add(batch, f"{shard}:{row}", image, own_id, label)
                    if self.batch_size in (len(batch.ids), len(batch.reasons)):
                        yield batch.close(row + 1)
                        batch = Batch(unit, row + 1)
                row += 1
        yield batch.close(row, done=True)

    def _add(self, batch: Batch, place: str, image: dict | None, own_id, label):
        if self.id_column and own_id is None:
            raise ValueError(f"id_column={self.id_column!r} of {self.source.name} is null in {place}; choose another")
        if place in self.known_bad:
            batch.reasons.append(self.known_bad[place])
            return
        try:
            batch.images.append(self.prepare(self.source.fetch(image)))
        except BadImage as error:
            own = {"id": str(own_id)} if self.id_column else {}
            batch.reasons.append(error.reason)
            batch.lines.append(ledger_line(self.source.name, image, error, row=place, **own))
        else:
            batch.ids.append(str(own_id) if self.id_column else image["path"] if self.source.is_folder else place)
            batch.labels.append(label)


def end_with(parent: int, worker_id: int):
    """In a loader's worker: end within a second of the process, however it ended and whatever is waited for here."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --- Embedding -------------------------------------------------------------------------------------------------------


def to_numpy(features: torch.Tensor, ids: list[str], dtype: str) -> np.ndarray:
    """`(B, D)` as it will be written; `ValueError` if not all of it is finite."""
    assert features.shape[:-1] == (len(ids),), f"encode made {tuple(features.shape)} of {len(ids)} images"
    kept = features.to(getattr(torch, dtype))
    finite = kept.isfinite().all(dim=1)
    if not finite.all():
        worst = int(finite.int().argmin())
        if features[worst].isfinite().all():
            raise ValueError(
                f"the embedding of {ids[worst]} has a {features[worst].abs().max():g}, and dtype='float16' ends at "
                "65504; set dtype to float32"
            )
        raise ValueError(f"the embedding of {ids[worst]} is not finite; compute in fp32, without mixed precision")
    return kept.cpu().numpy()


def embedding_size(prepare, encode) -> int:
    """D, where a unit has not one good image to tell it: that of a grey picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (512, 512), "grey").save(buffer, "PNG")
    return encode(prepare(buffer.getvalue())[None]).shape[1]


def progress_bar(total: int | None, initial: int, process_index: int) -> tqdm:
    """Images, images a second and the time left; of the first process alone."""
    options = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt} images, {rate_noinv_fmt}, {remaining} left"
        options = {"file": Lines(), "bar_format": line, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    return tqdm(desc="embedding", total=total, initial=initial, unit=" images", disable=process_index != 0, **options)


class Lines:
    """A file for tqdm: what it would write over and over becomes a line each time."""

    def write(self, text: str):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


# --- The folder ------------------------------------------------------------------------------------------------------


def check_column(source, field: str, name: str | None):
    if name is None:
        return
    if name not in source.extra_columns:
        raise ValueError(f"{field}={name!r} is not among the extra_columns={source.extra_columns} of the source")
    if not isinstance(source.dataset.features[name], datasets.Value | datasets.ClassLabel):
        raise ValueError(
            f"{field}={name!r} of {source.name} is {source.dataset.features[name]}; choose a column of single values"
        )


def begin(folder: Path, settings: dict, num_readers: int, process_index: int) -> int:
    """Of how many units a shard consists, as it was written when the folder was begun; or is now, by any process."""
    path, files = folder / "embedding.json", part_files(folder)  # in the other order, another process may be between
    partial = path.with_name(f"{path.name}.{process_index}.partial")
    partial.unlink(missing_ok=True)
    if not path.exists():
        if files:
            raise ValueError(f"output_dir={folder} has part files but no embedding.json; set another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        units = {"units_per_shard": -(-num_readers // settings["source_shards"])}
        partial.write_text(json.dumps({**settings, **units}, indent=2) + "\n")
        flush_to_disk(partial)
        os.replace(partial, path)
    begun, settings = json.loads(path.read_text()), json.loads(json.dumps(settings))
    num_parts = begun.pop("units_per_shard")
    different = [
        f"{name}={settings.get(name)!r} (there: {begun.get(name)!r})"
        for name in {**settings, **begun}
        if settings.get(name) != begun.get(name)
    ]
    if different:
        raise ValueError(
            f"output_dir={folder} was begun with other settings: {', '.join(different)}; set another --output_dir"
        )
    return num_parts


def file_name(unit: int, number: int) -> str:
    return f"part-{unit:06}-{number:06}.parquet"


def unit_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def part_files(folder: Path) -> dict[int, list[Path]]:
    """The files of each unit, in order."""
    files = collections.defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
        files[unit_of(path)].append(path)
    return files


def read_state(path: Path) -> dict:
    """Of its unit, after this file."""
    return json.loads(pyarrow.parquet.read_metadata(path).metadata[KEY])


def schema_of(source, label_column: str | None, dtype: str, size: int) -> pyarrow.Schema:
    """With the metadata of `datasets`, so that a label keeps its class names."""
    features = {"id": datasets.Value("string")}
    if label_column:
        features["label"] = source.dataset.features[label_column]
    features["embedding"] = datasets.List(datasets.Value(dtype), length=size)
    return datasets.Features(features).arrow_schema


def read_ledger(path: Path, units: dict, num_parts: int) -> tuple[dict[str, str], str]:
    """`{row: reason}` of the bad rows that no file of these units has passed; and the ledger's last line."""
    known, line = {}, ""
    if path.exists():
        with open(path, "a+") as file:
            file.seek(0)
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                shard, row = map(int, record["row"].split(":"))
                unit = units.get(shard * num_parts + row % num_parts)
                if unit and row >= unit.next_row:
                    known[record["row"]] = record["reason"]
            if line and not line.endswith("\n"):
                file.write("\n")
    return known, line.strip()


class Unit:
    """Where a unit stands: what its last file says, and what was added since."""

    def __init__(self, folder: Path, index: int, paths: list[Path]):
        for number, path in enumerate(paths):
            if path.name != file_name(index, number):
                raise ValueError(f"{folder} lacks {file_name(index, number)}; remove the later files of this unit too")
        state = read_state(paths[-1]) if paths else {"next_row": 0, "num_images": 0, "bad": {}, "done": False}
        self.next_row, self.num_images, self.done = state["next_row"], state["num_images"], state["done"]
        self.bad = collections.Counter(state["bad"])
        self.folder, self.index, self.num_files = folder, index, len(paths)
        self.waiting, self.waiting_since = [], 0.0

    def add(self, batch: Batch, embeddings: np.ndarray | None, schema: pyarrow.Schema | None, rows_per_file: int):
        """Writes a file when it would become too long, after a while, and at the end."""
        assert batch.first_row == self.next_row, "the batches of a unit come in order"
        if sum(rows.num_rows for rows in self.waiting) + len(batch.ids) > rows_per_file:
            self._write(schema)
        if batch.ids:
            kind = schema.field("embedding").type
            lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings.reshape(-1)), type=kind)
            columns = {"id": batch.ids, "label": batch.labels, "embedding": lists}
            self.waiting_since = self.waiting_since if self.waiting else time.monotonic()
            self.waiting.append(pyarrow.RecordBatch.from_pydict(columns, schema))
        self.next_row, self.num_images, self.done = batch.next_row, self.num_images + len(batch.ids), batch.done
        self.bad.update(batch.reasons)
        if self.done or self.waiting and time.monotonic() - self.waiting_since >= SAVE_SECONDS:
            self._write(schema)

    def _write(self, schema: pyarrow.Schema):
        state = {"next_row": self.next_row, "num_images": self.num_images, "bad": self.bad, "done": self.done}
        path = self.folder / file_name(self.index, self.num_files)
        partial = path.with_name(f"{path.name}.partial")
        # There is next to nothing to gain by compressing embeddings.
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        schema = schema.with_metadata({**schema.metadata, KEY: json.dumps(state)})
        with pyarrow.parquet.ParquetWriter(partial, schema, **options) as writer:
            if self.waiting:  # datasets reads no group of 0 rows
                writer.write_table(pyarrow.Table.from_batches(self.waiting, schema), row_group_size=10_000)
        flush_to_disk(partial)
        os.replace(partial, path)
        self.num_files, self.waiting = self.num_files + 1, []
