"""Many networks trained at once by SGD: each on its own examples, from its own first weights, in its own order.

Their weights are stacked (`torch.func.stack_module_state`), so that each layer of all of them is one batched product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from benchmarks.attribution.tasks import Data, Task
from benchmarks.report.terminal import Advance
from benchmarks.training.checkpoint import kept

Weights = dict[str, Tensor]  # by name ``[K, *shape]`` of K networks
FIRST_SEED = 1000  # of the retrainings; those below are for the networks that are explained


def batches(task: Task, seed: int, num_data: int) -> list[Tensor]:
    """The places, among the network's examples, of each step's minibatch."""
    order = torch.Generator().manual_seed(seed)
    return [part for _ in range(task.epochs) for part in torch.randperm(num_data, generator=order).split(task.batch)]


def train(
    task: Task, data: Data, examples: Tensor, seeds: Sequence[int], snapshots: Sequence[int] = ()
) -> tuple[Weights, list[Weights]]:
    """Train K networks.

    Args:
        examples: ``[K, n]`` numbers of the training examples of each.
        seeds: of the first weights and of the order of each.
        snapshots: numbers of steps after which the weights are kept too.

    Returns:
        The weights at the end, and those after each of these numbers of steps.
    """
    networks = [task.network(seed).to(data.x) for seed in seeds]
    weights = {name: p.detach().requires_grad_() for name, p in stack_module_state(networks)[0].items()}
    forward = _forward(task)
    optimizer = torch.optim.SGD(
        weights.values(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay, fused=True
    )
    count = examples.shape[1]
    places = zip(*(batches(task, seed, count) for seed in seeds), strict=True)
    taken: list[Weights] = []
    for step, each in enumerate(places, 1):
        index = examples.gather(1, torch.stack(each).to(examples.device))
        optimizer.zero_grad()
        losses = task.loss(forward(weights, data.x[index]).flatten(0, 1), data.y[index].flatten(0, 1), reduction="none")
        # the mean over each network's own minibatch, summed over the networks
        (losses.sum() * (len(seeds) / losses.numel())).backward()
        optimizer.step()
        if step in snapshots:
            taken.append({name: p.detach().clone() for name, p in weights.items()})
    return {name: p.detach() for name, p in weights.items()}, taken


@torch.no_grad()
def query_losses(task: Task, data: Data, weights: Weights) -> Tensor:
    """The loss of every query under each network, ``[K, Q]``."""
    count = len(next(iter(weights.values())))
    output = _forward(task, None)(weights, data.x_query).flatten(0, 1)
    target = data.y_query.repeat(count, *(1 for _ in data.y_query.shape[1:]))
    losses = task.loss(output, target, reduction="none")
    return losses.reshape(count, len(data.y_query), -1).mean(2)


def retrained_losses(
    task: Task, data: Data, subsets: Tensor, runs: Path, advance: Advance, repeats: int | None = None
) -> Tensor:
    """The loss of every query after retraining on each subset, ``[M, R, Q]``; what has been done lies under ``runs``.

    Args:
        subsets: ``[M, n]`` numbers of the examples of each subset.
        repeats: R, instead of the task's own.
    """
    repeats = repeats or task.repeats
    parts = torch.arange(len(subsets)).split(task.at_once)
    rows = []
    for repeat in range(repeats):
        for part in parts:
            first, last = int(part[0]), int(part[-1])
            seeds = [FIRST_SEED + repeat * 100_000 + number for number in part.tolist()]
            settings = {**identity(task), "examples": subsets[part].tolist(), "seeds": seeds}
            file = runs / f"retrained-{repeat}-{first}-{last}.pt"
            rows.append(kept(file, settings, lambda p=part, s=seeds: losses_of(task, data, subsets[p], s)))
            advance(f"{task.title}: retraining {repeat + 1}/{repeats} of subsets to {last + 1}/{len(subsets)}")
    return torch.cat(rows).reshape(repeats, len(subsets), -1).transpose(0, 1)


def losses_of(task: Task, data: Data, examples: Tensor, seeds: Sequence[int]) -> Tensor:
    """The loss of every query under K networks that are trained for it, ``[K, Q]``."""
    return query_losses(task, data, train(task, data, examples, seeds)[0])


def identity(task: Task) -> dict[str, object]:
    """What a retrained network depends on, beside its examples and its seed."""
    names = ("dataset", "widths", "num_data", "num_queries", "lr", "momentum", "weight_decay", "batch", "epochs")
    return {name: getattr(task, name) for name in (*names, "flipped")}


def _forward(task: Task, inputs: int | None = 0) -> Callable[[Weights, Tensor], Tensor]:
    """The outputs ``[K, n, C]`` of K networks; their inputs are their own, or, with None, the same."""
    bare = task.network(0).to("meta")
    return vmap(lambda weights, x: functional_call(bare, weights, (x,)), in_dims=(0, inputs))
