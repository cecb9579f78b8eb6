"""Models whose retraining without an example is known exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.per_example import per_example, relative_error
from tests.oracles.refits import Logistic, diagonal_over_classes, ridge, ridge_left_out


def at(model, weight):
    with torch.no_grad():
        model.weight.copy_(weight.reshape(model.weight.shape))
    return model


# -- ridge regression: everything is linear, so Cook's formula is exact --------------------------------------------


def half_square(output, target):
    return 0.5 * (output - target).square().sum(1)


@pytest.mark.parametrize("prior_precision", [0.1, 1.0, 30.0])
def test_ridge_regression_is_exact(prior_precision):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = x @ torch.arange(5.0).double() + torch.randn(40, dtype=torch.float64, generator=generator)
    weight = ridge(x, y, prior_precision)
    model = at(nn.Linear(5, 1, bias=False).double(), weight)
    precision = x.mT @ x + prior_precision * torch.eye(5, dtype=torch.float64)
    posterior = vlearn.posterior.Full({"weight": model.weight.detach()}, precision, num_data=40)
    table = vlearn.sweep(model, posterior, [(x, y.unsqueeze(1))], half_square, leverage="exact", progress=False)

    residual = (x @ weight - y).unsqueeze(1)
    v = torch.einsum("ni,ij,nj->n", x, torch.linalg.inv(precision), x)
    assert relative_error(table.leverage, v) < 1e-12
    assert relative_error(table.deviation, v.unsqueeze(1) * residual) < 1e-12
    assert relative_error(table.self_influence, v * residual.squeeze(1).square()) < 1e-12
    refined = table.deviation / (1 - table.leverage.unsqueeze(1))  # Cook's v e / (1 - v)
    exact = ridge_left_out(x, y, prior_precision) - x @ weight
    assert relative_error(refined.squeeze(1), exact) < 1e-12
    assert (
        relative_error(table.loo_loss, half_square(x @ weight.unsqueeze(1) + table.deviation, y.unsqueeze(1))) < 1e-12
    )


def test_noise_in_the_likelihood_scales_residual_and_curvature():
    """(f - y)²/2τ²: e = (f - y)/τ², Λ = 1/τ²; the refits do not depend on how it is written."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    y, tau = torch.randn(30, dtype=torch.float64, generator=generator), 0.3
    weight = ridge(x, y, 2.0 * tau**2)
    precision = x.mT @ x / tau**2 + 2.0 * torch.eye(3, dtype=torch.float64)
    model = at(nn.Linear(3, 1, bias=False).double(), weight)
    posterior = vlearn.posterior.Full({"weight": model.weight.detach()}, precision, num_data=30)
    loader = [(x, y.unsqueeze(1))]
    table = vlearn.sweep(
        model, posterior, loader, lambda f, t: half_square(f, t) / tau**2, leverage="exact", progress=False
    )
    refined = (table.deviation / (1 - table.leverage.unsqueeze(1))).squeeze(1)
    assert relative_error(refined, ridge_left_out(x, y, 2.0 * tau**2) - x @ weight) < 1e-12


# -- logistic regression: near the refits, and the full C x C matrix is needed -------------------------------------


def overlapping_classes(features=4, count=200):
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(count) % 3
    x = torch.randn(count, features, dtype=torch.float64, generator=generator)
    x[:, :3] += 0.9 * F.one_hot(y, 3)
    x[:, -1] = 1  # a bias
    x[:, 0] += 6 * (torch.rand(count, generator=generator) < 0.03)  # some examples of high leverage
    return x, y


def logistic(prior_precision=1.0):
    x, y = overlapping_classes()
    oracle = Logistic(x, y, classes=3, prior_precision=prior_precision)
    weight = oracle.fit()
    model = at(nn.Linear(4, 3, bias=False).double(), weight)
    posterior = vlearn.posterior.Full({"weight": model.weight.detach()}, oracle.hessian(weight), num_data=len(x))
    return oracle, model, posterior


def mean_centred(logits):
    return logits - logits.mean(1, keepdim=True)  # softmax ignores a shift of all logits


def test_logistic_regression_predicts_its_refits():
    """Mean losses: train .856, by the equation .899, by 200 refits .903."""
    oracle, model, posterior = logistic()
    table = vlearn.sweep(model, posterior, [(oracle.x, oracle.y)], F.cross_entropy, "exact", progress=False)
    logits = oracle.left_out_logits()
    exact = F.cross_entropy(logits, oracle.y, reduction="none")
    gap = float(exact.mean() - table.loss.mean())
    assert gap == pytest.approx(0.0466, abs=1e-3)
    assert float(exact.mean() - table.loo_loss.mean()) == pytest.approx(0.0034, abs=1e-3)
    changes = torch.stack([exact - table.loss, table.loo_loss - table.loss])
    assert float(torch.corrcoef(changes)[0, 1]) > 0.997
    moved = mean_centred(logits - oracle.x @ model.weight.detach().mT)
    assert relative_error(mean_centred(table.deviation), moved) < 0.2

    # What the first order leaves out is 1/(1 - leverage), here up to 1.2.
    truth = per_example(model, lambda m: m(oracle.x), lambda f: F.cross_entropy(f, oracle.y, reduction="none"))
    v = truth.output_covariance(torch.linalg.inv(oracle.hessian(model.weight.detach())))
    refined = torch.linalg.solve(torch.eye(3, dtype=v.dtype) - v @ truth.hessian, table.deviation)
    assert relative_error(mean_centred(refined), moved) < 0.07


@pytest.mark.parametrize(("prior_precision", "shortcut_loss"), [(1.0, 2.03), (0.01, 152.2)])
def test_a_diagonal_over_classes_is_far_off(prior_precision, shortcut_loss):
    """V has a huge a·11ᵀ: V e cancels it, diag(V)∘e keeps it."""
    oracle, model, posterior = logistic(prior_precision)
    table = vlearn.sweep(model, posterior, [(oracle.x, oracle.y)], F.cross_entropy, "exact", progress=False)
    truth = per_example(model, lambda m: m(oracle.x), lambda f: F.cross_entropy(f, oracle.y, reduction="none"))
    v = truth.output_covariance(torch.linalg.inv(oracle.hessian(model.weight.detach())))
    shortcut = truth.output + diagonal_over_classes(truth.residual, v)
    exact = float(F.cross_entropy(oracle.left_out_logits(), oracle.y))
    assert float(table.loo_loss.mean()) == pytest.approx(exact, abs=0.004)
    assert float(F.cross_entropy(shortcut, oracle.y)) == pytest.approx(shortcut_loss, rel=0.01)
