"""The two pictures that compare methods: predicted and true test loss, predicted and true retraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import vlearn  # noqa: E402
from vlearn.plot.style import BLUE, GREEN, GREY, INK, VERMILLION, tidy  # noqa: E402

LOOKS = {"IVON": (BLUE, "o"), "Laplace, diagonal": (VERMILLION, "s"), "Laplace, Kronecker": (GREEN, "^")}
FLOOR = 1e-6  # nats; a change below it is drawn there


@dataclass
class Curves:
    """Mean losses of one training run in nats; ``loo_loss`` and ``seconds`` by method."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)  # standard error of test_loss
    test_accuracy: list[float] = field(default_factory=list)
    loo_loss: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # fit, if there is one, and sweep


def generalization(runs: Mapping[str, Curves]) -> Figure:
    """Train, leave-one-out and test loss over training, one panel for each run by its title, on one scale."""
    figure, axes = plt.subplots(1, len(runs), figsize=(4.8 * len(runs), 4.0), sharey=True, layout="constrained")
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
    ax.legend([lines[name] for name in order], names, frameon=False, fontsize=11, labelcolor=INK, loc="upper right")


def retraining(predicted: Mapping[str, np.ndarray], retrained: Mapping[str, np.ndarray]) -> Figure:
    """Predicted against true change of an example's own loss on its removal, one panel for each method."""
    figure, axes = plt.subplots(
        1, len(predicted), figsize=(3.4 * len(predicted), 3.9), sharex=True, sharey=True, layout="constrained"
    )
    largest = np.concatenate([*predicted.values(), *retrained.values()]).max()
    low, high = 0.6 * FLOOR, 2 * largest
    for ax, (method, values) in zip(np.atleast_1d(axes), predicted.items(), strict=True):
        truth = retrained[method]
        color, marker = LOOKS[method]
        ax.plot((low, high), (low, high), color=GREY, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        drawn = [np.maximum(each, FLOOR) for each in (values, truth)]
        ax.scatter(*drawn, s=38, color=color, marker=marker, alpha=0.75, linewidths=0)
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        tidy(ax, "predicted increase of own loss, nats", "increase after retraining, nats")
        ax.set_title(method, fontsize=13, color=INK, loc="left", fontweight="bold")
        pearson, slope = agreement(values, truth)
        style = {"transform": ax.transAxes, "va": "top", "fontsize": 11, "color": INK}
        ax.text(0.04, 0.97, f"Pearson {pearson:.3f}\nslope {slope:.2f}", **style)
    for ax in np.atleast_1d(axes)[1:]:
        ax.set_ylabel("")
    return figure


def agreement(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Pearson correlation, and slope of the truth over the prediction: below 1 where too much is predicted."""
    covariance = np.cov(predicted, truth)
    return float(np.corrcoef(predicted, truth)[0, 1]), float(covariance[0, 1] / covariance[0, 0])
