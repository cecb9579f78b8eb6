"""What an update rule takes from the captures of the training passes under one draw, summed over their examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlearn.optim.draw import Slot


class Captured:
    """Sums over the examples of the passes under one draw.

    Attributes:
        count: number of examples; 0 while no pass has been collected.
        problem: why a pass could not be.
    """

    def __init__(self) -> None:
        self._sums: dict[Any, Tensor] = {}
        self.count = 0
        self.problem: Exception | None = None

    def add(self, sums: Mapping[Any, Tensor], count: int) -> None:
        """One more pass.

        Args:
            sums: by parameter, in its shape; further axes may follow. By any other key, of any shape.
            count: number of its examples.
        """
        for p, found in sums.items():
            self._sums[p] = self._sums[p] + found if p in self._sums else found
        self.count += count

    def clear(self) -> None:
        """The gradients of all passes so far have been zeroed."""
        self._sums, self.count, self.problem = {}, 0, None

    def mean(self, slot: Slot, like: Tensor) -> Tensor:
        """Average over the examples for some rows of a parameter; zero where no pass reached it.

        Args:
            like: what the rows of the state look like.
        """
        found = self._sums.get(slot.parameter)
        return torch.zeros_like(like) if found is None else slot.of(found).to(like.dtype) / self.count

    def joint(self) -> dict[Any, Tensor]:
        """Averages over the examples of what is not of one parameter, by key."""
        return {key: found / self.count for key, found in self._sums.items() if not isinstance(key, Tensor)}
