"""The curvature that a likelihood stands for is that of the loss which is minimised, or the step is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import vlearn
from tests.oracles.per_example import relative_error
from vlearn.losses import likelihood as likelihood_module
from vlearn.losses.likelihood import probe
from vlearn.losses.residual_checks import LossMakeup

N, C, T = 5, 3, 4
WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
Loss = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, ignored: bool = False) -> Tensor:
    labels = torch.randint(0, C, shape, generator=torch.Generator().manual_seed(1))
    if ignored:
        labels.view(-1)[::3] = -100
    return labels


def yes_no(*shape: int) -> Tensor:
    return (randn(*shape, seed=1) > 0).double()


def residual_of(loss: Loss, output: Tensor) -> Tensor:
    leaf = output.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def makeup(output: Tensor, loss: Loss, reduction: str = "mean", loss_scale: float = 1.0) -> LossMakeup:
    """As a watch tells it."""
    count, value = len(output), float(loss(output.detach()))
    if reduction == "sum":
        return LossMakeup(lambda rows: 1.0, 1 / loss_scale, lambda: value)
    return LossMakeup(lambda rows: count / rows, count / loss_scale, lambda: value)


def second_moment(
    monkeypatch: pytest.MonkeyPatch, likelihood: Any, loss: Loss, output: Tensor, axis: int, told: LossMakeup
) -> Tensor:
    """E[u uᵀ] within each row along an axis ``[..., C, C]``, the average over all signs."""
    residual, found = residual_of(loss, output), []
    for signs in itertools.product((-1.0, 1.0), repeat=output.shape[axis]):
        row = torch.tensor(signs, dtype=output.dtype)
        monkeypatch.setattr(likelihood_module, "_signs", lambda like, generator, row=row: row.expand(like.shape))
        u = probe(likelihood, "ggn", output, residual, told, None).movedim(axis, -1)
        found.append(u.unsqueeze(-1) * u.unsqueeze(-2))
    return torch.stack(found).mean(0)


def curvature(loss: Loss, output: Tensor, axis: int) -> Tensor:
    """∂²L/∂f² within each row along an axis ``[..., C, C]``, by autograd through the whole loss."""
    whole = torch.autograd.functional.hessian(loss, output)  # type: ignore[arg-type]
    size = output.shape[axis]
    order = torch.arange(output.numel()).reshape(output.shape).movedim(axis, -1)
    flat = whole.reshape(output.numel(), output.numel())  # type: ignore[union-attr]
    rows = order.reshape(-1, size)
    blocks = torch.stack([flat[row][:, row] for row in rows])
    return blocks.reshape(*order.shape, size)


def masked(output: Tensor) -> Tensor:
    """As a model that knows which classes an example cannot have."""
    output[::2, 0] = -torch.inf
    return output


SOFT = randn(N, C, seed=3).softmax(1)
PART = classes(N, ignored=True)
ce = F.cross_entropy

# name: (output, axis of the classes, loss)
CATEGORICAL: dict[str, tuple[Tensor, int, Loss]] = {
    "hard labels": (randn(N, C), 1, lambda f: ce(f, classes(N))),
    "[N, C, T]": (randn(N, C, T), 1, lambda f: ce(f, classes(N, T))),
    "[N, T, C]": (randn(N, T, C), 2, lambda f: ce(f.mT, classes(N, T))),
    "[N, C, T] with as many classes as positions": (randn(N, C, C), 1, lambda f: ce(f, classes(N, C))),
    "[N, T, C] with as many classes as positions": (randn(N, C, C), 2, lambda f: ce(f.mT, classes(N, C))),
    "[N, C, H, W]": (randn(N, C, 2, 3), 1, lambda f: ce(f, classes(N, 2, 3))),
    "[N, A, C, T]": (randn(N, 2, C, T), 2, lambda f: ce(f.transpose(1, 2), classes(N, 2, T))),
    "ignored targets": (randn(N, C), 1, lambda f: ce(f, PART)),
    "ignored positions": (randn(N, T, C), 2, lambda f: ce(f.mT, classes(N, T, ignored=True))),
    "class weights": (randn(N, C), 1, lambda f: ce(f, classes(N), WEIGHTS)),
    "class weights and positions": (randn(N, C, T), 1, lambda f: ce(f, classes(N, T), WEIGHTS)),
    "class weights, some ignored": (randn(8, C), 1, lambda f: ce(f, classes(8, ignored=True), WEIGHTS)),
    "examples with weights": (
        randn(N, C),
        1,
        lambda f: (ce(f, classes(N), reduction="none") * torch.linspace(0.2, 3, N)).mean(),
    ),
    "label smoothing": (randn(N, C), 1, lambda f: ce(f, classes(N), label_smoothing=0.2)),
    "soft labels": (randn(N, C), 1, lambda f: ce(f, SOFT)),
    "distillation": (randn(N, C), 1, lambda f: F.kl_div(f.log_softmax(1), SOFT, reduction="batchmean")),
    "masked labels": (masked(randn(N, C)), 1, lambda f: ce(f, classes(N).clamp_min(1))),
    "confident and right": (9 * F.one_hot(classes(N), C).double(), 1, lambda f: ce(f, classes(N))),
    "confident and wrong": (9 * F.one_hot((classes(N) + 1) % C, C) + randn(N, C), 1, lambda f: ce(f, classes(N))),
}


MUST_BE_TOLD = ("examples with weights", "soft labels", "distillation")


@pytest.mark.parametrize("name", CATEGORICAL)
@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_the_curvature_of_classes_is_that_of_the_loss(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of the whole loss that nobody told makes no difference, but for weights of examples and soft labels."""
    output, axis, loss = CATEGORICAL[name]

    def scaled(f: Tensor) -> Tensor:
        return scale * loss(f)

    told = makeup(output, scaled, loss_scale=scale if name in MUST_BE_TOLD else 1.0)
    found = second_moment(monkeypatch, "categorical", scaled, output, axis, told)
    assert relative_error(found, len(output) * curvature(loss, output, axis)) < 1e-10


