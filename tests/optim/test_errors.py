"""Bad input: value, rule, remedy, before anything changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from tests.optim.table import FAMILY, Entry, data, equal, loss_of, network, plain, weights

family = pytest.mark.parametrize("entry", FAMILY, ids=str)
bad = pytest.mark.parametrize(
    "entry, settings, message",
    [(entry, *case) for entry in FAMILY for case in entry.bad],
    ids=lambda value: str(value) if isinstance(value, Entry | dict) else "",
)


@bad
def test_a_bad_argument_is_refused_with_its_rule_and_remedy(entry: Entry, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        entry.make(network(), **settings)


@bad
def test_a_bad_group_setting_is_refused_and_not_added(entry: Entry, settings: dict, message: str) -> None:
    model = network()
    optimizer = entry.make(model[0].parameters())
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": list(model[2].parameters()), **settings})
    assert len(optimizer.param_groups) == 1


@family
def test_unknown_arguments_empty_lists_and_wrong_types_are_refused_as_torch_does(entry: Entry) -> None:
    with pytest.raises(TypeError, match="maximize"):
        entry.make(network(), maximize=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        entry.make([])
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        entry.make(torch.ones(3))
    with pytest.raises(TypeError, match="complex"):
        entry.make([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@family
def test_sparse_gradients_are_refused(entry: Entry) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = entry.make(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients \\('weight'\\)"):
        optimizer.step()


@family
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_gradient_raises_and_leaves_state_and_weights(entry: Entry, value: float) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    before = weights(model)
    state = {key: tensor.clone() for key, tensor in optimizer.state[model[2].weight].items()}
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    model[2].weight.grad[0, 0] = value
    with pytest.raises(FloatingPointError, match="gradient of '2.weight' is not finite"):
        optimizer.step()
    assert equal(weights(model), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.state[model[2].weight].items())
    plain(optimizer, model, x, y)


@family
def test_nonfinite_gradients_can_be_skipped_or_ignored(entry: Entry) -> None:
    x, y = data()
    for rule, count in (("skip", 1), ("ignore", 0)):
        model = network()
        optimizer = entry.make(model, nonfinite=rule)
        loss_of(model, x, y).backward()
        model[2].weight.grad[0, 0] = math.nan
        optimizer.step()
        assert optimizer.nonfinite_count == count
        assert bool(model[2].weight.isnan().any()) == (rule == "ignore")


@family
def test_huge_finite_gradients_are_not_taken_for_nonfinite(entry: Entry) -> None:
    model = nn.Linear(2, 1)
    optimizer = entry.make(model)
    model(torch.ones(1, 2)).sum().backward()
    model.weight.grad.fill_(3e38)  # their sum overflows
    model.bias.grad.zero_()
    optimizer.step()


@family
def test_bad_watch_arguments_are_refused_and_the_old_watch_stays(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    for settings, message in (
        ({"loss_reduction": "none"}, "loss_reduction='none', but it must be 'mean', 'sum' or a callable"),
        ({"loss_scale": 0.0}, "loss_scale=0.0, but it must be finite and not zero"),
        ({"every": 0}, "every=0, but it must be a positive whole number"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.watch(model, **settings)
    with pytest.raises(TypeError, match="needs the nn.Module"):
        optimizer.watch(model.parameters())
    plain(optimizer, model, x, y)
    optimizer.sensitivities()


@family
def test_sensitivities_without_a_watch_names_the_remedy(entry: Entry) -> None:
    with pytest.raises(RuntimeError, match="needs a watched model: use .*\\(model, ...\\) or optimizer.watch"):
        entry.make(network().parameters()).sensitivities()
