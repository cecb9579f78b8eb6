"""KFACVON keeps a Kronecker precision for each layer: its steps, draws, posterior and sensitivities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.networks import at_draw, cross_entropy, problem
from tests.optim.table import EKFACVON, KFACVON, data, loss_of, network, plain, weights
from tests.optim.test_full_von import covariance_of
from tests.optim.test_von import CERTAIN, plain_step
from tests.oracles.per_example import relative_error
from tests.per_example.test_kronecker_factors import problem as words
from vlearn.gaussians.eigenbasis import rotate_diagonal
from vlearn.losses import likelihood as likelihood_module
from vlearn.posterior import Diagonal, Kronecker

entries = pytest.mark.parametrize("entry", [KFACVON, EKFACVON], ids=str)


def test_steps_equal_the_written_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one output and signs alone, the probe of a squared error is exact."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    lr, h0, wd, beta1, beta2, damping, every = 0.3, 0.5, 0.1, 0.8, 0.6, 0.05, 2
    optimizer = vlearn.KFACVON(
        model,
        lr,
        CERTAIN,
        hess_init=h0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=wd,
        likelihood="gaussian",
        damping=damping,
        update_every=every,
        num_data=20,
    )
    mean = torch.cat([model.weight.detach(), model.bias.detach().unsqueeze(1)], 1)
    g, a_mean = torch.zeros(1, 4).double(), torch.zeros(4, 4).double()
    for t in range(1, 7):
        x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
        plain_step(optimizer, lambda x=x, y=y: F.mse_loss(model(x), y))
        columns = torch.cat([x, torch.ones(20, 1)], 1)
        a = columns.mT @ columns / 20
        a_mean = a if t == 1 else a_mean + (1 - beta2) / (1 - beta2**t) * (a - a_mean)
        if t % every == 1:
            hessian = beta2**t * h0 * torch.eye(4).double() + (1 - beta2**t) * 2 * a_mean  # B = 2
        g = beta1 * g + (1 - beta1) * 2 * ((columns @ mean.mT - y) * columns).mean(0)
        precision = hessian + (wd + damping) * torch.eye(4).double()
        mean = mean - lr * torch.linalg.solve(precision, (g / (1 - beta1**t) + wd * mean).mT).mT
        found = torch.cat([model.weight.detach(), model.bias.detach().unsqueeze(1)], 1)
        torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-12)
    exact = (20 * (hessian + wd * torch.eye(4).double())).inverse()
    assert relative_error(covariance_of(optimizer, model), exact) < 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
def test_on_bayesian_linear_regression_it_converges_to_the_exact_posterior(
    outputs: int, corrected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Hessian is a Kronecker product, A of the inputs and the same B for every example."""
    torch.manual_seed(0)
    n, delta, noise = 30, 2.0, 0.4
    x = torch.randn(n, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    y = torch.randn(n, outputs, dtype=torch.float64)
    alternating = torch.stack([torch.ones(n), 1 - 2 * (torch.arange(n) % 2)], 1).double()  # orthogonal: B is exact
    monkeypatch.setattr(
        likelihood_module, "_signs", lambda like, generator: alternating[:, :outputs].reshape(like.shape)
    )
    model = nn.Linear(3, outputs).double()
    optimizer = vlearn.KFACVON(
        model,
        0.5,
        CERTAIN,
        beta1=0.0,
        beta2=0.8,
        weight_decay=delta / n,
        likelihood=lambda f: torch.distributions.Normal(f, noise),
        eigenvalue_correction=corrected,
        num_data=n,
    )
    for _ in range(200):
        plain_step(optimizer, lambda: -torch.distributions.Normal(model(x), noise).log_prob(y).sum(1).mean())
    columns = torch.cat([x, torch.ones(n, 1)], 1)
    # The probe is that of the mean over all targets, a `Normal`'s usual loss.
    precision = columns.mT @ columns / noise**2
    found = covariance_of(optimizer, model)  # type: ignore[arg-type]
    curvature = precision / outputs + delta * torch.eye(4).double()
    exact = torch.kron(torch.eye(outputs).double(), curvature.inverse().contiguous())
    rows = torch.arange(outputs * 4).reshape(outputs, 4)
    order = torch.cat([rows[:, :3].flatten(), rows[:, 3]])
    assert relative_error(found, exact[order][:, order]) < 1e-6
    mean = torch.cat([model.weight.detach(), model.bias.detach().unsqueeze(1)], 1)
    solution = torch.linalg.solve(precision + delta * torch.eye(4).double(), columns.mT @ y / noise**2).mT
    assert relative_error(mean, solution) < 1e-6


@entries
@pytest.mark.parametrize("tempering", [1.0, 4.0])
def test_draws_have_the_stated_covariance(entry: Any, tempering: float) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model, num_data=500, tempering=tempering, weight_decay=0.05, beta2=0.5)
    for _ in range(5):
        plain(optimizer, model, x, y)
    optimizer.unwatch()
    mean = torch.cat([p.reshape(-1) for p in weights(model)])
    torch.manual_seed(0)
    draws = []
    for _ in range(4000):
        with optimizer.sampled_params():
            draws.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    moves = torch.stack(draws) - mean
    stated = covariance_of(optimizer, model) * 500 / (50 / tempering)
    products = moves.unsqueeze(2) * moves.unsqueeze(1)
    errors = (products.mean(0) - stated).abs() / (products.std(0) / 4000**0.5)
    assert float(errors.max()) < 5
    assert float((moves.mean(0) / (moves.std(0) / 4000**0.5)).abs().max()) < 5
    by_posterior = torch.stack(
        [torch.cat([v.reshape(-1) for v in optimizer.posterior().sample().values()]) - mean for _ in range(50)]
    )
    assert 0.8 < float(by_posterior.square().mean() / stated.diagonal().mean()) < 1.25


