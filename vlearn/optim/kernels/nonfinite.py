"""Finding gradients that are not finite, or not zero, cheaply where all are."""

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
    if all(_are_finite(by_dtype.values()) for by_dtype in _alike(g for _, g in given).values()):
        return None
    return next((p for p, g in given if not bool(g.isfinite().all())), None)


def are_zero(gradients: Iterable[Tensor]) -> bool:
    """Whether all entries are zero; on accelerators in one read for each device and dtype."""
    for by_dtype in _alike(map(own_entries, gradients)).values():
        for same in by_dtype.values():
            on_cpu = same[0].device.type == "cpu"
            if any(bool(g.any()) for g in same) if on_cpu else bool(torch.stack(_totals(same)).any()):
                return False
    return True


def _alike(gradients: Iterable[Tensor]) -> dict[torch.device, dict[torch.dtype, list[Tensor]]]:
    """Gradients that have entries, by device and dtype."""
    alike: dict[torch.device, dict[torch.dtype, list[Tensor]]] = {}
    for g in gradients:
        if g.numel():
            alike.setdefault(g.device, {}).setdefault(g.dtype, []).append(g)
    return alike


def _are_finite(alike: Iterable[list[Tensor]]) -> bool:
    """Whether all entries of gradients of one device are finite, in one read; they may seem not to be.

    Args:
        alike: gradients of one dtype each.
    """
    totals = [torch.stack(_totals(gradients)) for gradients in alike]
    widest = totals[0] if len(totals) == 1 else torch.cat([total.float() for total in totals])
    return all(map(math.isfinite, widest.tolist()))


def _totals(gradients: list[Tensor]) -> list[Tensor]:
    """A number of each gradient that is finite if all its entries are, and otherwise is not."""
    if gradients[0].device.type == "cpu":  # a sum costs a twentieth of isfinite().all()
        return [g.sum(dtype=torch.float32 if is_low_precision(g) else None) for g in gradients]
    return list(torch._foreach_norm(gradients, torch.inf))  # the largest entries, all in one call
