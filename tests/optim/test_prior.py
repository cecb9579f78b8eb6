"""A posterior as the prior of the next run: exact where Bayes' rule is, and kept with the state."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import (
    FAMILY,
    FULLVON,
    IVON,
    KFACVON,
    VADAMW,
    VOGN,
    VON,
    VON_PRICE,
    Entry,
    data,
    equal,
    family,
    loss_of,
    network,
    plain,
    states,
    weights,
)
from tests.optim.test_resume import through_disk
from tests.optim.test_von import CERTAIN, plain_step
from tests.oracles.per_example import relative_error
from tests.posterior.structures import posterior_of
from vlearn.posterior import Diagonal

NOISE = 0.4  # standard deviation of the targets in linear regression


def normal(f: Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(f, NOISE)


def random_prior(model: nn.Module, num_data: float = 30.0, seed: int = 7) -> Diagonal:
    """Means beside the model's weights, precisions between num_data/10 and num_data."""
    generator = torch.Generator().manual_seed(seed)
    named = {name: p.detach() for name, p in model.named_parameters()}

    def like(p: Tensor) -> Tensor:
        return torch.rand(p.shape, generator=generator, dtype=p.dtype)

    mean = {name: p + 0.3 * (like(p) - 0.5) for name, p in named.items()}
    return Diagonal.from_precision(
        mean, {name: num_data * (0.1 + 0.9 * like(p)) for name, p in named.items()}, num_data
    )


def steps(entry: Entry, model: nn.Module, count: int = 4, **kwargs: Any) -> Any:
    optimizer = entry.make(model, generator=torch.Generator().manual_seed(3), **kwargs)
    x, y = data()
    torch.manual_seed(5)
    for _ in range(count):
        plain(optimizer, model, x, y)
    return optimizer


def closed_form(x: Tensor, y: Tensor, precision: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, precision) of the posterior of linear regression with the prior N(mean, precision⁻¹)."""
    total = precision + x.mT @ x / NOISE**2
    return torch.linalg.solve(total, precision @ mean + x.mT @ y / NOISE**2), total


def regression(rows: int = 40, orthogonal: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Two tasks of different sizes; of each, orthogonal columns on request."""
    generator = torch.Generator().manual_seed(2)
    tasks = []
    for count in (rows // 2 + 4, rows // 2 - 4):
        x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        x = x @ torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.7, 0.4], [0.0, 0.0, 1.3]], dtype=torch.float64)
        x = torch.linalg.qr(x).Q * torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64) if orthogonal else x
        tasks.append((x, torch.randn(count, generator=generator, dtype=torch.float64)))
    return tasks


def learned(make: Any, task: tuple[Tensor, Tensor], count: int = 200, **kwargs: Any) -> Any:
    """The posterior of linear regression by an optimizer whose draws are the mean."""
    x, y = task
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = make(model, 0.5, CERTAIN, beta1=0.0, beta2=0.8, likelihood=normal, num_data=len(x), **kwargs)
    for _ in range(count):
        plain_step(optimizer, lambda: -normal(model(x).squeeze(1)).log_prob(y).mean())
    return optimizer.posterior().clone()


# -- exact where Bayes' rule is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["von", "iblr"])
def test_one_task_after_the_other_is_both_at_once_in_linear_regression(rule: str) -> None:
    (x1, y1), (x2, y2) = regression()
    delta = 2.0
    first = learned(vlearn.FullVON, (x1, y1), rule=rule, weight_decay=delta / len(x1))
    second = learned(vlearn.FullVON, (x2, y2), rule=rule, prior=first)
    unit = torch.eye(3, dtype=torch.float64)
    mean, precision = closed_form(torch.cat([x1, x2]), torch.cat([y1, y2]), delta * unit, torch.zeros(3).double())
    assert relative_error(second.mean["weight"].squeeze(0), mean) < 1e-10
    assert relative_error(second.block(("weight",)).precision(), precision) < 1e-10
    assert second.num_data == len(x2)


