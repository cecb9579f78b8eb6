"""The per-example gradient of one parameter in the form in which its layer gives it.

A layer that multiplies rows of its input by its weight has

    a  [N, G, T, I]   rows of the input      n example, t position (token, pixel), i input feature
    b  [N, G, T, O]   gradient of example n's own loss with respect to the output rows, o output feature

and G groups (1 but for grouped convolutions). Its per-example gradient is G_n = Σ_t b_nt a_ntᵀ, [G, O, I].
Moving the weight by w ∘ G_n, w the diagonal posterior variance, adds (w ∘ G_n) a_nt to the output rows; the
self-influence is ⟨G_n, w ∘ G_n⟩ = Σ_t b_ntᵀ (w ∘ G_n) a_nt. With one position both come from one matrix
product, (w ∘ b aᵀ) a = b ∘ (w a²), and nothing of size N x P is formed.

Every form has

    dense()             the gradients ``[N, *shape of the parameter]``
    moved_rows(D)       change of the output rows ``[N, G, T, O]`` when example n's parameter moves by D_n
    weighted_square(w)  ⟨G_n, w ∘ G_n⟩ ``[N]``
    output_tangent(w)   moved_rows(w ∘ G_n)
    sum_of_squares()    Σ_n G_n ∘ G_n in the parameter's shape
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """G_n = Σ_t b_nt a_ntᵀ, the weight of a linear layer or of a convolution with one position."""

    a: Tensor  # [N, G, T, I]
    b: Tensor  # [N, G, T, O]
    shape: torch.Size  # of the parameter

    @property
    def entries(self) -> int:
        """Entries per example that the products work on; 0 where no gradient is formed."""
        return 0 if self.b.shape[2] == 1 else self.shape.numel() + self.a[0].numel() + self.b[0].numel()

    def dense(self) -> Tensor:
        return (self.b.mT @ self.a).reshape(-1, *self.shape)

    def moved_rows(self, direction: Tensor) -> Tensor:
        return self.a @ self._matrix(direction).mT

    def weighted_square(self, variance: Tensor) -> Tensor:
        if self.b.shape[2] == 1:
            return self._weighted_inputs(variance).mul_(self.b).mul_(self.b).flatten(1).sum(1)
        return (self.b.mT @ self.a).square_().flatten(1) @ variance.flatten()

    def output_tangent(self, variance: Tensor) -> Tensor:
        if self.b.shape[2] == 1:
            return self.b * self._weighted_inputs(variance)
        return self.a @ (self.b.mT @ self.a).mul_(self._matrix(variance)).mT

    def sum_of_squares(self) -> Tensor:
        if self.b.shape[2] == 1:
            a, b = (rows.squeeze(2).square().transpose(0, 1) for rows in (self.a, self.b))  # [G, N, I], [G, N, O]
            return (b.mT @ a).reshape(self.shape)
        return (self.b.mT @ self.a).square_().sum(0).reshape(self.shape)

    def _weighted_inputs(self, variance: Tensor) -> Tensor:
        """Σ_i w_oi a_ni² ``[N, G, 1, O]`` of the single position: one product with all examples as rows."""
        rows = self.a.square().squeeze(2).transpose(0, 1)  # [G, N, I]
        return (rows @ self._matrix(variance).mT).transpose(0, 1).unsqueeze(2)

    def _matrix(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[: tensor.dim() - len(self.shape)], self.a.shape[1], -1, self.a.shape[3])


@dataclass(frozen=True)
class Strips:
    """The weight of a 2-D convolution: G_n = Σ_t b_nt (patch at t)ᵀ without the patches.

    The input is unfolded along its width only; row r of the kernel meets the rows r·dilation + stride·(0 ... H-1)
    of it. A fifth (for a 5x5 kernel) of the memory traffic of unfolded patches, which bounds small convolutions.
    """

    strips: Tensor  # [N, G, I·kw, padded height, W]
    b: Tensor  # [N, G, T, O], T = H·W
    shape: torch.Size  # [O, I, kh, kw] of the parameter
    height: int  # H
    stride: int
    dilation: int

    @property
    def entries(self) -> int:
        return self.shape.numel() + self.strips[0].numel() + self.b[0].numel()

    def dense(self) -> Tensor:
        return self._from_kernel_rows(self._dense())

    def moved_rows(self, direction: Tensor) -> Tensor:
        return self._moved(self._by_kernel_row(direction))

    def patches(self) -> Outer:
        """The same with the patches written out."""
        n, g, columns = self.strips.shape[:3]
        kernel_rows = torch.stack([self._rows(r) for r in range(self.shape[2])], 3)  # [N, G, I·kw, kh, T]
        split = kernel_rows.reshape(n, g, self.shape[1], -1, *kernel_rows.shape[3:])  # [N, G, I, kw, kh, T]
        return Outer(split.transpose(3, 4).reshape(n, g, columns * self.shape[2], -1).mT, self.b, self.shape)

    def weighted_square(self, variance: Tensor) -> Tensor:
        return self._dense().square_().flatten(1) @ self._by_kernel_row(variance).flatten()

    def output_tangent(self, variance: Tensor) -> Tensor:
        return self._moved(self._dense().mul_(self._by_kernel_row(variance)))

    def sum_of_squares(self) -> Tensor:
        return self._from_kernel_rows(self._dense().square_().sum(0, keepdim=True))[0]

    def _rows(self, r: int) -> Tensor:
        """What row r of the kernel meets: ``[N, G, I·kw, T]``."""
        start = r * self.dilation
        return self.strips[..., start : start + self.stride * (self.height - 1) + 1 : self.stride, :].flatten(3)

    def _dense(self) -> Tensor:
        """Gradients by kernel row, ``[N, G, kh, O, I·kw]``."""
        return torch.stack([self.b.mT @ self._rows(r).mT for r in range(self.shape[2])], 2)

    def _moved(self, direction: Tensor) -> Tensor:
        moved = direction[:, :, 0] @ self._rows(0)  # [N, G, O, T]
        for r in range(1, self.shape[2]):
            moved += direction[:, :, r] @ self._rows(r)
        return moved.mT

    def _from_kernel_rows(self, tensor: Tensor) -> Tensor:
        """``[n, G, kh, O/G, I·kw]`` -> ``[n, O, I, kh, kw]``."""
        n, g, kh, o, _ = tensor.shape
        return tensor.reshape(n, g, kh, o, self.shape[1], -1).permute(0, 1, 3, 4, 2, 5).reshape(n, *self.shape)

    def _by_kernel_row(self, tensor: Tensor) -> Tensor:
        """``[..., O, I, kh, kw]`` -> ``[..., G, kh, O/G, I·kw]``."""
        lead = tensor.shape[: tensor.dim() - 4]
        split = tensor.reshape(*lead, self.strips.shape[1], -1, *self.shape[1:])  # [..., G, O/G, I, kh, kw]
        return split.movedim(-2, len(lead) + 1).flatten(-2)


@dataclass(frozen=True)
class Shift:
    """G_n = Σ_t b_nt, a bias."""

    b: Tensor  # [N, G, 1, O], summed over positions
    shape: torch.Size

    entries = 0

    def dense(self) -> Tensor:
        return self.b.reshape(-1, *self.shape)

    def moved_rows(self, direction: Tensor) -> Tensor:
        return direction.reshape(self.b.shape)  # every position alike

    def weighted_square(self, variance: Tensor) -> Tensor:
        return self.b.square().flatten(1) @ variance.flatten()

    def output_tangent(self, variance: Tensor) -> Tensor:
        return self.b * variance.reshape(1, self.b.shape[1], 1, -1)

    def sum_of_squares(self) -> Tensor:
        return self.b.square().sum(0).reshape(self.shape)


Form = Outer | Strips | Shift
