"""One call of one module in a recorded pass: its inputs, and the gradients with respect to its outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vlearn.capture.rules import Rule
from vlearn.capture.tree import versions


@dataclass(eq=False)
class Use:
    """One call of one module whose parameters it covers.

    Attributes:
        module: the module, `path` its name in the model, for messages.
        call: which of the module's calls in the forward pass, from 0.
        parameters: those of the tracked parameters whose effect passes through this call.
        rule: how to bring it to rows, or None for the exact fallback.
        args, kwargs: the call's inputs, tensors detached.
        positions: which tensors of the output required grad.
        shapes: their shapes.
        cotangents: gradient of the backward pass with respect to each of those, None where it was not reached.
        outputs: their values with their versions: for the fallback, to check the recomputation against; elsewhere
            where they are cheap to keep, so that the deviation need not compute them again.
        of_constants: whether an input may have come from no example, though it has as many rows as there are.
        seen_by: of a call that all examples share (`vlearn.capture.shared`), the module that was given the sum, the
            number of its call and the shapes of its inputs; None elsewhere.
        per_example: of a part of the batch, which leaves of (args, kwargs) have a row for each example: another may
            be as long by chance. None elsewhere: those that are as long as the batch.
    """

    module: nn.Module
    path: str
    call: int
    parameters: list[Tensor]
    rule: Rule | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    positions: list[int]
    shapes: list[tuple[int, ...]]
    cotangents: list[Tensor | None]
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)
    of_constants: bool = False
    seen_by: tuple[nn.Module, int, tuple[tuple[int, ...], ...]] | None = None
    per_example: list[bool] | None = None

    def receive(self, position: int, gradient: Tensor) -> None:
        shape = self.shapes[position]
        accumulate(self.cotangents, position, gradient if gradient.shape == shape else gradient.reshape(shape))

    @property
    def input(self) -> Tensor:
        return self.args[0]

    @property
    def reached(self) -> bool:
        return any(cotangent is not None for cotangent in self.cotangents)

    @property
    def intact_output(self) -> Tensor | None:
        """The value of a use's single output, if it was kept and not written in place since."""
        if len(self.outputs) != 1:
            return None
        output, version = self.outputs[0]
        return output if output._version == version else None

    def check_unchanged(self) -> None:
        """Raises RuntimeError if an input was written in place after the call: a replay would see other values."""
        if versions((self.args, self.kwargs)) != self.versions:
            raise RuntimeError(
                f"{self.path} ({type(self.module).__name__}): its input was modified in place after its forward "
                "pass, so its per-example gradients cannot be formed: use an out-of-place operation there."
            )


def accumulate(cotangents: list[Tensor | None], position: int, gradient: Tensor) -> None:
    """Add what a backward pass brought to what has come there before."""
    earlier = cotangents[position]
    cotangents[position] = gradient.detach() if earlier is None else earlier + gradient.detach()
