"""The examples' gradients must add up to the gradient of the pass: where they do not, a call is refused or warns."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from vlearn.capture import Outer, Rule, features_last, register
from vlearn.capture.model_checks import ModelChecks
from vlearn.capture.pass_gradients import direction, product
from vlearn.layers.registry import RULES

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 2, 1, 0])
DOES_NOT_ADD_UP = "do not add up to the gradient of the pass"


class ByList(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
        self.weights = [self.weight]

    def forward(self, x):
        return self.first(x).tanh() @ self.weights[0].T


class ByClosure(ByList):
    def __init__(self):
        super().__init__()
        self.head = lambda x, weight=self.weight: x @ weight.T

    def forward(self, x):
        return self.head(self.first(x).tanh())


class InAChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = ByList()

    def forward(self, x):
        return self.child(x).relu()


def ivon(model, **settings):
    return vlearn.IVON(model, **{"lr": 0.1, "ess": 6, "hess_init": 0.1, **settings})


@pytest.mark.parametrize("make", [ByList, ByClosure, InAChild])
def test_a_second_reference_to_a_parameter_is_refused(make):
    model = make().double()
    optimizer = ivon(model)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=f"weight' {DOES_NOT_ADD_UP}"):
        optimizer.sensitivities()
    optimizer.step()
    for call in (vlearn.sweep, lambda m, p, loader, loss: vlearn.influence(m, p, loader, loader, loss)):
        with pytest.raises(RuntimeError, match=DOES_NOT_ADD_UP):
            call(model, optimizer.posterior(), [(X, Y)], F.cross_entropy)


@pytest.mark.parametrize("make", [vlearn.VON, vlearn.VOGN, vlearn.KFACVON, vlearn.FullVON])
def test_a_step_that_needs_the_rows_is_refused_too_and_changes_nothing(make):
    model = ByList().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make(model, lr=0.1, ess=6)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=DOES_NOT_ADD_UP):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Doubled(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before))

    def forward(self, x):
        return 2 * x @ self.weight.T


def test_a_rule_that_is_not_that_of_its_layer_is_refused():
    register(Doubled, Rule({"weight": lambda module, x, b: Outer(features_last(module, x), b, module.weight.shape)}))
    try:
        model = nn.Sequential(Doubled(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = ivon(model)
        F.cross_entropy(model(X), Y).backward()
        with pytest.raises(RuntimeError, match=f"'0.weight' {DOES_NOT_ADD_UP}"):
            optimizer.sensitivities()
    finally:
        del RULES[Doubled]


def test_a_hook_that_changes_a_gradient_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].weight.register_hook(lambda gradient: gradient * (torch.arange(4) > 1))
    optimizer = ivon(model)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=f"'0.weight' {DOES_NOT_ADD_UP}"):
        optimizer.sensitivities()


class TwoTasks(nn.Module):
    """Its loss is weighted by learned variances (Kendall et al., 2018)."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)
        self.log_variances = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x):
        h = self.trunk(x).tanh()
        return self.a(h), self.b(h)

    def rows(self, output):
        s = self.log_variances
        squares = (output[1] - X[: len(output[1]), :1]).square().squeeze(1)
        return (-s[0]).exp() * F.cross_entropy(output[0], Y, reduction="none") + (-s[1]).exp() * squares + s.sum() / 2


def self_influence(model, make, rows, posterior, without=()):
    """gᵀΣg of each example at the weights that the model holds now, without some of the parameters."""
    twin = make().double()
    twin.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    names = [name for name, _ in twin.named_parameters() if name not in without]
    parameters = [dict(twin.named_parameters())[name] for name in names]
    totals = []
    for row in rows(twin):
        gradients = torch.autograd.grad(row, parameters, retain_graph=True)
        totals.append(sum((posterior.variance[n] * g.square()).sum() for n, g in zip(names, gradients, strict=True)))
    return torch.stack(totals).detach()


def warned(function):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = function()
    return result, [str(each.message) for each in seen]


