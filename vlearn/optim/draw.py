"""One draw θ ~ q of the weights, and where the mean waits meanwhile.

Every parameter has one buffer of its own shape. While the draw is in the weights the buffer holds the
mean m; while the mean is in the weights the buffer holds θ. The mean is copied, never recomputed:
(m + n) - n differs from m in the last bit for 2% of float32 entries.

Parameters are cut into slots of rows and the slots gathered into blocks, which an update rule works
through in cache: over whole tensors its ten elementwise operations are ten trips to memory, over blocks
of 2**17 entries they are one, and temporaries never outgrow a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vlearn.optim.compiled import SMALLEST

CPU_BLOCK = 2**17  # entries; the best of 2**14 ... 2**20 on one and two threads
COMPILED_CPU_BLOCK = 2**20  # one kernel has no temporaries but the noise
ACCELERATOR_BLOCK = 2**25  # there it only bounds the temporaries


@dataclass(eq=False)
class Slot:
    """Some rows of one parameter: its weights, and the buffer that belongs to them.

    `mean_in_weights` says where the mean is. It is set so that an interrupt between any two lines of
    `show_mean` and `show_draw` leaves the mean in the place it names.
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
            self.weights.copy_(self.buffer)
            self.mean_in_weights = True
            self.buffer.copy_(sample)

    def show_draw(self) -> None:
        if self.mean_in_weights:
            sample = self.buffer.clone()
            self.buffer.copy_(self.weights)
            self.mean_in_weights = False
            self.weights.copy_(sample)

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
        has_gradient: whether a backward pass has reached a parameter under this draw.
        gradients: what `p.grad` was when the draw was finished by leaving its context.
    """

    origin: str
    blocks: list[tuple[int, list[Slot]]] = field(default_factory=list)
    active: bool = True
    has_gradient: bool = False
    gradients: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)

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
        self._show(draw=False)
        self.active = False

    def resume(self) -> None:
        """Put the draw back into the weights."""
        self.active = True
        self._show(draw=True)

    def drop(self) -> None:
        """Put the mean into the weights; the draw is not needed any more. Safe at any time."""
        self.active = False
        changed = self._not_showing(draw=False)
        for slot in self.slots:
            slot.drop_draw()
        mark_changed(changed)

    @contextmanager
    def at_mean(self) -> Iterator[None]:
        """The weights are the mean inside and the draw is not active; on any exit all is as before."""
        active = self.active
        try:
            self.active = False
            self.peek_mean()
            yield
        finally:
            self.active = active
            self.unpeek()

    def peek_mean(self) -> None:
        """Show the mean for a while. The version counters stay: the training graph finds its draw again."""
        for slot in self.slots:
            slot.show_mean()
        torch.clear_autocast_cache()

    def unpeek(self) -> None:
        """Put an active draw back."""
        if self.active:
            for slot in self.slots:
                slot.show_draw()
            torch.clear_autocast_cache()

    def samples(self) -> dict[Tensor, Tensor]:
        """θ of every parameter, as one tensor each."""
        return {p: slots[0].whole_buffer if slots[0].mean_in_weights else p.data for p, slots in self.slots_of.items()}

    def means(self) -> dict[Tensor, Tensor]:
        """The mean of every parameter, as one tensor each."""
        return {p: p.data if slots[0].mean_in_weights else slots[0].whole_buffer for p, slots in self.slots_of.items()}

    def reusable_buffers(self) -> dict[Tensor, Tensor]:
        """Buffers for another draw, where memory that is freed goes back to the system page by page: on the CPU."""
        return {p: slots[0].whole_buffer for p, slots in self.slots_of.items() if p.device.type == "cpu"}

    def _not_showing(self, draw: bool) -> list[Tensor]:
        return list(dict.fromkeys(s.parameter for s in self.slots if s.mean_in_weights is draw))

    def _show(self, draw: bool) -> None:
        changed = self._not_showing(draw)
        for slot in self.slots:
            slot.show_draw() if draw else slot.show_mean()
        mark_changed(changed)


def mark_changed(parameters: Iterable[Tensor]) -> None:
    """Tell autograd that weights were written through `.data`.

    A graph that was built on the old weights then refuses to run backward instead of giving the
    gradient at the wrong place; and autocast casts the weights anew.
    """
    parameters = list(parameters)
    if parameters:
        increment_version(parameters)
        torch.clear_autocast_cache()


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
        on_cpu = COMPILED_CPU_BLOCK if compiled else CPU_BLOCK
        limit = on_cpu if parameter.device.type == "cpu" else ACCELERATOR_BLOCK
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
