"""The Hessian as a running average at first, `beta2_warmup`, against the written formulas."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vlearn
from tests.optim.networks import problem
from tests.optim.table import (
    FAMILY,
    FULLVON,
    FULLVON_PRICE,
    Entry,
    data,
    equal,
    loss_of,
    made,
    network,
    plain,
    states,
    weights,
)
from tests.optim.test_full_von import covariance_of, flat, hessian_of
from tests.optim.test_von import CERTAIN, plain_step
from tests.oracles.per_example import relative_error
from vlearn.optim.parameters.options import beta2_of_step, hess_init_weight, log_kept_weight
from vlearn.optim.updates.dense import dense_hessian_step
from vlearn.optim.updates.riemannian import move_bounded

warm = pytest.mark.parametrize("entry", [e for e in FAMILY if e.name != "VAdamW"], ids=str)
SHORT = {"beta2": 0.8, "beta2_warmup": 2.0}  # a mean until step 3, counted from 0; 1 - 1/(3 + 2) is 0.8


def momentum(t: int, beta2: float = 0.8, t0: float = 2.0) -> float:
    """The published rule."""
    return min(beta2, 1 - 1 / (t + t0))


@pytest.mark.parametrize("t0", [1, 1.5, 2, 3.7, 30, 200])
@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.9, 0.95, 0.99, 1.0])
def test_remaining_weights_are_products_of_the_momenta(beta2: float, t0: float) -> None:
    group = {"beta2": beta2, "beta2_warmup": t0}
    factors = [momentum(t, beta2, t0) for t in range(150)]
    for steps in range(151):
        assert hess_init_weight(group, steps) == pytest.approx(math.prod(factors[:steps]), rel=1e-11, abs=0)
        for last in (0, 1, 2, 7, steps):
            if last <= steps:
                kept = log_kept_weight(group, steps, torch.tensor(float(last), dtype=torch.float64)).exp()
                assert float(kept) == pytest.approx(math.prod(factors[steps - last : steps]), rel=1e-11, abs=0)
    assert [beta2_of_step(group, t + 1) for t in range(150)] == factors


def test_in_the_warm_up_hess_init_weighs_as_much_as_so_many_estimates() -> None:
    group = {"beta2": 0.99999, "beta2_warmup": 30.0}
    assert hess_init_weight(group, 0) == 1
    assert hess_init_weight(group, 71) == pytest.approx(29 / 100, rel=1e-12)
    assert hess_init_weight({**group, "beta2_warmup": 1.0}, 1) == 0
    assert hess_init_weight({**group, "beta2": 1.0}, 10**6) == pytest.approx(29 / (10**6 + 29), rel=1e-12)


def test_diagnostics_say_what_is_left_of_hess_init_where_most_is() -> None:
    weights_ = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    groups = [{"params": weights_[:1], "beta2_warmup": 5.0}, {"params": weights_[1:], "beta2_warmup": 2.0}]
    optimizer = vlearn.IVON(groups, 0.1, 20, beta2=0.8)
    for step in range(7):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            sum(p.square().sum() for p in weights_[: 2 if step % 3 else 3]).backward()  # type: ignore[union-attr]
        optimizer.step()
    products = [math.prod(momentum(t, 0.8, t0) for t in range(n)) for t0, n in ((5.0, 7), (2.0, 7), (2.0, 3))]
    assert optimizer.diagnostics().hess_init_weight == pytest.approx(max(products), rel=1e-12)


def test_a_parameter_without_gradient_in_some_steps_takes_the_rate_of_its_own_step() -> None:
    """Parameters of one block, at rates that their momenta's corrections do not tell apart."""
    runs = []
    for apart in (False, True):
        generator = torch.Generator().manual_seed(1)
        parameters = [nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64)) for _ in range(2)]
        kwargs = {**SHORT, "debias": False, "hess_init": 0.5, "foreach": not apart}
        optimizer = vlearn.IVON([{"params": [p]} for p in parameters] if apart else parameters, 0.1, 20, **kwargs)  # type: ignore[arg-type]
        for step in range(6):
            optimizer.train()
            used = parameters if step % 2 else parameters[:1]
            optimizer.zero_grad()
            with torch.no_grad():
                for p, mean in zip(parameters, optimizer.posterior().mean.values(), strict=True):
                    p.copy_(mean + 0.2 * torch.randn(3, generator=generator, dtype=torch.float64))
            sum(p.sin().sum() + p.square().sum() for p in used).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.eval()
        assert [int(optimizer.state[p]["step"]) for p in parameters] == [6, 3]
        runs.append([t for p in parameters for t in (p.detach(), optimizer.state[p]["hessian"])])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_ivons_steps_equal_the_written_formula() -> None:
    """Scalars in plain Python; the estimates reach all three parts of Huber's function."""
    p = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = vlearn.IVON(
        [p], lr=0.02, ess=20, hess_init=0.5, beta1=0.8, weight_decay=0.01, generator=torch.Generator(), **SHORT
    )
    m, h, g, parts = 0.7, 0.5, 0.0, set()
    for t in range(40):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            theta = float(p.detach())
            (p - 2).pow(4).sum().backward()
        optimizer.step()
        gradient = 4 * (theta - 2) ** 3
        precision, rate = h + 0.01, 1 - momentum(t)
        x = rate * (h - 20 * precision * (theta - m) * gradient) / precision
        parts.add(0 if abs(x) <= 1 else math.copysign(1, x))
        h += precision * ((x * x / 2 if abs(x) <= 1 else abs(x) - 0.5) - x)
        g = 0.8 * g + 0.2 * gradient
        m -= 0.02 * 0.51 * (g / (1 - 0.8 ** (t + 1)) + 0.01 * m) / (h + 0.01)
        assert float(optimizer.state[p]["hessian"]) == pytest.approx(h, rel=1e-10)
        assert float(p.detach()) == pytest.approx(m, rel=1e-10)
    assert parts == {-1, 0, 1}


