"""Posteriors from laplace-torch's own objects, against its precision and functional variance."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.oracles.per_example import relative_error
from vlearn.posterior import Diagonal, Full, Kronecker, from_laplace

laplace = pytest.importorskip("laplace")
from laplace.curvature import AsdlGGN, CurvlinopsGGN  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
N = 24
KINDS = {"diag": Diagonal, "kron": Kronecker, "full": Full}


def mlp(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double(), torch.randn(N, 4).double()


def cnn(outputs=3):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, outputs)).double(), torch.randn(N, 1, 6, 6).double()


def fitted(model, x, y, structure, subset="all", likelihood="classification", **arguments):
    backend = CurvlinopsGGN if structure == "full" else AsdlGGN
    la = laplace.Laplace(
        copy.deepcopy(model), likelihood, subset, structure, backend=arguments.pop("backend", backend), **arguments
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    return la


def classes():
    return torch.arange(N) % 3


def swept(model, posterior, x, y, loss_fn=F.cross_entropy):
    return vlearn.sweep(model, posterior, [(x, y)], loss_fn, "exact", progress=False)


def function_variance(la, x):
    """laplace-torch's own V ``[N, C, C]``."""
    last_layer = hasattr(la.model, "last_layer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jacobians, _ = la.backend.last_layer_jacobians(x) if last_layer else la.backend.jacobians(x)
    return la.functional_variance(jacobians.detach()).detach()


def assert_is_its_own(la, model, x, y):
    """Deviation and leverage are laplace-torch's functional variance times residual and curvature."""
    posterior = from_laplace(la)
    table = swept(model, posterior, x, y)
    p = model(x).softmax(1).detach()
    residual = p - F.one_hot(y, p.shape[1])
    variance = function_variance(la, x)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    assert relative_error(table.deviation, (variance @ residual.unsqueeze(2)).squeeze(2)) < 1e-10
    assert relative_error(table.leverage, torch.einsum("ncd,ndc->n", hessian, variance)) < 1e-10
    return posterior


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("structure", KINDS)
def test_a_classifiers_sweep_is_laplace_torchs_functional_variance(structure, make):
    model, x = make()
    la = fitted(model, x, classes(), structure, prior_precision=2.0)
    posterior = assert_is_its_own(la, model, x, classes())
    assert type(posterior) is KINDS[structure]
    assert posterior.names == tuple(dict(model.named_parameters())) and posterior.num_data == N


@pytest.mark.parametrize("structure", KINDS)
def test_with_a_last_layer_approximation_the_rest_does_not_move(structure):
    model, x = cnn()
    la = fitted(model, x, classes(), structure, "last_layer", prior_precision=2.0)
    posterior = assert_is_its_own(la, model, x, classes())
    assert posterior.names == ("5.weight", "5.bias")


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", KINDS)
def test_in_regression_the_noise_variance_is_counted_once(structure, subset):
    """ℓ = (f - y)²/(2σ²): e = (f - y)/σ², and V e is the functional variance times it."""
    model, x = mlp(outputs=1)
    y, noise = torch.randn(N, 1, dtype=torch.float64), 0.4
    la = fitted(model, x, y, structure, subset, "regression", prior_precision=2.0, sigma_noise=noise)

    def loss(output, target):
        return (output - target).square().sum(1) / (2 * noise**2)

    table = swept(model, from_laplace(la), x, y, loss)
    variance = function_variance(la, x)
    residual = (model(x).detach() - y) / noise**2
    assert relative_error(table.deviation, (variance @ residual.unsqueeze(2)).squeeze(2)) < 1e-10
    assert relative_error(table.leverage, variance.flatten() / noise**2) < 1e-10
    if structure == "full" and subset == "all":  # Σ tr ΛV = P - δ tr S⁻¹
        effective = la.n_params - 2.0 * float(torch.linalg.inv(la.posterior_precision).trace())
        assert float(table.leverage.sum()) == pytest.approx(effective, rel=1e-8)


@pytest.mark.parametrize(
    ("structure", "prior"),
    [(kind, "scalar") for kind in KINDS]
    + [(kind, "per layer") for kind in KINDS]
    + [("diag", "per entry"), ("full", "per entry")],
)
def test_every_form_of_prior_precision_is_read(structure, prior):
    model, x = mlp()
    size = {"scalar": 1, "per layer": 4, "per entry": sum(p.numel() for p in model.parameters())}[prior]
    given = torch.linspace(0.5, 4.0, size, dtype=torch.float64)
    la = fitted(model, x, classes(), structure, prior_precision=given)
    posterior = assert_is_its_own(la, model, x, classes())
    flat = torch.cat([posterior.variance[name].flatten() for name in posterior.names])
    dense = {"diag": torch.diag, "kron": lambda s: s.to_matrix(), "full": lambda s: s}[structure](
        la.posterior_precision
    )
    assert torch.allclose(flat, torch.linalg.inv(dense).diagonal(), rtol=1e-8)
    expected = torch.distributions.MultivariateNormal(la.mean, precision_matrix=dense)
    wide = torch.zeros_like(la.mean), torch.diag(1 / la.prior_precision_diag)
    prior_of = torch.distributions.MultivariateNormal(*wide)
    assert posterior.entropy() == pytest.approx(float(expected.entropy()), rel=1e-8)
    assert posterior.kl() == pytest.approx(float(torch.distributions.kl_divergence(expected, prior_of)), rel=1e-8)


def test_a_prior_mean_counts_in_the_divergence():
    model, x = mlp()
    near = from_laplace(fitted(model, x, classes(), "kron", prior_mean=0.3))
    origin = from_laplace(fitted(model, x, classes(), "kron"))
    mean = torch.cat([p.detach().flatten() for p in model.parameters()])
    shift = 0.5 * float((mean - 0.3).square().sum() - mean.square().sum())
    assert near.kl() == pytest.approx(origin.kl() + shift, rel=1e-10)


@pytest.mark.parametrize("structure", KINDS)
def test_draws_have_laplace_torchs_covariance_within_five_standard_errors(structure):
    model, x = mlp()
    la = fitted(model, x, classes(), structure, prior_precision=2.0)
    posterior, generator, count = from_laplace(la), torch.Generator().manual_seed(0), 3000
    draws = torch.stack([torch.cat([t.flatten() for t in posterior.sample(generator).values()]) for _ in range(count)])
    dense = {"diag": torch.diag, "kron": lambda s: s.to_matrix(), "full": lambda s: s}[structure](
        la.posterior_precision
    )
    covariance = torch.linalg.inv(dense)
    spread = covariance.diagonal()
    assert bool(((draws.mean(0) - la.mean).abs() < 5 * (spread / count).sqrt()).all())
    error = ((spread.outer(spread) + covariance.square()) / count).sqrt()
    assert bool(((draws.mT.cov() - covariance).abs() < 5 * error).all())


def test_the_models_own_object_is_swept_at_the_mean_of_the_fit():
    """Training on after the fit does not change what the posterior says."""
    model, x = mlp()
    la = laplace.Laplace(model, "classification", "all", "kron", backend=AsdlGGN)
    la.fit(DataLoader(TensorDataset(x, classes()), batch_size=10))
    posterior = from_laplace(la)
    before = swept(model, posterior, x, classes())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(swept(model, posterior, x, classes()).loo_loss, before.loo_loss)


def test_half_the_parameters_may_be_frozen():
    model, x = mlp()
    model[0].requires_grad_(False)
    la = fitted(model, x, classes(), "diag", prior_precision=2.0)
    assert from_laplace(la).names == ("2.weight", "2.bias")
    model, _ = mlp()
    assert swept(model, from_laplace(la), x, classes()).deviation.isfinite().all()


def test_a_diagonal_of_another_back_end_is_the_same():
    model, x = cnn()
    asdl = from_laplace(fitted(model, x, classes(), "diag"))
    other = from_laplace(fitted(model, x, classes(), "diag", backend=laplace.curvature.GGNInterface))
    for name in asdl.names:
        assert torch.allclose(asdl.variance[name], other.variance[name], rtol=1e-10)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", KINDS)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_an_object_that_was_not_fitted_is_refused(structure, subset):
    la = laplace.Laplace(mlp()[0], "classification", subset, structure, backend=AsdlGGN)
    with pytest.raises(RuntimeError, match=r"has not been fitted: call la\.fit\(loader\) first\.$"):
        from_laplace(la)


def test_a_tempered_object_is_refused():
    model, x = mlp()
    with pytest.raises(ValueError) as error:
        from_laplace(fitted(model, x, classes(), "diag", temperature=0.5))
    assert str(error.value) == (
        "temperature=0.5, but sensitivities are those of the untempered posterior: set la.temperature = 1."
    )


def test_other_approximations_are_refused():
    model, x = mlp()
    indices = torch.tensor([0, 3])
    la = laplace.Laplace(
        model, "classification", "subnetwork", "full", backend=CurvlinopsGGN, subnetwork_indices=indices
    )
    for other, name in ((la, "FullSubnetLaplace"), (model, "Sequential")):
        with pytest.raises(TypeError) as error:
            from_laplace(other)
        assert str(error.value) == (
            f"{name} is not supported: pass laplace-torch's diag, kron or full, over all weights or the last layer."
        )
