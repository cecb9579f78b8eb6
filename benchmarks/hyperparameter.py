"""Does the training data alone find the prior precision? LOO and test loss over a grid of δ.

    python -m benchmarks.hyperparameter [--experiments mnist-5000 fashion-mnist-5000] [--seeds 1] [--smoke]

At each δ the network is trained by `vlearn.IVON`, whose state is the posterior, and by SGD with a Kronecker Laplace
approximation at the end: laplace-torch's, and vlearn's own, which knows for how long SGD has trained. All posteriors
go through the same equation over all training examples, LOO = mean ℓ(y_i, f_i + V_i e_i): is its minimum where the
test loss has its own (Nickl et al., 2023, arXiv:2310.19273, Fig. 4)? The regret is what choosing δ by LOO costs: the
test loss there, less the smallest of the grid. "fashion-mnist-5000-warmed-up" trains by IVON alone, with a running
average of the Hessian.

Each grid point saves its state after every epoch under --runs; the same command goes on where it was interrupted. As
published a case takes days on a CPU; those with 5,000 examples take minutes on one core.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.problems import networks
from benchmarks.problems.images import Images
from benchmarks.report import experiments, pictures
from benchmarks.report.curves import Curves
from benchmarks.report.pictures import IVON, KRONECKER, STOPPED
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.evaluation import loo_loss, measure, posterior_after, stopped_fit
from benchmarks.training.supervised import TRAINERS, Recipe, steps
from vlearn.plot.style import INK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Recipe):
    """A recipe, the grid of δ on the scale of the summed loss, and who trains."""

    prior_precisions: tuple[float, ...]
    trainers: tuple[str, ...] = tuple(TRAINERS)


MNIST = Experiment(  # Fig. 4a; SGD as for Fig. 2a, IVON as for Fig. 3b.
    title="MNIST, MLP(500, 300)",
    dataset="mnist",
    network="mlp_500_300",
    epochs=500,
    batch=256,
    prior_precisions=(1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    lr=0.1,
    hess_init=0.1,
    remaining=0.8,
    sgd_lr=(1e-2, 1e-3),
)
FASHION = Experiment(  # Fig. 4b, where the paper takes Adam; SGD as for Fig. 2b, IVON for 3b.
    title="Fashion-MNIST, LeNet-5",
    dataset="fashion-mnist",
    network="lenet5",
    epochs=300,
    batch=256,
    prior_precisions=(10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
    lr=0.1,
    hess_init=0.1,
    remaining=0.8,
    sgd_lr=(1e-1, 1e-3),
)
# A prior of δ weighs twelve times as much here as on all 60,000. IVON's steps are those of SGD with momentum at lr/10.
WARM_UP = 600
SMALL: dict[str, Any] = {
    "num_data": 5000,
    "batch": 100,
    "prior_precisions": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    "lr": 1.0,
}
EXPERIMENTS = {
    "mnist-5000": dataclasses.replace(
        MNIST, title="5,000 of MNIST, MLP(500, 300)", epochs=300, sgd_lr=(1e-1, 1e-3), **SMALL
    ),
    "fashion-mnist-5000": dataclasses.replace(FASHION, title="5,000 of Fashion-MNIST, LeNet-5", epochs=40, **SMALL),
    "mnist": MNIST,
    "fashion-mnist": FASHION,
}
# IVON with the running average that `benchmarks.running_average` chooses; on MNIST, at this rate, it diverges.
EXPERIMENTS["fashion-mnist-5000-warmed-up"] = dataclasses.replace(
    EXPERIMENTS["fashion-mnist-5000"],
    title="5,000 of Fashion-MNIST, LeNet-5, warmed up",
    trainers=("IVON",),
    beta2_warmup=WARM_UP,
)
PUBLISHED = ("mnist", "fashion-mnist")  # days on a CPU: they run where they are named
SMOKE = Experiment(
    title="digits, small CNN",
    dataset="digits",
    network="digits_cnn",
    epochs=10,
    batch=20,
    prior_precisions=(0.3, 3.0, 30.0),
    lr=0.5,
    hess_init=0.1,
    remaining=0.5,
    sgd_lr=(1e-1, 1e-3),
    num_data=200,
    num_test=200,
)


def grid_point(
    experiment: Experiment, data: Images, trainer: str, prior_precision: float, seed: int, runs: Path, advance: Advance
) -> dict[str, Any]:
    """One network at one δ: its mean losses in nats at the end, "loo" by method, and those of the test examples."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    file = runs / f"{trainer}-delta{prior_precision:g}-seed{seed}.pt"
    training = experiment.training(trainer, model, data, prior_precision=prior_precision, seed=seed, file=file)
    for epoch in training:
        advance(f"{data.name}, {trainer}, δ {prior_precision:g}, seed {seed}, epoch {epoch}/{experiment.epochs}")
        if epoch == experiment.epochs:
            losses = measure(model, data)
            posteriors = {TRAINERS[trainer]: posterior_after(training, prior_precision)}
            if trainer == "SGD":
                posteriors[STOPPED] = stopped_fit(training, prior_precision)
            training.recorded["losses"] = {
                "train": losses.train.mean().item(),
                "loo": {method: loo_loss(model, posterior, data) for method, posterior in posteriors.items()},
                "test": losses.test.mean().item(),
                "accuracy": losses.right.mean().item(),
                "test_losses": losses.test.cpu().numpy(),
            }
    training.close()
    return training.recorded["losses"]


