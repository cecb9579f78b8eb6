"""Whether each accumulated gradient was computed at the draw, or outside any and so not at the sampled weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from torch import Tensor

from vlearn.optim.sampling.draw import Draw, DrawState


class GradientOrigin:
    """Records, for every gradient that a backward pass accumulates, whether it was computed at the current draw.

    The hooks hold this object, so it must not hold the parameters.

    Attributes:
        draw: the draw that waits for `step()`.
    """

    def __init__(self) -> None:
        self.draw: Draw | None = None
        self._gradient: Callable[[], Tensor | None] = lambda: None
        self._parameter: Callable[[], Tensor | None] = lambda: None

    def __call__(self, p: Tensor) -> None:
        """Hook: a gradient has been accumulated into p."""
        if self.draw is not None and self.draw.state is DrawState.ACTIVE:
            self.draw.has_gradient = True
        else:
            self.record_outside(p)

    def listen(self, parameters: Iterable[Tensor], hooked: dict[Tensor, Any]) -> None:
        """Hook those of the parameters that require grad and are not in `hooked` yet."""
        for p in parameters:
            if p.requires_grad and p not in hooked:
                hooked[p] = p.register_post_accumulate_grad_hook(self)

    def record_outside(self, p: Tensor) -> None:
        """Remember that the gradient which p has now was computed outside the draw."""
        if self.outside_draw is None and p.grad is not None:
            self._parameter, self._gradient = ref(p), ref(p.grad)

    def clear(self) -> None:
        """The gradients have been zeroed."""
        self._parameter = self._gradient = lambda: None

    @property
    def outside_draw(self) -> Tensor | None:
        """A parameter whose present gradient has a part that was computed outside the draw."""
        p, gradient = self._parameter(), self._gradient()
        return p if p is not None and gradient is not None and p.grad is gradient else None