def test_of_independent_weights_a_diagonal_posterior_is_enough() -> None:
    (x1, y1), (x2, y2) = regression(orthogonal=True)
    delta = 2.0
    first = learned(vlearn.VON, (x1, y1), weight_decay=delta / len(x1))
    second = learned(vlearn.VON, (x2, y2), prior=first)
    unit = torch.eye(3, dtype=torch.float64)
    mean, precision = closed_form(torch.cat([x1, x2]), torch.cat([y1, y2]), delta * unit, torch.zeros(3).double())
    assert relative_error(second.mean["weight"].squeeze(0), mean) < 1e-10
    assert relative_error(second.precision["weight"].squeeze(0), precision.diagonal()) < 1e-10


@pytest.mark.parametrize("name", ["VON", "KFACVON", "FullVON"])
def test_the_mean_rests_where_loss_and_prior_balance(name: str) -> None:
    """Also of a Kronecker posterior, which knows the prior's precision up to the diagonal in its basis."""
    _, (x, y) = regression()
    center = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    entries = torch.tensor([[30.0, 400.0, 5.0]], dtype=torch.float64)
    prior = Diagonal.from_precision({"weight": center}, {"weight": entries}, 50.0)
    posterior = learned(getattr(vlearn, name), (x, y), prior=prior)
    mean, precision = closed_form(x, y, entries[0].diag(), center[0])
    assert relative_error(posterior.mean["weight"].squeeze(0), mean) < 1e-9
    if name == "FullVON":
        assert relative_error(posterior.block(("weight",)).precision(), precision) < 1e-10
    elif name == "VON":
        assert relative_error(posterior.precision["weight"].squeeze(0), precision.diagonal()) < 1e-10
    else:
        block = posterior.block(("weight",))
        expected = (block.in_basis.mT @ precision @ block.in_basis).diagonal()
        assert relative_error(block.variances.squeeze(0), 1 / expected) < 1e-10


def test_vadamw_rests_where_loss_and_prior_balance() -> None:
    _, (x, y) = regression()
    model = nn.Linear(3, 1, bias=False).double()
    prior = Diagonal.from_precision(
        {"weight": torch.tensor([[0.5, -1.0, 2.0]]).double()}, {"weight": torch.tensor([[3.0, 1e5, 50.0]]).double()}, 50
    )
    optimizer = vlearn.VAdamW(model, 1e-2, num_data=len(x), ess=CERTAIN, prior=prior, weight_decay=0.3)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 3e-2 * 0.992**step
        plain_step(optimizer, lambda: -normal(model(x).squeeze(1)).log_prob(y).mean())
    mean, _ = closed_form(x, y, prior.precision["weight"][0].diag(), prior.mean["weight"][0])
    assert relative_error(model.weight.detach().squeeze(0), mean) < 1e-3