def test_where_estimates_come_near_the_hessian_ivons_bound_changes_nothing() -> None:
    """|x| ≤ 1: the published rule with the rates of the mean."""
    found = []
    for bounded in (True, False):
        p = nn.Parameter(torch.linspace(0.5, 2, 5, dtype=torch.float64))
        settings_ = {"hess_init": 1.0, "curvature": "empirical", "weight_decay": 0.1}
        optimizer = vlearn.IVON([p], 0.0, 1, beta2_warmup=4.0 if bounded else None, **settings_)  # type: ignore[arg-type]
        for t in range(12):
            optimizer.param_groups[0]["beta2"] = 0.99 if bounded else momentum(t, 0.99, 4.0)
            optimizer.train()
            p.grad = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
            optimizer.step()
        found.append(optimizer.state[p]["hessian"])
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)


class Means:
    """Minibatches of a linear model with squared error, whose Gauss-Newton matrix is exact, and weighted means.

    Attributes:
        matrices: 2XᵀX/n of each minibatch.
    """

    def __init__(self, count: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1, bias=False).double()
        self.batches = [(torch.randn(20, 3).double() * (1 + t), torch.randn(20, 1).double()) for t in range(count)]
        self.matrices = [2 * x.mT @ x / 20 for x, _ in self.batches]

    def train(self, optimizer: Any) -> None:
        for x, y in self.batches:
            plain_step(optimizer, lambda x=x, y=y: F.mse_loss(self.model(x), y))

    def mean(self, start: Tensor, values: list[Tensor], t0: float) -> Tensor:
        """(t₀ - 1 times the start and the values)/(t₀ - 1 + their number)."""
        return ((t0 - 1) * start + sum(values)) / (t0 - 1 + len(values))


