"""Retraining by SGD without an example reaches the minimum without it, and the control the one with all."""

import torch
from torch import nn

from benchmarks.reference.removals import Retraining
from benchmarks.training.warm_start import Plan, without

N, DELTA = 40, 0.5


def test_the_difference_to_the_control_is_that_of_the_two_minima():
    torch.manual_seed(0)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    model = nn.Linear(4, 3).double()
    before = [p.detach().clone() for p in model.parameters()]
    problem = Retraining(model, x, y, DELTA)
    start = problem.from_weights_of(model)
    examples = torch.tensor([3, 11])
    plan = Plan(epochs=400, batch=20, lr=(0.1, 1e-3), prior_precision=DELTA)
    kept = without(None, model, x, y, plan, 0, examples)
    assert kept.shape == (400, 2, 3)
    for place, (example, refit) in enumerate(zip(examples, problem.without(examples.tolist(), start), strict=True)):
        removed = without(int(example), model, x, y, plan, 0, example[None])
        truth = problem.outputs(refit, example[None]) - problem.outputs(start, example[None])
        found = removed[-1] - kept[-1, place]
        assert (found - truth).abs().max() < 0.02 * truth.abs().max()
    assert all(p.equal(q) for p, q in zip(model.parameters(), before, strict=True))


def test_without_an_example_every_step_has_the_gradient_of_the_others_in_the_mean():
    """One step over all examples at once: that of the sum without the example, over N."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    model = nn.Linear(4, 3).double()
    plan = Plan(epochs=1, batch=N, lr=(0.1, 0.1), prior_precision=DELTA)
    found = without(5, model, x, y, plan, 0, torch.arange(N))[-1]
    others = torch.arange(N) != 5
    loss = nn.functional.cross_entropy(model(x[others]), y[others], reduction="sum")
    loss = (loss + DELTA / 2 * sum(p.square().sum() for p in model.parameters())) / N
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    weight, bias = (p - 0.1 * g for p, g in zip(model.parameters(), gradients, strict=True))
    torch.testing.assert_close(found, x @ weight.T + bias)
