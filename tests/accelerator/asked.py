"""What the tests of this room ask about examples."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import vlearn


def about_examples(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Every tensor that the live rows of the last pass, a sweep, influences and a group's removal give, on the CPU."""
    told = (model, optimizer.posterior())
    asked = (
        optimizer.sensitivities(deviation=True),
        vlearn.sweep(*told, batches, F.cross_entropy, leverage="exact", progress=False),
        vlearn.influence(*told, batches, batches[:1], F.cross_entropy, progress=False),
        vlearn.leave_group_out(*told, batches, {"a": [1, 9]}, F.cross_entropy, progress=False),
    )
    found = [value for result in asked for value in vars(result).values() if isinstance(value, Tensor)]
    assert len(found) > 12
    return [value.cpu().double() for value in found]
