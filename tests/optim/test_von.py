"""VON's Hessian is the Gauss-Newton diagonal of the actual loss, without bias, or Price's estimate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.networks import NETWORKS, at_draw, cross_entropy, error_of_sensitivities, hessian_of, problem
from tests.optim.table import data, equal, network, plain, states, weights
from tests.oracles.per_example import PerExample, relative_error
from vlearn.losses import likelihood as likelihood_module
from vlearn.losses.likelihood import probe
from vlearn.losses.residual_checks import LossMakeup

networks = pytest.mark.parametrize("name", NETWORKS)
SIGNS = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1.0, 1.0), repeat=3)]
CERTAIN = 1e30  # an ess whose draws are the mean


def mean_over_signs(monkeypatch: pytest.MonkeyPatch, estimate: Callable[[], Tensor]) -> Tensor:
    """The exact average of an estimate over the signs of a probe, each row of three outputs with the same ones."""
    found = []
    for signs in SIGNS:
        monkeypatch.setattr(likelihood_module, "_signs", lambda like, generator, s=signs: s.expand(like.shape))
        found.append(estimate())
    return torch.stack(found).mean(0)


def diagonal(truth: PerExample) -> Tensor:
    return truth.ggn().diagonal() / len(truth.loss)


def optimizer_of(model: nn.Module, **kwargs: Any) -> vlearn.VON:
    """Its Hessian is the last estimate, at a mean that stays."""
    return vlearn.VON(model, **{"lr": 0.0, "ess": CERTAIN, "beta2": 0.0, "num_data": 50, **kwargs})


@networks
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_probe_has_the_gauss_newton_diagonal_as_its_mean(
    name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = problem(name)
    optimizer = optimizer_of(model)
    optimizer.watch(model, loss_reduction=reduction)

    def estimate() -> Tensor:
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y, reduction=reduction))
        return hessian_of(optimizer, model).clone()

    truth = diagonal(at_draw(model, x, cross_entropy(y)))
    assert relative_error(mean_over_signs(monkeypatch, estimate), truth) < 1e-12


def plain_step(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


LIKELIHOODS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "gaussian": ("gaussian", lambda f, y: (f - y).square().mean(1)),
    "bernoulli": (
        "bernoulli",
        lambda f, y: F.binary_cross_entropy_with_logits(f, (y > 1).double(), reduction="none").mean(1),
    ),
    "normal": (
        lambda f: torch.distributions.Normal(f, 0.3),
        lambda f, y: -torch.distributions.Normal(f, 0.3).log_prob(y).mean(1),
    ),
    "poisson": (
        lambda f: torch.distributions.Poisson(f.exp(), validate_args=False),
        lambda f, y: -torch.distributions.Poisson(f.exp(), validate_args=False).log_prob(y).mean(1),
    ),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_other_likelihoods_have_their_own_curvature(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = problem("perceptron")
    y = torch.randint(0, 4, (7, 3)).double()
    given, losses = LIKELIHOODS[likelihood]
    optimizer = optimizer_of(model, likelihood=given)

    def estimate() -> Tensor:
        plain_step(optimizer, lambda: losses(model(x), y).mean())
        return hessian_of(optimizer, model).clone()

    truth = diagonal(at_draw(model, x, lambda f: losses(f, y)))
    assert relative_error(mean_over_signs(monkeypatch, estimate), truth) < 1e-10


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli", "callable"])
def test_sampled_labels_have_the_same_mean(likelihood: str) -> None:
    torch.manual_seed(0)
    output = torch.randn(2, 3, dtype=torch.float64)
    given = (lambda f: torch.distributions.Categorical(logits=f)) if likelihood == "callable" else likelihood
    p = output.softmax(1)
    residual = p - F.one_hot(torch.tensor([0, 2]), 3)
    if likelihood != "categorical":
        residual = 2 * (output - 1) if likelihood == "gaussian" else output.sigmoid() - 1
    makeup = LossMakeup(lambda rows: 1.0, value=lambda: float((output - 1).square().sum()))
    arguments = (given, "sampled", output, residual, makeup, None)
    u = torch.stack([probe(*arguments) for _ in range(4000)])
    truth = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    if likelihood == "gaussian":
        truth = 2 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    elif likelihood == "bernoulli":
        truth = torch.diag_embed(output.sigmoid() * (-output).sigmoid())
    products = u.unsqueeze(3) * u.unsqueeze(2)
    assert bool(((products.mean(0) - truth).abs() <= 5 * products.std(0) / 4000**0.5 + 1e-12).all())


MISMATCHES = {
    "regression": (
        {},
        lambda f, y: F.mse_loss(f, y.double()),
        "is not that of softmax cross-entropy along any axis, .* 'gaussian'",
    ),
    "many labels": (
        {},
        lambda f, y: F.binary_cross_entropy_with_logits(f, y.double()),
        "use likelihood='bernoulli'",
    ),
    "one logit": ({}, lambda f, y: F.binary_cross_entropy_with_logits(f[:, :1], y[:, :1].double()), "likelihood="),
    "classes told as numbers": (
        {"likelihood": "gaussian"},
        lambda f, y: F.cross_entropy(f, y[:, 0]),
        "is not that of squared error, .* use likelihood='categorical'",
    ),
    "classes told as labels": (
        {"likelihood": "bernoulli"},
        lambda f, y: F.cross_entropy(f, y[:, 0]),
        "is not that of binary cross-entropy with logits, .* use likelihood='categorical'",
    ),
}


@pytest.mark.parametrize("make", [vlearn.VON, vlearn.KFACVON, vlearn.FullVON])
@pytest.mark.parametrize(("given", "loss", "match"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_loss_that_is_not_of_the_likelihood_is_refused(
    make: Any, given: dict[str, Any], loss: Callable[[Tensor, Tensor], Tensor], match: str
) -> None:
    model, x, _ = problem("perceptron")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model, lr=0.1, ess=7, **given)
    loss(model(x), torch.randint(0, 2, (7, 3), generator=torch.Generator().manual_seed(1))).backward()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("sizes", [(6,), (5, 6), (3,)])
def test_the_axis_of_the_classes_is_found(sizes: tuple[int, ...], soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """[N, C, ...], as of a segmentation, also where there are as many positions as classes."""
    torch.manual_seed(0)
    output = torch.randn(4, 3, *sizes, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, *sizes, dtype=torch.float64).softmax(1) if soft else torch.randint(0, 3, (4, *sizes))
    loss = F.cross_entropy(output, y, label_smoothing=0.1)
    (residual,) = torch.autograd.grad(loss, output)
    last = output.detach().movedim(1, -1)
    makeup = LossMakeup(lambda rows: 4 / rows, 4.0, loss.item)

    def squares(output: Tensor, residual: Tensor) -> Tensor:
        return mean_over_signs(
            monkeypatch, lambda: probe("categorical", "ggn", output, residual, makeup, None).square()
        )

    expected = squares(last, residual.movedim(1, -1))
    assert relative_error(squares(output.detach(), residual), expected.movedim(-1, 1)) < 1e-12


def test_positions_share_the_own_loss_and_ignored_ones_have_no_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a language model: mean over the positions of all examples that have a target."""
    torch.manual_seed(0)
    output = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 3, (4, 5))
    y[0, 2:] = y[3, 1] = -100
    model = nn.Identity()
    (residual,) = torch.autograd.grad(F.cross_entropy(model(output).flatten(0, 1), y.flatten()), output)

    asked = []

    def weight_of(rows: int) -> float:
        asked.append(rows)
        return 4 / rows

    def estimate() -> Tensor:
        u = probe("categorical", "ggn", output, residual, LossMakeup(weight_of, 4.0), None)
        return u.unsqueeze(3) * u.unsqueeze(2)

    p = output.detach().softmax(2)
    truth = (torch.diag_embed(p) - p.unsqueeze(3) * p.unsqueeze(2)) * (y >= 0)[..., None, None] * 4 / 16
    assert relative_error(mean_over_signs(monkeypatch, estimate), truth) < 1e-12
    assert set(asked) == {16, 20}  # the rows with a target, and all: the check of the scale asks for both


