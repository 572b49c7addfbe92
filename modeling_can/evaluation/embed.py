"""The task that writes embeddings of any images, on any number of processes. It needs no labels, and stands alone."""

import dataclasses
import functools
import io
import json
import os
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import ClassLabel, Value
from PIL import Image

from ..data import ImageSource, append_line, bad_sample_line, refuse_bad
from ..data.bad_samples import BadImage
from ..data.loading import Patient, handed_over, worker_options
from ..files import write
from ..progress import progress_bar, tell
from .encoders import pooled
from .entries import load
from .part_files import BAD_SAMPLES, Unit, begin, part_files, read_bad_samples, schema_of, totals, unit_of
from .processes import end_training


__all__ = ["embed", "embed_task", "end_with"]


_FOLDER_SHARD = 1000  # images of a folder, of which a shard has no fewer


# --- The task --------------------------------------------------------------------------------------------------------


def embed_task(settings, accelerator: Accelerator, results: dict) -> dict:
    """The task that writes embeddings; each process does its share, and waits for no other."""
    with accelerator.local_main_process_first():
        encoder = load(settings.model_name_or_path[0], settings)
    digest = encoder.digest()
    encoder.to(accelerator.device)

    @torch.no_grad()
    def encode(images):
        with accelerator.autocast():
            pixels = encoder.preprocessor.normalize(images.to(accelerator.device, non_blocking=True))
            return pooled(encoder(pixels), settings.pooling, encoder.name)

    def source_with(label_column: str | None) -> ImageSource:
        return ImageSource(
            dataset_name=settings.dataset_name,
            data_dir=settings.data_dir,
            data_files=settings.data_files,
            split=settings.dataset_split,
            image_column=settings.image_column,
            streaming=settings.streaming,
            extra_columns=tuple(filter(None, (settings.id_column, label_column))),
            config_name=settings.dataset_config_name,
            arrays=encoder.preprocessor.reads_arrays,
        )

    label_column, source = settings.label_column, source_with(settings.label_column)
    if label_column is None and isinstance(source.features.get("label"), Value | ClassLabel):
        label_column, source = "label", source_with("label")
    if source.is_folder:  # whose shards are no files; each leaves a file of its own
        source.num_shards = min(source.num_shards, -(-source.num_images() // _FOLDER_SHARD))
    if source.left_out_line and accelerator.is_main_process:
        tell(source.left_out_line)
    facts = {
        "weights": digest,
        "pooling": settings.pooling,
        "preprocessing": encoder.preprocessor.facts(),
        "mixed_precision": accelerator.mixed_precision,
    }
    figures = embed(
        source=source,
        prepare=encoder.preprocessor.decode,
        encode=encode,
        output_dir=settings.output_dir,
        facts=facts,
        batch_size=min(settings.batch_size, settings.rows_per_file),
        num_workers=settings.dataloader_num_workers,
        dtype=settings.embedding_dtype,
        rows_per_file=settings.rows_per_file,
        id_column=settings.id_column,
        label_column=label_column,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        max_bad_fraction=settings.max_bad_fraction,
        blank=encoder.preprocessor.blank,
    )
    own = gather_object([(figures["new_images"], figures["images_per_second"])])
    new_images, speed = map(sum, zip(*own, strict=True))
    results["model"] = {"path": settings.model_name_or_path[0], "sha256": digest}
    results["left_out"] = source.left_out
    results["embed"] = {**totals(settings.output_dir), "new_images": new_images, "images_per_second": speed}
    if accelerator.is_main_process:
        write(Path(settings.output_dir) / "results.json", json.dumps(results, indent=2) + "\n")
        bad = ", ".join(f"{count} {reason}" for reason, count in results["embed"]["bad"].items())
        of = f" of split {source.split}" if settings.dataset_name else ""
        tell(
            f"{results['embed']['num_images']:,} embeddings{of} in {results['embed']['files']} files, "
            f"{new_images:,} of them new at {speed:.0f} images/s; bad images: {bad or 'none'}. "
            f"results.json, and for load_dataset('parquet', data_files=...): {settings.output_dir}/part-*.parquet"
        )
    end_training(accelerator)
    return results


# --- The share of a process ------------------------------------------------------------------------------------------


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
    blank=None,
) -> dict:
    """
    One process's share of the work, from where it stands in the folder; to be called by all, now or one after another.
    A run that is killed loses what waits to be written, and is started again as it was or with another number of
    processes or workers, once its own processes have ended.

    The files, `datasets.load_dataset("parquet", data_files=f"{folder}/part-*.parquet")`, have the columns `id`
    (string), `label` (if asked for, of its column's type) and `embedding` (list of fixed length). Bad images are in
    the log `bad_samples.jsonl`, as the trainer's, each with its `row`, `"{shard}:{row in shard}"`.

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
        max_bad_fraction (`float`): Fraction of bad images above which the process stops.
        blank (`bytes`, *optional*):
            An encoded image that `prepare` takes, which tells D where a unit has no good image; by default a gray one.

    Returns:
        `totals` of the folder; `new_images` and `images_per_second` of this call.

    Raises:
        ValueError: for what cannot be kept; if the folder was begun otherwise; if a feature is not finite; when more
            than `max_bad_fraction` of the process's images are bad, once it has passed 1,000 or come to its end.
        OSError: when a shard cannot be read, as in `ViewStream`.
    """
    if not 0 < batch_size <= rows_per_file:
        raise ValueError(f"batch_size={batch_size} must be from 1 to rows_per_file={rows_per_file}")
    folder, settings = Path(output_dir), _settings(source, dtype, id_column, label_column)
    assert not facts.keys() & settings.keys(), "a fact has the name of a setting"
    num_parts = begin(folder, {**facts, **settings}, num_processes * max(1, num_workers))
    num_units, files = source.num_shards * num_parts, part_files(folder)
    units = {index: Unit(folder, index, files[index]) for index in range(process_index, num_units, num_processes)}
    for path in folder.glob("part-*.partial"):  # of a run that was killed
        if unit_of(path) in units:
            path.unlink()
    known_bad, last = read_bad_samples(folder / BAD_SAMPLES, units, num_parts)

    todo = [(index, unit.next_row) for index, unit in units.items() if not unit.done]
    batches = _Batches(
        source=source,
        prepare=prepare,
        todo=todo,
        num_parts=num_parts,
        known_bad=known_bad,
        batch_size=batch_size,
        id_column=id_column,
        label_column=label_column,
    )
    loader = _loader(batches, min(num_workers, len(todo)))
    num_before = num_good = sum(unit.num_images for unit in units.values())
    num_bad = sum(unit.bad.total() for unit in units.values())
    num_images = source.num_images() if process_index == 0 else None
    refuse = functools.partial(refuse_bad, source.name, max_bad_fraction=max_bad_fraction, log=folder / BAD_SAMPLES)
    schema, start = None, time.monotonic()
    shown = {"unit": "images", "is_shown": process_index == 0, "lines": True}
    total = num_images and num_images * len(units) // num_units
    with progress_bar(description="embedding", total=total, initial=num_good + num_bad, **shown) as bar:
        for batch in Patient(loader):
            unit, ids = units[batch.unit], batch.ids
            embeddings = _to_numpy(encode(batch.images), ids, dtype) if ids else None
            if schema is None and (ids or batch.done):
                size = embeddings.shape[1] if ids else encode(prepare(blank or _gray_image())[None]).shape[1]
                schema = schema_of(source, label_column, dtype, size)
            for last in batch.lines:  # not by the workers, which may outlive a process that was killed
                append_line(folder / BAD_SAMPLES, last)
            unit.add(batch, embeddings, schema, rows_per_file)
            num_good, num_bad = num_good + len(ids), num_bad + len(batch.reasons)
            bar.update(len(ids) + len(batch.reasons))
            if num_good + num_bad >= 1000:
                refuse(num_bad, num_good + num_bad, last=last)
    refuse(num_bad, num_good + num_bad, last=last)
    new_images, seconds = num_good - num_before, time.monotonic() - start
    return {**totals(folder), "new_images": new_images, "images_per_second": new_images / seconds}


def _settings(source, dtype: str, id_column: str | None, label_column: str | None) -> dict:
    """What is kept beside `facts`; refuses what cannot be."""
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r}; embeddings are kept as 'float16' or 'float32'")
    _check_column(source, "id_column", id_column)
    _check_column(source, "label_column", label_column)
    return {
        "source": source.name,
        "source_split": source.split,
        "source_fingerprint": source.fingerprint,
        "source_shards": source.num_shards,
        "embedding_dtype": dtype,
        "id_column": id_column,
        "label_column": label_column,
    }


