"""One call of one module in a recorded pass: its inputs, and the gradients with respect to its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vlearn.capture.pytrees import versions
from vlearn.layers.example_axes import Axes
from vlearn.layers.example_rows import ExampleRows
from vlearn.layers.registry import Rule


@dataclass(eq=False)
class LayerCall:
    """One call of one module, with the parameters that it explains.

    Attributes:
        module: the module; `path` is its name in the model, for messages.
        number: which of the module's calls in the forward pass this is, from 0.
        parameters: those of the tracked parameters whose effect passes through this call.
        rule: how to bring the call to rows, or None for the exact fallback.
        args, kwargs: the call's inputs, tensors detached.
        versions: how often each input had been written in place.
        positions: which tensors of the output required grad.
        shapes: their shapes.
        cotangents: the gradient of the backward pass with respect to each of those, None where it was not reached.
        outputs: their values with their versions: for the fallback, to check the recomputation against; elsewhere
            where they are cheap to keep, so that the deviation need not compute them again.
        input_axes: along which axis of each leaf of (args, kwargs) the examples lie, None where along none; what sizes
            tell until `vlearn.per_example.measured_axes.find_example_axes` knows.
        output_axes: the same of each of those outputs.
        output_rows: where an index gives the examples (`Trace.example_rows`), which of them the rows of each of those
            outputs are of, None where there is one for each; what sizes tell until
            `vlearn.per_example.measured_rows.find_example_rows` knows. Elsewhere empty.
        input_may_not_depend_on_examples: whether an input may have come from no example, though it has as many rows
            as there are examples.
        consumer: of a call that all examples share (`vlearn.capture.broadcast_calls`), the module that was given the
            sum, the number of that module's call and the place of the sum among its inputs' tensors; None elsewhere.
        stand_in: of a call with a rule whose input may not depend on examples, the place in the trace of that around
            it that explains its parameters if so; inside: of that call, the places of those that it was made of.
        is_nested: whether some outputs are made of others, and the cotangents of these contain what came through those.
        random_state: of the generators as the call began, if it drew from them and no rule covers it.
        whole: of a subset of the batch (`RecordedPass.subset`), the call of all examples, and which of them it
            has; None elsewhere.
    """

    module: nn.Module
    path: str
    number: int
    parameters: list[Tensor]
    rule: Rule | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    positions: list[int]
    shapes: list[tuple[int, ...]]
    cotangents: list[Tensor | None]
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)
    input_axes: Axes = field(default_factory=list)
    output_axes: Axes = field(default_factory=list)
    output_rows: list[ExampleRows | None] = field(default_factory=list)
    input_may_not_depend_on_examples: bool = False
    consumer: tuple[nn.Module, int, int] | None = None
    stand_in: int | None = None
    inside: list[int] = field(default_factory=list)
    is_nested: bool = False
    random_state: dict[str, Tensor] | None = None
    whole: tuple[LayerCall, Tensor] | None = None

    def receive(self, position: int, gradient: Tensor | None) -> None:
        """Add the gradient of one output that a backward pass has brought; None is that of an output it did not use."""
        if gradient is None or _ignores_gradients.get():
            return
        shape = self.shapes[position]
        accumulate(self.cotangents, position, gradient if gradient.shape == shape else gradient.reshape(shape))

    @property
    def input(self) -> Tensor:
        """The single input of a call that has a rule."""
        return self.args[0]

    @property
    def rows(self) -> ExampleRows | None:
        """Of a call that has a rule, which examples its rows are of; None where there is one for each example."""
        return self.output_rows[0] if self.output_rows else None

    @property
    def cotangent_entries(self) -> int:
        """Entries of the gradient of one example's output."""
        return math.prod(self.shapes[0][1:]) * (1 if self.rows is None else self.rows.most)

    @property
    def reached(self) -> bool:
        """Whether a backward pass has come to any of the outputs."""
        return any(cotangent is not None for cotangent in self.cotangents)

    @property
    def intact_output(self) -> Tensor | None:
        """The value of the single output, if it was kept and not written in place since."""
        if len(self.outputs) != 1:
            return None
        output, version = self.outputs[0]
        return output if output._version == version else None

    def check_unchanged(self) -> None:
        """Raise RuntimeError if an input was written in place after the call: a replay would see other values."""
        if versions((self.args, self.kwargs)) != self.versions:
            raise RuntimeError(
                f"{self.path} ({type(self.module).__name__}): its input was modified in place after its forward "
                "pass, so its per-example gradients cannot be formed: use an out-of-place operation there."
            )

    def __str__(self) -> str:
        return f"{self.path} ({type(self.module).__name__})"


_ignores_gradients: ContextVar[bool] = ContextVar("_ignores_gradients", default=False)


@contextmanager
def gradients_ignored() -> Iterator[None]:
    """Inside, no recorded call takes the gradients that come to its outputs: they are not those of the user's loss."""
    before = _ignores_gradients.set(True)
    try:
        yield
    finally:
        _ignores_gradients.reset(before)


def accumulate(cotangents: list[Tensor | None], position: int, gradient: Tensor) -> None:
    """Add what a backward pass has brought to what has come there before."""
    earlier = cotangents[position]
    cotangents[position] = gradient.detach() if earlier is None else earlier + gradient.detach()
