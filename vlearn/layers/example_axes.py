"""Along which axis of what goes into a layer, and of what comes out, the examples lie, as far as sizes tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Axes = list[int | None]  # of each leaf; None where the examples lie along none

_RECURRENT = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
_ATTENTION = (nn.MultiheadAttention.forward,)


def axis_of(leaf: Any, total: int) -> int | None:
    """Dimension 0 if as long as the batch, else 1 of three or more, as of a state ``[layers, N, H]``, else None."""
    if not isinstance(leaf, Tensor):
        return None
    if leaf.shape[:1] == (total,):
        return 0
    return 1 if leaf.dim() > 2 and leaf.shape[1] == total else None


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
    forward = None if "forward" in module.__dict__ else type(module).forward
    if forward not in _RECURRENT + _ATTENTION:
        return _examples_first(inputs, total), _examples_first(outputs, total)
    # These layers say which axis it is: [N, T, C] or [T, N, C], and [layers, N, H] of a recurrent layer's states.
    axis, is_recurrent = 0 if module.batch_first else 1, forward in _RECURRENT
    sequence = args[0] if args else kwargs.get("input" if is_recurrent else "query")
    if not isinstance(sequence, Tensor) or sequence.dim() != 3:  # packed, or one sequence alone
        return [None] * len(inputs), [None] * len(outputs)

    def fits(leaf: Any, axis: int) -> int | None:
        return axis if isinstance(leaf, Tensor) and leaf.shape[axis : axis + 1] == (total,) else None

    if is_recurrent:
        of_inputs = [fits(leaf, axis if leaf is sequence else 1) for leaf in inputs]
        return of_inputs, [fits(leaf, 1 if place else axis) for place, leaf in enumerate(outputs)]
    sequences = (*args[:3], *(kwargs.get(name) for name in ("query", "key", "value")))
    of_inputs = [fits(leaf, axis if any(leaf is each for each in sequences) else 0) for leaf in inputs]
    return of_inputs, [fits(leaf, 0 if place else axis) for place, leaf in enumerate(outputs)]


def _examples_first(leaves: Sequence[Any], total: int) -> Axes:
    """Those of leaves one of which at least has the examples first; else none is held to have any."""
    axes = [axis_of(leaf, total) for leaf in leaves]
    return axes if 0 in axes else [None] * len(axes)
