"""Agreement of predictions with the truth: correlations and the slope, with their bootstrap intervals."""

from __future__ import annotations

import numpy as np

RESAMPLED = 2000


def agreement(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Pearson correlation, and slope of the truth over the prediction: below 1 where too much is predicted."""
    correlation, slope = _agreement(predicted, truth, np.ones(len(truth)))
    return float(correlation), float(slope)


def spearman(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Pearson correlation of the ranks."""
    return float(_spearman(predicted, truth, np.ones(len(truth))))


def with_intervals(predicted: np.ndarray, truth: np.ndarray, seed: int = 0) -> dict[str, list[float]]:
    """Pearson correlation, slope and Spearman correlation, each with its 95% percentile bootstrap interval.

    Returns:
        [value, low, high] of "pearson", "slope" and "spearman"; the bootstrap is over the examples.
    """
    count = len(truth)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLED).astype(float)
    weights = np.concatenate([np.ones((1, count)), drawn])
    pearson, slope = _agreement(predicted, truth, weights)
    measures = {"pearson": pearson, "slope": slope, "spearman": _spearman(predicted, truth, weights)}
    return {name: [values[0], *np.nanquantile(values[1:], (0.025, 0.975))] for name, values in measures.items()}


def _agreement(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation and slope of y over x along the last axis; NaN where either is constant."""
    total = weights.sum(-1, keepdims=True)
    x = x - (weights * x).sum(-1, keepdims=True) / total
    y = y - (weights * y).sum(-1, keepdims=True) / total
    xx, xy, yy = ((weights * product).sum(-1) for product in (x * x, x * y, y * y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return xy / np.sqrt(xx * yy), xy / xx


def _spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _agreement(_ranks(x, weights), _ranks(y, weights), weights)[0]


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Where each value stands among weights-many copies of each; equal ones share the mean of their ranks."""
    unique, place = np.unique(values, return_inverse=True)
    if len(unique) == len(values):
        counts = weights[..., np.argsort(values)]
    else:
        counts = np.apply_along_axis(lambda row: np.bincount(place, row, len(unique)), -1, weights)
    return (np.cumsum(counts, -1) - (counts + 1) / 2)[..., place]
