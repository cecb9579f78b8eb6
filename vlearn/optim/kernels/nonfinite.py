"""Finding gradients that are not finite, cheaply where all are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vlearn.optim.kernels.complex_pairs import as_real


def is_low_precision(tensor: Tensor) -> bool:
    """Whether a floating tensor has fewer than 32 bits, so that sums and states of it are kept in float32."""
    return torch.finfo(tensor.dtype).bits < 32


def first_nonfinite(gradients: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """The first parameter whose gradient has an infinite or NaN entry, from pairs of both."""
    given = [(p, as_real(g)) for p, g in gradients if g is not None]
    # A sum is finite only if every term is, and costs a twentieth of isfinite().all().
    sums = [g.sum(dtype=torch.float32 if is_low_precision(g) else None) for _, g in given]
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for total in sums:
        alike.setdefault((total.device, total.dtype), []).append(total)
    if all(math.isfinite(value) for same in alike.values() for value in torch.stack(same).tolist()):
        return None
    return next((p for p, g in given if not bool(g.isfinite().all())), None)
