"""The gradient of a softmax cross-entropy with hard labels gives away the factors that its loss has."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.per_example import per_example, relative_error
from tests.sensitivity.small import LABELS, D, N, covariance_of, inputs, network
from vlearn.losses.hard_labels import row_factors, smoothed_row_factors

WEIGHTS = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
PART = torch.where(torch.arange(N) % 2 == 0, LABELS, -100)


def messages_of(function):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = function()
    return result, [str(each.message) for each in seen]


def live(loss, model=None, x=None, **told):
    """(rows, warnings, model, optimizer) of one training step."""
    model, x = model or network(), inputs() if x is None else x
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    if told:
        optimizer.watch(model, **told)
    loss(model(x)).backward()
    rows, messages = messages_of(optimizer.sensitivities)
    return rows, messages, model, optimizer


def truth_of(model, optimizer, rows, x=None):
    twin = network()
    twin.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    x = inputs() if x is None else x
    return per_example(twin, lambda m: m(x), rows).self_influence(covariance_of(optimizer, model))


def own(target, smoothing=0.0):
    return lambda output: F.cross_entropy(output, target, reduction="none", label_smoothing=smoothing)


smoothed = pytest.mark.parametrize("smoothing", [0.0, 0.1])


@smoothed
@pytest.mark.parametrize("scale", [0.25, 3.0, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_factor_that_nobody_told_is_warned_of(scale, reduction, smoothing):
    def loss(f):
        return scale * F.cross_entropy(f, LABELS, reduction=reduction, label_smoothing=smoothing)

    told = {"loss_reduction": reduction}
    rows, messages, *_ = live(loss, **told)
    assert len(messages) == 1 and f"tell watch(model, loss_scale={scale:.4g})" in messages[0]
    rows, messages, model, optimizer = live(loss, **told, loss_scale=scale)
    assert messages == []
    assert relative_error(rows.self_influence, truth_of(model, optimizer, own(LABELS, smoothing))) < 1e-10
    rows, messages, *_ = live(loss, **told, loss_scale=1.0)
    assert messages == []  # it is meant


def test_it_is_said_once():
    model, x = network(), inputs()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    seen = []
    for _ in range(3):
        (F.cross_entropy(model(x), LABELS) / 4).backward()
        seen += messages_of(optimizer.sensitivities)[1]
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 1


@pytest.mark.parametrize("divides_by_weights", [True, False])
def test_class_weights_are_warned_of_and_are_right_as_told(divides_by_weights):
    reduction, weight = "mean" if divides_by_weights else "none", WEIGHTS[LABELS].sum()

    def loss(f):
        return F.cross_entropy(f, LABELS, WEIGHTS, reduction=reduction).mean()

    _, messages, *_ = live(loss)
    assert len(messages) == 1 and "float(weight[targets].sum())), and loss_scale=1.0 if" in messages[0]
    told = {"loss_reduction": lambda: float(weight)} if divides_by_weights else {"loss_scale": 1.0}
    rows, messages, model, optimizer = live(loss, **told)
    truth = truth_of(model, optimizer, lambda f: F.cross_entropy(f, LABELS, WEIGHTS, reduction="none"))
    assert messages == [] and relative_error(rows.self_influence, truth) < 1e-10


@smoothed
@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_ignored_targets_do_not_count(kind, smoothing):
    if kind == "classes":
        rows, messages, model, optimizer = live(lambda f: F.cross_entropy(f, PART, label_smoothing=smoothing))
        truth = truth_of(model, optimizer, own(PART, smoothing))
    else:
        x, y = torch.randn(4, 7, D, dtype=torch.float64), torch.randint(3, (4, 7))
        y[0, 3:] = y[2, :5] = -100
        rows, messages, model, optimizer = live(lambda f: F.cross_entropy(f.mT, y, label_smoothing=smoothing), x=x)
        truth = truth_of(model, optimizer, lambda f: own(y, smoothing)(f.mT).mean(1), x)
    assert messages == []
    assert relative_error(rows.self_influence, truth) < 1e-10


def test_the_hessian_is_the_mean_over_the_examples_that_have_a_loss():
    def hessians(x, y):
        model = network()
        optimizer = vlearn.VOGN(model, lr=0.0, ess=1e12, hess_init=1.0, beta2=0.0, weight_decay=1.0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return torch.cat([optimizer.state[p]["hessian"].flatten() for p in model.parameters()])

    x, kept = inputs(), PART >= 0
    assert relative_error(hessians(x, PART), hessians(x[kept], PART[kept])) < 1e-4  # the draws differ by 1e-6


UNLIKE = {
    "squared error": lambda f: F.mse_loss(f, torch.zeros_like(f)),
    "binary": lambda f: F.binary_cross_entropy_with_logits(f, (f.detach() > 0).double()),
    "soft labels": lambda f: 0.5 * F.cross_entropy(f, torch.linspace(0, 1, 3 * N, dtype=f.dtype).view(N, 3).softmax(1)),
    "an entropy bonus": lambda f: F.cross_entropy(f, LABELS) + 0.1 * (f.softmax(1) * f.log_softmax(1)).sum(1).mean(),
    "focal": lambda f: ((1 - f.softmax(1)) * F.one_hot(LABELS, 3) * -f.log_softmax(1)).sum() / 7,
    "weights of examples": lambda f: (F.cross_entropy(f, LABELS, reduction="none") * torch.linspace(1, 3, N)).mean(),
}


@pytest.mark.parametrize("loss", UNLIKE.values(), ids=UNLIKE)
def test_other_losses_give_nothing_away_and_are_taken_as_told(loss):
    rows, messages, model, _ = live(loss)
    assert messages == []
    output = model(inputs()).detach().requires_grad_()  # the same draw
    (residual,) = torch.autograd.grad(loss(output), output)
    assert relative_error(rows.residual, residual * N) < 1e-10


@pytest.mark.parametrize("shape", [(5, 3), (4, 6, 3), (4, 3, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_and_labels_of_any_shape_and_type(shape, dtype):
    torch.manual_seed(0)
    output = (2 * torch.randn(shape, dtype=dtype)).requires_grad_()
    scores = output if len(shape) != 3 else output.movedim(-1, 1)
    target = torch.randint(3, (scores.shape[0], *scores.shape[2:]))
    (F.cross_entropy(scores, target) / 4).backward()
    factors = row_factors(output, output.grad)
    assert factors is not None and factors.is_one
    assert float(1 / factors.factor.median()) == pytest.approx(4 * target.numel(), rel=factors.tolerance)


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("shape", [(40,), (4, 6), (4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.2])
def test_factors_of_smoothed_labels(shape, dtype, classes, smoothing):
    torch.manual_seed(0)
    scores = torch.randn(shape[0], classes, *shape[1:], dtype=dtype).requires_grad_()
    target = torch.randint(classes, shape)
    target.flatten()[::3] = -100
    (F.cross_entropy(scores, target, label_smoothing=smoothing) / 4).backward()
    assert row_factors(scores, scores.grad) is None or dtype is torch.bfloat16
    factors = smoothed_row_factors(scores, scores.grad)
    assert factors is not None and factors.is_one
    expected = 4 * int((target >= 0).sum())
    assert float(1 / factors.factor.median()) == pytest.approx(expected, rel=factors.tolerance)


def test_two_classes_whose_gradient_any_loss_could_give_are_not_taken_for_class_weights():
    torch.manual_seed(0)
    model = nn.Linear(D, 2).double()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    soft = torch.rand(N, dtype=torch.float64)
    F.cross_entropy(model(inputs()), torch.stack([soft, 1 - soft], 1)).backward()
    assert messages_of(optimizer.sensitivities)[1] == []


def test_a_certain_model_says_nothing():
    output = torch.tensor([[30.0, 0.0, 0.0]] * 4, requires_grad=True)
    F.cross_entropy(output, torch.zeros(4, dtype=torch.long)).backward()
    assert row_factors(output, output.grad) is None
