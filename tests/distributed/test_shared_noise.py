"""One draw for all ranks: clipping and gradient scalers act on the averaged gradient, as on one process's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problems import STEPS, Draws, batches, record, replay, state_of, together
from tests.distributed.ranks import Ranks
from tests.optim.table import FAMILY, LOOPS, NUMBERS, data, equal, loss_of, made, named, network
from tests.pairs import pairs

pytestmark = pytest.mark.slow
PARTS = 2
HOW = ["as it is", "clipped", "scaled", "scaled, clipped"]


def train(loop: str, how: str, optimizer: Any, model: Any, micro: list[Any]) -> None:
    """Clipped and scaled steps over micro-batches of the batch that this process has."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled="scaled" in how)
    if optimizer._watch is not None:
        optimizer.watch(model, loss_scale=lambda: scaler.get_scale() / len(micro))

    def backward() -> None:
        optimizer.zero_grad()
        for x, y in micro:
            scaler.scale(loss_of(model, x, y) / len(micro)).backward()
        scaler.unscale_(optimizer)
        if "clipped" in how:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    for _ in range(STEPS):
        if loop == "closure":
            optimizer.step(backward)
            continue
        if loop == "context":
            with optimizer.sampled_params(train=True):
                backward()
        else:
            if loop == "modes":
                optimizer.train()
            backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.eval()


def on_ranks(rank: int, number: int, loop: str, how: str, bucket_view: bool) -> Any:
    wrapper = DistributedDataParallel(network(), gradient_as_bucket_view=bucket_view)
    generator = torch.Generator().manual_seed(rank)  # rank 0's counts
    optimizer = made(FAMILY[number], loop, wrapper, shared_noise=True, generator=generator)
    draws = record(optimizer)
    train(loop, how, optimizer, wrapper, batches(rank, PARTS))
    return draws, state_of(optimizer)


def on_one(number: int, loop: str, how: str, draws: Draws) -> list[torch.Tensor]:
    model = network()
    optimizer = made(FAMILY[number], loop, model, shared_noise=True)
    replay(optimizer, draws)
    train(loop, how, optimizer, model, [data(count=12)])
    return state_of(optimizer)


def takes_closures(number: int, loop: str, how: str, bucket_view: bool) -> bool:
    """Whether torch's scaler, if there is one, does."""
    return loop != "closure" or "scaled" not in how


@pytest.mark.parametrize(
    ("number", "loop", "how", "bucket_view"),
    pairs(
        NUMBERS,
        list(LOOPS),
        ["as it is", "clipped", "scaled", "scaled, clipped"],
        [False, True],
        allowed=takes_closures,
    ),
    ids=named,
)
def test_two_ranks_are_one_process_with_the_whole_batch(
    ranks: Ranks, number: int, loop: str, how: str, bucket_view: bool
) -> None:
    (first, state), (second, other) = ranks(on_ranks, number, loop, how, bucket_view)
    assert all(equal(a.weights, b.weights) for a, b in zip(first, second, strict=True)) and len(first) == STEPS
    assert equal(state, other)
    whole = [together(a, b) for a, b in zip(first, second, strict=True)]
    for a, b in zip(state, on_one(number, loop, how, whole), strict=True):
        torch.testing.assert_close(a, b, **FAMILY[number].rounding(1e-12))
    if "clipped" in how:
        assert not equal(state, on_one(number, loop, "as it is", whole))


def ensemble_on_the_first(rank: int) -> list[torch.Tensor]:
    model = network()
    optimizer = FAMILY[0].make(DistributedDataParallel(model), shared_noise=True)
    draws = record(optimizer)
    if rank == 0:
        with optimizer.sampled_params():
            pass
    return [weights for draw in draws for weights in draw.weights]


def test_a_draw_for_predicting_asks_no_other_rank(ranks: Ranks) -> None:
    first, second = ranks(ensemble_on_the_first)
    assert first and not second
