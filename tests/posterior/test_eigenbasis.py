"""Eigenbases of factors that are mostly zero, on which LAPACK alone does not converge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from vlearn.gaussians.eigenbasis import eigen
from vlearn.posterior import KroneckerFactors

N = 20


def pixel_between_zeros() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A 3x3 convolution that sees one pixel, so that eight ninths of its input factor are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4, 3))
    return model, torch.randn(N, 64, 1, 1).relu(), torch.arange(N) % 3


def input_factor(x: torch.Tensor) -> torch.Tensor:
    rows = F.unfold(x, 3, padding=1).squeeze(2)
    return rows.mT @ rows / N


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_of_zeros_has_an_eigenbasis(dtype: torch.dtype) -> None:
    factor = input_factor(pixel_between_zeros()[1].to(dtype))
    found = eigen(factor, None)
    assert found is not None
    values, basis = found
    assert basis is not None and bool((values >= 0).all())
    rounding = 100 * torch.finfo(dtype).eps
    assert float((basis * values @ basis.mT - factor).abs().max()) < rounding * float(factor.abs().max())
    assert float((basis.mT @ basis - torch.eye(len(basis), dtype=dtype)).abs().max()) < rounding


def test_what_is_not_finite_has_none() -> None:
    factor = torch.eye(3)
    factor[0, 0] = torch.nan
    assert eigen(factor, None) is None
    with pytest.raises(ValueError, match="give covariances that are finite"):
        KroneckerFactors.from_covariances(factor, torch.eye(3))


def test_layers_that_see_one_pixel_are_fitted_and_trained() -> None:
    model, x, y = pixel_between_zeros()
    posterior = vlearn.posterior.fit(model, [(x, y)], F.cross_entropy, curvature="ggn-exact", progress=False)
    twin = vlearn.posterior.fit(
        model.double(), [(x.double(), y)], F.cross_entropy, curvature="ggn-exact", progress=False
    )
    for name in posterior.names:
        torch.testing.assert_close(posterior.variance[name].double(), twin.variance[name], rtol=1e-3, atol=0)

    model, x, y = pixel_between_zeros()
    optimizer = vlearn.KFACVON(model, lr=0.01, ess=N)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = optimizer.state[model[0].weight]
    rotated = state["in_basis"].mT @ state["in_factor"] @ state["in_basis"]
    assert float((rotated - rotated.diagonal().diag()).abs().max()) < 1e-4 * float(rotated.max())
