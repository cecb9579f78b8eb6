"""One draw θ ~ q of the weights, and where the mean waits meanwhile.

Every parameter has one buffer of its own shape. While the draw is in the weights the buffer holds the
mean m; while the mean is in the weights the buffer holds θ. The mean is copied, never recomputed:
(m + n) - n differs from m in the last bit for 2% of float32 entries.

Parameters are cut into slots of rows and the slots gathered into blocks, which an update rule works
through in cache: over whole tensors its ten elementwise operations are ten trips to memory, over blocks
of 2**20 entries they are one, and temporaries never outgrow a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vlearn.optim.compiled import SMALLEST

if TYPE_CHECKING:
    from vlearn.optim.captured import Captured
    from vlearn.optim.local import LocalGradients

# Entries. On one thread 2**18 is a tenth faster, but on several every operation waits for all of them: where other
# processes want the cores too, blocks of 2**17 took three times as long as these.
CPU_BLOCK = 2**20
ACCELERATOR_BLOCK = 2**25  # there it only bounds the temporaries


@dataclass(eq=False)
class Slot:
    """Some rows of one parameter: its weights, and the buffer that belongs to them.

    `mean_in_weights` says where the mean is. It is set so that an interrupt after any copy of `show_mean` and
    `show_draw` leaves the mean in the place it names and the draw in the other.
    """

    parameter: Tensor
    weights: Tensor
    buffer: Tensor
    whole_buffer: Tensor
    rows: tuple[int, int] | None = None
    mean_in_weights: bool = True

    @property
    def mean(self) -> Tensor:
        return self.weights if self.mean_in_weights else self.buffer

    @property
    def sample(self) -> Tensor:
        return self.buffer if self.mean_in_weights else self.weights

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor of the parameter's shape, as a view."""
        return tensor if self.rows is None else tensor.narrow(0, *self.rows)

    def show_mean(self) -> None:
        if not self.mean_in_weights:
            sample = self.weights.clone()
            try:
                self.weights.copy_(self.buffer)
                self.mean_in_weights = True
            finally:
                self.sample.copy_(sample)

    def show_draw(self) -> None:
        if self.mean_in_weights:
            sample = self.buffer.clone()
            try:
                self.buffer.copy_(self.weights)
                self.mean_in_weights = False
            finally:
                self.sample.copy_(sample)

    def drop_draw(self) -> None:
        if not self.mean_in_weights:
            self.weights.copy_(self.buffer)
            self.mean_in_weights = True


