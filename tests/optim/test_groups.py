"""Parameter groups: each with its own settings, added late, of any dtype and device."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.table import (
    FAMILY,
    LOOPS,
    Entry,
    data,
    equal,
    family,
    loss_of,
    made,
    needs_gradients_alone,
    needs_no_pooling,
    needs_parameters_apart,
    network,
    plain,
    states,
    weights,
)

overrides = pytest.mark.parametrize(
    "entry, settings",
    [(entry, settings) for entry in FAMILY for settings in entry.overrides],
    ids=lambda value: str(value) if isinstance(value, Entry) else "-".join(value),
)
accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")


def train(entry: Entry, optimizers: list[Any], model: nn.Module, count: int = 4) -> list[Tensor]:
    """Weights and state after some steps at draws that all optimizers make in turn."""
    x, y = data()
    for optimizer in optimizers if entry.captures else ():
        optimizer.watch(model)
    torch.manual_seed(6)
    for _ in range(count):
        with ExitStack() as contexts:
            for optimizer in optimizers:
                contexts.enter_context(optimizer.sampled_params(train=True))
            model.zero_grad()
            loss_of(model, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
    return weights(model) + [tensor for optimizer in optimizers for tensor in states(optimizer)]


@overrides
def test_a_group_with_its_own_settings_is_an_optimizer_with_them(entry: Entry, settings: dict[str, Any]) -> None:
    needs_parameters_apart(entry)
    needs_no_pooling(entry)
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **settings}]
    together = train(entry, [entry.make(groups, num_data=50)], model)
    other = network()
    apart = [entry.make(other[0].parameters()), entry.make(other[2].parameters(), **settings)]
    assert equal(together, train(entry, apart, other))
    same = network()
    assert not equal(together, train(entry, [entry.make(same.parameters())], same))


@overrides
def test_a_group_added_after_steps_is_a_new_optimizer_over_it(entry: Entry, settings: dict[str, Any]) -> None:
    needs_parameters_apart(entry)
    needs_no_pooling(entry)
    model, other = network(), network()
    optimizer = entry.make(model[0].parameters(), num_data=50)
    apart = [entry.make(other[0].parameters())]
    train(entry, [optimizer], model)
    train(entry, apart, other)
    optimizer.add_param_group({"params": list(model[2].parameters()), **settings})
    apart.append(entry.make(other[2].parameters(), **settings))
    assert equal(train(entry, [optimizer], model), train(entry, apart, other))


@family
@pytest.mark.parametrize("loop", LOOPS)
def test_adding_a_group_drops_the_draw_that_waits_and_training_goes_on(entry: Entry, loop: str) -> None:
    model, (x, y) = network(), data()
    mean = weights(model)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = made(entry, loop, model)
    optimizer.train()
    optimizer.add_param_group({"params": [("extra", extra)] if loop == "plain" else [extra]})
    assert equal(weights(model), mean)
    LOOPS[loop](optimizer, model, x, y)
    assert not equal(weights(model), mean)
    assert torch.equal(extra, torch.ones(2))  # it had no gradient


@family
def test_a_new_head_of_a_watched_model_joins_under_the_names_of_the_model(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    old, model[2] = model[2], nn.Linear(5, 3).double()
    before = weights(old), weights(model[2])
    optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": 0.1})
    assert optimizer.param_groups[1]["param_names"] == ["2.weight", "2.bias"]
    plain(optimizer, model, x, y)
    assert equal(weights(old), before[0]) and not equal(weights(model[2]), before[1])
    mean = optimizer.posterior().mean
    assert set(mean) == {"0.weight", "0.bias", "param_2", "param_3", "2.weight", "2.bias"}  # the old head has places
    assert torch.equal(mean["2.weight"], model[2].weight) and torch.equal(mean["param_2"], old.weight)
    assert len(optimizer.sensitivities().self_influence) == len(y)


@family
def test_a_parameter_without_gradient_in_some_draws_counts_as_zero_there(entry: Entry) -> None:
    needs_gradients_alone(entry)
    x, y = data()

    def run(zero: bool) -> list[Tensor]:
        model = network()
        optimizer = made(entry, "context", model)
        torch.manual_seed(1)
        for draw in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                if draw == 0:
                    model[0].weight.grad = torch.zeros_like(model[0].weight) if zero else None
        optimizer.step()
        return weights(model)

    assert equal(run(True), run(False))


@family
@pytest.mark.parametrize("loop", LOOPS)
def test_three_dtypes_train_in_one_optimizer_as_each_by_itself(entry: Entry, loop: str) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    class ProductPosterior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(6, 3).to(dtype) for dtype in dtypes)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x.to(layer.weight.dtype)).double() for layer in self.layers]).sum(0)

    x, y = data()
    model = ProductPosterior()
    optimizer = made(entry, loop, model)
    before = weights(model)
    for _ in range(3):
        LOOPS[loop](optimizer, model, x, y)
    assert not any(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    for layer, dtype in zip(model.layers, (torch.float32, torch.float64, torch.float32), strict=True):
        state = optimizer.state[layer.weight]
        assert {value.dtype for key, value in state.items() if key != "step"} == {dtype}
    assert math.isfinite(optimizer.posterior().kl())


@accelerator
@family
@pytest.mark.parametrize("loop", LOOPS)
def test_two_devices_train_in_one_optimizer(entry: Entry, loop: str) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)
            self.second.to("cuda")

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh().cuda()).cpu()

    x, y = data()
    model = Split()
    optimizer = made(entry, loop, model)
    before = weights(model)
    for _ in range(3):
        LOOPS[loop](optimizer, model, x, y)
    assert not any(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@family
def test_frozen_and_unused_parameters_are_left_alone(entry: Entry) -> None:
    model, (x, y) = network(), data()
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    loss_of(model, x, y).backward()
    assert torch.equal(model[0].weight, frozen)  # no noise either
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.ones(2))
    model[0].weight.requires_grad_(True)
    optimizer.zero_grad()
    plain(optimizer, model, x, y)
    assert not torch.equal(model[0].weight, frozen)


@family
@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_that_no_gradient_reaches_changes_nothing(entry: Entry, loop: str) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, loop, model)
    LOOPS[loop](optimizer, model, x, y)
    before = weights(model) + states(optimizer)
    model.requires_grad_(False)
    elsewhere = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="without a draw") if loop == "context" else nullcontext():
        LOOPS[loop](optimizer, lambda x: model(x) + elsewhere, x, y)
    assert equal(weights(model) + states(optimizer), before)


@family
@pytest.mark.parametrize("waiting", [False, True])
def test_a_pass_through_the_frozen_model_leaves_the_training_as_it_was(entry: Entry, waiting: bool) -> None:
    """A discriminator, frozen while its generator trains; `waiting` is that pass between two micro-batches."""
    x, y = data()

    def train(with_generator: bool) -> list[torch.Tensor]:
        model, code = network(), torch.ones(12, 6, dtype=torch.float64, requires_grad=True)
        optimizer = made(entry, "plain", model)
        torch.manual_seed(3)
        rows = []
        for _ in range(3):
            optimizer.zero_grad()
            for part in (slice(0, 5), slice(5, 12)):
                loss_of(model, x[part], y[part]).backward()
                rows.append(optimizer.sensitivities().self_influence)
                if with_generator and (waiting or part.start):
                    model.requires_grad_(False)
                    code.grad = None
                    loss_of(model, code, y).backward()
                    assert code.grad is not None
                    model.requires_grad_(True)
            optimizer.step()
        return weights(model) + states(optimizer) + rows

    assert equal(train(True), train(False))
