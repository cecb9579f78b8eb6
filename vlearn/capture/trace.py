"""What one forward and backward pass left behind: each use of each layer, its input and output gradient.

A `Recorder` fills it during the forward pass, hooks on the outputs during the backward pass. It keeps references
to tensors that autograd holds anyway and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from vlearn.capture.probe import End, Probe
from vlearn.capture.tree import detached, tensor_leaves, versions
from vlearn.capture.use import Use, accumulate


class _Graph:
    """Held by the hooks of one autograd graph alone, so it dies with the graph."""


class Trace:
    """Uses of the tracked parameters in one forward pass, and the gradients that a backward pass brought.

    Args:
        paths: name of each module of the model.
        tracked: the parameters whose per-example gradients are wanted.
        by_edge: keep the places in the graph for `backward` instead of waiting for the user's backward pass.
    """

    def __init__(self, paths: dict[nn.Module, str], tracked: Iterable[Tensor], by_edge: bool = False):
        self.paths = paths
        self.edges: list[tuple[Use, int, GradientEdge]] | None = [] if by_edge else None
        self.tracked = dict.fromkeys(tracked)
        self.uses: list[Use] = []
        self.problems: list[str] = []
        self.root: nn.Module | None = None
        self.num_examples = 0
        self.examples: Tensor | None = None  # of a part: which of the whole batch's, see `vlearn.capture.part`
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.versions: list[int] = []
        self.in_train_mode: list[nn.Module] = []
        self.graph_structure = 0  # see `vlearn.capture.graph.structure`
        self.random_state: Any = None
        self.output: Any = None
        self.output_versions: list[int] = []
        self.positions: list[int] = []
        self.cotangents: list[Tensor | None] = []
        self.on_backward: Callable[[], None] = lambda: None
        self.probe: Probe | None = None
        self.calls: dict[nn.Module, int] = {}  # how often each module was called
        self._graph: Callable[[], _Graph | None] = lambda: None
        self._received_cast: set[int] = set()  # outputs that are casts and that the loss does depend on

    @property
    def paths_in_train_mode(self) -> frozenset[str]:
        """The names of the modules that were in train mode; not the modules, which a key may not keep alive."""
        return frozenset(self.paths[module] for module in self.in_train_mode)

    def keep_output(self, output: Any) -> None:
        """Remember what the model returned; in the user's own pass, wait for its gradient."""
        leaves = tensor_leaves(output)
        self.positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        self.cotangents = [None] * len(self.positions)
        if self.edges is None:
            graph = _Graph()
            self._graph = ref(graph)
            chosen, ends = (None, []) if self.probe is None else self.probe.take_ends(output, leaves)
            for position, i in enumerate(self.positions):
                receive = partial(self._receive, graph, position, ends if i == chosen else None)
                number = leaves[i].output_nr
                leaves[i].register_hook(lambda g, receive=receive, number=number: receive(g, g, number))
                self._follow_cast(receive, position, leaves[i])
        self.output = detached(output)
        self.output_versions = versions(output)

    def _receive(
        self, graph: _Graph, position: int, ends: list[End] | None, gradient: Tensor, arrived: Tensor, number: int
    ) -> None:
        """The gradient of an output has come.

        Args:
            ends: where a probe of this output ends, if it is wanted.
            arrived: the gradient as the node has it at its output of this number.
        """
        if self.probe is not None and self.probe.running:
            return
        if all(cotangent is None for cotangent in self.cotangents):
            self.on_backward()
        if torch.is_grad_enabled():
            self.problems.append("a backward pass with create_graph=True went through the captured forward pass.")
        accumulate(self.cotangents, position, gradient)
        if ends and self.probe is not None:
            value = tensor_leaves(self.output)[self.positions[position]]
            self.probe.pull(self, value, gradient, arrived, number, ends)

    def _follow_cast(self, receive: Callable[[Tensor, Tensor, int], None], position: int, leaf: Tensor) -> None:
        """Where a model that computes its own loss casts its outputs at the end, only what was cast sees the loss.

        Accelerate and Hugging Face's Trainer do so under mixed precision.
        """
        cast = leaf.grad_fn
        node, output = cast.next_functions[0] if cast is not None and cast.name() == "ToCopyBackward0" else (None, 0)
        if node is None:
            return

        def follow(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[output]
            if gradient is not None and position not in self._received_cast:
                receive(gradient.to(leaf_dtype), gradient, output)

        leaf_dtype = leaf.dtype
        leaf.register_hook(lambda gradient: self._received_cast.add(position))
        node.register_prehook(follow)

    def backward(self, outputs: list[Tensor], cotangents: list[Tensor], retain_graph: bool = False) -> None:
        """Fill the uses' cotangents from the given output gradients; weight gradients are not computed.

        Args:
            outputs: tensors of the recorded pass (`by_edge`), with one gradient each.
            retain_graph: whether another call follows.
        """
        assert self.edges is not None
        inputs: Any = [edge for _, _, edge in self.edges]
        gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=retain_graph)
        for (use, position, _), gradient in zip(self.edges, gradients, strict=True):
            use.cotangents[position] = None if gradient is None else gradient.reshape(use.shapes[position])

    @property
    def received(self) -> bool:
        """Whether a backward pass came through."""
        return any(cotangent is not None for cotangent in self.cotangents) or any(use.reached for use in self.uses)

    @property
    def waits_for_backward(self) -> bool:
        """Whether no backward pass has come, but the graph is alive, so one still can."""
        return not self.received and self._graph() is not None

    def check_unchanged(self) -> None:
        """Raises RuntimeError if an input of the model was written in place: a replay would see other values."""
        if versions((self.args, self.kwargs)) != self.versions:
            raise RuntimeError(
                "an input of the model was modified in place since its forward pass began, which the deviation "
                "repeats: use an out-of-place operation, or read the sensitivities before."
            )

    def check_replayed(self, outputs: list[Tensor]) -> None:
        """Raises RuntimeError if repeating the pass gave other outputs than the recorded ones."""
        leaves = tensor_leaves(self.output)
        for position, output in zip(self.positions, outputs, strict=True):
            if leaves[position]._version == self.output_versions[position]:
                self.check_repeats(output, leaves[position])

    def check_repeats(self, replayed: Tensor, recorded: Tensor) -> None:
        """Raises RuntimeError if a value that was computed again differs."""
        if not torch.equal(replayed, recorded) and not is_close(replayed, recorded, self.tolerance):
            raise RuntimeError(
                "repeating the forward pass gave other outputs, so the deviation is not that of the recorded pass: "
                "the model uses weights or buffers that have changed since (of another optimizer, or updated by "
                "the pass itself), or random numbers that are not torch's default ones. Read the sensitivities "
                "before those change, or do without the deviation."
            )

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding may make between a recorded value and the same computed again."""
        # Under autocast some modules worked in a narrow type, a replay does not.
        types = {cotangent.dtype for use in self.uses for cotangent in use.cotangents if cotangent is not None}
        return max(1e-4, *(30 * torch.finfo(dtype).eps for dtype in types))

    def uses_of(self) -> dict[Tensor, list[Use]]:
        """The uses that the backward pass reached, by parameter."""
        found: dict[Tensor, list[Use]] = {}
        for use in self.uses:
            for p in use.parameters if use.reached else ():
                found.setdefault(p, []).append(use)
        return found


def is_close(replayed: Tensor, recorded: Tensor, tolerance: float) -> bool:
    """Whether two computations of the same tensor agree, relative to its largest entry."""
    if replayed.shape != recorded.shape:
        return False
    if recorded.numel() == 0:
        return True
    with torch.no_grad():
        difference, size = (replayed - recorded).abs(), recorded.abs()
        limit = tolerance * size.max()
        if bool((difference.max() <= limit) & limit.isfinite()):
            return True
        # Infinite logits of masked classes, and what has become NaN, may be the same too.
        same = (replayed == recorded) | (replayed.isnan() & recorded.isnan())
        scale = size.masked_fill(~recorded.isfinite(), 0).max().clamp_min(1e-30)
        return bool(difference.masked_fill(same, 0).max() <= tolerance * scale)