@entries
@pytest.mark.parametrize("name", ["perceptron", "convolution", "sequence", "normalised", "words"])
def test_sensitivities_come_from_its_state(entry: Any, name: str) -> None:
    model, x, y = words("words") if name == "words" else problem(name)
    optimizer = entry.make(model, beta2=0.5)
    for _ in range(3):
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    truth = at_draw(model, x, cross_entropy(y))
    optimizer.step()
    covariance = covariance_of(optimizer, model)
    found = optimizer.sensitivities(deviation=True)
    assert relative_error(found.self_influence, truth.self_influence(covariance)) < 1e-9
    assert relative_error(found.deviation, truth.deviation(covariance)) < 1e-9


def test_a_sweep_reads_its_posterior_of_layers_and_diagonal_parameters() -> None:
    model, x, y = problem("normalised")
    optimizer = vlearn.KFACVON(model, 0.05, 50, beta2=0.5)
    for _ in range(3):
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
    posterior = optimizer.posterior()
    assert [type(part) for part in posterior._parts] == [Kronecker, Diagonal]
    assert set(posterior.names) == {name for name, _ in model.named_parameters()}
    table = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, leverage="exact", progress=False)
    covariance, truth = covariance_of(optimizer, model), at_draw(model, x, cross_entropy(y))  # type: ignore[arg-type]
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-9
    assert table.leverage is not None and relative_error(table.leverage, truth.leverage(covariance)) < 1e-9
    kept = posterior.clone()
    before = kept.variance["0.weight"].clone()
    for _ in range(2):
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="stale"):
        posterior.variance["0.weight"]
    assert torch.equal(kept.variance["0.weight"], before)


def test_factored_damping_damps_each_factor() -> None:
    model, (x, y) = network(), data()
    wd = 0.05
    optimizer = KFACVON.make(model, beta2=0.0, weight_decay=wd, factored_damping=True)
    plain(optimizer, model, x, y)
    state = optimizer.state[model[0].weight]
    a, b = state["in_factor"], state["out_factor"]
    pi = (a.trace() / len(a) / (b.trace() / len(b))).sqrt()
    damped = torch.kron(b + wd**0.5 / pi * torch.eye(5).double(), a + wd**0.5 * pi * torch.eye(7).double())
    found = (50 * damped).inverse()
    rows = torch.arange(35).reshape(5, 7)
    order = torch.cat([rows[:, :6].flatten(), rows[:, 6]])
    assert relative_error(covariance_of(optimizer, model)[:35, :35], found[order][:, order]) < 1e-9


