"""What one forward and backward pass left behind: each call of each layer, its input and output gradient.

A `Recorder` fills it during the forward pass, hooks on the outputs during the backward pass. It keeps references
to tensors that autograd holds anyway and computes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from vlearn._torch_internals import graph_task_id
from vlearn.capture.layer_call import LayerCall, accumulate
from vlearn.capture.model_checks import ModelChecks
from vlearn.capture.output_probe import CallEdge, OutputProbe
from vlearn.capture.pass_gradients import PassGradients, product
from vlearn.capture.pytrees import detached, tensor_leaves, versions, with_leaves
from vlearn.layers.example_axes import Axes
from vlearn.layers.example_rows import ExampleRows
from vlearn.layers.linear_and_norm import BatchStatistics


class _Graph:
    """Held by the hooks of one autograd graph alone, so it dies with the graph."""


class Trace:
    """The calls that explain the tracked parameters in one forward pass, and the gradients of its backward pass.

    Args:
        paths: the name of each module of the model.
        tracked: the parameters whose per-example gradients are wanted.
        by_edge: keep the places in the graph for `pulled_back` instead of waiting for the user's backward pass.

    Attributes:
        layer_calls: the recorded calls.
        num_calls: how often each module was called.
        problems: why the examples have no gradients of their own, where they have none.
        root: the module whose call the pass began with; args, kwargs, output: what it was called with and gave.
        num_examples: the size of the batch.
        input_axes: along which axis of each leaf of (args, kwargs) the examples lie; see `LayerCall`.
        example_rows: which examples the rows of concatenated tensors are of, where an index gives the examples: one for
            each number of rows that is told. No input is then cut to examples, so that all `input_axes` are None.
        find_rows: (root, args, kwargs) -> that, called as the pass begins; None if no index gives them.
        examples: of a subset (`RecordedPass.subset`), which of the whole batch's examples it has; else None.
        in_train_mode: the modules that were in train mode.
        graph_structure, orders: a fingerprint, and the orders in which rows were taken; see
            `vlearn.capture.autograd_graph.structure`.
        kind: what tells kinds of passes apart, see `vlearn.capture.model_checks`.
        random_state: of the generators, as the pass began.
        positions: which tensors of the output required grad; output_axes: along which axis of each the examples lie,
            None where there is none, or for all of them where that was not looked for.
        cotangents: the gradient with respect to each of those, None where none has come.
        cotangents_are_total: whether that of an output which others are made of has what came through those.
        on_backward: called as the user's backward pass begins.
        probe: what else is to be sent back; probed: the same pass with the probe's gradients, once there are.
        probed_output: which of the outputs that required grad the probe starts from.
        batch_norm: "refuse" examples that meet in a batch normalisation in train mode, or note it: "constant".
        batch_norms: the modules that were noted.
        statistics: of batch normalisations whose statistics were constants.
        with_constants: the same pass with constant statistics, once it was made.
    """

    def __init__(self, paths: dict[nn.Module, str], tracked: Iterable[Tensor], by_edge: bool = False):
        self.paths = paths
        self.edges: list[tuple[LayerCall, int, GradientEdge]] | None = [] if by_edge else None
        self.tracked = dict.fromkeys(p for p in tracked if p.numel())  # one without entries has no gradient
        self.layer_calls: list[LayerCall] = []
        self.num_calls: dict[nn.Module, int] = {}
        self.problems: list[str] = []
        self.root: nn.Module | None = None
        self.num_examples = 0
        self.input_axes: Axes = []
        self.example_rows: Sequence[ExampleRows] = ()
        self.find_rows: Callable[[nn.Module, Any, Any], Sequence[ExampleRows]] | None = None
        self.examples: Tensor | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.versions: list[int] = []
        self.in_train_mode: list[nn.Module] = []
        self.graph_structure = 0
        self.orders: list[Tensor] = []
        self.kind: Any = None
        self.random_state: Any = None
        self.output: Any = None
        self.output_versions: list[int] = []
        self.output_axes: list[int | None] | None = None
        self.positions: list[int] = []
        self.cotangents: list[Tensor | None] = []
        self.cotangents_are_total = False
        self.on_backward: Callable[[], None] = lambda: None
        self.probe: OutputProbe | None = None
        self.probed: Trace | None = None
        self.probed_output: int | None = None
        self.batch_norm = "refuse"
        self.batch_norms: list[nn.Module] = []
        self.statistics: dict[nn.Module, BatchStatistics] = {}
        self.with_constants: Trace | None = None
        self._graph: Callable[[], _Graph | None] = lambda: None
        self._tasks: dict[int, None] = {}  # the backward passes that have come
        self._pass_gradients: PassGradients | None = None
        self._gradient_products: dict[Tensor, Tensor] | None = None  # of a pass that was pulled back
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
        self.cotangents_are_total = self.edges is None
        if self.edges is None:
            graph = _Graph()
            self._graph = ref(graph)
            chosen, edges = (None, []) if self.probe is None else self.probe.claim_edges(output, leaves)
            for position, i in enumerate(self.positions):
                if i == chosen:
                    self.probed_output = position
                # Through batch statistics a probe would bring what is not the examples' own.
                claimed = edges if i == chosen and not self.batch_norms else None
                receive = partial(self._receive, graph, position, claimed)
                number = leaves[i].output_nr
                leaves[i].register_hook(lambda g, receive=receive, number=number: receive(g, g, number))
                self._follow_cast(receive, position, leaves[i])
        self.output = detached(output)
        self.output_versions = versions(output)

    def _receive(
        self,
        graph: _Graph,
        position: int,
        edges: list[CallEdge] | None,
        gradient: Tensor,
        arrived: Tensor,
        number: int,
    ) -> None:
        """The gradient of an output has come.

        Args:
            edges: where a probe of this output ends, if it is wanted.
            arrived: the gradient as the node has it at its output of this number.
        """
        probe = self.probe
        if probe is not None and probe.running:
            return
        self._tasks[graph_task_id()] = None
        if all(cotangent is None for cotangent in self.cotangents):
            self.on_backward()
        if torch.is_grad_enabled():
            self.problems.append("a backward pass with create_graph=True went through the captured forward pass.")
        accumulate(self.cotangents, position, gradient)
        if edges and probe is not None:
            value = tensor_leaves(self.output)[self.positions[position]]
            cotangents = probe.backpropagate(self.layer_calls, value, gradient, arrived, number, edges)
            if cotangents is not None:
                self.probed = self._with_cotangents(cotangents)

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

    def pulled_back(self, outputs: list[Tensor], cotangents: list[Tensor], retain_graph: bool = False) -> Trace:
        """The same pass with the gradients that come from the given output gradients; none of weights are computed.

        Args:
            outputs: tensors of the recorded pass (`by_edge`), with one gradient each.
            retain_graph: whether another call follows.
        """
        assert self.edges is not None
        ends: Any = [edge for _, _, edge in self.edges]
        # A first pass of its kind shows what the examples' gradients must add up to.
        parameters = [] if self.root is None or self.kind in ModelChecks.of(self.root).row_sums else list(self.tracked)
        gradients = torch.autograd.grad(
            outputs, [*ends, *parameters], cotangents, allow_unused=True, retain_graph=retain_graph
        )
        by_call: dict[LayerCall, list[Tensor | None]] = {c: [None] * len(c.positions) for c in self.layer_calls}
        for (call, position, _), gradient in zip(self.edges, gradients, strict=False):
            if call in by_call:  # the recorder has given up others
                by_call[call][position] = None if gradient is None else gradient.reshape(call.shapes[position])
        pulled_back = self._with_cotangents(by_call)
        if parameters:
            of_parameters = zip(parameters, gradients[len(ends) :], strict=True)
            pulled_back._gradient_products = {p: product(g) for p, g in of_parameters if g is not None}
        return pulled_back

    def take_gradients(self) -> None:
        """Take the products of this pass's gradients as its backward passes bring them, while this trace lives."""
        self._pass_gradients = PassGradients()
        finalize(self, remove_all, self._pass_gradients.listen(self.tracked))

    def gradient_products(self) -> dict[Tensor, Tensor] | None:
        """⟨gradient, direction⟩ of each parameter that the backward passes have reached, see `PassGradients`.

        Without what other backward passes brought. None if they were not taken.
        """
        if self._pass_gradients is not None:
            return self._pass_gradients.products(self._tasks)
        return self._gradient_products

    def _with_cotangents(self, cotangents: Mapping[LayerCall, list[Tensor | None]]) -> Trace:
        other = copy.copy(self)
        other.layer_calls = [replace(call, cotangents=cotangents[call]) for call in self.layer_calls]
        other.edges = other.probe = other.probed = other._pass_gradients = None
        return other

    @property
    def received(self) -> bool:
        """Whether a backward pass came through."""
        return any(c is not None for c in self.cotangents) or any(call.reached for call in self.layer_calls)

    @property
    def waits_for_backward(self) -> bool:
        """Whether no backward pass has come, but the graph is alive, so one still can."""
        return not self.received and self._graph() is not None

    def as_output(self, tensors: Sequence[Tensor | None]) -> Any:
        """Tensors, one for each output that required grad, in the output's structure; None where no gradient came."""
        reached = zip(self.positions, self.cotangents, tensors, strict=True)
        return with_leaves(self.output, {at: t for at, c, t in reached if c is not None}, others=False)

    def check_unchanged(self) -> None:
        """Raise RuntimeError if an input of the model was written in place: a replay would see other values."""
        if versions((self.args, self.kwargs)) != self.versions:
            raise RuntimeError(
                "an input of the model was modified in place since its forward pass began, which the deviation "
                "repeats: use an out-of-place operation, or read the sensitivities before."
            )

    def check_replayed(self, outputs: list[Tensor]) -> None:
        """Raise RuntimeError if repeating the pass gave other outputs than the recorded ones."""
        leaves = tensor_leaves(self.output)
        for position, output in zip(self.positions, outputs, strict=True):
            if leaves[position]._version == self.output_versions[position]:
                self.check_repeats(output, leaves[position])

    def check_repeats(self, replayed: Tensor, recorded: Tensor) -> None:
        """Raise RuntimeError if a value that was computed again differs."""
        if not torch.equal(replayed, recorded) and not is_close(replayed, recorded, self.tolerance):
            raise RuntimeError(
                "repeating the forward pass gave other outputs, so the deviation is not that of the recorded pass: "
                "the model uses weights or buffers that have changed since (of another optimizer, or updated by "
                "the pass itself), or random numbers that are not torch's default ones. Read the sensitivities "
                "before those change, or do without the deviation."
            )

    @property
    def is_narrow(self) -> bool:
        """Whether some layer worked in a type of low precision."""
        return self.tolerance > 1e-4

    @property
    def tolerance(self) -> float:
        """The relative difference that rounding may make between a recorded value and the same computed again."""
        # Under autocast some modules worked in a narrow type, a replay does not.
        types = {cotangent.dtype for call in self.layer_calls for cotangent in call.cotangents if cotangent is not None}
        return max((1e-4, *(30 * torch.finfo(dtype).eps for dtype in types)))

    def hint_at_index(self) -> str:
        """What to do where the rows of examples seem to be concatenated, as whole numbers for each row suggest."""
        leaves = tensor_leaves((self.args, self.kwargs))
        numbers = [leaf for leaf in leaves if leaf.dim() == 1 and not (leaf.is_floating_point() or leaf.is_complex())]
        if self.example_rows or (leaves and all(len(leaf) != self.num_examples for leaf in numbers)):
            return ""
        return (
            " If the rows of several examples are concatenated, as the nodes of graphs are, pass example_index= to "
            "optimizer.watch(), sweep(), influence(), leave_group_out() or posterior.fit(): it says which example each "
            "row is of."
        )

    def calls_by_parameter(self) -> dict[Tensor, list[LayerCall]]:
        """The calls that the backward pass reached, by parameter."""
        calls_of: dict[Tensor, list[LayerCall]] = {}
        for call in self.layer_calls:
            for p in call.parameters if call.reached else ():
                calls_of.setdefault(p, []).append(call)
        return calls_of


def remove_all(handles: list[Any]) -> None:
    """Remove the hooks of these handles."""
    for handle in handles:
        handle.remove()


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
