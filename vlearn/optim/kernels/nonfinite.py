"""Finding gradients that are not finite, cheaply where all are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vlearn.optim.kernels.entries import own_entries


def is_low_precision(tensor: Tensor) -> bool:
    """Whether a floating tensor has fewer than 32 bits, so that sums and states of it are kept in float32."""
    return torch.finfo(tensor.dtype).bits < 32


def first_nonfinite(gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """The first parameter whose gradient has an infinite or NaN entry, from pairs of both."""
    given = [(p, own_entries(g)) for p, g in gradients if g is not None]
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, g in given:
        alike.setdefault((g.device, g.dtype), []).append(g)
    if all(math.isfinite(total) for same in alike.values() for total in _totals(same)):
        return None
    return next((p for p, g in given if not bool(g.isfinite().all())), None)


def _totals(gradients: list[Tensor]) -> list[float]:
    """A number of each gradient that is finite if all its entries are, and otherwise is not."""
    first = gradients[0]
    if first.device.type == "cpu":  # a sum costs a twentieth of isfinite().all()
        totals = [g.sum(dtype=torch.float32 if is_low_precision(g) else None) for g in gradients]
    else:  # the largest entries, all in one call
        totals = torch._foreach_norm([g for g in gradients if g.numel()], torch.inf)
    return torch.stack(tuple(totals)).tolist() if totals else []
