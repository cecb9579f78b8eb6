"""What the leave-one-out loss of a network says that was trained by one line, beside its validation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlearn
from benchmarks.defaults.methods import METHODS
from benchmarks.defaults.task import IGNORED, Task
from benchmarks.defaults.training import Row, outputs, scores, train
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.checkpoint import kept
from benchmarks.training.loop import finish

SWEPT = 1_000  # training examples, at random; fewer where each has many targets
MOST_TARGETS = 100_000
LABELS = ("VAdamW", "EVON", "EVON, narrow")


def estimates(name: str, task: Task, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """By method, each at its one line: training, leave-one-out and validation loss, over the seeds."""
    settings = {"num_data": task.num_data, "batch": task.batch, "epochs": task.epochs, "steps": task.steps}
    found = {}
    for label in LABELS:
        rows = []
        for seed in range(seeds):
            file = runs / name / f"leave-one-out-{label}-{seed}.pt"
            rows.append(kept(file, {**settings, "seed": seed}, lambda m=METHODS[label], s=seed: measure(task, m, s)))
            advance(f"{name}: {label}, seed {seed}: {rows[-1]['loo_loss']:.4g} for {rows[-1]['loss']:.4g}")
        found[label] = over_seeds(rows)
    return {"settings": settings, "swept": count_of(task), "methods": found}


def measure(task: Task, method: Any, seed: int) -> Row:
    """One training, and a sweep of a random part of its examples; the leave-one-out loss is NaN where it is refused."""
    model, optimizer = train(task, method, method.rate, seed)
    validation = scores(task, [outputs(task, model)])
    chosen = torch.randperm(task.num_data, generator=torch.Generator().manual_seed(seed))[: count_of(task)]
    finish(optimizer)
    batches = [(task.x[rows], task.y[rows], rows) for rows in chosen.split(task.batch)]
    posterior = optimizer.posterior()
    table = vlearn.sweep(
        model,
        posterior,
        batches,
        lambda output, y: own_losses(task.outputs(output), y),
        leverage=None,
        loo_loss=getattr(posterior, "uncalibrated_reason", None) is None,
    )
    rows = {"train_loss": table.loss, "loo_loss": table.loo_loss}
    return {"loss": validation["loss"], **{key: column.double().mean().item() for key, column in rows.items()}}


def own_losses(output: Tensor, y: Tensor) -> Tensor:
    """The loss of each example: the mean over its own classes."""
    losses = F.cross_entropy(output.movedim(-1, 1), y, ignore_index=IGNORED, reduction="none").reshape(len(y), -1)
    return losses.sum(1) / (y != IGNORED).reshape(len(y), -1).sum(1)


def count_of(task: Task) -> int:
    """How many examples are swept."""
    return min(SWEPT, task.num_data, max(task.batch, MOST_TARGETS // math.prod(task.y.shape[1:])))


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print training, leave-one-out and validation loss of every task and method."""
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        for label, found in result["methods"].items():
            mean = found["mean"]
            rows.append((name, label, *(f"{mean[key]:.3g}" for key in ("train_loss", "loo_loss", "loss"))))
    print_table("Leave-one-out losses by one line", ("task", "by", "training", "leave-one-out", "validation"), rows)
