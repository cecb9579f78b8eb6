"""Bad input: value, rule, remedy, before anything changed."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.optim.table import FAMILY, LOOPS, Entry, data, equal, family, loss_of, made, network, plain, states, weights

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
def test_a_layer_that_has_no_shape_yet_wants_a_forward_pass(entry: Entry) -> None:
    model, (x, y) = network(), data()
    model[2] = nn.LazyLinear(model[2].out_features, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"run the model on one batch first, with torch.no_grad\(\): model\(x\)"):
        entry.make(model)
    with torch.no_grad():
        model(x)
    plain(entry.make(model), model, x, y)


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
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("rule", ["raise", "skip"])
def test_a_nonfinite_gradient_changes_nothing_in_any_loop(entry: Entry, loop: str, rule: str) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, loop, model, nonfinite=rule)
    LOOPS[loop](optimizer, model, x, y)
    before = weights(model) + states(optimizer)
    handle = model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="not finite") if rule == "raise" else nullcontext():
        LOOPS[loop](optimizer, model, x, y)
    handle.remove()
    assert equal(weights(model) + states(optimizer), before)
    assert optimizer.nonfinite_count == (rule == "skip")
    LOOPS[loop](optimizer, model, x, y)
    assert not equal(weights(model), before[:4])


@family
def test_huge_finite_gradients_are_not_taken_for_nonfinite(entry: Entry) -> None:
    model = nn.Linear(2, 1)
    optimizer = entry.make(model, **entry.of_squares)
    model(torch.ones(1, 2)).square().mean().backward()
    model.weight.grad.fill_(3e38)  # their sum overflows
    model.bias.grad.zero_()
    optimizer.step()


@family
def test_a_minibatch_without_examples_has_no_rows_and_teaches_no_curvature(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    before = states(optimizer)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
    if entry.captures:
        with pytest.raises(RuntimeError, match="does not have: the minibatch has none. Leave it out."):
            optimizer.step()
        assert equal(states(optimizer), before)
    else:
        optimizer.step()
        assert optimizer.sensitivities().self_influence.shape == (0,)
    plain(optimizer, model, x, y)
    assert optimizer.sensitivities().self_influence.shape == (len(y),)


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
