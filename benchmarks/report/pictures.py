"""The two pictures that compare methods: predicted and true test loss, predicted and true retraining."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import vlearn  # noqa: E402
from benchmarks.report.agreement import agreement  # noqa: E402
from benchmarks.report.curves import Curves  # noqa: E402
from vlearn.plot.style import BLUE, GREEN, GREY, INK, VERMILLION, tidy  # noqa: E402

IVON, DIAGONAL, KRONECKER, STOPPED = "IVON", "Laplace, diagonal", "Laplace, Kronecker", "K-FAC, stopped"
LOOKS = {
    IVON: (BLUE, "o"),
    DIAGONAL: (VERMILLION, "s"),
    KRONECKER: (GREEN, "^"),
    "K-FAC, to the end": (GREY, "s"),
    STOPPED: (GREEN, "s"),
    "EK-FAC, to the end": (GREY, "^"),
    "EK-FAC, stopped": (BLUE, "^"),
}
FLOOR = 1e-6  # nats; a change below it is drawn there


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whatever the path ends in, and close the figure, which pyplot would keep."""
    figure.savefig(path, dpi=144, format="png")
    plt.close(figure)


def generalization(runs: Mapping[str, Curves]) -> Figure:
    """Train, leave-one-out and test loss over training, one panel for each run by its title, on one scale."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4.8 * len(runs), 5.0), sharey=True, layout="constrained")
    for ax, (title, curves) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        names = {f"leave-one-out: {method}": method for method in curves.loo_loss}
        if len(names) == 1:
            names = dict(zip(["leave-one-out (no test data)"], curves.loo_loss, strict=True))
        vlearn.plot.generalization(
            steps=curves.steps,
            train_loss=curves.train_loss,
            loo_loss={name: curves.loo_loss[method] for name, method in names.items()},
            test_loss=curves.test_loss,
            ax=ax,
        )
        for line in ax.get_lines():
            if line.get_label() in names:
                color, marker = LOOKS[names[line.get_label()]]
                line.set(color=color, marker=marker, markersize=7)
        test, error = np.array(curves.test_loss), np.array(curves.test_error)
        ax.fill_between(curves.steps, test - error, test + error, color=INK, alpha=0.12, linewidth=0)
        ax.set_title(title, fontsize=13, color=INK, loc="left", fontweight="bold")
        _redraw_legend(ax)
    for ax in np.atleast_1d(axes)[1:]:
        ax.set_ylabel("")
    return figure


def _redraw_legend(ax: Axes) -> None:
    """The same entries, in the colours that the curves have now."""
    lines = {line.get_label(): line for line in ax.get_lines()}
    order = [text.get_text() for text in ax.get_legend().get_texts()]
    names = [f"{name} (± standard error)" if name == "test" else name for name in order]
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.13)}  # curves may be anywhere inside
    ax.legend([lines[name] for name in order], names, frameon=False, fontsize=11, labelcolor=INK, **below)


def retraining(
    predicted: Mapping[str, np.ndarray],
    retrained: Mapping[str, np.ndarray],
    quantity: str = "increase of own loss, nats",
    scores: Container[str] = (),
    columns: int = 5,
) -> Figure:
    """Predicted against true change on an example's removal, one panel for each method.

    Args:
        quantity: what changes, with its unit.
        scores: the methods whose numbers have no unit, drawn on their own scale.
        columns: panels side by side.
    """
    width = min(columns, len(predicted))
    rows = -(-len(predicted) // width)
    size = (3.4 * width, 3.9) if rows == 1 else (2.9 * width, 3.2 * rows)
    figure, axes = plt.subplots(rows, width, figsize=size, layout="constrained", squeeze=False)
    units = [values for method, values in predicted.items() if method not in scores]
    low, high = 0.6 * FLOOR, 2 * np.concatenate([*units, *retrained.values()]).max()
    for ax, (method, values) in zip(axes.flat, predicted.items(), strict=False):
        truth = retrained[method]
        color, marker = LOOKS.get(method, (BLUE, "o"))
        floor = FLOOR
        if method in scores:
            floor = max(values.max() * FLOOR, values[values > 0].min())
            limits = (0.6 * floor, 2 * values.max())
        else:
            limits = (low, high)
            ax.plot(limits, limits, color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        drawn = np.maximum(values, floor), np.maximum(truth, FLOOR)
        ax.scatter(*drawn, s=38 / rows**0.5, color=color, marker=marker, alpha=0.75, linewidths=0)
        ax.set(xscale="log", yscale="log", xlim=limits, ylim=(low, high), box_aspect=1)
        ax.minorticks_off()
        predicted_as = f"predicted {quantity}" if rows == 1 else "predicted"
        tidy(ax, "score" if method in scores else predicted_as, f"retrained {quantity}")
        ax.set_title(method, fontsize=13, color=INK, loc="left", fontweight="bold")
        pearson, slope = agreement(values, truth)
        style = {"transform": ax.transAxes, "va": "top", "fontsize": 11, "color": INK}
        sized = "" if method in scores else f"\nslope {slope:.2f}"
        ax.text(0.04, 0.97, f"Pearson {pearson:.3f}{sized}", **style)
    for ax in axes.flat[len(predicted) :]:
        ax.remove()
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    return figure
