"""The Bayesian learning rule holds the classical optimizers: each is found where it should be (arXiv:2107.04562)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import data, loss_of, network, weights
from tests.optim.test_full_von import flat
from tests.optim.test_von import CERTAIN, plain_step


def logistic() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(40) > 0).double()
    return nn.Linear(3, 1, bias=False).double(), x, y


def bernoulli(output: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Bernoulli(logits=output)


def derivatives(theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient, Hessian) of the mean loss."""
    p = torch.sigmoid(x @ theta)
    return ((p - y).unsqueeze(1) * x).mean(0), x.mT @ ((p * (1 - p)).unsqueeze(1) * x) / len(x)


def test_a_fixed_precision_gives_the_steps_of_gradient_descent() -> None:
    x, y = data()
    first, second = network(), network()
    settings = {"beta1": 0.0, "beta2": 1.0, "hess_init": 1.0, "weight_decay": 0.0, "num_data": 50}
    variational = vlearn.VON(first, 0.3, CERTAIN, **settings)  # type: ignore[arg-type]
    descent = torch.optim.SGD(second.parameters(), lr=0.3)
    for _ in range(5):
        plain_step(variational, lambda: loss_of(first, x, y))
        plain_step(descent, lambda: loss_of(second, x, y))
    for a, b in zip(weights(first), weights(second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_delta_method_with_full_steps_is_newtons_method() -> None:
    model, x, y = logistic()
    wd = 0.05
    optimizer = vlearn.FullVON(
        model, 1.0, CERTAIN, beta1=0.0, beta2=0.0, weight_decay=wd, likelihood=bernoulli, num_data=40
    )
    theta = flat(model)
    for _ in range(6):
        plain_step(optimizer, lambda: F.binary_cross_entropy_with_logits(model(x).squeeze(1), y))
        gradient, hessian = derivatives(theta, x, y)
        theta = theta - torch.linalg.solve(hessian + wd * torch.eye(3).double(), gradient + wd * theta)
        torch.testing.assert_close(flat(model), theta, rtol=1e-9, atol=1e-11)
    gradient, _ = derivatives(theta, x, y)
    assert float((gradient + wd * theta).abs().max()) < 1e-9  # it has converged, quadratically


def test_with_smaller_steps_it_is_the_online_newton_method_and_diagonal_its_diagonal() -> None:
    wd, lr, rho = 0.05, 0.4, 0.3
    for full in (True, False):
        model, x, y = logistic()
        kind = vlearn.FullVON if full else vlearn.VON
        settings = {"hess_init": 0.7, "beta1": 0.0, "beta2": 1 - rho, "weight_decay": wd, "num_data": 40}
        optimizer = kind(model, lr, CERTAIN, likelihood=bernoulli, **settings)
        theta, s = flat(model), 0.7 * torch.eye(3).double()
        for _ in range(6):
            plain_step(optimizer, lambda model=model, x=x, y=y: F.binary_cross_entropy_with_logits(model(x)[:, 0], y))
            gradient, hessian = derivatives(theta, x, y)
            s = (1 - rho) * s + rho * (hessian if full else hessian.diagonal().diag())
            theta = theta - lr * torch.linalg.solve(s + wd * torch.eye(3).double(), gradient + wd * theta)
            torch.testing.assert_close(flat(model), theta, rtol=1e-9, atol=1e-11)


def test_with_the_expectation_kept_the_derivatives_are_those_at_the_draw() -> None:
    model, x, y = logistic()
    wd, lr, rho = 0.05, 0.4, 0.3
    optimizer = vlearn.VON(
        model, lr, 40, hess_init=0.7, beta1=0.0, beta2=1 - rho, weight_decay=wd, likelihood=bernoulli
    )
    theta, h = flat(model), torch.full((3,), 0.7, dtype=torch.float64)
    for _ in range(6):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x).squeeze(1), y).backward()
        gradient, hessian = derivatives(flat(model), x, y)
        optimizer.step()
        h = (1 - rho) * h + rho * hessian.diagonal()
        theta = theta - lr * (gradient + wd * theta) / (h + wd)
        torch.testing.assert_close(flat(model), theta, rtol=1e-9, atol=1e-11)


def test_with_one_example_a_batch_vogns_squares_are_those_of_rmsprop() -> None:
    x, y = data()
    first, second = network(), network()
    variational = vlearn.VOGN(first, 0.0, CERTAIN, hess_init=1e-300, beta2=0.9, num_data=50)
    rmsprop = torch.optim.RMSprop(second.parameters(), lr=0.0, alpha=0.9)
    for n in range(5):
        plain_step(variational, lambda n=n: loss_of(first, x[n : n + 1], y[n : n + 1]))
        plain_step(rmsprop, lambda n=n: loss_of(second, x[n : n + 1], y[n : n + 1]))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(variational.state[p]["hessian"], rmsprop.state[q]["square_avg"])


def test_on_one_parameter_the_positive_definite_rule_with_price_is_ivons() -> None:
    """But for the mean's step: IVON's takes the new precision."""
    hessians = []
    for kind in ("ivon", "full"):
        p = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        generator = torch.Generator().manual_seed(3)
        common = {"beta2": 0.7, "hess_init": 0.5, "weight_decay": 0.1, "generator": generator}
        if kind == "ivon":
            optimizer = vlearn.IVON([p], 0.0, 20, **common)  # type: ignore[arg-type]
        else:
            optimizer = vlearn.FullVON([p], 0.0, 20, rule="iblr", curvature="price", **common)  # type: ignore[arg-type]
        for _ in range(6):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (p.square().sum() + p.sin().sum()).backward()
            optimizer.step()
        hessians.append(optimizer.state[p]["hessian"].reshape(1))
    torch.testing.assert_close(hessians[0], hessians[1], rtol=1e-10, atol=1e-12)