# -- the written formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("warmup", [None, 2.0])
def test_steps_of_ivon_and_von_equal_the_written_formula(foreach: bool, warmup: float | None) -> None:
    x, y = data()
    lr, ess, num_data, beta1, beta2, h0, wd = 0.1, 40.0, 60.0, 0.8, 0.9, 0.5, 0.05
    settings = {"num_data": num_data, "beta1": beta1, "beta2": beta2, "hess_init": h0, "weight_decay": wd}
    settings["foreach"] = foreach
    for name in ("IVON", "VON"):
        if name == "VON" and warmup is not None:
            continue
        model = network()
        prior = random_prior(model)
        own = {"curvature": "price"} if name == "VON" else {"beta2_warmup": warmup}
        optimizer = getattr(vlearn, name)(model, lr, ess, prior=prior, **settings, **own)
        named = dict(model.named_parameters())
        m = {n: p.detach().clone() for n, p in named.items()}
        g = {n: torch.zeros_like(p) for n, p in m.items()}
        h = {n: torch.full_like(p, h0) for n, p in m.items()}
        w = {n: prior.precision[n] / num_data for n in m}
        for t in range(1, 5):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            draw = {n: p.detach().clone() for n, p in named.items()}
            gradient = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
            optimizer.step()
            rate = 1 - (beta2 if warmup is None else min(beta2, 1 - 1 / (t - 1 + warmup)))
            for n in m:
                estimate = ess * (h[n] + w[n]) * (draw[n] - m[n]) * gradient[n]
                g[n] = beta1 * g[n] + (1 - beta1) * gradient[n]
                if name == "VON":
                    h[n] = torch.maximum((1 - rate) * h[n] + rate * estimate, (h[n] - w[n]) / 2)
                else:
                    v = rate * (h[n] - estimate) / (h[n] + w[n])
                    bent = v.square() / 2
                    if warmup is not None:
                        bent = torch.where(v.abs() <= 1, bent, v.abs() - 0.5)
                    h[n] = h[n] - rate * (h[n] - estimate) + (h[n] + w[n]) * bent
                scale = lr if name == "VON" else lr * (h0 + wd)
                m[n] = m[n] - scale * (g[n] / (1 - beta1**t) + w[n] * (m[n] - prior.mean[n])) / (h[n] + w[n])
                assert relative_error(named[n].detach(), m[n]) < 1e-11
                assert relative_error(optimizer.state[named[n]]["hessian"], h[n]) < 1e-10


@family
def test_draws_have_the_precision_of_curvature_and_prior(entry: Entry) -> None:
    model = network()
    prior = random_prior(model)
    optimizer = entry.make(model, generator=torch.Generator().manual_seed(0), prior=prior)
    for _ in range(2):  # in which layers get their bases
        plain(optimizer, model, *data())
    posterior = optimizer.posterior()
    groups = dict.fromkeys(posterior.groups.values())
    total = torch.zeros(())
    count = 0
    for _ in range(300):
        with optimizer.sampled_params():
            moves = {name: p.detach().clone() for name, p in model.named_parameters()}
        for group in groups:
            moved = [(moves[name] - posterior.mean[name]).unsqueeze(0) for name in group]
            solved = posterior.block(group).solve(moved)
            total = total + sum((a * b).sum() for a, b in zip(moved, solved, strict=True))
            count += sum(part.numel() for part in moved)
    assert abs(float(total) / count - 1) < 5 * (2 / count) ** 0.5  # ess is num_data here


@family
def test_a_prior_of_one_width_around_zero_is_a_weight_decay(entry: Entry) -> None:
    if entry is VADAMW:
        pytest.skip("its weight decay is decoupled, and no prior")
    model, other = network(), network()
    named = {name: p.detach() for name, p in model.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in named.items()}
    prior = Diagonal.from_precision(zeros, {name: torch.full_like(p, 5.0) for name, p in named.items()}, 77)
    settings = {"num_data": 50, "weight_decay": 0.1, **({"rescale_lr": False} if entry is IVON else {})}
    optimizer = steps(entry, model, prior=prior, **settings)
    plainly = steps(entry, other, **settings)
    for left, right in zip(weights(model), weights(other), strict=True):
        assert relative_error(left, right) < 1e-9
    for key in ("momentum", "hessian"):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            if key in optimizer.state[p]:
                assert relative_error(optimizer.state[p][key], plainly.state[q][key]) < 1e-8
    assert optimizer.posterior().kl() == pytest.approx(plainly.posterior().kl(), rel=1e-9)
    assert optimizer.diagnostics().signal_to_noise == pytest.approx(plainly.diagnostics().signal_to_noise, rel=1e-9)


def test_the_prior_of_a_tempered_optimizer_is_tempered_as_its_weight_decay_is() -> None:
    model = network()
    prior = random_prior(model)
    optimizer = steps(VOGN, model, prior=prior, tempering=0.3, augmentation=2.0)
    posterior = optimizer.posterior()
    for name, p in model.named_parameters():
        hessian = optimizer.state[p]["hessian"]
        expected = 50 * hessian + prior.precision[name] * 0.3 / 2
        assert relative_error(posterior.precision[name], expected) < 1e-12
        assert relative_error(1 / posterior.draw_variance[name], expected * 2 / 0.3) < 1e-12


