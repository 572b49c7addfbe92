"""What a run says while it works."""

import contextlib
import re
import sys
from collections.abc import Iterable

from tqdm.auto import tqdm


__all__ = ["INSTALL", "LINE_SECONDS", "duration", "progress_bar", "quiet", "report_errors", "tell"]

INSTALL = (
    'pip install -e ".[{}]" -c constraints.txt'  # of an extra, from a checkout: the fix where a package is missing
)
LINE_SECONDS = 30  # between lines of progress where there is no terminal


def tell(text: str = ""):
    """A line for the user at once, above a bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def progress_bar(
    iterable: Iterable | None = None,
    description: str = "",
    total: int | None = None,
    *,
    initial: int = 0,
    unit: str = "it",
    is_shown: bool = True,
    lines: bool = False,
    delay: float = 0,
) -> tqdm:
    """
    A bar on stderr, where that is a terminal.

    Args:
        initial (`int`): How many of `total` are done already.
        unit (`str`): In the plural.
        is_shown (`bool`): `False` on all processes but one.
        lines (`bool`): Whether there is a line every half minute where there is no terminal.
        delay (`float`): Seconds before the bar appears.
    """
    options = {"dynamic_ncols": True, "disable": not is_shown, "delay": delay}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"
        if total is None and not hasattr(iterable, "__len__"):
            line = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}{postfix}"
        options = {"file": _Lines(), "bar_format": line, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
        options |= {"delay": LINE_SECONDS, "disable": not (is_shown and lines)}
    return tqdm(iterable, description, total, initial=initial, unit=f" {unit}", **options)


class _Lines:
    """A file for tqdm: what it would write over and over becomes a line each time."""

    def write(self, text: str):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `3 min`, `40 s`."""
    for unit, size, smaller, parts in (("d", 86_400, "h", 24), ("h", 3600, "min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size * parts / size)} {smaller}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


class _Unfailing:
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
    """
    For a program: what the user can fix ends it in one sentence, with status 1, and Ctrl-C in one line, with status
    130, as shells expect it; and a full log does not end it.
    """
    sys.stdout, sys.stderr = _Unfailing(sys.stdout), _Unfailing(sys.stderr)
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        # Of an error in a loader's worker, what it says, without the traceback that torch puts around it.
        text = re.split(r"^[A-Za-z]*Error: ", str(error), flags=re.MULTILINE)[-1].strip()
        sys.exit(f"{program}: {text}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{program}: stopped by Ctrl-C\n")
        sys.exit(130)
    except RuntimeError as error:
        if not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        sys.exit(f"{program}: another process of this run died, or cannot be reached: {error}\n{advice}".rstrip())


@contextlib.contextmanager
def quiet():
    """No words of transformers about a torchvision that this project does without, or weights that are not used."""
    from transformers.utils import logging as transformers_logging  # slow, and a command says first what it will do

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
