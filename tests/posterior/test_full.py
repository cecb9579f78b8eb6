"""The dense posterior against torch.distributions."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from vlearn.posterior import Full


def example():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    mean = {"a": torch.tensor([[1.0, -2.0], [0.5, 4.0]]).double(), "b": torch.tensor([3.0]).double()}
    return Full(mean, root @ root.mT + torch.eye(5), num_data=30), root @ root.mT + torch.eye(5)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_variances_are_the_diagonal_of_the_inverse():
    posterior, precision = example()
    assert torch.allclose(flat(posterior.variance), torch.linalg.inv(precision).diagonal(), rtol=1e-12)
    assert posterior.variance["a"].shape == (2, 2)
    assert posterior.names == ("a", "b") and posterior.num_data == 30


def test_draws_have_mean_and_covariance_within_five_standard_errors():
    posterior, precision = example()
    generator, count = torch.Generator().manual_seed(1), 20_000
    draws = torch.stack([flat(posterior.sample(generator)) for _ in range(count)])
    covariance = torch.linalg.inv(precision)
    spread = covariance.diagonal()
    assert bool(((draws.mean(0) - flat(posterior.mean)).abs() < 5 * (spread / count).sqrt()).all())
    # Var of a sample covariance's entry: (σ_ii σ_jj + σ_ij²)/n
    error = ((spread.outer(spread) + covariance.square()) / count).sqrt()
    assert bool(((draws.mT.cov() - covariance).abs() < 5 * error).all())


def test_draws_have_the_density_of_torch_distributions():
    """z = Lᵀ(θ - m) is standard normal: the log density of a draw is that of its z, up to the determinant."""
    posterior, precision = example()
    q = MultivariateNormal(flat(posterior.mean), precision_matrix=precision)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(5, 1, dtype=torch.float64, generator=generator).squeeze(1)
    draw = flat(posterior.sample(torch.Generator().manual_seed(2)))
    standard = MultivariateNormal(torch.zeros(5).double(), torch.eye(5).double()).log_prob(noise)
    assert float(q.log_prob(draw)) == pytest.approx(float(standard + 0.5 * precision.logdet()), rel=1e-12)


def test_the_covariance_multiplies_by_the_inverse_precision():
    posterior, precision = example()
    parameters = {name: nn.Parameter(mean.clone()) for name, mean in posterior.mean.items()}
    covariance = posterior.covariance(parameters)
    gradients = {p: torch.randn(7, *p.shape, dtype=torch.float64) for p in parameters.values()}
    moved = covariance.multiply(gradients)
    expected = torch.cat([g.flatten(1) for g in gradients.values()], 1) @ torch.linalg.inv(precision)
    assert torch.allclose(torch.cat([moved[p].flatten(1) for p in gradients], 1), expected, rtol=1e-10)
    only = {parameters["b"]: gradients[parameters["b"]]}  # the other parameter's gradient is zero
    expected = gradients[parameters["b"]] @ torch.linalg.inv(precision)[4:]
    assert torch.allclose(covariance.multiply(only)[parameters["b"]], expected[:, 4:], rtol=1e-10)
    assert torch.allclose(covariance.multiply(only)[parameters["a"]].flatten(1), expected[:, :4], rtol=1e-10)


def test_a_precision_of_another_size_is_refused():
    with pytest.raises(ValueError) as error:
        Full({"a": torch.zeros(2, 2)}, torch.eye(3), num_data=1)
    assert str(error.value) == "precision has shape (3, 3), but the 4 entries of the mean need (4, 4)."


@pytest.mark.parametrize("precision", [-torch.eye(2), torch.ones(2, 2), torch.full((2, 2), torch.nan)])
def test_a_precision_that_is_not_positive_definite_is_refused(precision):
    with pytest.raises(ValueError) as error:
        Full({"a": torch.zeros(2)}, precision, num_data=1)
    assert str(error.value) == "precision is not positive definite: add the prior precision to its diagonal."


def test_a_precision_that_is_not_symmetric_is_refused():
    with pytest.raises(ValueError) as error:
        Full({"a": torch.zeros(2)}, torch.tensor([[2.0, 1.0], [0.0, 2.0]]), num_data=1)
    assert str(error.value) == "precision is not symmetric: use (S + S.mT) / 2 if it is so but for rounding."


def test_a_model_without_one_of_its_parameters_is_refused():
    posterior, _ = example()
    with pytest.raises(ValueError, match="the model has no trainable parameter 'b', but the posterior has"):
        posterior.covariance({"a": nn.Parameter(posterior.mean["a"])})
