"""Training on one rank of several, and on one process that makes the draws of all of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.optim import table
from tests.optim.table import Entry, data, loss_of, states

STEPS = 3
Draws = list[list[Tensor]]  # for each draw, the sampled weights of each block of parameters


def batches(rank: int, parts: int = 1) -> list[tuple[Tensor, Tensor]]:
    """One rank's half of the whole batch, in micro-batches."""
    x, y = data(count=12)
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def record(optimizer: Any) -> Draws:
    """The list to which the optimizer's draws will be added."""
    draws: Draws = []
    perturb = optimizer._perturb

    def recording(group: dict[str, Any], block: list[Any]) -> None:
        perturb(group, block)
        draws.append([slot.weights.clone() for slot in block])

    optimizer._perturb = recording
    return draws


def replay(optimizer: Any, draws: Draws) -> None:
    """Let the optimizer make these draws instead of its own."""
    given = iter(draws)

    def replaying(group: dict[str, Any], block: list[Any]) -> None:
        for slot, weights in zip(block, next(given), strict=True):
            slot.weights.copy_(weights)

    optimizer._perturb = replaying


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


def with_all_draws(
    entry: Entry, model: nn.Module, draws: list[Draws], parts: int = 1, steps: int = STEPS, **kwargs: Any
) -> Any:
    """Train in one process on every rank's draws, each with that rank's batch; a context for each."""
    optimizer = table.made(entry, "context", model, **kwargs)
    made = len(draws[0]) // steps
    order = [draws[rank][step * made + k] for step in range(steps) for rank in range(len(draws)) for k in range(made)]
    replay(optimizer, order)
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
