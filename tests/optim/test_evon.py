"""EVON: IVON in an eigenbasis. Against IVON, the exact Hessian, and the nearest Gaussian."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import AS_IVON, data, loss_of, network, plain
from vlearn.gaussians.eigenbasis import power_iteration, without_ties


def steps(optimizer: Any, model: nn.Module, count: int, seed: int = 3) -> None:
    x, y = data()
    torch.manual_seed(seed)
    for _ in range(count):
        plain(optimizer, model, x, y)


def matrix_state(optimizer: vlearn.EVON, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_L, h, Q_R)."""
    state = optimizer.state[p]
    return state["out_basis"], state["hessian"], state["in_basis"]


# -- beside IVON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["price", "empirical"])
@pytest.mark.parametrize("clip_radius", [math.inf, 0.05])
@pytest.mark.parametrize("warmup", [None, 3.0])
def test_with_the_identity_as_basis_it_is_ivon(curvature: str, clip_radius: float, warmup: float | None) -> None:
    settings = {
        **AS_IVON,
        "ess": 50,
        "beta2": 0.9,
        "curvature": curvature,
        "clip_radius": clip_radius,
        "beta2_warmup": warmup,
    }
    one, other = network(), network()
    ivon, evon = vlearn.IVON(one, **settings), vlearn.EVON(other, update_every=10**6, **settings)
    for count in (1, 6):  # the first basis comes with the first step
        steps(ivon, one, count)
        steps(evon, other, count)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-11, atol=1e-13)
            if q.dim() == 2:
                hessian = ivon.state[p]["hessian"]
                if count > 1:
                    torch.testing.assert_close(evon.state[q]["hessian"], hessian, rtol=1e-11, atol=1e-13)
                identities = {f"{side}_basis": torch.eye(len(f)) for side, f in sides_of(evon, q)}
                evon.state[q].update({"hessian": hessian.clone(), **{n: eye.double() for n, eye in identities.items()}})


def sides_of(optimizer: vlearn.EVON, p: Tensor) -> list[tuple[str, Tensor]]:
    return [(side, optimizer.state[p][f"{side}_factor"]) for side in ("out", "in")]


def test_without_any_side_it_is_ivon_bit_for_bit() -> None:
    settings = {**AS_IVON, "ess": 50}
    one, other = network(), network()
    steps(vlearn.IVON(one, **settings), one, 5)
    steps(vlearn.EVON(other, max_dim=0, **settings), other, 5)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# -- what it learns ----------------------------------------------------------------------------------------


def regression(outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, nn.Linear]:
    """Linear regression whose inputs are correlated along axes that are not the features'."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([2.0, 1.0, 0.5, 0.2], dtype=torch.float64) @ rotation
    y = x @ torch.randn(4, outputs, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    return (
        x,
        y + torch.randn(60, outputs, generator=generator, dtype=torch.float64),
        nn.Linear(4, outputs, False).double(),
    )


def half_squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(1).mean() / 2


@pytest.mark.parametrize("update_every", [1, 10**6])
def test_the_estimate_is_unbiased_in_the_basis_that_the_noise_was_made_in(update_every: int) -> None:
    """At one mean, h is the average of ĥ, whose mean is the Hessian's diagonal there, also while the basis moves."""
    x, y, model = regression(3)
    model.weight.data = torch.linalg.lstsq(x, y).solution.mT.contiguous()
    optimizer = vlearn.EVON(model, lr=0.0, ess=60, beta2=1.0, beta2_warmup=20, update_every=update_every, beta3=0.9)
    torch.manual_seed(1)
    for _ in range(2000):
        optimizer.zero_grad()
        half_squares(model, x, y).backward()
        optimizer.step()
    out_basis, h, in_basis = matrix_state(optimizer, model.weight)
    exact = torch.diagonal(in_basis.mT @ (x.mT @ x / 60) @ in_basis)
    if update_every == 1:  # averaged over bases, by a rule that keeps the trace
        torch.testing.assert_close(h.sum(), 3 * exact.sum(), rtol=0.1, atol=0)
    else:
        torch.testing.assert_close(h, exact.expand(3, 4), rtol=0.25, atol=0.05)
    torch.testing.assert_close(out_basis.mT @ out_basis, torch.eye(3).double())


def covariance(posterior: Any, name: str) -> Tensor:
    """Σ of one weight, which is independent of others."""
    size = posterior.mean[name].numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *posterior.mean[name].shape)
    return posterior.block((name,)).multiply([unit])[0].reshape(size, size)


