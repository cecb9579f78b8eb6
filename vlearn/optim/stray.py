"""Gradients that came from a backward pass outside any draw, and so are not at the sampled weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakMethod, ref

from torch import Tensor


class Arrivals:
    """Tells its owner of every gradient that a backward pass accumulates, and remembers a stray one.

    Args:
        arrived: bound method called with the parameter; returns whether a draw explains the gradient.
    """

    def __init__(self, arrived: Callable[[Tensor], bool]):
        self._arrived = WeakMethod(arrived)
        self._hooks: dict[Tensor, Any] = {}
        self._stray: Callable[[], Tensor | None] = lambda: None
        self._stray_parameter: Tensor | None = None

    def listen(self, parameters: Iterable[Tensor]) -> None:
        """Hook those of the parameters that require grad and are not hooked yet."""
        this = ref(self)

        def hook(p: Tensor) -> None:
            arrivals = this()
            arrived = arrivals._arrived() if arrivals is not None else None
            if arrivals is not None and arrived is not None and not arrived(p):
                arrivals.mark(p)

        for p in parameters:
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(hook)

    def mark(self, p: Tensor) -> None:
        """Remember the gradient that p has now as a stray one."""
        if self.stray is None and p.grad is not None:
            self._stray_parameter, self._stray = p, ref(p.grad)

    def clear(self) -> None:
        """The gradients have been zeroed."""
        self._stray_parameter, self._stray = None, lambda: None

    @property
    def stray(self) -> Tensor | None:
        """A parameter whose present gradient has a stray part."""
        gradient = self._stray()
        if gradient is None or self._stray_parameter is None or self._stray_parameter.grad is not gradient:
            return None
        return self._stray_parameter
