"""A watched model: its training forwards draw, its eval forwards see the mean, its passes are recorded.

The outermost call of any module is the one that counts, whichever the user calls first.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from functools import cache, partial
from threading import get_ident
from types import FrameType
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlearn._torch_internals import (
    current_node,
    forward_pre_hooks,
    frame_of_call,
    has_compiled,
    in_functorch_transform,
)
from vlearn.capture.autograd_graph import leaves_read_before, nodes_of, value_of_backward
from vlearn.capture.hooks import hooks_are_silent, is_recomputed
from vlearn.capture.names import module_paths, named_parameters
from vlearn.capture.output_probe import OutputProbe
from vlearn.capture.pytrees import Selector, select, tensor_leaves
from vlearn.capture.recorder import Recorder
from vlearn.capture.trace import Trace
from vlearn.losses.residual_checks import LossMakeup
from vlearn.optim.sampling.draw import Draw, DrawState
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.sampler import Context, Sampler
from vlearn.optim.watch import other_optimizers
from vlearn.optim.watch.constant_statistics import with_constant_statistics
from vlearn.optim.watch.hooks import Link, MeanCopies, hook
from vlearn.optim.watch.loss_scale import LossScale, WatchOptions
from vlearn.optim.watch.sharded_pass import with_whole_weights
from vlearn.per_example.measured_rows import told_rows
from vlearn.per_example.recorded_pass import RecordedPass

COMPILED = (
    " If the model is compiled, its compiled code calls no hooks that came later: make the optimizer before the first "
    "call, or give it what torch.compile returned."
)
_REENTRANT = (
    "{name} is computed again inside the backward pass, but its forward pass had no graph and so was at the mean: the "
    "gradient would be that of other weights (reentrant checkpointing around a watched model). Use "
    "checkpoint(..., use_reentrant=False), or sampled_params(train=True)."
)


class PassConsumer(Protocol):
    """What a curvature estimate asks of the recorded passes.

    Attributes:
        probes: whether it wants another gradient of the output sent back beside the loss's.
        output: which of several outputs of the model that is.
    """

    probes: bool
    output: Selector

    def cotangent(self, output: Tensor, residual: Tensor, makeup: LossMakeup, noise: Noise) -> Tensor:
        """The gradient to send back instead of the loss's, in the output's shape, of each example's own loss.

        Args:
            output: the model's.
            residual: the loss's gradient with respect to it.
            makeup: how the loss is made up of the examples' own.
            noise: of the draw.
        """
        ...

    def sums(self, recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Any, Tensor]:
        """What is summed over the examples of a pass, by parameter in its shape or by other keys.

        Args:
            wanted: the parameters that have a gradient.
        """
        ...


class Watch:
    """Hooks on a model for one sampler, and the recorded pass of its last training step.

    Args:
        model: the model.
        options: how its loss is made up.

    Attributes:
        removed: whether the hooks have been taken off.

    Raises:
        TypeError: if the model is none.
    """

    def __init__(self, model: nn.Module, options: WatchOptions):
        if not isinstance(model, nn.Module):
            raise TypeError(f"watch() got {type(model).__name__}, but it needs the nn.Module that is trained.")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"watch() got a scripted {model.original_name}, which calls no hooks: watch the model that it was made "
                "of, or make the optimizer from its parameters() and draw by optimizer.train() or sampled_params()."
            )
        self.model, self.options = model, options
        self._parts: list[nn.Module] = [model]
        self._links, self._handles = hook(dict.fromkeys(model.modules()))

    def bind(self, sampler: Sampler, consumer: PassConsumer | None) -> Watch:
        """Work for this sampler, whose owner owns the watch too.

        Args:
            consumer: what wants to see every recorded pass.
        """
        self._sampler: ReferenceType[Sampler] = ref(sampler)
        self._consumer = consumer
        self.removed = False
        self._name_parts()
        sampler.listener = self
        self.trace: Trace | None = None
        self.trace_step = 0
        self._collected = True  # the trace, by the consumer
        self._recorder: Recorder | None = None  # while a forward pass that is recorded runs
        # Two modules whose training forward passes came before one backward pass.
        self._overlap: tuple[nn.Module | None, nn.Module] | None = None
        self._scale = LossScale(self.options)
        self._calls: list[tuple[nn.Module, int]] = []  # that are open, with the id of the frame that runs each
        self._thread, self._several_threads = 0, False  # of the outermost call; whether others run calls inside it
        # Whether the outermost calls since the last step left a graph.
        self._left_graph: dict[nn.Module, bool] = {}
        self._left_graph_step = 0
        self._mean_copies = MeanCopies()
        for link in self._links:
            link.watch = self
        other_optimizers.listen(self)
        return self

    def add(self, part: nn.Module) -> None:
        """Watch another module too, which the training loop calls apart from the model."""
        known = {module for each in self._parts for module in each.modules()}
        links, handles = hook(module for module in dict.fromkeys(part.modules()) if module not in known)
        for link in links:
            link.watch = self
        self._links += links
        self._handles += handles
        within = set(part.modules())
        self._parts = [*(each for each in self._parts if each not in within), part]
        self.model = part if len(self._parts) == 1 else nn.ModuleList(self._parts)
        self._name_parts()

    def _name_parts(self) -> None:
        self.paths = module_paths(self.model)
        named = named_parameters(self.model)
        self.sampler.parameters.names_in_model = {p: name for name, p in named}

    @property
    def is_training(self) -> bool:
        """Whether any part of the model is in train mode."""
        return any(part.training for part in self._parts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("model", "options", "_parts", "_links", "_handles")}

    @property
    def sampler(self) -> Sampler:
        """The sampler that draws for the model."""
        sampler = self._sampler()
        assert sampler is not None
        return sampler

    @property
    def draw(self) -> Draw | None:
        """The draw that waits for step()."""
        return self.sampler.draw

    def remove(self) -> None:
        """Take every hook off the model."""
        self.removed = True
        other_optimizers.stop_listening(self)
        for handle in self._handles:
            handle.remove()
        for link in self._links:
            link.watch = None
        self.forget_calls()
        self.forget_pass()
        sampler = self._sampler()
        if sampler is not None:
            sampler.listener, sampler.parameters.names_in_model = None, {}

    # -- hooks -------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is about to run; the outermost call draws, or shows the mean."""
        if hooks_are_silent():
            if is_recomputed() and torch.is_grad_enabled() and not self._left_graph.get(module, True):
                raise RuntimeError(_REENTRANT.format(name=self.paths[module]))
            return
        frame = frame_of_call()
        if self._calls:
            self._close_calls_that_ended(frame)
        if not self._calls:
            if next(module.parameters(), None) is None:
                return  # a loss or a metric that the model has as a submodule: no pass of its own
            if module.training and in_functorch_transform():
                return  # torch.func runs it, as a function of weights that a draw may not write
            self._enter(module)
        self._calls.append((module, id(frame)))
        self._several_threads |= get_ident() != self._thread
        if self._recorder is not None:
            self._recorder.enter(module, args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has run, or an exception left it."""
        if hooks_are_silent() or all(module is not called for called, _ in self._calls):
            return
        while self._calls.pop()[0] is not module:  # calls that an exception left open
            pass
        if self._recorder is not None and output is not None:
            self._recorder.leave(module, args, kwargs, output)
        if not self._calls:
            self._leave(output)

    def _close_calls_that_ended(self, frame: FrameType) -> None:
        """An interrupt ends calls for which torch then runs no forward hook: their frames are not below the new one."""
        innermost, running = self._calls[-1][1], set()
        below = frame.f_back
        while below is not None:
            if id(below) == innermost:
                return
            running.add(id(below))
            below = below.f_back
        if get_ident() == self._thread:
            while self._calls and self._calls[-1][1] not in running:
                self._calls.pop()

    def forget_calls(self) -> None:
        """Abandon a forward pass that was interrupted."""
        self._calls.clear()
        if self._recorder is not None:
            self.trace = self._recorder = None

    def forget_pass(self) -> None:
        """The weights of the last pass are gone."""
        self.trace = None

    def _enter(self, module: nn.Module) -> None:
        sampler = self.sampler
        sampler.recover()
        self._thread, self._several_threads = get_ident(), False
        self._note_graph(module)
        if sampler.context is Context.ENSEMBLE:
            return
        if module.training and torch.is_grad_enabled():
            earlier = self.trace is not None and self.trace.waits_for_backward
            self._overlap = (self.trace.root, module) if earlier and self.trace is not None else None
            self.collect()
            self.trace = None
            sampler.begin_automatic()
            step = sampler.parameters.next_step()
            if self.records(step):
                self.trace, self.trace_step = self._new_trace(sampler), step
                self._collected = False
                self._recorder = Recorder(self.trace, root_only=sampler.processes.mesh is not None)
        elif sampler.context is Context.NONE and sampler.draw is not None:
            if sampler.draw.state in (DrawState.ACTIVE, DrawState.SUSPENDED):
                self._check_not_overwritten(sampler.draw)
                sampler.draw.suspend()

    def _check_not_overwritten(self, draw: Draw) -> None:
        """What was written into the weights under a draw is not seen at the mean, and may go with the draw."""
        p = draw.overwritten()
        if p is not None:
            parameters = self.sampler.parameters
            raise RuntimeError(
                f"the weight {parameters.names()[p]!r} was written in place while a draw of {parameters.owner} was in "
                "it, so that the mean, which the model in eval mode shows, does not have what was written: call "
                "optimizer.unwatch() if other code trains the model now, or write the weights after step()."
            )

    def other_optimizer_stepped(self, other: Optimizer) -> None:
        """Another optimizer has updated its parameters.

        Raises:
            RuntimeError: if a draw was in some of them: it has trained the draw, which goes.
        """
        draw = self.draw
        if draw is None or draw.state not in (DrawState.ACTIVE, DrawState.SUSPENDED) or not draw.has_gradient:
            return
        p = next((p for group in other.param_groups for p in group["params"] if p in draw.slices_of), None)
        if p is not None:
            parameters = self.sampler.parameters
            self.sampler.discard()
            raise RuntimeError(
                f"{type(other).__name__}.step() has moved {parameters.names()[p]!r} while a draw of "
                f"{parameters.owner}, which watches the model, was in it; the weights are the mean of before: call "
                f"optimizer.unwatch() of the {parameters.owner} before another optimizer trains the model."
            )

    def _new_trace(self, sampler: Sampler) -> Trace:
        trace = Trace(self.paths, sampler.parameters.trainable())
        trace.on_backward, trace.batch_norm = self._begin_backward, self.options.batch_norm
        if self.options.example_index is not None:
            trace.find_rows = partial(told_rows, self.options.example_index)
        consumer = self._consumer
        if consumer is not None and consumer.probes and trace.tracked:
            trace.probe = OutputProbe(lambda output: select(output, consumer.output), self._cotangent)
        return trace

    def _note_graph(self, module: nn.Module) -> None:
        step = self.sampler.parameters.next_step()
        if step != self._left_graph_step:
            self._left_graph, self._left_graph_step = {}, step
        if torch.is_grad_enabled() or self.sampler.context is not Context.NONE:
            self._left_graph[module] = True
        else:
            self._left_graph.setdefault(module, False)

    def _leave(self, output: Any) -> None:
        self._recorder = None
        draw = self.draw
        if draw is None or draw.state not in (DrawState.ACTIVE, DrawState.SUSPENDED):
            return
        # Nodes are numbered by thread.
        if draw.state is DrawState.ACTIVE and draw.first_node is not None and not self._several_threads:
            self._check_read_since(draw, draw.first_node, output)
        # An eval forward between this pass and its backward may be interrupted and leave the mean in the weights.
        suspended = draw.state is DrawState.SUSPENDED
        before_backward = _refuse_backward if suspended else partial(_restore_draw_before_backward, ref(self))
        draw.restore()
        for leaf in tensor_leaves(output):
            if leaf.requires_grad:
                leaf.register_hook(before_backward)

    def _check_read_since(self, draw: Draw, first_node: int, output: Any) -> None:
        """The graph of a training forward pass has no weights of before the draw."""
        early = leaves_read_before(nodes_of(tensor_leaves(output)), first_node, draw.slices_of)
        if early:
            names = self.sampler.parameters.names()
            self.sampler.discard()
            raise RuntimeError(
                f"the weight {names[early[0]]!r} was read before this forward pass of the watched model put a draw "
                "into it, so its gradient would be that of the mean: watch the model whose forward pass reads all "
                "weights (optimizer.watch), or draw first, by optimizer.train() or inside sampled_params(train=True)."
            )

    def put_mean(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace a module's entries of a state_dict by copies of the mean while a draw is in the weights."""
        draw = self.draw
        if draw is not None:
            self._mean_copies.put(draw, module, state_dict, prefix)

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the weights are the mean; a draw is put back afterwards."""
        return self.sampler.at_mean()

    def weights_loaded(self) -> None:
        """The loaded weights are the mean, so a draw that waits is void."""
        self.sampler.discard()

    # -- the recorded pass -------------------------------------------------------------------------------

    @property
    def needs_draw(self) -> bool:
        """Whether the sampled weights are still wanted after the step that used them."""
        return self.trace is not None

    def records(self, step: int) -> bool:
        """Whether the passes of a step are recorded."""
        return (step - 1) % self.options.every == 0

    def _begin_backward(self) -> None:
        if self.trace is not None:  # else of a pass that is not wanted any more
            self._scale.read(self.trace)
            self.sampler.forget_zeroed_passes()

    def _cotangent(self, output: Tensor, residual: Tensor) -> Tensor | None:
        """What the probe of the pass that runs backward sends back; None where it has no examples, or is not wanted."""
        sampler, trace = self._sampler(), self.trace
        if sampler is None or sampler.draw is None or self._consumer is None:
            return None
        if trace is None or trace.probe is None or not trace.probe.running or not trace.num_examples:
            return None
        averaged = self.options.loss_reduction == "mean" and trace.kwargs.get("num_items_in_batch") is None

        def weight_of(count: int) -> float:
            return trace.num_examples / count if averaged else 1.0

        makeup = LossMakeup(weight_of, self._scale.told, cache(partial(value_of_backward, current_node())))
        return self._consumer.cotangent(output, residual, makeup, sampler.draw.noise)

    def last_pass(self, prefix: str = "", as_probed: bool = False) -> RecordedPass:
        """The last recorded pass, at the weights that it saw.

        Args:
            prefix: what an error says before the reason why the examples have no gradients of their own.
            as_probed: only the probe's gradients are wanted, which do not depend on the scale of the loss.
        Raises:
            RuntimeError: if there is none, or its examples have no gradients of their own.
        """
        trace, sampler = self.trace, self.sampler
        if trace is None:
            last = f"; the last captured step is {self.trace_step}" if self.trace_step else ""
            raise RuntimeError(
                f"sensitivities() has no captured training step{last} (every={self.options.every}): run forward and "
                f"backward in train mode first.{COMPILED if not last and has_compiled() else ''}"
            )
        if self._overlap is not None:
            first, second = self._overlap
            remedy = "concatenate the inputs, or call backward() after each forward pass"
            if first is not None and first is not second:
                kinds = type(first).__name__, type(second).__name__
                parts = f"{self.paths.get(first, kinds[0])!r} ({kinds[0]}) and {self.paths[second]!r} ({kinds[1]})"
                remedy = f"call {parts} in the forward pass of one module, as nn.Sequential does"
            raise RuntimeError(
                "two training forward passes came before one backward pass, so the captures are not those of the whole "
                f"minibatch: {remedy}."
            )
        if trace.problems:
            raise RuntimeError(prefix + trace.problems[0])
        if not trace.received:
            raise RuntimeError("sensitivities() before backward(): no gradient has reached the model's output yet.")
        draw = sampler.draw or sampler.previous
        samples = draw.samples() if draw is not None else {}
        weights = {p: samples.get(p, p.data) for p in trace.tracked}
        scale = 1.0 if as_probed else self._scale.of_own_loss(trace)
        if sampler.processes.mesh is not None:
            return with_whole_weights(self.model, trace, weights, scale)
        if trace.batch_norms:
            trace.with_constants = trace.with_constants or with_constant_statistics(trace, weights)
            trace = trace.with_constants
        return RecordedPass.validated(trace, weights, scale)

    @torch.inference_mode(False)
    @torch.no_grad()
    def collect(self) -> None:
        """Give the consumer the last pass with its gradients, once, and add what it makes of it to the draw's sums."""
        draw, trace, consumer = self.draw, self.trace, self._consumer
        if draw is None or draw.pass_sums is None or consumer is None:
            return
        if trace is None or self._collected or not trace.received:
            return
        if not trace.tracked:  # all was frozen
            return
        self._collected = True
        try:
            recorded = self.last_pass(as_probed=consumer.probes)
            if not recorded.num_examples:
                raise ValueError("the minibatch has none. Leave it out.")
            with torch.autocast(next(iter(trace.tracked)).device.type, enabled=False):
                # Also of what has been frozen since, as a discriminator is while its generator trains.
                tracked = (p for p in draw.parameters if p in trace.tracked)
                wanted = {p for p in tracked if p.grad is not None or p in draw.gradients}
                sums = consumer.sums(recorded, wanted)
                # A probe's rows have the weights of a mean over the rows that the loss depends on.
                count = recorded.num_examples if consumer.probes else recorded.num_with_loss
                draw.pass_sums.add(sums, count, trace.calls_by_parameter())
        except (RuntimeError, ValueError) as error:  # for step() to raise: the training pass itself can go on
            draw.pass_sums.problem = error


def watches(model: nn.Module) -> list[Watch]:
    """The watches of a model or of a part of it."""
    hooks = (hook for module in model.modules() for hook in forward_pre_hooks(module))
    links = (getattr(hook, "__self__", None) for hook in hooks)
    return list(dict.fromkeys(x.watch for x in links if isinstance(x, Link) and isinstance(x.watch, Watch)))


def _refuse_backward(gradient: Tensor) -> None:
    raise RuntimeError(
        "backward through an eval-mode forward pass that was made while a draw was active: its graph belongs to the "
        "mean, but the weights are the draw again. Call optimizer.eval() before that forward pass."
    )


def _restore_draw_before_backward(watch: Callable[[], Watch | None], gradient: Tensor) -> None:
    """Hook of a training forward's outputs, the first to run in its backward. Weak: a graph may outlive all else."""
    alive = watch()
    if alive is not None and not alive.removed:
        alive.sampler.recover()
