"""Averages of metrics over steps and processes, without waiting for the device at every step."""

import torch


__all__ = ["MetricAverage"]


class MetricAverage:
    """
    Averages named scalars over steps and processes. Scalars stay on their device until `compute`, which is the only
    call that synchronizes, with the device and between processes.

    Args:
        reduce (callable): Sums a tensor over the processes and divides by their number.
    """

    def __init__(self, reduce):
        self.reduce, self.sums, self.num_steps = reduce, {}, 0

    def update(self, metrics: dict[str, torch.Tensor], counts: torch.Tensor | bool = True):
        """Adds the scalars of a step; those of a step that does not count are left out."""
        for name, value in metrics.items():
            value = value.detach().float()
            self.sums[name] = self.sums.get(name, 0) + torch.where(torch.as_tensor(counts), value, 0)
        self.num_steps = self.num_steps + counts

    def state_dict(self) -> tuple[dict[str, torch.Tensor], torch.Tensor | int]:
        """What this process has added up since the last `compute`."""
        return self.sums, self.num_steps

    def load_state_dict(self, state: tuple[dict[str, torch.Tensor], torch.Tensor | int]):
        self.sums, self.num_steps = state

    def compute(self) -> dict[str, float]:
        """The averages since the last call; NaN if no step counted."""
        if not self.sums:
            return {}
        stacked = self.reduce(torch.stack(list(self.sums.values())) / self.num_steps)
        averages = dict(zip(self.sums, stacked.tolist(), strict=True))
        self.sums, self.num_steps = {}, 0
        return averages
