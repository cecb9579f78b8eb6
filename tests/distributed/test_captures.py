"""Update rules that learn from each process's own examples: what is averaged, and who stops when one of them cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problems import STEPS, alternating, record, refusal, replay, state_of
from tests.distributed.ranks import Ranks
from tests.optim import table
from tests.optim.table import FAMILY, data, equal, loss_of, network, weights

pytestmark = pytest.mark.slow
captured = [number for number in range(len(FAMILY)) if FAMILY[number].captures]
family = pytest.mark.parametrize("number", captured, ids=[str(FAMILY[number]) for number in captured])
settings = pytest.mark.parametrize("setting", ["own", "shared", "sync"])
SETTINGS: dict[str, dict[str, Any]] = {"own": {}, "shared": {"shared_noise": True}, "sync": {"sync": True}}


def made(number: int, setting: str, model: nn.Module, every: int = 1) -> tuple[Any, nn.Module]:
    """The optimizer, and what is trained: the model, or with its gradients averaged in backward() a wrapper."""
    trained = model if setting == "sync" else DistributedDataParallel(model)
    optimizer = table.made(FAMILY[number], "context", trained, **SETTINGS[setting])
    optimizer.watch(trained, every=every)
    return optimizer, trained


def unequal(rank: int) -> tuple[Tensor, Tensor]:
    """A third of the batch for the first rank, the rest for the second."""
    x, y = data(count=12)
    return (x[:4], y[:4]) if rank == 0 else (x[4:], y[4:])


def uneven(rank: int, number: int, setting: str, every: int) -> Any:
    optimizer, model = made(number, setting, network(), every)
    draws = record(optimizer)
    for _ in range(STEPS):
        table.context(optimizer, model, *unequal(rank))
    return draws, state_of(optimizer)


@family
@settings
@pytest.mark.parametrize("every", [1, 2])
def test_every_process_counts_alike_however_many_examples_it_has(
    ranks: Ranks, number: int, setting: str, every: int
) -> None:
    """As its gradient does, which is the mean over its own examples."""
    (first, state), (second, other) = ranks(uneven, number, setting, every)
    assert equal(state, other)
    optimizer = table.made(FAMILY[number], "context", model := network())
    optimizer.watch(model, every=every)
    replay(optimizer, alternating([first, second]))
    for _ in range(STEPS):
        for rank in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, *unequal(rank)).backward()
        optimizer.step()
    for a, b in zip(state, state_of(optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def without_captures(rank: int, number: int, setting: str) -> Any:
    """On the second rank two forward passes come before one backward pass, so the captures are not the minibatch's."""
    optimizer, model = made(number, setting, network())
    x, y = unequal(rank)
    table.context(optimizer, model, x, y)
    before = weights(model), state_of(optimizer)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            if rank == 1:
                with torch.enable_grad():
                    kept = network_inside(model)(x)
                (loss_of(model, x, y) + 0 * kept.sum()).backward()
            else:
                loss_of(model, x, y).backward()
        optimizer.step()

    message = refusal(step)
    unchanged = equal(weights(model), before[0]) and equal(state_of(optimizer), before[1])
    table.context(optimizer, model, x, y)  # and training can go on
    return message, unchanged, state_of(optimizer)


def network_inside(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


@family
@settings
def test_where_one_rank_has_no_captures_every_rank_raises(ranks: Ranks, number: int, setting: str) -> None:
    (first, unchanged, state), (second, too, other) = ranks(without_captures, number, setting)
    assert "step() failed on another rank" in first
    assert "two training forward passes came before one backward pass" in second
    assert unchanged and too and equal(state, other)


def unused_on_a_step_without_captures(rank: int, number: int) -> tuple[list[Tensor], list[Tensor]]:
    """The curvature before and after the second step, for which one rank does not use the last layer."""
    optimizer, model = made(number, "sync", network(), every=2)
    x, y = unequal(rank)
    table.context(optimizer, model, x, y)
    before = [hessian.clone() for hessian in hessians(optimizer)]
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        (model[0](x).square().mean() if rank == 1 else loss_of(model, x, y)).backward()  # type: ignore[operator]
    optimizer.step()
    return before, hessians(optimizer)


def hessians(optimizer: Any) -> list[Tensor]:
    """Those of parameters, or of layers."""
    return [state["hessian"] for state in optimizer.state.values() if "hessian" in state]


@family
def test_a_step_without_captures_leaves_the_curvature_of_what_a_rank_does_not_use(ranks: Ranks, number: int) -> None:
    for before, after in ranks(unused_on_a_step_without_captures, number):
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def replayed_on_the_first(rank: int) -> list[Tensor]:
    """The first rank alone asks for what repeats the forward pass of a model that has buffers."""
    model = nn.Sequential(network(), nn.BatchNorm1d(3, dtype=torch.float64).eval())
    wrapper = DistributedDataParallel(model)
    optimizer = FAMILY[captured[0]].make(wrapper)
    x, y = unequal(rank)
    loss_of(wrapper, x, y).backward()
    return [optimizer.sensitivities(deviation=True).deviation] if rank == 0 else []


def test_a_replay_of_the_forward_pass_asks_no_other_rank(ranks: Ranks) -> None:
    first, _ = ranks(replayed_on_the_first)
    assert bool(first[0].isfinite().all())
