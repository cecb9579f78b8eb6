import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("laplace")

import vlearn
from benchmarks.reference import group_newton_step


def test_the_step_is_the_newton_step_of_the_rest_and_of_a_full_posterior_refined():
    torch.manual_seed(0)
    x, y, delta = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3, 0.5
    model = nn.Linear(4, 3).double()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    def output(flat: torch.Tensor) -> torch.Tensor:
        return x @ flat[:12].view(3, 4).T + flat[12:]

    group = y == 1

    def loss(flat: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output(flat)[rows], y[rows], reduction="sum")

    # Linear in its weights: the Hessian is the Gauss-Newton matrix.
    rest = torch.func.hessian(loss)(weights, ~group) + delta * torch.eye(15, dtype=torch.float64)
    step = torch.linalg.solve(rest, torch.func.grad(loss)(weights, group))
    expected = loss(weights + step, group).item() / int(group.sum())

    decay = {name: delta / 30 for name, _ in model.named_parameters()}
    num_data = dict.fromkeys(decay, 30.0)
    prior = vlearn.posterior.Diagonal(
        {name: p.detach() for name, p in model.named_parameters()},
        {name: torch.full_like(p, 0.2) for name, p in model.named_parameters()},
        decay,
        num_data,
        30,
    )
    found = group_newton_step.leave_out(model, prior, x, y, group, delta, tolerance=1e-8)
    assert found.converged and found.iterations <= 16
    torch.testing.assert_close(found.left_out_loss, expected, rtol=1e-6, atol=0)