@pytest.mark.parametrize("name", ["hard labels", "ignored targets", "[N, C, T]"])
def test_a_sum_is_the_curvature_of_the_own_losses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output, axis, _ = CATEGORICAL[name]
    labels = {"hard labels": classes(N), "ignored targets": PART, "[N, C, T]": classes(N, T)}[name]

    def loss(f: Tensor) -> Tensor:
        return ce(f, labels, reduction="sum")

    found = second_moment(monkeypatch, "categorical", loss, output, axis, makeup(output, loss, "sum"))
    assert relative_error(found, curvature(loss, output, axis)) < 1e-10


LOG_LOSSES: dict[str, Loss] = {
    "hard labels": lambda f: F.nll_loss(f, classes(N)),
    "class weights": lambda f: F.nll_loss(f, classes(N), WEIGHTS),
    "soft labels": lambda f: F.kl_div(f, SOFT, reduction="batchmean"),
    "ignored targets": lambda f: F.nll_loss(f, PART),
}


@pytest.mark.parametrize("name", LOG_LOSSES)
def test_log_probabilities_have_the_curvature_of_the_scores_before_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Λ has no part along 1, so that going back through log_softmax leaves it as it is."""
    scores, loss = randn(N, C), LOG_LOSSES[name]
    output = scores.log_softmax(1)
    found = second_moment(monkeypatch, "categorical", loss, output, 1, makeup(output, loss))
    assert relative_error(found, N * curvature(lambda f: loss(f.log_softmax(1)), scores, 1)) < 1e-10


def focal(f: Tensor, detached: bool) -> Tensor:
    losses = ce(f, classes(len(f)), reduction="none")
    weight = (1 - (-losses).exp()).square()
    return ((weight.detach() if detached else weight) * losses).mean()


def test_a_focal_loss_with_constant_weights_has_their_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    output = randn(N, C)
    p = output.softmax(1)
    weight = (1 - p.gather(1, classes(N)[:, None])).square()
    expected = weight.unsqueeze(2) * (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))

    def loss(f: Tensor) -> Tensor:
        return focal(f, detached=True)

    found = second_moment(monkeypatch, "categorical", loss, output, 1, makeup(output, loss))
    assert relative_error(found, expected) < 1e-10

    def scaled(f: Tensor) -> Tensor:
        return 65536 * loss(f)

    with pytest.raises(ValueError, match=r"multiplied by a factor that was not told.*use watch\(model, loss_scale"):
        second_moment(monkeypatch, "categorical", scaled, output, 1, makeup(output, scaled))


def bce(target: Tensor, **arguments: Any) -> Loss:
    return lambda f: F.binary_cross_entropy_with_logits(f, target, **arguments)


BINARY: dict[str, tuple[Tensor, Loss]] = {
    "one logit": (randn(N, 1), bce(yes_no(N, 1))),
    "no axis": (randn(N), bce(yes_no(N))),
    "several labels": (randn(N, C), bce(yes_no(N, C))),
    "masks": (randn(N, 1, 3, 2), bce(yes_no(N, 1, 3, 2))),
    "pos_weight": (randn(9, 1), bce(yes_no(9, 1), pos_weight=torch.tensor(3.0).double())),
    "pos_weight of each label": (randn(9, C), bce(yes_no(9, C), pos_weight=WEIGHTS)),
    "weight of each label": (randn(9, C), bce(yes_no(9, C), weight=WEIGHTS)),
    "pos_weight of each channel": (randn(N, C, 3, 2), bce(yes_no(N, C, 3, 2), pos_weight=WEIGHTS.reshape(C, 1, 1))),
    "soft labels": (randn(N, C), bce(randn(N, C, seed=4).sigmoid())),
    "smoothed labels": (randn(N, C), bce(yes_no(N, C) * 0.9 + 0.05)),
    "soft labels of one logit": (randn(N, 1), bce(randn(N, 1, seed=4).sigmoid())),
    "examples with weights": (randn(N, 1), bce(yes_no(N, 1), weight=torch.linspace(0.1, 2, N)[:, None])),
    "examples with weights below 1": (randn(N, 1), bce(yes_no(N, 1), weight=torch.linspace(0.1, 0.9, N)[:, None])),
    "a weight for each entry": (randn(N, C), bce(yes_no(N, C), weight=randn(N, C, seed=4).sigmoid())),
    "two examples with weights": (randn(2, 1), bce(yes_no(2, 1), weight=torch.tensor([[0.2], [1.7]]).double())),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_curvature_of_yes_and_no_is_that_of_the_loss(name: str, scale: float) -> None:
    output, loss = BINARY[name]

    def scaled(f: Tensor) -> Tensor:
        return scale * loss(f)

    told = makeup(output, scaled, loss_scale=scale)
    u = probe("bernoulli", "ggn", output, residual_of(scaled, output), told, None)
    truth = torch.autograd.functional.hessian(loss, output).reshape(output.numel(), -1).diagonal()  # type: ignore
    assert relative_error(u.square().reshape(-1), len(output) * truth) < 1e-10


def test_sampled_answers_have_the_same_mean() -> None:
    output, loss = BINARY["several labels"]
    residual, generator = residual_of(loss, output), torch.Generator().manual_seed(0)
    told = makeup(output, loss)
    u = torch.stack([probe("bernoulli", "sampled", output, residual, told, generator) for _ in range(4000)])
    p, squares = output.sigmoid(), u.square()
    truth = N * p * (1 - p) / output.numel()
    assert bool(((squares.mean(0) - truth).abs() <= 5 * squares.std(0) / 4000**0.5).all())


def test_sampled_classes_lie_along_the_axis_of_the_loss() -> None:
    output, axis, loss = CATEGORICAL["[N, C, H, W]"]
    u = probe("categorical", "sampled", output, residual_of(loss, output), makeup(output, loss), None)
    assert bool((u.sum(axis).abs() < 1e-12).all()) and bool((u.lt(0).sum(axis) == 1).all())


REAL = randn(N, C, seed=6)


def p_of(f: Tensor, labels: Tensor) -> Tensor:
    return f.softmax(1).gather(1, labels[:, None])


def binary_focal(f: Tensor, target: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(f, target, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


# name: (likelihood, output, loss, what the message says)
REFUSED: dict[str, tuple[Any, Tensor, Loss, str]] = {
    "regression": ("categorical", randn(N, 1), lambda f: F.mse_loss(f, REAL[:, :1]), "shape (5, 1) is not that of"),
    "several regressions": ("categorical", randn(N, C), lambda f: F.mse_loss(f, REAL), "'gaussian' (squared error)"),
    "regression without axis": ("categorical", randn(N), lambda f: F.l1_loss(f, REAL[:, 0]), "choose likelihood="),
    "huber": ("categorical", randn(N, C), lambda f: F.huber_loss(f, REAL), "choose likelihood="),
    "poisson": ("categorical", randn(N, C), lambda f: F.poisson_nll_loss(f, REAL.abs()), "choose likelihood="),
    "one logit": ("categorical", randn(9, 1), bce(yes_no(9, 1)), "use likelihood='bernoulli'"),
    "several labels": ("categorical", randn(N, C), bce(yes_no(N, C)), "use likelihood='bernoulli'"),
    "soft yes": ("categorical", randn(N, C), bce(SOFT), "choose likelihood="),
    "a margin": ("categorical", 5 * randn(N, C), lambda f: F.multi_margin_loss(f, classes(N)), "choose likelihood="),
    "a temperature": ("categorical", 3 * randn(N, C), lambda f: ce(f / 3, classes(N)), "choose likelihood="),
    "probabilities": (
        "categorical",
        randn(N, C).softmax(1),
        lambda f: F.nll_loss(f.log(), classes(N)),
        "choose likelihood=",
    ),
    "classes as yes and no": ("bernoulli", randn(9, C), lambda f: ce(f, classes(9)), "use likelihood='categorical'"),
    "numbers as yes and no": ("bernoulli", randn(N, C), lambda f: F.mse_loss(f, 9 * REAL), "choose likelihood="),
    "probabilities as logits": (
        "bernoulli",
        randn(9, C).sigmoid(),
        lambda f: F.binary_cross_entropy(f, yes_no(9, C)),
        "binary cross-entropy with logits",
    ),
    **{
        f"a temperature of {t}": ("categorical", randn(N, C), lambda f, t=t: ce(f / t, classes(N)), "f / 2")
        for t in (0.5, 1.5, 2, 4)
    },
    **{
        f"two classes at {t}": ("categorical", randn(9, 2), lambda f, t=t: ce(f / t, yes_no(9).long()), "f / 2")
        for t in (0.5, 1.5, 2, 4)
    },
    "distillation at a temperature": (
        "categorical",
        randn(N, C),
        lambda f: 4 * F.kl_div((f / 2).log_softmax(1), SOFT, reduction="batchmean"),
        "choose likelihood=",
    ),
    "adjusted logits": ("categorical", randn(N, C), lambda f: ce(f + WEIGHTS.log(), classes(N)), "choose likelihood="),
    "an entropy bonus": (
        "categorical",
        randn(N, C),
        lambda f: ce(f, classes(N)) + 0.1 * (f.softmax(1) * f.log_softmax(1)).sum(1).mean(),
        "choose likelihood=",
    ),
    "generalised cross-entropy": (
        "categorical",
        randn(N, C),
        lambda f: ((1 - p_of(f, classes(N)) ** 0.7) / 0.7).mean(),
        "choose likelihood=",
    ),
    "1 - p_y": ("categorical", randn(N, C), lambda f: (1 - p_of(f, classes(N))).mean(), "choose likelihood="),
    "poly-1": (
        "categorical",
        randn(N, C),
        lambda f: ce(f, classes(N)) + (1 - p_of(f, classes(N))).mean(),
        "choose likelihood=",
    ),
    "focal": ("categorical", randn(N, C), lambda f: focal(f, detached=False), "choose likelihood="),
    "Brier": (
        "categorical",
        randn(N, C),
        lambda f: (f.softmax(1) - F.one_hot(classes(N), C)).square().sum(1).mean(),
        "choose likelihood=",
    ),
    "class weights and smoothing": (
        "categorical",
        randn(N, C),
        lambda f: ce(f, classes(N), WEIGHTS, label_smoothing=0.1),
        "weigh classes or examples without",
    ),
    "soft labels with weights": (
        "categorical",
        randn(N, C),
        lambda f: (ce(f, SOFT, reduction="none") * torch.linspace(0.2, 2, N)).mean(),
        "weigh classes or examples without",
    ),
    "soft labels and another term": (
        "categorical",
        randn(N, C),
        lambda f: ce(f, SOFT) + 0.1,
        "Categorical(logits=f) of soft labels in a loss with other terms",
    ),
    "twice the logits before they move": ("categorical", torch.zeros(N, C), lambda f: ce(2 * f, classes(N)), "f / 2"),
    "a temperature of yes and no": ("bernoulli", randn(9, 1), lambda f: bce(yes_no(9, 1))(f / 4), "choose"),
    "an adjusted logit": ("bernoulli", randn(9, 1), lambda f: bce(yes_no(9, 1))(f + 1.5), "choose"),
    "squared error of a sigmoid": ("bernoulli", randn(9, 1), lambda f: F.mse_loss(f.sigmoid(), yes_no(9, 1)), "choose"),
    "focal of yes and no": ("bernoulli", randn(9, 1), lambda f: binary_focal(f, yes_no(9, 1)), "choose"),
    "half the squared error": ("gaussian", randn(N, C), lambda f: F.mse_loss(f, REAL) / 2, "if it is 0.5 times that"),
    "summed squared errors": (
        "gaussian",
        randn(N, C),
        lambda f: (f - REAL).square().sum(1).mean(),
        "if it is 3 times that",
    ),
    "huber as squares": ("gaussian", randn(N, C), lambda f: F.huber_loss(f, REAL, delta=0.3), "taken at its word"),
    "log cosh": ("gaussian", randn(N, C), lambda f: (f - REAL).cosh().log().mean(), "taken at its word"),
    "classes as numbers": ("gaussian", randn(9, C), lambda f: ce(f, classes(9)), "use likelihood='categorical'"),
    "yes and no as numbers": ("gaussian", randn(9, 1), bce(yes_no(9, 1)), "use likelihood='bernoulli'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_likelihood_than_that_of_the_loss_is_refused(name: str) -> None:
    likelihood, output, loss, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        probe(likelihood, "ggn", output, residual_of(loss, output), makeup(output, loss), None)
    assert f"likelihood={likelihood!r}" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "output, target",
    [(randn(N, C), F.one_hot(classes(N), C).double()), (torch.zeros(9, 1).double(), 2 * yes_no(9, 1) - 1)],
    ids=["one-hot targets", "targets of ±1 at zeros"],
)
def test_squared_errors_of_labels_are_no_classes(output: Tensor, target: Tensor) -> None:
    def loss(f: Tensor) -> Tensor:
        return F.mse_loss(f, target)

    u = probe("gaussian", "ggn", output, residual_of(loss, output), makeup(output, loss), None)
    assert relative_error(u.square(), torch.full_like(output, 2 * len(output) / output.numel())) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [name for name in CATEGORICAL if "weights" not in name and name not in ("confident and wrong",)]
)
def test_lower_precision_is_enough(name: str, dtype: torch.dtype) -> None:
    output, axis, loss = CATEGORICAL[name]
    low = output.to(dtype)
    residual = residual_of(lambda f: loss(f.double()), low)
    assert residual.dtype == dtype
    told = makeup(low, lambda f: loss(f.double()))
    u = probe("categorical", "ggn", low, residual, told, torch.Generator().manual_seed(0))
    assert u.shape == output.shape and bool(u.isfinite().all())


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_gradient_that_is_zero_or_has_overflowed_says_nothing(likelihood: str, value: float) -> None:
    output = randn(N, C)
    u = probe(likelihood, "ggn", output, torch.full_like(output, value), makeup(output, torch.mean), None)
    assert bool(u.isfinite().all())
    assert likelihood == "gaussian" or value or not bool(u.any())


@pytest.mark.parametrize("kind", [vlearn.VON, vlearn.KFACVON, vlearn.FullVON])
def test_the_first_step_of_a_regression_by_default_is_refused_and_nothing_has_moved(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = kind(model, lr=0.01, ess=20)
    before = [p.detach().clone() for p in model.parameters()]
    F.mse_loss(model(torch.randn(20, 3)), torch.randn(20, 1)).backward()
    with pytest.raises(RuntimeError, match="likelihood='categorical', but .* choose likelihood=.*'gaussian'"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [10.0, 20.0, 100.0, 1000.0])
def test_what_rounding_leaves_of_the_gradient_of_fitted_data_is_not_looked_at(dtype: torch.dtype, size: float) -> None:
    """p_y - 1 is 0 or about 1e-7, and the other classes' p far below."""
    labels = torch.arange(64) % 4
    output = (size * F.one_hot(labels, 4) + randn(64, 4)).to(dtype)
    told = makeup(output, lambda f: ce(f, labels))
    u = probe("categorical", "ggn", output, residual_of(lambda f: ce(f, labels), output), told, None)
    assert bool(u.isfinite().all()) and float(u.abs().max()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.3, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_a_loss_that_is_computed_in_low_precision_is_known(rows: int, size: float, dtype: torch.dtype) -> None:
    """Nine labels of ten are the likeliest class; log_softmax rounds its sum to the type of the scores."""
    for seed, width in itertools.product(range(20), (2, 3, 10)):
        output = (size * randn(rows, width, seed=seed)).to(dtype)
        labels = output.argmax(-1).where(randn(rows, seed=seed) < 1.3, torch.arange(rows) % width)
        target = F.one_hot(labels, width).to(dtype)
        for likelihood, loss in (("categorical", lambda f, y=labels: ce(f, y)), ("bernoulli", bce(target))):
            u = probe(likelihood, "ggn", output, residual_of(loss, output), makeup(output, loss), None)
            assert bool(u.isfinite().all())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_small_minibatches_are_enough(rows: int) -> None:
    for seed in range(40):
        output, labels = 3 * randn(rows, 4, seed=seed), torch.arange(seed, seed + rows) % 4
        weight = torch.tensor([0.2, 1.0, 5.0, 1.0]).double()
        target = F.one_hot(labels, 4).double()
        for likelihood, loss in (
            ("categorical", lambda f, y=labels: ce(f, y, label_smoothing=0.1)),
            ("categorical", lambda f, y=labels, w=weight: ce(f, y, w)),
            ("bernoulli", lambda f, y=target, w=weight: bce(y, pos_weight=w)(f)),
            ("bernoulli", lambda f, y=target: bce(0.9 * y + 0.05)(f)),
        ):
            u = probe(likelihood, "ggn", output, residual_of(loss, output), makeup(output, loss), None)
            assert bool(u.isfinite().all())


MIXED = 0.7 * F.one_hot(classes(8), C).double() + 0.3 * F.one_hot(classes(8).flip(0), C)
MADE_OF_HARD_LABELS: dict[str, tuple[str, Tensor, Loss]] = {
    "smoothed": ("categorical", randn(8, C), lambda f: ce(f, classes(8), label_smoothing=0.1)),
    "mixed": ("categorical", randn(8, C), lambda f: ce(f, MIXED)),
    "mixed and smoothed": ("categorical", randn(8, C), lambda f: ce(f, MIXED, label_smoothing=0.1)),
    "two classes": ("categorical", randn(8, 2), lambda f: ce(f, yes_no(8).long(), label_smoothing=0.1)),
    "yes and no": ("bernoulli", randn(8, 1), bce(yes_no(8, 1) * 0.9 + 0.05)),
}


@pytest.mark.parametrize("name", MADE_OF_HARD_LABELS)
def test_smoothed_and_mixed_labels_are_known_beside_other_terms_of_the_loss(name: str) -> None:
    likelihood, output, loss = MADE_OF_HARD_LABELS[name]
    told = makeup(output, lambda f: loss(f) + 7)
    u = probe(likelihood, "ggn", output, residual_of(loss, output), told, None)
    alone = probe(likelihood, "ggn", output, residual_of(loss, output), makeup(output, loss), None)
    p = output.softmax(1) if likelihood == "categorical" else output.sigmoid()
    if p.shape[1] < 3:  # one column of the root: all signs have the same squares
        assert relative_error(u.square(), p * (1 - p)) < 1e-10
    assert u.shape == alone.shape


@pytest.mark.parametrize("kind", [vlearn.VON, vlearn.KFACVON, vlearn.FullVON])
@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [
        ("categorical", lambda f: ce(f / 2, classes(20))),
        ("categorical", lambda f: (1 - p_of(f, classes(20))).mean()),
        ("bernoulli", lambda f: bce(yes_no(20, C))(f / 4)),
        ("gaussian", lambda f: (f - randn(20, C, seed=6)).square().sum(1).mean()),
    ],
    ids=["temperature", "1 - p_y", "yes and no", "summed squares"],
)
def test_a_step_by_another_loss_is_refused_and_nothing_has_moved(kind: Any, likelihood: str, loss: Loss) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double()
    optimizer = kind(model, lr=0.01, ess=20, likelihood=likelihood)
    before = [p.detach().clone() for p in model.parameters()]
    loss(model(randn(20, 3))).backward()
    with pytest.raises(RuntimeError, match=f"likelihood={likelihood!r}"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [("categorical", lambda f: ce(f / 2, classes(20))), ("bernoulli", lambda f: bce(yes_no(20, C))(f / 2))],
    ids=["categorical", "bernoulli"],
)
def test_a_temperature_is_refused_as_soon_as_the_outputs_differ(likelihood: str, loss: Loss) -> None:
    """Of outputs that are all zero it has the gradient and the value of smoothed labels."""
    model = nn.Linear(3, C).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = vlearn.VON(model, lr=1.0, ess=1e30, likelihood=likelihood)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(randn(20, 3))).backward()
        optimizer.step()

    step()
    with pytest.raises(RuntimeError, match="choose likelihood="):
        step()


