"""Cook's distance on the UCI regression sets: formulas against refits, and IVON's state converging to them.

    python -m benchmarks.linear [--data-root ROOT] [--sets concrete energy yacht boston] [--seeds 3] [--smoke]

Linear regression with a known noise variance and a Gaussian prior is refitted without every example in turn. Held
against the refits: the closed form Δf = v e/(1 - v) by `vlearn.conjugate`, and `vlearn.sweep` with three posteriors at
the mean that IVON was trained to: the exact dense precision; IVON's own diagonal state on the features as they are; and
IVON's own state on their principal components, in which the exact precision is diagonal, so that nothing is left to the
structure. IVON is trained in runs of growing length, 1 - beta2 in proportion to 1/length.

What ROOT holds is said in `benchmarks.problems.linear_regression`. `--smoke` takes scikit-learn's diabetes data.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor, nn

import vlearn
from benchmarks.problems.images import default_root
from benchmarks.problems.linear_regression import FOLDERS, Problem, load
from benchmarks.reference.cooks_distance import Removal, closed_form, diagonal_limit, refits
from benchmarks.report import pictures, tracking
from benchmarks.report.agreement import agreement
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table, relative
from vlearn.gaussians.protocol import Posterior
from vlearn.plot.style import BLUE, GREEN, GREY, INK, VERMILLION, tidy

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

FULL, DIAGONAL, COMPONENTS = "dense precision, IVON's mean", "IVON's state, features", "IVON's state, components"
LOOKS = {FULL: (GREEN, "^"), DIAGONAL: (VERMILLION, "s"), COMPONENTS: (BLUE, "o")}


@dataclass(frozen=True)
class Settings:
    """The settings that all data sets share."""

    prior_precision: float = 1.0
    lengths: tuple[int, ...] = (100, 300, 1000, 3000, 10000)  # steps of IVON's runs, on all examples
    lr: float = 0.1
    hess_init: float = 0.1
    forgetting: float = 10.0  # 1 - beta2 = forgetting / length: e^-10 of hess_init is left at the end
    seeds: tuple[int, ...] = (0, 1, 2)


def swept(problem: Problem, model: nn.Module, posterior: Posterior) -> tuple[Removal, Removal, int]:
    """V e and refined V e/(1 - ΛV) with their Cook's distances, and for how many examples the refined fell back."""
    run = partial(vlearn.sweep, model, posterior, [(problem.x, problem.y)], problem.loss, progress=False)
    plain, refined = run(leverage="exact"), run(leverage=None, refined=True)
    assert plain.leverage is not None and refined.used_first_order is not None
    amplified = torch.where(refined.used_first_order, 1.0, 1 / (1 - plain.leverage))
    distance = plain.self_influence / problem.x.shape[1]
    return (
        Removal(plain.deviation.squeeze(1), distance),
        Removal(refined.deviation.squeeze(1), distance * amplified.square()),
        int(refined.used_first_order.sum()),
    )


