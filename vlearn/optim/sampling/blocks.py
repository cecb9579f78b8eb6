"""Parameters cut into slices of rows, and the slices gathered into blocks that an update works through in cache.

Over whole tensors the ten elementwise operations of an update are ten trips to memory, over blocks of 2**20 entries
they are one, and temporaries never outgrow a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlearn.optim.kernels.compiled import SMALLEST, SMALLEST_ON_ACCELERATOR
from vlearn.optim.kernels.entries import address, own_entries
from vlearn.optim.kernels.multi_tensor import copied
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.sharded.tensors import placement

# Entries. On one thread 2**18 is a tenth faster, but on several every operation waits for all of them: where other
# processes want the cores too, blocks of 2**17 took three times as long as these.
CPU_BLOCK = 2**20
ACCELERATOR_BLOCK = 2**25  # there it only bounds the temporaries


@dataclass(eq=False)
class ParameterSlice:
    """Some rows of one parameter: its weights, and the buffer that holds the mean while the draw is in the weights.

    Attributes:
        weights: the rows of this process's part of `parameter.data`, whatever storage that has; see `follow_storage`.
        mean_in_weights: where the mean is. It is set so that an interrupt after any copy of `swap_in_means` and
            `swap_in_draws` leaves the mean in the place it names and the draw in the other.
        coordinates: draw - mean in the structure's basis, where it keeps that for the curvature estimate.
    """

    parameter: Tensor
    weights: Tensor
    buffer: Tensor
    whole_buffer: Tensor
    rows: tuple[int, int] | None = None
    mean_in_weights: bool = True
    coordinates: Tensor | None = None

    def __post_init__(self) -> None:
        self._storage = address(self.parameter)

    def follow_storage(self) -> None:
        """Look for the rows where the parameter has them now: the user may have replaced `p.data` since.

        A tensor of another shape is left alone, as nothing of this draw fits it.
        """
        storage = address(self.parameter)
        if storage != self._storage and self.has_shape:
            self.weights, self._storage = self.of(self.parameter.data), storage

    @property
    def has_shape(self) -> bool:
        """Whether the parameter has the shape that it had."""
        return own_entries(self.parameter.data).shape == self.whole_buffer.shape

    @property
    def mean(self) -> Tensor:
        """The mean of these rows, wherever it is."""
        return self.weights if self.mean_in_weights else self.buffer

    @property
    def draw(self) -> Tensor:
        """The draw of these rows, wherever it is."""
        return self.buffer if self.mean_in_weights else self.weights

    @property
    def is_first(self) -> bool:
        """Whether these are the first rows of the parameter."""
        return self.rows is None or self.rows[0] == 0

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor of the parameter's shape, as a view; of a complex one as pairs of reals."""
        tensor = own_entries(tensor)
        return tensor if self.rows is None else tensor.narrow(0, *self.rows)

    def exact_mean(self, parameters: Parameters) -> Tensor:
        """The mean in the precision of the state: rows of the master copy, where the weights have one."""
        master = parameters.master_copy(self.parameter)
        return self.mean if master is None else self.of(master)


class SliceBlock(NamedTuple):
    """Slices of one group, with its settings, of one device, dtype and sharding; all have a prior, or none."""

    group: Group
    slices: list[ParameterSlice]


def keep_means(slices: list[ParameterSlice]) -> None:
    """Copy the means into the buffers, so that the weights may be overwritten by a draw."""
    torch._foreach_copy_([piece.buffer for piece in slices], [piece.weights for piece in slices])
    _mark(slices, mean_in_weights=False)


def swap_in_means(slices: list[ParameterSlice]) -> None:
    """Put the means into the weights and the draws into the buffers."""
    _swap([piece for piece in _where_they_are(slices) if not piece.mean_in_weights])


def swap_in_draws(slices: list[ParameterSlice]) -> None:
    """Put the draws into the weights and the means into the buffers."""
    _swap([piece for piece in _where_they_are(slices) if piece.mean_in_weights])


def discard_draws(slices: list[ParameterSlice]) -> None:
    """Put the means into the weights; the draws are lost."""
    drawn = [piece for piece in _where_they_are(slices) if not piece.mean_in_weights]
    if drawn:
        torch._foreach_copy_([piece.weights for piece in drawn], [piece.buffer for piece in drawn])
        _mark(drawn, mean_in_weights=True)


def _where_they_are(slices: list[ParameterSlice]) -> list[ParameterSlice]:
    for piece in slices:
        piece.follow_storage()
    return slices


def _swap(slices: list[ParameterSlice]) -> None:
    """Exchange weights and buffers, all of which have the mean on the same side."""
    if not slices:
        return
    mean_in_weights = slices[0].mean_in_weights
    draws = copied([piece.draw for piece in slices], slices[0].weights.dtype)
    try:
        torch._foreach_copy_([piece.draw for piece in slices], [piece.mean for piece in slices])
        _mark(slices, mean_in_weights=not mean_in_weights)
    finally:
        torch._foreach_copy_([piece.draw for piece in slices], draws)


def _mark(slices: list[ParameterSlice], mean_in_weights: bool) -> None:
    for piece in slices:
        piece.mean_in_weights = mean_in_weights


def partition(
    parameters: Iterable[Tensor], buffers: dict[Tensor, Tensor], compiled: bool, is_whole: Callable[[Tensor], bool]
) -> Iterator[list[ParameterSlice]]:
    """Slices of parameters, gathered into blocks of one device and dtype, and alike in how they are sharded.

    Args:
        parameters: in the order of the blocks.
        buffers: scratch buffers to reuse, by parameter; matching ones are removed from the dict.
        compiled: give each slice that is large enough for a kernel of its own a block of its own.
        is_whole: whether a parameter is never cut, however large it is.
    """
    open_block: list[ParameterSlice] = []
    filled = 0
    for parameter in parameters:
        on_cpu = parameter.device.type == "cpu"
        limit = CPU_BLOCK if on_cpu else ACCELERATOR_BLOCK
        whole = is_whole(parameter)
        for piece in _slices(parameter, buffers.pop(parameter, None), parameter.numel() if whole else limit):
            size = piece.weights.numel()
            if compiled and size >= (SMALLEST if on_cpu else SMALLEST_ON_ACCELERATOR):
                yield [piece]
                continue
            if open_block and (filled + size > limit or not _fits(open_block[0], piece)):
                yield open_block
                open_block, filled = [], 0
            open_block.append(piece)
            filled += size
    if open_block:
        yield open_block


def _slices(parameter: Tensor, buffer: Tensor | None, limit: int) -> Iterator[ParameterSlice]:
    data = own_entries(parameter.data)
    if buffer is None or buffer.shape != data.shape or buffer.stride() != data.stride() or not _alike(buffer, data):
        buffer = torch.empty_like(data)
    if data.numel() <= limit or data.dim() == 0:
        yield ParameterSlice(parameter, data, buffer, buffer)
        return
    count = data.shape[0]
    step = max(1, limit // (data.numel() // count))
    for start in range(0, count, step):
        rows = (start, min(step, count - start))
        yield ParameterSlice(parameter, data.narrow(0, *rows), buffer.narrow(0, *rows), buffer, rows)


def _fits(first: ParameterSlice, piece: ParameterSlice) -> bool:
    return _alike(first.weights, piece.weights) and placement(first.parameter) == placement(piece.parameter)


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and left.dtype == right.dtype
