"""`sync=True`, without a wrapper: gradients and statistics are averaged over processes at `step()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problems import STEPS, alternating, batches, record, refusal, replay, state_of
from tests.distributed.ranks import Ranks
from tests.optim import table
from tests.optim.table import FAMILY, FULLVON, IVON, KFACVON, NUMBERS, equal, loss_of, network, numbered, weights
from tests.pairs import pairs

pytestmark = pytest.mark.slow
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gradsq": {"hess_approx": "gradsq"},
    "shared": {"shared_noise": True},
    "warm-up": {"beta2_warmup": 1.5},
}
OF_SOME = {"gradsq": (IVON,), "warm-up": (IVON, FULLVON, KFACVON)}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own; one parameter is frozen."""
    first, _, last = model.children()
    last.bias.requires_grad_(False)  # type: ignore[union-attr]
    return [{"params": first.parameters(), "lr": 0.2}, {"params": last.parameters(), "weight_decay": 0.01}]


def made(number: int, model: nn.Module, **kwargs: Any) -> Any:
    optimizer = FAMILY[number].make(groups(model), **kwargs)
    if FAMILY[number].captures:
        optimizer.watch(model)
    return optimizer


def step(optimizer: Any, model: nn.Module, rank: int, contexts: int, unused: bool = False, scale: float = 1.0) -> None:
    """The gradients of a step; with `unused`, rank 1 does not use the last layer."""
    for _ in range(contexts):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            x, y = batches(rank)[0]
            if unused and rank == 1:
                hidden = model[0](x)  # type: ignore[operator]
                nn.functional.cross_entropy(hidden, torch.arange(len(x)) % 5).backward()
            else:
                (scale * loss_of(model, x, y)).backward()


def on_ranks(rank: int, number: int, setting: str, contexts: int, unused: bool) -> Any:
    model = network()
    optimizer = made(number, model, sync=True, **SETTINGS[setting])
    draws = record(optimizer)
    for _ in range(STEPS):
        step(optimizer, model, rank, contexts, unused)
        optimizer.step()
    return draws, state_of(optimizer)


def has_setting(number: int, setting: str, contexts: int, unused: bool) -> bool:
    return FAMILY[number] in OF_SOME.get(setting, FAMILY)


@pytest.mark.parametrize(
    ("number", "setting", "contexts", "unused"),
    pairs(NUMBERS, list(SETTINGS), [1, 2], [False, True], allowed=has_setting),
)
def test_two_ranks_are_one_process_with_both_draws(
    ranks: Ranks, number: int, setting: str, contexts: int, unused: bool
) -> None:
    (first, state), (second, other) = ranks(on_ranks, number, setting, contexts, unused)
    assert equal(state, other)
    assert equal(first[0].weights, second[0].weights) == (setting == "shared")

    model = network()
    optimizer = made(number, model, **SETTINGS[setting])
    replay(optimizer, alternating([first, second], contexts))
    for _ in range(STEPS):
        for rank in range(2):
            step(optimizer, model, rank, contexts, unused)
        optimizer.step()
    for a, b in zip(state, state_of(optimizer), strict=True):
        torch.testing.assert_close(a, b, **FAMILY[number].rounding(1e-13))


def with_the_wrapper(rank: int, number: int) -> Any:
    wrapper = DistributedDataParallel(network())
    construction = refusal(lambda: FAMILY[number].make(wrapper, sync=True))
    hooks = sum(len(module._forward_hooks) for module in wrapper.modules())
    optimizer = FAMILY[number].make(wrapper.parameters(), sync=True)
    with optimizer.sampled_params(train=True):
        loss_of(wrapper, *batches(rank)[0]).backward()
    return construction, hooks, refusal(optimizer.step), equal(weights(wrapper), weights(network()))


@numbered
def test_with_the_wrapper_it_would_average_twice_and_is_refused(ranks: Ranks, number: int) -> None:
    for construction, hooks, at_step, at_mean in ranks(with_the_wrapper, number):
        assert "drop sync=True, or the wrapper" in construction and hooks == 0
        assert "drop sync=True, or the wrapper" in at_step and at_mean


def with_one_rank_overflown(rank: int, number: int, rule: str, contexts: int, at: int) -> Any:
    model = network()
    optimizer = table.made(FAMILY[number], "context", model, sync=True, nonfinite=rule)
    for k in range(contexts):
        step(optimizer, model, rank, 1, scale=float("inf") if rank == 1 and k == at else 1.0)
    message = ""
    try:
        optimizer.step()
    except FloatingPointError as error:
        message = str(error)
    changed = not equal(weights(model), weights(network()))
    step(optimizer, model, rank, 1)
    return message, changed, optimizer.nonfinite_count, optimizer.step() or state_of(optimizer)


def name_of(number: int, place: int) -> str:
    """What a parameter is called: as in the model, where that is watched."""
    names = [name for name, _ in network().named_parameters()]
    return repr(names[place] if FAMILY[number].captures else f"param_{place}")


@numbered
def test_a_gradient_that_is_not_finite_in_one_rank_stops_all(ranks: Ranks, number: int) -> None:
    (own, *first), (seen, *second) = ranks(with_one_rank_overflown, number, "raise", 1, 0)
    assert "a parameter in another process is not finite" in own and name_of(number, 0) in seen
    for changed, count, _ in (first, second):
        assert (changed, count) == (False, 0)
    assert equal(first[2], second[2])

    for contexts, at, moved in ((1, 0, False), (2, 0, True), (2, 1, False)):
        first, second = ranks(with_one_rank_overflown, number, "skip", contexts, at)
        for message, changed, count, _ in (first, second):
            assert (message, changed, count) == ("", moved, 1)
        assert equal(first[3], second[3])


def unlike(rank: int, number: int, how: str) -> str:
    model = network()
    if how == "frozen":
        model[0].bias.requires_grad_(rank == 0)
    optimizer = table.made(FAMILY[number], "context", model, sync=True)

    def whole() -> None:
        step(optimizer, model, rank, 1 + rank if how == "draws" else 1)
        optimizer.step()

    return refusal(whole)


@numbered
@pytest.mark.parametrize("how", ["frozen", "draws"])
def test_processes_that_do_not_train_alike_are_told(ranks: Ranks, number: int, how: str) -> None:
    expected = {
        "frozen": f"{name_of(number, 1)} is frozen in some processes only",
        "draws": "some processes are at step() while others begin another draw",
    }
    for message in ranks(unlike, number, how):
        assert expected[how] in message