@pytest.mark.parametrize("t0", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["VON", "FullVON", "KFACVON", "EK-FAC"])
def test_the_hessian_is_the_arithmetic_mean_of_its_start_and_all_estimates(kind: str, t0: float) -> None:
    task, unit = Means(6), torch.eye(3).double()
    own: dict[str, Any] = {"EK-FAC": {"eigenvalue_correction": True}, "KFACVON": {}}.get(kind, {})
    own |= {"update_every": 1} if kind in ("KFACVON", "EK-FAC") else {}
    optimizer = getattr(vlearn, kind if kind.endswith("VON") else "KFACVON")(
        task.model, 0.0, CERTAIN, hess_init=0.5, beta2=0.99, beta2_warmup=t0, weight_decay=0.1, num_data=20,
        likelihood="gaussian", **own,
    )  # fmt: skip
    task.train(optimizer)
    exact = task.mean(0.5 * unit, task.matrices, t0)
    if kind == "VON":
        torch.testing.assert_close(optimizer.state[task.model.weight]["hessian"][0], exact.diagonal())
    elif kind == "FullVON":
        torch.testing.assert_close(hessian_of(optimizer), exact)
    elif kind == "KFACVON":
        precision = covariance_of(optimizer, task.model).inverse()
        assert relative_error(precision, 20 * (exact + 0.1 * unit)) < 1e-10
    else:  # s is carried from basis to basis; its trace, which no basis changes, is the mean of the traces
        total = optimizer.state[task.model.weight]["hessian"].sum()
        torch.testing.assert_close(total, exact.trace())


def test_vogns_hessian_is_the_arithmetic_mean_of_squares() -> None:
    task = Means(6)
    optimizer = vlearn.VOGN(task.model, 0.0, CERTAIN, hess_init=0.5, beta2=1.0, beta2_warmup=3.0, num_data=20)
    task.train(optimizer)
    theta = flat(task.model)
    squares = [(2 * (x @ theta - y[:, 0]).unsqueeze(1) * x).square().mean(0) for x, y in task.batches]
    exact = task.mean(torch.full((3,), 0.5).double(), squares, 3.0)
    torch.testing.assert_close(optimizer.state[task.model.weight]["hessian"][0], exact)


def test_after_the_warm_up_the_average_is_exponential() -> None:
    task = Means(9)
    settings_ = {"hess_init": 0.5, "likelihood": "gaussian", "num_data": 20, **SHORT}
    optimizer = vlearn.VON(task.model, 0.0, CERTAIN, **settings_)  # type: ignore[arg-type]
    task.train(optimizer)
    h = torch.full((3,), 0.5).double()
    for t, matrix in enumerate(task.matrices):
        h = momentum(t) * h + (1 - momentum(t)) * matrix.diagonal()
    torch.testing.assert_close(optimizer.state[task.model.weight]["hessian"][0], h)
    mean = task.mean(torch.full((3,), 0.5).double(), [m.diagonal() for m in task.matrices[:4]], 2.0)
    for matrix in task.matrices[4:]:
        mean = 0.8 * mean + 0.2 * matrix.diagonal()
    torch.testing.assert_close(h, mean)  # which is what the documentation says of it


def test_kronecker_factors_are_means_whose_values_stand_for_the_steps_since_the_last() -> None:
    """As without warm-up in `test_kfac_von`: the weight of the last is what the momenta of those steps leave."""
    model, x, y = problem("sequence")
    taken, steps = [], 7
    optimizer = vlearn.KFACVON(model, 0.0, CERTAIN, update_every=3, num_data=50, **SHORT)  # type: ignore[arg-type]
    for t in range(steps):
        inputs = x * (1 + t)
        plain_step(optimizer, lambda inputs=inputs: F.cross_entropy(model(inputs), y))
        taken.append(optimizer.state[model.inner.weight]["in_factor"].clone())  # type: ignore[union-attr, index]
    columns = [torch.cat([x * (1 + t), torch.ones(*x.shape[:2], 1)], 2).flatten(0, 1) for t in (0, 3, 6)]
    values = [rows.mT @ rows / len(rows) for rows in columns]
    kept = [math.prod(momentum(t) for t in range(a, b)) for a, b in ((0, 1), (1, 4), (4, 7))]
    shares = torch.tensor([(1 - kept[0]) * kept[1] * kept[2], (1 - kept[1]) * kept[2], 1 - kept[2]]).double()
    mean = sum(share * value for share, value in zip(shares / shares.sum(), values, strict=True))
    torch.testing.assert_close(taken[6], mean)
    learned = optimizer.state[model.inner.weight]["learned"]  # type: ignore[union-attr, index]
    assert float(learned) == pytest.approx(1 - math.prod(momentum(t) for t in range(steps)))