@dataclass(eq=False)
class Draw:
    """A draw of every parameter that an optimizer moves.

    Attributes:
        origin: "automatic" (a training forward of a watched model), "train" (`optimizer.train()`),
            "context" (`sampled_params(train=True)`), "closure" (`step(closure)`) or "ensemble"
            (`sampled_params()`).
        blocks: (index of the parameter group, slots of one device and dtype).
        active: whether the draw is, or is to be put back, in the weights.
        mean_shown: whether the mean is in the weights, or an interrupt may have left it in some of them.
        dropped: whether nobody waits for the draw any more.
        has_gradient: whether a backward pass has reached a parameter under this draw.
        gradients: what `p.grad` was when the draw was finished by leaving its context.
        local: this process's own gradients, where several processes have draws of their own.
        captured: what the update rule takes from the captures of the passes under this draw, if it wants them.
    """

    origin: str
    blocks: list[tuple[int, list[Slot]]] = field(default_factory=list)
    active: bool = True
    mean_shown: bool = False
    dropped: bool = False
    has_gradient: bool = False
    gradients: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)
    local: LocalGradients | None = None
    captured: Captured | None = None
    _versions: dict[Tensor, int] = field(default_factory=dict)  # of the parameters, before the mean was shown

    @property
    def slots(self) -> Iterator[Slot]:
        return (slot for _, block in self.blocks for slot in block)

    @cached_property
    def slots_of(self) -> dict[Tensor, list[Slot]]:
        """The slots of each parameter, once all are made."""
        found: dict[Tensor, list[Slot]] = {}
        for slot in self.slots:
            found.setdefault(slot.parameter, []).append(slot)
        return found

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.slots_of)

    def finish(self) -> None:
        """Put the mean into the weights and keep the draw in the buffers."""
        if self.active:
            self.peek_mean()
            mark_changed(self.parameters)
            self.active = False

    def resume(self) -> None:
        """Put the draw back into the weights."""
        if not self.active:
            mark_changed(self.parameters)
            self.active = True
        self.unpeek()

    def drop(self) -> None:
        """Put the mean into the weights; the draw is not needed any more. Safe at any time."""
        self.dropped = self.mean_shown = True
        changed = self.parameters if self.active else []
        try:
            self._drop_slots()
        except BaseException:  # an interrupt comes once, and nobody may be left to call this again
            self._drop_slots()
            raise
        finally:
            self.active = False
            mark_changed(changed)
            if self.local is not None:
                self.local.remove()

    def _drop_slots(self) -> None:
        for slot in self.slots:
            slot.drop_draw()

    @contextmanager
    def at_mean(self) -> Iterator[None]:
        """The weights are the mean inside and the draw is not active; on any exit all is as before."""
        active = self.active
        try:
            self.active = False
            self.peek_mean()
            yield
        finally:
            self.active = active and not self.dropped
            self.unpeek()

    def peek_mean(self) -> None:
        """Show the mean for a while, during which the training graph refuses to run backward."""
        if not self.mean_shown:
            self._versions = {p: p._version for p in self.parameters}
            self.mean_shown = True
            increment_version(self.parameters)
        for slot in self.slots:
            slot.show_mean()
        torch.clear_autocast_cache()

    def unpeek(self) -> None:
        """Put an active draw back, with the version counters that the training graph knows."""
        if self.active and self.mean_shown and not self.dropped:
            for slot in self.slots:
                slot.show_draw()
            torch.clear_autocast_cache()
            _take_back(self._versions)
            self.mean_shown = False

    def samples(self) -> dict[Tensor, Tensor]:
        """θ of every parameter, as one tensor each."""
        return {p: slots[0].whole_buffer if slots[0].mean_in_weights else p.data for p, slots in self.slots_of.items()}

    def means(self) -> dict[Tensor, Tensor]:
        """The mean of every parameter, as one tensor each."""
        return {p: p.data if slots[0].mean_in_weights else slots[0].whole_buffer for p, slots in self.slots_of.items()}

    def reusable_buffers(self) -> dict[Tensor, Tensor]:
        """Buffers for another draw, where memory that is freed goes back to the system page by page: on the CPU."""
        return {p: slots[0].whole_buffer for p, slots in self.slots_of.items() if p.device.type == "cpu"}


def mark_changed(parameters: Iterable[Tensor]) -> None:
    """Tell autograd that weights were written through `.data`.

    A graph that was built on the old weights then refuses to run backward instead of giving the
    gradient at the wrong place; and autocast casts the weights anew.
    """
    parameters = list(parameters)
    if parameters:
        increment_version(parameters)
        torch.clear_autocast_cache()


def _take_back(versions: dict[Tensor, int]) -> None:
    """Undo one increment where nothing else has been written since: the tensor is as it was at that version."""
    same = {p: version for p, version in versions.items() if p._version == version + 1}
    torch._C._autograd._unsafe_set_version_counter(tuple(same), tuple(same.values()))  # pyright: ignore


def blocks(parameters: Iterable[Tensor], buffers: dict[Tensor, Tensor], compiled: bool) -> Iterator[list[Slot]]:
    """Slots in blocks of one device and dtype.

    Args:
        parameters: in the order of the blocks.
        buffers: by parameter; those that fit are used up.
        compiled: give each slot that is large enough for a kernel of its own a block of its own.
    """
    open_block: list[Slot] = []
    filled = 0
    for parameter in parameters:
        limit = CPU_BLOCK if parameter.device.type == "cpu" else ACCELERATOR_BLOCK
        for slot in _slots(parameter, buffers.pop(parameter, None), limit):
            size = slot.weights.numel()
            if compiled and size >= SMALLEST:
                yield [slot]
                continue
            if open_block and (filled + size > limit or not _alike(open_block[0].weights, slot.weights)):
                yield open_block
                open_block, filled = [], 0
            open_block.append(slot)
            filled += size
    if open_block:
        yield open_block


def _slots(parameter: Tensor, buffer: Tensor | None, limit: int) -> Iterator[Slot]:
    data = parameter.data
    if buffer is None or buffer.shape != data.shape or buffer.stride() != data.stride() or not _alike(buffer, data):
        buffer = torch.empty_like(data)
    if parameter.numel() <= limit or parameter.dim() == 0:
        yield Slot(parameter, data, buffer, buffer)
        return
    count = parameter.shape[0]
    step = max(1, limit // (parameter.numel() // count))
    for start in range(0, count, step):
        rows = (start, min(step, count - start))
        yield Slot(parameter, data.narrow(0, *rows), buffer.narrow(0, *rows), buffer, rows)


def _alike(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and left.dtype == right.dtype
