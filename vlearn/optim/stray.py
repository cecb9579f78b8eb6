"""Gradients that came from a backward pass outside any draw, and so are not at the sampled weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from torch import Tensor

from vlearn.optim.draw import Draw


class Arrivals:
    """Notes, for every gradient that a backward pass accumulates, whether a draw explains it.

    The hooks hold this object, so it must not hold the parameters.
    """

    def __init__(self) -> None:
        self.draw: Draw | None = None  # that waits for step()
        self._stray: Callable[[], Tensor | None] = lambda: None
        self._stray_parameter: Callable[[], Tensor | None] = lambda: None

    def __call__(self, p: Tensor) -> None:
        """Hook: a gradient has been accumulated into p."""
        if self.draw is not None and self.draw.active and not self.draw.mean_shown:
            self.draw.has_gradient = True
        else:
            self.mark(p)

    def listen(self, parameters: Iterable[Tensor], hooked: dict[Tensor, Any]) -> None:
        """Hook those of the parameters that require grad and are not in `hooked` yet."""
        for p in parameters:
            if p.requires_grad and p not in hooked:
                hooked[p] = p.register_post_accumulate_grad_hook(self)

    def mark(self, p: Tensor) -> None:
        """Remember the gradient that p has now as a stray one."""
        if self.stray is None and p.grad is not None:
            self._stray_parameter, self._stray = ref(p), ref(p.grad)

    def clear(self) -> None:
        """The gradients have been zeroed."""
        self._stray_parameter = self._stray = lambda: None

    @property
    def stray(self) -> Tensor | None:
        """A parameter whose present gradient has a stray part."""
        p, gradient = self._stray_parameter(), self._stray()
        return p if p is not None and gradient is not None and p.grad is gradient else None
