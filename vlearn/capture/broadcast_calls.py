"""Layers that are called once for all examples, and whose output is then added to each example's own values.

In `words(tokens) + places(torch.arange(length))` the call of `places` has no example axis, but the sum has, and the
gradient with respect to the sum is, example by example, that with respect to the places it got. So the call counts as
one made for every example, and its gradient is taken where the next module is given the sum. That a value is used
nowhere else as well is for `vlearn.capture.autograd_graph.find_unexplained_uses` to see.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from vlearn._torch_internals import added_factor
from vlearn.capture.autograd_graph import Node
from vlearn.capture.pytrees import detached
from vlearn.layers.registry import Rule

_LONGEST_SUM = 16  # terms; the residual stream of a deep network is a sum too


class BroadcastCall(NamedTuple):
    """A call that may turn out to be one for all examples.

    Attributes:
        call: which of the module's calls.
        parameters: what it would explain.
        certain: whether it is one for all if it is anything: its input has no row for each example.
    """

    module: nn.Module
    number: int
    parameters: list[Tensor]
    rule: Rule
    input: Tensor
    output: Tensor
    certain: bool

    def for_all(self, total: Tensor) -> Tensor | None:
        """The call's input, repeated for each example of a sum that the output is a term of; None if it is not."""
        n, trailing = total.shape[0], total.shape[1:]
        if self.output.shape == trailing:
            repeated = detached(self.input).expand(n, *self.input.shape)
        elif self.output.shape == (1, *trailing) and n > 1 and self.input.shape[:1] == (1,):
            repeated = detached(self.input).expand(n, *self.input.shape[1:])
        else:
            return None
        return repeated if self.rule.accepts(self.module, repeated) else None


def other_terms(total: Tensor, term: Tensor) -> list[Node] | None:
    """The nodes of a sum's other terms; None if `term` is not, once and with factor 1, one of its terms."""
    waiting, others, occurrences = [total.grad_fn], [], 0
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node is term.grad_fn:
            occurrences += 1
        elif node.name() == "AddBackward0" and added_factor(node) == 1 and len(others) < _LONGEST_SUM:
            waiting += [before for before, _ in node.next_functions]
        else:
            others.append(node)
    return others if occurrences == 1 else None
