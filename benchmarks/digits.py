"""Train with IVON on real digits and predict the test loss from the training data alone.

    python -m benchmarks.digits [--smoke] [--epochs 100] [--seed 0] [--out FOLDER]

A small CNN is trained by `vlearn.IVON`, whose state is the posterior; and again, from the same weights with the same
prior, minibatches and number of steps, by SGD, with Laplace approximations fitted by laplace-torch. At the same epochs
every posterior goes through the same equation, LOO = Σ_i ℓ(y_i, f_i + V_i e_i), which is held against the test loss. At
the end 50 examples are left out in turn: the network is trained to convergence without each, and the increase of the
example's own loss is held against the predicted one.

Laplace approximations are derived at a minimum, which SGD's first epochs are not. How the settings were chosen, and how
much depends on each, is what `python -m benchmarks.digits_settings` shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import nn

import vlearn
from benchmarks.problems.digits import SMOKE, Digits, Settings
from benchmarks.reference import laplace
from benchmarks.reference.removals import Retraining
from benchmarks.report import pictures, tracking
from benchmarks.report.agreement import agreement
from benchmarks.report.curves import Curves, losses
from benchmarks.report.pictures import DIAGONAL, IVON, KRONECKER
from benchmarks.report.provenance import cores, provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table, relative
from benchmarks.training.digits import TRAINED_BY, laplace_posterior, sweep, train_ivon, train_sgd
from benchmarks.training.digits_minimum import moved_to
from benchmarks.training.estimates import change, evenly_ranked
from benchmarks.training.evaluation import STRUCTURES
from vlearn.posterior import Diagonal, from_laplace


def compare_retraining(
    settings: Settings,
    data: Digits,
    ivon: tuple[nn.Module, Diagonal],
    sgd: nn.Module,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Predicted and true change of the own loss of left-out examples, by method.

    Each network is first polished to a minimum by L-BFGS, from where it was; there every method predicts: IVON with
    the state of its last step, Laplace fitted again at the minimum. "trained" predicts at the weights as trained.
    The examples are the evenly spaced quantiles of the self-influence, ranked by the mean over the methods.
    """
    models = {"IVON": ivon[0], "SGD": sgd}
    problems = {name: Retraining(model, data.x, data.y, settings.prior_precision) for name, model in models.items()}
    minima = {}
    for name, problem in problems.items():
        minima[name] = problem.from_weights_of(models[name])
        advance()
    polished = {name: problem.model_at(minima[name]) for name, problem in problems.items()}
    tables = {IVON: sweep(polished["IVON"], moved_to(polished["IVON"], ivon[1]), data)}
    trained = {IVON: sweep(ivon[0], ivon[1], data)}
    for method in STRUCTURES:
        tables[method] = sweep(polished["SGD"], laplace_posterior(method, polished["SGD"], data, settings), data)
        trained[method] = sweep(sgd, laplace_posterior(method, sgd, data, settings), data)

    ranks = sum(np.argsort(np.argsort(table.self_influence.numpy())) for table in tables.values())
    examples = evenly_ranked(ranks, settings.retrained)
    truth: dict[str, list[float]] = {}
    unconverged = sum(not minimum.converged for minimum in minima.values())
    for name, problem in problems.items():
        truth[name] = []
        for increase, converged in problem.own_loss_changes(examples, minima[name], cores()):
            truth[name].append(increase)
            unconverged += not converged
            advance()
    return {
        "examples": examples,
        "unconverged": unconverged,
        "retrained": {name: np.array(changes) for name, changes in truth.items()},
        "predicted": {method: change(table)[examples] for method, table in tables.items()},
        "trained": {method: change(table)[examples] for method, table in trained.items()},
        "loo_loss": {method: table.loo_loss.mean().item() for method, table in tables.items()},
    }


