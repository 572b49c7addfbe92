"""
How the processes of a run find each other, also after the launcher has started them anew (`torchrun --max-restarts`).

torchrun keeps one key-value store for all attempts of a job and no longer sets them apart (torch 2.13,
`torch.distributed.rendezvous._create_c10d_store`; https://github.com/pytorch/pytorch/issues/135712). What the dead
processes left in it, gloo's addresses or NCCL's id, lies under the keys that their successors use: one that is quicker
than the process it waits for reads the address of a dead one, and fails or hangs. `INIT_METHOD` gives each attempt
keys of its own, whatever launcher and rendezvous it has.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout


__all__ = ["INIT_METHOD", "attempt_name"]


INIT_METHOD = "attempt://"  # for `torch.distributed.init_process_group`


def attempt_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """
    A name that all processes of this attempt have in common, and no earlier attempt had. TORCHELASTIC_RESTART_COUNT is
    none: each node counts its own restarts.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"arrived/{rank}", mine)
        name = store.get(mine).decode()  # waits for a first process that has read `mine`, so not for a predecessor
        store.set(f"{name}/{rank}", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    # Some of the arrivals may be those of predecessors: each is answered, until the living have all been heard of.
    while not all(store.check([f"{mine}/{other}"]) for other in range(1, world_size)):
        for other in range(1, world_size):
            store.set(store.get(f"arrived/{other}").decode(), mine)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of the {world_size} processes of the gloo or NCCL group came in {timeout}")
        time.sleep(0.05)
    return mine


def _rendezvous(url: str, timeout: timedelta = default_pg_timeout, **kwargs):
    url = url.replace("attempt:", "env:", 1)  # torch may have added a query, and taken away the slashes
    for store, rank, world_size in dist.rendezvous(url, timeout=timeout, **kwargs):
        yield dist.PrefixStore(attempt_name(store, rank, world_size, timeout), store), rank, world_size


dist.register_rendezvous_handler("attempt", _rendezvous)
