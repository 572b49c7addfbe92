"""The log of images that cannot be used: one line of JSON for each, appended by all workers."""

import hashlib
import json
from pathlib import Path


__all__ = ["BadImage", "append_line", "bad_sample_line", "bad_sample_lines", "refuse_bad"]


class BadImage(ValueError):
    """
    An image that cannot be used. `reason` is one of a few, to be counted. The message is `fault`, which says more, and
    the advice on the settings of pre-training, if there is any.
    """

    def __init__(self, reason: str, fault: str, advice: str = ""):
        super().__init__(f"{fault}; {advice}" if advice else fault)
        self.reason, self.fault = reason, fault


def bad_sample_line(source_name: str, image: dict | None, error: BadImage, **place) -> str:
    """The line of the log on a bad image; `place` where it was met, to tell it from others."""
    image = image or {"bytes": None, "path": None}
    record = {"source": source_name, "path": image["path"]}
    record["sha256"] = hashlib.sha256(image["bytes"]).hexdigest() if image["bytes"] else None
    return json.dumps({**record, **place, "reason": error.reason, "detail": str(error)})


def append_line(log: Path | None, line: str):
    if log is not None:
        Path(log).parent.mkdir(parents=True, exist_ok=True)  # on another machine perhaps not yet there
        with open(log, "a") as file:  # in one write, so that the workers' lines do not mix
            file.write(line + "\n")


def refuse_bad(source_name, num_bad: int, num_seen: int, max_bad_fraction: float, last: str, log: Path | None):
    """`ValueError` where the fraction of bad images is above the limit; `last` is the log's line on one of them."""
    if num_bad > max_bad_fraction * num_seen:
        raise ValueError(
            f"{num_bad} of {num_seen} images of {source_name} are bad, more than max_bad_fraction={max_bad_fraction}; "
            f"fix them ({log or 'the bad-sample log'} lists them), or raise --max_bad_fraction. The last: {last}"
        )


def bad_sample_lines(log: Path | None) -> list[str]:
    """The lines of a log, each once: two workers may have met the same image in different epochs."""
    if log is None or not Path(log).exists():
        return []
    return list(dict.fromkeys(Path(log).read_text().splitlines()))
