"""The Hessian as a running average at first: `beta2_warmup`."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlearn
from tests.optim.table import FAMILY, FULLVON, VOGN, VON, Entry, data, equal, loss_of, network, plain, states, weights
from vlearn.optim.parameters.options import beta2_of_step, hess_init_weight
from vlearn.optim.updates.riemannian import ivon_step

WITH_WARMUP = [entry for entry in FAMILY if entry.name != "VAdamW"]
family = pytest.mark.parametrize("entry", WITH_WARMUP, ids=str)


@pytest.mark.parametrize("warmup", [None, 1, 1.5, 7, 100, 5000])
@pytest.mark.parametrize("beta2", [0.0, 0.9, 0.999, 0.9999, 1.0])
def test_the_remaining_weight_is_the_product_of_all_momenta(beta2: float, warmup: float | None) -> None:
    group = {"beta2": beta2, "beta2_warmup": warmup}
    product = 1.0
    for step in range(1, 2001):
        earlier = step - 1
        expected = beta2 if warmup is None else min(beta2, 1 - 1 / (earlier + warmup))
        assert beta2_of_step(group, step) == expected
        product *= expected
        if step in (1, 2, 3, 50, 400, 2000):
            assert hess_init_weight(group, step) == pytest.approx(product, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("entry", [VOGN, VON, FULLVON], ids=str)
def test_at_first_the_hessian_is_the_mean_of_all_estimates_so_far(entry: Entry) -> None:
    """Two runs at rate zero over the same estimates: the constant momentum's are read out and averaged."""
    count, t0, hess_init = 6, 4, 0.5
    estimates, hessians = [], {}
    for warmup in (None, t0):
        torch.manual_seed(0)
        model = network()
        # β₂ = 0 keeps the last estimate alone
        beta2 = 0.0 if warmup is None else 0.9999
        fixed = {"lr": 0.0, "ess": 1e30, "num_data": 50, "hess_init": hess_init, "weight_decay": 0.1}
        optimizer = entry.make(model, beta2=beta2, beta2_warmup=warmup, **fixed)
        for step in range(count):
            torch.manual_seed(step)
            plain(optimizer, model, *data(step))
            if warmup is None:
                estimates.append([h.clone() for h in optimizer._structure.diagonal_hessian().values()])
        hessians[warmup] = list(optimizer._structure.diagonal_hessian().values())
        if warmup is not None:
            assert optimizer.diagnostics().hess_init_weight == pytest.approx((t0 - 1) / (t0 - 1 + count))
    for i, found in enumerate(hessians[t0]):
        mean = (hess_init * (t0 - 1) + sum(e[i] for e in estimates)) / (t0 - 1 + count)
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("correct", [False, True], ids=["K-FAC", "EK-FAC"])
def test_factors_are_averaged_by_the_same_momenta(correct: bool) -> None:
    t0, count = 3, 5
    factors = {}
    for warmup in (None, t0):
        model = network()
        optimizer = vlearn.KFACVON(
            model,
            lr=0.0,
            ess=1e30,
            num_data=50,
            beta2=0.0 if warmup is None else 0.9999,
            beta2_warmup=warmup,
            update_every=1,
            eigenvalue_correction=correct,
        )
        seen = []
        for step in range(count):
            torch.manual_seed(step)
            plain(optimizer, model, *data(step))
            seen.append(optimizer.state[model[0].weight]["in_factor"].clone())
        factors[warmup] = seen
        if warmup is not None:
            learned = optimizer.state[model[0].weight]["learned"]
            assert float(learned) == pytest.approx(1 - (t0 - 1) / (t0 - 1 + count), rel=1e-6)
    mean = sum(factors[None]) / count  # debiased: hess_init has no part in the factors
    torch.testing.assert_close(factors[t0][-1], mean, rtol=1e-6, atol=1e-9)


def bounded_ivon(h: torch.Tensor, estimate: torch.Tensor, rate: float, decay: float) -> torch.Tensor:
    x = rate * (h - estimate) / (h + decay)
    phi = torch.where(x.abs() <= 1, x.square() / 2, x.abs() - 0.5)
    return (h + decay) * (1 - x + phi) - decay


