"""Do predicted removals come true? One point an example: the rise of its loss by retraining over the predicted one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlearn.plot.style import BLUE, GREY, INK, VERMILLION, new_axes, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def removals(check: Any = None, *, predicted: Any = None, retrained: Any = None, ax: Axes | None = None) -> Axes:
    """Scatter the changes of losses by retraining over those that were predicted, beside the line on which they agree.

    Args:
        check: what `vlearn.check_removals` gave; or None, and give the arrays.
        predicted: ``[K]`` predicted rise of each removed example's loss.
        retrained: ``[K]`` its rise by training on without it.
        ax: where to draw; default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if nothing is given, or the lengths differ.
    """
    if check is not None:
        predicted, retrained = check.predicted, check.retrained
    if predicted is None or retrained is None:
        raise ValueError("predicted or retrained is missing: give a check, or both arrays.")
    x, y = (np.asarray(values, dtype=np.float64) for values in (predicted, retrained))
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(
            f"predicted has shape {list(x.shape)}, but retrained has {list(y.shape)}: give one of each for an example."
        )
    ax = new_axes(5.2, 4.6) if ax is None else ax
    ends = np.array([min(0.0, x.min()), x.max()])
    ax.plot(ends, ends, color=GREY, linewidth=1.6, linestyle=(0, (4, 2)), label="as predicted")
    slope = (x @ y) / (x @ x) if x.any() else np.nan
    ax.plot(ends, slope * ends, color=VERMILLION, linewidth=1.8, label=f"slope {slope:.2f}")
    ax.scatter(x, y, s=16, color=BLUE, alpha=0.6, linewidths=0)
    tidy(ax, "predicted rise of its loss without the example", "rise after retraining")
    ax.legend(frameon=False, fontsize=10, labelcolor=INK)
    return ax