def test_a_layer_of_which_each_part_had_other_steps_than_the_other_keeps_finite_factors() -> None:
    model, (x, y) = network(), data()
    optimizer = vlearn.KFACVON(model, 0.01, 50, update_every=4, **SHORT)  # type: ignore[arg-type]
    for step in range(9):
        for p in model.parameters():
            p.requires_grad_(p.dim() == 1 + step % 2)
        if step == 0:
            model.requires_grad_(True)
        plain(optimizer, model, x, y)
    assert all(bool(value.isfinite().all()) for value in states(optimizer))


def test_prices_estimate_is_averaged_by_von_and_at_most_halves_the_precision() -> None:
    p = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = vlearn.VON(
        [p], 0.02, 20, curvature="price", hess_init=0.5, weight_decay=0.01, generator=torch.Generator(), **SHORT
    )
    h, m = 0.5, 0.7
    for t in range(20):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            theta = float(p.detach())
            (p - 2).pow(4).sum().backward()
        optimizer.step()
        estimate = 20 * (h + 0.01) * (theta - m) * 4 * (theta - 2) ** 3
        h = max(momentum(t) * h + (1 - momentum(t)) * estimate, (h + 0.01) / 2 - 0.01)
        m = float(p.detach())
        assert float(optimizer.state[p]["hessian"]) == pytest.approx(h, rel=1e-10)


def test_dense_rows_take_the_rate_of_their_own_group() -> None:
    task = Means(5)
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=True)).double()
    groups = [{"params": model[0].parameters(), "beta2_warmup": 3.0}, {"params": model[1].parameters()}]
    optimizer = FULLVON.make(groups, lr=0.0, ess=CERTAIN, num_data=20, likelihood="gaussian", beta2=0.9)
    optimizer.watch(model)
    h = 0.5 * torch.eye(5).double()
    a, b = flat(model)[:3], float(model[1].weight.detach())
    for t, (x, y) in enumerate(task.batches):
        plain_step(optimizer, lambda x=x, y=y: F.mse_loss(model(x), y))
        rows = torch.cat([b * x, (x @ a).unsqueeze(1), torch.ones(20, 1)], 1)  # ∂f/∂(a, b, c)
        rate = 1 - torch.tensor([momentum(t, 0.9, 3.0)] * 3 + [0.9] * 2).double()
        scale, share = (1 - rate).sqrt(), rate.sqrt()
        h = torch.outer(scale, scale) * h + torch.outer(share, share) * (rows.mT @ rows) / 10
        torch.testing.assert_close(hessian_of(optimizer), h, rtol=1e-5, atol=1e-5)  # draws move θ by 1e-6


@warm
def test_steps_without_an_estimate_keep_the_hessian_and_count(entry: Entry) -> None:
    if not entry.captures:
        pytest.skip("every step has an estimate")
    x, y = data()
    model = network()
    optimizer = made(entry, "plain", model, beta2=1.0, beta2_warmup=2.0)
    optimizer.watch(model, every=2)
    moved = []
    for _ in range(4):
        before = [h.clone() for h in optimizer._structure.diagonal_hessian().values()]
        plain(optimizer, model, x, y)
        now = list(optimizer._structure.diagonal_hessian().values())
        moved.append(not before or not equal(before, now))
    assert moved == [True, False, True, False]
    assert optimizer.diagnostics().hess_init_weight == pytest.approx(1 / 5)


