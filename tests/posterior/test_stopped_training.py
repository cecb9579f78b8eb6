"""The posterior of a network that stopped training, and the training time of torch's SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

import vlearn
from tests.oracles.per_example import relative_error
from tests.posterior.test_fit import EXACT, N, covariance, in_batches, labels, mlp
from vlearn.posterior import fit, load, training_time
from vlearn.posterior.fit import STRUCTURES


def by_hand(sigma: Tensor, time: float) -> Tensor:
    """(I - e^{-ηW}) W⁻¹/N of W = Σ⁻¹/N, by the matrix exponential."""
    curvature = torch.linalg.inv(sigma) / N
    return (torch.eye(len(sigma), dtype=sigma.dtype) - torch.matrix_exp(-time * curvature)) @ sigma


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if not name.startswith("last")])
@pytest.mark.parametrize("time", [1e-3, 1.0, 30.0, 1e4])
def test_it_is_the_function_of_the_curvature(structure: str, time: float, tmp_path: Path) -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    expected = by_hand(covariance(posterior, model), time)
    stopped = posterior.stopped_at(time)
    assert relative_error(covariance(stopped, model), expected) < 1e-8
    told = fit(model, in_batches(x), F.cross_entropy, structure, training_time=time, **EXACT)
    assert relative_error(covariance(told, model), expected) < 1e-8
    told.save(tmp_path / "stopped.pt")
    assert relative_error(covariance(load(tmp_path / "stopped.pt", model), model), expected) < 1e-8
    assert torch.equal(covariance(posterior.stopped_at(math.inf), model), covariance(posterior, model))


def test_an_optimizers_and_a_product_posterior_have_it_too() -> None:
    model, x = mlp()
    optimizer = vlearn.KFACVON(model, lr=0.01, ess=N)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    posterior = optimizer.posterior()
    expected = by_hand(covariance(posterior, model), 2.0)
    assert relative_error(covariance(posterior.stopped_at(2.0), model), expected) < 1e-8
    assert relative_error(by_hand(covariance(posterior, model), 2.0), expected) < 1e-12  # the state has not changed


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan])
def test_a_time_that_is_none_is_refused(time: float) -> None:
    model, x = mlp()
    with pytest.raises(ValueError, match="training_time=.*, but it must be positive"):
        fit(model, in_batches(x), F.cross_entropy, training_time=time)
    posterior = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT)
    with pytest.raises(ValueError, match="training_time=.*, but it must be positive"):
        posterior.stopped_at(time)


def test_it_predicts_what_a_short_training_without_an_example_gives() -> None:
    """Ridge regression by full-batch gradient descent that stops early, retrained without each example."""
    torch.manual_seed(0)
    x, decay, rate, steps = torch.randn(N, 6).double() * torch.logspace(0, -1.5, 6), 1e-3, 0.1, 200
    y = x @ torch.randn(6, 1).double() + 0.5 * torch.randn(N, 1).double()

    def trained(without: int | None) -> nn.Linear:
        torch.manual_seed(1)
        model = nn.Linear(6, 1, bias=False).double()
        keep = torch.tensor([n for n in range(N) if n != without])
        optimizer = SGD(model.parameters(), lr=rate, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (model(x[keep]) - y[keep]).square().sum() / N).backward()
            optimizer.step()
        assert training_time(optimizer, steps) == pytest.approx(rate * steps)
        return model

    model = trained(None)
    change = torch.stack([(trained(n)(x[n : n + 1]) - model(x[n : n + 1])).detach() for n in range(N)]).flatten()

    def half_square(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1)

    told: dict[str, Any] = {"curvature": "ggn-exact", "prior_precision": N * decay, "progress": False}
    correlations = []
    for time in (math.inf, rate * steps):
        posterior = fit(model, in_batches(x, y), half_square, "full", training_time=time, **told)
        table = vlearn.sweep(model, posterior, in_batches(x, y), half_square, leverage=None, progress=False)
        correlations.append(float(torch.corrcoef(torch.stack([table.deviation.flatten(), change]))[0, 1]))
    assert correlations[0] < 0.94 < 0.98 < correlations[1]


# -- the time of SGD -------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[SGD], Any]] = {
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 50),
    "steps": lambda o: schedules.StepLR(o, 10, 0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.95),
    "of the step": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle, of the momentum too": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=60),
    "milestones": lambda o: schedules.MultiStepLR(o, [10, 30]),
    "linear": lambda o: schedules.LinearLR(o),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 10),
    "constant": lambda o: schedules.ConstantLR(o),
    "polynomial": lambda o: schedules.PolynomialLR(o, 50),
}


def sgd(**settings: Any) -> SGD:
    return SGD([nn.Parameter(torch.zeros(3))], **{"lr": 0.3, "momentum": 0.9, **settings})


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_of_a_schedule_are_summed_up(name: str, every: int) -> None:
    optimizer = sgd()
    scheduler = SCHEDULES[name](optimizer)
    expected = 0.0
    for step in range(40 * every):
        group = optimizer.param_groups[0]
        expected += group["lr"] / (1 - group["momentum"])
        optimizer.step()
        if step % every == every - 1:
            scheduler.step()
    before = (scheduler.state_dict().keys(), optimizer.param_groups[0]["lr"], scheduler.last_epoch)
    assert training_time(optimizer, 40 * every, scheduler) == pytest.approx(expected, rel=1e-9)
    assert before == (scheduler.state_dict().keys(), optimizer.param_groups[0]["lr"], scheduler.last_epoch)


def test_dampening_and_plain_descent() -> None:
    assert training_time(sgd(momentum=0.0), 10) == pytest.approx(3.0)
    assert training_time(sgd(dampening=0.5), 10) == pytest.approx(15.0)


def two_groups() -> SGD:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    return SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], lr=0.3)


def in_sequence(optimizer: SGD) -> Any:
    parts = [schedules.LinearLR(optimizer, total_iters=10), schedules.CosineAnnealingLR(optimizer, 40)]
    return schedules.SequentialLR(optimizer, parts, [10])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("optimizer", "scheduler", "steps", "error", "message"),
    [
        (torch.optim.Adam([nn.Parameter(torch.zeros(1))]), None, 5, TypeError, "Adam does not follow the gradient"),
        (two_groups(), None, 5, ValueError, "the parameter groups differ in learning rate"),
        (sgd(), None, 0, ValueError, "steps=0, but it must be a positive whole number"),
        (sgd(), in_sequence, 5, ValueError, "the rates of this SequentialLR cannot be computed again"),
        (sgd(), lambda o: schedules.StepLR(sgd(), 3), 5, ValueError, "it sets those of another optimizer"),
        (sgd(), schedules.ReduceLROnPlateau, 5, ValueError, "of this ReduceLROnPlateau cannot be computed again"),
    ],
)
def test_what_has_no_such_time_is_refused(
    optimizer: Any, scheduler: Any, steps: int, error: type[Exception], message: str
) -> None:
    made = None if scheduler is None else scheduler(optimizer)
    for _ in range(3 if made is not None else 0):
        optimizer.step()
        made.step(1.0) if isinstance(made, schedules.ReduceLROnPlateau) else made.step()
    with pytest.raises(error, match=message):
        training_time(optimizer, steps, made)
