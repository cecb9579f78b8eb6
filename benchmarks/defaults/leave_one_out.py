"""What the leave-one-out loss of a network says that was trained by one line, beside its loss on held-out examples.

Leave-one-out speaks of examples that are drawn as those of the training were. Where the validation half is not, every
twentieth training example is held out in its place.
"""

from __future__ import annotations

import dataclasses
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
HELD_OUT = 20  # one training example in so many, where the validation half is drawn otherwise
LABELS = ("VAdamW", "EVON", "EVON, ess=T")


def estimates(name: str, task: Task, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """By method, each at its one line: training, leave-one-out, held-out and validation loss, over the seeds."""
    validation, task = (task.x_val, task.y_val), _drawn_alike(task)
    settings = {"num_data": task.num_data, "batch": task.batch, "epochs": task.epochs, "steps": task.steps}
    found = {}
    for label in LABELS:
        rows = []
        for seed in range(seeds):
            file = runs / name / f"leave-one-out-{label}-{seed}.pt"
            rows.append(
                kept(file, {**settings, "seed": seed}, lambda m=METHODS[label], s=seed: measure(task, validation, m, s))
            )
            advance(f"{name}: {label}, seed {seed}: {rows[-1]['loo_loss']:.4g} for {rows[-1]['held_out_loss']:.4g}")
        found[label] = over_seeds(rows)
    return {"settings": settings, "swept": count_of(task), "methods": found}


def measure(task: Task, validation: tuple[Tensor, Tensor], method: Any, seed: int) -> Row:
    """One training, and a sweep of a random part of its examples; the leave-one-out loss is NaN where it is refused."""
    model, optimizer = train(task, method, method.rate, seed)
    given = dataclasses.replace(task, x_val=validation[0], y_val=validation[1])
    losses = {
        name: scores(each, [outputs(each, model)])["loss"] for name, each in (("held_out_loss", task), ("loss", given))
    }
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
    return {**losses, **{key: column.double().mean().item() for key, column in rows.items()}}


def _drawn_alike(task: Task) -> Task:
    """The task with a validation half that is drawn as its training half."""
    if not task.other_source:
        return task
    out = torch.arange(task.num_data) % HELD_OUT == HELD_OUT - 1
    return dataclasses.replace(task, x=task.x[~out], y=task.y[~out], x_val=task.x[out], y_val=task.y[out])


def own_losses(output: Tensor, y: Tensor) -> Tensor:
    """The loss of each example: the mean over its own classes."""
    losses = F.cross_entropy(output.movedim(-1, 1), y, ignore_index=IGNORED, reduction="none").reshape(len(y), -1)
    return losses.sum(1) / (y != IGNORED).reshape(len(y), -1).sum(1)


def count_of(task: Task) -> int:
    """How many examples are swept."""
    return min(SWEPT, task.num_data, max(task.batch, MOST_TARGETS // math.prod(task.y.shape[1:])))


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print training, leave-one-out, held-out and validation loss of every task and method."""
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        for label, found in result["methods"].items():
            mean = found["mean"]
            keys = ("train_loss", "loo_loss", "held_out_loss", "loss")
            losses = ("refused" if math.isnan(mean[key]) else f"{mean[key]:.3g}" for key in keys)
            rows.append((name, label, *losses))
    header = ("task", "by", "training", "leave-one-out", "held out", "validation")
    print_table("Leave-one-out losses by one line", header, rows)
