"""A posterior whose prior is replaced by a share of its curvature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.oracles.per_example import relative_error
from tests.posterior.test_fit import EXACT, N, covariance, in_batches, mlp
from vlearn.posterior import Full, KroneckerFactors, fit, load
from vlearn.posterior.fit import STRUCTURES


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if not name.startswith("last")])
def test_its_precision_has_the_share_of_each_layers_curvature_for_the_prior(structure: str, tmp_path: Path) -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    precision = torch.linalg.inv(covariance(posterior, model))
    prior = torch.cat(
        [torch.full((p.numel(),), float(posterior.prior_precision[name])) for name, p in model.named_parameters()]
    ).to(precision)
    curvature = precision - torch.diag(prior)
    # The trace of a block is the sum of its eigenvalues.
    groups = dict.fromkeys(posterior.groups.values())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    spans = dict(zip(sizes, torch.arange(len(prior)).split(list(sizes.values())), strict=True))
    damping = torch.zeros_like(prior)
    for group in groups:
        entries = torch.cat([spans[name] for name in group])
        damping[entries] = 0.3 * curvature.diagonal()[entries].mean()
    expected = torch.linalg.inv(curvature + torch.diag(damping))
    damped = posterior.damped(0.3)
    assert relative_error(covariance(damped, model), expected) < 1e-8
    assert damped.prior_precision["0.weight"] == pytest.approx(float(damping[0]))
    assert relative_error(torch.linalg.inv(covariance(posterior, model)), precision) < 1e-12  # it is a copy
    damped.save(tmp_path / "damped.pt")
    assert relative_error(covariance(load(tmp_path / "damped.pt", model), model), expected) < 1e-8
    assert damped.kl() > 0
    pairs = [vlearn.influence(model, each, in_batches(x), in_batches(x), F.cross_entropy, progress=False)
             for each in (posterior, damped)]  # fmt: skip
    assert not torch.allclose(pairs[0].values, pairs[1].values)


def test_a_prior_of_the_entries_own_is_replaced_too() -> None:
    model = torch.nn.Linear(3, 2, bias=False).double()
    hessian, prior = torch.rand(2, 3).double() + 0.1, torch.rand(2, 3).double()
    mean = {"weight": model.weight.detach()}
    posterior = vlearn.posterior.Kronecker(
        mean, {("weight",): KroneckerFactors(None, None, hessian, prior)}, {"weight": prior}, {"weight": 5.0}, 5.0
    )
    damped = posterior.damped(0.5)
    torch.testing.assert_close(damped.precision["weight"], 5 * (hessian + hessian.mean() / 2))


def test_what_cannot_be_damped_is_refused() -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT)
    for relative in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="but it must be positive: use 0.1"):
            posterior.damped(relative)
    with pytest.raises(ValueError, match="this posterior has the training time 3, and its precision is no longer"):
        posterior.stopped_at(3.0).damped()
    mean = {"weight": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match="the prior that this precision holds is not known: pass prior_precision"):
        Full(mean, torch.eye(2, dtype=torch.float64), N).damped()
    flat = vlearn.posterior.Diagonal(mean, {"weight": torch.zeros(2)}, {"weight": 1.0}, {"weight": N}, N)
    with pytest.raises(ValueError, match="the mean curvature of 'weight' is 0: there is nothing to damp it by"):
        flat.damped()
