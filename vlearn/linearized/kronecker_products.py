"""Products with a Kronecker Σ = Q diag(v) Qᵀ in its own coordinates, in which Σ is diagonal.

The per-example gradient of a layer, G_n = Σ_t b_nt a_ntᵀ with a 1 appended to a for the bias, is there

    Q_Bᵀ G_n Q_A = Σ_t b̃_nt ã_ntᵀ,  ã = Q_Aᵀ[a; 1],  b̃ = Q_Bᵀ b

which has the same form; so have all products, and what they add to the output rows is turned back by Q_B. With one
position nothing of the size of G is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlearn.capture.layer_call import LayerCall
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.covariance_blocks import KroneckerBlock
from vlearn.layers.gradient_forms import Form, Outer
from vlearn.per_example.forms import form_of


@dataclass(frozen=True)
class RotatedGradients:
    """The gradients of a layer's parameters in the coordinates of their block."""

    outer: Outer
    block: KroneckerBlock

    @property
    def entries(self) -> int:
        """Entries per example that the products work on."""
        return self.outer.entries

    def self_influence(self, tangent: Tensor | None = None) -> Tensor:
        """⟨G_n, ΣG_n⟩ ``[n]``; from the tangent, where there is one."""
        if tangent is None:
            return self.outer.weighted_square(self.block.variances)
        return (self.outer.b * tangent).flatten(1).sum(1)

    def tangent(self) -> Tensor:
        """Change of the output rows when example n's parameters move by ΣG_n ``[n, 1, T, O]``, rotated."""
        return self.outer.weighted_output_jvp(self.block.variances)

    def back(self, rows: Tensor) -> Tensor:
        """Output rows in the layer's own coordinates."""
        return rows if self.block.out_basis is None else rows @ self.block.out_basis.mT


@dataclass(frozen=True)
class RotatedLayer:
    """A layer that a pass used once, whose parameters are a block of a Kronecker Σ."""

    call: LayerCall
    columns: tuple[Tensor, ...]
    block: KroneckerBlock

    @classmethod
    def of(
        cls, parameters: Sequence[Tensor], calls_of: Mapping[Tensor, Sequence[LayerCall]], covariance: Covariance
    ) -> RotatedLayer | None:
        """The layer of these parameters; None where they are not all of such a block."""
        columns, block = covariance.block_of(parameters[0])
        calls = {call for p in parameters for call in calls_of[p]}
        kronecker = block.as_kronecker()
        if kronecker is None or len(calls) > 1 or len(parameters) < len(columns):
            return None
        (call,) = calls
        return None if call.rule is None else cls(call, columns, kronecker)

    def rows(self, examples: slice) -> RotatedGradients | None:
        """The gradients of some of the examples, see `rotate`."""
        return rotate([form_of(self.call, p, examples) for p in self.columns], self.block)


def rotate(forms: Sequence[Form], block: KroneckerBlock) -> RotatedGradients | None:
    """One call of a layer in rotated coordinates; None where this needs groups of channels or costs more than G_n.

    Args:
        forms: gradients of the block's parameters, in its order.
    """
    rows = _rows(forms)
    if rows is None:
        return None
    inputs, gradients = (tensor.to(block.variances.dtype) for tensor in rows)
    if inputs.shape[2] > 1 and not rows_cost_less(inputs.shape[2], *block.variances.shape):
        return None
    if block.in_basis is not None:
        inputs = inputs @ block.in_basis
    if block.out_basis is not None:
        gradients = gradients @ block.out_basis
    return RotatedGradients(Outer(inputs, gradients, block.variances.shape), block)


def rows_cost_less(positions: int, o: int, i: int) -> bool:
    """Whether to turn a, b and the tangent of every position is less than to turn G_n and ΣG_n of every example."""
    return positions * (i * i + 2 * o * o) < 2 * o * i * (o + i)


def _rows(forms: Sequence[Form]) -> tuple[Tensor, Tensor] | None:
    """a ``[n, 1, T, I]`` with the columns of all parameters, and b ``[n, 1, T, O]``."""
    weights = [form.as_outer() for form in forms if form.kind != "bias"]
    if not weights:  # a bias with a block of its own
        b = forms[0].b  # [n, G, 1, O]
        return (b.new_ones(*b.shape[:3], 1), b) if b.shape[1] == 1 else None
    weight = weights[0]
    if len(weights) > 1 or weight is None or weight.transposed or weight.b.shape[1] > 1:
        return None
    ones = weight.a.new_ones(*weight.a.shape[:3], 1)
    columns = [ones if form.kind == "bias" else weight.a for form in forms]
    return (columns[0] if len(columns) == 1 else torch.cat(columns, 3)), weight.b