def test_eigenvalues_are_carried_into_a_new_basis() -> None:
    """They become the diagonal of the same matrix there."""
    torch.manual_seed(0)
    old, new = ([torch.linalg.qr(torch.randn(k, k).double())[0] for k in (3, 4)] for _ in range(2))
    s = torch.rand(3, 4, dtype=torch.float64)
    q_old, q_new = torch.kron(*old), torch.kron(*new)
    dense = q_new.mT @ q_old @ s.flatten().diag() @ q_old.mT @ q_new
    torch.testing.assert_close(rotate_diagonal(s, (old[0], old[1]), (new[0], new[1])).flatten(), dense.diagonal())
    torch.testing.assert_close(rotate_diagonal(s, (None, old[1]), (None, old[1])), s)


@entries
@pytest.mark.parametrize("how", ["raises", "not finite"])
def test_a_failed_decomposition_keeps_the_last_basis_and_is_counted(
    entry: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model, update_every=1)
    plain(optimizer, model, x, y)
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items() if "basis" in k} for p in model.parameters()}

    def fail(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if how == "raises":
            raise torch.linalg.LinAlgError("it did not converge")
        return torch.full_like(matrix[0], float("nan")), matrix

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        plain(optimizer, model, x, y)
    assert optimizer.decomposition_failures == optimizer.diagnostics().decomposition_failures == 2
    for p, kept in before.items():
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in kept.items())
    plain(optimizer, model, x, y)
    assert optimizer.decomposition_failures == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_bias_in_another_group_than_its_weight_is_diagonal() -> None:
    model, (x, y) = network(), data()
    biases = [model[0].bias, model[2].bias]
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": biases, "weight_decay": 0.0}]
    optimizer = KFACVON.make(groups)
    optimizer.watch(model)
    for _ in range(3):
        plain(optimizer, model, x, y)
    assert [layer.parameters for layer in optimizer._structure.layers()] == [(model[0].weight,), (model[2].weight,)]
    assert all(optimizer.state[bias]["hessian"].shape == bias.shape for bias in biases)


@entries
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_part_of_a_layer_that_is_frozen_stays_and_the_other_goes_on(entry: Any, frozen: str) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    for _ in range(3):
        plain(optimizer, model, x, y)
    fixed = getattr(model[0], frozen)
    other = model[0].bias if frozen == "weight" else model[0].weight
    fixed.requires_grad_(False)
    before, moving = fixed.detach().clone(), other.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        assert torch.equal(fixed, before)
        optimizer.step()
    assert torch.equal(fixed, before)
    assert not torch.equal(other, moving)


