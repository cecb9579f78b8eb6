"""VOGN's Hessian is the mean of the examples' squared gradients, however the loss is reduced and cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.networks import NETWORKS, at_draw, cross_entropy, error_of_sensitivities, hessian_of, problem
from tests.optim.table import data, equal, loss_of, network, plain, states, weights
from tests.oracles.per_example import relative_error

networks = pytest.mark.parametrize("name", NETWORKS)


def optimizer_of(model: nn.Module, **kwargs: object) -> vlearn.VOGN:
    """Its Hessian is the last estimate."""
    return vlearn.VOGN(model, **{"lr": 0.1, "ess": 50, "beta2": 0.0, **kwargs})  # type: ignore[arg-type]


@networks
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_hessian_is_the_mean_of_squared_per_example_gradients(name: str, reduction: str) -> None:
    model, x, y = problem(name)
    optimizer = optimizer_of(model)
    optimizer.watch(model, loss_reduction=reduction)
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    truth = at_draw(model, x, cross_entropy(y)).gradients.square().mean(0)
    optimizer.step()
    assert relative_error(hessian_of(optimizer, model), truth) < 1e-12


def test_class_weights_are_part_of_the_own_loss() -> None:
    model, x, y = problem("perceptron")
    classes = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    optimizer = optimizer_of(model)
    optimizer.watch(model, loss_reduction=lambda: float(classes[y].sum()))
    F.cross_entropy(model(x), y, classes).backward()
    truth = at_draw(model, x, lambda output: F.cross_entropy(output, y, classes, reduction="none"))
    optimizer.step()
    assert relative_error(hessian_of(optimizer, model), truth.gradients.square().mean(0)) < 1e-12


def test_micro_batches_of_different_sizes_count_by_their_examples() -> None:
    model, x, y = problem("perceptron")
    optimizer = optimizer_of(model)
    share = [0.0]
    optimizer.watch(model, loss_scale=lambda: share[0])
    for part in (slice(0, 5), slice(5, 7)):
        share[0] = len(x[part]) / len(x)
        (F.cross_entropy(model(x[part]), y[part]) * share[0]).backward()
    truth = at_draw(model, x, cross_entropy(y)).gradients.square().mean(0)
    optimizer.step()
    assert relative_error(hessian_of(optimizer, model), truth) < 1e-12


@pytest.mark.parametrize("zero", ["before", "between", "in place"])
def test_passes_whose_gradients_were_zeroed_do_not_count(zero: str) -> None:
    model, x, y = problem("perceptron")
    optimizer = optimizer_of(model)
    F.cross_entropy(model(x[:3]), y[:3]).backward()
    if zero == "before":
        optimizer.zero_grad()
    loss = F.cross_entropy(model(x[3:]), y[3:])
    if zero == "between":
        model.zero_grad()
    if zero == "in place":
        optimizer.zero_grad(set_to_none=False)
    loss.backward()
    truth = at_draw(model, x[3:], cross_entropy(y[3:])).gradients.square().mean(0)
    optimizer.step()
    assert relative_error(hessian_of(optimizer, model), truth) < 1e-12


def test_a_forward_without_backward_changes_nothing() -> None:
    x, y = data()
    results = []
    for extra in (False, True):
        model = network()
        optimizer = optimizer_of(model)
        torch.manual_seed(1)
        if extra:
            model(x[:2])
        plain(optimizer, model, x, y)
        results.append(weights(model) + states(optimizer))
    assert equal(*results)


def test_several_draws_average_their_estimates() -> None:
    model, x, y = problem("perceptron")
    optimizer = vlearn.VOGN(model.parameters(), lr=0.1, ess=50, beta2=0.0)
    optimizer.watch(model)
    truths = []
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            F.cross_entropy(model(x), y).backward()
            truths.append(at_draw(model, x, cross_entropy(y)).gradients.square().mean(0))
    optimizer.step()
    assert relative_error(hessian_of(optimizer, model), torch.stack(truths).mean(0)) < 1e-12


@pytest.mark.parametrize("foreach", [True, False])
def test_steps_equal_the_written_formula(foreach: bool) -> None:
    """Osawa's tempering, damping and augmentation factor, momentum and its debiasing."""
    model, x, y = problem("perceptron")
    lr, n, wd, beta1, beta2, gamma, tau, rho = 0.05, 50, 0.02, 0.8, 0.7, 0.3, 0.5, 4.0
    generator = torch.Generator().manual_seed(3)
    optimizer = vlearn.VOGN(
        model,
        lr,
        n,
        hess_init=0.4,
        beta1=beta1,
        beta2=beta2,
        weight_decay=wd,
        damping=gamma,
        tempering=tau,
        augmentation=rho,
        generator=generator,
        foreach=foreach,
    )
    noise = torch.Generator().manual_seed(3)
    mean = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    h, g = torch.full_like(mean, 0.4), torch.zeros_like(mean)
    delta = wd * tau / rho
    for t in range(1, 4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sample = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        expected = (
            mean + torch.randn(mean.shape, generator=noise, dtype=mean.dtype) / (n * rho / tau * (h + delta)).sqrt()
        )
        torch.testing.assert_close(sample, expected, rtol=1e-12, atol=1e-14)
        truth = at_draw(model, x, cross_entropy(y)).gradients
        optimizer.step()
        h = beta2 * h + (1 - beta2) * truth.square().mean(0)
        g = beta1 * g + (1 - beta1) * truth.mean(0)
        mean = mean - lr * (g / (1 - beta1**t) + delta * mean) / (h + delta + gamma)
        found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-14)
    posterior = optimizer.posterior()  # damping is no part of it
    variance = torch.cat([posterior.variance[name].reshape(-1) for name in posterior.names])
    torch.testing.assert_close(variance, 1 / (n * (h + delta)), rtol=1e-12, atol=0.0)


