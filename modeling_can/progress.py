"""What a run says while it works."""

import contextlib
import sys

from tqdm.auto import tqdm


def tell(text: str = ""):
    """A line for the user at once, above a bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


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


def outlive_full_logs():
    """For a program: whatever is printed in it, by any library, raises no `OSError`."""
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