def time_laplace(model: nn.Module, data: Digits, settings: Settings) -> dict[str, dict[str, float]]:
    """Seconds of each part of Laplace sensitivities, and of laplace-torch's own way from its fit to V e."""
    seconds = {}
    for method, structure in STRUCTURES.items():
        marks = [time.perf_counter()]
        la = laplace.fit(model, data.x, data.y, structure, settings.prior_precision)
        marks.append(time.perf_counter())
        posterior = from_laplace(la)
        marks.append(time.perf_counter())
        sweep(model, posterior, data)
        marks.append(time.perf_counter())
        laplace.deviation(la, data.x, data.y)
        marks.append(time.perf_counter())
        parts = ("fit", "posterior", "sweep", "laplace_torch_functional_variance")
        seconds[method] = dict(zip(parts, np.diff(marks), strict=True))
    return seconds


def summary(curves: Curves, method: str, retraining: dict[str, Any]) -> dict[str, float]:
    """One row of the table."""
    truth = retraining["retrained"][TRAINED_BY[method]]
    pearson, slope = agreement(retraining["predicted"][method], truth)
    trained_pearson, trained_slope = agreement(retraining["trained"][method], truth)
    return losses(curves, method) | {
        "retraining_pearson": pearson,
        "retraining_slope": slope,
        "retraining_pearson_before_polishing": trained_pearson,
        "retraining_slope_before_polishing": trained_slope,
        "median_seconds_of_fit_and_sweep": float(np.median(curves.seconds[method])),
    }


def print_results(rows: dict[str, dict[str, float]], notes: list[str]) -> None:
    """Print the row of every method."""
    header = (
        "",
        "|LOO-test|\nover epochs",
        "Pearson\nover epochs",
        "train\nat the end",
        "LOO",
        "test",
        "Pearson\nretraining",
        "slope",
        "seconds\na sweep",
    )
    lines = [
        (
            method,
            f"{row['mean_absolute_gap']:.3f} ({row['mean_relative_gap']:.0%})",
            f"{row['pearson_over_epochs']:.4f}",
            f"{row['train_loss']:.3f}",
            f"{row['loo_loss']:.3f}",
            f"{row['test_loss']:.3f}",
            f"{row['retraining_pearson']:.3f}",
            f"{row['retraining_slope']:.2f}",
            f"{row['median_seconds_of_fit_and_sweep']:.2f}",
        )
        for method, row in rows.items()
    ]
    print_table(
        "Leave-one-out loss from the training data alone, against test data and retraining", header, lines, notes
    )


def measure(
    settings: Settings, data: Digits, memory: vlearn.MemoryMap, run: Any
) -> tuple[dict[str, Any], dict[str, Curves], list[str]]:
    """All numbers as the JSON holds them, the curves by training run, and notes for the reader."""
    began = time.perf_counter()
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("IVON, live sensitivities at every step", total=settings.epochs)
        model, posterior, curves, live = train_ivon(settings, data, memory, run, lambda: bar.advance(task))
        task = bar.add_task("SGD, Laplace approximations", total=settings.epochs)
        sgd, sgd_curves = train_sgd(settings, data, tuple(STRUCTURES), lambda: bar.advance(task))
        task = bar.add_task("retraining without an example", total=2 * settings.retrained + 2)
        retraining = compare_retraining(settings, data, (model, posterior), sgd, lambda: bar.advance(task))
    seconds = {
        "live_sensitivities_median": float(np.median(live)),
        "live_sensitivities_total": sum(live),
        "laplace": time_laplace(sgd, data, settings),
        "total": time.perf_counter() - began,
    }
    runs = {"IVON": curves, "SGD": sgd_curves}
    numbers = {
        **provenance(f"python -m benchmarks.digits --epochs {settings.epochs} --seed {settings.seed}", settings.seed),
        "settings": dataclasses.asdict(settings),
        "remaining_weight_of_hess_init": settings.beta2**settings.steps,
        "table": {method: summary(runs[name], method, retraining) for method, name in TRAINED_BY.items()},
        "seconds": seconds,
        "curves": {name: dataclasses.asdict(each) for name, each in runs.items()},
        "retraining": retraining,
    }
    return numbers, runs, notes(settings, curves, seconds, retraining)


