"""Sums over what a step is made of: the passes under one draw, and the draws of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlearn.collectives import gathered
from vlearn.optim.kernels.entries import as_real
from vlearn.optim.sampling.blocks import ParameterSlice


class PassSums:
    """What a curvature estimate takes from the passes under one draw, summed over their examples.

    Attributes:
        count: the number of examples; 0 while no pass has been collected.
        reached: the parameters that recorded calls explain.
        problem: why a pass could not be.
    """

    def __init__(self) -> None:
        self._sums: dict[Any, Tensor] = {}
        self.count = 0
        self.reached: set[Tensor] = set()
        self.problem: Exception | None = None

    def add(self, sums: Mapping[Any, Tensor], count: int, reached: Iterable[Tensor]) -> None:
        """Add one more pass.

        Args:
            sums: by parameter, in its shape; further axes may follow. By any other key, of any shape.
            count: the number of its examples.
            reached: the parameters that its calls explain.
        """
        self.reached.update(reached)
        for key, total in sums.items():
            self._sums[key] = self._sums[key] + total if key in self._sums else total
        self.count += count

    def clear(self) -> None:
        """The gradients of all passes so far have been zeroed."""
        self._sums, self.count, self.problem = {}, 0, None
        self.reached = set()

    def mean(self, piece: ParameterSlice, like: Tensor) -> Tensor:
        """The average over the examples for some rows of a parameter; zero where no pass reached it.

        Args:
            like: what the rows of the state look like.
        """
        total = self._sums.get(piece.parameter)
        return torch.zeros_like(like) if total is None else piece.of(total).to(like.dtype) / self.count

    def layer_statistics(self) -> dict[Any, Tensor]:
        """Averages over the examples of what belongs to a layer and not to one parameter, by key."""
        return {key: total / self.count for key, total in self._sums.items() if not isinstance(key, Tensor)}


class Contribution(NamedTuple):
    """What one draw adds to the averages of a step, for some rows of a parameter.

    Attributes:
        piece: the rows.
        gradient: of the mean loss.
        curvature: the draw's curvature estimate, in the same shape; further axes may follow. None if it has none.
    """

    piece: ParameterSlice
    gradient: Tensor
    curvature: Tensor | None


class DrawAverage:
    """Sums over the draws of one step but the last, which `of` adds block by block without a copy.

    Attributes:
        count: the number of draws in the sums.
        layer_statistics: those of each draw that has them, by key.
    """

    def __init__(self) -> None:
        self.count = 0
        self.layer_statistics: dict[Any, list[Tensor]] = {}
        self._sums: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._trailing: tuple[int, ...] = ()  # axes of a curvature estimate after those of its parameter

    def add(self, contributions: Iterable[Contribution]) -> None:
        """Count one whole draw, whose buffers go."""
        for piece, gradient, curvature in contributions:
            if curvature is not None:
                self._trailing = tuple(curvature.shape[gradient.dim() :])
            total, curvatures = self._of_parameter(piece.parameter, gradient.dtype)
            piece.of(total).add_(gradient)
            if curvature is not None:
                piece.of(curvatures).add_(curvature)
        self.count += 1

    def add_layer_statistics(self, statistics: Mapping[Any, Tensor]) -> None:
        """Add those of one draw, by key."""
        for key, statistic in statistics.items():
            self.layer_statistics.setdefault(key, []).append(statistic)

    def of(
        self, slices: list[ParameterSlice], last: list[Contribution] | None
    ) -> tuple[list[ParameterSlice], list[Tensor], list[Tensor | None]]:
        """(slices that have a gradient, their average gradients, their average curvature estimates).

        Args:
            slices: those of one block.
            last: what the last draw contributes to them; None if every draw has been added.
        """
        now = {contribution.piece: contribution for contribution in last or ()}
        if not self.count:
            return list(now), [c.gradient for c in now.values()], [c.curvature for c in now.values()]
        count = self.count + (last is not None)
        present, gradients, curvatures = [], [], []
        for piece in slices:
            if piece.parameter not in self._sums and piece not in now:
                continue
            # A draw in which this parameter had no gradient counts as zero.
            dtype = now[piece].gradient.dtype if piece in now else self._sums[piece.parameter][0].dtype
            gradient, curvature = (piece.of(total) for total in self._of_parameter(piece.parameter, dtype))
            if piece in now:
                gradient = gradient.add_(now[piece].gradient)
                latest = now[piece].curvature
                curvature = curvature if latest is None else curvature.add_(latest)
            present.append(piece)
            gradients.append(gradient.div_(count))
            curvatures.append(curvature.div_(count))
        return present, gradients, curvatures

    def average_over_processes(
        self,
        parameters: list[Tensor],
        dtype_of: Callable[[Tensor], torch.dtype],
        names: Callable[[], dict[Tensor, str]],
        has_curvature: Callable[[Tensor], bool],
    ) -> None:
        """Average the sums over all processes; a parameter that none of them has a gradient for stays out.

        Args:
            has_curvature: of parameters for which it is false, curvature estimates are zero.
        Raises:
            RuntimeError: if a parameter is frozen in some processes only.
        """
        own = [*(p in self._sums for p in parameters), *(p.requires_grad for p in parameters)]
        rows = gathered(torch.tensor(own, dtype=torch.float32, device=parameters[0].device))
        present, trainable = rows.chunk(2, dim=1)  # [process, parameter]
        for p, flags in zip(parameters, trainable.unbind(1), strict=True):
            if len(flags.unique()) > 1:
                raise RuntimeError(
                    f"sync=True, but {names()[p]!r} is frozen in some processes only, so its mean would differ between "
                    "them: freeze it in all."
                )
        for p, flags in zip(parameters, present.unbind(1), strict=True):
            if bool(flags.any()):
                gradient, curvature = self._of_parameter(p, dtype_of(p))
                for tensor in (gradient, curvature) if has_curvature(p) else (gradient,):
                    torch.distributed.all_reduce(tensor)
                    tensor.div_(len(rows))

    def _of_parameter(self, p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if p not in self._sums:
            total = torch.zeros_like(as_real(p), dtype=dtype)
            further = total.new_zeros(*total.shape, *self._trailing) if self._trailing else torch.zeros_like(total)
            self._sums[p] = (total, further)
        return self._sums[p]
