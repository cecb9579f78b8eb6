"""`diagnostics()`: a Hessian that does not learn is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vlearn
from vlearn.optim.diagnostics import diagnostics


def trained(
    steps: int, dtype: torch.dtype = torch.float64, **settings: float
) -> tuple[list[nn.Parameter], vlearn.IVON]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(40, 5, dtype=dtype)), nn.Parameter(torch.randn(7, dtype=dtype))]
    groups = [{"params": weights[:1], "beta2": 0.5}, {"params": weights[1:], "hess_init": 2.0}]
    optimizer = vlearn.IVON(groups, lr=0.1, ess=100, **settings)  # pyright: ignore
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            sum(p.square().sum() for p in weights).backward()
        optimizer.step()
    return weights, optimizer


def test_every_value_is_that_of_its_definition() -> None:
    weights, optimizer = trained(3, clip_radius=1.0, beta2=0.999)
    found = optimizer.diagnostics()
    hessian = torch.cat([optimizer.state[p]["hessian"].flatten() for p in weights])
    momentum = torch.cat([optimizer.state[p]["momentum"].flatten() for p in weights])
    mean = torch.cat([p.detach().flatten() for p in weights])
    initial = torch.cat([torch.full((200,), 1.0), torch.full((7,), 2.0)])
    direction = (momentum / (1 - 0.9**3) + 1e-4 * mean) / (hessian + 1e-4)
    assert found.step == 3
    assert found.hess_init_weight == pytest.approx(0.999**3)
    assert (found.hessian_min, found.hessian_max) == (float(hessian.min()), float(hessian.max()))
    assert found.hessian_median == float(hessian.median())
    assert found.hessian_moved == pytest.approx(float(((hessian / initial - 1).abs() > 0.01).double().mean()))
    assert found.signal_to_noise == pytest.approx(float((mean.abs() * (100 * (hessian + 1e-4)).sqrt()).median()))
    assert found.clipped == pytest.approx(float((direction.abs() > 1).double().mean()))
    assert 0 < found.clipped < 1 and 0 < found.hessian_moved < 1


def test_before_the_first_step_nothing_has_moved() -> None:
    found = trained(0)[1].diagnostics()
    assert (found.step, found.hess_init_weight, found.hessian_moved, found.clipped) == (0, 1.0, 0.0, 0.0)
    assert (found.hessian_min, found.hessian_max) == (1.0, 2.0)


def test_the_mean_is_read_while_a_draw_is_in_the_weights() -> None:
    _, optimizer = trained(2)
    expected = optimizer.diagnostics()
    optimizer.train()
    assert optimizer.diagnostics() == expected


def test_narrow_weights_are_read_from_their_float32_state() -> None:
    assert math.isfinite(trained(2, dtype=torch.bfloat16)[1].diagnostics().signal_to_noise)


def test_large_models_are_read_by_an_even_subsample_but_for_the_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, optimizer = trained(1)
    optimizer.state[weights[0]]["hessian"][0, 1] = 5e4
    monkeypatch.setattr(diagnostics, "SUBSAMPLE", 20)  # every eleventh entry
    found = optimizer.diagnostics()
    read = torch.cat([optimizer.state[p]["hessian"].flatten()[::11] for p in weights])
    assert found.hessian_max == 5e4
    assert found.hessian_median == float(read.median())


def test_an_optimizer_whose_parameters_are_all_frozen_has_none() -> None:
    optimizer = vlearn.IVON([nn.Parameter(torch.ones(3), requires_grad=False)], lr=0.1, ess=10)
    with pytest.raises(ValueError, match="no parameter has a state, so there is nothing to diagnose"):
        optimizer.diagnostics()
