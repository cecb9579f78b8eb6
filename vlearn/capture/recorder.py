"""The walk through one forward pass that fills a trace: which call explains which parameters."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from vlearn._torch_internals import in_functorch_transform, view_base
from vlearn.capture.autograd_graph import (
    CallSubgraph,
    Node,
    find_unexplained_uses,
    nodes_of,
    outputs_inside,
    structure,
)
from vlearn.capture.broadcast_calls import BroadcastCall, other_terms
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import MOST_KINDS, ModelChecks, UnattributedParameters, remember
from vlearn.capture.pytrees import detached, tensor_leaves, versions, with_leaves
from vlearn.capture.random_state import has_drawn, random_state, random_state_now
from vlearn.capture.trace import Trace, remove_all
from vlearn.layers.example_axes import Axes, axes_of_call, axis_of
from vlearn.layers.example_rows import ExampleRows
from vlearn.layers.registry import Rule, rule_of

_COMPUTE = frozenset(("forward", "_conv_forward", "_output_padding"))  # which a module may have of its own
_NOT_IN_GRAPH = (
    "a parameter of {name} got its gradient from a backward pass inside the backward pass, whose graph cannot be seen "
    "(reentrant checkpointing): use checkpoint(..., use_reentrant=False)."
)

_DIFFERENTIATES = (
    "the forward pass calls torch.autograd.grad or backward() itself, as for forces, through which no example's "
    "gradient can be followed: use torch.func.grad there."
)


@dataclass(eq=False)
class _Frame:
    module: nn.Module
    first_call: int  # in the trace's calls, of those made inside
    random_state: dict[str, Tensor] | None  # as it was entered, if it may draw in a call that no rule covers
    called: set[nn.Module] = field(default_factory=set)
    pending: list[Tensor] = field(default_factory=list)
    broadcast: list[BroadcastCall] = field(default_factory=list)  # made inside, by a child
    uncalled: list[nn.Module] = field(default_factory=list)  # below modules inside that can be no unit
    doubtful: list[LayerCall] = field(default_factory=list)  # made inside, of inputs that may have no examples


class Recorder:
    """Fills a trace as modules are entered and left.

    Args:
        trace: new, for one forward pass.
        root_only: record what the root was called with and what it returned, for a pass that will be made again.
    """

    def __init__(self, trace: Trace, root_only: bool = False):
        self.trace = trace
        self._root_only = root_only
        self._ends: dict[LayerCall, tuple[list[Node], list[Node]]] = {}  # the nodes of its inputs and outputs
        self._frames: list[_Frame] = []
        self._given_up = False
        self._stand_ins: dict[LayerCall, tuple[list[LayerCall], list[LayerCall]]] = {}  # see `_stand_by`
        self._adopters: list[tuple[LayerCall, _Frame, list[nn.Module]]] = []  # see `_await_uncalled`
        self._handles: list[Any] = []  # of hooks that are there until the root has run

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is about to run; the first call of all is that of the root."""
        if not in_functorch_transform():
            self._unless_given_up(self._enter, module, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module has run."""
        if in_functorch_transform():  # of the model's own: what it uses inside belongs to the call around it
            self.trace.num_calls[module] = self.trace.num_calls.get(module, 0) + 1
            return
        self._unless_given_up(self._leave, module, args, kwargs, output)

    def _unless_given_up(self, record: Callable[..., None], module: nn.Module, *call: Any) -> None:
        """What cannot be recorded is a reason for no sensitivities, and none against the user's pass."""
        if self._given_up or (self._root_only and self.trace.root not in (None, module)):
            return
        try:
            record(module, *call)
        except Exception as error:
            self._give_up(module, f"its call could not be recorded ({type(error).__name__}: {error})")

    def _give_up(self, module: nn.Module, reason: str) -> None:
        name = f"{self.trace.paths[module]} ({type(module).__name__})"
        self.trace.problems.append(f"{name}: {reason}, so no example has a gradient of its own.")
        self._given_up = True

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._frames:
            self._enter_root(module, args, kwargs)
        elif self._frames[-1].broadcast:
            self._find_broadcast(self._frames[-1], module, args, kwargs)
        may_draw = (module._parameters or module._modules) and rule_of(type(module)) is None
        state = random_state_now(self.trace.random_state) if may_draw else None
        self._frames.append(_Frame(module, len(self.trace.layer_calls), state))

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace = self.trace
        trace.root, trace.args, trace.kwargs = module, detached(args), detached(kwargs)
        trace.versions = versions((args, kwargs))
        trace.in_train_mode = [each for each in trace.paths if each.training]
        trace.random_state = random_state(trace.tracked)
        if any(leaf.layout != torch.strided or leaf.is_nested for leaf in tensor_leaves((args, kwargs))):
            self._give_up(
                module, "an input is a sparse, nested or mkldnn tensor and not a dense one (padded, if need be)"
            )
            return
        if trace.find_rows is not None:
            trace.example_rows = trace.find_rows(module, args, kwargs)
            trace.num_examples = trace.example_rows[0].num_examples
        if not trace.num_examples:
            trace.num_examples = _batch_size(tensor_leaves((args, kwargs)))
        leaves = tree_leaves((args, kwargs))
        trace.input_axes = [None if trace.example_rows else axis_of(leaf, trace.num_examples) for leaf in leaves]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        while self._frames and self._frames[-1].module is not module:  # frames that an exception left open
            self._frames.pop()
        if not self._frames:
            return
        frame = self._frames.pop()
        if self._root_only:
            if not self._frames:
                self.trace.keep_output(output)
            return
        if self._frames:
            self._frames[-1].called |= {module, *frame.called}
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and _uses_batch_statistics(module):
            self._note_batch_norm(module)
        self._attribute(frame, args, kwargs, output)
        if frame.doubtful:
            self._stand_by(frame, args, kwargs, output)
        if not self._frames:
            self._leave_root(frame, args, kwargs, output)
        self.trace.num_calls[module] = self.trace.num_calls.get(module, 0) + 1

    def _note_batch_norm(self, module: nn.Module) -> None:
        trace, of_one_process = self.trace, not isinstance(module, nn.SyncBatchNorm)
        if trace.batch_norm == "constant" and of_one_process:
            if module not in trace.batch_norms:
                trace.batch_norms.append(module)
            return
        option = ", or take its statistics as constants, an approximation, by batch_norm='constant' of the optimizer"
        trace.problems.append(
            f"{trace.paths[module]} ({type(module).__name__}) is in train mode, where each example's output depends on "
            "the whole batch, so no example has a gradient of its own: put it in eval mode (module.eval()) or use "
            "GroupNorm, LayerNorm or filter response normalisation"
            f"{option if trace.edges is None and of_one_process else ''}."
        )

    def _leave_root(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        remove_all(self._handles)
        if any(call.reached for call in self.trace.layer_calls):
            self.trace.problems.append(_DIFFERENTIATES)
        self._settle()
        self._attribute_remaining(frame, args, kwargs, output)
        self.trace.keep_output(output)  # takes the edges of all calls
        self._ends = {}
        if self.trace.edges is None and self.trace.root is not None:
            takes_gradients = ModelChecks.of(self.trace.root).takes_gradients
            if takes_gradients.get(self.trace.kind, len(takes_gradients) < MOST_KINDS):
                self.trace.take_gradients()
                takes_gradients[self.trace.kind] = False

    def _attribute_remaining(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Parameters used in no module's own call, or also elsewhere: for these the whole model is the unit."""
        trace = self.trace
        assert trace.root is not None
        unattributed = self._unattributed(args, kwargs, output)
        for call in trace.layer_calls if unattributed.unused else ():
            call.parameters = [p for p in call.parameters if p not in unattributed.unused]
        for p in unattributed.complex_parameters:
            trace.problems.append(
                f"{trace.paths[trace.root]} ({type(trace.root).__name__}) has a complex parameter of shape "
                f"{tuple(p.shape)}, of which no example has a gradient here: hold it as a pair of reals "
                "(torch.view_as_complex of a parameter [..., 2])."
            )
        for p in unattributed.not_in_model:
            trace.problems.append(
                f"{trace.paths[trace.root]} ({type(trace.root).__name__}) uses a parameter of shape {tuple(p.shape)} "
                "that belongs to none of its modules: register the module that has it as a submodule."
            )
        if unattributed.used_outside_call:
            rest, last = unattributed.used_outside_call, trace.layer_calls[-1] if trace.layer_calls else None
            if last is None or last.module is not trace.root or last.rule is not None:
                self._add_call(frame, trace.root, rest, None, args, kwargs, output)
            else:
                for inner in trace.layer_calls[:-1]:
                    inner.parameters = [p for p in inner.parameters if all(p is not q for q in rest)]
                last.parameters = list(dict.fromkeys([*last.parameters, *rest]))
        if unattributed.not_in_graph and trace.edges is None:
            report = partial(trace.problems.append, _NOT_IN_GRAPH.format(name=trace.paths[trace.root]))
            handles = [p.register_hook(lambda gradient: report()) for p in unattributed.not_in_graph if p.requires_grad]
            finalize(trace, remove_all, handles)

    def _unattributed(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> UnattributedParameters:
        """What the calls do not explain, looked for once for each kind of pass: walking a graph is dear."""
        trace = self.trace
        assert trace.root is not None
        outputs, inputs = nodes_of(tensor_leaves(output)), set(nodes_of(tensor_leaves((args, kwargs))))
        place, trace.graph_structure, trace.orders = structure(outputs, inputs)
        calls = tuple(
            (
                call.path,
                call.rule is None,
                tuple(map(id, call.parameters)),
                *(tuple(map(place.get, end)) for end in ends),
            )
            for call, ends in self._ends.items()
        )
        trace.kind = kind = calls, trace.graph_structure, frozenset(map(id, trace.tracked)), trace.paths_in_train_mode
        known = ModelChecks.of(trace.root).unattributed
        if kind not in known:
            subgraphs = [CallSubgraph(call.parameters, *map(set, ends)) for call, ends in self._ends.items()]
            used, used_outside_call, unused = find_unexplained_uses(set(outputs), inputs, subgraphs)
            attributed = {p for call in trace.layer_calls for p in call.parameters}
            own: list[Tensor] = [p for p in trace.root.parameters() if p in trace.tracked]
            finding = UnattributedParameters(
                not_in_model=list(used_outside_call.intersection(trace.tracked).difference(own)),
                used_outside_call=[p for p in own if p in used_outside_call],
                not_in_graph=[p for p in own if p not in used and p not in attributed],
                unused=unused,
                complex_parameters=[p for p in own if p.is_complex() and (p in used or p in attributed)],
            )
            remember(known, kind, finding)
        return known[kind]

    def _attribute(self, frame: _Frame, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Record this call, if its module owns tracked parameters; or leave them to the call around it."""
        module = frame.module
        frame.pending += [p for broadcast in frame.broadcast if broadcast.certain for p in broadcast.parameters]
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
            self._await_uncalled(frame, args, kwargs, output)
            return
        outputs = [leaf for leaf in tensor_leaves(output) if leaf.requires_grad]
        if not outputs:
            return
        if rule is not None:
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            # Pruning and the older weight_norm make the weight from a parameter of another name.
            plain = all(rule.covers(module, p) for p in wanted) and _COMPUTE.isdisjoint(module.__dict__)
            fits = single and plain and self._has_row_per_example(args[0]) and rule.accepts(module, args[0])
            if single and plain and self._frames and not (args[0].requires_grad or self.trace.example_rows):
                number = self.trace.num_calls.get(module, 0)
                self._frames[-1].broadcast.append(
                    BroadcastCall(module, number, wanted, rule, args[0], output, not fits)
                )
                if not self._has_row_per_example(args[0]):
                    return
            rule = rule if fits else None
        if rule is None:
            if not self._can_be_unit(module, args, kwargs, output):
                self._leave_to_parent(module, wanted)
                return
            # What this module's forward may use without calling its owner (MultiheadAttention's out_proj), if no call
            # inside did.
            inner = (call.module for call in self.trace.layer_calls[frame.first_call :] if call.rule is None)
            others = frame.called.union({module}, *(called.modules() for called in inner))
            for child in module.modules():
                if child not in others:
                    wanted += [p for p in child._parameters.values() if p is not None and p in self.trace.tracked]
        self._add_call(frame, module, wanted, rule, args, kwargs, output)
        if rule is not None and self._frames:
            call = self.trace.layer_calls[-1]
            doubtful = call.input_may_not_depend_on_examples or (args[0].requires_grad and args[0].is_leaf)
            if doubtful and not self.trace.example_rows and not self._is_known(call):
                self._frames[-1].doubtful.append(call)

    def _can_be_unit(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
        """Whether a call can be made again on one example at a time, as far as sizes tell."""
        into, out = self._axes(module, args, kwargs, output)
        out = [axis for leaf, axis in zip(tensor_leaves(output), out, strict=True) if leaf.requires_grad]
        if all(axis is None for axis in out) or all(axis is None for axis in into) and not self.trace.example_rows:
            return False
        return None not in out or not self._frames  # the loss need not read all that the model returns, as a state

    def _stand_by(self, frame: _Frame, args: Any, kwargs: Any, output: Any) -> None:
        """Record a call that takes over from calls inside, should their inputs turn out to have no examples.

        Where an index gives the examples it is the model's: the rows of any other may be as many by chance.
        """
        trace, module = self.trace, frame.module
        if trace.example_rows and self._frames or not self._can_be_unit(module, args, kwargs, output):
            if self._frames:
                self._frames[-1].doubtful += frame.doubtful
            return
        last = trace.layer_calls[-1]
        if last.module is not module or last.number != trace.num_calls.get(module, 0) or last.rule is not None:
            self._add_call(frame, module, [], None, args, kwargs, output)
            last = trace.layer_calls[-1]
        self._stand_ins[last] = frame.doubtful, trace.layer_calls[frame.first_call : -1]

    def _await_uncalled(self, frame: _Frame, args: Any, kwargs: Any, output: Any) -> None:
        """Record a call that will explain the parameters of modules below it that are called nowhere.

        As a ParameterDict's, or those of a child whose weight is read without calling it. Whether one is called, the
        end of the pass tells.
        """
        if not self._frames or not (frame.uncalled or frame.module._modules):
            return  # the whole model is the unit of what is left
        uncalled = [*frame.uncalled, *_uncalled(frame.module, frame.called)]
        tracked = self.trace.tracked
        uncalled = [each for each in uncalled if any(p in tracked for p in each._parameters.values())]
        if not uncalled:
            return
        if not self._can_be_unit(frame.module, args, kwargs, output):
            self._frames[-1].uncalled += uncalled
            return
        self._add_call(frame, frame.module, [], None, args, kwargs, output)
        self._adopters.append((self.trace.layer_calls[-1], frame, uncalled))

    def _settle(self) -> None:
        """Give what was awaited to the calls that wait for it, now that all calls are known."""
        trace = self.trace
        for call, frame, uncalled in self._adopters:
            owners = [module for module in uncalled if module not in trace.num_calls]
            owned = [p for module in owners for p in module._parameters.values() if p is not None]
            adopted: dict[Tensor, None] = dict.fromkeys(p for p in owned if p in trace.tracked and p.requires_grad)
            for inner in trace.layer_calls[frame.first_call : trace.layer_calls.index(call)]:
                inner.parameters = [p for p in inner.parameters if p not in adopted]
            call.parameters = list(adopted)
        for call in [call for call, *_ in self._adopters if not call.parameters and call not in self._stand_ins]:
            trace.layer_calls.remove(call)
            del self._ends[call]
        place = {call: number for number, call in enumerate(trace.layer_calls)} if self._stand_ins else {}
        for unit, (doubtful, inside) in self._stand_ins.items():
            unit.inside = [place[call] for call in inside if call in place]
            for call in doubtful:
                call.stand_in = place[unit]

    def _add_call(
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
        made_of_others, is_nested = set(), False
        if rule is None and len(positions) > 1:
            ends = nodes_of(tensor_leaves((args, kwargs)))
            made_of_others, is_nested = self._separate_outputs(leaves, positions, ends)
        if rule is None:  # replaying this call moves the parameters wherever it uses them
            for inner in trace.layer_calls[frame.first_call :]:
                inner.parameters = [p for p in inner.parameters if all(p is not q for q in parameters)]
        held_args, held_kwargs = _without_parameters((args, kwargs))
        call = LayerCall(
            module=module,
            path=trace.paths[module],
            number=trace.num_calls.get(module, 0),
            parameters=list(dict.fromkeys(parameters)),
            rule=rule,
            args=held_args,
            kwargs=held_kwargs,
            versions=versions((held_args, held_kwargs)),
            input_may_not_depend_on_examples=self._may_not_depend_on_examples(args, kwargs),
            positions=positions,
            shapes=[tuple(leaves[i].shape) for i in positions],
            cotangents=[None] * len(positions),
            is_nested=is_nested,
        )
        if trace.example_rows:
            call.output_rows = [self._rows_of(leaves[i]) for i in positions]
        if rule is None:
            call.input_axes, axes = self._axes(module, args, kwargs, output)
            call.output_axes = [axes[i] for i in positions]
            call.random_state = frame.random_state if frame.random_state and has_drawn(frame.random_state) else None
        else:
            call.input_axes, call.output_axes = [0], [0]
        sources = [_source(leaf) if rule is not None else leaf for leaf in leaves]
        inputs = tensor_leaves((args, kwargs))
        # Taken now: a tensor that is written in place later has another node then.
        self._ends[call] = nodes_of(inputs), nodes_of(sources)
        # One row per example is little to keep; feature maps of the user's own pass would be much.
        if rule is None or trace.edges is not None or all(len(shape) == 2 for shape in call.shapes):
            call.outputs = [(detached(leaves[i]), leaves[i]._version) for i in positions]
        for position, i in enumerate(positions):
            if i not in made_of_others:
                self._wait_for_gradient(call, position, sources[i])
        trace.layer_calls.append(call)
        if trace.example_rows and self._frames and not self._is_known(call):
            self._frames[-1].doubtful.append(call)

    def _separate_outputs(self, leaves: list[Tensor], positions: list[int], ends: list[Node]) -> tuple[set[int], bool]:
        """(The outputs whose gradients are not needed, whether others are made of one another).

        Not needed is that of one that is made of other outputs alone, as a loss of the logits beside it: their
        gradients have what came through it.
        """
        inside = list(zip(positions, outputs_inside([leaves[i] for i in positions], set(ends)), strict=True))
        tracked = self.trace.tracked
        made = {position for position, (inner, leaves) in inside if inner and leaves.isdisjoint(tracked)}
        return made, any(inner for position, (inner, _) in inside if position not in made)

    def _find_broadcast(self, frame: _Frame, reader: nn.Module, args: Any, kwargs: Any) -> None:
        """Record the calls inside a frame whose outputs are terms of what a module is about to be given."""
        totals = [
            (place, leaf)
            for place, leaf in enumerate(tensor_leaves((args, kwargs)))
            if leaf.requires_grad and self._has_row_per_example(leaf)
        ]
        for broadcast in list(frame.broadcast):
            for place, total in totals:
                repeated = broadcast.for_all(total)
                others = other_terms(total, broadcast.output) if repeated is not None else None
                if others is not None:
                    frame.broadcast.remove(broadcast)
                    consumer = reader, self.trace.num_calls.get(reader, 0), place
                    self._add_broadcast(broadcast, repeated, total, others, consumer)
                    break

    def _add_broadcast(
        self, broadcast: BroadcastCall, repeated: Tensor | None, total: Tensor, others: list[Node], consumer: Any
    ) -> None:
        trace = self.trace
        for call in trace.layer_calls:  # it looked like a row for each example
            if call.module is broadcast.module and call.number == broadcast.number:
                call.parameters = []
        call = LayerCall(
            module=broadcast.module,
            path=trace.paths[broadcast.module],
            number=broadcast.number,
            parameters=broadcast.parameters,
            rule=broadcast.rule,
            args=(repeated,),
            kwargs={},
            versions=versions(repeated),
            positions=[0],
            shapes=[tuple(total.shape)],
            cotangents=[None],
            input_axes=[0],
            output_axes=[0],
            consumer=consumer,
        )
        self._ends[call] = others, nodes_of([total])
        self._wait_for_gradient(call, 0, total)
        trace.layer_calls.append(call)

    def _wait_for_gradient(self, call: LayerCall, position: int, tensor: Tensor) -> None:
        trace = self.trace
        if trace.edges is not None:
            trace.edges.append((call, position, get_gradient_edge(tensor)))
            self._handles.append(tensor.register_hook(partial(call.receive, position)))
            return
        tensor.register_hook(partial(call.receive, position))
        if trace.probe is not None:
            trace.probe.edges.append((call, position, get_gradient_edge(tensor)))

    def _has_row_per_example(self, tensor: Tensor) -> bool:
        """Also rows that an index gives to the examples."""
        has_row = tensor.dim() > 0 and tensor.shape[0] == self.trace.num_examples
        return has_row or self._rows_of(tensor) is not None

    def _rows_of(self, tensor: Tensor) -> ExampleRows | None:
        """Which examples the rows of a tensor are of, if an index gives them to those of so many rows."""
        rows = self.trace.example_rows if tensor.dim() > 0 else ()
        return next((each for each in rows if len(each) == len(tensor)), None)

    def _axes(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Axes, Axes]:
        """The axis of the examples of each input leaf and of each output tensor."""
        inputs, outputs = tree_leaves((args, kwargs)), tensor_leaves(output)
        if self.trace.example_rows:  # nothing is run on one example at a time
            return [None] * len(inputs), [0 if self._has_row_per_example(leaf) else None for leaf in outputs]
        return axes_of_call(module, args, kwargs, inputs, outputs, self.trace.num_examples)

    def _is_known(self, call: LayerCall) -> bool:
        """Whether its rows were seen to be those of examples."""
        assert self.trace.root is not None
        return (call.path, call.number) in ModelChecks.of(self.trace.root).with_examples

    def _may_not_depend_on_examples(self, args: Any, kwargs: Any) -> bool:
        """Whether some input neither requires grad nor is one of the model's own."""
        own = {leaf.data_ptr() for leaf in tensor_leaves((self.trace.args, self.trace.kwargs))}
        leaves = tensor_leaves((args, kwargs))
        return any(self._has_row_per_example(x) and not x.requires_grad and x.data_ptr() not in own for x in leaves)

    def _leave_to_parent(self, module: nn.Module, wanted: list[Tensor]) -> None:
        if self._frames:
            self._frames[-1].pending += wanted
            return
        trace = self.trace
        reason = f"its inputs or outputs have no example axis of size {trace.num_examples} as dimension 0"
        given = (*trace.args, *trace.kwargs.values())
        if not trace.num_examples and not tensor_leaves(given):
            kinds = ", ".join(type(each).__name__ for each in given) or "nothing"
            reason = f"it was called with no tensors, nor tuples or dicts of them, but with {kinds}"
        trace.problems.append(
            f"{trace.paths[module]} ({type(module).__name__}): {reason}, so per-example gradients are not defined."
            f"{trace.hint_at_index()}"
        )


def _uncalled(module: nn.Module, called: Container[nn.Module]) -> Iterator[nn.Module]:
    """The modules below a module that no call inside it was of, nor of a module between."""
    for child in module._modules.values():
        if child is not None and child not in called:
            yield child
            yield from _uncalled(child, called)


def _batch_size(leaves: list[Tensor]) -> int:
    """How many rows the first input has that is no square matrix; one that all examples share, of a graph, may lead."""
    sized = [leaf for leaf in leaves if leaf.dim() > 0]
    others = [leaf for leaf in sized if leaf.dim() != 2 or leaf.shape[0] != leaf.shape[1]]
    return next((leaf.shape[0] for leaf in (*others, *sized)), 0)


def _without_parameters(tree: Any) -> Any:
    """The same structure detached, with copies of parameters and of their views, which the optimizer's step changes."""
    held = {
        place: _copy(leaf)
        for place, leaf in enumerate(tensor_leaves(tree))
        if isinstance(leaf, nn.Parameter) or isinstance(view_base(leaf), nn.Parameter)
    }
    return detached(with_leaves(tree, held) if held else tree)


def _copy(leaf: Tensor) -> Tensor:
    """A copy of a tensor, of one that was expanded no larger than what it was expanded from."""
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in leaf.stride())
    return leaf.detach()[once].clone().expand_as(leaf)


def _source(leaf: Tensor) -> Tensor:
    """The tensor to hook for a layer's output, the same but for its shape.

    `nn.Linear` gives a view of its product when the input has more than two axes. Should an activation then write
    the view in place, the view's node leaves the graph; that of the product stays.
    """
    base = view_base(leaf)
    if base is None or base.numel() != leaf.numel() or not (base.is_contiguous() and leaf.is_contiguous()):
        return leaf
    return base


def _uses_batch_statistics(module: nn.modules.batchnorm._BatchNorm) -> bool:
    return module.training or (module.running_mean is None and module.running_var is None)
