"""IVON's update rule: against its formula, against ivon-opt, and its invariants."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.optim.table import data, loss_of, network, plain, weights
from vlearn.optim.sampling import blocks, noise


def test_steps_equal_the_written_formula() -> None:
    """Scalars in plain Python, from arXiv:2402.17641, Algorithm 1, with two draws a step."""
    p = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = vlearn.IVON(
        [p], lr=0.1, ess=20, hess_init=0.5, beta1=0.8, beta2=0.9, weight_decay=0.01, generator=torch.Generator()
    )
    m, h, g = 0.7, 0.5, 0.0
    for t in range(1, 6):
        gradients, products = [], []
        for k in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                theta = float(p.detach())
                (math.e ** (0.1 * k) * (p - 2) ** 4).sum().backward()
            gradients.append(4 * math.e ** (0.1 * k) * (theta - 2) ** 3)
            products.append((theta - m) * gradients[-1])
        optimizer.step()
        g_hat, h_hat = sum(gradients) / 2, 20 * (h + 0.01) * sum(products) / 2
        g = 0.8 * g + 0.2 * g_hat
        h_new = 0.9 * h + 0.1 * h_hat + 0.5 * 0.1**2 * (h - h_hat) ** 2 / (h + 0.01)
        m -= 0.1 * (0.5 + 0.01) * (g / (1 - 0.8**t) + 0.01 * m) / (h_new + 0.01)
        h = h_new
        assert float(p.detach()) == pytest.approx(m, abs=1e-12)
        assert float(optimizer.state[p]["hessian"]) == pytest.approx(h, abs=1e-12)


SETTINGS = list(itertools.product([1, 3], ["price", "gradsq"], [math.inf, 0.05], [True, False], [True, False]))


@pytest.mark.parametrize("mc_samples, hess_approx, clip_radius, debias, rescale_lr", SETTINGS)
def test_fifty_steps_equal_ivon_opt_given_the_same_noise(
    mc_samples: int, hess_approx: str, clip_radius: float, debias: bool, rescale_lr: bool
) -> None:
    ivon = pytest.importorskip("ivon")
    torch.set_default_dtype(torch.float64)  # the peer's state takes it
    try:
        model = network()
        peer_model = copy.deepcopy(model)
        x, y = data(count=40)
        kwargs = {"mc_samples": mc_samples, "hess_approx": hess_approx, "clip_radius": clip_radius}
        kwargs |= {"debias": debias, "rescale_lr": rescale_lr, "hess_init": 0.5, "beta2": 0.99}
        peer = ivon.IVON(two_groups(peer_model), lr=0.1, ess=40, **kwargs)
        ours = vlearn.IVON(two_groups(model), lr=0.1, ess=40, **kwargs)
        for _ in range(50):
            draws = []
            for _ in range(mc_samples):
                with peer.sampled_params(train=True):
                    peer.zero_grad()
                    loss_of(peer_model, x, y).backward()
                    draws.append(weights(peer_model))
            peer.step()
            for sample in draws:
                with ours.sampled_params(train=True):
                    with torch.no_grad():
                        for p, theta in zip(model.parameters(), sample, strict=True):
                            p.copy_(theta)
                    ours.zero_grad()
                    loss_of(model, x, y).backward()
            ours.step()
        for a, b in zip(model.parameters(), peer_model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def two_groups(model: nn.Sequential) -> list[dict]:
    first, last = list(model[0].parameters()), list(model[2].parameters())
    return [{"params": first, "lr": 0.2, "weight_decay": 1e-3}, {"params": last, "lr": 0.05, "weight_decay": 1e-2}]


@pytest.mark.parametrize("settings", [{}, {"hess_approx": "gradsq"}, {"clip_radius": 0.01}, {"debias": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_multi_tensor_and_plain_loops_are_equal(settings: dict, dtype: torch.dtype) -> None:
    x, y = data(dtype=dtype)
    results = []
    for foreach in (True, False, None):
        model = network(dtype=dtype)
        optimizer = vlearn.IVON(model, lr=0.1, ess=50, foreach=foreach, **settings)
        torch.manual_seed(2)
        for _ in range(5):
            plain(optimizer, model, x, y)
        results.append(weights(model))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3, 7, 10**6])
def test_cutting_parameters_into_blocks_changes_nothing_but_the_noise(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = data()
    monkeypatch.setattr(blocks, "CPU_BLOCK", size)
    monkeypatch.setattr(noise, "normal", lambda like, generator: [torch.ones_like(t) for t in like])
    model = network()
    model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())  # not contiguous
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, hess_init=0.5)
    for _ in range(3):
        plain(optimizer, model, x, y)
    reference = network()
    monkeypatch.setattr(blocks, "CPU_BLOCK", 10**9)
    optimizer = vlearn.IVON(reference, lr=0.1, ess=50, hess_init=0.5)
    for _ in range(3):
        plain(optimizer, reference, x, y)
    for a, b in zip(weights(model), weights(reference), strict=True):  # vector and scalar instructions round apart
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_precision_at_least_halves_and_stays_positive_whatever_the_gradients() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    optimizer = vlearn.IVON([p], lr=0.0, ess=10, hess_init=0.1, beta2=0.2, weight_decay=0.5)
    precision = torch.full_like(p, 0.6)
    for _ in range(50):
        with optimizer.sampled_params(train=True):
            p.grad = None
            (p * (0.3 * torch.randn(1000, dtype=torch.float64))).sum().backward()
        optimizer.step()
        new = optimizer.state[p]["hessian"] + 0.5
        assert bool((new >= precision / 2 * (1 - 1e-12)).all())
        precision = new.clone()
    assert bool((optimizer.state[p]["hessian"] < 0).any())  # h alone may be negative


def test_draws_have_the_stated_mean_and_variance() -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 20_000))
    optimizer = vlearn.IVON([p], lr=0.1, ess=100, hess_init=0.25, weight_decay=0.05)
    mean = p.detach().clone()
    torch.manual_seed(0)
    with optimizer.sampled_params():
        noise = (p.detach() - mean) * math.sqrt(100 * 0.3)
    assert abs(float(noise.mean())) < 5 / math.sqrt(20_000)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / 20_000)


def test_on_bayesian_linear_regression_it_converges_to_the_mean_field_posterior() -> None:
    torch.manual_seed(0)
    count, delta = 200, 2.0
    x = torch.randn(count, 3, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(count, dtype=torch.float64)
    precision = x.T @ x + delta * torch.eye(3, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optimizer = vlearn.IVON(model, lr=0.5, ess=count, hess_init=0.5, beta2=0.998, weight_decay=delta / count)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        optimizer.zero_grad()
        (0.5 * (model(x).squeeze(1) - y).square().mean()).backward()
        optimizer.step()
        scheduler.step()
    exact = torch.linalg.solve(precision, x.T @ y)
    assert float((model.weight.detach().squeeze() - exact).abs().max()) < 0.02
    variance = optimizer.posterior().variance["weight"].squeeze()
    torch.testing.assert_close(variance, 1 / precision.diagonal(), rtol=0.1, atol=0)


def test_bad_and_good_names_are_reported() -> None:
    model = network()
    assert list(vlearn.IVON(model, lr=0.1, ess=5).posterior().variance) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    unnamed = vlearn.IVON(model.parameters(), lr=0.1, ess=5)
    assert list(unnamed.posterior().variance) == ["param_0", "param_1", "param_2", "param_3"]
    unnamed.watch(model)
    assert list(unnamed.posterior().variance) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    named = vlearn.IVON(model.named_parameters(), lr=0.1, ess=5)
    assert list(named.posterior().variance)[0] == "0.weight"


def test_not_watching_costs_no_hooks_on_modules_and_no_captures() -> None:
    model, (x, y) = network(), data()
    optimizer = vlearn.IVON(model.parameters(), lr=0.1, ess=50)
    with optimizer.sampled_params(train=True):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert optimizer._watch is None and optimizer._sampler.previous is None