def learned(cls: Any, model: nn.Linear, loss: Any, decay: float, lr: float = 0.3, **settings: Any) -> Any:
    """N(m, Σ) after 1,500 steps with rates that fall as 1/t."""
    model.weight.data.zero_()
    optimizer = cls(
        model,
        lr=lr,
        ess=60,
        beta2=1.0,
        beta2_warmup=20,
        weight_decay=decay,
        rescale_lr=False,
        clip_radius=math.inf,
        hess_init=1.0,
        **settings,
    )
    torch.manual_seed(0)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = lr / (1 + step / 100)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    sigma = covariance(optimizer.posterior(), "weight")
    return torch.distributions.MultivariateNormal(model.weight.detach().flatten(), sigma)


def test_in_linear_regression_it_finds_the_covariance_that_no_diagonal_has() -> None:
    """The Hessian is I ⊗ XᵀX/N, and gradients at the draws vary along its eigenvectors: Σ is exact."""
    (x, y, model), decay = regression(1), 0.05
    precision = x.mT @ x + 60 * decay * torch.eye(4).double()
    mean = torch.linalg.solve(precision, x.mT @ y).flatten()
    truth = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)

    def divergence(cls: Any) -> float:
        found = learned(cls, model, lambda model: half_squares(model, x, y), decay)
        return float(torch.distributions.kl_divergence(found, truth))

    evon, ivon = divergence(vlearn.EVON), divergence(vlearn.IVON)
    assert evon < 0.05
    assert ivon > 5 * evon


def test_in_logistic_regression_it_is_nearer_the_nearest_gaussian_than_any_diagonal() -> None:
    """One row of weights, so a basis of its columns alone: that of the gradients is nearly the Hessian's."""
    (x, scores, model), decay = regression(1), 0.05
    y = (torch.sigmoid(scores) > 0.5).double()
    best = nearest_gaussian(x, y.flatten(), decay)
    diagonal = torch.distributions.MultivariateNormal(
        best.mean, precision_matrix=best.precision_matrix.diagonal().diag()
    )  # the diagonal Gaussian q with the least KL(q ‖ best)
    found = learned(vlearn.EVON, model, lambda model: F.binary_cross_entropy_with_logits(model(x), y), decay)
    to_best, least = (float(torch.distributions.kl_divergence(q, best)) for q in (found, diagonal))
    assert least > 0.5
    assert to_best < 0.25 * least


def nearest_gaussian(x: Tensor, y: Tensor, decay: float) -> torch.distributions.MultivariateNormal:
    """The Gaussian q with the least KL(q ‖ p), p the posterior of logistic regression, by its fixed point.

    S = Σₙ E[σ'(xₙᵀθ)]xₙxₙᵀ + Nδ and 0 = Σₙ E[σ(xₙᵀθ) - yₙ]xₙ + Nδm, where xₙᵀθ is a Gaussian of one dimension.
    """
    nodes, mass = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    mass, prior = mass / mass.sum(), len(x) * decay * torch.eye(x.shape[1]).double()
    mean, precision = x.new_zeros(x.shape[1]), prior.clone()
    for _ in range(500):
        spread = (x @ torch.linalg.inv(precision) * x).sum(1).sqrt()
        chance = torch.sigmoid((x @ mean).unsqueeze(1) + spread.unsqueeze(1) * nodes)
        slope = (chance * (1 - chance)) @ mass
        precision = 0.5 * precision + 0.5 * (x.mT @ (slope.unsqueeze(1) * x) + prior)
        mean = mean - 0.5 * torch.linalg.solve(precision, x.mT @ (chance @ mass - y) + prior @ mean)
    return torch.distributions.MultivariateNormal(mean, precision_matrix=precision)


@pytest.mark.parametrize("curvature", ["price", "empirical"])
def test_the_precision_stays_positive_through_bursts_of_noise(curvature: str) -> None:
    model = network()
    optimizer = vlearn.EVON(
        model, **{**AS_IVON, "ess": 50, "beta2": 0.5, "weight_decay": 1e-3, "update_every": 1, "curvature": curvature}
    )
    x, y = data()
    for step in range(50):
        optimizer.zero_grad()
        (loss_of(model, x, y) * (1e4 if step % 7 == 0 else 1.0)).backward()
        optimizer.step()
        for p in model.parameters():
            assert bool((optimizer.state[p]["hessian"] + 1e-3 > 0).all())
            assert bool(p.isfinite().all())


# -- bases -------------------------------------------------------------------------------------------------


