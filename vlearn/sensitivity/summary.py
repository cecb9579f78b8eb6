"""Per-example columns as a handful of plain floats, which every logger takes as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

STATISTICS: dict[str, Callable[[np.ndarray], np.floating]] = {
    "mean": np.mean,
    "q50": lambda rows: np.quantile(rows, 0.5),
    "q95": lambda rows: np.quantile(rows, 0.95),
    "max": np.max,
}


def summarize(
    means: Mapping[str, Tensor | None], distributions: Mapping[str, Tensor | None], prefix: str
) -> dict[str, float]:
    """Mean of some columns; mean, median, 95% quantile and maximum of others; and how many rows are finite.

    No row is left out: a column with a NaN has NaN for each of its statistics, and one with an infinity has NaN for
    those that the infinity reaches.

    Args:
        means: ``[N]`` columns by name, None where a column was not asked for; the key of the mean is the name.
        distributions: ``[N]`` columns by name, None likewise; the keys are the name and ``_mean``, ``_q50``, ``_q95``
            and ``_max``.
        prefix: put before every key.

    Returns:
        Floats by key, finite or NaN; ``num_examples`` and ``num_nonfinite`` among them.
    """
    columns = {
        name: column.detach().cpu().double().numpy()
        for name, column in {**means, **distributions}.items()
        if column is not None
    }
    finite = np.all([np.isfinite(rows) for rows in columns.values()], axis=0)
    summary = {"num_examples": len(finite), "num_nonfinite": np.count_nonzero(~finite)}
    with np.errstate(invalid="ignore"):  # infinities of both signs
        for name, rows in columns.items():
            keys = {name: np.mean} if name in means else {f"{name}_{key}": of for key, of in STATISTICS.items()}
            summary |= {key: statistic(rows) if len(rows) else math.nan for key, statistic in keys.items()}
    return {prefix + key: float(value) if np.isfinite(value) else math.nan for key, value in summary.items()}


def row_norms(rows: Tensor | None) -> Tensor | None:
    """Euclidean norms ``[N]`` of rows ``[N, ...]``, in the rows' units; None for None."""
    return None if rows is None else rows.reshape(len(rows), math.prod(rows.shape[1:])).norm(dim=1)
