import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.reference.removals import TOLERANCE, Retraining

N, DELTA = 40, 0.5


def newton(x, y, classes):
    """Logistic regression on the summed loss with its prior, by Newton's method."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)

    def objective(w):
        return F.cross_entropy(x @ w.view(classes, -1).T, y, reduction="sum") + 0.5 * DELTA * w @ w

    w = torch.zeros(classes * x.shape[1], dtype=x.dtype)
    for _ in range(30):
        w = w - torch.linalg.solve(torch.func.hessian(objective)(w), torch.func.grad(objective)(w))
    return x @ w.view(classes, -1).T


def test_retraining_without_an_example_is_the_refit_by_newtons_method():
    torch.manual_seed(0)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    model = nn.Linear(4, 3)
    problem = Retraining(model, x, y, DELTA)
    start = problem.from_weights_of(model)
    examples = [0, 7, 31]
    refits = list(problem.without(examples, start, workers=2))
    for example, refit in zip(examples, refits, strict=True):
        others = torch.arange(N) != example
        expected = newton(x[others], y[others], 3)
        torch.testing.assert_close(problem.model_at(refit)(x[others]), expected, rtol=0, atol=2e-5)
    full = F.cross_entropy(newton(x, y, 3), y, reduction="none")
    assert all(abs(problem.loss(start, i) - float(full[i])) < 2e-5 for i in range(N))


def test_a_network_is_retrained_to_a_minimum_and_the_model_stays_as_it_was():
    torch.manual_seed(0)
    x, y = torch.randn(N, 3), torch.randint(0, 2, (N,))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    before = [p.detach().clone() for p in model.parameters()]
    problem = Retraining(model, x, y, DELTA)
    start = problem.from_weights_of(model)
    assert start.converged and start.gradient <= TOLERANCE
    # The own loss of an example can only rise when it is left out of a minimum close by.
    for example, refit in zip(range(5), problem.without(range(5), start), strict=True):
        assert refit.converged
        assert problem.loss(refit, example) > problem.loss(start, example)
    assert all(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))
