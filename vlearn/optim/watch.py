"""A watched model: its training forwards draw, its eval forwards see the mean, its passes leave captures.

Every submodule carries two forward hooks, because the user may call any of them first (the network inside
a LightningModule, one entry of a ModuleDict); the outermost call is the one that counts. The hooks go
through a `Link`, which survives copying: (model, optimizer) copied together stay watched, a model copied
alone is at the mean and inert.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlearn.capture.hooks import hooks_are_silent, is_recomputed, module_paths
from vlearn.capture.probe import Probe
from vlearn.capture.recorder import Recorder
from vlearn.capture.trace import Trace
from vlearn.capture.tree import tensor_leaves
from vlearn.optim.wrappers import named_parameters
from vlearn.sensitivity.live import Selector, Sensitivities, live_sensitivities, select

if TYPE_CHECKING:
    from vlearn.optim.base import VariationalOptimizer

_MODULE_GLOBALS = vars(nn.modules.module)


COMPILED = (
    " If the model is compiled, its compiled code calls no hooks that came later: make the optimizer before the first "
    "call, or give it what torch.compile returned."
)
_REENTRANT = (
    "{name} is computed again inside the backward pass, but its forward pass had no graph and so was at the mean: the "
    "gradient would be that of other weights (reentrant checkpointing around a watched model). Use "
    "checkpoint(..., use_reentrant=False), or sampled_params(train=True)."
)


class Link:
    """What a module's hooks hold: the watch, if there is one."""

    def __init__(self) -> None:
        self.watch: Watch | None = None

    # A compiled model calls the hooks between its graphs; traced into them they would change weights at every call
    # but flags only once.
    @torch.compiler.disable
    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.before(module, args, kwargs)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.watch is not None:
            self.watch.after(module, args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        # The module's parameters are copied before its hooks: put the mean into the copies.
        draw = self.watch.optimizer._draw if self.watch is not None else None
        for slot in draw.slots if draw is not None else ():
            copied = memo.get(id(slot.parameter))
            if copied is not None and not slot.mean_in_weights:
                slot.of(copied.data).copy_(slot.mean)
        memo[id(self)] = link = Link()
        return link

    def __reduce__(self) -> tuple[type[Link], tuple[()]]:
        return Link, ()


class StateDictMean:
    """State-dict hook of one module: its entries hold the mean."""

    def __init__(self, link: Link):
        self.link = link

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        if self.link.watch is not None:
            self.link.watch.put_mean(module, state_dict, prefix)


class Watch:
    """Hooks on a model for one optimizer, and the trace of its last training step.

    Args:
        model, loss_reduction, loss_scale, every: see `VariationalOptimizer.watch`.

    Raises:
        TypeError, ValueError: if an argument breaks its rule.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_reduction: str | Callable[[], float],
        loss_scale: float | Callable[[], float],
        every: int,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"watch() got {type(model).__name__}, but it needs the nn.Module that is trained.")
        if not callable(loss_reduction) and loss_reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction={loss_reduction!r}, but it must be 'mean', 'sum' or a callable: use a callable that "
                "returns the denominator of the loss."
            )
        if not callable(loss_scale) and not (math.isfinite(loss_scale) and loss_scale != 0):
            raise ValueError(f"loss_scale={loss_scale!r}, but it must be finite and not zero: use 1.0.")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}, but it must be a positive whole number: use 1 for every step.")
        self.model = model
        self.loss_reduction = loss_reduction
        self.loss_scale = loss_scale
        self.every = every
        self.links: list[Link] = []
        self._handles: list[Any] = []
        for module in dict.fromkeys(model.modules()):
            # The wrapper's own part of a pass talks to other processes, which a replay or a probe must not repeat.
            if isinstance(module, DistributedDataParallel):
                continue
            link: Any = Link()  # the type of what torch.compiler.disable makes of its methods is lost
            self.links.append(link)
            self._handles += [
                # First of all hooks: others may compute weights from the parameters, or change inputs and outputs.
                module.register_forward_pre_hook(link.before, with_kwargs=True, prepend=True),  # pyright: ignore
                module.register_forward_hook(link.after, with_kwargs=True, always_call=True, prepend=True),  # pyright: ignore
                module.register_state_dict_post_hook(StateDictMean(link)),
                module.register_load_state_dict_pre_hook(_DropDraw(link)),
            ]

    def bind(self, optimizer: VariationalOptimizer) -> Watch:
        """Work for this optimizer, which owns the watch."""
        self._optimizer: ReferenceType[VariationalOptimizer] = ref(optimizer)
        self.paths = module_paths(self.model)
        self.names = {p: name for name, p in named_parameters(self.model)}
        self.trace: Trace | None = None
        self.trace_step = 0
        self.collected = True  # the trace, by the optimizer's update rule
        self._recorder: Recorder | None = None  # while a forward pass that is captured runs
        self._overlap = False
        self.scale = 1.0
        self._calls: list[tuple[nn.Module, int]] = []  # that are open, with the id of the frame that runs each
        self._thread = 0
        # Whether the outermost calls since the last step left a graph.
        self._left_graph: dict[nn.Module, bool] = {}
        self._left_graph_step = 0
        self._saved: tuple[Callable[[], Any], dict[Tensor, Tensor]] | None = None
        for link in self.links:
            link.watch = self
        return self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "loss_reduction", "loss_scale", "every", "links", "_handles")
        return {name: self.__dict__[name] for name in kept}

    @property
    def optimizer(self) -> VariationalOptimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        for link in self.links:
            link.watch = None
        self.forget_calls()
        self.trace = None

    # -- hooks -------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if hooks_are_silent():
            if is_recomputed() and torch.is_grad_enabled() and not self._left_graph.get(module, True):
                raise RuntimeError(_REENTRANT.format(name=self.paths[module]))
            return
        frame = _frame_of_call()
        if self._calls:
            self._close_calls_that_ended(frame)
        if not self._calls:
            if next(module.parameters(), None) is None:
                return  # a loss or a metric that the model has as a submodule: no pass of its own
            if module.training and torch._C._are_functorch_transforms_active():
                return  # torch.func runs it, as a function of weights that a draw may not write
            self._enter(module)
        self._calls.append((module, id(frame)))
        if self._recorder is not None:
            self._recorder.enter(module, args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
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
        """Nothing of a forward pass that is still open goes on."""
        self._calls.clear()
        if self._recorder is not None:
            self.trace = self._recorder = None

    def _enter(self, module: nn.Module) -> None:
        optimizer = self.optimizer
        optimizer._settle()
        self._thread = get_ident()
        self._note_graph(module)
        if optimizer._in_context == "ensemble":
            return
        if module.training and torch.is_grad_enabled():
            self._overlap = self.trace is not None and self.trace.waits_for_backward
            optimizer._collect()
            self.trace = None
            optimizer._begin_automatic()
            step = optimizer.next_step()
            if self.captures(step):
                self.trace, self.trace_step = Trace(self.paths, optimizer.moving()), step
                self.trace.on_backward = self._begin_backward
                if optimizer._probes():
                    self.trace.probe = Probe(self._choose, self._probe)
                self.collected = False
                self._recorder = Recorder(self.trace)
        elif not optimizer._in_context and optimizer._draw is not None and optimizer._draw.active:
            optimizer._draw.peek_mean()

    def _note_graph(self, module: nn.Module) -> None:
        step = self.optimizer.next_step()
        if step != self._left_graph_step:
            self._left_graph, self._left_graph_step = {}, step
        if torch.is_grad_enabled() or self.optimizer._in_context:
            self._left_graph[module] = True
        else:
            self._left_graph.setdefault(module, False)

    def _leave(self, output: Any) -> None:
        self._recorder = None
        draw = self.optimizer._draw
        if draw is None or not draw.active:
            return
        # An eval forward between this pass and its backward may be interrupted and leave the mean in the weights.
        hook = _refuse_backward if draw.mean_shown else partial(_settle, ref(self))
        draw.unpeek()
        for leaf in tensor_leaves(output):
            if leaf.requires_grad:
                leaf.register_hook(hook)

    def put_mean(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace a module's entries by copies of the mean while a draw is in the weights; tied ones share one."""
        draw = self.optimizer._draw
        if draw is None:
            return
        if self._saved is None or self._saved[0]() is not state_dict:
            self._saved = (_weak(state_dict), {})
        copies = self._saved[1]
        for name, p in module._parameters.items():
            slots = draw.slots_of.get(p, []) if p is not None else []
            entry = state_dict.get(prefix + name)
            if p is None or entry is None or entry.data_ptr() != p.data_ptr():
                continue
            if all(slot.mean_in_weights for slot in slots):
                continue
            if p not in copies:
                copies[p] = p.detach().clone()
                for slot in slots:
                    slot.of(copies[p]).copy_(slot.mean)
            state_dict[prefix + name] = copies[p]

    # -- sensitivities -----------------------------------------------------------------------------------

    @property
    def needs_sample(self) -> bool:
        """Whether the sampled weights are still wanted after the step that used them."""
        return self.trace is not None

    def captures(self, step: int) -> bool:
        """Whether the passes of a step are captured."""
        return (step - 1) % self.every == 0

    @property
    def has_uncollected(self) -> bool:
        """Whether there is a pass with its gradients that the optimizer's update rule has not seen."""
        return self.trace is not None and self.trace.received and not self.collected

    def _choose(self, output: Any) -> Tensor:
        return select(output, getattr(self.optimizer, "output", None))

    def _probe(self, output: Tensor, residual: Tensor) -> Tensor | None:
        optimizer, trace = self._optimizer(), self.trace
        if optimizer is None or trace is None or trace.probe is None or not trace.probe.running:
            return None  # of a pass that is not wanted any more
        return optimizer._probe(self, output, residual)

    def probed_trace(self) -> Trace:
        """The trace with the gradients of the optimizer's probe.

        Raises:
            RuntimeError: if there is none.
        """
        probe = self.checked_trace().probe
        assert probe is not None
        if probe.problem is not None:
            raise RuntimeError(str(probe.problem)) from probe.problem
        if probe.trace is None:
            raise RuntimeError("the loss does not depend on the output that the curvature is taken of.")
        return probe.trace

    def weight_of_rows(self, count: int) -> float:
        """What an example's own loss multiplies each row of its output with, of `count` rows in the loss."""
        assert self.trace is not None
        averaged = self.loss_reduction == "mean" and self.trace.kwargs.get("num_items_in_batch") is None
        return self.trace.num_examples / count if averaged else 1.0

    def _begin_backward(self) -> None:
        if self.trace is not None:  # else of a pass that is not wanted any more
            self._read_scale(self.trace)
            self.optimizer._forget_zeroed_passes()

    def _read_scale(self, trace: Trace) -> None:
        """The own-loss gradient is the captured one times denominator / loss scale; read as backward begins."""
        if callable(self.loss_reduction):
            denominator = float(self.loss_reduction())
        elif self.loss_reduction == "sum":
            denominator = 1.0
        else:  # Hugging Face's Trainer tells its models what to divide the summed loss by: all tokens of the step
            told = trace.kwargs.get("num_items_in_batch")
            denominator = trace.num_examples if told is None else told
        self.scale = denominator / float(self.loss_scale() if callable(self.loss_scale) else self.loss_scale)

    def checked_trace(self) -> Trace:
        """The trace, whose examples have gradients of their own.

        Raises:
            RuntimeError: if they have not.
        """
        trace = self.trace
        assert trace is not None
        self._check_overlap()
        if trace.problems:
            raise RuntimeError(trace.problems[0])
        return trace

    def _check_overlap(self) -> None:
        if self._overlap:
            raise RuntimeError(
                "two training forward passes came before one backward pass, so the captures are not those of the whole "
                "minibatch: concatenate the inputs, or call backward() after each forward pass."
            )

    def sensitivities(self, deviation: bool, output: Selector, examples: Any) -> Sensitivities:
        trace, optimizer = self.trace, self.optimizer
        if trace is None:
            last = f"; the last captured step is {self.trace_step}" if self.trace_step else ""
            raise RuntimeError(
                f"sensitivities() has no captured training step{last} (every={self.every}): run forward and backward "
                f"in train mode first.{COMPILED if not last and compiles() else ''}"
            )
        self._check_overlap()
        draw = optimizer._draw or optimizer._spent
        samples = draw.samples() if draw is not None else {}
        weights = {p: samples.get(p, p.data) for p in trace.tracked}
        covariance = optimizer.posterior().covariance({name: p for p, name in optimizer._names().items()})
        return live_sensitivities(trace, covariance, weights, self.scale, self.trace_step, deviation, output, examples)


def _frame_of_call() -> FrameType:
    """The frame of torch that runs a module's hooks and its forward."""
    frame = sys._getframe(2)
    while frame.f_globals is not _MODULE_GLOBALS:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


def watchers(model: nn.Module) -> list[VariationalOptimizer]:
    """The optimizers that watch a model or a part of it."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    links = (getattr(hook, "__self__", None) for hook in hooks)
    watches = dict.fromkeys(link.watch for link in links if isinstance(link, Link) and link.watch is not None)
    return [watch.optimizer for watch in watches]


def compiles() -> bool:
    """Whether torch.compile has been at work in this process."""
    from torch._dynamo.utils import counters

    return bool(counters["stats"])


def _weak(state_dict: dict[str, Any]) -> Callable[[], Any]:
    try:
        return ref(state_dict)
    except TypeError:  # a plain dict as destination: tied entries are copied one by one
        return lambda: None


class _DropDraw:
    """Hook of load_state_dict: loaded weights are the mean, so a draw that waits is void."""

    def __init__(self, link: Link):
        self.link = link

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if self.link.watch is not None:
            self.link.watch.optimizer._drop_draws()


def _refuse_backward(gradient: Tensor) -> None:
    raise RuntimeError(
        "backward through an eval-mode forward pass that was made while a draw was active: its graph belongs to the "
        "mean, but the weights are the draw again. Call optimizer.eval() before that forward pass."
    )


def _settle(watch: Callable[[], Watch | None], gradient: Tensor) -> None:
    """Hook of a training forward's outputs, the first to run in its backward. Weak: a graph may outlive all else."""
    found = watch()
    optimizer = found._optimizer() if found is not None else None
    if optimizer is not None:
        optimizer._settle()
