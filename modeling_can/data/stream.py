"""
The endless stream of view pairs that the trainer reads from a source.

Order: the shards of a source are shuffled for every epoch and assigned to the workers (processes x loader workers);
where there are fewer shards than workers, the rows are assigned instead. A worker reads its own rows exactly once an
epoch, in shuffled blocks, and goes on into the next epoch without a gap. So every batch is full on every process, and
nobody waits for a worker that ran dry.

Resume: a worker's state is where its block began in the source, and how far into the block it is. Restored to as many
workers it continues with exactly the samples, in exactly the order, of a run that was never interrupted.

Faults: a connection that fails is opened again where it broke off; an image that cannot be used is skipped and
reported; a shard that is gone stops the run.
"""

import copy
import itertools
import json
import logging

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from .bad_samples import BadImage, append_line, bad_sample_line, bad_sample_lines, refuse_bad
from .reading import image_name


__all__ = ["ViewStream", "mean_and_std"]

logger = logging.getLogger(__name__)

_MAX_EMPTY_EPOCHS = 20  # in a row: a worker may be given nothing but empty shards by chance


class ViewStream(torch.utils.data.IterableDataset):
    """
    One process's share of a source as an endless stream of `{"views": (2, C, H, W), "bad": [reason], "image":
    name}`, to be given to `view_loader` (never to `accelerator.prepare`, which would split it once more).

    An image that cannot be used is skipped. Each worker reports it once, however often the epochs bring it back:
    the reason in `bad` of the next sample, and at once a line in the bad-sample log, JSON with source, path, SHA-256
    of the bytes, reason and detail.

    Args:
        source (`ImageSource`): Where the images come from.
        make_views (callable): `(encoded bytes, epoch) -> (2, C, H, W)`, as `RandomCrops`; raises `BadImage`.
        seed (`int`): Of the order.
        process_index, num_processes (`int`): This process among those that share the source.
        block_size (`int`): Encoded images that a worker holds and shuffles at a time.
        max_bad_fraction (`float`): Fraction of bad images above which a worker stops.
        bad_sample_log (`Path`, *optional*): The file that all workers append bad images to.

    Raises:
        ValueError: while iterating, when more than `max_bad_fraction` of a worker's images are bad, once it has seen
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
        bad_sample_log=None,
    ):
        self.source, self.make_views, self.seed = source, make_views, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.block_size, self.max_bad_fraction, self.bad_sample_log = block_size, max_bad_fraction, bad_sample_log
        self.order = (seed, block_size, source.fingerprint)  # what the order of the images depends on
        self.begin(epoch=0)

    def begin(self, epoch: int, num_rows: int = 0):
        """The next iteration starts in this epoch, each worker `num_rows` of its own rows into it."""
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
        """Where this worker is: after the sample that it gave last."""
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

    def _read(self, worker: int, num_workers: int):
        dataset, state = self.source.dataset, self._state
        strategy = "shards" if self.source.num_shards >= num_workers else "examples"
        if strategy == "examples" and worker == 0:
            logger.warning(
                "%s has %d shards for %d workers: every worker reads everything and keeps its rows of it",
                self.source.name, self.source.num_shards, num_workers,
            )  # fmt: skip
        bad, line, num_empty = [], "", 0
        reported = {hash(known) for known in bad_sample_lines(self.bad_sample_log)}  # before this run was resumed
        while True:
            epoch = state["epoch"]
            rows = split_dataset_by_node(dataset, rank=worker, world_size=num_workers, strategy=strategy)
            # Shuffles the shards, then assigns them, with this very number as the seed, alike on all workers. It must
            # be said to the split set, which starts at epoch 0 (file order) whatever its parent was told.
            rows.set_epoch(1 + self.seed + 1_000_003 * epoch)
            for block, rows_after in self.source.blocks(rows, state["rows"], self.block_size):
                images = self.source.images(block)
                order = np.random.default_rng((self.seed, epoch, worker, state["block"])).permutation(len(images))
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
                            place["row"] = f"worker {worker}, {state['num_seen']}" if epoch == 0 else "met before"
                        line = bad_sample_line(self.source.name, image, error, **place)
                        if hash(line) not in reported:
                            reported.add(hash(line))
                            bad.append(error.reason)
                            append_line(self.bad_sample_log, line)
                        if state["num_seen"] >= 1000:
                            self._refuse_bad(line, worker, num_workers)
                        continue
                    yield {"views": torch.as_tensor(views), "bad": bad, "image": image_name(image)}
                    bad = []
                state["num_rows"] += len(images)
                state |= {"rows": rows_after, "block": state["block"] + 1, "offset": 0}
            num_empty = 0 if state["num_rows"] else num_empty + 1
            if num_empty == _MAX_EMPTY_EPOCHS:  # or it would spin for ever
                raise ValueError(
                    f"{self.source.name} has no rows for worker {worker} of {num_workers}; start fewer processes, or "
                    "lower dataloader_num_workers"
                )
            if state["num_seen"] and (epoch == 0 or state["num_bad"] == state["num_seen"]):
                self._refuse_bad(line, worker, num_workers)
            state |= {"epoch": epoch + 1, "rows": None, "block": 0, "offset": 0, "skip": 0}
            state |= {"pass_length": state["num_rows"], "num_rows": 0}

    def _refuse_bad(self, last: str, worker: int, num_workers: int):
        num_bad, num_seen = self._state["num_bad"], self._state["num_seen"]
        if num_bad == num_seen:
            bad, of_worker, fix = json.loads(last), "", ""
            if num_workers > 1:
                of_worker = f" of worker {worker} of {num_workers}"
                fix = "; use fewer workers, if other rows are good"
            raise ValueError(
                f"{self.source.name} has no usable image: {bad['reason']}, {bad['detail']} "
                f"({bad['path'] or bad['sha256']}, the last of {num_seen} rows{of_worker}){fix}"
            )
        refuse_bad(
            source_name=self.source.name,
            num_bad=num_bad,
            num_seen=num_seen,
            max_bad_fraction=self.max_bad_fraction,
            last=last,
            log=self.bad_sample_log,
        )


def mean_and_std(stream: ViewStream, num_images: int = 1000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Mean and standard deviation of each channel of the views, in [0, 1], over the first images of a stream: to four
    decimals, of arrays to four digits, as they may use a small part of their range.
    """
    count, total, squares = 0, 0.0, 0.0
    for sample in itertools.islice(stream, num_images):
        if count and stream.state_dict()["epoch"] > 0:
            break
        views = sample["views"]
        is_array = views.dtype != torch.uint8
        pixels = views.double().div(1 if is_array else 255).transpose(0, 1).flatten(1)  # (C, pixels of all views)
        count, total, squares = count + pixels.shape[1], total + pixels.sum(1), squares + pixels.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if std.min() < (1e-6 if is_array else 1e-3):
        raise ValueError(
            f"the standard deviations are {std.tolist()}: channel {int(std.argmin())} is the same everywhere, and the "
            "normalization would divide by 0; give image_mean and image_std, with 1 for that channel"
        )
    rounded = (lambda x: float(f"{x:.4g}")) if is_array else (lambda x: round(x, 4))
    return tuple(map(rounded, mean.tolist())), tuple(map(rounded, std.tolist()))