class Branches(nn.Module):
    """Two layers with one bias, of which a pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(6, 3, dtype=torch.float64) for _ in range(2))
        self.second.bias = self.first.bias

    def forward(self, x: Tensor, which: int) -> Tensor:
        return (self.first, self.second)[which](x)


@entries
def test_a_bias_that_draws_show_with_two_weights_is_in_the_first_layer_and_then_refused(entry: Any) -> None:
    model, (x, y) = Branches(), data()
    optimizer = entry.make(model.parameters())
    optimizer.watch(model)

    def step() -> None:
        for which in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x, which), y).backward()
        optimizer.step()

    step()
    assert [layer.parameters for layer in optimizer._structure.layers()] == [(model.first.weight, model.first.bias)]
    assert optimizer.state[model.second.weight]["hessian"].shape == (3, 6)
    with pytest.raises(RuntimeError, match="call the module in the same way in every step"):
        step()


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            {"curvature": "exact"},
            "curvature='exact', but for KFACVON it must be 'ggn', 'sampled' or 'empirical': use 'ggn'.",
        ),
        ({"kfac_approx": "mean"}, "kfac_approx='mean', but it must be 'expand' or 'reduce': use 'expand'."),
        (
            {"eigenvalue_correction": True, "factored_damping": True},
            "factored_damping=True with eigenvalue_correction=True, whose s is no product of factors",
        ),
    ],
)
def test_an_unknown_choice_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlearn.KFACVON(network(), 0.1, 50, **setting)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_other_fisher_matrices_train(fisher: str) -> None:
    model, (x, y) = network(), data()
    optimizer = KFACVON.make(model, curvature=fisher)

    @torch.no_grad()
    def loss() -> float:
        return float(loss_of(model, x, y))

    before = loss()
    for _ in range(30):
        plain(optimizer, model, x, y)
    assert loss() < before


def test_factors_are_averaged_over_micro_batches_by_their_examples_and_over_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    monkeypatch.setattr(likelihood_module, "_signs", lambda like, generator: signs.expand(like.shape))

    def factors(how: str) -> list[Tensor]:
        model, x, y = problem("sequence")
        optimizer = vlearn.KFACVON(model, 0.0, CERTAIN, beta2=0.0, num_data=50)
        if how == "draws":
            for part in (slice(0, 4), slice(3, 7)):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[part]), y[part]).backward()
        else:
            for part in (slice(0, 5), slice(5, 7)) if how == "micro-batches" else (slice(0, 7),):
                F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        names = ("in_factor", "out_factor")
        return [optimizer.state[layer.weight][name] for layer in optimizer._structure.layers() for name in names]

    whole = factors("whole")
    for a, b in zip(factors("micro-batches"), whole, strict=True):
        torch.testing.assert_close(a, b)
    columns = torch.cat([problem("sequence")[1][3], torch.ones(6, 1)], 1)  # of the example that both draws have
    torch.testing.assert_close(factors("draws")[0] * 8, whole[0] * 7 + columns.mT @ columns / 6)


def test_inputs_of_many_positions_are_taken_on_the_steps_that_use_them() -> None:
    """A value stands for the steps since the last, so that a steady mean moves as if it had been taken in each."""
    model, x, y = problem("sequence")
    beta2, taken = 0.8, []
    optimizer = vlearn.KFACVON(model, 0.0, CERTAIN, beta2=beta2, update_every=3, num_data=50)
    for t in range(7):
        inputs = x * (1 + t)
        plain_step(optimizer, lambda inputs=inputs: F.cross_entropy(model(inputs), y))
        taken.append(optimizer.state[model.inner.weight]["in_factor"].clone())  # type: ignore[union-attr, index]
    columns = [torch.cat([x * (1 + t), torch.ones(*x.shape[:2], 1)], 2).flatten(0, 1) for t in (0, 3, 6)]
    values = [rows.mT @ rows / len(rows) for rows in columns]
    shares = torch.tensor([beta2**6, beta2**3 * (1 - beta2**3) / (1 - beta2), (1 - beta2**3) / (1 - beta2)]).double()
    mean = sum(share * value for share, value in zip(shares / shares.sum(), values, strict=True))
    assert torch.equal(taken[0], taken[2]) and not torch.equal(taken[2], taken[3])
    torch.testing.assert_close(taken[6], mean)


def test_a_layer_whose_factors_would_be_too_large_is_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlearn.per_example.kronecker_factors.LARGEST", 6)  # the first layer has six inputs and a bias
    model, (x, y) = network(), data()
    optimizer = KFACVON.make(model)
    plain(optimizer, model, x, y)
    assert [layer.parameters for layer in optimizer._structure.layers()] == [(model[2].weight, model[2].bias)]


@entries
def test_a_failed_first_decomposition_leaves_the_start(entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)

    def fail(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("it did not converge")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        plain(optimizer, model, x, y)
        plain(optimizer, model, x, y)
    assert optimizer.decomposition_failures == 2
    assert bool((optimizer.state[model[0].weight]["hessian"] == 0.5).all())
    plain(optimizer, model, x, y)
    assert not bool((optimizer.state[model[0].weight]["hessian"] == 0.5).any())