def test_the_precision_of_a_prior_is_that_of_its_posterior_and_not_of_its_draws() -> None:
    model = network()
    first = steps(IVON, model, ess=20, num_data=50).posterior().clone()
    second = IVON.make(network(), prior=first).posterior()
    assert relative_error(torch.as_tensor(second.prior_precision["0.weight"]), first.precision["0.weight"]) < 1e-12


# -- structures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["layers", "separate", "mixed", "correlated_eigenvalues"])
def test_a_dense_posterior_takes_all_of_a_prior_and_a_diagonal_one_its_diagonal(structure: str) -> None:
    model = network()
    prior, covariance = posterior_of(dict(model.named_parameters()), structure)
    precision = covariance.inverse()
    dense = FULLVON.make(model, prior=prior, hess_init=0.3, num_data=50)
    posterior = dense.posterior()
    expected = precision + 0.3 * 50 * torch.eye(len(precision), dtype=torch.float64)
    assert relative_error(posterior.block(posterior.names).precision(), expected) < 1e-9
    assert posterior.prior is not None
    assert relative_error(posterior.prior.block(posterior.names).precision(), precision) < 1e-9
    dense.unwatch()
    diagonal = VON_PRICE.make(model, prior=prior, hess_init=0.3).posterior()
    flat = torch.cat([diagonal.precision[name].reshape(-1) for name in diagonal.names])
    assert relative_error(flat, expected.diagonal()) < 1e-9


def test_dense_priors_of_groups_are_those_of_their_parameters() -> None:
    model = network()
    prior, covariance = posterior_of(dict(model.named_parameters()), "layers")
    first, second = ([(n, p) for n, p in model.named_parameters() if n.startswith(layer)] for layer in ("0", "2"))
    whole = FULLVON.make(model.named_parameters(), prior=prior)
    apart = FULLVON.make([{"params": second, "prior": prior}, {"params": first, "prior": prior}])
    added = FULLVON.make([{"params": first, "prior": prior}])
    added.add_param_group({"params": second, "prior": prior})
    for optimizer in (whole, apart, added):
        optimizer.watch(model)
        named = optimizer.posterior()
        order = [list(dict(model.named_parameters())).index(name) for name in named.names]
        sizes = [p.numel() for p in model.parameters()]
        starts = [sum(sizes[:i]) for i in order]
        at = torch.cat([torch.arange(start, start + sizes[i]) for start, i in zip(starts, order, strict=True)])
        assert relative_error(named.prior.block(named.names).precision(), covariance.inverse()[at][:, at]) < 1e-9
        optimizer.unwatch()


def test_the_divergence_from_a_dense_prior_is_that_of_two_normals(tmp_path: Any) -> None:
    model = network()
    prior, covariance = posterior_of(dict(model.named_parameters()), "mixed")
    posterior = steps(FULLVON, model, prior=prior).posterior()

    def flat(tensors: Any) -> Tensor:
        return torch.cat([tensors[name].reshape(-1) for name in posterior.names])

    own = torch.distributions.MultivariateNormal(
        flat(posterior.mean), precision_matrix=posterior.block(posterior.names).precision()
    )
    other = torch.distributions.MultivariateNormal(flat(prior.mean), covariance)
    expected = float(torch.distributions.kl_divergence(own, other))
    assert posterior.kl() == pytest.approx(expected, rel=1e-8)
    posterior.save(tmp_path / "posterior.pt")
    assert vlearn.posterior.load(tmp_path / "posterior.pt").kl() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("entry", [IVON, VOGN, KFACVON], ids=str)
def test_a_posterior_with_a_prior_comes_back_from_disk(entry: Entry, tmp_path: Any) -> None:
    model = network()
    posterior = steps(entry, model, prior=random_prior(model)).posterior()
    posterior.save(tmp_path / "posterior.pt")
    loaded = vlearn.posterior.load(tmp_path / "posterior.pt")
    assert loaded.kl() == pytest.approx(posterior.kl(), rel=1e-12)
    for name in posterior.names:
        assert relative_error(loaded.variance[name], posterior.variance[name]) < 1e-12


