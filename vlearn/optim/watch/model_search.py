"""Finding the model of an optimizer that was made from parameters alone, as libraries make theirs from a class.

While one is searched for, a hook on all modules sees every forward pass in train mode. The first module that is called
from outside and has parameters of the optimizer is its model; where parts are called apart, each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from vlearn._torch_internals import arguments_of_call, frame_of_call, in_functorch_transform
from vlearn.capture.hooks import hooks_are_silent

Found = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class ModelSearch:
    """A search for the modules that train some parameters.

    Args:
        is_open: whether a forward pass now may be one of the training loop that needs a watch.
        current: the optimizer's parameters. Others take their places where a model is sharded after it was made.
        found: called with each module that is found and with the arguments of the call that is about to run.
    """

    def __init__(self, is_open: Callable[[], bool], current: Callable[[], list[Tensor]], found: Found):
        self._is_open, self._current, self._found = is_open, current, found
        self._missing: set[Tensor] = set()
        self._rejected: WeakSet[nn.Module] = WeakSet()
        self._is_over = False
        self.number = next(_numbers)

    def start(self, parameters: Iterable[Tensor]) -> None:
        """Search for those that train these parameters too, unless the search was stopped."""
        global _handle
        if not self._is_over:
            self._missing.update(parameters)
            self._rejected.clear()
            _searches.add(self)
            if _handle is None:
                _handle = register_module_forward_pre_hook(_look)

    def stop(self) -> None:
        """Search no more."""
        self._is_over = True
        self._missing.clear()
        _end(self)

    def look(self, module: nn.Module, taken: set[Tensor]) -> None:
        """A module is about to run in train mode.

        Args:
            taken: parameters that a later search has found it to train; those that it trains are added.
        """
        if module in self._rejected or not self._is_open():
            return
        if not self._missing.issubset(current := self._current()):
            self._missing = set(current)
        trains = self._missing.intersection(module.parameters())
        if not trains or isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            self._rejected.add(module)
            return
        self._missing -= trains
        if not self._missing:
            _end(self)
        if taken.isdisjoint(trains):
            taken |= trains
            self._found(module, *arguments_of_call(frame_of_call()))


_numbers = count()
_searches: WeakSet[ModelSearch] = WeakSet()
_handle: Any = None  # of the hook on all modules, while a search is on


def _end(search: ModelSearch) -> None:
    _searches.discard(search)
    if not _searches:
        _remove_hook()


def _remove_hook() -> None:
    global _handle
    if _handle is not None:
        _handle.remove()
        _handle = None


def _look(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():  # a graph without a break for this hook: what is compiled was called already
        _look_eagerly(module)


@torch.compiler.disable
def _look_eagerly(module: nn.Module) -> None:
    if not _searches:  # the optimizers have gone
        _remove_hook()
    if not (module.training and torch.is_grad_enabled()) or hooks_are_silent() or in_functorch_transform():
        return
    taken: set[Tensor] = set()
    for search in sorted(_searches, key=lambda search: -search.number):
        search.look(module, taken)
