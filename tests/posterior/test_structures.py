"""Kronecker, EK-FAC, dense and mixed posteriors against their dense covariance and torch.distributions."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import vlearn
from tests.oracles.kronecker import block_precision, random_covariance
from tests.posterior.structures import ESS, NUM_DATA, STRUCTURES, posterior_of
from vlearn.posterior import Diagonal, Full, Kronecker, KroneckerFactors, ProductPosterior


def parameters_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, (1, 2), bias=False), nn.Linear(2, 2)).double()
    return dict(model.named_parameters())


NAMES = tuple(parameters_of())


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in NAMES])


@pytest.fixture(params=STRUCTURES)
def found(request):
    return posterior_of(parameters_of(), request.param)


def test_variances_are_the_diagonal_of_the_dense_covariance(found):
    posterior, covariance = found
    assert torch.allclose(flat(posterior.variance), covariance.diagonal(), rtol=1e-10)
    assert torch.allclose(flat(posterior.draw_variance), covariance.diagonal() * NUM_DATA / ESS, rtol=1e-10)
    assert all(posterior.variance[name].shape == p.shape for name, p in parameters_of().items())
    assert posterior.num_data == NUM_DATA


def test_products_are_those_of_the_dense_covariance(found):
    posterior, covariance = found
    parameters = parameters_of()
    operator = posterior.covariance(parameters)
    gradients = {p: torch.randn(5, *p.shape, dtype=torch.float64) for p in parameters.values()}
    whole = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    moved, solved = operator.multiply(gradients), operator.solve(gradients)
    assert torch.allclose(torch.cat([moved[p].flatten(1) for p in gradients], 1), whole @ covariance, rtol=1e-9)
    precision = torch.linalg.inv(covariance)
    assert torch.allclose(torch.cat([solved[p].flatten(1) for p in gradients], 1), whole @ precision, rtol=1e-9)
    expected = torch.einsum("np,pq,nq->n", whole, covariance, whole)
    assert torch.allclose(operator.quadratic(gradients), expected, rtol=1e-10)


def test_a_gradient_that_is_missing_counts_as_zero(found):
    posterior, covariance = found
    parameters = parameters_of()
    name = next(iter(parameters))
    p = parameters[name]
    gradient = torch.randn(5, *p.shape, dtype=torch.float64)
    moved = posterior.covariance(parameters).multiply({p: gradient})
    expected = gradient.flatten(1) @ covariance[: p.numel(), : p.numel()]
    assert torch.allclose(moved[p].flatten(1), expected, rtol=1e-10)


def test_draws_have_mean_and_covariance_of_the_ess_scale_within_five_standard_errors(found):
    posterior, covariance = found
    generator, count = torch.Generator().manual_seed(1), 4_000
    draws = torch.stack([flat(posterior.sample(generator)) for _ in range(count)])
    covariance = covariance * NUM_DATA / ESS
    spread = covariance.diagonal()
    assert bool(((draws.mean(0) - flat(posterior.mean)).abs() < 5 * (spread / count).sqrt()).all())
    error = ((spread.outer(spread) + covariance.square()) / count).sqrt()
    assert bool(((draws.mT.cov() - covariance).abs() < 5 * error).all())


def test_entropy_and_divergence_are_those_of_torch_distributions(found):
    posterior, covariance = found
    mean = flat(posterior.mean)
    q = MultivariateNormal(mean, covariance)
    priors = {name: torch.full_like(p, posterior.prior_precision[name]) for name, p in parameters_of().items()}
    prior = MultivariateNormal(torch.zeros_like(mean), torch.diag(1 / flat(priors)))
    assert posterior.entropy() == pytest.approx(float(q.entropy()), rel=1e-10)
    assert posterior.kl() == pytest.approx(float(kl_divergence(q, prior)), rel=1e-10)


def test_a_clone_has_the_same_numbers_and_its_own_memory(found):
    posterior, _ = found
    clone = posterior.clone()
    assert (clone.kl(), clone.entropy(), clone.names) == (posterior.kl(), posterior.entropy(), posterior.names)
    assert type(clone) is type(posterior)
    before = flat(clone.variance).clone(), flat(clone.mean).clone()
    for part in getattr(posterior, "_parts", [posterior]):
        for factors in getattr(part, "_factors", {}).values():
            for tensor in (factors.hessian, factors.in_basis, factors.out_basis):
                tensor.fill_(7.0)
        for hessian in getattr(part, "_hessian", {}).values():
            hessian.fill_(7.0)
        for mean in part._mean.values():
            mean.fill_(7.0)
    assert torch.equal(flat(clone.variance), before[0]) and torch.equal(flat(clone.mean), before[1])


def test_factors_of_a_layer_are_those_of_torch_kron():
    """Σ⁻¹ = N(B ⊗ A + wd) for the weight flattened row by row."""
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = random_covariance(4, generator), random_covariance(3, generator)
    mean = {"weight": torch.zeros(3, 4, dtype=torch.float64)}
    posterior = Kronecker(
        mean, {("weight",): KroneckerFactors.from_covariances(inputs, gradients)}, {"weight": 0.2}, {"weight": 9.0}, 9
    )
    p = nn.Parameter(mean["weight"])
    identity = torch.eye(12, dtype=torch.float64).reshape(12, 3, 4)
    precision = posterior.covariance({"weight": p}).solve({p: identity})[p].reshape(12, 12)
    assert torch.allclose(precision, block_precision(inputs, gradients, [p.shape], 9, 0.2), atol=1e-12)
    assert torch.allclose(precision, 9 * (torch.kron(gradients, inputs) + 0.2 * torch.eye(12).double()), atol=1e-12)


@pytest.mark.parametrize("side", ["out_basis", "in_basis"])
def test_a_basis_that_is_none_is_the_identity(side):
    generator = torch.Generator().manual_seed(0)
    factors = KroneckerFactors.from_covariances(random_covariance(4, generator), random_covariance(3, generator))
    mean = {"weight": torch.randn(3, 4, dtype=torch.float64)}
    p, found = nn.Parameter(mean["weight"]), []
    size = {"out_basis": 3, "in_basis": 4}[side]
    for basis in (None, torch.eye(size, dtype=torch.float64)):
        given = KroneckerFactors(
            **{"hessian": factors.hessian, "out_basis": factors.out_basis, "in_basis": factors.in_basis} | {side: basis}
        )
        posterior = Kronecker(mean, {("weight",): given}, {"weight": 0.2}, {"weight": 9.0}, 9)
        gradient = torch.ones(2, 3, 4, dtype=torch.float64)
        found.append((posterior.variance["weight"], posterior.covariance({"weight": p}).multiply({p: gradient})[p]))
        assert posterior.clone().kl() == posterior.kl()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


def test_it_prints_its_size(found):
    assert repr(found[0]) == f"{type(found[0]).__name__}(5 parameters, num_data=40)"


# -- what is refused -----------------------------------------------------------------------------------------------


def layer():
    mean = {"w": torch.zeros(3, 4), "b": torch.zeros(3)}
    factors = KroneckerFactors(torch.eye(3), torch.eye(5), torch.ones(3, 5))
    return mean, factors, {"w": 0.1, "b": 0.1}, {"w": 9.0, "b": 9.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.ones(3, 4)}, "hessian of w and b has shape (3, 4), but it must be (3, 5)."),
        ({"out_basis": torch.eye(4)}, "out_basis of w and b has shape (4, 4), but it must be (3, 3)."),
        ({"in_basis": torch.eye(4)}, "in_basis of w and b has shape (4, 4), but it must be (5, 5)."),
    ],
)
def test_factors_of_another_shape_are_refused(change, message):
    mean, factors, decay, ess = layer()
    given = {"hessian": factors.hessian, "out_basis": factors.out_basis, "in_basis": factors.in_basis} | change
    with pytest.raises(ValueError) as error:
        Kronecker(mean, {("w", "b"): KroneckerFactors(**given)}, decay, ess, 9)
    assert str(error.value) == message


def test_parameters_of_different_layers_are_refused():
    mean, factors, decay, ess = layer()
    with pytest.raises(ValueError) as error:
        Kronecker({**mean, "b": torch.zeros(2)}, {("w", "b"): factors}, decay, ess, 9)
    assert str(error.value) == "w and b have 3, 2 rows, so no layer has both."


@pytest.mark.parametrize("what", ["weight_decay", "ess"])
def test_a_layer_with_two_scales_is_refused(what):
    mean, factors, decay, ess = layer()
    {"weight_decay": decay, "ess": ess}[what]["b"] = 5.0
    with pytest.raises(ValueError) as error:
        Kronecker(mean, {("w", "b"): factors}, decay, ess, 9)
    assert str(error.value) == (
        f"{what} differs between w and b, but a layer has one: give both the same, or each its own factors."
    )


def test_parts_that_overlap_or_differ_in_num_data_are_refused():
    one = Full({"a": torch.zeros(1)}, torch.eye(1), 9)
    with pytest.raises(ValueError, match=r"^'a' is in two parts, but each parameter has one posterior\.$"):
        ProductPosterior([one, one])
    with pytest.raises(ValueError, match=r"^num_data=9, 10, but all parts need the same\.$"):
        ProductPosterior([one, Full({"b": torch.zeros(1)}, torch.eye(1), 10)])


def test_a_prior_that_was_not_given_has_no_divergence():
    with pytest.raises(ValueError, match=r"^the prior precision of 'a' is unknown: pass prior_precision\.$"):
        Full({"a": torch.zeros(1)}, torch.eye(1), 9).kl()


def test_half_a_layer_is_refused():
    posterior, _ = posterior_of(parameters_of(), "layers")
    parameters = parameters_of()
    del parameters["0.bias"]
    with pytest.raises(ValueError) as error:
        posterior.covariance(parameters)
    assert str(error.value) == (
        "the model has no trainable parameter '0.bias', but the posterior has, correlated with others: pass the model "
        "that was trained."
    )
    del parameters["0.weight"]
    assert parameters_of()["0.weight"] not in posterior.covariance(parameters)


def test_a_layer_that_is_frozen_in_part_is_refused():
    posterior, _ = posterior_of(parameters_of(), "layers")
    parameters = {name: torch.nn.Parameter(p) for name, p in parameters_of().items()}
    parameters["0.bias"].requires_grad_(False)
    with pytest.raises(
        ValueError, match="'0.bias' is frozen .* but the posterior correlates it with others that are n"
    ):
        posterior.covariance(parameters)
    parameters["0.weight"].requires_grad_(False)
    posterior.covariance(parameters)


def test_a_product_with_a_part_without_scale_has_none(tmp_path):
    mean, one = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    without = Diagonal(mean, one, {"a": 1.0}, {"a": 9.0}, 9)
    without.uncalibrated_reason, without.num_data_given = "it has none.", False
    other = Full({"b": torch.zeros(1)}, torch.eye(1), 9)
    assert ProductPosterior([other]).uncalibrated_reason is None and ProductPosterior([other]).num_data_given
    product = ProductPosterior([other, without])
    product.save(tmp_path / "product.pt")
    for posterior in (product, product.clone(), vlearn.posterior.load(tmp_path / "product.pt")):
        assert not posterior.num_data_given
        for read in (posterior.entropy, posterior.sample):
            with pytest.raises(RuntimeError, match="it has none"):
                read()
    without.uncalibrated_draws = False
    ProductPosterior([other, without]).sample()


def test_a_part_that_has_moved_on_makes_the_whole_stale():
    def stale():
        raise RuntimeError("stale")

    mean = {"a": torch.zeros(1)}
    moved = Diagonal(mean, {"a": torch.ones(1)}, {"a": 1.0}, {"a": 9.0}, 9, check=stale)
    posterior = ProductPosterior([moved, Full({"b": torch.zeros(1)}, torch.eye(1), 9)])
    for read in (posterior.sample, posterior.entropy, posterior.clone, lambda: posterior.variance["b"]):
        with pytest.raises(RuntimeError, match="^stale$"):
            read()


def test_predictions_average_over_correlated_draws():
    """A linear model's mean output under q is its output at the mean; its spread is JΣJᵀ."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    posterior, covariance = posterior_of(dict(model.named_parameters()), "layers")
    x = torch.randn(1, 3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda w: torch.cat([w[:6].reshape(2, 3) @ x[0] + w[6:]]))(torch.zeros(8).double())
    expected = jacobian @ (covariance * NUM_DATA / ESS) @ jacobian.T
    outputs, generator = [], torch.Generator().manual_seed(0)
    for _ in range(4000):
        outputs.append(vlearn.predict(model, posterior, x, draws=1, link=lambda f: f, generator=generator)[0])
    spread = torch.stack(outputs).T.cov()
    error = ((expected.diagonal().outer(expected.diagonal()) + expected.square()) / 4000).sqrt()
    assert bool(((spread - expected).abs() < 5 * error).all())
