"""Metrics as `evaluate.Metric`, in the package: `evaluate.load` would fetch each from the Hub at run time."""

import datasets
import evaluate
import numpy as np


__all__ = ["Accuracy"]


class Accuracy(evaluate.Metric):
    """
    `compute(predictions=..., references=...)` of class indices -> `{"accuracy", "mean_per_class_accuracy"}`, in
    [0, 1]. The second is the mean of the accuracy on each class of the references, however many images it has.
    """

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)  # or it writes every prediction into a file of its cache

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 accuracy, over images and over classes.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        references = np.asarray(references)
        right = np.asarray(predictions) == references
        classes = [right[references == label].mean() for label in np.unique(references)]
        return {"accuracy": float(right.mean()), "mean_per_class_accuracy": float(np.mean(classes))}