def test_near_exact_solves_count_a_dense_prior() -> None:
    """In linear regression Σ is the inverse of all curvature and prior, so refining changes nothing."""
    (x1, y1), (x2, y2) = regression()
    first = learned(vlearn.FullVON, (x1, y1), weight_decay=0.1)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = vlearn.FullVON(
        model, 0.5, CERTAIN, beta1=0.0, beta2=0.8, likelihood=normal, num_data=len(x2), prior=first
    )
    for _ in range(300):
        plain_step(optimizer, lambda: -normal(model(x2).squeeze(1)).log_prob(y2).mean())
    loader = [(x2, y2.unsqueeze(1))]

    def negative_log(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum(1) / (2 * NOISE**2)

    groups = {i: [i] for i in range(5)}
    arguments = (model, optimizer.posterior(), loader, groups, negative_log)
    direct = vlearn.leave_group_out(*arguments)
    refined = vlearn.leave_group_out(*arguments, refine=20, tolerance=1e-12)
    assert relative_error(refined.left_out_loss, direct.left_out_loss) < 1e-9


# -- which parameters ----------------------------------------------------------------------------------------------


@family
def test_parameters_that_the_prior_lacks_keep_their_weight_decay(entry: Entry) -> None:
    """Transfer: one layer has been learned before, the other is new."""
    model = network()
    prior = random_prior(model[:1])
    old, new = ([(n, p) for n, p in model.named_parameters() if n.startswith(layer)] for layer in ("0", "2"))
    optimizer = entry.make([{"params": old, "prior": prior}, {"params": new}], weight_decay=0.2)
    optimizer.watch(model)
    for _ in range(3):
        plain(optimizer, model, *data())
    posterior = optimizer.posterior()
    known = posterior.prior_precision
    assert relative_error(torch.as_tensor(known["0.weight"]), prior.precision["0.weight"]) < 1e-12
    assert float(known["2.weight"]) == pytest.approx(25.0 if entry is VADAMW else 0.2 * 50)
    assert set(posterior.prior_mean) == {"0.weight", "0.bias"}


def test_a_group_with_priors_for_some_steps_as_two_groups_do() -> None:
    """The parameters without prior are drawn first."""
    prior = random_prior(network()[:1])
    results = []
    for split in (False, True):
        model = network()
        new, old = ([(n, p) for n, p in model.named_parameters() if n.startswith(layer)] for layer in ("2", "0"))
        groups = [{"params": new}, {"params": old, "prior": prior}]
        optimizer = vlearn.IVON(groups if split else [{"params": old + new, "prior": prior}], 0.1, 50)
        optimizer.watch(model)
        torch.manual_seed(0)
        for _ in range(3):
            plain(optimizer, model, *data())
        results.append(weights(model))
    assert equal(*results)


def test_the_same_tensors_need_no_names() -> None:
    model = network()
    prior = steps(IVON, model).posterior()
    optimizer = vlearn.IVON(model.parameters(), 0.1, 50, prior=prior)  # the view is fresh, and copied
    state = optimizer.state[model.get_parameter("0.weight")]
    assert equal([state["prior_precision"]], [prior.precision["0.weight"]])
    assert equal([state["prior_mean"]], [model.get_parameter("0.weight").detach()])


def test_a_prior_of_a_wrapped_model_is_that_of_the_model() -> None:
    model = network()
    prior = random_prior(nn.DataParallel(model))
    assert (
        vlearn.IVON(network(), 0.1, 50, prior=prior).posterior().prior_mean.keys()
        == dict(model.named_parameters()).keys()
    )


def test_a_frozen_parameter_has_its_prior_once_it_moves() -> None:
    model = network()
    prior = random_prior(model)
    model[0].requires_grad_(False)
    optimizer = vlearn.IVON(model, 0.1, 50, prior=prior)
    plain(optimizer, model, *data())
    assert optimizer.posterior().names == ("2.weight", "2.bias")
    model[0].requires_grad_(True)
    plain(optimizer, model, *data())
    assert (
        relative_error(torch.as_tensor(optimizer.posterior().prior_precision["0.weight"]), prior.precision["0.weight"])
        < 1e-12
    )


def test_a_prior_of_its_own_comes_before_the_optimizers() -> None:
    model = network()
    common, own = random_prior(model), random_prior(model[:1], seed=9)
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if n[0] == "0"], "prior": own},
        {"params": [(n, p) for n, p in model.named_parameters() if n[0] == "2"]},
    ]
    optimizer = vlearn.IVON(groups, 0.1, 50, prior=common)
    assert equal([optimizer.state[model.get_parameter("0.weight")]["prior_mean"]], [own.mean["0.weight"]])
    assert equal([optimizer.state[model.get_parameter("2.weight")]["prior_mean"]], [common.mean["2.weight"]])
    assert "prior" not in optimizer.defaults and not any("prior" in group for group in optimizer.param_groups)


