"""Whether an encoder is worth it for the images that it was measured on: one sentence, drawn from intervals."""

import math
from typing import NamedTuple

import numpy as np

from ..hub import short_name
from .protocol import Entry


__all__ = ["ADVISED_BY", "Difference", "MARGIN", "advice", "paired_difference", "sentence"]

ADVISED_BY = {"linear_probe": "linear probe", "knn": "k-NN, k = 20"}  # the first of them that was measured
MARGIN = 0.01  # a gain that is surely below a point is no gain
_SURE, _POWER = 1.96, 0.84  # standard errors of a 95 % interval, and of a power of 80 % beside it


class Difference(NamedTuple):
    """
    Between the accuracies of two models on the same test images, positive where the first is better.

    Args:
        value (`float`): In [-1, 1].
        interval (`(float, float)`): 95 %.
        num_test_needed (`int`): With how many test images an interval would probably tell (power 80 %) that the first
            model is better, or that it gains less than `MARGIN`, if the difference is what it seems.
    """

    value: float
    interval: tuple[float, float]
    num_test_needed: int

    @property
    def verdict(self) -> str:
        """Of the first model: `"better"`, `"worse"`, `"level"` (a gain of `MARGIN` is ruled out) or `"unclear"`."""
        low, high = self.interval
        if low > 0:
            return "better"
        if high < 0:
            return "worse"
        return "level" if high < MARGIN else "unclear"


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """
    Of which test images two models get right, both bool `(N,)`, images in the same order. Pairs give a narrower
    interval than two accuracies: images that are easy or hard for both do not count.

    The interval is that of Agresti and Min (Statistics in Medicine 24, 2005, 729-740), Wald's after half an image is
    added to each of the four outcomes, so that two models that are always right together have one too.
    """
    number = len(ours) + 2
    gained, lost = (ours & ~theirs).sum() + 0.5, (theirs & ~ours).sum() + 0.5
    center = (gained - lost) / number
    deviation = math.sqrt((gained + lost) / number - center**2)
    half = _SURE * deviation / math.sqrt(number)
    to_tell = max(center, MARGIN - center)  # above 0, or below the margin, whichever is nearer to being seen
    return Difference(
        value=float(ours.mean() - theirs.mean()),
        interval=(float(max(center - half, -1)), float(min(center + half, 1))),
        num_test_needed=math.ceil(((_SURE + _POWER) * deviation / to_tell) ** 2),
    )


def advice(entry: Entry) -> dict | None:
    """
    Of a model, once it and its rivals are measured: `text`, the sentence; `task`, what it is drawn from;
    `differences`, to each kind of rival as `Difference`. `None` where no task was measured of both.
    """
    task = next((task for task in ADVISED_BY if task in entry.correct), None)
    correct = {kind: rival.correct[task] for kind, rival in entry.rivals.items() if task in rival.correct}
    if not correct:
        return None
    ours = entry.correct[task]
    differences = {kind: paired_difference(ours, theirs) for kind, theirs in correct.items()}
    start = short_name(entry.rivals["start"].path) if "start" in differences else None
    return {
        "text": sentence(
            name=short_name(entry.path),
            differences=differences,
            num_test=len(ours),
            measure=ADVISED_BY[task],
            start=start,
        ),
        "task": task,
        "differences": {kind: difference._asdict() for kind, difference in differences.items()},
    }


def sentence(
    name: str, differences: dict[str, Difference], num_test: int, measure: str, start: str | None = None
) -> str:
    """
    What to do about a model.

    Args:
        name (`str`), start (`str`, *optional*): What it is called, and what its run began from.
        differences (`dict[str, Difference]`): To one or more of `"pixels"`, `"untrained"` and `"start"`.
        num_test (`int`): The number of test images.
        measure (`str`): Of what the accuracies are.
    """
    called = {"pixels": "raw pixels", "untrained": "an untrained encoder", "start": f"the start ({start})"}
    nearest = sorted(differences, key=lambda kind: differences[kind].value)

    def first(*verdicts: str, among: tuple[str, ...] = tuple(called)) -> str | None:
        return next((kind for kind in nearest if kind in among and differences[kind].verdict in verdicts), None)

    def compared(rival: str) -> str:
        low, high = (100 * end for end in differences[rival].interval)
        value = 100 * differences[rival].value
        return f"{measure} {value:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"

    def theirs(rival: str) -> str:
        relation = "better than" if differences[rival].verdict == "worse" else "as good as"
        return f"{called[rival]} {'are' if rival == 'pixels' else 'is'} {relation} {name} ({compared(rival)})"

    if rival := first("worse", "level", among=("start",)):
        return f"Keep the weights that the run began with: {theirs(rival)}"
    if rival := first("worse", "level"):
        return f"Not worth it yet: {theirs(rival)}; pre-train longer or on more images, or take other weights"
    if rival := first("unclear"):
        needed = float(f"{differences[rival].num_test_needed:.2g}")
        return (
            f"Not known yet: {num_test:,} test images cannot tell {name} from {called[rival]} ({compared(rival)}); "
            f"about {needed:,.0f} would"
        )
    *others, last = (called[kind] for kind in called if kind in differences)
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"Worth it: {name} is better than {listed}; over {called[nearest[0]]}, {compared(nearest[0])}"
