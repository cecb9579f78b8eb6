"""VAdamW: AdamW's steps, a Hessian on the scale of the data, and draws that disturb training little."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import data, loss_of, network, plain, weights
from vlearn.optim.updates.adam import Scale


def test_without_draws_it_is_adamw_bit_for_bit_but_for_rounding() -> None:
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = network(), network()
    optimizers = [
        vlearn.VAdamW(ours, num_data=50, ess=1e30, **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99) for optimizer in optimizers]
    for step in range(60):
        x, y = data(step)
        for model, optimizer, schedule in zip((ours, theirs), optimizers, schedules, strict=True):
            model[0].weight.requires_grad_(step % 5 != 3)  # its own number of steps
            plain(optimizer, model, x, y)
            schedule.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def linear_problem(seed: int) -> tuple[Tensor, Tensor]:
    """400 examples with six strongly correlated inputs, whose squared error has another scale than a likelihood's."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(6, dtype=torch.float64) + 1.5
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ mixing
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize(
    ("factor", "ess"), [(1.0, None), (100.0, 400.0)], ids=["narrow draws", "the posterior's draws, loss times 100"]
)
def test_the_scale_is_that_of_the_true_curvature(factor: float, ess: float | None) -> None:
    x, y = linear_problem(0)
    model = nn.Linear(6, 1).double()
    generator = torch.Generator().manual_seed(0)
    optimizer = vlearn.VAdamW(model, lr=0.0, num_data=400, ess=ess, generator=generator)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    found = torch.zeros(7, dtype=torch.float64)
    for step in range(7000):
        rows = torch.randint(400, (10,), generator=generator)
        optimizer.zero_grad()
        (factor * F.mse_loss(model(x[rows]), y[rows])).backward()
        optimizer.step()
        if step >= 2000:  # v forgets a thousand steps, in which gradients this heavy-tailed differ
            found += torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()]) / 5000
    inputs = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    true = 2 * factor * inputs.square().mean(0)
    share = 1 / (found + 1 / 400)
    ratio = (found * share).sum() / (true * share).sum()
    error = optimizer.diagnostics().scale_error
    assert ratio == pytest.approx(1, abs=max(0.2, 3 * error))
    assert error < 0.3


def test_the_draws_add_little_to_the_variance_of_a_gradient_whatever_the_correlations() -> None:
    x, y = linear_problem(1)
    model = nn.Linear(6, 1, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    optimizer = vlearn.VAdamW(model, lr=0.0, num_data=4, draw_variance=0.05, generator=generator)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(3000):
        rows = torch.randint(400, (10,), generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    (group,) = optimizer.param_groups
    curvature = 2 * x.T @ x / 400
    variance = 1 / (group["ess"] * (optimizer.state[model.weight]["hessian"][0] + 1 / 4))
    added = (curvature.square() * variance).sum(1)  # of the gradient H·(θ - m)
    residual = x @ torch.ones(6, 1, dtype=torch.float64) - y
    of_minibatch = (2 * residual * x).var(0) / 10
    assert ((added / of_minibatch) < 0.05 * 1.5).all()
    assert ((added / of_minibatch) > 0.05 / 20).any()


def test_the_first_step_is_taken_at_the_mean_and_draws_are_never_wider_than_the_posterior() -> None:
    model, (x, y) = network(), data()
    optimizer = vlearn.VAdamW(model, num_data=1e12)
    for step in range(3):
        before = weights(model)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        assert all(torch.equal(a, b) == (step == 0) for a, b in zip(before, weights(model), strict=True))
        optimizer.step()
    for _ in range(3):
        plain(optimizer, model, x, y)
    assert optimizer.param_groups[0]["ess"] == 1e12
    posterior = optimizer.posterior()
    for name, p in model.named_parameters():
        precision = 1e12 * optimizer.state[p]["hessian"] + 1.0
        torch.testing.assert_close(posterior.precision[name], precision, rtol=1e-9, atol=0.0)


def test_without_any_gradient_nothing_is_known_and_nothing_breaks() -> None:
    model = nn.Linear(3, 2)
    optimizer = vlearn.VAdamW(model, num_data=10, weight_decay=0.0)
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        (0 * model(torch.ones(2, 3)).sum()).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert optimizer.param_groups[0]["scale"][0] == 0 and optimizer.param_groups[0]["ess"] == math.inf
    assert optimizer.diagnostics().scale_error == 1
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["scale"][0] > 0


def test_groups_share_one_scale_also_one_that_joins_later() -> None:
    model, (x, y) = network(), data()
    optimizer = vlearn.VAdamW(model[0].parameters(), lr=0.01, num_data=50)
    optimizer.watch(model)
    for _ in range(3):
        plain(optimizer, model, x, y)
    optimizer.add_param_group({"params": list(model[2].parameters()), "weight_decay": 0.0, "ess": 70})
    for _ in range(3):
        plain(optimizer, model, x, y)
    first, second = optimizer.param_groups
    assert first["scale"] == second["scale"]
    assert second["ess"] == 70 and second["draw_variance"] is None and first["ess"] > 50
    total = sum(float((optimizer.state[p]["hessian"] > 0).sum()) for p in model.parameters())
    assert total == sum(p.numel() for p in model.parameters())


def test_negative_curvature_leaves_the_scale_positive_and_it_follows_a_change() -> None:
    scale = Scale(5.0, 0.0, 5.0**-2, excess=1.0, reference=5.0)
    for _ in range(500):
        scale = scale.after(40.0 / scale.scale, 0.5 / scale.scale, 1.0, 0.99)
    assert scale.scale == pytest.approx(math.hypot(40, scale.information**-0.5), rel=0.02)
    for _ in range(900):
        scale = scale.after(-3.0, 0.5 / scale.scale, 1.0, 0.99)
    assert 0 < scale.scale < 4
    for _ in range(3000):
        scale = scale.after(40.0 / scale.scale, 0.5 / scale.scale, 1.0, 0.99)
    assert scale.scale == pytest.approx(40.0, rel=0.2)


def test_the_scale_falls_slowly_where_it_was_trusted() -> None:
    scale = Scale(40.0, 40.0 * 1e4, 1e4, 40.0, 1.0, 40.0)
    for _ in range(50):
        scale = scale.after(-1.0, 1e-6, 1.0, 0.999)
    assert scale.scale > 40 * 0.999**51 / 3.01


def test_its_training_time_and_the_prior_of_its_decay_are_those_of_adamw() -> None:
    ours, theirs = network(), network()
    optimizers = [
        vlearn.VAdamW(ours, num_data=12, ess=1e30, weight_decay=0.3),
        torch.optim.AdamW(theirs.parameters(), weight_decay=0.3),
    ]
    x, y = data()
    times, fits = [], []
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(5):
            plain(optimizer, model, x, y)
        time = vlearn.posterior.training_time(optimizer, 5)
        assert isinstance(time, dict)
        times.append([time[p] for p in model.parameters()])
        fits.append(
            vlearn.posterior.fit(
                model,
                [(x, y)],
                F.cross_entropy,
                structure="diagonal",
                curvature="ggn-exact",
                prior_precision=optimizer,
                progress=False,
            )
        )
    assert times[0] == pytest.approx(times[1], rel=1e-9)
    for name in fits[1].names:
        torch.testing.assert_close(fits[0].variance[name], fits[1].variance[name], rtol=1e-6, atol=0.0)
    with pytest.raises(TypeError, match="VAdamW has a posterior of its own"):
        vlearn.posterior.from_optimizer(optimizers[0], ours, 12)
