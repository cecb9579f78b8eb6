"""FullVON keeps the whole covariance: exact where the exact posterior is Gaussian, near the best Gaussian elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.networks import NETWORKS, at_draw, covariance_of, cross_entropy, problem
from tests.optim.table import (
    FULLVON,
    FULLVON_PRICE,
    data,
    equal,
    loss_of,
    modes,
    network,
    plain,
    states,
    weights,
)
from tests.optim.test_von import CERTAIN, mean_over_signs, plain_step
from tests.oracles.per_example import relative_error

rules = pytest.mark.parametrize("rule", ["von", "iblr"])
entries = pytest.mark.parametrize("entry", [FULLVON, FULLVON_PRICE], ids=str)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def hessian_of(optimizer: vlearn.FullVON) -> Tensor:
    """H ``[P, P]`` of the state."""
    rows = [state["hessian"] for state in optimizer.state.values()]
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])


@rules
def test_on_bayesian_linear_regression_it_converges_to_the_exact_posterior(rule: str) -> None:
    torch.manual_seed(0)
    n, delta, noise = 30, 2.0, 0.4
    x = torch.randn(n, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    y = torch.randn(n, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = vlearn.FullVON(
        model,
        0.5,
        CERTAIN,  # draws at the mean: else it is found up to the draws' noise alone
        beta1=0.0,
        beta2=0.8,
        weight_decay=delta / n,
        rule=rule,
        likelihood=lambda f: torch.distributions.Normal(f, noise),
        num_data=n,
    )
    for _ in range(300):
        plain_step(optimizer, lambda: -torch.distributions.Normal(model(x), noise).log_prob(y).mean())
    precision = x.mT @ x / noise**2 + delta * torch.eye(3, dtype=torch.float64)
    exact = torch.linalg.solve(precision, x.mT @ y / noise**2).mT
    assert relative_error(model.weight.detach(), exact) < 1e-6
    assert relative_error(covariance_of(optimizer, model), precision.inverse()) < 1e-6


def best_gaussian(x: Tensor, y: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """(mean, covariance) of the Gaussian nearest to the posterior of a 2-D logistic regression, by quadrature."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(24)
    grid = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes))
    mass = torch.cartesian_prod(torch.tensor(masses), torch.tensor(masses)).prod(1)
    mass = mass / mass.sum()
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    log_scale = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    lower = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([mean, log_scale, lower], max_iter=500, line_search_fn="strong_wolfe")

    def root() -> Tensor:
        return torch.diag(log_scale.exp()) + torch.stack([torch.zeros(2).double(), torch.stack([lower, 0 * lower])])

    def objective() -> Tensor:
        search.zero_grad()
        theta = mean + grid @ root().mT
        losses = F.binary_cross_entropy_with_logits(theta @ x.mT, y.expand(len(theta), -1), reduction="none").sum(1)
        value = (mass * (losses + delta * theta.square().sum(1) / 2)).sum() - log_scale.sum()
        value.backward()
        return value

    for _ in range(3):
        search.step(objective)
    return mean.detach(), (root() @ root().mT).detach()


@rules
def test_on_logistic_regression_it_comes_near_the_best_gaussian(rule: str) -> None:
    torch.manual_seed(0)
    n, delta = 40, 1.0
    x = torch.randn(n, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=torch.float64)
    y = (torch.sigmoid(x @ torch.tensor([1.5, -1.0], dtype=torch.float64)) > torch.rand(n)).double()
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = vlearn.FullVON(
        model,
        0.3,
        n,
        beta1=0.0,
        beta2=0.9,
        weight_decay=delta / n,
        rule=rule,
        likelihood=lambda f: torch.distributions.Bernoulli(logits=f),
        generator=torch.Generator().manual_seed(1),
    )
    for step in range(600):
        rate = 1 / (4 + step / 4)
        optimizer.param_groups[0].update(lr=rate, beta2=1 - rate)
        plain_step(optimizer, lambda: F.binary_cross_entropy_with_logits(model(x).squeeze(1), y))
    mean, covariance = best_gaussian(x, y, delta)
    found = torch.distributions.MultivariateNormal(flat(model), covariance_of(optimizer, model))
    reference = torch.distributions.MultivariateNormal(mean, covariance)
    assert float(torch.distributions.kl_divergence(found, reference)) < 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_its_estimate_is_the_dense_gauss_newton_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem(name)
    optimizer = vlearn.FullVON(model, 0.0, CERTAIN, beta2=0.0, num_data=50)

    def estimate() -> Tensor:
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
        return hessian_of(optimizer)

    truth = at_draw(model, x, cross_entropy(y)).ggn() / len(x)
    assert relative_error(mean_over_signs(monkeypatch, estimate), truth) < 1e-11


