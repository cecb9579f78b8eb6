"""One row per token: each position of a sequence is an example of its own, whose loss alone is taken out.

The gradient of one token's loss still runs through every position before it, so each position takes a backward and a
forward-mode pass of the whole batch: as exact as a sweep by sequence, and as many times slower as there are positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vlearn.linearized.linearization import Linearization


def by_position(lin: Linearization) -> Iterator[tuple[Linearization, int]]:
    """The batch once for each position, its loss that of the position's token."""
    for position in range(lin.own_loss.shape[1]):
        yield at_position(lin, position), position


def at_position(lin: Linearization, position: int) -> Linearization:
    """The batch with the loss of one position's tokens."""
    with torch.enable_grad():
        loss = lin.own_loss[:, position]
        # The graph goes on to serve the other positions, and the curvature.
        residuals = torch.autograd.grad(loss.sum(), lin.leaves, create_graph=True, allow_unused=True)
    return replace(lin, own_loss=loss, residuals=list(residuals), position=position)


def kept_tokens(lin: Linearization) -> Tensor:
    """``[N, T]`` the tokens that count: those whose target is not the loss's ignore_index."""
    target, shape = lin.batch.target, lin.own_loss.shape
    if isinstance(target, Tensor) and target.shape == shape and not target.is_floating_point():
        return target != lin.losses.ignore_index
    return torch.ones(shape, dtype=torch.bool, device=lin.own_loss.device)


def token_axis(lin: Linearization) -> int:
    """Which axis of the selected output is that of the tokens.

    Raises:
        ValueError: if none is as long as there are tokens.
    """
    shape, count = lin.output.shape, lin.own_loss.shape[1]
    axes = [axis for axis in range(1, len(shape)) if shape[axis] == count]
    for position in range(count) if len(axes) > 1 else ():
        # As many classes as positions: a token's residual is zero at all other positions.
        residual = at_position(lin, position).residual
        others = torch.arange(count, device=residual.device) != position
        if bool((residual != 0).any()):
            axes = [axis for axis in axes if not bool(residual.movedim(axis, 0)[others].any())] or axes
            break
    if not axes:
        raise ValueError(
            f"loss_fn gave {count} tokens for each example, but no axis of the output of shape {tuple(shape)} is as "
            "long: pass a loss of one value for each position of the output."
        )
    return axes[0]
