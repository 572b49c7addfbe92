"""The log of images that cannot be used: one line of JSON for each, appended by all readers."""

import hashlib
import json
from pathlib import Path

from .decoding import BadImage


__all__ = ["append_line", "ledger_line", "ledger_lines", "refuse_bad"]


def ledger_line(source_name: str, image: dict | None, error: BadImage, **place) -> str:
    """What the ledger says of a bad image; `place` where it was met, to tell it from others."""
    image = image or {"bytes": None, "path": None}
    record = {"source": source_name, "path": image["path"]}
    record["sha256"] = hashlib.sha256(image["bytes"]).hexdigest() if image["bytes"] else None
    return json.dumps({**record, **place, "reason": error.reason, "detail": str(error)})


def append_line(ledger: Path | None, line: str):
    if ledger is not None:
        Path(ledger).parent.mkdir(parents=True, exist_ok=True)  # on another machine perhaps not yet there
        with open(ledger, "a") as file:  # in one write, so that the readers' lines do not mix
            file.write(line + "\n")


def refuse_bad(source_name, num_bad: int, num_seen: int, max_bad_fraction: float, last: str, ledger: Path | None):
    """`ValueError` where the share of bad images is above the limit; `last` is the ledger's line of one of them."""
    if num_bad > max_bad_fraction * num_seen:
        raise ValueError(
            f"{num_bad} of {num_seen} images of {source_name} are bad, more than max_bad_fraction={max_bad_fraction}; "
            f"fix them ({ledger or 'the ledger'} lists them), or raise --max_bad_fraction. The last: {last}"
        )


def ledger_lines(ledger: Path | None) -> list[str]:
    """The lines of a ledger, each once: two readers may have met the same image in different epochs."""
    if ledger is None or not Path(ledger).exists():
        return []
    return list(dict.fromkeys(Path(ledger).read_text().splitlines()))
