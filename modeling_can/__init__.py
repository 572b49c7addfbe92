"""CAN (arXiv 2210.16870) for transformers: importing this package registers it with the Auto classes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .api import embed, evaluate, pretrain
    from .registration import CANConfig, CANForImageClassification, CANForPreTraining, CANModel, CANPreTrainedModel

__all__ = [
    "CANConfig",
    "CANForImageClassification",
    "CANForPreTraining",
    "CANModel",
    "CANPreTrainedModel",
    "embed",
    "evaluate",
    "pretrain",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`pretrain`, `evaluate` and `embed` on demand: they need more packages than the models do."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in ("embed", "evaluate", "pretrain"):
        from . import registration as home
    else:
        from .progress import quiet

        with quiet():
            from . import api as home

    return getattr(home, name)


def _is_our_command() -> bool:
    """Whether this process is `modeling-can`, `python -m modeling_can` or a script of the checkout."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name == "-m":  # so it is called while Python looks for the module
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    is_script = program.stem in ("run_pretraining", "run_eval")
    return program.stem == "modeling-can" or (is_script and program.resolve().parent == Path(__file__).parents[1])


if not _is_our_command():  # which looks at its command line before it waits seconds for PyTorch
    from . import registration  # noqa: F401
