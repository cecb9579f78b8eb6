"""What one forward and backward pass left behind: each use of each layer, its input and output gradient.

A `Trace` is filled by hooks: the optimizer's watch feeds it the user's own training step, `record` below
installs hooks for one pass. It keeps references to tensors that autograd holds anyway and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr  # counts the nodes that this thread's graphs have got so far
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from vlearn.capture.graph import Node, Span, nodes_of, survey
from vlearn.capture.rules import RULES, Rule

_HIDDEN = (
    "a parameter of {name} got its gradient from a backward pass inside the backward pass, whose graph cannot be seen "
    "(reentrant checkpointing): use checkpoint(..., use_reentrant=False)."
)

_paused = False
# By root module and sequence of calls: walking a graph costs more than recording it.
_surveyed: WeakKeyDictionary[nn.Module, dict[Any, Uncovered]] = WeakKeyDictionary()


class Uncovered(NamedTuple):
    """Tracked parameters that the recorded calls do not explain.

    Attributes:
        foreign: used, but of a module that is not in the model.
        elsewhere: of the model, and used outside its module's own call.
        hidden: of the model, and not seen in the graph.
    """

    foreign: list[Tensor]
    elsewhere: list[Tensor]
    hidden: list[Tensor]


@contextmanager
def hooks_paused() -> Iterator[None]:
    """Inside, no hook of vlearn draws, swaps or records and nothing compiles: for passes that vlearn itself makes."""
    global _paused
    before, _paused = _paused, True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _paused = before


def hooks_are_silent() -> bool:
    """Whether hooks must do nothing: a pass of our own, or a forward that checkpointing recomputes."""
    return _paused or is_recomputed()


def is_recomputed() -> bool:
    """Whether a forward pass that runs now is one that checkpointing makes inside the backward pass."""
    return not _paused and torch._C._current_graph_task_id() != -1


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

    def receive(self, position: int, gradient: Tensor) -> None:
        shape = self.shapes[position]
        _accumulate(self.cotangents, position, gradient if gradient.shape == shape else gradient.reshape(shape))

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
        if _versions((self.args, self.kwargs)) != self.versions:
            raise RuntimeError(
                f"{self.path} ({type(self.module).__name__}): its input was modified in place after its forward "
                "pass, so its per-example gradients cannot be formed: use an out-of-place operation there."
            )


@dataclass(eq=False)
class _Frame:
    module: nn.Module
    first_use: int  # in the trace's uses, of those made inside
    called: set[nn.Module] = field(default_factory=set)
    pending: list[Tensor] = field(default_factory=list)


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
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.versions: list[int] = []
        self.in_train_mode: list[nn.Module] = []
        self.random_state: Any = None
        self.output: Any = None
        self.output_versions: list[int] = []
        self.positions: list[int] = []
        self.cotangents: list[Tensor | None] = []
        self.on_backward: Callable[[], None] = lambda: None
        self.calls: dict[nn.Module, int] = {}  # how often each module was called
        # Nodes of its inputs and outputs, and how many nodes the graph had after the call.
        self._ends: dict[Use, tuple[list[Node], list[Node], int]] = {}
        self._first_node = 0
        self._frames: list[_Frame] = []
        self._graph: Callable[[], _Graph | None] = lambda: None

    # -- filled by hooks ---------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._frames:
            self._enter_root(module, args, kwargs)
        self._frames.append(_Frame(module, len(self.uses)))

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.root, self.args, self.kwargs = module, _detached(args), _detached(kwargs)
        self.versions = _versions((args, kwargs))
        self.in_train_mode = [each for each in self.paths if each.training]
        self.random_state = random_state(self.tracked)
        self._first_node = _get_sequence_nr()
        sizes = [leaf.shape[0] for leaf in tensor_leaves((args, kwargs)) if leaf.dim() > 0]
        self.num_examples = sizes[0] if sizes else 0

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        while self._frames and self._frames[-1].module is not module:  # frames that an exception left open
            self._frames.pop()
        if not self._frames:
            return
        frame = self._frames.pop()
        if self._frames:
            self._frames[-1].called |= {module, *frame.called}
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and _uses_batch_statistics(module):
            self.problems.append(
                f"{self.paths[module]} ({type(module).__name__}) is in train mode, where each example's output "
                "depends on the whole batch, so no example has a gradient of its own: put it in eval mode "
                "(module.eval()) or use GroupNorm, LayerNorm or filter response normalisation."
            )
        self._cover(frame, args, kwargs, output)
        if not self._frames:
            self._leave_root(frame, args, kwargs, output)
        self.calls[module] = self.calls.get(module, 0) + 1

    def _leave_root(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        leaves = tensor_leaves(output)
        self.positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        self.cotangents = [None] * len(self.positions)
        if self.edges is None:
            graph = _Graph()
            self._graph = ref(graph)
            for position, i in enumerate(self.positions):
                leaves[i].register_hook(partial(self._receive, graph, position))
        self.output = _detached(output)
        self.output_versions = _versions(output)
        self._cover_the_rest(frame, args, kwargs, output)
        self._ends = {}

    def _cover_the_rest(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Parameters used in no module's own call, or also elsewhere: for these the whole model is the unit."""
        assert self.root is not None
        uncovered = self._survey(args, kwargs, output)
        for p in uncovered.foreign:
            self.problems.append(
                f"{self.paths[self.root]} ({type(self.root).__name__}) uses a parameter of shape {tuple(p.shape)} that "
                "belongs to none of its modules: register the module that has it as a submodule."
            )
        if uncovered.elsewhere:
            rest, last = uncovered.elsewhere, self.uses[-1] if self.uses else None
            if last is not None and last.module is self.root and last.rule is None:
                rest = [*self.uses.pop().parameters, *rest]
            self._add_use(frame, self.root, rest, None, args, kwargs, output)
        if uncovered.hidden and self.edges is None:
            report = partial(self.problems.append, _HIDDEN.format(name=self.paths[self.root]))
            handles = [p.register_hook(lambda gradient: report()) for p in uncovered.hidden if p.requires_grad]
            finalize(self, _remove_all, handles)

    def _survey(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Uncovered:
        """What `graph.survey` finds, once for every sequence of calls that this model makes, with as many nodes."""
        assert self.root is not None
        calls = tuple(
            (use.path, use.rule is None, at, tuple(map(id, use.parameters))) for use, (_, _, at) in self._ends.items()
        )
        size = _get_sequence_nr() - self._first_node
        key = (calls, size, frozenset(map(id, self.tracked)), len(self.in_train_mode))
        known = _surveyed.setdefault(self.root, {})
        if key not in known:
            if len(known) >= 256:  # a model whose calls are drawn at random
                known.clear()
            spans = [
                Span(use.parameters, set(inputs), set(outputs)) for use, (inputs, outputs, _) in self._ends.items()
            ]
            ends = set(nodes_of(tensor_leaves(output))), set(nodes_of(tensor_leaves((args, kwargs))))
            used, elsewhere = survey(*ends, spans)
            covered = {p for use in self.uses for p in use.parameters}
            own: list[Tensor] = [p for p in self.root.parameters() if p in self.tracked]
            known[key] = Uncovered(
                foreign=list(elsewhere.intersection(self.tracked).difference(own)),
                elsewhere=[p for p in own if p in elsewhere],
                hidden=[p for p in own if p not in used and p not in covered],
            )
        return known[key]

    def _receive(self, graph: _Graph, position: int, gradient: Tensor) -> None:
        if all(cotangent is None for cotangent in self.cotangents):
            self.on_backward()
        if torch.is_grad_enabled():
            self.problems.append("a backward pass with create_graph=True went through the captured forward pass.")
        _accumulate(self.cotangents, position, gradient)

    def _cover(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Make this call a use, if it owns tracked parameters; or leave them to the call around it."""
        module = frame.module
        owned = [p for p in module._parameters.values() if p is not None]
        wanted: list[Tensor] = [p for p in owned if p in self.tracked and p.requires_grad]
        rule = None if frame.pending else RULES.get(type(module))
        if frame.pending:
            own = set(module.parameters())
            wanted += [p for p in frame.pending if p in own]
            if self._frames:  # a module that is called here may belong elsewhere
                self._frames[-1].pending += [p for p in frame.pending if p not in own]
        if not wanted:
            return
        outputs = [leaf for leaf in tensor_leaves(output) if leaf.requires_grad]
        if not outputs:
            return
        if rule is not None:
            fits = len(args) == 1 and not kwargs and rule.accepts(args[0]) and args[0].shape[0] == self.num_examples
            # Pruning and the older weight_norm make the weight from a parameter of another name.
            plain = all(p is module.weight or p is module.bias for p in wanted) and "forward" not in module.__dict__
            rule = rule if fits and plain else None
        if rule is None:
            rows_fit = all(map(self._has_row_per_example, outputs)) and any(
                map(self._has_row_per_example, tensor_leaves((args, kwargs)))
            )
            if not rows_fit or isinstance(module, nn.RNNBase):  # its final state is [layers, N, H]
                self._leave_to_parent(module, wanted)
                return
            # What this module's forward may use without calling its owner (MultiheadAttention's out_proj).
            for child in module.modules():
                if child is not module and child not in frame.called:
                    wanted += [p for p in child._parameters.values() if p is not None and p in self.tracked]
        self._add_use(frame, module, wanted, rule, args, kwargs, output)

    def _add_use(
        self,
        frame: _Frame,
        module: nn.Module,
        parameters: list[Tensor],
        rule: Rule | None,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        leaves = tensor_leaves(output)
        positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        if rule is None:  # replaying this call moves the parameters wherever it uses them
            for inner in self.uses[frame.first_use :]:
                inner.parameters = [p for p in inner.parameters if all(p is not q for q in parameters)]
        use = Use(
            module=module,
            path=self.paths[module],
            call=self.calls.get(module, 0),
            parameters=list(dict.fromkeys(parameters)),
            rule=rule,
            args=_detached(args),
            kwargs=_detached(kwargs),
            versions=_versions((args, kwargs)),
            positions=positions,
            shapes=[tuple(leaves[i].shape) for i in positions],
            cotangents=[None] * len(positions),
        )
        sources = [_source(leaf) if rule is not None else leaf for leaf in leaves]
        inputs = tensor_leaves((args, kwargs))
        # Taken now: a tensor that is written in place later has another node then.
        self._ends[use] = (nodes_of(inputs), nodes_of(sources), _get_sequence_nr() - self._first_node)
        # One row per example is little to keep; feature maps of the user's own pass would be much.
        if rule is None or self.edges is not None or all(len(shape) == 2 for shape in use.shapes):
            use.outputs = [(leaves[i].detach(), leaves[i]._version) for i in positions]
        for position, i in enumerate(positions):
            if self.edges is None:
                sources[i].register_hook(partial(use.receive, position))
            else:
                self.edges.append((use, position, get_gradient_edge(sources[i])))
        self.uses.append(use)

    def _has_row_per_example(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.num_examples

    def _leave_to_parent(self, module: nn.Module, wanted: list[Tensor]) -> None:
        if self._frames:
            self._frames[-1].pending += wanted
        else:
            self.problems.append(
                f"{self.paths[module]} ({type(module).__name__}): its inputs or outputs have no example axis of "
                f"size {self.num_examples} as dimension 0, so per-example gradients are not defined."
            )

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

    # -- read afterwards ---------------------------------------------------------------------------------

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
        if _versions((self.args, self.kwargs)) != self.versions:
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


@contextmanager
def record(model: nn.Module, tracked: Iterable[Tensor]) -> Iterator[Trace]:
    """Record the one forward pass made inside; the hooks are gone afterwards, by any exit.

    Its gradients come from `Trace.backward`.

    Args:
        model: called once inside, with gradients enabled.
        tracked: the parameters whose per-example gradients are wanted.
    """
    paths = module_paths(model)
    trace = Trace(paths, tracked, by_edge=True)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not hooks_are_silent():
            trace.enter(module, args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not hooks_are_silent():
            trace.leave(module, args, kwargs, output)

    handles = []
    try:
        for module in paths:
            # First of all hooks: another one may change what the module itself is given or gives.
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, prepend=True))
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call hooks that came later
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's name in the model; the model itself is called by its class."""
    return {module: name or type(model).__name__ for name, module in model.named_modules()}


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure of tuples, lists, dicts and registered dataclasses."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list):  # what calls are made of; the general walk costs ten times as much
        return [leaf for item in tree for leaf in tensor_leaves(item)]
    if not tree:
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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


def random_state(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """State of the random number generators that a forward pass on these tensors' devices can use."""
    state = {"cpu": torch.get_rng_state()}
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        state[str(device)] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Undo of `random_state`."""
    for device, value in state.items():
        if device == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, device)


def _accumulate(cotangents: list[Tensor | None], position: int, gradient: Tensor) -> None:
    earlier = cotangents[position]
    cotangents[position] = gradient.detach() if earlier is None else earlier + gradient.detach()


def _source(leaf: Tensor) -> Tensor:
    """The tensor to hook for a layer's output, the same but for its shape.

    `nn.Linear` gives a view of its product when the input has more than two axes. Should an activation then write
    the view in place, the view's node leaves the graph; that of the product stays.
    """
    base = leaf._base
    if base is None or base.numel() != leaf.numel() or not (base.is_contiguous() and leaf.is_contiguous()):
        return leaf
    return base


def _versions(tree: Any) -> list[int]:
    return [leaf._version for leaf in tensor_leaves(tree)]


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if type(tree) in (tuple, list):
        return type(tree)(map(_detached, tree))
    if not tree:
        return tree
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _uses_batch_statistics(module: nn.modules.batchnorm._BatchNorm) -> bool:
    return module.training or (module.running_mean is None and module.running_var is None)
