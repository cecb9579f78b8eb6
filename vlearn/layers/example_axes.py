"""Along which axis of what goes into a layer, and of what comes out, the examples lie, as far as sizes tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Axes = list[int | None]  # of each leaf; None where the examples lie along none

_RECURRENT = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


def axis_of(leaf: Any, total: int) -> int | None:
    """Dimension 0 if it is as long as the batch, else the only axis that is; None where there is none."""
    if not isinstance(leaf, Tensor) or total not in leaf.shape:
        return None
    axes = [axis for axis, size in enumerate(leaf.shape) if size == total]
    return axes[0] if axes[0] == 0 or len(axes) == 1 else None


def axes_of_call(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    total: int,
) -> tuple[Axes, Axes]:
    """The axis of each input and of each output of a call.

    Args:
        args, kwargs: what the module was called with; inputs: its leaves.
        outputs: the leaves of what it gave.
        total: the size of the batch.
    """
    if type(module).forward not in _RECURRENT or "forward" in module.__dict__:
        return [axis_of(leaf, total) for leaf in inputs], [axis_of(leaf, total) for leaf in outputs]
    # A recurrent layer says which axis it is: [N, T, ...] or [T, N, ...], and [layers, N, H] of its states.
    sequence = args[0] if args else kwargs.get("input")
    if not isinstance(sequence, Tensor) or sequence.dim() != 3:  # packed, or one sequence alone
        return [None] * len(inputs), [None] * len(outputs)
    axis = 0 if getattr(module, "batch_first") else 1

    def fits(leaf: Any, axis: int) -> int | None:
        return axis if isinstance(leaf, Tensor) and leaf.shape[axis] == total else None

    return (
        [fits(leaf, axis if leaf is sequence else 1) for leaf in inputs],
        [fits(leaf, 1 if place else axis) for place, leaf in enumerate(outputs)],
    )
