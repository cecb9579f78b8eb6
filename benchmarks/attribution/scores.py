"""How well attributions predict retraining.

The linear datamodelling score (Park et al., 2023, arXiv:2303.14186): each query's loss after training on a subset is
predicted by the sum of the attributions of its examples; Spearman's correlation of predicted and retrained losses over
random subsets of half the examples, averaged over the queries. The loss is a monotone function of the margin
log p/(1 - p), and their gradients differ by a factor of the query, so either measures the same.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESAMPLED = 2000


def subsets(num_data: int, count: int) -> Tensor:
    """Random halves of the examples, ``[count, num_data/2]`` numbers; the first ones are the same for any count."""
    halves = [
        torch.randperm(num_data, generator=torch.Generator().manual_seed(number))[: num_data // 2].sort().values
        for number in range(count)
    ]
    return torch.stack(halves)


def predicted_losses(attributions: Tensor, chosen: Tensor) -> Tensor:
    """What attributions say of each query's loss after training on each subset, up to a constant of the query.

    Args:
        attributions: ``[N, Q]``, positive where the example lowers the query's loss.
        chosen: ``[M, n]`` numbers of the examples of each subset.

    Returns:
        ``[M, Q]``
    """
    masks = torch.zeros(len(chosen), len(attributions), dtype=torch.double)
    masks.scatter_(1, chosen, 1.0)
    return -masks @ attributions.double()


def correlations(predicted: Tensor, retrained: Tensor) -> np.ndarray:
    """Spearman's correlation over the subsets for each query, ``[Q]``; 0 where a prediction is constant.

    Args:
        predicted: ``[M, Q]``
        retrained: ``[M, Q]`` mean over the repeats.
    """
    x, y = (_ranks(each) for each in (predicted, retrained))
    x, y = (each - each.mean(0) for each in (x, y))
    size = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 0)


def with_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Mean over the queries and its 95% percentile bootstrap interval: [value, low, high]."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLED, len(values)))
    return [float(values.mean()), *map(float, np.quantile(values[drawn].mean(1), (0.025, 0.975)))]


def ceiling(retrained: Tensor) -> float:
    """The score of the retrained losses' own expectation, from the agreement of the two halves of the repeats.

    With r the mean correlation of the halves, the mean of all repeats has the reliability 2r/(1 + r) (Spearman-Brown);
    its root is what a perfect prediction would reach.

    Args:
        retrained: ``[M, R, Q]``, R ≥ 2.
    """
    half = retrained.shape[1] // 2
    r = float(correlations(retrained[:, :half].mean(1), retrained[:, half : 2 * half].mean(1)).mean())
    repeats = retrained.shape[1] / half  # halves that the mean of all is made of
    return max(0.0, repeats * r / (1 + (repeats - 1) * r)) ** 0.5


def _ranks(values: Tensor) -> np.ndarray:
    """The rank of each value in its column; equal ones share the mean of their ranks."""
    columns = values.double().numpy()
    ranks = np.empty_like(columns)
    for j, column in enumerate(columns.T):
        unique, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        ranks[:, j] = (np.cumsum(counts) - (counts + 1) / 2)[place]
    return ranks