def test_power_iterations_come_to_the_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    factor = without_ties(root @ root.mT, 1e-3)
    assert factor is not None
    basis = torch.eye(6).double()
    for _ in range(300):
        found = power_iteration(factor, basis)
        assert found is not None
        basis = found
    expected = torch.linalg.eigh(factor).eigenvectors.flip(1)
    torch.testing.assert_close((basis.mT @ expected).abs(), torch.eye(6).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_basis_that_cannot_be_made_stays_and_is_counted(value: float) -> None:
    model = network()
    optimizer = vlearn.EVON(model, **{**AS_IVON, "ess": 50, "update_every": 1})
    steps(optimizer, model, 3)
    p = model[0].weight
    before = [optimizer.state[p][name].clone() for name in ("in_basis", "out_basis")]
    optimizer.param_groups[0]["beta3"] = 0.999999
    optimizer.state[p]["out_factor"].fill_(value)
    optimizer.param_groups[0]["lr"] = 0.0
    model.zero_grad()
    with optimizer.sampled_params(train=True):
        for q in model.parameters():
            q.grad = torch.zeros_like(q)
    optimizer.step()
    assert optimizer.decomposition_failures == optimizer.diagnostics().decomposition_failures >= 1
    assert all(torch.equal(optimizer.state[p][n], b) for n, b in zip(("in_basis", "out_basis"), before, strict=True))


def test_a_basis_moves_every_so_many_steps_and_the_hessian_with_it() -> None:
    model = network()
    optimizer = vlearn.EVON(
        model, **{**AS_IVON, "ess": 50, "hess_init": 0.5, "update_every": 3, "beta2": 1.0}
    )  # h moves with bases alone
    p, seen = model[0].weight, []
    optimizer.state.clear()
    for step in range(1, 8):
        steps(optimizer, model, 1, seed=step)
        if step == 1:
            optimizer.state[p]["hessian"].copy_(torch.rand(5, 6, generator=torch.Generator().manual_seed(1)))
            total = optimizer.state[p]["hessian"].sum()
        seen.append(optimizer.state[p]["out_basis"].clone())
        torch.testing.assert_close(optimizer.state[p]["hessian"].sum(), total)  # the trace of Q h Qᵀ
    moved = [not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [False, False, True, False, False, True]


def test_a_matrix_without_gradients_keeps_its_own_axes_and_its_hessian() -> None:
    model = network()
    optimizer = vlearn.EVON(model.parameters(), **AS_IVON, ess=50, update_every=1)
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        optimizer.step()
    state = optimizer.state[model[0].weight]
    for name in ("out_basis", "in_basis"):
        torch.testing.assert_close(state[name].square().sum(0), torch.ones(len(state[name])).double())
        assert int((state[name].abs() > 1e-6).sum()) == len(state[name])
    assert optimizer.decomposition_failures == 0


def test_the_bases_can_be_made_the_eigenvectors_at_once() -> None:
    model = network()
    optimizer = vlearn.EVON(model, lr=0.1, ess=50, update_every=10**6)
    steps(optimizer, model, 5)
    p, posterior = model[0].weight, optimizer.posterior()
    trace, mean = optimizer.state[p]["hessian"].sum(), p.detach().clone()
    optimizer.train()  # a draw that waits
    optimizer.refresh_bases()
    basis = optimizer.state[p]["in_basis"]
    factor = without_ties(optimizer.state[p]["in_factor"], 1e-3)
    assert factor is not None
    rotated = basis.mT @ factor @ basis
    torch.testing.assert_close(rotated, rotated.diagonal().diag(), rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["hessian"].sum(), trace)
    assert torch.equal(p, mean)
    with pytest.raises(RuntimeError, match="stale"):
        posterior.kl()
    steps(optimizer, model, 1)


SHAPES = {
    "linear": (nn.Linear(6, 4), {"weight": (4, 6)}),
    "convolution": (nn.Conv2d(2, 3, 3), {"weight": (3, 18)}),
    "transposed convolution": (nn.ConvTranspose1d(2, 3, 3), {"weight": (2, 9)}),
    "large table": (nn.Embedding(40, 4), {"weight": (None, 4)}),
    "one row": (nn.Linear(6, 1), {"weight": (None, 6)}),
    "one weight": (nn.Linear(1, 1), {}),
    "norm": (nn.LayerNorm(5), {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_side_that_is_not_too_large_has_a_basis(name: str) -> None:
    module, expected = SHAPES[name]
    optimizer = vlearn.EVON(module.named_parameters(), **{**AS_IVON, "ess": 50, "max_dim": 32})
    with optimizer.sampled_params(train=True):
        for p in module.parameters():
            p.grad = torch.randn(p.shape)
    optimizer.step()
    for parameter, p in module.named_parameters():
        assert sides(optimizer, p) == expected.get(parameter, (None, None))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 128), (None, 128)), ((1, 129), (None, None)), ((1, 5, 30), (None, None)), ((300, 2), (None, 2))],
)
def test_a_side_much_longer_than_the_other_has_no_basis(
    shape: tuple[int, ...], expected: tuple[int | None, int | None]
) -> None:
    p = nn.Parameter(torch.randn(shape))
    optimizer = vlearn.EVON([p], **{**AS_IVON, "ess": 50})
    with optimizer.sampled_params(train=True):
        p.grad = torch.randn(shape)
    optimizer.step()
    assert sides(optimizer, p) == expected


def sides(optimizer: vlearn.EVON, p: torch.Tensor) -> tuple[int | None, ...]:
    """The lengths of the sides of a matrix that have a basis."""
    bases = (optimizer.state[p].get(f"{side}_basis") for side in ("out", "in"))
    return tuple(None if basis is None else len(basis) for basis in bases)


def test_a_matrix_larger_than_a_block_is_drawn_and_learned_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    weights = []
    for limit in (2**20, 7):
        monkeypatch.setattr("vlearn.optim.sampling.blocks.CPU_BLOCK", limit)
        model = network()
        optimizer = vlearn.EVON([model[0].weight], **{**AS_IVON, "ess": 50, "update_every": 1})
        torch.manual_seed(2)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
            optimizer.step()
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_weights_that_are_written_under_a_draw_count_as_they_are() -> None:
    """The estimate is of the noise that the gradient saw, not of the one that was drawn."""
    x, y = data()
    results = []
    for seed in (1, 2):  # the draw is overwritten by the same values, whatever it was
        model = network()
        optimizer = vlearn.EVON(model.parameters(), **{**AS_IVON, "ess": 50, "beta2": 0.9})
        for _ in range(3):
            torch.manual_seed(seed)
            with optimizer.sampled_params(train=True):
                values = torch.Generator().manual_seed(5)
                with torch.no_grad():
                    for p in model.parameters():
                        p.copy_(torch.randn(p.shape, generator=values, dtype=p.dtype))
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
            optimizer.step()
        results.append(optimizer.state[model[0].weight]["hessian"].clone())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


# -- what needs no captures --------------------------------------------------------------------------------


def test_a_network_with_batch_norm_trains_without_being_watched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    optimizer = vlearn.EVON(model.parameters(), **{**AS_IVON, "ess": 50, "hess_init": 0.1})
    x, y = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    losses = []
    for _ in range(60):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_its_posterior_has_the_dense_covariance_that_its_state_says() -> None:
    model, (x, y) = network(), data()
    optimizer = vlearn.EVON(model, **{**AS_IVON, "ess": 50, "hess_init": 0.5})
    steps(optimizer, model, 12)
    posterior = optimizer.posterior()
    for name, p in (("0.weight", model[0].weight), ("2.weight", model[2].weight)):
        q_out, h, q_in = matrix_state(optimizer, p)
        basis = torch.kron(q_out, q_in)
        sigma = basis @ torch.diag(1 / (50 * (h.flatten() + 1e-4))) @ basis.mT
        torch.testing.assert_close(covariance(posterior, name), sigma)
        torch.testing.assert_close(posterior.variance[name].flatten(), sigma.diagonal())
    table = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, progress=False)
    assert bool((table.loo_loss > table.loss).all())
    assert math.isfinite(posterior.kl())


def test_draws_have_a_hundredth_of_the_posteriors_variance_unless_their_width_is_given() -> None:
    optimizer = vlearn.EVON(nn.Linear(2, 3), lr=2.0, num_data=40)
    assert optimizer.param_groups[0]["ess"] == 4_000 and optimizer.posterior().num_data == 40
    posterior = optimizer.posterior()
    assert torch.allclose(100 * posterior.draw_variance["weight"], posterior.variance["weight"])
    assert vlearn.EVON(nn.Linear(2, 3), lr=2.0, ess=50, num_data=40).param_groups[0]["ess"] == 50
    for settings, told in (({}, "EVON needs num_data"), ({"num_data": -5}, "num_data=-5, but it must be positive")):
        with pytest.raises(ValueError, match=told):
            vlearn.EVON(nn.Linear(2, 3), lr=2.0, **settings)
