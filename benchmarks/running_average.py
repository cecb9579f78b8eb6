"""Does IVON's leave-one-out loss follow the test loss where a network overfits, if its Hessian is a running average?

    python -m benchmarks.running_average [--experiments mnist fashion-mnist] [--seeds 1] [--smoke]

The run of `benchmarks.generalization` that overfits (5,000 images, LeNet-5, δ = 1), with `beta2_warmup` over a grid
and, at one of its values, with another `hess_init`. The setting whose leave-one-out loss is nearest to the test loss
over the run on MNIST is then looked up on Fashion-MNIST, which the choice has not seen.

Every run saves its state after each epoch under --runs; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.problems.images import Images
from benchmarks.report import experiments
from benchmarks.report.curves import Curves, losses
from benchmarks.report.pictures import IVON
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training import recorded_runs
from benchmarks.training.recorded_runs import train
from vlearn.plot.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILLION, tidy

WITHIN = 0.1  # of the test loss, at every recorded epoch
COLORS = (GREY, SKY, GREEN, BLUE, PURPLE, ORANGE, VERMILLION)


@dataclasses.dataclass(frozen=True)
class Experiment(recorded_runs.Experiment):
    """A run, and what is put in the place of its own `beta2_warmup` and `hess_init`."""

    settings: tuple[tuple[float | None, float], ...] = ()


SETTINGS = ((None, 0.1), (2000.0, 0.1), (1000.0, 0.1), (600.0, 0.1), (300.0, 0.1), (600.0, 0.01), (600.0, 1.0))


def overfitting(dataset: str, title: str) -> Experiment:
    """The run that overfits, on 5,000 images of a data set."""
    own = dataclasses.asdict(recorded_runs.EXPERIMENTS["overfit"])
    changed = {
        "title": f"5,000 of {title}, LeNet-5, overfitting",
        "dataset": dataset,
        "recorded": (1, 3, 5, 10, 20, 30, 50, 70, 100),
        "mapped": (),
        "settings": SETTINGS,
    }
    return Experiment(**{**own, **changed})


EXPERIMENTS = {
    "mnist": overfitting("mnist", "MNIST"),
    "fashion-mnist": overfitting("fashion-mnist", "Fashion-MNIST"),
}
SMOKE = Experiment(
    **{**dataclasses.asdict(recorded_runs.SMOKE), "mapped": (), "settings": ((None, 0.1), (10.0, 0.1))},
)


def label(beta2_warmup: float | None, hess_init: float) -> str:
    """A setting in words."""
    average = "constant beta2" if beta2_warmup is None else f"beta2_warmup={beta2_warmup:g}"
    return f"{average}, hess_init={hess_init:g}"


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Train by IVON with every setting."""
    table, curves = {}, {}
    for beta2_warmup, hess_init in experiment.settings:
        name = label(beta2_warmup, hess_init)
        changed = dataclasses.replace(experiment, beta2_warmup=beta2_warmup, hess_init=hess_init, settings=())
        each = [
            train(changed, data, seed, "IVON", runs / name.replace(", ", "-"), advance, mapped=False).recorded["curves"]
            for seed in range(seeds)
        ]
        table[name] = over_seeds([row(curve) for curve in each])
        curves[name] = [dataclasses.asdict(curve) for curve in each]
    return {"table": table, "curves": curves}


def row(curves: Curves) -> dict[str, float]:
    """What one run says."""
    loo, test = np.array(curves.loo_loss[IVON]), np.array(curves.test_loss)
    apart = np.abs(loo / test - 1)
    return {**losses(curves, IVON), "largest_relative_gap": apart.max(), "least_test_loss": test.min()}


def draw(record: dict[str, Any]) -> Figure:
    """Leave-one-out loss in multiples of the test loss over the epochs of the first seed."""
    figure, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for (name, each), color in zip(record["curves"].items(), COLORS, strict=False):
        curves = Curves(**each[0])
        ratio = np.array(curves.loo_loss[IVON]) / np.array(curves.test_loss)
        ax.plot(curves.steps, ratio, marker="o", markersize=4, linewidth=1.6, color=color, label=name)
    ax.axhspan(1 - WITHIN, 1 + WITHIN, color=INK, alpha=0.12, linewidth=0, label=f"within {WITHIN:.0%}")
    ax.set(yscale="log", title=record["experiment"]["title"])
    tidy(ax, "epoch", "leave-one-out / test loss")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print the row of every setting."""
    header = ("", "|LOO/test - 1|\nmean", "\nlargest", "Pearson", "train", "LOO", "test", "least test", "accuracy")
    lines = []
    for name, numbers in record["table"].items():
        mean = numbers["mean"]
        lines.append(
            (
                name,
                f"{mean['mean_relative_gap']:.0%}",
                f"{mean['largest_relative_gap']:.0%}",
                f"{mean['pearson_over_epochs']:.3f}",
                *(f"{mean[f'{which}_loss']:.3f}" for which in ("train", "loo", "test")),
                f"{mean['least_test_loss']:.3f}",
                f"{mean['test_accuracy']:.1%}",
            )
        )
    print_table(
        record["experiment"]["title"], header, lines, ["Losses in nats at the last epoch, means over the seeds."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("running_average", __doc__, EXPERIMENTS, seeds=1).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    return experiments.run("running_average", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
