"""Hooks that record one pass, and when all hooks of vlearn are silent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.recorder import Recorder
from vlearn.capture.trace import Trace

_paused = False


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
    recorder = Recorder(trace)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not hooks_are_silent():
            recorder.enter(module, args, kwargs)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not hooks_are_silent():
            recorder.leave(module, args, kwargs, output)

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
