"""A labeled set on which the trainer measures features again and again."""

from collections.abc import Callable

import numpy as np
import torch

from .features import Extractor, Images, KeptImages
from .knn import knn_predictions
from .linear import linear_probe
from .scores import bootstrap_interval
from .sets import load_labeled


__all__ = ["Probe"]


class Probe:
    """
    A labeled set on which features are measured again and again.

    Args:
        dataset_name, config_name, train_split, test_split, image_column, label_column: What `load_labeled` takes.
        preprocessor: `preprocessors.Preprocessor` of the processor that is saved with the model, so that users get
            what was measured.
        device (`torch.device`): That looks for the nearest neighbors and fits the linear probe.
    """

    def __init__(
        self,
        dataset_name: str,
        config_name: str | None,
        train_split: str,
        test_split: str,
        image_column: str,
        label_column: str,
        preprocessor,
        device: str | torch.device = "cpu",
    ):
        try:
            self.set = load_labeled(
                dataset_name=dataset_name,
                config_name=config_name,
                train_split=train_split,
                test_split=test_split,
                image_column=image_column,
                label_column=label_column,
                arrays=preprocessor.reads_arrays,
            )
        except ValueError as error:
            message = f"probe_dataset_name={dataset_name}: {error} (here all these names begin with probe_)"
            raise ValueError(message) from error
        self.preprocessor, self.device = preprocessor, device
        self.train, self.test = (
            KeptImages(split, lambda *image: self.preprocessor.decode(*image))
            for split in (self.set.train, self.set.test)
        )

    def measure(self, embed: Callable[[torch.Tensor], torch.Tensor], linear: bool = True) -> dict:
        """
        k-NN (k = 20) and, unless `linear` is off, linear-probe accuracy of what `embed` makes of pixels, as `knn` and
        `linear_probe`; beside each its 95 % interval, as `knn_interval`; and `num_test`, the number of test images.
        """

        def features(images: Images) -> np.ndarray:
            encode = lambda batch: {"features": embed(self.preprocessor.normalize(batch))}  # noqa: E731
            return Extractor()(encode, images)["features"]

        train, test = features(self.train), features(self.test)
        labels, num_classes = self.set.train.labels, len(self.set.class_names)
        predictions = {"knn": knn_predictions(train, labels, test, num_classes, ks=(20,), device=self.device)[20]}
        if linear:
            predictions["linear_probe"] = linear_probe(train, labels, num_classes, device=self.device).predict(test)
        figures = {"num_test": len(self.set.test)}
        for name, predicted in predictions.items():
            right = predicted == self.set.test.labels
            figures |= {name: float(right.mean()), f"{name}_interval": list(bootstrap_interval(right))}
        return figures
