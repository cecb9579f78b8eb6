"""What a backward pass brings to each parameter, as one number: the product of its gradient with a fixed direction.

The examples' gradients must add up to the gradient of the pass, which `vlearn.per_example.row_sums` checks once for
each kind of pass. The number takes no memory, and one trip through the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlearn._torch_internals import graph_task_id
from vlearn._wide import wide_dtype

_PERIOD = 65521  # entries after which a direction repeats: a prime, which no layer has as a size


def direction(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A direction in the shape of a parameter, in no special relation to anything; entries in [-1, 1]."""
    table = _table(like.device, dtype, like.numel())
    return table.repeat(-(-like.numel() // _PERIOD))[: like.numel()].reshape(like.shape)


def product(gradient: Tensor) -> Tensor:
    """⟨gradient, direction⟩, in float64."""
    flat = (gradient.to_dense() if gradient.is_sparse else gradient).detach().reshape(-1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    table = _table(flat.device, wide, flat.numel())
    sum_dtype = wide_dtype(flat.device)
    whole = flat.numel() // _PERIOD * _PERIOD
    rest = (flat[whole:].to(wide) * table[: flat.numel() - whole]).sum(dtype=sum_dtype)
    return rest + (flat[:whole].to(wide).reshape(-1, _PERIOD) @ table).sum(dtype=sum_dtype) if whole else rest


def _table(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    """The entries that a tensor of a size has in use: at most one period."""
    return torch.arange(1, min(size, _PERIOD) + 1, device=device, dtype=wide_dtype(device)).cos().to(dtype)


class PassGradients:
    """The products of all gradients that come while it listens, by backward pass and parameter."""

    def __init__(self) -> None:
        self._of_task: dict[int, dict[Tensor, Tensor]] = {}

    def listen(self, parameters: Iterable[Tensor]) -> list[Any]:
        """Hook the parameters, of which complex ones have no rows; the handles remove the hooks."""
        return [
            p.register_hook(partial(self._receive, p)) for p in parameters if p.requires_grad and not p.is_complex()
        ]

    @torch.no_grad()
    def _receive(self, p: Tensor, gradient: Tensor) -> None:
        products = self._of_task.setdefault(graph_task_id(), {})
        products[p] = products[p] + product(gradient) if p in products else product(gradient)

    def products(self, tasks: Collection[int]) -> dict[Tensor, Tensor]:
        """The products of some backward passes together."""
        total: dict[Tensor, Tensor] = {}
        for task in tasks:
            for p, value in self._of_task.get(task, {}).items():
                total[p] = total[p] + value if p in total else value
        return total
