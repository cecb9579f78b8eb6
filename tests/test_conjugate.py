"""Conjugate models: the learning rule against textbooks, removal against refits, sensitivities against autograd."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vlearn
from tests.oracles import textbook
from vlearn import conjugate
from vlearn.conjugate import (
    Bernoulli,
    Beta,
    Categorical,
    Data,
    Dirichlet,
    Family,
    Gamma,
    Gaussian,
    GaussianMean,
    LinearRegression,
    Poisson,
    add,
    blr_step,
    leave_one_out,
    natural_gradient,
    predictive_loss,
    remove,
)

N, P, C, NOISE = 30, 4, 3, 0.7
generator = torch.Generator().manual_seed(0)
ROOT = torch.randn(P, P, dtype=torch.float64, generator=generator)
X = torch.randn(N, P, dtype=torch.float64, generator=generator)
Y = X @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + torch.randn(N, dtype=torch.float64, generator=generator)
ONES = torch.bernoulli(torch.full((N,), 0.3).double(), generator=generator)
COUNTS = torch.poisson(torch.full((N,), 4.0).double(), generator=generator)
CLASSES = torch.randint(0, C, (N,), generator=generator)
CONCENTRATION = torch.tensor([0.5, 1.0, 3.0]).double()
PRIOR_MEAN, PRIOR_PRECISION = torch.tensor([0.3, 0.0, -1.0, 2.0]).double(), ROOT @ ROOT.mT + torch.eye(P).double()


class Case(NamedTuple):
    data: Data
    prior: Family
    start: Family  # far from prior and posterior
    textbook: Family
    log_partition: Callable[[Tensor], Tensor]
    expected_loss: Callable[[Tensor, int], Tensor]  # of λ and an example's number
    log_base: Tensor  # log p(y | θ) - ⟨φ, T(θ)⟩ of each example


CASES = {
    "Beta-Bernoulli": Case(
        Bernoulli(ONES),
        Beta.from_standard(2.0, 0.5),
        Beta.from_standard(90.0, 3.0),
        Beta.from_standard(*textbook.beta(2.0, 0.5, ONES)),
        textbook.log_partition_beta,
        lambda natural, j: textbook.expected_loss_bernoulli(natural, ONES[j]),
        torch.zeros(N).double(),
    ),
    "Gamma-Poisson": Case(
        Poisson(COUNTS),
        Gamma.from_standard(0.5, 0.1),
        Gamma.from_standard(50.0, 200.0),
        Gamma.from_standard(*textbook.gamma(0.5, 0.1, COUNTS)),
        textbook.log_partition_gamma,
        lambda natural, j: textbook.expected_loss_poisson(natural, COUNTS[j]),
        -torch.lgamma(COUNTS + 1),
    ),
    "Dirichlet-categorical": Case(
        Categorical(CLASSES, classes=C),
        Dirichlet.from_standard(CONCENTRATION),
        Dirichlet.from_standard([9.0, 200.0, 1.0]),
        Dirichlet.from_standard(textbook.dirichlet(CONCENTRATION, CLASSES)),
        textbook.log_partition_dirichlet,
        lambda natural, j: textbook.expected_loss_categorical(natural, int(CLASSES[j])),
        torch.zeros(N).double(),
    ),
    "Gaussian mean": Case(
        GaussianMean(Y, NOISE),
        Gaussian.from_standard([3.0], 0.5),
        Gaussian.from_standard([-70.0], 20.0),
        Gaussian.from_standard(*textbook.gaussian_mean(3.0, 0.5, Y, NOISE)),
        lambda natural: textbook.log_partition_gaussian(natural, 1),
        lambda natural, j: textbook.expected_loss_gaussian(natural, torch.ones(1).double(), Y[j], NOISE),
        -0.5 * (Y.square() / NOISE + math.log(2 * math.pi * NOISE)),
    ),
    "linear regression": Case(
        LinearRegression(Y, X, NOISE),
        Gaussian.from_standard(PRIOR_MEAN, PRIOR_PRECISION),
        Gaussian.from_standard(torch.full((P,), 9.0), 30.0),
        Gaussian.from_standard(*textbook.regression(PRIOR_MEAN, PRIOR_PRECISION, X, Y, NOISE)),
        lambda natural: textbook.log_partition_gaussian(natural, P),
        lambda natural, j: textbook.expected_loss_gaussian(natural, X[j], Y[j], NOISE),
        -0.5 * (Y.square() / NOISE + math.log(2 * math.pi * NOISE)),
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


def fit(case: Case, data: Data | None = None) -> Family:
    return blr_step(case.prior, case.prior, case.data if data is None else data)


def without(data: Data, examples: list[int]) -> Data:
    """The data set with the examples deleted from its arrays."""
    keep = torch.ones(len(data), dtype=torch.bool)
    keep[examples] = False
    arrays = {name: getattr(data, name)[keep] for name in ("x", "y") if hasattr(data, name)}
    return dataclasses.replace(data, **arrays)


def close(found: Family, expected: Family, tolerance: float = 1e-12) -> bool:
    distance = (found.natural - expected.natural).abs().max()
    return type(found) is type(expected) and bool(distance <= tolerance * expected.natural.abs().max())


def test_one_step_with_rho_one_is_the_textbook_posterior_from_any_start(case):
    for start in (case.prior, case.start, case.textbook):
        assert close(blr_step(start, case.prior, case.data), case.textbook)


def test_what_is_left_of_the_start_shrinks_by_one_minus_rho(case):
    q, distance = case.start, case.start.natural - case.textbook.natural
    for step in range(1, 6):
        q = blr_step(q, case.prior, case.data, rho=0.3)
        expected = case.textbook.natural + 0.7**step * distance
        assert torch.allclose(q.natural, expected, rtol=1e-12, atol=1e-10)
    for _ in range(150):
        q = blr_step(q, case.prior, case.data, rho=0.3)
    assert close(q, case.textbook)


@pytest.mark.parametrize("examples", [[0], [17], [29], [3, 4, 5, 6], list(range(0, 30, 2)), list(range(29))])
def test_removal_is_the_refit_without_the_examples(case, examples):
    found = remove(fit(case), case.data, examples)
    expected = fit(case, without(case.data, examples))
    scale = fit(case).natural.abs().max()  # what is rounded away is a part of the larger λ
    assert float((found.natural - expected.natural).abs().max()) <= 1e-12 * float(scale)


def test_removal_of_all_examples_is_the_prior(case):
    found = remove(fit(case), case.data, range(N))
    assert float((found.natural - case.prior.natural).abs().max()) <= 1e-12 * float(fit(case).natural.abs().max())


def test_adding_back_restores_and_the_order_does_not_matter(case):
    posterior = fit(case)
    at_once = remove(posterior, case.data, [2, 11, 7])
    in_turn = remove(remove(remove(posterior, case.data, 7), case.data, 2), case.data, 11)
    assert close(at_once, in_turn)
    assert close(add(add(at_once, case.data, torch.tensor([7, 11])), case.data, 2), posterior)
    assert remove(posterior, case.data, []).natural.equal(posterior.natural)


def test_removal_with_rho_below_one_is_the_step_without_the_examples(case):
    step = blr_step(case.start, case.prior, case.data, rho=0.3)
    expected = blr_step(case.start, case.prior, without(case.data, [4, 9]), rho=0.3)
    assert close(remove(step, case.data, [4, 9], rho=0.3), expected)


def test_the_batch_of_left_out_posteriors_holds_every_single_removal(case):
    posterior = fit(case)
    batch = leave_one_out(posterior, case.data)
    for j in range(N):
        single = remove(posterior, case.data, j)
        assert batch.natural[j].equal(single.natural)
        assert torch.allclose(batch.mean[j], single.mean, rtol=1e-12)
        assert torch.allclose(batch.variance[j], single.variance, rtol=1e-12)


def test_the_natural_gradient_is_that_of_the_expected_loss(case):
    """F g̃_j = ∇_λ E_q[ℓ_j], F = ∇²A(λ) the Fisher matrix, at the posterior and elsewhere."""
    for q in (fit(case), case.start):
        fisher = torch.func.hessian(case.log_partition)(q.natural)
        for j in (0, 8, 21):
            expected = torch.func.grad(case.expected_loss)(q.natural, j)
            found = fisher @ natural_gradient(case.data, j)[0]
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_the_derivative_by_an_examples_weight_is_rho_times_its_natural_gradient(case):
    rho, size = 0.6, 1e-4
    for j in (1, 13):

        def at(epsilon: float, j: int = j) -> Tensor:
            weights = torch.ones(N).double()
            weights[j] -= epsilon
            return blr_step(case.start, case.prior, case.data, rho, weights=weights).natural

        difference = (at(size) - at(-size)) / (2 * size)
        expected = rho * natural_gradient(case.data, j)[0]
        assert torch.allclose(difference, expected, rtol=1e-8, atol=1e-8)


def test_mean_and_variance_are_the_derivatives_of_the_log_partition_function(case):
    q = fit(case)
    first = torch.func.grad(case.log_partition)(q.natural)  # E[T(θ)]
    if isinstance(q, Gaussian):
        assert torch.allclose(q.mean, first[: q.size], rtol=1e-10)
        squares = first[q.size :].reshape(q.size, q.size).diagonal()
        assert torch.allclose(q.variance, squares - q.mean.square(), rtol=1e-9)
    elif isinstance(q, Gamma):
        assert torch.allclose(q.mean, first[1], rtol=1e-12)
        assert torch.allclose(q.variance, torch.func.hessian(case.log_partition)(q.natural)[1, 1], rtol=1e-12)
    else:  # T(θ) is the logarithm: compare with torch's own
        parts = torch.stack([q.alpha, q.beta]) if isinstance(q, Beta) else q.concentration
        truth = torch.distributions.Dirichlet(parts)
        mean, variance = (truth.mean[0], truth.variance[0]) if isinstance(q, Beta) else (truth.mean, truth.variance)
        assert torch.allclose(q.mean, mean, rtol=1e-12)
        assert torch.allclose(q.variance, variance, rtol=1e-12)


def test_a_predictive_loss_is_the_ratio_of_normalizers(case):
    """-log E_q[p(y_j | θ)] = A(λ) - A(λ + φ_j) - log h(y_j)."""
    q = fit(case)
    found = predictive_loss(q, case.data)
    for j in range(N):
        after = case.log_partition(q.natural - natural_gradient(case.data, j)[0])
        expected = case.log_partition(q.natural) - after - case.log_base[j]
        assert float(found[j]) == pytest.approx(float(expected), rel=1e-9)


def test_leave_one_out_losses_are_those_of_the_refits(case):
    found = predictive_loss(leave_one_out(fit(case), case.data), case.data)
    for j in range(N):
        refit = fit(case, without(case.data, [j]))
        assert float(found[j]) == pytest.approx(float(predictive_loss(refit, case.data)[j]), rel=1e-10)


def test_removing_a_coin_toss_takes_one_from_its_count():
    posterior = Beta.from_standard(5.0, 3.0)
    data = Bernoulli(torch.tensor([1, 0]))
    assert [float(v) for v in (remove(posterior, data, 0).alpha, remove(posterior, data, 0).beta)] == [4.0, 3.0]
    assert [float(v) for v in (remove(posterior, data, 1).alpha, remove(posterior, data, 1).beta)] == [5.0, 2.0]


@pytest.fixture
def ridge():
    """x, y, posterior, H, e and v of a regression with σ² = 1 and the prior N(0, I/δ)."""
    delta = 2.0
    data = LinearRegression(Y, X, noise_variance=1.0)
    prior = Gaussian.from_standard(torch.zeros(P), delta)
    posterior = blr_step(prior, prior, data)
    H = X.mT @ X + delta * torch.eye(P)
    e = X @ torch.linalg.solve(H, X.mT @ Y) - Y
    return data, posterior, H, e, (X * torch.linalg.solve(H, X.mT).mT).sum(1)


def test_removal_from_a_regression_is_cooks_formula(ridge):
    data, posterior, H, e, v = ridge
    moved = leave_one_out(posterior, data).mean - posterior.mean
    cook = torch.linalg.solve(H, X.mT).mT * (e / (1 - v)).unsqueeze(1)
    assert torch.allclose(moved, cook, rtol=1e-10, atol=1e-12)
    assert torch.allclose((X * moved).sum(1), v * e / (1 - v), rtol=1e-10, atol=1e-12)


def test_the_means_derivative_by_an_examples_weight_is_the_covariance_times_its_gradient(ridge):
    data, posterior, H, e, v = ridge
    prior, size = Gaussian.from_standard(torch.zeros(P), 2.0), 1e-5
    for j in (0, 12):
        weights = torch.ones(2, N).double()
        weights[:, j] += torch.tensor([-size, size])
        less, more = (blr_step(prior, prior, data, weights=row).mean for row in weights)
        expected = posterior.covariance @ X[j] * e[j]
        assert torch.allclose((less - more) / (2 * size), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("noise_variance", [1.0, NOISE])
def test_a_sweep_with_the_full_posterior_is_first_order_and_refined_the_exact_removal(noise_variance):
    data = LinearRegression(Y, X, noise_variance)
    prior = Gaussian.from_standard(torch.zeros(P), 2.0)
    posterior = blr_step(prior, prior, data)
    model = nn.Linear(P, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(posterior.mean.unsqueeze(0))
    full = vlearn.posterior.Full({"weight": posterior.mean.unsqueeze(0)}, posterior.precision, num_data=N)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.squeeze(1) - target).square() / (2 * noise_variance)

    table = vlearn.sweep(model, full, [(X, Y)], loss, leverage="exact", progress=False)
    refined = vlearn.sweep(model, full, [(X, Y)], loss, refined=True, progress=False)
    assert table.leverage is not None and refined.num_first_order == 0
    e = (X @ posterior.mean - Y) / noise_variance
    V = ((X @ posterior.covariance) * X).sum(1)
    assert torch.allclose(table.deviation.squeeze(1), V * e, rtol=1e-10, atol=1e-12)
    by_hand = table.deviation.squeeze(1) / (1 - table.leverage)  # V e/(1 - ΛV)
    exact = (X * (leave_one_out(posterior, data).mean - posterior.mean)).sum(1)
    assert torch.allclose(by_hand, exact, rtol=1e-10, atol=1e-12)
    assert torch.allclose(refined.deviation.squeeze(1), exact, rtol=1e-10, atol=1e-12)


def test_tensors_of_standard_parameters_give_a_batch():
    batch = Gamma.from_standard(torch.tensor([1.0, 2.0, 8.0]), 2.0)
    assert batch.mean.tolist() == [0.5, 1.0, 4.0]
    assert Beta.from_standard(torch.tensor([1.0, 3.0]), 1.0).mean.tolist() == [0.5, 0.75]
    data = Poisson(torch.tensor([0, 1, 2]))
    alone = [float(predictive_loss(Gamma(natural), data)[j]) for j, natural in enumerate(batch.natural)]
    assert predictive_loss(batch, data).tolist() == pytest.approx(alone, rel=1e-14)


def test_values_are_copies_and_stay_as_they_are():
    y = torch.tensor([1.0, 0.0]).double()
    data = Bernoulli(y)
    y[0] = 5
    assert data.y.tolist() == [1, 0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.y = y


COIN, PRIOR = Bernoulli(torch.tensor([1, 0, 1])), Beta.from_standard(1.0, 1.0)
LINE = LinearRegression(Y, X, 1.0)
BAD_PRIOR = "must be positive: give a proper prior, and remove only examples that are in the posterior."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Beta.from_standard(0.0, 1.0), f"alpha=0, but it {BAD_PRIOR}"),
        (lambda: Beta.from_standard(1.0, -2.0), f"beta=-2, but it {BAD_PRIOR}"),
        (lambda: Gamma.from_standard(1.0, 0.0), f"rate=0, but it {BAD_PRIOR}"),
        (lambda: Gamma.from_standard(-1.0, 1.0), f"shape=-1, but it {BAD_PRIOR}"),
        (lambda: Dirichlet.from_standard([1.0, 0.0]), f"concentration=0, but it {BAD_PRIOR}"),
        (lambda: Dirichlet.from_standard([1.0]), "a Dirichlet of 1 classes, but it needs two or more."),
        (lambda: Gaussian.from_standard([0.0], 0.0), f"precision=0, but it {BAD_PRIOR}"),
        (
            lambda: Gaussian.from_standard([0.0, 0.0], torch.ones(2, 2)),
            "precision is not positive definite: give a prior that is, and remove only examples that are in it.",
        ),
        (
            lambda: Gaussian.from_standard([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]),
            "precision is not symmetric: use (S + S.mT) / 2 if it is so but for rounding.",
        ),
        (
            lambda: Gaussian.from_standard([0.0, 0.0], torch.eye(3)),
            "precision has shape (3, 3), but the 2 entries of the mean need (2, 2), or one number for all.",
        ),
        (
            lambda: Gaussian.from_standard([], 1.0),
            "mean has shape (0,), but it must be [P]: give one mean for each weight.",
        ),
        (
            lambda: Beta(torch.zeros(3)),
            "natural has shape (3,), but a Beta needs 2 along the last dimension: use from_standard(...).",
        ),
        (
            lambda: Gaussian(torch.zeros(4)),
            "natural has shape (4,), but a Gaussian needs 2 along the last dimension: use from_standard(...).",
        ),
        (
            lambda: Beta(torch.tensor(1.0)),
            "natural is a single number, but it must be [K] or [..., K]: use from_standard(...).",
        ),
        (
            lambda: Beta.from_standard(float("nan"), 1.0),
            "alpha holds nan, but it must be finite: drop or impute what is missing.",
        ),
        (
            lambda: Bernoulli(torch.tensor([1.0, 0.5])),
            "y holds 0.5, but it must be 0 or 1: use y.round() or Categorical.",
        ),
        (
            lambda: Bernoulli(torch.tensor([])),
            "y has shape (0,), but it must be [N] with N >= 1: give one target per example.",
        ),
        (
            lambda: Poisson(torch.tensor([2, -1])),
            "y holds -1, but it must be a count, 0, 1, 2, ...: use LinearRegression for real numbers.",
        ),
        (
            lambda: Categorical(torch.tensor([0, 3]), classes=3),
            "y holds 3, but it must be a class number, 0 to 2: raise classes=.",
        ),
        (
            lambda: GaussianMean(Y, 0.0),
            "noise_variance=0, but it must be positive: use the variance of y around its mean, or 1.",
        ),
        (
            lambda: LinearRegression(Y, X[:3], 1.0),
            "x has shape (3, 4), but it must be [N, P] with N = 30 as in y: use x.flatten(1).",
        ),
        (lambda: remove(PRIOR, COIN, 3), "index holds 3, but it must be in 0 to 2: there are no others."),
        (lambda: remove(PRIOR, COIN, [0, -1]), "index holds -1, but it must be in 0 to 2: there are no others."),
        (lambda: add(PRIOR, COIN, [1, 1]), "index holds 1 twice, but an example goes once: use unique()."),
        (
            lambda: natural_gradient(COIN, torch.tensor([True, False, True])),
            "index has dtype torch.bool, but it must hold example numbers: use mask.nonzero().",
        ),
        (lambda: remove(PRIOR, COIN, [0, 2]), f"alpha=-1, but it {BAD_PRIOR}"),
        (
            lambda: remove(Gaussian.from_standard(torch.zeros(P), 1e-3), LINE, range(N)),
            "precision is not positive definite: give a prior that is, and remove only examples that are in it.",
        ),
        (lambda: blr_step(PRIOR, PRIOR, COIN, rho=0.0), "rho=0.0, but it must be in (0, 1]: use 1 for exact Bayes."),
        (lambda: remove(PRIOR, COIN, 0, rho=1.5), "rho=1.5, but it must be in (0, 1]: use 1 for exact Bayes."),
        (
            lambda: blr_step(PRIOR, PRIOR, COIN, weights=torch.ones(2)),
            "weights has shape (2,), but it must be [3]: give one for each example.",
        ),
        (
            lambda: blr_step(Gaussian.from_standard([0.0], 1.0), Gaussian.from_standard([0.0], 1.0), LINE),
            "posterior has 2 natural parameters, but these LinearRegression data need 20: make it for the same number "
            "of classes or features.",
        ),
        (
            lambda: predictive_loss(Beta(torch.ones(2, 2)), COIN),
            "posterior is a batch of shape (2,), but it must be one distribution or one for each of the 3 examples.",
        ),
        (
            lambda: remove(Beta(torch.ones(3, 2)), COIN, 0),
            "posterior is a batch of shape (3,), but it must be one distribution: take one of the batch.",
        ),
    ],
)
def test_bad_input_is_refused_with_value_rule_and_remedy(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_a_posterior_of_another_family_is_refused():
    with pytest.raises(TypeError) as error:
        blr_step(Gamma.from_standard(1.0, 1.0), Gamma.from_standard(1.0, 1.0), COIN)
    expected = "posterior is a Gamma, but Bernoulli data need a Beta: use Beta.from_standard(...)."
    assert str(error.value) == expected


def test_the_package_exports_the_models():
    assert vlearn.conjugate is conjugate
