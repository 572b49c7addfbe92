"""Scores and how sure they are."""

from collections.abc import Callable

import numpy as np
import scipy.stats


__all__ = ["bootstrap_interval", "bootstrap_interval_of"]


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


def bootstrap_interval_of(
    statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, seed: int = 0, num_resamples: int = 1000
) -> tuple[float, float]:
    """
    95 % percentile bootstrap interval over images of what is computed from sums over them, as mIoU is from counts of
    pixels. As of `bootstrap_interval`, of a single image it is the value itself; where that is 0 or 1, the interval of
    Clopper and Pearson.

    Args:
        statistic (callable): Sums `(R, ...)` -> values in [0, 1] `(R,)`; NaN where a sum has none.
        counts (`np.ndarray` of shape `(N, ...)`): Of each image.
    """
    value, number = float(statistic(counts.sum(axis=0)[None])[0]), len(counts)
    if number == 1:
        return value, value
    bound = 0.025 ** (1 / number)
    if value == 1:
        return bound, 1.0
    if value == 0:
        return 0.0, 1 - bound
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), num_resamples)
    sums = draws.astype(np.float64) @ counts.reshape(number, -1)
    low, high = np.nanquantile(statistic(sums.reshape(num_resamples, *counts.shape[1:])), (0.025, 0.975))
    return float(low), float(high)
