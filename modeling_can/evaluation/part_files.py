"""
The folder of embeddings: parquet files that any number of processes write beside each other.

Units: the work is done shard by shard; where there are fewer shards than workers (processes x loader workers) when a
folder is begun, a shard is several units, each with every so many-th of its rows. The units stay as they are, whoever
goes on with them. Every process knows from its own number which are its own, so that none has to hear of the others.

Resume: a file gets its name when it is on the disk, and its metadata say where its unit stands after it. A run goes on
from what the files say. So each row of the source is in exactly one file or, if its image is bad, in the bad-sample
log.
"""

import collections
import json
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from ..files import new_file, write


__all__ = [
    "BAD_SAMPLES",
    "SAVE_SECONDS",
    "Unit",
    "begin",
    "part_files",
    "read_bad_samples",
    "schema_of",
    "totals",
    "unit_of",
]

BAD_SAMPLES = "bad_samples.jsonl"
_KEY = b"unit"  # of a file's metadata
SAVE_SECONDS = 600  # that embeddings wait at most until they are written, if a file is not full before


def begin(folder: Path, settings: dict, num_workers: int) -> int:
    """Of how many units a shard consists, as it was written when the folder was begun; or is now, by any process."""
    path, files = folder / "embedding.json", part_files(folder)  # in the other order, another process may be between
    if not path.exists():
        if files:
            raise ValueError(f"output_dir={folder} has part files but no embedding.json; set another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        units = {"units_per_shard": -(-num_workers // settings["source_shards"])}
        write(path, json.dumps({**settings, **units}, indent=2) + "\n")
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


def totals(folder) -> dict:
    """`num_images` and `files` in the folder, `bad` images by reason, and whether all units are `done`."""
    begun, files = json.loads((Path(folder) / "embedding.json").read_text()), part_files(Path(folder))
    states = [_read_state(paths[-1]) for paths in files.values()]
    return {
        "num_images": sum(state["num_images"] for state in states),
        "files": sum(map(len, files.values())),
        "bad": dict(sum((collections.Counter(state["bad"]) for state in states), collections.Counter())),
        "done": sum(state["done"] for state in states) == begun["source_shards"] * begun["units_per_shard"],
    }


def _file_name(unit: int, number: int) -> str:
    return f"part-{unit:06}-{number:06}.parquet"


def unit_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def part_files(folder: Path) -> dict[int, list[Path]]:
    """The files of each unit, in order."""
    files = collections.defaultdict(list)
    for path in sorted(folder.glob("part-*.parquet")):
        files[unit_of(path)].append(path)
    return files


def _read_state(path: Path) -> dict:
    """Of its unit, after this file."""
    return json.loads(pyarrow.parquet.read_metadata(path).metadata[_KEY])


def schema_of(source, label_column: str | None, dtype: str, size: int) -> pyarrow.Schema:
    """With the metadata of `datasets`, so that a label keeps its class names."""
    features = {"id": datasets.Value("string")}
    if label_column:
        features["label"] = source.dataset.features[label_column]
    features["embedding"] = datasets.List(datasets.Value(dtype), length=size)
    return datasets.Features(features).arrow_schema


def read_bad_samples(path: Path, units: dict, num_parts: int) -> tuple[dict[str, str], str]:
    """`{row: reason}` of the bad rows that no file of these units has passed; and the last line."""
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
            if path.name != _file_name(index, number):
                raise ValueError(
                    f"{folder} lacks {_file_name(index, number)}; remove the later files of this unit too"
                )
        state = _read_state(paths[-1]) if paths else {"next_row": 0, "num_images": 0, "bad": {}, "done": False}
        self.next_row, self.num_images, self.done = state["next_row"], state["num_images"], state["done"]
        self.bad = collections.Counter(state["bad"])
        self.folder, self.index, self.num_files = folder, index, len(paths)
        self.waiting, self.waiting_since = [], 0.0

    def add(self, batch, embeddings: np.ndarray | None, schema: pyarrow.Schema | None, rows_per_file: int):
        """Takes an `embed._Batch`; writes a file when it would become too long, after a while, and at the end."""
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
        path = self.folder / _file_name(self.index, self.num_files)
        # There is next to nothing to gain by compressing embeddings.
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        schema = schema.with_metadata({**schema.metadata, _KEY: json.dumps(state)})
        with new_file(path) as partial, pyarrow.parquet.ParquetWriter(partial, schema, **options) as writer:
            if self.waiting:  # datasets reads no group of 0 rows
                writer.write_table(pyarrow.Table.from_batches(self.waiting, schema), row_group_size=10_000)
        self.num_files, self.waiting = self.num_files + 1, []
