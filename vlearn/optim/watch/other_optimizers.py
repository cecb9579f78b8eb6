"""Steps of other optimizers, which could train the draw of a watched model: it would go, with all that was learned."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepListener(Protocol):
    """What wants to know of the steps."""

    def other_optimizer_stepped(self, other: Optimizer) -> None:
        """An optimizer has updated its parameters."""
        ...


_listeners: WeakSet[StepListener] = WeakSet()
_handle: Any = None  # of torch's hook on all optimizers, while there are listeners


def listen(listener: StepListener) -> None:
    """Tell the listener of every step of any torch optimizer from now on."""
    global _handle
    _listeners.add(listener)
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_tell)


def stop_listening(listener: StepListener) -> None:
    """Tell it no more."""
    global _handle
    _listeners.discard(listener)
    if not _listeners and _handle is not None:
        _handle.remove()
        _handle = None


def _tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners):
        listener.other_optimizer_stepped(optimizer)
