"""Networks and passes whose Hessian estimates are compared with dense oracles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.per_example import PerExample, per_example, relative_error


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Pooled(nn.Module):
    """Positions share the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x)).mean(1))


class Functional(nn.Module):
    """A layer's weight is used once more, outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return self.out(torch.tanh(F.linear(torch.tanh(hidden), self.first.weight)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        (2, 4, 4),
    ),
    "sequence": (Pooled, (6, 4)),
    "tied": (Tied, (4,)),
    "functional": (Functional, (4,)),
    "normalised": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
}


def problem(name: str, count: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    """(network, inputs, labels) in float64."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return make().double(), torch.randn(count, *shape, dtype=torch.float64), torch.randint(0, 3, (count,))


def at_draw(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> PerExample:
    """The oracle at the weights that the model has now; the copy has no hooks that draw.

    Args:
        loss: of the output, per example ``[N]``.
    """
    samples = [p.detach().clone() for p in model.parameters()]
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for p, sample in zip(plain.parameters(), samples, strict=True):
            p.copy_(sample)
    return per_example(plain, lambda m: m(x), loss)


def cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: F.cross_entropy(output, y, reduction="none")


def hessian_of(optimizer: Any, model: nn.Module) -> Tensor:
    """The state's Hessian diagonal as one vector."""
    return torch.cat([optimizer.state[p]["hessian"].reshape(-1) for p in model.parameters()])


def covariance_of(optimizer: Any, model: nn.Module) -> Tensor:
    """Σ on the num_data scale, as sensitivities use it."""
    count = sum(p.numel() for p in model.parameters())
    parameters = dict(model.named_parameters())
    covariance = optimizer.posterior().covariance(parameters)
    unit = torch.eye(count, dtype=torch.float64)
    parts = unit.split([p.numel() for p in parameters.values()], 1)
    columns = covariance.multiply({p: part.reshape(count, *p.shape) for p, part in zip(parameters.values(), parts)})  # noqa: B905
    return torch.cat([columns[p].reshape(count, -1) for p in parameters.values()], 1)


def error_of_sensitivities(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Largest relative error of one step's self-influence and deviation, Σ the diagonal of the optimizer's state."""
    F.cross_entropy(model(x), y).backward()
    truth = at_draw(model, x, cross_entropy(y))
    optimizer.step()
    posterior = optimizer.posterior()
    covariance = torch.diag(torch.cat([posterior.variance[name].reshape(-1) for name in posterior.names]))
    found = optimizer.sensitivities(deviation=True)
    return max(
        relative_error(found.self_influence, truth.self_influence(covariance)),
        relative_error(found.deviation, truth.deviation(covariance)),
    )
