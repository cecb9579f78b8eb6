"""Averages over a step's draws: the gradient, and the statistic that the update rule wants beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vlearn.optim.draw import Slot

Contribution = tuple[Slot, Tensor, Tensor]  # rows of a parameter, their gradient, their statistic


class Average:
    """Sums over the draws of one step but the last, which `of` adds block by block without a copy."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def add(self, contributions: Iterable[Contribution]) -> None:
        """Count one whole draw, whose buffers go."""
        for slot, gradient, statistic in contributions:
            total, statistics = self._of_parameter(slot.parameter, gradient.dtype)
            slot.of(total).add_(gradient)
            slot.of(statistics).add_(statistic)
        self.count += 1

    def of(self, block: list[Slot], last: list[Contribution] | None) -> tuple[list[Slot], list[Tensor], list[Tensor]]:
        """(slots that have a gradient, their average gradients, their average statistics).

        Args:
            block: the slots.
            last: contributions of the last draw to them; None if every draw has been added.
        """
        now = {slot: (gradient, statistic) for slot, gradient, statistic in last or ()}
        if not self.count:
            return list(now), [g for g, _ in now.values()], [s for _, s in now.values()]
        count = self.count + (last is not None)
        slots, gradients, statistics = [], [], []
        for slot in block:
            if slot.parameter not in self._sums and slot not in now:
                continue
            # A draw in which this parameter had no gradient counts as zero.
            dtype = now[slot][0].dtype if slot in now else self._sums[slot.parameter][0].dtype
            total, statistic = (slot.of(tensor) for tensor in self._of_parameter(slot.parameter, dtype))
            if slot in now:
                total, statistic = total.add_(now[slot][0]), statistic.add_(now[slot][1])
            slots.append(slot)
            gradients.append(total.div_(count))
            statistics.append(statistic.div_(count))
        return slots, gradients, statistics

    def over_processes(self, parameters: list[Tensor], dtypes: list[torch.dtype]) -> None:
        """Average the sums over all processes; a parameter that none of them has a gradient for stays out."""
        processes = torch.distributed.get_world_size()
        present = torch.tensor([float(p in self._sums) for p in parameters], device=parameters[0].device)
        torch.distributed.all_reduce(present)
        for p, dtype, count in zip(parameters, dtypes, present.tolist(), strict=True):
            if count:
                for tensor in self._of_parameter(p, dtype):
                    torch.distributed.all_reduce(tensor)
                    tensor.div_(processes)

    def _of_parameter(self, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if p not in self._sums:
            self._sums[p] = (torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype))
        return self._sums[p]
