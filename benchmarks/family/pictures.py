"""The pictures of `benchmarks.family`: all methods on one scale, bands over a reference, ellipses over a density."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch.distributions import MultivariateNormal  # noqa: E402

from benchmarks.family import logistic_posterior, regression_predictive  # noqa: E402
from vlearn.plot.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, tidy  # noqa: E402

COLORS = {
    "IVON": BLUE,
    "VON": SKY,
    "VOGN": PURPLE,
    "KFACVON": GREEN,
    "EK-FAC": ORANGE,
    "FullVON": VERMILLION,
}


def comparison(table: dict[str, Any], title: str) -> Figure:
    """Test loss, calibration error and leave-one-out gap of every row, means and standard deviations over the seeds."""
    names = list(table)
    places = np.arange(len(names))[::-1]
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 0.34 * len(names) + 1.6), sharey=True, layout="constrained")
    panels = (
        (axes[0], "test loss, nats", (("nll", "at the mean"), ("nll_by_draws", "by 64 draws"))),
        (axes[1], "expected calibration error", (("ece", "at the mean"), ("ece_by_draws", "by 64 draws"))),
        (axes[2], "leave-one-out less test loss, nats", (("loo_gap", "leave-one-out less test loss"),)),
    )
    for ax, label, quantities in panels:
        for quantity, said in quantities:
            filled = quantity.endswith("draws") or quantity == "loo_gap"
            rows = [(place, table[name]) for place, name in zip(places, names, strict=True)]
            rows = [(place, row) for place, row in rows if quantity in row["mean"]]
            ax.errorbar(
                [row["mean"][quantity] for _, row in rows],
                [place for place, _ in rows],
                xerr=[row["deviation"][quantity] for _, row in rows],
                fmt="o",
                color=BLUE if filled else GREY,
                markerfacecolor=BLUE if filled else "white",
                markersize=7,
                elinewidth=1.4,
                label=said,
            )
        tidy(ax, label, "")
    axes[0].set_yticks(places, names)
    axes[0].legend(frameon=False, fontsize=10, labelcolor=INK)
    axes[2].axvline(0, color=INK, linewidth=1)
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold")
    return figure


def bands(regression: dict[str, Any]) -> Figure:
    """Each method's mean and two standard deviations over those of the long-run reference."""
    x, y, grid = regression_predictive.data()
    everywhere = dict(regression["bands"])
    truth = everywhere.pop(regression_predictive.REFERENCE)
    figure, axes = _panels(len(everywhere), height=2.7)
    for ax, (name, band) in zip(axes, everywhere.items(), strict=True):
        color = COLORS.get(name, GREY)
        low, high = (truth.mean + sign * 2 * truth.deviation for sign in (-1, 1))
        ax.fill_between(grid.squeeze(1), low, high, color=INK, alpha=0.13, linewidth=0)
        ax.plot(grid, truth.mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        low, high = (band.mean + sign * 2 * band.deviation for sign in (-1, 1))
        ax.fill_between(grid.squeeze(1), low, high, color=color, alpha=0.25, linewidth=0)
        ax.plot(grid, band.mean, color=color, linewidth=2)
        ax.scatter(x, y, s=9, color=INK, zorder=3, linewidths=0)
        tidy(ax, "", "")
        ax.set(xlim=(-3, 3), ylim=(-2.4, 2.1))
        ax.set_title(name, fontsize=12, color=INK, loc="left", fontweight="bold")
        width = regression["distances"][name]
        said = f"width: {width['width_at_data']:.2f} at data, {width['width_between']:.2f} between"
        ax.text(0.03, 0.03, said, transform=ax.transAxes, fontsize=9, color=INK)
    figure.suptitle(
        "Mean ± 2 standard deviations of the function, over Hamiltonian Monte Carlo (grey)", fontsize=12, color=INK
    )
    return figure


def ellipses(logistic: dict[str, Any]) -> Figure:
    """Each Gaussian's ellipses of one and two standard deviations over the true density."""
    problem, gaussians = logistic["problem"], dict(logistic["gaussians"])
    best = gaussians[logistic_posterior.BEST]
    spread = 3.3 * best.covariance_matrix.diagonal().sqrt()
    sides = [torch.linspace(float(m - s), float(m + s), 201).double() for m, s in zip(best.mean, spread, strict=True)]
    grid = torch.stack(torch.meshgrid(*sides, indexing="xy"), 2)
    density = (-problem.energy(grid)).exp()
    # Levels that hold 95, 68 and 30% of the mass.
    held = density.flatten().sort(descending=True).values
    levels = [float(held[int((held.cumsum(0) < share * held.sum()).sum())]) for share in (0.95, 0.68, 0.3)]
    figure, axes = _panels(len(gaussians), height=2.9)
    for ax, (name, q) in zip(axes, gaussians.items(), strict=True):
        filled = [*levels, float(density.max()) * 1.01]
        ax.contourf(*sides, density, levels=filled, colors=["#E9E9E9", "#CFCFCF", "#ABABAB"])
        color = COLORS.get(name, INK)
        for share in (0.68, 0.95):
            ax.plot(*_ellipse(q, share), color=color, linewidth=2)
        ax.plot(*q.mean, "o", color=color, markersize=4)
        tidy(ax, "", "")
        ax.set_title(name, fontsize=12, color=INK, loc="left", fontweight="bold")
        ax.text(0.03, 0.03, f"KL {logistic['divergence'][name]['from_truth']:.3f}", transform=ax.transAxes, fontsize=10)
    figure.suptitle(
        "68 and 95% of each Gaussian over 30, 68 and 95% of the true posterior (grey)", fontsize=12, color=INK
    )
    return figure


def _ellipse(q: MultivariateNormal, share: float) -> np.ndarray:
    """``[2, 200]`` points around the share of a Gaussian's mass with the highest density."""
    angle = torch.linspace(0, 2 * torch.pi, 200).double()
    radius = (-2 * np.log(1 - share)) ** 0.5
    return (q.mean + radius * torch.stack([angle.cos(), angle.sin()], 1) @ q.scale_tril.mT).T.numpy()


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = -(-count // 2) if count > 3 else count
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.1 * columns, height * rows + 0.4), sharex=True, sharey=True, layout="constrained"
    )
    every = list(np.ravel(axes))
    for ax in every[count:]:
        ax.set_visible(False)
    for ax in every[count - columns : count]:  # the last of each column
        ax.tick_params(labelbottom=True)
    return figure, every[:count]
