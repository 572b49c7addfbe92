"""
Worker processes that load data: batches from them, a place to resume from, and never a wait without end.
"""

import contextlib
import errno
import logging
import multiprocessing.connection
import multiprocessing.util
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torchdata.stateful_dataloader import StatefulDataLoader


__all__ = [
    "POLL_SECONDS",
    "SHARED_MEMORY",
    "Patient",
    "approximate_position",
    "free_shared_memory",
    "handed_over",
    "outlive_stop_signals",
    "resume",
    "view_loader",
    "worker_options",
    "worker_states",
]


logger = logging.getLogger(__name__)

_PATIENCE = 30 * 60  # seconds without a batch, after which a run gives up; a lost connection is tried again for 10 min
POLL_SECONDS = 5  # how often the workers are looked at while a batch is awaited
SHARED_MEMORY = Path("/dev/shm")
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")  # what a Unix socket's address has room for


# --- Waiting ---------------------------------------------------------------------------------------------------------


def worker_options(num_workers: int) -> dict:
    """
    The options of any `DataLoader` that `Patient` reads.

    Raises:
        ValueError: if TMPDIR is so long that workers could not hand over their batches.
    """
    folder = multiprocessing.util.get_temp_dir() if num_workers else ""
    if len(os.path.dirname(folder)) > _LONGEST_TMPDIR:
        raise ValueError(
            f"TMPDIR={os.path.dirname(folder)} is longer than {_LONGEST_TMPDIR} characters, and loader workers put a "
            "socket there; set TMPDIR to a shorter path, or dataloader_num_workers to 0"
        )
    return {"num_workers": num_workers, "timeout": POLL_SECONDS if num_workers else 0}


class Patient:
    """
    The batches of a `DataLoader` with `worker_options`, with an error in place of a wait without end.

    Args:
        loader (`torch.utils.data.DataLoader`): Its workers start here.
        patience (`float`): Seconds without a batch, after which it is given up.

    Raises:
        TimeoutError: while iterating, after so long without a batch.
        OSError: while iterating, when a worker died or could not hand over its batch.
    """

    def __init__(self, loader, patience: float = _PATIENCE):
        others, self.patience = set(multiprocessing.active_children()), patience
        try:
            self.batches = iter(loader)
        except OSError as error:
            raise _shared_memory_error(error) or error from error
        self.workers = [child for child in multiprocessing.active_children() if child not in others]

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        began = time.monotonic()
        while True:
            try:
                return next(self.batches)
            except StopIteration:
                raise
            except Exception as error:
                if dead := self._dead(error):
                    raise OSError(dead) from error
                if full := _shared_memory_error(error):
                    raise full from error
                if "DataLoader timed out" not in str(error):  # after POLL_SECONDS, not for the first time perhaps
                    raise
                if time.monotonic() - began > self.patience:
                    raise TimeoutError(
                        f"no batch came from {len(self.workers)} loader workers for {self.patience:.0f} s, though they"
                        f" live; look at the disk or server that the images come from, at {SHARED_MEMORY} "
                        f"({free_shared_memory() / 1e6:.0f} MB free), and at what the workers printed"
                    ) from error

    def _dead(self, error: Exception) -> str | None:
        """How a worker ended, if one did; its end shows a moment later than the connection that broke."""
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD, which may come in between
            if isinstance(error, ConnectionError | EOFError):
                ended = multiprocessing.connection.wait([worker.sentinel for worker in self.workers], timeout=1)
                for worker in self.workers:
                    if worker.sentinel in ended:
                        worker.join(1)  # its files are closed; its status may yet have to come
        for worker in self.workers:
            if worker.exitcode:
                number = -worker.exitcode
                how = f"was killed by {signal.Signals(number).name}" if number > 0 else f"ended with {-number}"
                hint = " (often because memory ran out)" if how.endswith("SIGKILL") else ""
                return (
                    f"loader worker {worker.pid} {how}{hint}; look at the system's log and at the lines above, or "
                    "lower dataloader_num_workers"
                )
        return None


def _shared_memory_error(error: Exception) -> OSError | None:
    """What to say of an error, of this process or a worker, that a full /dev/shm caused."""
    is_of_a_queue = getattr(error, "errno", None) == errno.ENOSPC and error.filename is None
    if not is_of_a_queue and not any(word in str(error) for word in ("shared memory", "/torch_")):
        return None
    return OSError(
        f"{SHARED_MEMORY} is full, through which loader workers hand over their batches "
        f"({free_shared_memory() / 1e6:.2f} MB free); make it larger (docker run --shm-size=8g), or lower "
        "dataloader_num_workers"
    )


