"""One draw θ ~ q of the weights, its life, and where the mean waits meanwhile.

Every parameter has one buffer of its own shape. While the draw is in the weights the buffer holds the
mean m; while the mean is in the weights the buffer holds θ. The mean is copied, never recomputed:
(m + n) - n differs from m in the last bit for 2% of float32 entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from torch import Tensor
from torch.autograd.graph import increment_version

from vlearn._torch_internals import set_versions
from vlearn.optim.distributed.local_gradients import LocalGradients
from vlearn.optim.kernels.entries import like
from vlearn.optim.sampling.accumulator import PassSums
from vlearn.optim.sampling.blocks import (
    ParameterSlice,
    SliceBlock,
    discard_draws,
    swap_in_draws,
    swap_in_means,
)
from vlearn.optim.sampling.noise import Noise
from vlearn.sharded.tensors import placed_as


class DrawState(Enum):
    """Where a draw is in its life; `TRANSITIONS` has the steps that it may take."""

    ACTIVE = "the weights are the draw"
    SUSPENDED = "the weights are the mean, or an interrupt left some of them so, until `restore`"
    FINISHED = "the weights are the mean, and the draw waits for step()"
    DISCARDED = "the weights are the mean, and step() may not use the draw any more"


TRANSITIONS = {
    DrawState.ACTIVE: {DrawState.SUSPENDED, DrawState.DISCARDED},
    DrawState.SUSPENDED: {DrawState.ACTIVE, DrawState.FINISHED, DrawState.DISCARDED},
    DrawState.FINISHED: {DrawState.SUSPENDED, DrawState.DISCARDED},
    DrawState.DISCARDED: {DrawState.DISCARDED},
}


class Origin(Enum):
    """What has made a draw."""

    AUTOMATIC = "a training forward pass"
    TRAIN = "train()"
    CONTEXT = "sampled_params(train=True)"
    CLOSURE = "step(closure)"
    ENSEMBLE = "sampled_params()"


@dataclass(eq=False)
class Draw:
    """A draw of every parameter that an optimizer moves.

    Attributes:
        origin: what has made it.
        noise: where its random numbers come from, and those of the passes under it.
        blocks: the slices of its parameters.
        state: where it is in its life.
        has_gradient: whether a backward pass has reached a parameter under this draw.
        gradients: what `p.grad` and its version were when the draw was finished by leaving its context.
        local_gradients: this process's own gradients, where several processes have draws of their own.
        pass_sums: what the curvature estimate has taken from the passes under this draw, if it wants any.
        weights_changed: called when draw or mean have been written into the weights of these parameters.
        first_node: the number of the first node of an autograd graph that can have read the draw; None where no graph
            can have been begun before it.
    """

    origin: Origin
    noise: Noise
    blocks: list[SliceBlock] = field(default_factory=list)
    state: DrawState = DrawState.ACTIVE
    has_gradient: bool = False
    gradients: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)
    local_gradients: LocalGradients | None = None
    pass_sums: PassSums | None = None
    weights_changed: Callable[[list[Tensor]], None] = lambda parameters: None
    first_node: int | None = None
    _versions: dict[Tensor, int] = field(default_factory=dict)  # of the parameters, before the mean was swapped in
    _written: dict[Tensor, int] = field(default_factory=dict)  # their versions when the draw was put into them

    @property
    def slices(self) -> Iterator[ParameterSlice]:
        """All slices, block by block."""
        return (piece for block in self.blocks for piece in block.slices)

    @cached_property
    def slices_of(self) -> dict[Tensor, list[ParameterSlice]]:
        """The slices of each parameter, once all are made."""
        slices_of: dict[Tensor, list[ParameterSlice]] = {}
        for piece in self.slices:
            slices_of.setdefault(piece.parameter, []).append(piece)
        return slices_of

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are drawn."""
        return list(self.slices_of)

    @property
    def is_automatic(self) -> bool:
        """Whether later training forward passes of the same step share the draw."""
        return self.origin in (Origin.AUTOMATIC, Origin.TRAIN)

    def finish(self) -> None:
        """Put the mean into the weights and keep the draw in the buffers."""
        if self.state in (DrawState.ACTIVE, DrawState.SUSPENDED):
            self.suspend()
            self.mark_changed()
            self._enter(DrawState.FINISHED)

    def resume(self) -> None:
        """Put the draw back into the weights."""
        if self.state is DrawState.FINISHED:
            self.mark_changed()
            self._enter(DrawState.SUSPENDED)
        self.restore()

    def discard(self) -> None:
        """Put the mean into the weights; the draw is not needed any more. Safe at any time."""
        was_active = self.state in (DrawState.ACTIVE, DrawState.SUSPENDED)
        self._enter(DrawState.DISCARDED)
        try:
            self._discard_slices()
        except BaseException:  # an interrupt comes once, and nobody may be left to call this again
            self._discard_slices()
            raise
        finally:
            if was_active:
                self.mark_changed()
            if self.local_gradients is not None:
                self.local_gradients.remove()

    def _discard_slices(self) -> None:
        for block in self.blocks:
            discard_draws(block.slices)

    @contextmanager
    def at_mean(self) -> Iterator[None]:
        """The weights are the mean inside and the draw counts as finished; on any exit all is as before."""
        was_active = self.state in (DrawState.ACTIVE, DrawState.SUSPENDED)
        try:
            if was_active:
                self.suspend()
                self._enter(DrawState.FINISHED)
            yield
        finally:
            if was_active and self.state is DrawState.FINISHED:
                self._enter(DrawState.SUSPENDED)
            self.restore()

    def suspend(self) -> None:
        """Show the mean for a while, during which the training graph refuses to run backward."""
        if self.state is DrawState.ACTIVE:
            self._versions = {p: p._version for p in self.parameters}
            self._enter(DrawState.SUSPENDED)
            increment_version(self.parameters)
        for block in self.blocks:
            swap_in_means(block.slices)
        self.weights_changed(self.parameters)

    def restore(self) -> None:
        """Put a suspended draw back, with the version counters that the training graph knows."""
        if self.state is DrawState.SUSPENDED:
            for block in self.blocks:
                swap_in_draws(block.slices)
            self.weights_changed(self.parameters)
            _take_back(self._versions)
            self._enter(DrawState.ACTIVE)
            for p, version in self._versions.items():
                if self._written.get(p) == version:  # what has been written since was vlearn's own
                    self._written[p] = p._version

    def mark_changed(self) -> None:
        """Tell autograd that weights were written through `.data`.

        A graph that was built on the old weights then refuses to run backward instead of giving the
        gradient at the wrong place; and copies of the weights are made anew.
        """
        parameters = self.parameters
        if parameters:
            increment_version(parameters)
            self.weights_changed(parameters)

    def note_versions(self) -> None:
        """Remember how often each parameter has been written, now that the draw is in them."""
        self._written = {p: p._version for p in self.parameters}

    def overwritten(self) -> Tensor | None:
        """A parameter that was written in place since the draw was put into it; None if there is none."""
        return next((p for p, version in self._written.items() if p._version != version), None)

    def is_intact(self, p: Tensor) -> bool:
        """Whether a parameter has not been written since the draw was put into it, as far as autograd knows."""
        version = p._version if self.state is DrawState.ACTIVE else self._versions.get(p)
        return version == self._written.get(p)

    def follow_storage(self) -> None:
        """Look for all weights where the parameters have them now.

        Raises:
            RuntimeError: if a parameter has another shape.
        """
        for piece in self.slices:
            if not piece.has_shape:
                raise RuntimeError(
                    f"p.data of a parameter of shape {tuple(piece.whole_buffer.shape)} was replaced by a tensor of "
                    f"shape {tuple(piece.parameter.shape)} while a draw waits for step(): replace it after step()."
                )
            piece.follow_storage()

    def samples(self) -> dict[Tensor, Tensor]:
        """θ of every parameter, as one tensor each."""
        return {p: like(p, s[0].whole_buffer) if s[0].mean_in_weights else p.data for p, s in self.slices_of.items()}

    def means(self) -> dict[Tensor, Tensor]:
        """The mean of every parameter, as one tensor each."""
        return {p: p.data if s[0].mean_in_weights else like(p, s[0].whole_buffer) for p, s in self.slices_of.items()}

    def gradient_of(self, p: Tensor) -> Tensor | None:
        """The gradient of a parameter under this draw: what `p.grad` holds, or held as the context was left."""
        if not p.requires_grad:
            return None
        if p.grad is not None:
            return p.grad
        kept = self.gradients.get(p)
        return None if kept is None else kept[0]

    def place_gradients(self) -> None:
        """Spread the gradients of distributed parameters over the processes as these are."""
        for p in self.parameters:
            if p.grad is not None and (placed := placed_as(p, p.grad)) is not p.grad:
                p.grad = placed

    def keep_gradients(self) -> None:
        """Remember the gradients that the parameters have now."""
        self.place_gradients()
        self.gradients = {p: (p.grad, p.grad._version) for p in self.parameters if p.grad is not None}

    def reusable_buffers(self) -> dict[Tensor, Tensor]:
        """Buffers for another draw, where memory that is freed goes back to the system page by page: on the CPU."""
        return {p: slices[0].whole_buffer for p, slices in self.slices_of.items() if p.device.type == "cpu"}

    def _enter(self, state: DrawState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"a draw cannot go from {self.state.name} to {state.name}")
        self.state = state


def _take_back(versions: dict[Tensor, int]) -> None:
    """Undo one increment where nothing else has been written since: the tensor is as it was at that version."""
    set_versions({p: version for p, version in versions.items() if p._version == version + 1})