finite = {"allow_nan": False, "allow_infinity": False}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=300, deadline=None)
@given(
    share=st.floats(1e-6, 1),
    scale=st.floats(-6, 6),
    estimate=st.floats(-1e8, 1e8, **finite),
    rate=st.floats(1e-6, 1),
)
def test_ivons_precision_at_most_halves_and_grows_at_most_twice_as_much_as_an_average(
    dtype: torch.dtype, share: float, scale: float, estimate: float, rate: float
) -> None:
    """Estimates in multiples of P = h + wd, of which wd is the rest beside a share of h."""
    precision = 10.0**scale
    wd = (1 - share) * precision
    h = torch.tensor([precision - wd], dtype=dtype)
    before = float(h) + wd
    target = torch.tensor([estimate * precision], dtype=dtype)
    moved = h.clone()
    move_bounded([moved], [h - target], [h + wd], rate)
    after, eps = float(moved) + wd, torch.finfo(dtype).eps
    assert after >= before / 2 * (1 - 16 * eps) > 0
    rise = rate * (float(target) - float(h))
    assert after <= before + max(2 * rise, 0) + 16 * eps * (before + abs(rise))
    x = -rise / before
    expected = before * (1 - x + (x * x / 2 if abs(x) <= 1 else abs(x) - 0.5))
    assert after == pytest.approx(expected, rel=64 * eps)


def test_a_burst_of_noise_in_the_first_steps_does_not_blow_the_hessian_up() -> None:
    """Estimates of 10,000 in the place of 1: by the square h would rise to more than a million."""
    found = {}
    for t0 in (10.0, None):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = vlearn.IVON(
            [p], 0.0, 1, hess_init=1.0, curvature="empirical", weight_decay=0.0, beta2=0.9999, beta2_warmup=t0
        )
        for t in range(3000):
            if t0 is None:
                optimizer.param_groups[0]["beta2"] = momentum(t, 0.9999, 10.0)
            optimizer.train()
            p.grad = torch.full_like(p, 100.0 if t == 2 else 1.0)
            optimizer.step()
            if t == 2:
                found[t0] = float(optimizer.state[p]["hessian"])
        assert float(optimizer.state[p]["hessian"]) < (20 if t0 else math.inf)
    assert found[10.0] < 2 * 10_000 / 12 + 2
    assert found[None] > 300_000


def test_the_dense_rule_is_bounded_in_every_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.eye(4).double()
    at, rate, decay = torch.arange(4), torch.full((4,), 0.5).double(), 0.1 * unit

    def symmetric(scale: float) -> Tensor:
        a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        return scale * (a + a.mT)

    for scale in (0.01, 1.0, 1e3, 1e6):
        root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        hessian = root @ root.mT
        estimate = symmetric(scale)
        s, g = hessian + decay, 0.5 * (hessian - estimate)
        moved = dense_hessian_step("iblr", hessian, estimate, at, rate, decay, True) + decay
        lower = torch.linalg.cholesky(s)
        inverse = lower.inverse()
        x, basis = torch.linalg.eigh(inverse @ g @ inverse.mT)
        factors = torch.stack([1 - v + (v * v / 2 if abs(v) <= 1 else abs(v) - 0.5) for v in x])
        exact = lower @ basis @ factors.diag() @ basis.mT @ lower.mT
        assert relative_error(moved, exact) < 1e-9
        assert float(factors.min()) >= 0.5 and float(torch.linalg.eigvalsh(moved).min()) > 0
    small = hessian - 0.1 * s
    published = dense_hessian_step("iblr", hessian, small, at, rate, decay)
    torch.testing.assert_close(dense_hessian_step("iblr", hessian, small, at, rate, decay, True), published)


