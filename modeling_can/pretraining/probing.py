"""What the features are worth, on labeled images, before, during and after a run."""

import torch
from accelerate import Accelerator

from ..evaluation.features import raw_pixels
from ..evaluation.probe import Probe
from ..progress import tell
from ..random_state import interlude
from .builders import Trained


__all__ = ["START", "TRAINED", "UNTRAINED", "Probing"]

# What a run begins with, which is new weights or those of another model; and what it ends with
UNTRAINED, START, TRAINED = "untrained encoder", "the start", "CAN, pre-trained"


class Probing:
    """
    Args:
        probe (`Probe`, *optional*): On the main process.
        is_warm (`bool`): Whether the run began from the weights of another model.
    """

    def __init__(self, probe: Probe | None, trained: Trained, accelerator: Accelerator, is_warm: bool):
        self.probe, self.trained, self.accelerator, self.is_warm = probe, trained, accelerator, is_warm

    def baselines(self) -> dict[str, dict | None]:
        """What training is compared with, by name; on the main process, called by all."""
        found = {}
        measures = {"raw pixels": self._raw_pixels, START if self.is_warm else UNTRAINED: self.encoder}
        for name, measure in measures.items():
            if self.accelerator.is_main_process:
                tell(f"measuring {name}, to compare with: k-NN and linear probe ...")
            found[name] = measure()
        return found

    def _raw_pixels(self) -> dict | None:
        return self.probe.measure(raw_pixels) if self.accelerator.is_main_process else None

    def encoder(self, linear: bool = True) -> dict | None:
        """k-NN and linear probe of the encoder as it is; on the main process, called by all."""
        with interlude():
            whole = self.trained.in_one_piece()
            if not self.accelerator.is_main_process:
                return None
            whole.eval()
            device = self.accelerator.device
            accuracy = self.probe.measure(lambda pixels: whole.can(pixels.to(device)).pooler_output, linear)
            whole.train()
            return accuracy

    def knn(self) -> float:
        """Alike on all processes, called by all."""
        own = (self.encoder(linear=False) or {"knn": 0.0})["knn"]
        return self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device), "sum").item()
