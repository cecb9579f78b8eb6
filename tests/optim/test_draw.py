"""The life of a draw: its states, the steps between them, and where mean and draw are in each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlearn.optim.sampling.blocks import SliceBlock, keep_means, partition
from vlearn.optim.sampling.draw import TRANSITIONS, Draw, DrawState, Origin
from vlearn.optim.sampling.noise import Noise

MEAN, DRAW = 1.0, 5.0
CALLS: dict[str, Callable[[Draw], None]] = {
    name: getattr(Draw, name) for name in ("suspend", "restore", "finish", "resume", "discard")
}
# The state after each call, by the state before: no call is an error in any of them.
AFTER = {
    ("ACTIVE", "suspend"): "SUSPENDED",
    ("ACTIVE", "restore"): "ACTIVE",
    ("ACTIVE", "finish"): "FINISHED",
    ("ACTIVE", "resume"): "ACTIVE",
    ("SUSPENDED", "suspend"): "SUSPENDED",
    ("SUSPENDED", "restore"): "ACTIVE",
    ("SUSPENDED", "finish"): "FINISHED",
    ("SUSPENDED", "resume"): "ACTIVE",
    ("FINISHED", "suspend"): "FINISHED",
    ("FINISHED", "restore"): "FINISHED",
    ("FINISHED", "finish"): "FINISHED",
    ("FINISHED", "resume"): "ACTIVE",
    **{(state.name, "discard"): "DISCARDED" for state in DrawState},
    **{("DISCARDED", call): "DISCARDED" for call in CALLS},
}
TO = {"ACTIVE": (), "SUSPENDED": ("suspend",), "FINISHED": ("finish",), "DISCARDED": ("discard",)}


def drawn(calls: tuple[str, ...] = ()) -> tuple[Draw, Tensor]:
    """A draw of one parameter after some calls, and the parameter."""
    p = nn.Parameter(torch.full((3,), MEAN))
    draw = Draw(
        Origin.TRAIN, Noise(None), [SliceBlock({}, slices) for slices in partition([p], {}, False, lambda _: False)]
    )
    for block in draw.blocks:
        keep_means(block.slices)
        for piece in block.slices:
            piece.weights.fill_(DRAW)
    for call in calls:
        CALLS[call](draw)
    return draw, p


def value(tensor: Tensor) -> float:
    return float(tensor.detach()[0])


@pytest.mark.parametrize(("before", "call"), AFTER)
def test_each_call_leads_to_the_state_that_the_table_says(before: str, call: str) -> None:
    draw, p = drawn(TO[before])
    assert draw.state.name == before
    CALLS[call](draw)
    assert draw.state.name == AFTER[before, call]
    assert value(p) == (DRAW if draw.state is DrawState.ACTIVE else MEAN)
    assert value(draw.means()[p]) == MEAN
    assert draw.state is DrawState.DISCARDED or value(draw.samples()[p]) == DRAW


@pytest.mark.parametrize("before", TO)
def test_inside_at_mean_the_weights_are_the_mean_and_afterwards_all_is_as_before(before: str) -> None:
    draw, p = drawn(TO[before])
    shown = value(p)
    with draw.at_mean():
        assert value(p) == MEAN and draw.state in (DrawState.FINISHED, DrawState.DISCARDED)
        draw.restore()  # as an eval forward's end does
        assert value(p) == MEAN
    assert value(p) == (DRAW if before == "SUSPENDED" else shown)


def test_a_draw_that_is_discarded_inside_at_mean_does_not_come_back() -> None:
    draw, p = drawn()
    with draw.at_mean():
        draw.discard()
    assert draw.state is DrawState.DISCARDED and value(p) == MEAN


def test_steps_that_the_table_does_not_allow_are_programming_errors() -> None:
    for before, after in ((b, a) for b in DrawState for a in DrawState if a not in TRANSITIONS[b]):
        draw, _ = drawn(TO[before.name])
        with pytest.raises(AssertionError, match=f"cannot go from {before.name} to {after.name}"):
            draw._enter(after)


@pytest.mark.parametrize("call", ["suspend", "finish"])
def test_a_graph_made_under_the_draw_runs_backward_after_a_suspension_and_not_after_its_end(call: str) -> None:
    draw, p = drawn()
    loss = p.square().sum()
    CALLS[call](draw)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    draw.resume()
    loss = p.square().sum()
    draw.suspend()
    draw.restore()
    loss.backward()
    assert p.grad is not None and value(p.grad) == 2 * DRAW
