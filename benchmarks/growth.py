"""How time and memory of sensitivities grow: with the data, the batch, the parameters, the classes, the positions.

    python -m benchmarks.growth [--smoke]

One thing grows at a time, beside the plain forward and backward passes of the same batches. Time: medians over
interleaved rounds, one thread. Memory: peak over what there was before the call, model, data and posterior among it, in
a process of its own. The table has the slopes of log time and log memory over the upper half of the sizes: 1 is
proportional, 0 constant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cost.memory import MIB, in_fresh_process, peak, start_of_peak
from benchmarks.cost.passes import PLAIN, VLEARN, Build, Subject, plain
from benchmarks.cost.timing import medians
from benchmarks.problems.networks import LanguageModel, convnet, lenet5, mlp
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress

SHOWN: dict[str, Build] = {
    PLAIN: plain,
    **{name: VLEARN[name] for name in ("live self-influence", "sweep with LOO")},
}
COLORS = dict(zip(SHOWN, ("0.5", "#56B4E9", "#0072B2"), strict=True))


@dataclass(frozen=True)
class Point:
    """A network and its batches, of which something has this size."""

    size: int
    subject: Subject
    examples: int


def _classifier(build: Callable[[], Any], batch: int, size: tuple[int, ...] = (1, 28, 28)) -> Subject:
    return Subject("", build, batch, rounds=7, size=size)


def _of_width(width: int) -> Point:
    build = partial(mlp, 784, width, width, 10)
    return Point(sum(p.numel() for p in build().parameters()), _classifier(build, 64), 64)


def _of_length(tokens: int) -> Point:
    build = partial(LanguageModel, length=tokens, features=64, layers=2)
    return Point(tokens, Subject("", build, 8, rounds=7, tokens=tokens), 8)


AXES: dict[str, Callable[[], list[Point]]] = {
    "examples N\nMLP, batches of 64": lambda: [
        Point(64 * 2**k, _classifier(partial(mlp, 784, 300, 100, 10), 64), 64 * 2**k) for k in range(7)
    ],
    "batch\nLeNet-5": lambda: [Point(2**k, _classifier(lenet5, 2**k), 2**k) for k in range(3, 10)],
    "parameters P\nMLP of growing width, batch 64": lambda: [_of_width(2**k) for k in range(5, 12)],
    "classes C\nMLP 256-256-C, batch 64": lambda: [
        Point(c, _classifier(partial(mlp, 256, 256, c), 64, (256,)), 64) for c in (10, 30, 100, 300, 1000, 3000, 10000)
    ],
    "tokens T\nGPT, batch 8": lambda: [_of_length(2**k) for k in range(3, 10)],
    "pixels\nthree convolutions, batch 16": lambda: [
        Point(side**2, _classifier(convnet, 16, (3, side, side)), 16) for side in (8, 16, 24, 32, 48, 64, 96)
    ],
}


def milliseconds(point: Point) -> dict[str, float]:
    """Median milliseconds of each call at a point."""
    calls = {name: build(point.subject, point.examples) for name, build in SHOWN.items()}
    return {name: 1e3 * value for name, value in medians(calls, point.subject.rounds).items()}


def peaks(name: str, points: list[Point]) -> list[float]:
    """MiB of peak memory at each point; it is to be called in a fresh process."""
    torch.set_num_threads(1)
    SHOWN[name](points[0].subject, 2)()  # libraries keep what they load
    mebibytes = []
    for point in points:
        call = SHOWN[name](point.subject, point.examples)
        before = start_of_peak()
        call()
        call()
        mebibytes.append((peak() - before) / MIB)
        del call
    return mebibytes


def slope(sizes: list[int], values: list[float]) -> float:
    """The slope of log value over log size, by least squares over the upper half, where constants weigh little."""
    half = len(sizes) // 2
    x, y = np.log(sizes[half:]), np.log(np.maximum(values[half:], 1e-3))
    return float(np.polyfit(x, y, 1)[0])


def measured(axes: dict[str, list[Point]], said: Advance) -> dict[str, Any]:
    """Measure every axis; returns its sizes, and the milliseconds and MiB of each call there."""
    growth: dict[str, Any] = {}
    for axis, points in axes.items():
        title = axis.replace("\n", ", ")
        times = []
        for point in points:
            said(f"{title}: time at {point.size}")
            times.append(milliseconds(point))
        memory = {}
        for name in SHOWN:
            said(f"{title}: memory, {name}")
            memory[name] = in_fresh_process(peaks, name, points)
        growth[axis] = {
            "size": [point.size for point in points],
            "time, ms": {name: [at[name] for at in times] for name in SHOWN},
            "memory, MiB": memory,
        }
    return growth


def slopes(growth: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The slope of each axis, quantity and call."""
    return {
        axis: {
            quantity: {name: slope(values["size"], values[quantity][name]) for name in SHOWN}
            for quantity in ("time, ms", "memory, MiB")
        }
        for axis, values in growth.items()
    }


def draw(growth: dict[str, Any], path: Path) -> None:
    """A column of panels for each thing that grows, time above memory, with a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(growth), figsize=(2.6 * len(growth), 5.4), sharey="row", layout="constrained")
    for column, (axis, values) in zip(axes.T, growth.items(), strict=True):
        sizes = np.array(values["size"])
        for panel, quantity in zip(column, ("time, ms", "memory, MiB"), strict=True):
            for name, line in values[quantity].items():
                panel.loglog(sizes, np.maximum(line, 0.1), "o-", color=COLORS[name], label=name, markersize=3.5)
            last = max(line[-1] for line in values[quantity].values())
            panel.loglog(sizes, last * 2 * sizes / sizes[-1], ":", color="0.6", linewidth=1, label="proportional")
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
        column[1].set_xlabel(axis, fontsize=9)
    for panel, label in zip(axes[:, 0], ("time, ms", "peak memory of the call, MiB"), strict=True):
        panel.set_ylabel(label, fontsize=9)
    lowest = [min(min(line) for v in growth.values() for line in v[q].values()) for q in ("time, ms", "memory, MiB")]
    for panel, low in zip(axes[:, 0], lowest, strict=True):
        panel.set_ylim(bottom=max(0.05, low / 2))
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_slopes(growth: dict[str, Any]) -> None:
    """Print one table for time and one for memory."""
    for quantity, title in (("time, ms", "time"), ("memory, MiB", "peak memory")):
        rows = [
            [axis.replace("\n", ", "), *(f"{value:.2f}" for value in values[quantity].values())]
            for axis, values in slopes(growth).items()
        ]
        print_table(f"Slopes of log {title} over the upper half of the sizes", ["what grows", *SHOWN], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the three smallest sizes, once; nothing is written")
    arguments = parser.parse_args(argv)
    axes = {axis: points() for axis, points in AXES.items()}
    if arguments.smoke:
        axes = {axis: [replace(p, subject=replace(p.subject, rounds=1)) for p in axes[axis][:3]] for axis in axes}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress() as said:
            growth = measured(axes, said)
    finally:
        torch.set_num_threads(before)
    print_slopes(growth)
    if not arguments.smoke:
        command = "python -m benchmarks.growth"
        content = {**provenance(command, 0), "slopes": slopes(growth), "growth": growth}
        write_json(RESULTS / "growth.json", content)
        draw(growth, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
