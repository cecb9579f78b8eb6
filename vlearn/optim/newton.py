"""The online Newton step that the optimizers with a Gauss-Newton diagonal share: its settings and its arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlearn.optim.diagonal import DiagonalState, use_foreach
from vlearn.optim.draw import Draw, Slot
from vlearn.optim.groups import Rule, common_rules, lasting_precision


class NewtonStep(DiagonalState):
    """Mixin beside VariationalOptimizer: h moves to its estimate, then m by the new h.

    h ← β₂h + (1 - β₂)ĥ,  m ← m - lr·(g/(1 - β₁ᵗ) + wd·m)/(h + wd + damping)
    """

    def _statistic(
        self, draw: Draw, group: dict[str, Any], block: list[Slot], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """ĥ of one draw; on steps without captures h itself, which then stays."""
        captured, hessians = draw.captured, self._state_of(block, "hessian")
        assert captured is not None
        if not captured.count:
            return hessians
        return [captured.mean(slot, hessian) for slot, hessian in zip(block, hessians, strict=True)]

    def _update(
        self, group: dict[str, Any], block: list[Slot], gradients: list[Tensor], statistics: list[Tensor]
    ) -> None:
        whole = [
            [self._exact_mean(slot) for slot in block],
            self._state_of(block, "momentum"),
            self._state_of(block, "hessian"),
            gradients,
            statistics,
            [self._correction(group, slot) for slot in block],
        ]
        settings = {
            "lr": float(group["lr"]),
            "beta1": float(group["beta1"]),
            "beta2": float(group["beta2"]),
            "weight_decay": float(self._scales(group)[1]),
            "damping": float(group["damping"]),
            "signed": not self._needs_captures(),
        }
        for part in (
            [whole] if use_foreach(group, block) else [[[entry] for entry in row] for row in zip(*whole, strict=True)]
        ):
            newton_step(*part, **settings)


def newton_rules(group: dict[str, Any]) -> list[Rule]:
    """Rules of the settings of an online Newton step."""
    return [
        *common_rules(group),
        lasting_precision(group),
        ("damping", group["damping"] >= 0, "must not be negative: use 0"),
    ]


def newton_step(
    means: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    gradients: list[Tensor],
    estimates: list[Tensor],
    corrections: list[float],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    damping: float,
    signed: bool,
) -> None:
    """One update of a block, as `NewtonStep` states it.

    Args:
        signed: estimates may be negative; then h + wd at most halves, so it stays positive.
    """
    floors = torch._foreach_sub(hessians, weight_decay) if signed else []
    torch._foreach_lerp_(hessians, estimates, 1 - beta2)
    if signed:
        torch._foreach_mul_(floors, 0.5)  # (h + wd)/2 - wd
        torch._foreach_maximum_(hessians, floors)
    torch._foreach_lerp_(momenta, gradients, 1 - beta1)
    # Direction and step are c times too long and too short, c the correction: a pass less.
    directions = torch._foreach_mul(means, [weight_decay * c for c in corrections])
    torch._foreach_add_(directions, momenta)
    precisions = torch._foreach_add(hessians, weight_decay + damping)
    torch._foreach_addcdiv_(means, directions, precisions, [-lr / c for c in corrections])
