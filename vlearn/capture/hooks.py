"""Hooks that record one pass, and when all hooks of vlearn are silent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vlearn._torch_internals import forward_pre_hooks, graph_task_id
from vlearn.capture.names import module_paths
from vlearn.capture.recorder import Recorder
from vlearn.capture.trace import Trace
from vlearn.layers.example_rows import ExampleRows

_paused: ContextVar[bool] = ContextVar("_paused", default=False)


@contextmanager
def hooks_paused() -> Iterator[None]:
    """Inside, no hook of vlearn draws, swaps or records and nothing compiles: for passes that vlearn itself makes."""
    before = _paused.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _paused.reset(before)


def hooks_are_silent() -> bool:
    """Whether hooks must do nothing: a pass of our own, or a forward that checkpointing recomputes."""
    return _paused.get() or graph_task_id() != -1


def is_recomputed() -> bool:
    """Whether a forward pass that runs now is one that checkpointing makes inside the backward pass."""
    return not _paused.get() and graph_task_id() != -1


@contextmanager
def weights_at_mean(model: nn.Module) -> Iterator[None]:
    """Inside, the weights are the mean also where an optimizer that watches the model has a draw in them."""
    owners = (getattr(hook, "__self__", None) for module in model.modules() for hook in forward_pre_hooks(module))
    with ExitStack() as stack:
        for context in [getattr(owner, "weights_at_mean", None) for owner in owners]:
            if context is not None:
                stack.enter_context(context())
        yield


@contextmanager
def hooked(
    modules: Iterable[nn.Module], enter: Callable[..., None] | None = None, leave: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Inside, the modules have the given forward hooks, the first of all: others may change inputs and outputs.

    Args:
        enter: (module, args, kwargs), called before a module runs.
        leave: (module, args, kwargs, output), called after; what it returns takes the output's place.
    """
    handles: list[Any] = []
    try:
        for module in modules:
            if enter is not None:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            if leave is not None:
                handles.append(module.register_forward_hook(leave, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record(
    model: nn.Module,
    tracked: Iterable[Tensor],
    num_examples: int = 0,
    example_rows: Sequence[ExampleRows] = (),
    is_replay: bool = False,
) -> Iterator[Trace]:
    """Record the one forward pass made inside; the hooks are gone afterwards, by any exit.

    Its gradients come from `Trace.pulled_back`.

    Args:
        model: called once inside, with gradients enabled.
        tracked: the parameters whose per-example gradients are wanted.
        num_examples: the size of the batch; 0: to be seen from the inputs.
        example_rows: which examples the rows of concatenated tensors are of, if an index gives the examples.
        is_replay: all other hooks of vlearn are silent.
    """
    trace = Trace(module_paths(model), tracked, by_edge=True)
    trace.num_examples, trace.example_rows = num_examples, example_rows
    recorder = Recorder(trace)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_replay or not hooks_are_silent():
            recorder.enter(module, args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if is_replay or not hooks_are_silent():
            recorder.leave(module, args, kwargs, output)

    # Compiled code does not call hooks that came later.
    with hooked(trace.paths, enter, leave), torch.compiler.set_stance("force_eager"):
        yield trace
