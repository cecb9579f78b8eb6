import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from vlearn.posterior import from_laplace

pytest.importorskip("laplace")

from benchmarks.reference import laplace

N, DELTA = 30, 2.0


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).double()
    return model, torch.randn(N, 1, 8, 8, dtype=torch.float64), torch.randint(0, 5, (N,))


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_a_sweep_of_a_laplace_posterior_is_its_functional_variance_times_the_residual(trained, structure):
    model, x, y = trained
    la = laplace.fit(model, x, y, structure, DELTA, batch=10)
    posterior = from_laplace(la)
    table = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, progress=False)
    torch.testing.assert_close(table.deviation, laplace.deviation(la, x, y, batch=10), rtol=1e-10, atol=1e-12)
    variance = vlearn.sweep(
        model, posterior, [(x, y)], F.cross_entropy, progress=False, variance=True
    ).function_variance
    expected = variance.diagonal(dim1=1, dim2=2) * (model(x).softmax(1) - F.one_hot(y, 5)).detach()
    torch.testing.assert_close(laplace.deviation(la, x, y, batch=10, diagonal=True), expected, rtol=1e-10, atol=1e-12)


def test_the_diagonal_precision_is_the_gauss_newton_diagonal_and_the_prior(trained):
    model, x, y = trained
    posterior = from_laplace(laplace.fit(model, x, y, "diag", DELTA, batch=10))
    expected = {name: torch.full_like(p, DELTA) for name, p in model.named_parameters()}
    for image in x:
        output = model(image[None])[0]
        p = output.softmax(0).detach()
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for column in root.T:
            gradients = torch.autograd.grad(output @ column, list(model.parameters()), retain_graph=True)
            for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
                expected[name] += gradient.square()
    for name, precision in posterior.precision.items():
        torch.testing.assert_close(precision, expected[name], rtol=1e-9, atol=1e-12)