def train(problem: Problem, settings: Settings, length: int, seed: int) -> tuple[nn.Module, vlearn.IVON]:
    """A linear model by IVON, on all examples at each step."""
    num_data = len(problem.y)
    model = nn.Linear(problem.x.shape[1], 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = vlearn.IVON(
        model.named_parameters(),
        lr=settings.lr,
        ess=num_data,
        hess_init=settings.hess_init,
        beta2=1 - min(settings.forgetting / length, 0.5),
        weight_decay=problem.prior_precision / num_data,
        generator=torch.Generator().manual_seed(seed),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
    for _ in range(length):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            problem.loss(model(problem.x), problem.y).mean().backward()
        optimizer.step()
        schedule.step()
    return model, optimizer


def run_of(problem: Problem, settings: Settings, length: int, seed: int) -> dict[str, tuple[Removal, Removal, int]]:
    """What one run of IVON on each basis says, by posterior."""
    removals = {}
    for method, each in ((DIAGONAL, problem), (COMPONENTS, problem.on_components())):
        model, optimizer = train(each, settings, length, seed)
        removals[method] = swept(each, model, optimizer.posterior())
        if method == DIAGONAL:
            mean = {"weight": next(model.parameters()).detach()}
            dense = vlearn.posterior.Full(mean, each.precision, num_data=len(each.y))
            removals[FULL] = swept(each, model, dense)
    return {method: removals[method] for method in LOOKS}


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """‖estimate - truth‖/‖truth‖."""
    return float((estimate - truth).norm() / truth.norm())


def measure(problem: Problem, settings: Settings, advance: Any) -> dict[str, Any]:
    """All numbers of one data set; those of IVON's runs are lists over the seeds."""
    marks = [time.perf_counter()]
    truth = refits(problem)
    marks.append(time.perf_counter())
    formula = closed_form(problem)
    marks.append(time.perf_counter())
    pair = ("change", formula.change, truth.change), ("distance", formula.distance, truth.distance)
    row: dict[str, Any] = {
        "examples": len(problem.y),
        "weights": problem.x.shape[1],
        "noise_variance": problem.noise_variance,
        "largest_leverage": float((problem.x * torch.linalg.solve(problem.precision, problem.x.mT).mT).sum(1).max())
        / problem.noise_variance,
        "formula": {f"{name}_largest_error": float((a - b).abs().max() / b.abs().max()) for name, a, b in pair},
        "diagonal_limit_error": relative_error(diagonal_limit(problem).change, truth.change),
        "seconds": dict(zip(("refits", "formula"), np.diff(marks), strict=True)),
        "distance_refitted": truth.distance.numpy(),
        "methods": {method: {"plain": [], "refined": []} for method in LOOKS},
    }
    for length in settings.lengths:
        runs = []
        for seed in settings.seeds:
            runs.append(run_of(problem, settings, length, seed))
            advance()
        for method, into in row["methods"].items():
            for place, form in enumerate(("plain", "refined")):
                into[form].append([relative_error(run[method][place].change, truth.change) for run in runs])
            if length == settings.lengths[-1]:
                into |= at_the_end([run[method] for run in runs], truth)
    return row


def at_the_end(runs: list[tuple[Removal, Removal, int]], truth: Removal) -> dict[str, Any]:
    """Agreement on Cook's distance after the longest runs; the scatter is that of the first seed."""
    fits = [agreement(refined.distance.numpy(), truth.distance.numpy()) for _, refined, _ in runs]
    return {
        "distance_pearson": [pearson for pearson, _ in fits],
        "distance_slope": [slope for _, slope in fits],
        "fallbacks": [count for _, _, count in runs],
        "distance": runs[0][1].distance.numpy(),
    }


def draw(sets: dict[str, dict[str, Any]], settings: Settings) -> Any:
    """Above, the error against the length of IVON's run; below, estimated against exact Cook's distances."""
    figure, axes = plt.subplots(2, len(sets), figsize=(3.6 * len(sets), 7.0), layout="constrained", squeeze=False)
    for (upper, lower), (name, row) in zip(axes.T, sets.items(), strict=True):
        for method, (color, marker) in LOOKS.items():
            errors = np.array(row["methods"][method]["refined"]).mean(1)
            upper.plot(settings.lengths, errors, color=color, marker=marker, label=method)
            exact, estimated = row["distance_refitted"], row["methods"][method]["distance"]
            lower.scatter(exact, estimated, s=12, color=color, marker=marker, alpha=0.6, linewidths=0, zorder=2)
        # IVON's Hessian is an average over length / forgetting noisy estimates.
        falling = np.array(row["methods"][COMPONENTS]["refined"]).mean(1)[-1]
        guide = falling * (settings.lengths[-1] / np.array(settings.lengths)) ** 0.5
        upper.plot(settings.lengths, guide, color=GREY, linewidth=1, linestyle=(0, (4, 2)), label="1/√length")
        limit = row["diagonal_limit_error"]
        upper.axhline(limit, color=VERMILLION, linewidth=1, linestyle=":", label="limit of a diagonal on features")
        upper.set(xscale="log", yscale="log")
        upper.set_title(f"{name}: {row['examples']} examples, {row['weights']} weights", fontsize=11, color=INK)
        tidy(upper, "steps of IVON", "relative error of Δf")
        largest = max(row["distance_refitted"].max(), *(each["distance"].max() for each in row["methods"].values()))
        limits = (largest * 1e-6, largest * 2)
        lower.plot(limits, limits, color=GREY, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        lower.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        tidy(lower, "Cook's distance by refits", "estimated")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, frameon=False, fontsize=11, labelcolor=INK)
    return figure


def show(sets: dict[str, dict[str, Any]], settings: Settings, notes: list[str]) -> None:
    """Print the formula against refits, and the posteriors after IVON's longest runs."""
    rows = [
        (
            name,
            str(row["examples"]),
            f"{row['largest_leverage']:.3f}",
            f"{row['formula']['change_largest_error']:.1e}",
            f"{row['formula']['distance_largest_error']:.1e}",
            f"{row['seconds']['refits'] / row['seconds']['formula']:.0f}x",
        )
        for name, row in sets.items()
    ]
    header = ("", "examples", "largest\nleverage", "largest error\nof Δf", "of Cook's\ndistance", "faster")
    print_table("Cook's formula against a refit without each example", header, rows)
    rows = [
        (
            f"{name}: {method}",
            *(f"{np.mean(each[form][place]):.2g}" for form in ("plain", "refined") for place in (0, -1)),
            f"{np.mean(each['distance_pearson']):.4f}",
            f"{np.mean(each['distance_slope']):.3f}",
            f"{np.mean(each['fallbacks']):g}",
        )
        for name, row in sets.items()
        for method, each in row["methods"].items()
    ]
    first, last = settings.lengths[0], settings.lengths[-1]
    limits = ", ".join(f"{row['diagonal_limit_error']:.2g} ({name})" for name, row in sets.items())
    header = ("", f"V e\n{first} steps", f"{last}", f"refined\n{first} steps", f"{last}")
    print_table(
        "Relative error of the predicted Δf, and Cook's distance",
        (*header, "Pearson\nCook", "slope", "fell\nback"),
        rows,
        [
            f"Means over {len(settings.seeds)} seeds. Slope: exact over estimated distance, 1 is right. The exact "
            f"diagonal of the precision, on features, has an error of {limits}.",
            *notes,
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=default_root())
    parser.add_argument("--sets", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--seeds", type=int, default=3, help="number of IVON's runs of each length")
    parser.add_argument("--smoke", action="store_true", help="short runs on the diabetes data; not written to results/")
    parser.add_argument("--out", type=Path, help="figure and numbers; default benchmarks/results")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}, but it must be positive: use 3.")
    settings, names = Settings(seeds=tuple(range(arguments.seeds))), arguments.sets
    if arguments.smoke:
        settings, names = dataclasses.replace(settings, lengths=(50, 200), seeds=(0,)), ["diabetes"]
    out = arguments.out or (Path("runs/linear/smoke") if arguments.smoke else RESULTS)
    problems = {
        name: Problem.standardised(*load(name, arguments.data_root), settings.prior_precision) for name in names
    }
    torch.set_num_threads(1)  # the tensors are small
    sets = {}
    try:
        with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
            for name, problem in problems.items():
                task = bar.add_task(name, total=len(settings.lengths) * len(settings.seeds))
                sets[name] = measure(problem, settings, partial(bar.advance, task))
    except KeyboardInterrupt:
        print(f"\nInterrupted: {relative(out)} is as it was before this run.", file=sys.stderr)
        return 130
    command = f"python -m benchmarks.linear --sets {' '.join(names)} --seeds {len(settings.seeds)}"
    numbers = {**provenance(command, 0), "settings": dataclasses.asdict(settings), "sets": sets}
    write_json(out / "linear.json", numbers)
    pictures.save(draw(sets, settings), out / "linear.png")
    table = {name: {key: each for key, each in sets[name].items() if not isinstance(each, list)} for name in sets}
    said = tracking.log_results("linear", dataclasses.asdict(settings), table, {"linear": out / "linear.png"})
    show(sets, settings, [f"Figure and numbers: {relative(out)}", said])
    return 0


if __name__ == "__main__":
    sys.exit(main())
