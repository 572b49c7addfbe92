"""What accelerate must know, or forget, before the processes of a run meet."""

import os

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState


__all__ = ["check_processes", "forget_settings"]


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
