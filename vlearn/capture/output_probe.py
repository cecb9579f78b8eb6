"""Another gradient of the model's output, sent back through the graph just before the loss's own uses it up.

The hook on the output runs as the user's backward pass begins: the graph is whole, the output's gradient is known,
and a second backward pass started there reaches every recorded call. Weight gradients are not computed. Hooks that the
user has put on activations run in this pass too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from vlearn._torch_internals import current_node
from vlearn.capture.layer_call import LayerCall, gradients_ignored

CallEdge = tuple[LayerCall, int, GradientEdge | None]  # an output of a call, its place in the graph; None: the model's


class OutputProbe:
    """What to send back, and whether that could be done.

    Args:
        choose: the model's output -> the tensor of it that the probe starts from.
        cotangent: (that tensor, the loss's gradient with respect to it) -> the gradient to send back instead, or None.

    Attributes:
        problem: why there is none.
        running: whether the probe's own backward pass is under way.
    """

    def __init__(self, choose: Callable[[Any], Tensor], cotangent: Callable[[Tensor, Tensor], Tensor | None]):
        self._choose, self._cotangent = choose, cotangent
        self.problem: Exception | None = None
        self.running = False
        self.edges: list[CallEdge] = []  # while the forward pass runs: later the graph alone holds them

    def claim_edges(self, output: Any, leaves: list[Tensor]) -> tuple[int | None, list[CallEdge]]:
        """(which of the output's tensors was chosen, the edges for its hook to hold: they die with the graph)."""
        edges, self.edges = self.edges, []
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
        return index, [(call, at, None if edge is not None and edge.node is node else edge) for call, at, edge in edges]

    def cotangent_of(self, value: Tensor, gradient: Tensor) -> Tensor | None:
        """The gradient to send back instead of the loss's; None if there is none, see `problem`.

        Args:
            value: the chosen output.
            gradient: the loss's gradient with respect to it.
        """
        self.running = True
        try:
            return self._cotangent(value, gradient)
        except (RuntimeError, ValueError) as error:  # the user's backward pass can go on
            self.problem = error
            return None
        finally:
            self.running = False

    def backpropagate(
        self,
        calls: list[LayerCall],
        value: Tensor,
        gradient: Tensor,
        arrived: Tensor,
        number: int,
        edges: list[CallEdge],
    ) -> dict[LayerCall, list[Tensor | None]] | None:
        """Send the cotangent back; called by a hook on the node that the output's gradient arrives at.

        Args:
            calls: the recorded calls.
            value: the chosen output.
            gradient: the loss's gradient with respect to it.
            arrived: the same as the node has it, which may be of another dtype.
            number: which output of the node it belongs to.
            edges: what `claim_edges` gave; emptied.
        Returns:
            The gradient with respect to each output of each call; None if there is none, see `problem`.
        """
        start = GradientEdge(current_node(), number)
        cotangents: dict[LayerCall, list[Tensor | None]] = {call: [None] * len(call.shapes) for call in calls}
        claimed, edges = edges, [edge for edge in edges if edge[0] in cotangents]  # the recorder has given up others
        wanted = self.cotangent_of(value, gradient)
        if wanted is None:
            claimed.clear()
            return None
        self.running = True
        try:
            cotangent = wanted.to(arrived.dtype)
            inner = [(call, at, edge) for call, at, edge in edges if edge is not None]
            ends: Any = [edge for _, _, edge in inner]
            with gradients_ignored():  # also by the calls that another optimizer has recorded
                gradients = (
                    torch.autograd.grad([start], ends, [cotangent], retain_graph=True, allow_unused=True)
                    if ends
                    else ()
                )
            for (call, at, _), part in zip(inner, gradients, strict=True):
                cotangents[call][at] = None if part is None else part.reshape(call.shapes[at])
            for call, at, edge in edges:
                if edge is None:
                    cotangents[call][at] = cotangent.reshape(call.shapes[at])
            return cotangents
        except (RuntimeError, ValueError) as error:
            self.problem = error
            return None
        finally:
            self.running = False
            claimed.clear()
