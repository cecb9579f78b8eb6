"""Every method on one task: its rates on the first seed, then its one line and its best rate on all seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.defaults.control import Control
from benchmarks.defaults.methods import METHODS, Method
from benchmarks.defaults.task import Task
from benchmarks.defaults.training import Row, run
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance
from benchmarks.training.checkpoint import kept


def compare(
    name: str, make_task: Callable[[], Task | Control], seeds: int, runs: Path, advance: Advance
) -> dict[str, Any]:
    """By method: its one line, and where it is tuned the best of its rates, over the seeds.

    Args:
        runs: the folder in which every run is kept.
    Returns:
        {"settings": ..., "methods": {method: {"rates": {rate: loss}, "line": ..., "tuned": ...}}}.
    """
    task = make_task()
    settings = {"num_data": task.num_data, "batch": task.batch, "epochs": task.epochs, "steps": task.steps}

    def one(label: str, method: Method, lr: float, seed: int) -> Row:
        file = runs / name / f"{label}-{lr:g}-{seed}.pt"
        train = task.run if isinstance(task, Control) else partial(run, task)
        row = kept(file, {**settings, "lr": lr, "seed": seed}, lambda: train(method, lr, seed))
        advance(f"{name}: {label} at {lr:g}, seed {seed}: {row['loss']:.4g}")
        return row

    found: dict[str, Any] = {}
    for label, method in METHODS.items():
        rates = {lr: one(label, method, lr, 0)["loss"] for lr in method.rates}
        line = [one(label, method, method.rate, seed) for seed in range(seeds)]
        found[label] = {"rate": method.rate, "rates": {f"{lr:g}": loss for lr, loss in rates.items()}}
        found[label]["line"] = summary(line)
        if rates:
            best = min(rates, key=lambda lr: rates[lr] if math.isfinite(rates[lr]) else math.inf)
            found[label]["best"] = best
            found[label]["tuned"] = summary([one(label, method, best, seed) for seed in range(seeds)])
    return {"settings": settings, "methods": found}


def summary(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds; of a method that diverged on one of them the loss alone, infinite."""
    if any(math.isinf(row["loss"]) for row in rows):
        return {"mean": {"loss": math.inf}, "deviation": {"loss": 0.0}}
    return over_seeds(rows)
