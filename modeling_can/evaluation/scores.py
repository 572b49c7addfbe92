"""Scores and how sure they are."""

import numpy as np
import scipy.stats


__all__ = ["bootstrap_interval"]


def bootstrap_interval(scores: np.ndarray, seed: int = 0, num_resamples: int = 1000) -> tuple[float, float]:
    """
    95 % percentile bootstrap interval of the mean of `scores`, one an image; of a single one, itself. Where all are
    right or all are wrong, of which resampling makes no interval at all, that of Clopper and Pearson.
    """
    if len(scores) == 1:
        return float(scores[0]), float(scores[0])
    bound = 0.025 ** (1 / len(scores))
    if np.all(scores == 1):
        return bound, 1.0
    if np.all(scores == 0):
        return 0.0, 1 - bound
    result = scipy.stats.bootstrap(
        (np.asarray(scores, dtype=np.float32),),
        np.mean,
        n_resamples=num_resamples,
        batch=20,  # bounds the memory
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
