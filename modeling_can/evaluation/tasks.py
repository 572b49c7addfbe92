"""The tasks there are."""

from .feature_maps import FeatureMaps
from .few_shot import FewShot
from .finetuning import FineTune
from .knn import KNN
from .linear import LinearProbe
from .linear_sgd import LinearProbeSGD
from .protocol import Protocol
from .reconstruction import Reconstruction
from .retrieval import Retrieval
from .robustness import Robustness
from .segmentation import Segmentation


__all__ = ["ALONE", "EMBED", "PROTOCOLS", "TASKS"]

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        KNN(),
        LinearProbe(),
        LinearProbeSGD(),
        FewShot(),
        FineTune(),
        Robustness(),
        Reconstruction(),
        Retrieval(),
        FeatureMaps(),
        Segmentation(),
    )
}
EMBED = "embed"  # which needs no labels, and stands alone: `embed.embed_task`
TASKS = (*PROTOCOLS, EMBED)
ALONE = (EMBED, Segmentation.name)  # tasks of other data
