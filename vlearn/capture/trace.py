"""What one forward and backward pass left behind: each use of each layer, its input and output gradient.

A `Trace` is filled by hooks: the optimizer's watch feeds it the user's own training step, `record` below
installs hooks for one pass. It keeps references to tensors that autograd holds anyway and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from vlearn.capture.rules import RULES, Rule

_paused = False


@contextmanager
def hooks_paused() -> Iterator[None]:
    """Inside, no hook of vlearn draws, swaps or records: for passes that vlearn itself makes."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


def hooks_are_silent() -> bool:
    """Whether hooks must do nothing: a pass of our own, or a forward that checkpointing recomputes."""
    return _paused or torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class Use:
    """One call of one module whose parameters it covers.

    Attributes:
        module: the module, `path` its name in the model, for messages.
        parameters: those of the tracked parameters whose effect passes through this call.
        rule: how to bring it to rows, or None for the exact fallback.
        args, kwargs: the call's inputs, tensors detached.
        positions: which tensors of the output required grad.
        shapes: their shapes.
        cotangents: gradient of the backward pass with respect to each of those, None where it was not reached.
        outputs: their values (fallback only), to check the recomputation against.
    """

    module: nn.Module
    path: str
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
        _accumulate(self.cotangents, position, gradient)

    @property
    def input(self) -> Tensor:
        return self.args[0]

    @property
    def reached(self) -> bool:
        return any(cotangent is not None for cotangent in self.cotangents)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if an input was written in place after the call: a replay would see other values."""
        now = [leaf._version for leaf in tensor_leaves((self.args, self.kwargs))]
        if now != self.versions:
            raise RuntimeError(
                f"{self.path} ({type(self.module).__name__}): its input was modified in place after its forward "
                "pass, so its per-example gradients cannot be formed: use an out-of-place operation there."
            )


@dataclass(eq=False)
class _Frame:
    module: nn.Module
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
        self.training = False
        self.random_state: Any = None
        self.output: Any = None
        self.positions: list[int] = []
        self.cotangents: list[Tensor | None] = []
        self.unexplained: dict[Tensor, bool] = {}  # parameters of no use -> whether a gradient reached them
        self.on_backward: Callable[[], None] = lambda: None
        self._frames: list[_Frame] = []
        self._graph: Callable[[], _Graph | None] = lambda: None

    # -- filled by hooks ---------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._frames:
            self._enter_root(module, args, kwargs)
        self._frames.append(_Frame(module))

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.root, self.args, self.kwargs, self.training = module, args, kwargs, module.training
        self.random_state = random_state(self.tracked)
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
            self._leave_root(args, kwargs, output)

    def _leave_root(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        leaves = tensor_leaves(output)
        self.positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        self.cotangents = [None] * len(self.positions)
        if self.edges is None:
            graph = _Graph()
            self._graph = ref(graph)
            for position, i in enumerate(self.positions):
                leaves[i].register_hook(partial(self._receive, graph, position))
        self.output = _detached(output)
        assert self.root is not None
        covered = {p for use in self.uses for p in use.parameters}
        self.unexplained = {p: False for p in self.root.parameters() if p in self.tracked and p not in covered}
        if self.unexplained:
            # Used, if at all, outside any module's own call: then the whole model is the unit.
            if self.edges is None:
                for p in self.unexplained:
                    p.register_hook(partial(self._reach, p))
            self._add_use(self.root, list(self.unexplained), None, args, kwargs, output)

    def _receive(self, graph: _Graph, position: int, gradient: Tensor) -> None:
        if all(cotangent is None for cotangent in self.cotangents):
            self.on_backward()
        if torch.is_grad_enabled():
            self.problems.append("a backward pass with create_graph=True went through the captured forward pass.")
        _accumulate(self.cotangents, position, gradient)

    def _reach(self, p: Tensor, gradient: Tensor) -> None:
        if p in self.unexplained:
            self.unexplained[p] = True

    def _cover(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Make this call a use, if it owns tracked parameters; or leave them to the call around it."""
        module = frame.module
        wanted = [p for p in module._parameters.values() if p is not None and p in self.tracked and p.requires_grad]
        wanted += frame.pending
        outputs = [leaf for leaf in tensor_leaves(output) if leaf.requires_grad] if wanted else []
        if not outputs:
            return
        rule = None if frame.pending else RULES.get(type(module))
        if rule is not None:
            fits = len(args) == 1 and not kwargs and rule.accepts(args[0]) and args[0].shape[0] == self.num_examples
            rule = rule if fits else None
        if rule is None:
            inputs = tensor_leaves((args, kwargs))
            if not (all(map(self._has_examples, outputs)) and any(map(self._has_examples, inputs))):
                self._leave_to_parent(module, wanted)
                return
            # What this module's forward may use without calling its owner (MultiheadAttention's out_proj).
            for child in module.modules():
                if child is not module and child not in frame.called:
                    wanted += [p for p in child._parameters.values() if p is not None and p in self.tracked]
        self._add_use(module, wanted, rule, args, kwargs, output)

    def _add_use(
        self, module: nn.Module, parameters: list[Tensor], rule: Rule | None, args: Any, kwargs: Any, output: Any
    ) -> None:
        leaves = tensor_leaves(output)
        positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        if self.uses and self.uses[-1].module is module and not self._frames:  # the root, a use already
            self.uses[-1].parameters += parameters
            return
        use = Use(
            module=module,
            path=self.paths[module],
            parameters=list(dict.fromkeys(parameters)),
            rule=rule,
            args=_detached(args),
            kwargs=_detached(kwargs),
            versions=[leaf._version for leaf in tensor_leaves((args, kwargs))],
            positions=positions,
            shapes=[tuple(leaves[i].shape) for i in positions],
            cotangents=[None] * len(positions),
        )
        if rule is None:
            use.outputs = [(leaves[i].detach(), leaves[i]._version) for i in positions]
        for position, i in enumerate(positions):
            if self.edges is None:
                leaves[i].register_hook(partial(use.receive, position))
            else:
                self.edges.append((use, position, get_gradient_edge(leaves[i])))
        self.uses.append(use)

    def _has_examples(self, tensor: Tensor) -> bool:
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
        unexplained = list(self.unexplained)
        inputs: Any = [edge for _, _, edge in self.edges] + unexplained
        gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, retain_graph=retain_graph)
        for (use, position, _), gradient in zip(self.edges, gradients[: len(self.edges)], strict=True):
            use.cotangents[position] = gradient
        for p, gradient in zip(unexplained, gradients[len(self.edges) :], strict=True):
            self.unexplained[p] = gradient is not None

    # -- read afterwards ---------------------------------------------------------------------------------

    @property
    def received(self) -> bool:
        """Whether a backward pass came through."""
        return any(cotangent is not None for cotangent in self.cotangents) or any(use.reached for use in self.uses)

    @property
    def waits_for_backward(self) -> bool:
        """Whether no backward pass has come, but the graph is alive, so one still can."""
        return not self.received and self._graph() is not None

    def uses_of(self) -> dict[Tensor, list[Use]]:
        """The uses that the backward pass reached, by parameter."""
        found: dict[Tensor, list[Use]] = {}
        for use in self.uses:
            if use.reached:
                for p in use.parameters:
                    if self.unexplained.get(p, True):
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
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's name in the model; the model itself is called by its class."""
    return {module: name or type(model).__name__ for name, module in model.named_modules()}


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure of tuples, lists, dicts and registered dataclasses."""
    if isinstance(tree, Tensor):  # most outputs; the general walk costs ten times as much
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if not tree:
        return tree
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _uses_batch_statistics(module: nn.modules.batchnorm._BatchNorm) -> bool:
    return module.training or (module.running_mean is None and module.running_var is None)