@given(
    rate=st.floats(1e-6, 1.0),
    logs=st.lists(st.floats(-12, 6), min_size=1, max_size=8),
    noise=st.floats(-1e6, 1e6),
    double=st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_ivons_precision_at_least_halves_and_at_most_grows_as_twice_an_average(
    rate: float, logs: list[float], noise: float, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    decay = 1e-4
    h = torch.tensor([10.0**log for log in logs], dtype=dtype)
    estimate = torch.full_like(h, noise)
    zeros = [torch.zeros_like(h)]
    # "statistics" of the squared gradient are the estimate itself where ess is 1
    moved = [h.clone()]
    ivon_step(
        [torch.zeros_like(h)],
        zeros,
        moved,
        [torch.zeros_like(h)],
        [estimate],
        price=False,
        bounded=True,
        ess=1.0,
        beta1=0.9,
        beta2=1 - rate,
        weight_decay=decay,
        clip_radius=math.inf,
        lr=0.0,
        correction=1.0,
    )
    rate = 1 - (1 - rate)
    before, after = (h + decay).double(), (moved[0] + decay).double()
    slack = 4 * torch.finfo(dtype).eps
    largest = torch.maximum(before, torch.full_like(before, abs(noise)))
    assert (after >= before / 2 - slack * largest).all()
    assert (after <= before + 2 * rate * (h - estimate).double().abs() + slack * largest).all()
    expected = bounded_ivon(h.double(), estimate.double(), rate, decay) + decay
    torch.testing.assert_close(
        after, expected, rtol=1e-3 if not double else 1e-9, atol=float(10 * slack * largest.max())
    )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ivon_follows_its_rule_and_a_burst_of_noise_in_the_first_steps_is_forgotten(compiled: bool) -> None:
    t0, decay, ess = 20, 1e-4, 1e8
    p = torch.nn.Parameter(torch.zeros(2**15 if compiled else 64, dtype=torch.float64))
    optimizer = vlearn.IVON(
        [p], lr=0.0, ess=ess, hess_init=1e-3, weight_decay=decay, beta2=0.9999, beta2_warmup=t0, compiled=compiled
    )
    generator = torch.Generator().manual_seed(0)
    expected = torch.full_like(p.detach(), 1e-3)
    for step in range(200):
        size = 1e3 if step == 1 else 1e-3  # a gradient a million times as large as the others
        with optimizer.sampled_params(train=True):
            p.grad = size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            estimate = ess * (expected + decay) * p.detach() * p.grad
        optimizer.step()
        expected = bounded_ivon(expected, estimate, max(1e-4, 1 / (step + t0)), decay)
        torch.testing.assert_close(optimizer.state[p]["hessian"], expected, rtol=1e-6, atol=1e-10)
    assert (expected + decay > 0).all()
    unbounded = 0.5 * ess * 1e3**2 / (1 + t0) ** 2  # what the published correction alone adds in that step
    assert expected.max() < unbounded / 1e4


@family
def test_a_run_resumed_within_the_warmup_or_after_it_is_the_uninterrupted_one(entry: Entry) -> None:
    settings: dict[str, Any] = {"beta2": 0.9, "beta2_warmup": 6, "weight_decay": 0.1}
    model, again = network(), network()
    optimizer, other = entry.make(model, **settings), entry.make(again, beta2=0.5, weight_decay=0.1)
    for step in range(12):
        if step in (3, 9):  # 1 - 1/(t + 6) passes .9 at t = 4
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], saved)
            saved.seek(0)
            own, state = torch.load(saved, weights_only=True)
            again.load_state_dict(own)
            other.load_state_dict(state)
        torch.manual_seed(step)
        plain(optimizer, model, *data(step))
        if step >= 3:
            torch.manual_seed(step)
            plain(other, again, *data(step))
            assert equal(weights(model), weights(again)) and equal(states(optimizer), states(other))


@family
def test_groups_may_differ_and_states_from_before_the_setting_load(entry: Entry) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "beta2_warmup": 5}, {"params": model[2].parameters()}]
    optimizer = entry.make(groups, num_data=50)
    assert [group["beta2_warmup"] for group in optimizer.param_groups] == [5, None]
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["beta2_warmup"]
    fresh = entry.make(network().parameters())
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    fresh = entry.make(groups, num_data=50)
    fresh.load_state_dict(old)
    assert [group["beta2_warmup"] for group in fresh.param_groups] == [None, None]
    optimizer.watch(model)
    loss_of(model, *data()).backward()
    optimizer.step()
