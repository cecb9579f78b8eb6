"""Agreement of predictions with what came true: correlations and slopes, for many weightings of the pairs at once.

Weights that count how often a bootstrap has drawn each pair give the statistic of every resample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def correlation_and_slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlation and slope of y over x along the last axis; NaN where either is constant.

    Args:
        x, y: ``[..., K]``.
        weights: ``[..., K]``.
    """
    total = weights.sum(-1, keepdims=True)
    x = x - (weights * x).sum(-1, keepdims=True) / total
    y = y - (weights * y).sum(-1, keepdims=True) / total
    xx, xy, yy = ((weights * product).sum(-1) for product in (x * x, x * y, y * y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return xy / np.sqrt(xx * yy), xy / xx


def pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation, as `correlation_and_slope`."""
    return correlation_and_slope(x, y, weights)[0]


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation of the ranks."""
    return pearson(_ranks(x, weights), _ranks(y, weights), weights)


def slope_through_origin(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The slope of y over x of a line through the origin, Σ xy/Σ x²."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights * x * y).sum(-1) / (weights * x * x).sum(-1)


def ratio_of_means(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ y/Σ x."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights * y).sum(-1) / (weights * x).sum(-1)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Where each value stands among weights-many copies of each; equal ones share the mean of their ranks."""
    unique, place = np.unique(values, return_inverse=True)
    if len(unique) == len(values):
        counts = weights[..., np.argsort(values)]
    else:
        counts = np.apply_along_axis(lambda row: np.bincount(place, row, len(unique)), -1, weights)
    return (np.cumsum(counts, -1) - (counts + 1) / 2)[..., place]
