"""When does the model come to lean on which examples? Sensitivities at four times of training.

    python -m benchmarks.evolution [--experiment fashion-mnist] [--epochs E] [--smoke]

The training examples are sorted by their self-influence at the end of training; the figure shows what the examples of
each rank had at earlier epochs (Nickl et al., 2023, arXiv:2310.19273, Fig. 3b). Reads the rows that
`benchmarks.generalization` records while it trains with `vlearn.IVON`, seed 0, and trains first where they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import vlearn
from benchmarks.problems import images as datasets
from benchmarks.report import pictures, tracking
from benchmarks.report.agreement import spearman
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table, progress
from benchmarks.training import recorded_runs
from vlearn.plot.style import BLUE, GREEN, ORANGE, VERMILLION, tidy

EXPERIMENTS = [name for name, experiment in recorded_runs.EXPERIMENTS.items() if experiment.mapped]
COLORS = (ORANGE, GREEN, BLUE, VERMILLION)
BINS = 60  # of neighbouring ranks, each drawn by its mean


def evolution(memory: vlearn.MemoryMap) -> dict[str, Any]:
    """Numbers of every recorded time against the last one.

    Returns:
        By epoch: mean self-influence; share of its sum that the 1% with the most hold; Spearman correlation with the
        last epoch; share of the last epoch's top 1% that is in this epoch's.
    """
    rows = memory.column("self_influence")
    last = np.asarray(rows[-1], dtype=np.float64)
    count = max(1, len(last) // 100)
    by_epoch = {}
    for epoch, each in zip(memory.steps.tolist(), rows, strict=True):
        values = np.asarray(each, dtype=np.float64)
        top = np.argsort(-values, kind="stable")[:count]
        by_epoch[epoch] = {
            "mean_self_influence": values.mean(),
            "share_of_top_1_percent": values[top].sum() / values.sum(),
            "spearman_with_last": spearman(values, last),
            "top_1_percent_shared_with_last": len(np.intersect1d(top, np.argsort(-last, kind="stable")[:count]))
            / count,
        }
    return by_epoch


def draw(memory: vlearn.MemoryMap, title: str) -> Figure:
    """Self-influence over the rank at the end, one curve for each recorded time."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    rows = memory.column("self_influence")
    order = np.argsort(np.asarray(rows[-1]), kind="stable")
    for color, epoch, each in zip(COLORS, memory.steps.tolist(), rows, strict=False):
        _curve(ax, np.asarray(each, dtype=np.float64)[order], f"epoch {epoch}", color)
    ax.set_yscale("log")
    tidy(ax, "examples, sorted by self-influence at the end (%)", "self-influence, nats")
    ax.legend(frameon=False)
    ax.set_title(title, fontsize=12, loc="left")
    return figure


def _curve(ax: Axes, values: np.ndarray, label: str, color: str) -> None:
    means = [part.mean() for part in np.array_split(values, min(BINS, len(values)))]
    ax.plot((np.arange(len(means)) + 0.5) * 100 / len(means), means, color=color, label=label, linewidth=1.8)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="fashion-mnist")
    parser.add_argument("--epochs", type=int, help="instead of the experiment's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/generalization"), help="where the rows are")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few seconds on digits, not written to results/")
    arguments = parser.parse_args(argv)
    name = "digits" if arguments.smoke else arguments.experiment
    experiment = recorded_runs.SMOKE if arguments.smoke else recorded_runs.EXPERIMENTS[name]
    if arguments.epochs is not None:
        experiment = experiment.cut(arguments.epochs)
    out = arguments.out or (arguments.runs / "smoke" if arguments.smoke else RESULTS / "evolution")
    data = datasets.load(experiment.dataset, arguments.data_root)
    data = data.first(experiment.num_data, experiment.num_test).to(arguments.device)
    try:
        with progress() as advance:
            memory = recorded_runs.recorded_rows(experiment, data, arguments.runs / name, advance)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on after the last whole epoch.", file=sys.stderr)
        return 130
    by_epoch = evolution(memory)
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.evolution --experiment {name}"
    write_json(out / f"{name}.json", {**provenance(command, 0), "epochs": by_epoch})
    pictures.save(draw(memory, experiment.title), out / f"{name}.png")
    header = ("epoch", "mean self-influence", "held by the top 1%", "Spearman with the last", "top 1% in common")
    lines = [
        (
            str(epoch),
            f"{row['mean_self_influence']:.2e}",
            f"{row['share_of_top_1_percent']:.0%}",
            f"{row['spearman_with_last']:.3f}",
            f"{row['top_1_percent_shared_with_last']:.0%}",
        )
        for epoch, row in by_epoch.items()
    ]
    said = tracking.log_results("evolution", dataclasses.asdict(experiment), by_epoch, {name: out / f"{name}.png"})
    print_table(f"Self-influence over training: {experiment.title}", header, lines, [said])
    return 0


if __name__ == "__main__":
    sys.exit(main())
