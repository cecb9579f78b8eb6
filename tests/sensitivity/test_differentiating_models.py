"""Models whose forward pass differentiates, as for forces: by torch.func they have rows, by torch.autograd none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.networks import at_draw
from tests.oracles.per_example import relative_error


class Energy(nn.Module):
    """Energy and forces, from a network of five coordinates."""

    def __init__(self, forces: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.energy, self.forces = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), forces

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.energy(x), self.forces(self.energy, x)], 1)


def of_sum(energy: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: energy(x).sum())(x)


def of_each(energy: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda x: energy(x).squeeze()))(x)


def by_grad(energy: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]


def by_backward(energy: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy(x).sum().backward(create_graph=True, inputs=[x])
        assert x.grad is not None
        return x.grad


def problem(forces: Callable[[nn.Module, Tensor], Tensor], count: int) -> tuple[Energy, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(count, 5, dtype=torch.float64), torch.randn(count, 6, dtype=torch.float64)
    return Energy(forces).double(), x, y


@pytest.mark.parametrize("forces", [of_sum, of_each])
@pytest.mark.parametrize("count", [4, 5])  # 5 rows, as each example has coordinates
def test_derivatives_by_torch_func_have_exact_rows(forces: Callable[..., Tensor], count: int) -> None:
    model, x, y = problem(forces, count)
    optimizer = vlearn.IVON(model, lr=0.1, ess=count)

    def loss(output: Tensor) -> Tensor:
        return (output - y).square().mean(1)

    F.mse_loss(model(x), y).backward()
    posterior = optimizer.posterior()
    covariance = torch.diag(torch.cat([posterior.variance[name].reshape(-1) for name in posterior.names]))
    live, truth = optimizer.sensitivities(deviation=True), at_draw(model, x, loss)
    assert relative_error(live.self_influence, truth.self_influence(covariance)) < 1e-12
    assert relative_error(live.deviation, truth.deviation(covariance)) < 1e-12
    optimizer.eval()
    truth = at_draw(model, x, loss)  # the mean
    table = vlearn.sweep(model, posterior, [(x, y)], F.mse_loss, progress=False)
    assert relative_error(torch.as_tensor(table.self_influence), truth.self_influence(covariance)) < 1e-6
    assert relative_error(torch.as_tensor(table.deviation), truth.deviation(covariance)) < 1e-6


@pytest.mark.filterwarnings("ignore:Using backward")  # of torch, of the cycle that create_graph=True makes
@pytest.mark.parametrize("forces", [by_grad, by_backward])
def test_derivatives_by_torch_autograd_are_refused_with_the_remedy(forces: Callable[..., Tensor]) -> None:
    model, x, y = problem(forces, 4)
    optimizer = vlearn.IVON(model, lr=0.1, ess=4)
    said = "the forward pass calls torch.autograd.grad .* use torch.func.grad there"
    F.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match=said):
        optimizer.sensitivities()
    optimizer.step()
    with pytest.raises(RuntimeError, match=said):
        vlearn.sweep(model, optimizer.posterior(), [(x, y)], F.mse_loss, progress=False)
    with pytest.raises(RuntimeError, match=said):
        vlearn.posterior.fit(model, [(x, y)], F.mse_loss, progress=False)
