"""Does the training data predict the test loss? Train, leave-one-out and test loss over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vlearn._extras import require
from vlearn.plot.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, new_axes, tidy
from vlearn.record import MemoryMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOO_STYLES = [(BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v")]


def generalization(
    memory: MemoryMap | None = None,
    *,
    steps: Any = None,
    train_loss: Any = None,
    loo_loss: Any = None,
    test_loss: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw train, leave-one-out and test loss over training steps.

    Args:
        memory: a record whose sweeps are averaged over their examples; or None, and give the arrays.
        steps: ``[S]`` training steps.
        train_loss: ``[S]`` mean loss on the training data at the posterior mean, in the loss's units.
        loo_loss: ``[S]`` mean leave-one-out loss; or a mapping from a curve's name to ``[S]``, to compare
            several estimates of one training run.
        test_loss: ``[S]`` mean test loss.
        ax: where to draw; default a new figure.

    Returns:
        The axes; the loss is on a log scale if it spans more than a factor of 20.

    Raises:
        ValueError: if the record has no sweep, nothing is given, lengths differ, or two curves share a name.
    """
    if memory is not None:
        swept = np.flatnonzero(memory.kinds == "sweep")
        if len(swept) == 0:
            raise ValueError("memory holds no sweep, but its losses come from there: call memory.record_sweep.")
        steps = memory.steps[swept]
        train_loss = _row_means(memory.column("loss"), swept) if train_loss is None else train_loss
        loo_loss = _row_means(memory.column("loo_loss"), swept) if loo_loss is None else loo_loss
        test_loss = memory.test_loss[swept] if test_loss is None else test_loss
    if not isinstance(loo_loss, Mapping):
        loo_loss = {"leave-one-out (no test data)": loo_loss}
    for name in {"train", "test"} & loo_loss.keys():
        raise ValueError(f"loo_loss has a curve {name!r}, but that is the {name} loss's own name: choose another.")
    steps = np.asarray(steps)
    curves = [("train", train_loss, {"color": GREY, "linewidth": 1.8, "linestyle": (0, (4, 2))})]
    curves.append(("test", test_loss, {"color": INK, "linewidth": 2.2}))
    for number, (name, loss) in enumerate(loo_loss.items()):
        color, marker = LOO_STYLES[number % len(LOO_STYLES)]
        look = {
            "color": color,
            "marker": marker,
            "markersize": 6,
            "markeredgecolor": "white",
            "linewidth": 1.8,
        }
        curves.append((name, loss, look | {"markevery": max(1, len(steps) // 25)}))
    values = {name: _finite(name, loss, steps) for name, loss, _ in curves if loss is not None}
    values = {name: loss for name, loss in values.items() if np.isfinite(loss).any()}
    if not values:
        raise ValueError("There is no loss to draw: give a memory with sweeps, or steps and one of the losses.")

    ax = new_axes(7.0, 4.2) if ax is None else ax
    for name, _, look in curves:
        if name in values:
            ax.plot(steps, values[name], label=name, **look)
    tidy(ax, "training step", "mean loss")
    _scale(ax, values)
    # The legend lists the curves in the order in which they end, top to bottom.
    handles = {line.get_label(): line for line in ax.get_lines()}
    ended = sorted(values, key=lambda name: values[name][np.isfinite(values[name])][-1], reverse=True)
    ax.legend([handles[name] for name in ended], ended, frameon=False, fontsize=10, labelcolor=INK)
    return ax


def _row_means(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean over the examples seen, one row in memory at a time."""
    means = np.full(len(rows), np.nan)
    for place, row in enumerate(rows):
        seen = column[row][~np.isnan(column[row])]
        if len(seen):
            means[place] = seen.mean(dtype=np.float64)
    return means


def _finite(name: str, loss: Any, steps: np.ndarray) -> np.ndarray:
    loss = np.array(loss, dtype=np.float64)
    if steps.ndim != 1 or loss.shape != steps.shape:
        raise ValueError(
            f"{name} loss has shape {list(loss.shape)}, but steps has {list(steps.shape)}: give one value per step."
        )
    loss[~np.isfinite(loss)] = np.nan
    return loss


def _scale(ax: Axes, values: dict[str, np.ndarray]) -> None:
    positive = np.concatenate([loss[loss > 0] for loss in values.values()])
    span = positive.max() / positive.min() if len(positive) else 1.0
    if span > 20:
        ax.set_yscale("log", nonpositive="mask")
        ticker = require("matplotlib.ticker", "plot")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if span < 1e3 else (1,)))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    elif span > 2:
        # Zero becomes the lower end without fixing the limits, which other panels may share.
        ax.update_datalim([(ax.dataLim.x0, 0.0)])
        for line in ax.get_lines():
            line.sticky_edges.y.append(0.0)
        ax.autoscale_view()