def test_a_parameter_that_the_loss_reads_is_warned_of_once():
    torch.manual_seed(0)
    model = TwoTasks().double()
    optimizer = ivon(model)
    for step in range(2):
        model.rows(model(X)).mean().backward()
        rows, messages = warned(lambda: optimizer.sensitivities(output=0))
        assert ["reads 'log_variances' itself" in message for message in messages] == [True] * (step == 0)
        posterior = optimizer.posterior()
        truth = self_influence(model, TwoTasks, lambda m: m.rows(m(X)), posterior, without=["log_variances"])
        torch.testing.assert_close(rows.self_influence, truth)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [vlearn.VON, vlearn.VOGN, vlearn.KFACVON, vlearn.FullVON])
def test_an_optimizer_that_learns_from_rows_refuses_such_a_parameter(make):
    torch.manual_seed(0)
    model = TwoTasks().double()
    optimizer = make(model, lr=0.01, ess=6, **({"output": 0} if make is not vlearn.VOGN else {}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, _ = model(X)
        model.rows((first, X[:, :1])).mean().backward()
        with pytest.raises(RuntimeError, match="'log_variances' got its gradient outside the forward passes"):
            optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, tokens):
        return self.embedding(tokens).mean(1).tanh()


def test_a_head_that_is_tied_outside_the_model_is_warned_of():
    model = Tied().double()
    optimizer = ivon(model)
    tokens = torch.arange(12).reshape(6, 2) % 5
    F.cross_entropy(model(tokens) @ model.embedding.weight.T, Y).backward()
    assert any("reads 'embedding.weight' itself" in message for message in warned(optimizer.sensitivities)[1])


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


PENALTIES = {
    "L2": lambda p: p.square().sum(),
    "L1": lambda p: p.abs().sum(),
    "none": lambda p: 0.0,
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_on_the_weights_is_of_no_example_and_passes(penalty):
    model = plain().double()
    optimizer = ivon(model)
    (F.cross_entropy(model(X), Y) + 0.1 * sum(map(penalty, model.parameters()))).backward()
    rows, messages = warned(optimizer.sensitivities)
    assert messages == []
    truth = self_influence(model, plain, lambda m: F.cross_entropy(m(X), Y, reduction="none"), optimizer.posterior())
    torch.testing.assert_close(rows.self_influence, truth)


def test_another_penalty_is_warned_of_and_the_rows_are_those_of_the_examples():
    model = plain().double()
    optimizer = ivon(model)
    (F.cross_entropy(model(X), Y) + sum((p - 1).pow(4).sum() for p in model.parameters())).backward()
    rows, messages = warned(optimizer.sensitivities)
    assert len(messages) == 1 and "Right for a penalty" in messages[0]
    truth = self_influence(model, plain, lambda m: F.cross_entropy(m(X), Y, reduction="none"), optimizer.posterior())
    torch.testing.assert_close(rows.self_influence, truth)


def test_rows_that_are_first_asked_for_later_are_checked_too():
    model = TwoTasks().double()
    optimizer = ivon(model)
    for asks in (False, False, True, True):
        model.rows(model(X)).mean().backward()
        messages = warned(lambda: optimizer.sensitivities(output=0))[1] if asks else []
        optimizer.step()
        optimizer.zero_grad()
    assert any("reads 'log_variances' itself" in message for message in messages)
    model = ByList().double()
    optimizer = ivon(model)
    for _ in range(2):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=DOES_NOT_ADD_UP):
        optimizer.sensitivities()


def test_gradients_that_are_accumulated_clipped_or_scaled_are_no_matter():
    model = plain().double()
    optimizer = ivon(model)
    optimizer.watch(model, loss_scale=1e3)
    for part in (slice(0, 6), slice(0, 3)):
        (1e3 * F.cross_entropy(model(X[part]), Y[part])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert warned(optimizer.sensitivities)[1] == []


def test_a_pass_is_looked_at_once_and_kinds_are_bounded(monkeypatch):
    model = plain().double()
    optimizer = ivon(model)
    checks = ModelChecks.of(model)
    for _ in range(3):
        F.cross_entropy(model(X), Y).backward()
        optimizer.sensitivities()
        optimizer.step()
        optimizer.zero_grad()
    assert len(checks.row_sums) == len(checks.takes_gradients) == 1
    assert not any(p._backward_hooks for p in model.parameters())
    monkeypatch.setattr("vlearn.capture.recorder.MOST_KINDS", 1)
    model[1] = nn.ReLU()
    optimizer.watch(model)
    F.cross_entropy(model(X), Y).backward()
    optimizer.sensitivities()
    assert len(checks.takes_gradients) == 2  # asked for, it is looked at all the same


def test_two_optimizers_that_probe_one_model_do_not_take_each_others_probe():
    def hessians(together):
        torch.manual_seed(0)
        model = plain().double()
        settings = {"lr": 0.0, "ess": 1e12, "beta2": 0.5, "hess_init": 0.1, "curvature": "empirical"}
        last = vlearn.VON(model[3].parameters(), generator=torch.Generator().manual_seed(1), **settings)
        last.watch(model)
        if together:
            first = vlearn.VON(model[0].parameters(), lr=0.0, ess=1e12, generator=torch.Generator().manual_seed(2))
            first.watch(model)
        F.cross_entropy(model(X), Y).backward()
        last.step()
        return [last.state[p]["hessian"] for p in model[3].parameters()]

    for alone, beside in zip(hessians(False), hessians(True), strict=True):
        torch.testing.assert_close(alone, beside, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 65521), (70000,)])
