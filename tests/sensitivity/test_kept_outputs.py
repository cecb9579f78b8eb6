"""Modules that keep what they return in an attribute, which is read later: the deviation is exact, or refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import Model
from tests.oracles.networks.blocks import Swish
from tests.oracles.per_example import per_example, relative_error
from tests.sensitivity.small import (
    LABELS,
    C,
    D,
    covariance_of,
    inputs,
    loss_of,
    optimizer_of,
    rows,
    truth_at,
    weights_of,
)


class Linear(nn.Linear):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def _block(keep):
    block = Model(keep)
    block.gain = nn.Parameter(torch.ones(4))
    return block


def _itself(m, h):
    m.kept = torch.tanh(m.gain * h)
    return m.kept


def _rows_of_it(m, h):
    y = torch.tanh(m.gain * h)
    m.kept = y[:, :4]
    return y


def _among_others(m, h):
    m.kept = torch.tanh(m.gain * h)
    return m.kept, m.kept, m.kept[:, :3], m.kept[:, 1:]


def _part(m, h):
    y = m.gain * h
    m.kept, other = torch.cat([y.tanh(), y.sin()], 1).chunk(2, 1)
    return m.kept, other


def _made_of_it(m, h):
    y = torch.tanh(m.gain * h)
    m.kept = torch.sigmoid(y)
    return y


def network(kept_by, function=torch.cos):
    def forward(m, x):
        z = m.keeping(m.a(x))
        if isinstance(z, tuple):
            z = sum(F.pad(each, (0, 4 - each.shape[1])) for each in z)
        return m.out(function(z)) + m.head(m.keeping.kept)

    torch.manual_seed(0)
    keeping = Linear(4, 4) if kept_by is Linear else _block(kept_by)
    return Model(forward, a=nn.Linear(D, 4), keeping=keeping, out=nn.Linear(4, C), head=nn.Linear(4, C)).double()


def recorded(model):
    optimizer, x = optimizer_of(model), inputs()
    loss = loss_of(model, x)
    drawn = weights_of(model)
    loss.backward()
    optimizer.step()
    return optimizer, drawn


def check(model, make, **arguments):
    """Compare live rows and a sweep with the truth about a twin."""
    optimizer, drawn = recorded(model)
    s = optimizer.sensitivities(deviation=True, **arguments)
    covariance, chosen = covariance_of(optimizer, model), arguments.get("examples", slice(None))
    truth = truth_at(drawn, make(), inputs())
    assert relative_error(s.deviation, truth.deviation(covariance)[chosen]) < 1e-10
    loader = [(inputs(), LABELS)]
    table = vlearn.sweep(model, optimizer.posterior(), loader, F.cross_entropy, "exact", progress=False)
    truth = truth_at(weights_of(model), make(), inputs())
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10


@pytest.mark.parametrize("kept_by", [Linear, _itself, _rows_of_it, _among_others, _part])
def test_the_deviation_counts_what_reads_a_kept_output(kept_by):
    check(network(kept_by), lambda: network(kept_by))


@pytest.mark.parametrize("kept_by", [Linear, _itself, _among_others])
def test_it_does_so_by_backward_passes(kept_by):
    check(network(kept_by, Swish.apply), lambda: network(kept_by, Swish.apply))


def test_it_does_so_of_some_of_the_examples():
    check(network(_itself), lambda: network(_itself), examples=[4, 1])


def test_reading_leaves_what_is_kept_and_the_pass_as_they_were():
    model = network(_among_others)
    optimizer = optimizer_of(model)
    loss = loss_of(model, inputs())
    kept, before = model.keeping.kept, model.keeping.kept.clone()
    loss.backward(retain_graph=True)
    first = optimizer.sensitivities(deviation=True)
    assert model.keeping.kept is kept and torch.equal(kept, before)
    assert torch.equal(optimizer.sensitivities(deviation=True).deviation, first.deviation)
    loss.backward()  # which finds nothing written in place


@pytest.mark.parametrize("function", [torch.cos, Swish.apply])
def test_what_a_module_makes_of_its_output_and_keeps_is_refused(function):
    model = network(_made_of_it, function)
    optimizer, drawn = recorded(model)
    truth = truth_at(drawn, network(_made_of_it, function), inputs())
    influence = truth.self_influence(covariance_of(optimizer, model))
    assert relative_error(optimizer.sensitivities().self_influence, influence) < 1e-10
    with pytest.raises(RuntimeError, match="what it has made of its output"):
        optimizer.sensitivities(deviation=True)
    with pytest.raises(RuntimeError, match="what it has made of its output"):
        vlearn.sweep(model, optimizer.posterior(), [(inputs(), LABELS)], F.cross_entropy, progress=False)


def test_a_loss_that_reads_a_kept_output_itself_is_no_problem():
    model, twin = network(_itself), network(_itself)
    optimizer = optimizer_of(model)
    loss = loss_of(model, inputs()) + model.keeping.kept.square().sum(1).mean()
    drawn = weights_of(model)
    loss.backward()
    optimizer.step()
    twin.load_state_dict(drawn)

    def whole_loss(m):
        losses = F.cross_entropy(m(inputs()), LABELS, reduction="none")
        return losses + m.keeping.kept.square().sum(1)

    truth = per_example(twin, lambda m: m(inputs()), rows, whole_loss)
    deviation = truth.deviation(covariance_of(optimizer, model))
    assert relative_error(optimizer.sensitivities(deviation=True).deviation, deviation) < 1e-10
