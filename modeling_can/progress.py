"""What a run says while it works."""

import contextlib
import re
import sys

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


__all__ = ["Unfailing", "duration", "quiet", "report_errors", "tell"]


def tell(text: str = ""):
    """A line for the user at once, above a bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `3 min`, `40 s`."""
    for unit, size, smaller, parts in (("d", 86_400, "h", 24), ("h", 3600, "min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size * parts / size)} {smaller}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class Unfailing:
    """A stream, as of a log, that drops what cannot be written: a full disk under a log ends no run."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def report_errors(program: str, advice: str = ""):
    """For a program: what the user can fix ends it in one sentence, with status 1; and a full log does not end it."""
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        # Of an error in a loader's worker, what it says, without the traceback that torch puts around it.
        text = re.split(r"^[A-Za-z]*Error: ", str(error), flags=re.MULTILINE)[-1].strip()
        sys.exit(f"{program}: {text}")
    except RuntimeError as error:
        if not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        sys.exit(f"{program}: another process of this run died, or cannot be reached: {error}\n{advice}".rstrip())


@contextlib.contextmanager
def quiet():
    """No words of transformers about a torchvision that this project does without, or weights that are not used."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