# -- state ---------------------------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resumed_run_needs_no_prior_again(entry: Entry, taken: int, dtype: torch.dtype) -> None:
    x, y = data(dtype=dtype)
    model = network(dtype=dtype)
    prior = random_prior(network())
    optimizer = entry.make(model, prior=prior)
    torch.manual_seed(9)
    for _ in range(taken):
        plain(optimizer, model, x, y)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    random_state = torch.get_rng_state()
    for _ in range(3):
        plain(optimizer, model, x, y)
    resumed = network(seed=3, dtype=dtype)
    again = entry.make(resumed)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    torch.set_rng_state(random_state)
    for _ in range(3):
        plain(again, resumed, x, y)
    assert equal(weights(resumed) + states(again), weights(model) + states(optimizer))
    assert again.state[resumed.get_parameter("0.weight")]["prior_precision"].dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_a_prior_is_a_copy() -> None:
    model = network()
    prior = random_prior(model)
    optimizer = vlearn.IVON(model, 0.1, 50, prior=prior)
    before = states(optimizer)
    prior.mean["0.weight"].zero_()
    assert equal(states(optimizer), before)


def test_complex_parameters_have_a_prior_as_pairs_of_reals() -> None:
    p = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    optimizer = vlearn.IVON([("p", p)], 0.1, 50)
    prior = optimizer.posterior().clone()
    q = nn.Parameter(p.detach().clone())
    again = vlearn.IVON([("p", q)], 0.1, 50, prior=prior)
    with again.sampled_params(train=True):
        (q.abs() ** 2).sum().backward()
    again.step()
    assert relative_error(torch.as_tensor(again.posterior().prior_precision["p"]), prior.precision["p"]) < 1e-12


@pytest.mark.slow
def test_compiled_optimizers_step_as_the_others_where_there_is_a_prior() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(600, 600, bias=False)
        optimizer = vlearn.IVON(model, 0.1, 50, compiled=compiled, prior=random_prior(model))
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 600)).square().mean().backward()
            optimizer.step()
        results.append(weights(model))
    assert equal(*results)


@family
def test_rows_and_sweeps_read_the_precision_with_the_prior(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = steps(entry, model, prior=random_prior(model))
    loss_of(model, x, y).backward()
    optimizer.step()
    rows, posterior = optimizer.sensitivities(), optimizer.posterior()
    covariance = posterior.covariance(dict(model.named_parameters()))
    table = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, progress=False)
    model.zero_grad()
    for i in range(3):
        with optimizer.at_mean():
            gradients = torch.autograd.grad(
                F.cross_entropy(model.eval()(x[i : i + 1]), y[i : i + 1]), [*model.parameters()]
            )
        model.train()
        named = dict(zip(model.parameters(), (g.unsqueeze(0) for g in gradients), strict=True))
        assert float(table.self_influence[i]) == pytest.approx(float(covariance.quadratic(named)), rel=1e-8)
    assert bool((rows.self_influence > 0).all())


