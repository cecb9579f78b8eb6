"""Averages over a step's draws: the gradient, and the statistic that the update rule wants beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlearn.optim.draw import Slot

Contribution = tuple[Slot, Tensor, Tensor]  # rows of a parameter, their gradient, their statistic


class Average:
    """Sums over the draws of one step but the last, which `of` adds block by block without a copy."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._trailing: tuple[int, ...] = ()  # axes of a statistic after those of its parameter
        self.joint: dict[Any, list[Tensor]] = {}  # each draw's statistics that are not of one parameter, by key

    def add(self, contributions: Iterable[Contribution]) -> None:
        """Count one whole draw, whose buffers go."""
        for slot, gradient, statistic in contributions:
            self._trailing = tuple(statistic.shape[gradient.dim() :])
            total, statistics = self._of_parameter(slot.parameter, gradient.dtype)
            slot.of(total).add_(gradient)
            slot.of(statistics).add_(statistic)
        self.count += 1

    def add_joint(self, statistics: Mapping[Any, Tensor]) -> None:
        """A draw's statistics that are not of one parameter, by key."""
        for key, statistic in statistics.items():
            self.joint.setdefault(key, []).append(statistic)

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

    def over_processes(
        self,
        parameters: list[Tensor],
        dtype_of: Callable[[Tensor], torch.dtype],
        names: Callable[[], dict[Tensor, str]],
        has_statistic: Callable[[Tensor], bool],
    ) -> None:
        """Average the sums over all processes; a parameter that none of them has a gradient for stays out.

        Args:
            has_statistic: of parameters for which it is false, statistics are zero.
        Raises:
            RuntimeError: if a parameter is frozen in some processes only.
        """
        own = [*(p in self._sums for p in parameters), *(p.requires_grad for p in parameters)]
        mine = torch.tensor(own, dtype=torch.float32, device=parameters[0].device)
        gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, mine)
        present, moving = torch.stack(gathered).cpu().chunk(2, dim=1)  # [process, parameter]
        for p, there in zip(parameters, moving.unbind(1), strict=True):
            if len(there.unique()) > 1:
                raise RuntimeError(
                    f"sync=True, but {names()[p]!r} is frozen in some processes only, so its mean would differ between "
                    "them: freeze it in all."
                )
        for p, there in zip(parameters, present.unbind(1), strict=True):
            if bool(there.any()):
                gradient, statistic = self._of_parameter(p, dtype_of(p))
                for tensor in (gradient, statistic) if has_statistic(p) else (gradient,):
                    torch.distributed.all_reduce(tensor)
                    tensor.div_(len(gathered))

    def _of_parameter(self, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if p not in self._sums:
            total = torch.zeros_like(p, dtype=dtype)
            further = total.new_zeros(*p.shape, *self._trailing) if self._trailing else torch.zeros_like(total)
            self._sums[p] = (total, further)
        return self._sums[p]


def worst(code: int, at_step: bool, device: torch.device, group: Any) -> int:
    """The greatest code of all processes of a group, for a decision that they must take alike.

    Raises:
        RuntimeError: if some processes are at `step()` and others begin another draw.
    """
    mine = torch.tensor([code, at_step], dtype=torch.float32, device=device)
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, mine, group=group)
    codes, places = torch.stack(gathered).cpu().int().unbind(1)
    if len(places.unique()) > 1:
        raise RuntimeError(
            "some processes are at step() while others begin another draw for it: enter "
            "sampled_params(train=True) equally often in all of them."
        )
    return int(codes.max())