def of_method(points: list[list[dict[str, Any]]], method: str) -> list[list[dict[str, Any]]]:
    """The points with the leave-one-out loss of one method."""
    return [[{**point, "loo": point["loo"][method]} for point in seeds] for seeds in points]


def choice(deltas: np.ndarray, points: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """What LOO chooses and what it costs.

    Args:
        deltas: ``[K]`` the grid.
        points: `of_method` of each δ and seed.

    Returns:
        Both minimisers of the means over the seeds, the grid steps between them, the regret with its standard error
        over the test examples (the same in both means), and how alike the two curves are.
    """
    loo, test = (np.array([np.mean([p[which] for p in seeds]) for seeds in points]) for which in ("loo", "test"))
    by_example = np.array([np.mean([p["test_losses"] for p in seeds], axis=0) for seeds in points])  # [K, N]
    chosen, best = int(loo.argmin()), int(test.argmin())
    difference = by_example[chosen] - by_example[best]
    return {
        "loo_minimiser": deltas[chosen],
        "test_minimiser": deltas[best],
        "grid_steps_apart": abs(chosen - best),
        "test_minimum_inside_the_grid": 0 < best < len(deltas) - 1,
        "regret": test[chosen] - test[best],
        "regret_standard_error": difference.std() / len(difference) ** 0.5,
        "smallest_test_loss": test[best],
        "largest_test_loss": test.max(),
        "pearson_over_grid": np.corrcoef(loo, test)[0, 1],
        "mean_absolute_gap": np.abs(loo - test).mean(),
    }


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Train every grid point of one experiment with both trainers."""
    deltas = np.array(experiment.prior_precisions)
    table, curves = {}, {}
    for trainer in experiment.trainers:
        own = TRAINERS[trainer]
        trained = [
            [grid_point(experiment, data, trainer, delta, seed, runs, advance) for seed in range(seeds)]
            for delta in experiment.prior_precisions
        ]
        for method in (own, STOPPED) if trainer == "SGD" else (own,):
            points = of_method(trained, method)
            table[method] = choice(deltas, points)
            curves[method] = {
                which: [[p[which] for p in each] for each in points] for which in ("train", "loo", "test", "accuracy")
            }
            curves[method]["test_error"] = [
                np.mean([p["test_losses"] for p in each], axis=0).std() / len(data.y_test) ** 0.5 for each in points
            ]
    return {
        "num_data": len(data.y),
        "beta2": experiment.beta2(steps(len(data.y), experiment.epochs, experiment.batch)),
        "table": table,
        "curves": curves,
    }


def draw(record: dict[str, Any]) -> Figure:
    """LOO, test and train loss over δ, with a panel for each trainer and lines where LOO and test are least."""
    titles = {IVON: "IVON: its own state", KRONECKER: "SGD: Kronecker Laplace", STOPPED: "SGD: K-FAC, stopped"}
    deltas = record["experiment"]["prior_precisions"]
    panels = {}
    for method, curves in record["curves"].items():
        means = {which: [float(np.mean(each)) for each in curves[which]] for which in ("train", "loo", "test")}
        panels[titles[method]] = Curves(
            steps=list(deltas),
            train_loss=means["train"],
            test_loss=means["test"],
            test_error=list(curves["test_error"]),
            loo_loss={method: means["loo"]},
        )
    figure = pictures.generalization(panels)
    for ax, (method, row) in zip(figure.axes, record["table"].items(), strict=True):
        ax.set(xscale="log", xlabel="prior precision δ")
        ax.get_legend().remove()
        for which, color, style in (("test", INK, (0, (4, 2))), ("loo", pictures.LOOKS[method][0], (0, (1, 2)))):
            name = {"test": "test", "loo": "leave-one-out"}[which]
            minimiser = row[f"{which}_minimiser"]
            ax.axvline(minimiser, color=color, linestyle=style, linewidth=1.4, zorder=1, label=f"least {name}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(record["experiment"]["title"], fontsize=12)
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print what each posterior chooses, and the losses over the grid."""
    title = record["experiment"]["title"]
    header = ("", "δ by LOO", "δ by test", "steps apart", "regret", "best test", "|LOO-test|", "Pearson")
    lines = [
        (
            method,
            f"{row['loo_minimiser']:g}",
            f"{row['test_minimiser']:g}" + ("" if row["test_minimum_inside_the_grid"] else " (edge)"),
            str(row["grid_steps_apart"]),
            f"{row['regret']:.4f} ± {row['regret_standard_error']:.4f}",
            f"{row['smallest_test_loss']:.4f}",
            f"{row['mean_absolute_gap']:.3f}",
            f"{row['pearson_over_grid']:.3f}",
        )
        for method, row in record["table"].items()
    ]
    notes = [
        f"{record['num_data']:,} training examples, {record['experiment']['epochs']} epochs. Losses in nats at the end "
        "of training, means over the seeds; gap and correlation over the grid."
    ]
    print_table(f"Prior precision by leave-one-out: {title}", header, lines, notes)
    deltas = record["experiment"]["prior_precisions"]
    print_table(
        f"Over the grid: {title}",
        ("", "δ", "train", "LOO", "test", "accuracy"),
        [
            (
                method,
                f"{delta:g}",
                *(f"{np.mean(curves[which][place]):.4f}" for which in ("train", "loo", "test")),
                f"{np.mean(curves['accuracy'][place]):.2%}",
            )
            for method, curves in record["curves"].items()
            for place, delta in enumerate(deltas)
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("hyperparameter", __doc__, EXPERIMENTS, seeds=1, without=PUBLISHED).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    return experiments.run("hyperparameter", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
