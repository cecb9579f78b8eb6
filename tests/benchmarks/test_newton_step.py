import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("laplace")

import vlearn
from benchmarks.reference import newton_step


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3


def test_where_the_hessian_is_the_gauss_newton_matrix_the_step_is_the_refined_form():
    (x, y), delta = data(), 0.5
    model = nn.Linear(4, 3).double()  # linear in its weights
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ flat[:12].view(3, 4).T + flat[12:], y, reduction="sum")

    precision = torch.func.hessian(loss)(weights) + delta * torch.eye(15, dtype=torch.float64)
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = vlearn.posterior.Full(mean, precision, 30)
    table = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, None, progress=False, refined=True)
    torch.testing.assert_close(newton_step.deviation(model, x, y, delta), table.deviation, rtol=1e-8, atol=1e-10)


def test_elsewhere_it_is_the_newton_step_of_the_loss_of_all_others():
    (x, y), delta = data(), 20.0  # everywhere convex
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    found = newton_step.deviation(model, x, y, delta)
    for example in (0, 7):
        others = torch.arange(30) != example
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(x[others]), y[others], reduction="sum")
        loss = loss + delta * sum(p.square().sum() for p in parameters) / 2
        own = torch.autograd.grad(
            F.cross_entropy(model(x[example : example + 1]), y[example : example + 1]), parameters
        )
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
        hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        step = torch.linalg.solve(hessian, torch.cat([g.flatten() for g in own]))
        jacobian = [torch.autograd.grad(each, parameters, retain_graph=True) for each in model(x[example])]
        expected = torch.stack([torch.cat([part.flatten() for part in row]) @ step for row in jacobian])
        torch.testing.assert_close(found[example], expected, rtol=1e-8, atol=1e-10)
