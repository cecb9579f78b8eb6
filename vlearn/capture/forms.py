"""The per-example gradient of one parameter, in the form in which its layer gives it.

Layers are brought to one format. A layer that multiplies rows of its input by its weight has

    a  [N, G, T, I]   rows of the input      n example, t position (token, pixel), i input feature
    b  [N, G, T, O]   gradient of example n's own loss with respect to the output rows, o output feature

and G groups (1 but for grouped convolutions). Its per-example gradient is G_n = Σ_t b_nt a_ntᵀ, [G, O, I].
Moving the weight by w ∘ G_n, w the diagonal posterior variance, adds (w ∘ G_n) a_nt to the output rows; the
self-influence is ⟨G_n, w ∘ G_n⟩ = Σ_t b_ntᵀ (w ∘ G_n) a_nt. With one position both come from one matrix
product, (w ∘ b aᵀ) a = b ∘ (w a²), and nothing of size N x P is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """G_n = Σ_t b_nt a_ntᵀ of a weight; see the module docstring for the shapes."""

    a: Tensor  # [N, G, T, I]
    b: Tensor  # [N, G, T, O]

    @staticmethod
    def join(forms: list[Outer]) -> Outer:
        """Several uses of one weight: further uses are further positions."""
        if len(forms) == 1:
            return forms[0]
        return Outer(torch.cat([form.a for form in forms], 2), torch.cat([form.b for form in forms], 2))

    @property
    def positions(self) -> int:
        return self.a.shape[2]

    def dense(self) -> Tensor:
        """The gradients themselves, ``[N, G, O, I]``."""
        return self.b.transpose(-1, -2) @ self.a

    def weighted_square(self, variance: Tensor) -> Tensor:
        """⟨G_n, w ∘ G_n⟩ ``[N]``, w the variance in the parameter's shape."""
        w = self._as_matrix(variance)
        if self.positions == 1:
            return (self.b.square() * (self.a.square() @ w.mT)).flatten(1).sum(1)
        return self.dense().square_().flatten(1) @ w.flatten()

    def output_tangent(self, variance: Tensor) -> Tensor:
        """(w ∘ G_n) a_nt, the change of each output row when the weight moves by w ∘ G_n: ``[N, G, T, O]``."""
        w = self._as_matrix(variance)
        if self.positions == 1:
            return self.b * (self.a.square() @ w.mT)
        return self.moved_rows(self.dense().mul_(w))

    def moved_rows(self, direction: Tensor) -> Tensor:
        """Change of the output rows ``[N, G, T, O]`` when example n's weight moves by direction n, ``[N, ...]``."""
        return self.a @ direction.reshape(*self.a.shape[:2], self.b.shape[3], self.a.shape[3]).mT

    def _as_matrix(self, variance: Tensor) -> Tensor:
        return variance.reshape(self.a.shape[1], self.b.shape[3], self.a.shape[3])  # [G, O, I]


@dataclass(frozen=True)
class Shift:
    """G_n = Σ_t b_nt of a bias, the sum over positions and uses."""

    b: Tensor  # [N, G, 1, O]

    @staticmethod
    def join(forms: list[Shift]) -> Shift:
        """Several uses of one bias."""
        return forms[0] if len(forms) == 1 else Shift(torch.stack([form.b for form in forms]).sum(0))

    def dense(self) -> Tensor:
        """The gradients themselves, ``[N, G, O]``."""
        return self.b.squeeze(2)

    def weighted_square(self, variance: Tensor) -> Tensor:
        """⟨G_n, w ∘ G_n⟩ ``[N]``, w the variance in the parameter's shape."""
        return self.b.square().flatten(1) @ variance.flatten()

    def output_tangent(self, variance: Tensor) -> Tensor:
        """w ∘ G_n, the change of every output row: ``[N, G, 1, O]``."""
        return self.moved_rows(self.dense() * variance.reshape(self.b.shape[1], self.b.shape[3]))

    def moved_rows(self, direction: Tensor) -> Tensor:
        """Change of every output row ``[N, G, 1, O]`` when example n's bias moves by direction n, ``[N, ...]``."""
        return direction.reshape(self.b.shape)


Form = Outer | Shift