@rules
def test_steps_equal_the_written_formula(rule: str) -> None:
    """VON takes the new precision for the mean, the positive-definite rule the old one."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    lr, ess, wd, beta1, beta2 = 0.3, 15.0, 0.1, 0.8, 0.6
    optimizer = vlearn.FullVON(
        model,
        lr,
        ess,
        hess_init=0.5,
        beta1=beta1,
        beta2=beta2,
        weight_decay=wd,
        rule=rule,
        likelihood="gaussian",
        generator=torch.Generator().manual_seed(2),
    )
    unit = torch.eye(3, dtype=torch.float64)
    mean, s, g = flat(model), 0.5 * unit + wd * unit, torch.zeros(3).double()
    estimate = 2 * x.mT @ x / 20
    for t in range(1, 5):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        sample = flat(model)
        optimizer.step()
        old, lower = s, torch.linalg.cholesky(s)
        gradient = s - estimate - wd * unit  # G = S - E∇²L
        u = lower.mT - (1 - beta2) * lower.inverse() @ gradient
        s = (s + u.mT @ u) / 2 if rule == "iblr" else beta2 * s + (1 - beta2) * (estimate + wd * unit)
        g = beta1 * g + (1 - beta1) * 2 * ((x @ sample - y.squeeze(1)).unsqueeze(1) * x).mean(0)
        mean = mean - lr * torch.linalg.solve(old if rule == "iblr" else s, g / (1 - beta1**t) + wd * mean)
        torch.testing.assert_close(flat(model), mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(hessian_of(optimizer) + wd * unit, s, rtol=1e-10, atol=1e-12)


def test_the_positive_definite_rule_at_most_halves_the_precision_whatever_the_sign_of_the_estimate() -> None:
    model = network()
    optimizer = FULLVON_PRICE.make(model.parameters(), lr=0.0, beta2=0.95)
    generator = torch.Generator().manual_seed(0)
    before = None
    for _ in range(10):
        with optimizer.sampled_params(train=True):
            for p in model.parameters():
                p.grad = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        now = hessian_of(optimizer) + 1e-4 * torch.eye(53, dtype=torch.float64)
        assert float(torch.linalg.eigvalsh(now).min()) > 0
        if before is not None:
            assert float(torch.linalg.eigvalsh(now - before / 2).min()) > 0
        before = now


def test_prices_estimate_is_the_same_in_one_parameter_group_and_in_several() -> None:
    """Also from a draw that is in the weights when step() is called."""
    found = []
    for several in (False, True):
        model = network()
        parameters = list(model.parameters())
        groups = [{"params": parameters[:2]}, {"params": parameters[2:]}] if several else parameters
        optimizer = FULLVON_PRICE.make(groups)
        torch.manual_seed(3)
        modes(optimizer, model, *data())
        found.append(states(optimizer) + weights(model))
    assert equal(*found)


def test_prices_estimate_has_the_hessian_as_its_mean() -> None:
    """Of a quadratic: E[S(θ - m)∇ℓᵀ] with ∇ℓ = Aθ."""
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64)
    a = root @ root.mT
    p = nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = vlearn.FullVON([p], 0.0, 10, rule="iblr", curvature="price", beta2=1.0)
    found = []
    draws = 4000
    for _ in range(draws):
        with optimizer.sampled_params(train=True):
            p.grad = a @ p.detach()
        draw = optimizer._sampler.draw
        found.append(
            optimizer._structure.price_estimate(draw, optimizer.param_groups[0], list(draw.slices), [], [p.grad])[0]
        )
        optimizer._sampler.discard()
    estimates = torch.stack(found)
    estimates = (estimates + estimates.mT) / 2
    assert bool(((estimates.mean(0) - a).abs() <= 5 * estimates.std(0) / math.sqrt(draws)).all())


def test_draws_have_the_stated_covariance() -> None:
    model, (x, y) = network(), data()
    optimizer = FULLVON.make(model, num_data=70, beta2=0.5)
    for _ in range(3):
        plain(optimizer, model, x, y)
    mean, draws = flat(model), []
    for _ in range(3000):
        with optimizer.sampled_params():
            draws.append(flat(model) - mean)
    moves = torch.stack(draws)
    covariance = covariance_of(optimizer, model) * 70 / 50  # drawn on the scale of ess
    products = moves.unsqueeze(2) * moves.unsqueeze(1)
    error = (products.mean(0) - covariance).abs()
    assert bool((error <= 5.5 * products.std(0) / math.sqrt(len(draws))).all())
    variances = optimizer.posterior().draw_variance
    variance = torch.cat([variances[name].reshape(-1) for name, _ in model.named_parameters()])
    torch.testing.assert_close(variance, covariance.diagonal(), rtol=1e-9, atol=0.0)


def test_groups_may_differ_in_ess() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "ess": 200}]
    optimizer = vlearn.FullVON(groups, 0.1, 50, num_data=50, beta2=0.0)
    optimizer.watch(model)
    plain_step(optimizer, lambda: F.cross_entropy(model(torch.randn(9, 2).double()), torch.randint(0, 2, (9,))))
    ratio = torch.tensor([1.0] * 4 + [0.5] * 2, dtype=torch.float64)
    truth = ratio * covariance_of(optimizer, model) * ratio.unsqueeze(1)
    posterior, mean = optimizer.posterior(), flat(model)
    ways = (lambda: torch.cat([value.reshape(-1) for value in posterior.sample().values()]) - mean, lambda: drawn())

    def drawn() -> Tensor:
        with optimizer.sampled_params():
            return flat(model) - mean

    for way in ways:
        moves = torch.stack([way() for _ in range(2000)])
        products = moves.unsqueeze(2) * moves.unsqueeze(1)
        assert bool(((products.mean(0) - truth).abs() <= 5 * products.std(0) / math.sqrt(2000)).all())


@entries
def test_frozen_parameters_keep_their_rows_and_new_ones_join(entry: Any) -> None:
    model, (x, y) = network(), data()
    for p in model[2].parameters():
        p.requires_grad_(False)
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    first = hessian_of(optimizer)
    assert first.shape == (35, 35)
    for p in model[2].parameters():
        p.requires_grad_(True)
    optimizer.zero_grad()
    with optimizer.sampled_params():
        pass
    whole = hessian_of(optimizer)
    assert torch.equal(whole[:35, :35], first) and torch.equal(whole[35:, 35:], 0.5 * torch.eye(18).double())
    assert not whole[:35, 35:].any()
    plain(optimizer, model, x, y)
    model[0].requires_grad_(False)
    before, frozen = hessian_of(optimizer), flat(model[0])
    for _ in range(3):
        optimizer.zero_grad()
        plain(optimizer, model, x, y)
    after = hessian_of(optimizer)
    assert torch.equal(flat(model[0]), frozen) and torch.allclose(after[:35, :35], before[:35, :35], rtol=1e-12)
    assert not torch.allclose(after[35:, 35:], before[35:, 35:])
    assert float(torch.linalg.eigvalsh(after + 1e-4 * torch.eye(53).double()).min()) > 0


def test_sensitivities_come_from_its_covariance() -> None:
    model, x, y = problem("convolution")
    optimizer = vlearn.FullVON(model, 0.1, 50, hess_init=0.5)
    F.cross_entropy(model(x), y).backward()
    truth = at_draw(model, x, cross_entropy(y))
    optimizer.step()
    covariance = covariance_of(optimizer, model)
    found = optimizer.sensitivities(deviation=True)
    assert found.deviation is not None
    assert relative_error(found.self_influence, truth.self_influence(covariance)) < 1e-9
    assert relative_error(found.deviation, truth.deviation(covariance)) < 1e-9


def test_too_many_parameters_and_wrong_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="40200 parameters, but a dense posterior takes at most 16384: use VON"):
        vlearn.FullVON(nn.Linear(200, 200), 0.1, 50)
    with pytest.raises(ValueError, match="rule='newton', but it must be 'von' or 'iblr': use 'von'"):
        vlearn.FullVON(network(), 0.1, 50, rule="newton")
    with pytest.raises(ValueError, match="curvature='price' with rule='von'.*use rule='iblr'"):
        vlearn.FullVON(network(), 0.1, 50, curvature="price")


def test_float32_models_train_and_have_sensitivities() -> None:
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = vlearn.FullVON(model, 0.1, 50)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    assert optimizer.sensitivities().self_influence.dtype == torch.float32
