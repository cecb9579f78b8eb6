"""Does the training data alone predict the test loss? LOO against test loss over training, on real images.

    python -m benchmarks.generalization [--experiments NAME ...] [--seeds 3] [--epochs E] [--device cpu] [--smoke]

The network is trained by `vlearn.IVON`, whose state is the posterior, and again by SGD with Laplace approximations of
laplace-torch (diagonal and Kronecker). At the recorded epochs every posterior goes through the same equation over all
training examples, LOO = mean ℓ(y_i, f_i + V_i e_i), which is held against the loss on the test set (Nickl et al., 2023,
arXiv:2310.19273, Figs. 1b, 5 and 9). At the end laplace-torch's own functional variance and the form of the paper's
code, which keeps the diagonal of V over the classes, are timed on a part of the data and scaled up.

Every training run saves its state after each epoch under --runs; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks.problems.images import Images
from benchmarks.reference import laplace
from benchmarks.report import experiments, pictures
from benchmarks.report.agreement import spearman
from benchmarks.report.curves import Curves, losses
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.checkpoint import kept
from benchmarks.training.evaluation import STRUCTURES
from benchmarks.training.recorded_runs import EXPERIMENTS, SMOKE, Experiment, train
from benchmarks.training.supervised import steps

PUBLISHED = ("cifar-10-published",)  # days on a CPU: they run where they are named


def by_laplace_torch(experiment: Experiment, data: Images, model: nn.Module) -> dict[str, dict[str, float]]:
    """Time laplace-torch by itself: a fit, and V e for all examples, scaled up from a part of them.

    Returns:
        For each structure, with V and with its diagonal over the classes: seconds, and the LOO loss of the part, nats.
    """
    numbers: dict[str, dict[str, float]] = {}
    x, y = data.x[: experiment.part], data.y[: experiment.part]
    with torch.no_grad():
        output = model.eval()(x)
    for method, structure in STRUCTURES.items():
        began = time.perf_counter()
        la = laplace.fit(model, data.x, data.y, structure, experiment.prior_precision, batch=256)
        numbers[method] = {"fit": time.perf_counter() - began, "examples_of_part": len(y)}
        for form, diagonal in {"own": False, "diagonal": True}.items():
            began = time.perf_counter()
            deviation = laplace.deviation(la, x, y, batch=20, diagonal=diagonal)
            seconds = (time.perf_counter() - began) * len(data.y) / len(y)
            loo = F.cross_entropy(output + deviation, y).item()
            numbers[method] |= {f"{form}_deviation_scaled": seconds, f"{form}_loo_loss_of_part": loo}
    return numbers


def row(curves: Curves, method: str, seconds: Sequence[float]) -> dict[str, float]:
    """Numbers of one method in one run."""
    loo, test = np.array(curves.loo_loss[method]), np.array(curves.test_loss)
    return losses(curves, method) | {
        "spearman_over_epochs": spearman(loo, test),
        "seconds_of_sensitivities": sum(curves.seconds[method]),
        "seconds_of_sensitivities_each": float(np.median(curves.seconds[method])),
        "seconds_of_training_epoch": float(np.median(seconds)),
    }


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Run every seed of one experiment."""
    trainers = ["IVON", *(["SGD"] if experiment.laplace else [])]
    curves: dict[str, list[Curves]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    own: dict[str, Any] = {}
    for seed in range(seeds):
        for trainer in trainers:
            training = train(experiment, data, seed, trainer, runs, advance, mapped=not seed)
            curve = training.recorded["curves"]
            curves.setdefault(trainer, []).append(curve)
            for method in curve.loo_loss:
                rows.setdefault(method, []).append(row(curve, method, training.recorded["seconds"]))
            if trainer == "SGD" and not seed:
                settings = {**dataclasses.asdict(experiment), "seed": seed}
                own = kept(
                    runs / "laplace-torch.pt",
                    settings,
                    lambda model=training.model: by_laplace_torch(experiment, data, model),
                )
    return {
        "remaining_weight_of_hess_init": experiment.beta2 ** steps(len(data.y), experiment.epochs, experiment.batch),
        "table": {method: over_seeds(each) for method, each in rows.items()},
        "laplace_torch": own,
        "curves": {trainer: [dataclasses.asdict(each) for each in curves[trainer]] for trainer in curves},
    }


def draw(record: dict[str, Any]) -> Figure:
    """The first seed's curves, with one panel for each training run."""
    titles = {"IVON": "IVON: its own state", "SGD": "SGD: Laplace fits"}
    figure = pictures.generalization({titles[trainer]: Curves(**each[0]) for trainer, each in record["curves"].items()})
    for ax in figure.axes:
        ax.set_xlabel("epoch")
    figure.suptitle(record["experiment"]["title"], fontsize=12)
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print the row of every method, and what laplace-torch takes by itself."""
    header = ("", "|LOO-test|", "Pearson", "Spearman", "train", "LOO", "test", "accuracy", "seconds\na sweep")
    lines = []
    for method, numbers in record["table"].items():
        mean, deviation = numbers["mean"], numbers["deviation"]
        lines.append(
            (
                method,
                f"{mean['mean_absolute_gap']:.3f} ± {deviation['mean_absolute_gap']:.3f}",
                f"{mean['pearson_over_epochs']:.4f}",
                f"{mean['spearman_over_epochs']:.3f}",
                *(f"{mean[f'{which}_loss']:.3f}" for which in ("train", "loo", "test")),
                f"{mean['test_accuracy']:.2%}",
                f"{mean['seconds_of_sensitivities_each']:.1f}",
            )
        )
    notes = [
        "Losses in nats at the last epoch; gap and correlations over the recorded epochs; means over the seeds. "
        "Seconds: one sweep over the training set, with the Laplace fit. hess_init keeps a weight of "
        f"{record['remaining_weight_of_hess_init']:.2f}."
    ]
    for method, own in record["laplace_torch"].items():
        notes.append(
            f"{method}, laplace-torch's own functional variance in place of the sweep: "
            f"{own['own_deviation_scaled']:.0f} s (scaled up), after a fit of {own['fit']:.0f} s; "
            "the diagonal of V over the classes alone, as in the paper's code: "
            f"{own['diagonal_deviation_scaled']:.0f} s, and a LOO loss of {own['diagonal_loo_loss_of_part']:.3f} "
            f"for {own['own_loo_loss_of_part']:.3f} on {own['examples_of_part']:,} examples."
        )
    print_table(f"Leave-one-out against test loss: {record['experiment']['title']}", header, lines, notes)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("generalization", __doc__, EXPERIMENTS, seeds=3, without=PUBLISHED).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    return experiments.run("generalization", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
