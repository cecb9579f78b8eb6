"""Agreement of predictions with the truth: correlations and the slope, with their bootstrap intervals."""

from __future__ import annotations

import numpy as np

from vlearn.sensitivity.agreement import correlation_and_slope
from vlearn.sensitivity.agreement import spearman as weighted_spearman

RESAMPLED = 2000


def agreement(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Pearson correlation, and slope of the truth over the prediction: below 1 where too much is predicted."""
    correlation, slope = correlation_and_slope(predicted, truth, np.ones(len(truth)))
    return float(correlation), float(slope)


def spearman(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Pearson correlation of the ranks."""
    return float(weighted_spearman(predicted, truth, np.ones(len(truth))))


def with_intervals(predicted: np.ndarray, truth: np.ndarray, seed: int = 0) -> dict[str, list[float]]:
    """Pearson correlation, slope and Spearman correlation, each with its 95% percentile bootstrap interval.

    Returns:
        [value, low, high] of "pearson", "slope" and "spearman"; the bootstrap is over the examples.
    """
    count = len(truth)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLED).astype(float)
    weights = np.concatenate([np.ones((1, count)), drawn])
    pearson, slope = correlation_and_slope(predicted, truth, weights)
    measures = {"pearson": pearson, "slope": slope, "spearman": weighted_spearman(predicted, truth, weights)}
    return {name: [values[0], *np.nanquantile(values[1:], (0.025, 0.975))] for name, values in measures.items()}