class Pixels(nn.Module):
    """Each position's own scores ``[N, C, H, W]``."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(2, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


STEPS: dict[str, tuple[Any, Callable[[], nn.Module], Tensor, Loss]] = {
    "segmentation": ("categorical", lambda: Pixels(C), randn(N, 2, 2, 3), lambda f: ce(f, classes(N, 2, 3))),
    "masks": ("bernoulli", lambda: Pixels(1), randn(N, 2, 2, 3), bce(yes_no(N, 1, 2, 3))),
    "labels": ("bernoulli", lambda: nn.Linear(4, C), randn(N, 4), bce(yes_no(N, C), pos_weight=WEIGHTS)),
    "soft labels": ("categorical", lambda: nn.Linear(4, C), randn(N, 4), lambda f: ce(f, SOFT)),
    "distillation": (
        "categorical",
        lambda: nn.Linear(4, C),
        randn(N, 4),
        lambda f: F.kl_div(f.log_softmax(1), SOFT, reduction="batchmean"),
    ),
    "weights of examples": (
        "bernoulli",
        lambda: nn.Linear(4, 1),
        randn(N, 4),
        bce(yes_no(N, 1), weight=torch.linspace(0.1, 0.9, N)[:, None]),
    ),
    "squares": ("gaussian", lambda: nn.Linear(4, C), randn(N, 4), lambda f: F.mse_loss(f, REAL)),
    "half the summed squares": (
        lambda f: torch.distributions.Independent(torch.distributions.Normal(f, 1.0), 1),
        lambda: nn.Linear(4, C),
        randn(N, 4),
        lambda f: (f - REAL).square().sum(1).mean() / 2,
    ),
    "a temperature": (
        lambda f: torch.distributions.Categorical(logits=f / 2),
        lambda: nn.Linear(4, C),
        randn(N, 4),
        lambda f: ce(f / 2, classes(N)),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_hessian_of_a_linear_model_is_that_of_the_loss(name: str) -> None:
    """Averaged over probes, against the second derivative of the whole loss with respect to the weights."""
    likelihood, make, x, loss = STEPS[name]
    torch.manual_seed(0)
    model = make().double()
    optimizer = vlearn.VON(
        model, lr=0.0, ess=1e30, beta2=0.0, likelihood=likelihood, generator=torch.Generator().manual_seed(0)
    )
    weight = next(model.parameters())
    found = []
    for _ in range(400):
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
        found.append(optimizer.state[weight]["hessian"].clone().reshape(-1))
    names = [name for name, _ in model.named_parameters()]
    plain = make().double()
    at_mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    def of_weight(value: Tensor) -> Tensor:
        return loss(functional_call(plain, at_mean | {names[0]: value}, (x,)))

    truth = torch.autograd.functional.hessian(of_weight, at_mean[names[0]])
    truth = truth.reshape(weight.numel(), -1).diagonal()  # type: ignore[union-attr]
    samples = torch.stack(found)
    assert bool(((samples.mean(0) - truth).abs() <= 5 * samples.std(0) / 400**0.5 + 1e-12).all())
