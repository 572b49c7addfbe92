"""The random generators of this process: their state, and work between two steps that leaves it alone."""

import contextlib
import random

import numpy as np
import torch


__all__ = ["interlude", "rng_state", "set_rng_state"]


@contextlib.contextmanager
def interlude():
    """
    Around a probe or a figure between two steps: random numbers drawn inside change nothing that is drawn after it,
    and compiled modules run uncompiled, because other shapes would be compiled anew.
    """
    state = rng_state()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        set_rng_state(state)


def rng_state() -> dict:
    """The state of every random generator of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_rng_state(state: dict):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