def test_micro_batches_count_by_their_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = problem("perceptron")
    optimizer = optimizer_of(model)

    def estimate() -> Tensor:
        optimizer.zero_grad()
        for part in (slice(0, 5), slice(5, 7)):
            (F.cross_entropy(model(x[part]), y[part]) * 0.5).backward()  # of whatever scale
        optimizer.step()
        return hessian_of(optimizer, model).clone()

    truth = diagonal(at_draw(model, x, cross_entropy(y)))
    assert relative_error(mean_over_signs(monkeypatch, estimate), truth) < 1e-12


def test_the_users_gradients_and_captures_are_those_without_a_probe() -> None:
    x, y = data()
    results = []
    for curvature in ("ggn", "price"):
        model = network()
        optimizer = vlearn.VON(model, 0.1, 50, curvature=curvature, generator=torch.Generator().manual_seed(1))
        F.cross_entropy(model(x), y).backward()
        results.append([p.grad for p in model.parameters()] + [optimizer.sensitivities().self_influence])
    assert equal(*results)


def test_gradients_of_a_kept_graph_are_probed_once() -> None:
    model, (x, y) = network(), data()
    optimizer = optimizer_of(model)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(before, torch.get_rng_state())
    optimizer.step()


def test_weights_move_by_the_new_hessian() -> None:
    """With one output and signs alone, the probe of a squared error is exact."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    lr, wd, beta1, beta2, damping = 0.3, 0.1, 0.8, 0.6, 0.05
    optimizer = vlearn.VON(
        model,
        lr,
        CERTAIN,
        hess_init=0.5,
        beta1=beta1,
        beta2=beta2,
        weight_decay=wd,
        likelihood="gaussian",
        damping=damping,
        num_data=20,
    )
    mean, h, g = model.weight.detach().clone(), torch.full((1, 3), 0.5).double(), torch.zeros(1, 3).double()
    for t in range(1, 5):
        plain_step(optimizer, lambda: F.mse_loss(model(x), y))
        h = beta2 * h + (1 - beta2) * 2 * x.square().mean(0)
        g = beta1 * g + (1 - beta1) * 2 * ((x @ mean.mT - y) * x).mean(0)
        mean = mean - lr * (g / (1 - beta1**t) + wd * mean) / (h + wd + damping)
        torch.testing.assert_close(model.weight.detach(), mean, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(optimizer.posterior().variance["weight"], 1 / (20 * (h + wd)), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("foreach", [True, False])
def test_prices_estimate_is_the_written_formula_and_at_most_halves_the_precision(foreach: bool) -> None:
    model, (x, y) = network(), data()
    ess, wd, beta2 = 50.0, 0.2, 0.3
    optimizer = vlearn.VON(
        model.parameters(),
        lr=0.1,
        ess=ess,
        hess_init=0.5,
        beta1=0.0,
        beta2=beta2,
        weight_decay=wd,
        curvature="price",
        foreach=foreach,
    )
    mean, h = torch.cat([p.detach().reshape(-1) for p in model.parameters()]), torch.full((48 + 5,), 0.5).double()
    for _ in range(5):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sample = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        optimizer.step()
        moved = beta2 * h + (1 - beta2) * ess * (h + wd) * (sample - mean) * gradient
        h = torch.maximum(moved, (h + wd) / 2 - wd)
        mean = mean - 0.1 * (gradient + wd * mean) / (h + wd)
        torch.testing.assert_close(hessian_of(optimizer, model), h, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            torch.cat([p.detach().reshape(-1) for p in model.parameters()]), mean, rtol=1e-9, atol=1e-11
        )


def test_on_bayesian_linear_regression_it_converges_to_the_mean_field_posterior() -> None:
    torch.manual_seed(0)
    n, delta = 30, 2.0
    x = torch.randn(n, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    y = torch.randn(n, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = vlearn.VON(
        model, 0.3, CERTAIN, beta1=0.0, beta2=0.9, weight_decay=delta / n, likelihood="gaussian", num_data=n
    )
    for _ in range(800):
        plain_step(optimizer, lambda: F.mse_loss(model(x), y))
    precision = 2 * x.mT @ x + delta * torch.eye(3, dtype=torch.float64)
    exact = torch.linalg.solve(precision, 2 * x.mT @ y).mT
    torch.testing.assert_close(model.weight.detach(), exact, rtol=1e-6, atol=1e-8)
    variance = optimizer.posterior().variance["weight"]
    torch.testing.assert_close(variance, 1 / precision.diagonal().unsqueeze(0), rtol=1e-8, atol=0.0)


def test_sensitivities_come_from_its_state() -> None:
    model, x, y = problem("perceptron")
    assert error_of_sensitivities(vlearn.VON(model, 0.1, 50), model, x, y) < 1e-10


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.inner(x)
        return {"hidden": hidden, "logits": self.outer(hidden.tanh())}


def test_one_of_several_outputs_is_selected() -> None:
    x, y = data()
    results = []
    for several in (True, False):
        torch.manual_seed(0)
        model = Two().double()
        plain_model = nn.Sequential(model.inner, nn.Tanh(), model.outer)
        optimizer = vlearn.VON(
            model if several else plain_model,
            0.1,
            50,
            output="logits" if several else None,
            generator=torch.Generator().manual_seed(1),
        )
        F.cross_entropy(model(x)["logits"] if several else plain_model(x), y).backward()
        optimizer.step()
        results.append(weights(model) + states(optimizer))
    assert equal(*results)
    model = Two().double()
    optimizer = vlearn.VON(model, 0.1, 50)
    F.cross_entropy(model(x)["logits"], y).backward()
    with pytest.raises(RuntimeError, match="the model gives 2 outputs that the loss depends on: select the one"):
        optimizer.step()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.first(hidden), self.second(hidden)


@pytest.mark.parametrize("optimizer_class", [vlearn.VON, vlearn.KFACVON, vlearn.FullVON])
def test_a_loss_of_another_head_is_refused_unless_the_curvature_is_of_the_whole(optimizer_class: Any) -> None:
    x, y = data()

    def step(weight: float, **settings: Any) -> None:
        torch.manual_seed(0)
        model = TwoHeads().double()
        optimizer = optimizer_class(model, 0.1, 50, **settings)
        first, second = model(x)
        (F.cross_entropy(first, y) + weight * F.cross_entropy(second, y)).backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"depends on second \(Linear\) by another way than the output"):
        step(1.0, output=0)
    step(0.0, output=0)
    step(1.0, curvature="empirical")


@pytest.mark.parametrize(
    "setting, message",
    [
        (
            {"likelihood": "poisson"},
            "likelihood='poisson', but it must be 'categorical', 'gaussian', 'bernoulli' or a callable",
        ),
        (
            {"curvature": "fisher"},
            "curvature='fisher', but for VON it must be 'ggn', 'sampled', 'empirical' or 'price': use 'ggn'.",
        ),
    ],
)
def test_an_unknown_curvature_is_refused(setting: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlearn.VON(network(), 0.1, 50, **setting)  # type: ignore[arg-type]


def test_a_graph_that_is_given_up_is_freed_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(), data()
    optimizer = optimizer_of(model)
    model(x)
    assert optimizer._watch is not None and optimizer._watch.trace is not None
    assert not optimizer._watch.trace.waits_for_backward
    plain(optimizer, model, x, y)