def run_benchmark(settings: Settings, out: Path, runs: Path) -> None:
    """Train, retrain, compare; write pictures and numbers only when all of it is done."""
    data = Digits.load(settings)
    shutil.rmtree(runs / "memory", ignore_errors=True)
    memory = vlearn.MemoryMap(settings.num_data, runs / "memory")
    with tracking.tracked("vlearn-digits", runs, dataclasses.asdict(settings)) as (run, said):
        try:
            numbers, curves, lines = measure(settings, data, memory, run)
        except KeyboardInterrupt:
            print(f"\nInterrupted: {relative(out)} is as it was before this run.", file=sys.stderr)
            raise
        figures = draw(memory, data, curves, numbers["retraining"])
        write(out, figures, numbers)
        print_results(numbers["table"], [*lines, said, f"Figures and numbers: {relative(out)}"])
        if run:
            run.log({f"figures/{name}": tracking.image(out / f"{name}.png") for name in figures})
            run.summary.update({"table": numbers["table"]})


def draw(
    memory: vlearn.MemoryMap, data: Digits, runs: dict[str, Curves], retraining: dict[str, Any]
) -> dict[str, Figure]:
    """The figures by name."""
    titles = {"IVON": "IVON: read from its state", "SGD": "SGD: fitted by laplace-torch"}
    retrained = {method: retraining["retrained"][name] for method, name in TRAINED_BY.items()}
    return {
        "generalization": pictures.generalization({titles[name]: curves for name, curves in runs.items()}),
        "memory_map": vlearn.plot.memory_map(memory, images=data.x, labels=data.y).figure,
        "retraining": pictures.retraining(retraining["predicted"], retrained),
    }


def write(out: Path, figures: dict[str, Figure], numbers: dict[str, Any]) -> None:
    """Put everything beside its place first, so that an interrupt leaves the old results whole."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        pictures.save(figure, out / f"{name}.png.new")
    write_json(out / "digits.json.new", numbers)
    for name in [f"{figure}.png" for figure in figures] + ["digits.json"]:
        (out / f"{name}.new").replace(out / name)


def notes(settings: Settings, curves: Curves, seconds: dict[str, Any], retraining: dict[str, Any]) -> list[str]:
    """What the table's columns mean, and what stands beside it."""
    own = {method: f"{parts['laplace_torch_functional_variance']:.2f}" for method, parts in seconds["laplace"].items()}
    lines = [
        f"Losses are means in nats; the test loss has a standard error of {curves.test_error[-1]:.3f}. Retraining: the "
        f"increase of the own loss of {len(retraining['examples'])} examples, each left out in turn, over the "
        f"prediction. Seconds: one sweep of {settings.num_data} examples, with the Laplace fit.",
        f"IVON, live: {1e3 * seconds['live_sensitivities_median']:.1f} ms for each minibatch of {settings.batch}, "
        f"{seconds['live_sensitivities_total']:.1f} s in all {settings.steps} steps. "
        f"hess_init keeps a weight of β2^T = {settings.beta2**settings.steps:.2f}.",
        "laplace-torch's own Jacobians and functional variance, after its fit and in place of vlearn's sweep: diagonal "
        f"{own[DIAGONAL]} s, Kronecker {own[KRONECKER]} s.",
    ]
    if retraining["unconverged"]:
        lines.append(f"{retraining['unconverged']} of the retrainings stopped before they converged.")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options, and choose the folder of the results by them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds on little data, not written to results/")
    parser.add_argument("--epochs", type=int, help="default 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="figures and numbers; default benchmarks/results/digits")
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="memory map and W&B files")
    arguments = parser.parse_args(argv)
    if arguments.epochs is not None and arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}, but it must be positive: use 100.")
    if arguments.out is None:
        arguments.out = arguments.runs / "smoke" if arguments.smoke else RESULTS / "digits"
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = parse(argv)
    torch.set_num_threads(1)  # the tensors are small; retraining runs one network to a core
    settings = dataclasses.replace(SMOKE if arguments.smoke else Settings(), seed=arguments.seed)
    if arguments.epochs is not None:
        settings = dataclasses.replace(settings, epochs=arguments.epochs)
    try:
        run_benchmark(settings, arguments.out, arguments.runs)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