def test_on_one_parameter_the_bounded_dense_rule_is_ivons() -> None:
    found = []
    for kind in ("ivon", "full"):
        p = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        common = {"hess_init": 0.5, "weight_decay": 0.1, "generator": torch.Generator().manual_seed(3), **SHORT}
        if kind == "ivon":
            optimizer = vlearn.IVON([p], 0.0, 20, **common)  # type: ignore[arg-type]
        else:
            optimizer = FULLVON_PRICE.make([p], lr=0.0, ess=20, **common)
        for _ in range(12):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (3 * p.square().sum() + p.sin().sum()).backward()
            optimizer.step()
        found.append(optimizer.state[p]["hessian"].reshape(1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def bounded_ivon(h: Tensor, estimate: Tensor, rate: float, decay: float) -> Tensor:
    """h after a step of IVON's bounded rule."""
    x = rate * (h - estimate) / (h + decay)
    phi = torch.where(x.abs() <= 1, x.square() / 2, x.abs() - 0.5)
    return (h + decay) * (1 - x + phi) - decay


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ivon_follows_its_rule_and_a_burst_of_noise_in_the_first_steps_is_forgotten(compiled: bool) -> None:
    t0, decay, ess = 20, 1e-4, 1e8
    p = torch.nn.Parameter(torch.zeros(2**15 if compiled else 64, dtype=torch.float64))
    optimizer = vlearn.IVON(
        [p], lr=0.0, ess=ess, hess_init=1e-3, weight_decay=decay, beta2=0.9999, beta2_warmup=t0, compiled=compiled
    )
    generator = torch.Generator().manual_seed(0)
    expected = torch.full_like(p.detach(), 1e-3)
    for step in range(200):
        size = 1e3 if step == 1 else 1e-3  # a gradient a million times as large as the others
        with optimizer.sampled_params(train=True):
            p.grad = size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            estimate = ess * (expected + decay) * p.detach() * p.grad
        optimizer.step()
        expected = bounded_ivon(expected, estimate, max(1e-4, 1 / (step + t0)), decay)
        torch.testing.assert_close(optimizer.state[p]["hessian"], expected, rtol=1e-6, atol=1e-10)
    assert (expected + decay > 0).all()
    unbounded = 0.5 * ess * 1e3**2 / (1 + t0) ** 2  # what the published correction alone adds in that step
    assert expected.max() < unbounded / 1e4


@warm
def test_a_run_resumed_within_the_warmup_or_after_it_is_the_uninterrupted_one(entry: Entry) -> None:
    settings_: dict[str, Any] = {"beta2": 0.9, "beta2_warmup": 6, "weight_decay": 0.1}
    model, again = network(), network()
    optimizer, other = entry.make(model, **settings_), entry.make(again, beta2=0.5, weight_decay=0.1)
    for step in range(12):
        if step in (3, 9):  # 1 - 1/(t + 6) passes .9 at t = 4
            saved = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], saved)
            saved.seek(0)
            own, state = torch.load(saved, weights_only=True)
            again.load_state_dict(own)
            other.load_state_dict(state)
        torch.manual_seed(step)
        plain(optimizer, model, *data(step))
        if step >= 3:
            torch.manual_seed(step)
            plain(other, again, *data(step))
            assert equal(weights(model), weights(again)) and equal(states(optimizer), states(other))


@warm
def test_groups_may_differ_and_states_from_before_the_setting_load(entry: Entry) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "beta2_warmup": 5}, {"params": model[2].parameters()}]
    optimizer = entry.make(groups, num_data=50)
    assert [group["beta2_warmup"] for group in optimizer.param_groups] == [5, None]
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["beta2_warmup"]
    fresh = entry.make(network().parameters())
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    fresh = entry.make(groups, num_data=50)
    fresh.load_state_dict(old)
    assert [group["beta2_warmup"] for group in fresh.param_groups] == [None, None]
    optimizer.watch(model)
    loss_of(model, *data()).backward()
    optimizer.step()
