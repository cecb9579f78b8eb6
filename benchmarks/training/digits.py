"""The two training runs that are compared: IVON with live sensitivities, SGD with Laplace approximations.

Same network, initial weights, minibatches, prior and number of steps; at the same epochs every posterior goes
through the same sweep.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.problems.batches import batches
from benchmarks.problems.digits import Digits, Settings, network
from benchmarks.reference import laplace
from benchmarks.report.curves import Curves
from benchmarks.report.pictures import DIAGONAL, IVON, KRONECKER
from benchmarks.training.evaluation import STRUCTURES
from vlearn.gaussians.protocol import Posterior
from vlearn.integrations.wandb import GeneralizationLogger
from vlearn.posterior import Diagonal, from_laplace
from vlearn.sensitivity.table import SensitivityTable

TRAINED_BY = {IVON: "IVON", DIAGONAL: "SGD", KRONECKER: "SGD"}


def epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    data: Digits,
    after_step: Callable[[Tensor], None] = lambda index: None,
) -> Iterator[int]:
    """Train along a cosine schedule; the number of each epoch, from 1, when its steps are done."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for epoch, minibatches in enumerate(data.minibatches(settings), 1):
        for index in minibatches:
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
            schedule.step()
            after_step(index)
        yield epoch


def train_ivon(
    settings: Settings, data: Digits, memory: vlearn.MemoryMap | None, run: Any, advance: Callable[[], None]
) -> tuple[nn.Module, Diagonal, Curves, list[float]]:
    """IVON with live sensitivities at every step and a sweep at the checkpoints.

    Returns:
        The model at the mean, its posterior, the curves, and the seconds of every call to `sensitivities()`.
    """
    model = network(settings)
    optimizer = vlearn.IVON(
        model,
        lr=settings.lr,
        ess=settings.num_data,
        hess_init=settings.hess_init,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    logger = run and GeneralizationLogger(run, every=20, images=data.x, labels=data.y, table_every=5)
    curves, live = Curves(), []

    def follow(index: Tensor) -> None:
        start = time.perf_counter()
        s = optimizer.sensitivities()
        live.append(time.perf_counter() - start)
        if memory is not None:
            memory.record(index, s)
        if logger:
            logger.log_step(optimizer)

    if memory is not None:
        memory.new_snapshot(0)
    for epoch in epochs(model, optimizer, settings, data, follow):
        step = epoch * settings.steps_per_epoch
        if epoch in settings.checkpoints:
            note_losses(curves, step, model, data)
            table = timed_sweep(curves, IVON, model, optimizer.posterior, data)
            if memory is not None:
                memory.record_sweep(step, table, test_loss=curves.test_loss[-1])
            if logger:
                logger.log_sweep(step, table, test_loss=curves.test_loss[-1])
        if memory is not None and epoch < settings.epochs:
            memory.new_snapshot(step)
        advance()
    if logger:
        logger.close()
    posterior = optimizer.posterior().clone()
    optimizer.unwatch()
    return model, posterior, curves, live


def train_sgd(
    settings: Settings, data: Digits, methods: tuple[str, ...], advance: Callable[[], None]
) -> tuple[nn.Module, Curves]:
    """SGD with momentum on the same objective, with Laplace approximations at the checkpoints."""
    model = network(settings)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.sgd_lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    curves = Curves()
    for epoch in epochs(model, optimizer, settings, data):
        if epoch in settings.checkpoints:
            note_losses(curves, epoch * settings.steps_per_epoch, model, data)
            for method in methods:
                timed_sweep(curves, method, model, lambda m=method: laplace_posterior(m, model, data, settings), data)
        advance()
    return model, curves


def laplace_posterior(method: str, model: nn.Module, data: Digits, settings: Settings) -> Posterior:
    """A Laplace approximation at the model's weights, in their precision."""
    x = data.x.to(next(model.parameters()).dtype)
    return from_laplace(laplace.fit(model, x, data.y, STRUCTURES[method], settings.prior_precision))


@torch.no_grad()
def note_losses(curves: Curves, step: int, model: nn.Module, data: Digits) -> None:
    """Add a checkpoint to the curves; the network has no layer that knows train from eval mode."""
    output = model(data.x_test)
    losses = F.cross_entropy(output, data.y_test, reduction="none")
    curves.steps.append(step)
    curves.train_loss.append(F.cross_entropy(model(data.x), data.y).item())
    curves.test_loss.append(losses.mean().item())
    curves.test_error.append((losses.std() / len(losses) ** 0.5).item())
    curves.test_accuracy.append((output.argmax(1) == data.y_test).double().mean().item())


def timed_sweep(
    curves: Curves, method: str, model: nn.Module, get_posterior: Callable[[], Posterior], data: Digits
) -> SensitivityTable:
    """Get the posterior and sweep all training examples; add LOO loss and seconds of both to the curves."""
    start = time.perf_counter()
    table = sweep(model, get_posterior(), data)
    curves.seconds.setdefault(method, []).append(time.perf_counter() - start)
    curves.loo_loss.setdefault(method, []).append(table.loo_loss.mean().item())
    return table


def sweep(
    model: nn.Module, posterior: Posterior, data: Digits, leverage: str | None = "probe", refined: bool = False
) -> SensitivityTable:
    """Every training example, in the model's precision."""
    loader = batches(data.x.to(next(model.parameters()).dtype), data.y, size=250)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* are not to be believed")  # how far off they are is what is shown
        return vlearn.sweep(
            model, posterior, loader, F.cross_entropy, leverage, progress=False, generator=generator, refined=refined
        )
