"""Another gradient of the model's output, sent back through the graph just before the loss's own uses it up.

The hook on the output runs as the user's backward pass begins: the graph is whole, the output's gradient is known,
and a second backward pass started there reaches every recorded use. Weight gradients are not computed. Hooks that the
user has put on activations run in this pass too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from vlearn.capture.use import Use

if TYPE_CHECKING:
    from vlearn.capture.trace import Trace

End = tuple[Use, int, GradientEdge | None]  # an output of a use, and its place in the graph; None: the model's output


class Probe:
    """What to send back, and what came of it.

    Args:
        choose: the model's output -> the tensor of it that the probe starts from.
        cotangent: (that tensor, the loss's gradient with respect to it) -> the gradient to send back instead, or None.

    Attributes:
        trace: the recorded pass with the probe's gradients; None until the user's backward pass begins.
        problem: why there is none.
    """

    def __init__(self, choose: Callable[[Any], Tensor], cotangent: Callable[[Tensor, Tensor], Tensor | None]):
        self._choose, self._cotangent = choose, cotangent
        self.trace: Trace | None = None
        self.problem: Exception | None = None
        self.running = False
        self.ends: list[End] = []  # while the forward pass runs: later the graph alone holds them

    def take_ends(self, output: Any, leaves: list[Tensor]) -> tuple[int | None, list[End]]:
        """(which of the output's tensors was chosen, the ends for its hook to hold: they die with the graph)."""
        ends, self.ends = self.ends, []
        try:
            chosen = self._choose(output)
        except ValueError as error:
            self.problem = error
            return None, []
        index = next((i for i, leaf in enumerate(leaves) if leaf is chosen), None)
        if index is None or chosen.grad_fn is None:
            self.problem = ValueError("the selected output is no tensor that the model's parameters move.")
            return None, []
        # The output's node would hold itself through its hook.
        node = chosen.grad_fn
        return index, [(use, at, None if edge is not None and edge.node is node else edge) for use, at, edge in ends]

    def pull(
        self, trace: Trace, value: Tensor, gradient: Tensor, arrived: Tensor, number: int, ends: list[End]
    ) -> None:
        """Send the cotangent back; called by a hook on the node that the output's gradient arrives at.

        Args:
            value: the chosen output.
            gradient: the loss's gradient with respect to it.
            arrived: the same as the node has it, which may be of another dtype.
            number: which output of the node it belongs to.
        """
        start = GradientEdge(torch._C._current_autograd_node(), number)  # pyright: ignore
        kept = [(use, use.cotangents) for use in trace.uses]
        self.running = True
        cotangents: dict[Use, list[Tensor | None]] = {use: [None] * len(before) for use, before in kept}
        taken, ends = ends, [end for end in ends if end[0] in cotangents]  # the recorder has given up others
        try:
            wanted = self._cotangent(value, gradient)
            if wanted is None:
                return
            cotangent = wanted.to(arrived.dtype)
            for use, before in kept:
                use.cotangents = [None] * len(before)  # what the hooks on the uses' outputs write to
            inner = [(use, at, edge) for use, at, edge in ends if edge is not None]
            edges: Any = [edge for _, _, edge in inner]
            found = (
                torch.autograd.grad([start], edges, [cotangent], retain_graph=True, allow_unused=True) if edges else ()
            )
            for (use, at, _), part in zip(inner, found, strict=True):
                cotangents[use][at] = None if part is None else part.reshape(use.shapes[at])
            for use, at, edge in ends:
                if edge is None:
                    cotangents[use][at] = cotangent.reshape(use.shapes[at])
            self.trace = copy.copy(trace)
            self.trace.uses = [replace(use, cotangents=cotangents[use]) for use, _ in kept]
            self.trace.probe = None
        except (RuntimeError, ValueError) as error:  # the user's backward pass can go on
            self.problem = error
        finally:
            self.running = False
            taken.clear()
            for use, before in kept:
                use.cotangents = before
