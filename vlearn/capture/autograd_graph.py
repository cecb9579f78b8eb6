"""Which parameters an autograd graph uses in a way that no recorded call explains.

A module's inputs and outputs show the whole gradient of its weight only if the weight is used nowhere else. A
decoder that multiplies by `self.embedding.weight`, or a module that leaves an intermediate value in an attribute
for another one to read, is seen in the graph alone: some node outside the recorded calls leads to the weight.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from vlearn._torch_internals import roots_of_backward_passes, saved_axis, saved_order, sequence_number

Node = Any


@dataclass(eq=False)
class CallSubgraph:
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


def outputs_inside(outputs: list[Tensor], ends: set[Node]) -> list[tuple[set[int], set[Tensor]]]:
    """Of each output of a call: (the places of the outputs that it is made of, the leaves that it is made of besides).

    Args:
        outputs: those that require grad.
        ends: nodes at which the call begins.
    """
    edges = [(t.grad_fn or get_gradient_edge(t).node, t.output_nr) for t in outputs]
    place = {edge: number for number, edge in reversed(list(enumerate(edges)))}
    found: list[tuple[set[int], set[Tensor]]] = []
    for number, (start, at) in enumerate(edges):
        inner: set[int] = set()
        leaves: set[Tensor] = set()
        if place[start, at] != number:  # the same value once more
            found.append(({place[start, at]}, leaves))
            continue
        waiting, seen = [start], {start}
        while waiting:
            node = waiting.pop()
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.add(leaf)
            for before, output in () if node in ends else node.next_functions:
                if before is None:
                    continue
                if (before, output) in place:
                    inner.add(place[before, output])
                elif before not in seen:
                    seen.add(before)
                    waiting.append(before)
        found.append((inner - {number}, leaves))
    return found


_has_axis: dict[type, bool] = {}  # whether the nodes of a type say along which axis they work


def structure(outputs: Iterable[Node], inputs: set[Node]) -> tuple[dict[Node, int], int, list[Tensor]]:
    """(place of each node in one walk through a graph, a fingerprint of what the walk has met, orders of rows).

    An order says which rows an operation has taken along the first axis, as one that sorts the examples.

    Two graphs of the same operations in the same connections have the same fingerprint, whatever the sizes of their
    tensors; an operation along another axis, as a mean over the batch instead of the features, has another. The walk
    costs a fraction of a microsecond for each node.

    Args:
        outputs: where the graph begins, `inputs` where it ends.
    """
    place: dict[Node, int] = {}
    met: list[Any] = []
    orders: list[Tensor] = []
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in place:
            met.append(place[node])
            continue
        place[node] = len(place)
        kind = type(node)
        met.append(kind)
        if _has_axis.get(kind, True):
            axis = saved_axis(node)
            _has_axis[kind] = axis is not None
            if axis is not None:
                met.append(axis)
        order = saved_order(node)
        if order is not None:
            orders.append(order)
        if node not in inputs:
            waiting += [n for n, _ in node.next_functions if n is not None]
    return place, hash(tuple(met)), orders


def value_of_backward(node: Node) -> float | None:
    """The number whose gradient the backward pass takes that runs through a node now: as a rule, the loss.

    It is Σ ⟨tensor, its given gradient⟩ over the tensors that the pass was started from and that were made of the
    node's output. None where no such pass is seen, or one that was started from edges.
    """
    for roots in roots_of_backward_passes():
        made = [(root, gradient) for root, gradient in roots if _leads_to(root, node)]
        if made and all(isinstance(root, Tensor) for root, _ in made):
            parts = [root.detach() * (1.0 if gradient is None else gradient.detach()) for root, gradient in made]
            return sum(float(part.cpu().double().sum()) for part in parts)
    return None


def _leads_to(root: Any, node: Node) -> bool:
    """Whether the graph of a tensor, or of an edge, has a node."""
    waiting = [root.grad_fn if isinstance(root, Tensor) else root.node]
    seen = {None, *waiting}
    while waiting:
        each = waiting.pop()
        if each is node:
            return True
        before = {n for n, _ in each.next_functions} - seen if each is not None else set()
        seen |= before
        waiting += before
    return False


def leaves_read_before(outputs: Iterable[Node], number: int, leaves: Container[Tensor]) -> list[Tensor]:
    """The leaves that a graph reads in nodes made before the one of this number, on the present thread.

    Args:
        outputs: where the graph begins; it is walked to its end.
        leaves: those of interest.
    """
    found: dict[Tensor, None] = {}
    seen: set[Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        is_older = sequence_number(node) < number
        for before, _ in node.next_functions:
            leaf = getattr(before, "variable", None)
            if leaf is None and before is not None:
                waiting.append(before)
            elif is_older and leaf is not None and leaf in leaves:
                found[leaf] = None
    return list(found)


def find_unexplained_uses(
    outputs: set[Node], inputs: set[Node], subgraphs: list[CallSubgraph]
) -> tuple[set[Tensor], set[Tensor], set[Tensor]]:
    """The parameters that a graph uses, those of them that are used outside the given calls, those that calls lack.

    Args:
        outputs: where the graph begins, `inputs` where it ends.
        spans: the recorded calls.
    Returns:
        (used, used elsewhere, parameters of calls that lie in the graph and do not use them)
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

    holders: dict[Tensor, list[CallSubgraph]] = {}
    for subgraph in subgraphs:
        waiting = list(subgraph.outputs - subgraph.inputs)
        while waiting:
            node = waiting.pop()
            if node is not None and node not in subgraph.nodes and node not in subgraph.inputs:
                subgraph.nodes.add(node)
                waiting += following.get(node, ())
        for p in subgraph.parameters:
            holders.setdefault(p, []).append(subgraph)

    used_outside_call: set[Tensor] = set()
    derived: set[Node] = set()  # made of one parameter alone: its transpose, its cast, itself
    for p, leaf in leaves.items():
        of_leaf, explained = _derived(leaf, following, users, outputs, holders.get(p, []))
        derived |= of_leaf
        if not explained:
            used_outside_call.add(p)
    for subgraph in subgraphs:
        # A value left in an attribute; or an output that is a view and was written in place, whose node is gone.
        inner = subgraph.nodes - subgraph.outputs - derived
        if any(user not in subgraph.nodes for node in inner for user in users.get(node, ())):
            used_outside_call.update(subgraph.parameters)
    in_graph = {subgraph: subgraph.outputs <= following.keys() for subgraph in subgraphs}
    unknown = {p for subgraph in subgraphs if not in_graph[subgraph] for p in subgraph.parameters}
    lacking = {p for subgraph in subgraphs for p in subgraph.parameters} - leaves.keys() - unknown
    return set(leaves), used_outside_call, lacking


def _derived(
    leaf: Node,
    following: dict[Node, list[Node | None]],
    users: dict[Node, list[Node]],
    outputs: set[Node],
    subgraphs: list[CallSubgraph],
) -> tuple[set[Node], bool]:
    """The nodes made of one parameter alone, and whether all that use them lie inside the spans."""
    derived, waiting, explained = {leaf}, [leaf], True
    while waiting:
        node = waiting.pop()
        if node in outputs:
            explained = False
        for subgraph in subgraphs:
            if node in subgraph.inputs:
                explained = False
        for user in users.get(node, ()):
            inside = is_output = False
            for subgraph in subgraphs:
                inside = inside or user in subgraph.nodes
                is_output = is_output or user in subgraph.outputs
            if is_output:
                continue
            if len(following[user]) > 1:
                explained = explained and inside
            elif user not in derived:
                derived.add(user)
                waiting.append(user)
    return derived, explained
