"""Stop signals: a run that is asked to stop saves first."""

import collections
import contextlib
import math
import signal
import threading
import time

import torch

from ..evaluation.processes import settle


__all__ = ["StopSignals", "StoppedWaiting"]


_GRACE_SECONDS = 5  # that a batch may still take after a stop signal
_CAUGHT = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
_HAS_TIMER = hasattr(signal, "setitimer")  # neither it nor SIGUSR1 is on Windows, where a wait for data is not ended


class StoppedWaiting(Exception):
    """A stop signal came while data were awaited, and they did not come."""


class StopSignals(contextlib.AbstractContextManager):
    """
    While open, SIGTERM, SIGUSR1 (Slurm before it takes a job away) and SIGINT do not end the process but are
    remembered, so that the loop can save first. A second SIGINT is not caught; the others come in twos where both
    Slurm and the launcher send them. A wait for data that goes on after a signal ends in `StoppedWaiting`.

    Args:
        reduce (callable, *optional*):
            Sums a tensor over the processes, without waiting for the device; `None` where there is but one.
        device (`torch.device`): Of that tensor.
    """

    def __init__(self, reduce, device):
        self.reduce, self.device, self.received, self.asked = reduce, device, None, collections.deque()
        self.waiting_since = math.inf

    def __enter__(self):
        # Python delivers signals to the main thread alone. In another one, of an app or a server, they are not ours.
        is_main = threading.current_thread() is threading.main_thread()
        self.previous = {number: signal.signal(number, self._remember) for number in _CAUGHT if is_main}
        if is_main and _HAS_TIMER:
            self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_waiting)
        return self

    def __exit__(self, *_):
        if self.reduce is not None:
            settle()  # also where an error ends the run
        if self.received and _HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        self.received = signal.Signals(number)
        if _HAS_TIMER:
            signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS, _GRACE_SECONDS)
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number])

    @contextlib.contextmanager
    def waiting(self):
        """Around the reading of a batch, which may never come."""
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = math.inf

    def _end_waiting(self, number, frame):
        if time.monotonic() - self.waiting_since >= _GRACE_SECONDS:
            raise StoppedWaiting

    def wanted(self) -> bool:
        """
        Whether to stop after this step, alike on all processes; called by each of them at every step. What they
        answer was asked two steps ago, so that nobody waits for the step that the device is at.
        """
        if self.reduce is None:
            return self.received is not None
        answer = self.reduce(torch.full((), float(self.received is not None), device=self.device))
        event = None
        if answer.is_cuda:  # item() would wait for all that the device has to do, and not only for this
            answer = torch.empty_like(answer, device="cpu", pin_memory=True).copy_(answer, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.asked.append((answer, event))
        if len(self.asked) <= 2:
            return False
        answer, event = self.asked.popleft()
        if event:
            event.synchronize()
        return bool(answer > 0)
