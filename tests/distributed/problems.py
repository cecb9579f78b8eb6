"""Training on one rank of several, and on one process that makes the draws of all of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.optim import table
from tests.optim.table import Entry, data, loss_of, states

STEPS = 3


@dataclass
class Drawn:
    """What a draw took random numbers for.

    Attributes:
        weights: of each slot.
        coordinates: the noise of each slot in its eigenbasis, where the structure keeps that.
        probes: of each backward pass under the draw.
    """

    weights: list[Tensor]
    coordinates: list[Tensor | None] = field(default_factory=list)
    probes: list[Tensor] = field(default_factory=list)


Draws = list[Drawn]


def batches(rank: int, parts: int = 1) -> list[tuple[Tensor, Tensor]]:
    """One rank's half of the whole batch, in micro-batches."""
    x, y = data(count=12)
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def record(optimizer: Any) -> Draws:
    """The list to which the optimizer's draws will be added."""
    draws: Draws = []
    structure, curvature = optimizer._structure, optimizer._runtime.curvature
    jointly, cotangent = structure.draw_jointly, getattr(curvature, "cotangent", lambda *args: None)

    def drawing(blocks: list[Any], noise: Any) -> None:
        jointly(blocks, noise)
        slices = [piece for block in blocks for piece in block.slices]
        kept = [None if piece.coordinates is None else piece.coordinates.clone() for piece in slices]
        draws.append(Drawn([piece.weights.clone() for piece in slices], kept))

    def probing(*args: Any) -> Tensor:
        draws[-1].probes.append(cotangent(*args))
        return draws[-1].probes[-1]

    structure.draw_jointly, curvature.cotangent = drawing, probing
    return draws


def replay(optimizer: Any, draws: Draws) -> None:
    """Let the optimizer make these draws instead of its own."""
    given, probes = iter(draws), iter(())

    def drawing(blocks: list[Any], noise: Any) -> None:
        nonlocal probes
        drawn = next(given)
        probes = iter(drawn.probes)
        slices = [piece for block in blocks for piece in block.slices]
        for piece, weights, coordinates in zip(slices, drawn.weights, drawn.coordinates, strict=True):
            piece.weights.copy_(weights)
            piece.coordinates = None if coordinates is None else coordinates.clone()

    structure, curvature = optimizer._structure, optimizer._runtime.curvature
    structure.draw_block, structure.draw_jointly = lambda *_: None, drawing
    curvature.cotangent = lambda *_: next(probes)


def alternating(draws: list[Draws], each: int = 1) -> Draws:
    """The draws of all ranks in the order in which one process makes them: `each` of every rank in a step."""
    steps = len(draws[0]) // each
    return [draw for step in range(steps) for own in draws for draw in own[step * each : (step + 1) * each]]


def train(loop: str, optimizer: Any, wrapper: DistributedDataParallel, micro: list[Any], no_sync: bool = False) -> None:
    """One step in one of the loops, over micro-batches."""

    def backward() -> None:
        for k, (x, y) in enumerate(micro):
            if loop == "modes":
                optimizer.train()
            with wrapper.no_sync() if no_sync and k < len(micro) - 1 else nullcontext():
                (loss_of(wrapper, x, y) / len(micro)).backward()

    if loop == "closure":

        def closure() -> None:
            optimizer.zero_grad()
            backward()

        optimizer.step(closure)
        return
    optimizer.zero_grad()
    with optimizer.sampled_params(train=True) if loop == "context" else nullcontext():
        backward()
    optimizer.step()
    optimizer.eval()


def together(first: Drawn, second: Drawn) -> Drawn:
    """One draw of two ranks, with the probes of all their micro-batches, in one pass."""
    assert not any(torch.equal(a, b) for a, b in zip(first.probes, second.probes, strict=True))
    probes = [torch.cat(first.probes + second.probes)] if first.probes else []
    return Drawn(first.weights, first.coordinates, probes)


def with_all_draws(
    entry: Entry, model: nn.Module, draws: list[Draws], parts: int = 1, steps: int = STEPS, **kwargs: Any
) -> Any:
    """Train in one process on every rank's draws, each with that rank's batch; a context for each."""
    optimizer = table.made(entry, "context", model, loss_scale=1 / parts, **kwargs)
    made = len(draws[0]) // steps
    replay(optimizer, alternating(draws, made))
    for _ in range(steps):
        for rank in range(len(draws)):
            for _ in range(made):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    for x, y in batches(rank, parts):
                        (loss_of(model, x, y) / parts).backward()
        optimizer.step()
    return optimizer


def state_of(optimizer: Any) -> list[Tensor]:
    """Means and state, in the parameters' order."""
    means = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return means + states(optimizer)


def refusal(action: Any) -> str:
    """The message of the RuntimeError or ValueError that an action raises."""
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"
