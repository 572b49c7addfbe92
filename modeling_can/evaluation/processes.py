"""What accelerate must know, or forget, before the processes of a run meet."""

import os
import time

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState


__all__ = ["check_processes", "end_training", "forget_settings", "settle"]


def forget_settings():
    """A run before this one in the same process may have had another precision, which accelerate would hold to."""
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)


def check_processes(accelerator: Accelerator):
    """Raises ValueError where processes that were launched together do not know each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, and each takes itself for the only one; on a CPU "
            "set ACCELERATE_USE_CPU=true"
        )


def settle():
    """
    Time for a group's threads, before the group is dropped and after the last thing that went through it: torch 2.13
    waits for them when it drops a gloo group, and holds the GIL, which one of them may still need to let go of that
    last thing. Without it, one run in ten hung at its end.
    """
    time.sleep(0.5)


def end_training(accelerator: Accelerator):
    """Ends trackers and the group of processes."""
    if accelerator.num_processes > 1:
        settle()
    accelerator.end_training()
