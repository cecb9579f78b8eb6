"""One run: a network trained by one optimizer, and what it then predicts."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.defaults.task import IGNORED, Task
from benchmarks.training.calibration import calibration_error
from benchmarks.training.loop import finish, training_step

WARM_UP = 0.05  # share of the steps in which the rate rises to its own, from where it falls to zero as a cosine
DRAWS = 16

Row = dict[str, float]


def run(task: Task, method: Any, lr: float, seed: int) -> Row:
    """Train and measure; a run whose loss was not finite has an infinite one."""
    began = time.perf_counter()
    try:
        model, optimizer = train(task, method, lr, seed)
    except FloatingPointError:
        return {"loss": math.inf}
    row = {"seconds": time.perf_counter() - began, **scores(task, [outputs(task, model)])}
    if hasattr(optimizer, "sampled_params"):
        drawn = []
        for _ in range(DRAWS):
            with optimizer.sampled_params():
                drawn.append(outputs(task, model))
        row |= {f"{name}_by_draws": value for name, value in scores(task, drawn).items()}
    finish(optimizer)
    return row


def train(task: Task, method: Any, lr: float, seed: int) -> tuple[nn.Module, Any]:
    """The network after its whole training, and its optimizer.

    Raises:
        FloatingPointError: if a loss was not finite.
    """
    torch.manual_seed(seed)
    model = task.build().train()
    optimizer = method.make(model, lr, task)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, task.steps))
    order = torch.Generator().manual_seed(seed)
    try:
        for _ in range(task.epochs):
            whole = torch.randperm(task.num_data, generator=order)[: task.num_data // task.batch * task.batch]
            for rows in whole.split(task.batch):
                training_step(optimizer, lambda rows=rows: checked_loss(task, model, rows))
                schedule.step()
    except FloatingPointError:
        finish(optimizer)
        raise
    return model, optimizer


def pace(step: int, steps: int) -> float:
    """The learning rate of a step in multiples of its highest."""
    rising = max(1, int(WARM_UP * steps))
    fallen = max(0, step - rising) / max(1, steps - rising)
    return min(1.0, (step + 1) / rising) * (1 + math.cos(math.pi * fallen)) / 2


def checked_loss(task: Task, model: nn.Module, rows: Tensor) -> Tensor:
    """The loss of a minibatch.

    Raises:
        FloatingPointError: if it is not finite.
    """
    loss = task.loss(task.outputs(model(task.x[rows])), task.y[rows])
    if not math.isfinite(loss.item()):
        raise FloatingPointError
    return loss


@torch.no_grad()
def outputs(task: Task, model: nn.Module) -> list[Tensor]:
    """Those of the validation half, batch by batch."""
    model.eval()
    found = [task.outputs(model(x)) for x, _ in task.val_batches()]
    model.train()
    return found


def scores(task: Task, drawn: list[list[Tensor]]) -> Row:
    """Loss of the mean prediction over draws of all batches, and of classes accuracy and calibration error."""
    targets = [y for _, y in task.val_batches()]
    means = [torch.stack(of_batch) for of_batch in zip(*drawn, strict=True)]
    means = [m.log_softmax(-1).logsumexp(0) - math.log(len(drawn)) if task.classifies else m.mean(0) for m in means]
    losses = [task.loss(mean, y).item() * len(y) for mean, y in zip(means, targets, strict=True)]
    row = {"loss": sum(losses) / len(task.x_val)}
    if task.classifies:
        labels = torch.cat([y.flatten() for y in targets])
        probabilities = torch.cat([mean.flatten(0, -2) for mean in means])[labels != IGNORED].exp()
        labels = labels[labels != IGNORED]
        right = probabilities.argmax(1) == labels
        row["accuracy"] = right.double().mean().item()
        row["calibration_error"] = calibration_error(probabilities.amax(1), right)
    return row
