"""Which parameters an autograd graph uses in a way that no recorded call explains.

A module's inputs and outputs show the whole gradient of its weight only if the weight is used nowhere else. A
decoder that multiplies by `self.embedding.weight`, or a module that leaves an intermediate value in an attribute
for another one to read, is seen in the graph alone: some node outside the recorded calls leads to the weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Node = Any


@dataclass(eq=False)
class Span:
    """The part of the graph that one call made.

    Attributes:
        parameters: whose effect the call is held to explain.
        inputs, outputs: the nodes that made its inputs and outputs.
        nodes: those between inputs and outputs.
    """

    parameters: list[Tensor]
    inputs: set[Node]
    outputs: set[Node]
    nodes: set[Node] = field(default_factory=set)


def nodes_of(tensors: Iterable[Tensor]) -> list[Node]:
    """The nodes that made these tensors, of those that require grad."""
    return [t.grad_fn or get_gradient_edge(t).node for t in tensors if t.requires_grad]


def structure(outputs: Iterable[Node], inputs: set[Node]) -> tuple[dict[Node, int], int]:
    """(place of each node in one walk through a graph, a fingerprint of what the walk has met).

    Two graphs of the same operations in the same connections have the same fingerprint, whatever the sizes of their
    tensors; an operation along another axis, as a mean over the batch instead of the features, has another. The walk
    costs a fraction of a microsecond for each node.

    Args:
        outputs: where the graph begins, `inputs` where it ends.
    """
    place: dict[Node, int] = {}
    met: list[Any] = []
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in place:
            met.append(place[node])
            continue
        place[node] = len(place)
        kind = type(node)
        met.append(kind)
        has_axis = _has_axis.get(kind)
        if has_axis is None:
            has_axis = _has_axis[kind] = hasattr(node, "_saved_dim")
        if has_axis:
            met.append(str(node._saved_dim))
        if node not in inputs:
            waiting += [n for n, _ in node.next_functions if n is not None]
    return place, hash(tuple(met))


_has_axis: dict[type, bool] = {}  # whether the nodes of a type say along which axis they work


def survey(outputs: set[Node], inputs: set[Node], spans: list[Span]) -> tuple[set[Tensor], set[Tensor]]:
    """The parameters that a graph uses, and those of them that are used outside the given calls.

    Args:
        outputs: where the graph begins, `inputs` where it ends.
        spans: the recorded calls.
    Returns:
        (used, used elsewhere)
    """
    following: dict[Node, list[Node | None]] = {}  # what a node's inputs were made by, None for constants
    users: dict[Node, list[Node]] = {}
    leaves: dict[Tensor, Node] = {}
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in following:
            continue
        nexts = [] if node in inputs else [n for n, _ in node.next_functions]
        following[node] = nexts
        if not nexts and node not in inputs and (leaf := getattr(node, "variable", None)) is not None:
            leaves[leaf] = node
        for n in nexts:
            if n is not None:
                users.setdefault(n, []).append(node)
                if n not in following:
                    waiting.append(n)

    holders: dict[Tensor, list[Span]] = {}
    for span in spans:
        waiting = list(span.outputs - span.inputs)
        while waiting:
            node = waiting.pop()
            if node is not None and node not in span.nodes and node not in span.inputs:
                span.nodes.add(node)
                waiting += following.get(node, ())
        for p in span.parameters:
            holders.setdefault(p, []).append(span)

    elsewhere: set[Tensor] = set()
    derived: set[Node] = set()  # made of one parameter alone: its transpose, its cast, itself
    for p, leaf in leaves.items():
        found, explained = _derived(leaf, following, users, outputs, holders.get(p, []))
        derived |= found
        if not explained:
            elsewhere.add(p)
    for span in spans:
        # A value left in an attribute; or an output that is a view and was written in place, whose node is gone.
        inner = span.nodes - span.outputs - derived
        if any(user not in span.nodes for node in inner for user in users.get(node, ())):
            elsewhere.update(span.parameters)
    return set(leaves), elsewhere


def _derived(
    leaf: Node,
    following: dict[Node, list[Node | None]],
    users: dict[Node, list[Node]],
    outputs: set[Node],
    spans: list[Span],
) -> tuple[set[Node], bool]:
    """The nodes made of one parameter alone, and whether all that use them lie inside the spans."""
    found, waiting, explained = {leaf}, [leaf], True
    while waiting:
        node = waiting.pop()
        if node in outputs:
            explained = False
        for span in spans:
            if node in span.inputs:
                explained = False
        for user in users.get(node, ()):
            inside = is_output = False
            for span in spans:
                inside = inside or user in span.nodes
                is_output = is_output or user in span.outputs
            if is_output:
                continue
            if len(following[user]) > 1:
                explained = explained and inside
            elif user not in found:
                found.add(user)
                waiting.append(user)
    return found, explained
