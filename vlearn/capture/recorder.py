"""The walk through one forward pass that fills a trace: which call explains which parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from vlearn.capture.graph import Node, Span, nodes_of, structure, survey
from vlearn.capture.random_state import random_state
from vlearn.capture.rules import Rule, rule_of
from vlearn.capture.shared import SharedCall, other_terms
from vlearn.capture.trace import Trace
from vlearn.capture.tree import detached, shapes, tensor_leaves, versions
from vlearn.capture.use import Use

_HIDDEN = (
    "a parameter of {name} got its gradient from a backward pass inside the backward pass, whose graph cannot be seen "
    "(reentrant checkpointing): use checkpoint(..., use_reentrant=False)."
)

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


@dataclass(eq=False)
class _Frame:
    module: nn.Module
    first_use: int  # in the trace's uses, of those made inside
    called: set[nn.Module] = field(default_factory=set)
    pending: list[Tensor] = field(default_factory=list)
    shared: list[SharedCall] = field(default_factory=list)  # made inside, by a child


class Recorder:
    """Fills a trace as modules are entered and left.

    Args:
        trace: new, for one forward pass.
    """

    def __init__(self, trace: Trace):
        self.trace = trace
        self._ends: dict[Use, tuple[list[Node], list[Node]]] = {}  # the nodes of its inputs and outputs
        self._frames: list[_Frame] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._frames:
            self._enter_root(module, args, kwargs)
        elif self._frames[-1].shared:
            self._find_shared(self._frames[-1], module, args, kwargs)
        self._frames.append(_Frame(module, len(self.trace.uses)))

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace = self.trace
        trace.root, trace.args, trace.kwargs = module, detached(args), detached(kwargs)
        trace.versions = versions((args, kwargs))
        trace.in_train_mode = [each for each in trace.paths if each.training]
        trace.random_state = random_state(trace.tracked)
        sizes = [leaf.shape[0] for leaf in tensor_leaves((args, kwargs)) if leaf.dim() > 0]
        trace.num_examples = sizes[0] if sizes else 0

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        while self._frames and self._frames[-1].module is not module:  # frames that an exception left open
            self._frames.pop()
        if not self._frames:
            return
        frame = self._frames.pop()
        if self._frames:
            self._frames[-1].called |= {module, *frame.called}
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and _uses_batch_statistics(module):
            self.trace.problems.append(
                f"{self.trace.paths[module]} ({type(module).__name__}) is in train mode, where each example's output "
                "depends on the whole batch, so no example has a gradient of its own: put it in eval mode "
                "(module.eval()) or use GroupNorm, LayerNorm or filter response normalisation."
            )
        self._cover(frame, args, kwargs, output)
        if not self._frames:
            self._leave_root(frame, args, kwargs, output)
        self.trace.calls[module] = self.trace.calls.get(module, 0) + 1

    def _leave_root(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._cover_the_rest(frame, args, kwargs, output)
        self.trace.keep_output(output)  # takes the ends of all uses
        self._ends = {}

    def _cover_the_rest(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Parameters used in no module's own call, or also elsewhere: for these the whole model is the unit."""
        trace = self.trace
        assert trace.root is not None
        uncovered = self._survey(args, kwargs, output)
        for p in uncovered.foreign:
            trace.problems.append(
                f"{trace.paths[trace.root]} ({type(trace.root).__name__}) uses a parameter of shape {tuple(p.shape)} "
                "that belongs to none of its modules: register the module that has it as a submodule."
            )
        if uncovered.elsewhere:
            rest, last = uncovered.elsewhere, trace.uses[-1] if trace.uses else None
            if last is not None and last.module is trace.root and last.rule is None:
                rest = [*trace.uses.pop().parameters, *rest]
            self._add_use(frame, trace.root, rest, None, args, kwargs, output)
        if uncovered.hidden and trace.edges is None:
            report = partial(trace.problems.append, _HIDDEN.format(name=trace.paths[trace.root]))
            handles = [p.register_hook(lambda gradient: report()) for p in uncovered.hidden if p.requires_grad]
            finalize(trace, _remove_all, handles)

    def _survey(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Uncovered:
        """What `graph.survey` finds, once for each sequence of calls and graph that this model makes."""
        trace = self.trace
        assert trace.root is not None
        ends = nodes_of(tensor_leaves(output)), set(nodes_of(tensor_leaves((args, kwargs))))
        place, trace.graph_structure = structure(*ends)
        calls = tuple(
            (use.path, use.rule is None, tuple(map(id, use.parameters)), *(tuple(map(place.get, of)) for of in nodes))
            for use, nodes in self._ends.items()
        )
        key = (calls, trace.graph_structure, frozenset(map(id, trace.tracked)), trace.paths_in_train_mode)
        known = _surveyed.setdefault(trace.root, {})
        if key not in known:
            if len(known) >= 256:  # a model whose calls are drawn at random
                known.clear()
            spans = [Span(use.parameters, set(inputs), set(outputs)) for use, (inputs, outputs) in self._ends.items()]
            used, elsewhere = survey(set(ends[0]), ends[1], spans)
            covered = {p for use in trace.uses for p in use.parameters}
            own: list[Tensor] = [p for p in trace.root.parameters() if p in trace.tracked]
            known[key] = Uncovered(
                foreign=list(elsewhere.intersection(trace.tracked).difference(own)),
                elsewhere=[p for p in own if p in elsewhere],
                hidden=[p for p in own if p not in used and p not in covered],
            )
        return known[key]

    def _cover(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Make this call a use, if it owns tracked parameters; or leave them to the call around it."""
        module = frame.module
        frame.pending += [p for shared in frame.shared if shared.certain for p in shared.parameters]
        owned = [p for p in module._parameters.values() if p is not None]
        wanted: list[Tensor] = [p for p in owned if p in self.trace.tracked and p.requires_grad]
        rule = rule_of(type(module))
        refusal = rule.refuses(module) if rule is not None and wanted else None
        if refusal is not None:
            self.trace.problems.append(f"{self.trace.paths[module]} ({type(module).__name__}): {refusal}")
        if frame.pending:
            rule = None
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
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            # Pruning and the older weight_norm make the weight from a parameter of another name.
            plain = all(rule.covers(module, p) for p in wanted) and "forward" not in module.__dict__
            fits = single and plain and self._has_row_per_example(args[0]) and rule.accepts(module, args[0])
            if single and plain and self._frames and not args[0].requires_grad:
                call = self.trace.calls.get(module, 0)
                self._frames[-1].shared.append(SharedCall(module, call, wanted, rule, args[0], output, not fits))
                if not self._has_row_per_example(args[0]):
                    return
            rule = rule if fits else None
        if rule is None:
            rows_fit = all(map(self._has_row_per_example, outputs)) and any(
                map(self._has_row_per_example, tensor_leaves((args, kwargs)))
            )
            if not rows_fit or isinstance(module, nn.RNNBase):  # its final state is [layers, N, H]
                self._leave_to_parent(module, wanted)
                return
            # What this module's forward may use without calling its owner (MultiheadAttention's out_proj), if no call
            # inside did.
            inner = (use.module for use in self.trace.uses[frame.first_use :] if use.rule is None)
            others = frame.called.union({module}, *(called.modules() for called in inner))
            for child in module.modules():
                if child not in others:
                    wanted += [p for p in child._parameters.values() if p is not None and p in self.trace.tracked]
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
        trace = self.trace
        leaves = tensor_leaves(output)
        positions = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        if rule is None:  # replaying this call moves the parameters wherever it uses them
            for inner in trace.uses[frame.first_use :]:
                inner.parameters = [p for p in inner.parameters if all(p is not q for q in parameters)]
        use = Use(
            module=module,
            path=trace.paths[module],
            call=trace.calls.get(module, 0),
            parameters=list(dict.fromkeys(parameters)),
            rule=rule,
            args=detached(args),
            kwargs=detached(kwargs),
            versions=versions((args, kwargs)),
            of_constants=self._is_of_constants(args, kwargs),
            positions=positions,
            shapes=[tuple(leaves[i].shape) for i in positions],
            cotangents=[None] * len(positions),
        )
        sources = [_source(leaf) if rule is not None else leaf for leaf in leaves]
        inputs = tensor_leaves((args, kwargs))
        # Taken now: a tensor that is written in place later has another node then.
        self._ends[use] = nodes_of(inputs), nodes_of(sources)
        # One row per example is little to keep; feature maps of the user's own pass would be much.
        if rule is None or trace.edges is not None or all(len(shape) == 2 for shape in use.shapes):
            use.outputs = [(leaves[i].detach(), leaves[i]._version) for i in positions]
        for position, i in enumerate(positions):
            self._wait_for_gradient(use, position, sources[i])
        trace.uses.append(use)

    def _find_shared(self, frame: _Frame, reader: nn.Module, args: Any, kwargs: Any) -> None:
        """Make uses of the calls inside a frame whose outputs are terms of what a module is about to be given."""
        totals = [
            leaf for leaf in tensor_leaves((args, kwargs)) if leaf.requires_grad and self._has_row_per_example(leaf)
        ]
        for shared in list(frame.shared):
            for total in totals:
                repeated = shared.for_all(total)
                others = other_terms(total, shared.output) if repeated is not None else None
                if others is not None:
                    frame.shared.remove(shared)
                    seen_by = reader, self.trace.calls.get(reader, 0), shapes((args, kwargs))
                    self._add_shared_use(shared, repeated, total, others, seen_by)
                    break

    def _add_shared_use(
        self, shared: SharedCall, repeated: Tensor | None, total: Tensor, others: list[Node], seen_by: Any
    ) -> None:
        trace = self.trace
        for use in trace.uses:  # it looked like a row for each example
            if use.module is shared.module and use.call == shared.call:
                use.parameters = []
        use = Use(
            module=shared.module,
            path=trace.paths[shared.module],
            call=shared.call,
            parameters=shared.parameters,
            rule=shared.rule,
            args=(repeated,),
            kwargs={},
            versions=versions(repeated),
            positions=[0],
            shapes=[tuple(total.shape)],
            cotangents=[None],
            seen_by=seen_by,
        )
        self._ends[use] = others, nodes_of([total])
        self._wait_for_gradient(use, 0, total)
        trace.uses.append(use)

    def _wait_for_gradient(self, use: Use, position: int, tensor: Tensor) -> None:
        trace = self.trace
        if trace.edges is not None:
            trace.edges.append((use, position, get_gradient_edge(tensor)))
            return
        tensor.register_hook(partial(use.receive, position))
        if trace.probe is not None:
            trace.probe.ends.append((use, position, get_gradient_edge(tensor)))

    def _has_row_per_example(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.trace.num_examples

    def _is_of_constants(self, args: Any, kwargs: Any) -> bool:
        """Whether some input neither requires grad nor is one of the model's own."""
        own = {leaf.data_ptr() for leaf in tensor_leaves((self.trace.args, self.trace.kwargs))}
        leaves = tensor_leaves((args, kwargs))
        return any(self._has_row_per_example(x) and not x.requires_grad and x.data_ptr() not in own for x in leaves)

    def _leave_to_parent(self, module: nn.Module, wanted: list[Tensor]) -> None:
        if self._frames:
            self._frames[-1].pending += wanted
        else:
            self.trace.problems.append(
                f"{self.trace.paths[module]} ({type(module).__name__}): its inputs or outputs have no example axis of "
                f"size {self.trace.num_examples} as dimension 0, so per-example gradients are not defined."
            )


def _source(leaf: Tensor) -> Tensor:
    """The tensor to hook for a layer's output, the same but for its shape.

    `nn.Linear` gives a view of its product when the input has more than two axes. Should an activation then write
    the view in place, the view's node leaves the graph; that of the product stays.
    """
    base = leaf._base
    if base is None or base.numel() != leaf.numel() or not (base.is_contiguous() and leaf.is_contiguous()):
        return leaf
    return base


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _uses_batch_statistics(module: nn.modules.batchnorm._BatchNorm) -> bool:
    return module.training or (module.running_mean is None and module.running_var is None)