# -- refused -------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=re.escape(message))


@family
def test_what_is_no_prior_for_the_model_is_refused_and_nothing_is_left_behind(entry: Entry) -> None:
    model = network()
    prior = random_prior(model)
    with refused(TypeError, "prior=3.0, but it must be a posterior of vlearn's: use optimizer.posterior()"):
        entry.make(model, prior=3.0)
    with refused(ValueError, "the prior has '0.weight', which is none of the parameters here: pass its model"):
        entry.make(model.parameters(), prior=Diagonal.from_precision(dict(prior.mean), dict(prior.precision), 30))
    with refused(ValueError, "the prior has '0.weight', which is none of the parameters here"):
        entry.make(model[2], prior=prior)
    other = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with refused(
        ValueError, "the prior's '0.weight' has shape (5, 6), but that of the model has (4, 6): pass the prior"
    ):
        entry.make(other, prior=prior)
    optimizer = entry.make(model)
    stale = optimizer.posterior()
    plain(optimizer, model, *data())
    with refused(RuntimeError, "keep one with .clone()."):
        entry.make(network(), prior=stale)
    groups = len(optimizer.param_groups)
    with refused(RuntimeError, "keep one with .clone()."):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.zeros(2).double()))], "prior": stale})
    assert len(optimizer.param_groups) == groups
    adam = torch.optim.SGD(model.parameters(), 0.1)
    arbitrary = vlearn.posterior.from_optimizer(adam, model, num_data=30)
    with refused(RuntimeError, "this posterior gives no prior: "):
        entry.make(network(), prior=arbitrary)
    hessian = {name: torch.full_like(m, torch.nan) for name, m in prior.mean.items()}
    broken = Diagonal(dict(prior.mean), hessian, dict.fromkeys(hessian, 0.1), dict.fromkeys(hessian, 30.0), 30)
    with refused(ValueError, "the prior of '0.weight' is not finite, or its precision not positive: fit it anew."):
        entry.make(network(), prior=broken)
    group = {"params": [("new", nn.Parameter(torch.zeros(2, dtype=torch.float64)))], "prior": prior}
    before = len(optimizer.param_groups)
    with refused(ValueError, "which is none of the parameters here"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == before and "prior" in group
    plain(optimizer, model, *data())


def test_a_dense_prior_of_a_frozen_parameter_is_refused_by_a_dense_posterior() -> None:
    model = network()
    prior, _ = posterior_of(dict(model.named_parameters()), "layers")
    model.get_parameter("0.bias").requires_grad_(False)
    with refused(ValueError, "the prior has correlations of '0.bias', which is frozen or in another parameter"):
        FULLVON.make(model, prior=prior)
    FULLVON.make(model, prior=Diagonal.nearest(prior))


def test_factored_damping_is_refused_beside_a_prior() -> None:
    model = network()
    with refused(ValueError, "factored_damping=True with a prior, but it damps by one weight decay"):
        KFACVON.make(model, prior=random_prior(model), factored_damping=True)


def test_an_optimizer_that_does_not_say_that_it_uses_priors_refuses_them() -> None:
    class Own(vlearn.VON):
        _takes_prior = False

    model = network()
    with refused(TypeError, "Own takes no prior but that of its weight_decay: use IVON or VON."):
        Own(model, 0.1, 50, prior=random_prior(model))


def test_a_fit_does_not_take_such_a_prior_for_a_weight_decay() -> None:
    model, (x, y) = network(), data()
    optimizer = steps(VON, model, prior=random_prior(model))
    with refused(
        ValueError, "VON has learned '0.weight' from a prior that is no weight decay: take optimizer.posterior()"
    ):
        vlearn.posterior.fit(model, [(x, y)], F.cross_entropy, prior_precision=optimizer)


def test_every_optimizer_of_the_family_takes_a_prior() -> None:
    assert all(type(entry.make(network()))._takes_prior for entry in FAMILY)