def test_steps_without_captures_keep_the_hessian() -> None:
    model, (x, y) = network(), data()
    optimizer = optimizer_of(model)
    optimizer.watch(model, every=2)
    moved = []
    for _ in range(4):
        before = hessian_of(optimizer, model).clone() if optimizer.state else None
        plain(optimizer, model, x, y)
        moved.append(before is None or not torch.equal(before, hessian_of(optimizer, model)))
    assert moved == [True, False, True, False]


class Normalised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.mark.parametrize(
    "case, match",
    [
        ("unwatched", r"which only a watched model gives: use VOGN\(model, ...\) or optimizer.watch\(model\)"),
        ("batch statistics", r"which this step does not have: 1 \(BatchNorm1d\) is in train mode"),
        ("two forwards", "which this step does not have: two training forward passes came before one backward"),
        ("by hand", "but no backward pass came through the watched model"),
    ],
)
def test_a_step_without_per_example_gradients_is_refused_and_leaves_the_mean(case: str, match: str) -> None:
    x, y = data()
    model = Normalised().double() if case == "batch statistics" else network()
    before = weights(model)
    optimizer = vlearn.VOGN(model if case != "unwatched" else model.parameters(), lr=0.1, ess=50)
    optimizer.train()
    if case == "two forwards":
        (loss_of(model, x[:6], y[:6]) + loss_of(model, x[6:], y[6:])).backward()
    elif case == "by hand":
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    else:
        loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert equal(weights(model), before)


def test_sensitivities_come_from_its_state() -> None:
    model, x, y = problem("perceptron")
    assert error_of_sensitivities(optimizer_of(model), model, x, y) < 1e-10


def test_sums_over_chunks_are_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlearn.per_example import gradients

    results: list[Tensor] = []
    for limit in (2**20, 1):
        monkeypatch.setattr(gradients.chunks, "__defaults__", (limit,))
        monkeypatch.setattr(gradients, "FALLBACK_ENTRIES", limit)
        for name in NETWORKS:
            model, x, y = problem(name)
            optimizer = optimizer_of(model, generator=torch.Generator().manual_seed(1))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            results.append(hessian_of(optimizer, model))
    half = len(results) // 2
    for whole, cut in zip(results[:half], results[half:], strict=True):
        assert relative_error(cut, whole) < 1e-13