def free_shared_memory() -> float:
    """Bytes; infinite where there is no such file system."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def handed_over(tensor: torch.Tensor) -> torch.Tensor:
    """
    In a worker, moved into shared memory. Else a thread does it later, and an error there, of a full /dev/shm, is lost
    together with the batch.
    """
    return tensor if torch.utils.data.get_worker_info() is None else tensor.share_memory_()


# --- The loader of the trainer ---------------------------------------------------------------------------------------


def _collate(samples: list[dict]) -> dict:
    """Samples -> `{"views": (B, V, C, H, W), "bad": [reason], "images": [name]}`."""
    return {
        "views": handed_over(torch.stack([sample["views"] for sample in samples])),
        "bad": [reason for sample in samples for reason in sample["bad"]],
        "images": [sample["image"] for sample in samples],
    }


def view_loader(stream, batch_size: int, num_workers: int = 0, **options) -> StatefulDataLoader:
    """
    The loader of full batches whose `state_dict()` says where each of its workers is; to be read through `Patient`.

    Args:
        stream (`data.ViewStream`): Where there are fewer images than workers, fewer are started.

    Raises:
        ValueError: if there are fewer images than processes, or as `worker_options`.
    """
    num_images, num_processes = stream.source.num_images(), stream.num_processes
    if num_images is not None and num_images < num_processes:
        raise ValueError(
            f"{stream.source.name} has {num_images} image(s) for {num_processes} processes; start at most as many"
        )
    if num_images is not None and num_images < num_processes * num_workers:
        fewer = num_images // num_processes
        logger.warning(
            "%s has %d image(s) for %d processes with %d loader workers each: %d each are started",
            stream.source.name, num_images, num_processes, num_workers, fewer,
        )  # fmt: skip
        num_workers = fewer
    options = {**worker_options(num_workers), **options}
    with warnings.catch_warnings():  # torchdata calls what torch has deprecated, and a user can do nothing about it
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        return StatefulDataLoader(
            stream, batch_size, collate_fn=_collate, worker_init_fn=outlive_stop_signals, **options
        )


def outlive_stop_signals(worker_id: int):
    """
    In a loader's worker: torchrun, Slurm and a terminal's Ctrl-C signal whole groups of processes, and the training
    process needs its workers until it has saved. SIGTERM is for that process alone to send.
    """

    def end_when_asked():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_asked, daemon=True).start()


# --- Resume ----------------------------------------------------------------------------------------------------------


def resume(loader: StatefulDataLoader, states: list[dict]) -> bool:
    """
    Continues where a run stopped.

    Args:
        loader (`StatefulDataLoader`): From `view_loader`, not iterated yet.
        states (`list[dict]`): `loader.state_dict()` of every process of that run, in the order of their rank.

    Returns:
        Whether the samples will be exactly those of the uninterrupted run. With another number of workers (processes x
        loader workers), seed, block size or set of images they cannot be: the epoch that the slowest worker was in is
        then finished approximately, each worker leaving out as many of its rows as were read on average.
    """
    stream = loader.dataset
    workers = [worker for state in states for worker in worker_states(state)]
    num_workers = stream.num_processes * max(1, loader.num_workers)
    # A checkpoint of an earlier version has no fingerprint of the images.
    same_order = all(worker["order"] == stream.order[: len(worker["order"])] for worker in workers)
    if same_order and len(states) == stream.num_processes and len(workers) == num_workers:
        loader.load_state_dict(states[stream.process_index])
        return True
    epoch, num_rows = approximate_position(workers)
    stream.begin(epoch, round(num_rows / num_workers))
    changed = "" if same_order else ", with another seed, block size or set of images"
    logger.warning(
        "%d workers (processes x loader workers) resume what %d began%s: epoch %d is finished approximately, "
        "from row %d",
        num_workers, len(workers), changed, epoch, num_rows,
    )  # fmt: skip
    return False


def approximate_position(workers: list[dict]) -> tuple[int, int]:
    """The epoch that the slowest worker is in, and how many rows of it all of them have read."""
    epoch = min(worker["epoch"] for worker in workers)
    rows = (r["num_rows"] + r["offset"] if r["epoch"] == epoch else r["pass_length"] or 0 for r in workers)
    return epoch, round(sum(rows))


def worker_states(state) -> list[dict]:
    """The workers' own states, wherever the loader keeps them in its state."""
    if not isinstance(state, dict):
        return []
    if "pass_length" in state:
        return [state]
    return [worker for value in state.values() for worker in worker_states(value)]
