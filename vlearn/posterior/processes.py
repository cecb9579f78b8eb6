"""What the processes that fit one posterior together have summed up, each of its own share of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlearn.collectives import summed
from vlearn.linearized.processes import Kind, Processes


class Key(NamedTuple):
    """What a sum is of: its name, and the places of its parameters among those that are fitted."""

    name: str
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    """What one process has gone through in a round.

    Attributes:
        count: of its examples.
        names: of the parameters that are fitted; None where only a batch would tell.
        sums: the shape and dtype of each sum.
        curves: whether any of its examples had curvature.
    """

    count: int
    names: tuple[str, ...] | None
    sums: dict[Key, Kind]
    curves: bool


class FitProcesses(Processes):
    """The processes of one fit, see `Processes`."""

    def __init__(self, model: nn.Module, sync: bool):
        super().__init__(model, sync, "fit")

    def summed(self, own: Mapping[Key, Tensor], shares: list[Share], device: torch.device) -> dict[Key, Tensor]:
        """The sums of all processes, in the same order in each; what a process has not is zero there.

        Args:
            own: this one's.
            shares: what all have.
            device: of what it has not.
        Raises:
            ValueError: if they have different things under one key, in all processes.
        """
        if self.group is None:
            return dict(own)
        kinds: dict[Key, Kind] = {}
        for key, kind in (item for share in shares for item in share.sums.items()):
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(
                    f"the processes have {kinds[key]} and {kind} for {key.name}: give all batches of the same kind."
                )
        return {
            key: summed([own[key] if key in own else torch.zeros(shape, dtype=dtype, device=device)], self.group)[0]
            for key, (shape, dtype) in kinds.items()
        }