def test_products_are_those_with_the_direction(shape):
    gradient = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (gradient * direction(gradient, torch.float64)).sum()
    torch.testing.assert_close(product(gradient), expected)
    if len(shape) == 2:
        torch.testing.assert_close(product(gradient.to_sparse()), expected)


class WithFeatures(nn.Module):
    """The loss reads a layer's output from an attribute, and one parameter is used by nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        self.features = self.first(x)
        return self.head(self.features.detach())


def test_a_layer_whose_output_only_the_loss_reads_has_its_rows():
    torch.manual_seed(0)
    model = WithFeatures().double()
    optimizer = ivon(model)

    def rows(m):
        return F.cross_entropy(m(X), Y, reduction="none") + F.cross_entropy(m.features, Y, reduction="none")

    rows(model).mean().backward()
    live, messages = warned(optimizer.sensitivities)
    assert messages == []
    truth = self_influence(model, WithFeatures, rows, optimizer.posterior(), without=["unused"])
    torch.testing.assert_close(live.self_influence, truth)
    assert all(model.unused is not p for call in optimizer._watch.trace.layer_calls for p in call.parameters)


def test_where_another_optimizer_has_moved_other_weights_the_next_pass_tells():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    other = torch.optim.Adam(model[0].parameters(), lr=0.1)
    optimizer = vlearn.IVON(model[2].parameters(), lr=0.1, ess=6)

    def step():
        model.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        with torch.no_grad():  # past the modules, which would show the mean
            inputs = F.linear(X, model[0].weight, model[0].bias).tanh()
            residuals = F.linear(inputs, model[2].weight, model[2].bias).softmax(1) - F.one_hot(Y)
        other.step()
        optimizer.step()
        variance = optimizer.posterior().variance
        squares = torch.einsum("no,ni->noi", residuals.square(), inputs.square())
        weight, bias = squares * variance["2.weight"], residuals.square() * variance["2.bias"]
        return weight.sum((1, 2)) + bias.sum(1)

    for _ in range(2):
        step()
    with pytest.raises(RuntimeError, match="another optimizer has stepped since the pass, ask again after the next"):
        optimizer.sensitivities()
    for _ in range(2):
        expected = step()
        torch.testing.assert_close(optimizer.sensitivities().self_influence, expected)