def _check_column(source, field: str, name: str | None):
    if name is None:
        return
    if name not in source.extra_columns:
        raise ValueError(f"{field}={name!r} is not among the extra_columns={source.extra_columns} of the source")
    if not isinstance(source.dataset.features[name], datasets.Value | datasets.ClassLabel):
        raise ValueError(
            f"{field}={name!r} of {source.name} is {source.dataset.features[name]}; choose a column of single values"
        )


def _to_numpy(features: torch.Tensor, ids: list[str], dtype: str) -> np.ndarray:
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


def _gray_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (512, 512), "gray").save(buffer, "PNG")
    return buffer.getvalue()


# --- Reading: in the loader's workers --------------------------------------------------------------------------------


@dataclasses.dataclass
class _Batch:
    """
    The images of a unit's rows from `first_row` up to `next_row`, stacked, with their ids and labels; of the bad ones
    the reasons, and the log's lines on those that it lacks. The last batch of a unit, perhaps empty, is `done`.
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


class _Batches(torch.utils.data.IterableDataset):
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
        batch, row = _Batch(unit, first_row), 0
        for block, _ in self.source.blocks(self.source.shard(shard), block_size=self.batch_size):
            images = self.source.images(block)
            ids, labels = (block.get(name, [None] * len(images)) for name in (self.id_column, self.label_column))
            for image, own_id, label in zip(images, ids, labels, strict=True):
                if row >= first_row and row % self.num_parts == part:
                    self._add(batch=batch, place=f"{shard}:{row}", image=image, own_id=own_id, label=label)
                    if self.batch_size in (len(batch.ids), len(batch.reasons)):
                        yield batch.close(row + 1)
                        batch = _Batch(unit, row + 1)
                row += 1
        yield batch.close(row, done=True)

    def _add(self, batch: _Batch, place: str, image: dict | None, own_id, label):
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
            error = BadImage(error.reason, error.fault)  # without advice: embed has none of those settings
            batch.lines.append(bad_sample_line(self.source.name, image, error, row=place, **own))
        else:
            batch.ids.append(str(own_id) if self.id_column else image["path"] if self.source.is_folder else place)
            batch.labels.append(label)


def _loader(batches: _Batches, num_workers: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        **worker_options(num_workers),
        in_order=False,  # of the workers: none waits for one whose connection has failed
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(end_with, os.getpid()),
    )


def end_with(parent: int, worker_id: int):
    """In a loader's worker: end within a second of the process, however it ended and whatever is waited for here."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
