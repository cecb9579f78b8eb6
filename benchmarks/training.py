"""The two training runs that are compared: IVON with live sensitivities, SGD with Laplace approximations.

Same network, initial weights, minibatches, prior and number of steps; at the same epochs every posterior goes
through the same sweep.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks import laplace
from benchmarks.agreement import agreement
from benchmarks.networks import digits_cnn
from benchmarks.pictures import LOOKS, Curves
from vlearn.integrations.wandb import GeneralizationLogger
from vlearn.posterior import Diagonal, from_laplace
from vlearn.posterior.base import Posterior
from vlearn.sensitivity.sweep import SensitivityTable

IVON, DIAGONAL, KRONECKER = LOOKS
TRAINED_BY = {IVON: "IVON", DIAGONAL: "SGD", KRONECKER: "SGD"}
STRUCTURES = {DIAGONAL: "diag", KRONECKER: "kron"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on."""

    seed: int = 0
    epochs: int = 100
    batch: int = 50
    num_data: int = 1000
    num_test: int = 797
    channels: tuple[int, int] = (8, 16)
    prior_precision: float = 5.0
    lr: float = 0.2
    hess_init: float = 0.1
    beta2: float = 0.999
    sgd_lr: float = 0.2
    momentum: float = 0.9
    retrained: int = 50

    @property
    def weight_decay(self) -> float:
        return self.prior_precision / self.num_data

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_data // self.batch)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def checkpoints(self) -> set[int]:
        """Epochs after which there is a sweep: denser at first, when the loss falls fast."""
        shares = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
        return {max(1, round(share * self.epochs)) for share in shares}


SMOKE = Settings(epochs=3, num_data=200, num_test=200, channels=(3, 4), retrained=4)


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's 8x8 digits; a fixed random split, so that both halves have the same writers."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls, settings: Settings, standardised: bool = True) -> Digits:
        """Pixels of mean 0 and standard deviation 1, or in [0, 1]."""
        from sklearn.datasets import load_digits

        found = load_digits()
        order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)[order]
        y = torch.tensor(found.target)[order]
        x = (x - x[: settings.num_data].mean()) / x[: settings.num_data].std() if standardised else x / 16
        test = slice(settings.num_data, settings.num_data + settings.num_test)
        return cls(x[: settings.num_data], y[: settings.num_data], x[test], y[test])

    def minibatches(self, settings: Settings) -> Iterator[list[Tensor]]:
        """The indices of every minibatch, epoch by epoch; the same for both optimizers."""
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(settings.epochs):
            yield list(torch.randperm(len(self.y), generator=generator).split(settings.batch))


def network(settings: Settings) -> nn.Sequential:
    """The same initial weights for every optimizer."""
    torch.manual_seed(settings.seed)
    return digits_cnn(*settings.channels)


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


def sweep(model: nn.Module, posterior: Posterior, data: Digits) -> SensitivityTable:
    """Every training example, in the model's precision."""
    dtype = next(model.parameters()).dtype
    batches = list(zip(data.x.to(dtype).split(250), data.y.split(250), strict=True))
    generator = torch.Generator().manual_seed(0)
    return vlearn.sweep(model, posterior, batches, F.cross_entropy, progress=False, generator=generator)


def losses(curves: Curves, method: str) -> dict[str, float]:
    """Leave-one-out against test loss, over the epochs and at the end."""
    loo, test = np.array(curves.loo_loss[method]), np.array(curves.test_loss)
    return {
        "mean_absolute_gap": np.abs(loo - test).mean(),
        "mean_relative_gap": (np.abs(loo - test) / test).mean(),
        "pearson_over_epochs": agreement(loo, test)[0],
        "train_loss": curves.train_loss[-1],
        "loo_loss": loo[-1],
        "test_loss": test[-1],
        "test_loss_standard_error": curves.test_error[-1],
        "test_accuracy": curves.test_accuracy[-1],
    }
