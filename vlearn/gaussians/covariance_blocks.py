"""Blocks of Σ, each diagonal in some basis: Σ = U diag(v) Uᵀ.

    block        U                       v
    Diagonal     I                       the variances themselves
    Kronecker    Q_B ⊗ Q_A, orthonormal  1/(N(s + wd)), exact damping in the eigenbasis
    Dense        L⁻ᵀ, S = LLᵀ            1

What a posterior needs of Σ is written once, in terms of U and v. Tensors come and go as lists, one for each
parameter of the block, ``[n, *shape of the parameter]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from vlearn._wide import widened


class Block:
    """Covariance of some parameters.

    Attributes:
        shapes: of the parameters.
        variances: v, in the shape of the coordinates.
        is_elementwise: whether the basis is that of the parameters' own entries, so that v are their variances.
    """

    shapes: tuple[torch.Size, ...]
    variances: Tensor
    is_elementwise = False

    def as_kronecker(self) -> KroneckerBlock | None:
        """The block itself, if its basis is a Kronecker product; else None."""
        return None

    def into_basis(self, tensors: Sequence[Tensor]) -> Tensor:
        """Uᵀg ``[n, *shape of v]``."""
        raise NotImplementedError

    def from_basis(self, coordinates: Tensor) -> list[Tensor]:
        """Uz, by parameter."""
        raise NotImplementedError

    def diagonal(self) -> list[Tensor]:
        """The variance of each entry, Σ_k U_ik² v_k, by parameter in its shape."""
        raise NotImplementedError

    def diagonal_precision(self) -> list[Tensor]:
        """The diagonal of Σ⁻¹, by parameter in its shape."""
        parts = self.precision().diagonal().split([shape.numel() for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def log_volume(self) -> Tensor | float:
        """log |det U|."""
        return 0.0

    def multiply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Σg."""
        return self.from_basis(self.into_basis(tensors) * self.variances)

    def solve(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Σ⁻¹g."""
        return self.from_basis(self.into_basis(tensors) / self.variances)

    def precision(self) -> Tensor:
        """Σ⁻¹ ``[P, P]`` over the entries of all parameters, in their order."""
        sizes = [shape.numel() for shape in self.shapes]
        unit = torch.eye(sum(sizes), dtype=self.variances.dtype, device=self.variances.device)
        columns = [part.reshape(-1, *shape) for part, shape in zip(unit.split(sizes, 1), self.shapes, strict=True)]
        return torch.cat([rows.flatten(1) for rows in self.solve(columns)], 1)

    def quadratic(self, tensors: Sequence[Tensor]) -> Tensor:
        """gᵀΣg ``[n]``."""
        coordinates = self.into_basis(tensors)
        return (coordinates.square() * self.variances).flatten(1).sum(1)

    def draw(self, generator: torch.Generator | None) -> list[Tensor]:
        """One draw from N(0, Σ), by parameter in its shape."""
        v = self.variances
        noise = torch.randn(v.shape, dtype=v.dtype, device=v.device, generator=generator)
        return [move.squeeze(0) for move in self.from_basis(noise.mul_(v.sqrt()).unsqueeze(0))]

    def log_determinant(self) -> float:
        """log det Σ."""
        return float(widened(self.variances).log().sum() + 2 * self.log_volume())


class DiagonalBlock(Block):
    """One parameter with independent entries."""

    is_elementwise = True

    def __init__(self, variances: Tensor):
        self.shapes, self.variances = (variances.shape,), variances

    def into_basis(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Block`; the basis is the identity."""
        return tensors[0]

    def from_basis(self, coordinates: Tensor) -> list[Tensor]:
        """See `Block`; the basis is the identity."""
        return [coordinates]

    def diagonal(self) -> list[Tensor]:
        """See `Block`; v itself."""
        return [self.variances]

    def diagonal_precision(self) -> list[Tensor]:
        """See `Block`."""
        return [self.variances.reciprocal()]


class KroneckerBlock(Block):
    """Columns [weight, bias] of one layer, rotated on either side.

    Args:
        out_basis: Q_B ``[O, O]``; None is the identity.
        in_basis: Q_A ``[I, I]``; None is the identity.
        variances: v ``[O, I]``.
        shapes: of the parameters, each ``[O, ...]``; their columns, one after another, are the I columns.
    """

    def __init__(
        self, out_basis: Tensor | None, in_basis: Tensor | None, variances: Tensor, shapes: Sequence[torch.Size]
    ):
        self.out_basis, self.in_basis = out_basis, in_basis
        self.variances, self.shapes = variances, tuple(shapes)

    def as_kronecker(self) -> KroneckerBlock:
        """The block itself."""
        return self

    def into_basis(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Block`; Q_Bᵀ G Q_A ``[n, O, I]``."""
        n, rows = tensors[0].shape[0], self.variances.shape[0]
        columns = [tensor.reshape(n, rows, -1).to(self.variances.dtype) for tensor in tensors]
        matrix = columns[0] if len(columns) == 1 else torch.cat(columns, 2)  # [n, O, I]
        matrix = matrix if self.out_basis is None else self.out_basis.mT @ matrix
        return matrix if self.in_basis is None else matrix @ self.in_basis

    def from_basis(self, coordinates: Tensor) -> list[Tensor]:
        """See `Block`; Q_B Z Q_Aᵀ, cut into the parameters' columns."""
        matrix = coordinates if self.in_basis is None else coordinates @ self.in_basis.mT
        return self._by_parameter(matrix if self.out_basis is None else self.out_basis @ matrix)

    def diagonal(self) -> list[Tensor]:
        """See `Block`; (Q_B∘Q_B) v (Q_A∘Q_A)ᵀ."""
        return self._diagonal_of(self.variances)

    def diagonal_precision(self) -> list[Tensor]:
        """See `Block`; (Q_B∘Q_B) v⁻¹ (Q_A∘Q_A)ᵀ."""
        return self._diagonal_of(self.variances.reciprocal())

    def _diagonal_of(self, values: Tensor) -> list[Tensor]:
        matrix = values if self.out_basis is None else self.out_basis.square() @ values
        matrix = matrix if self.in_basis is None else matrix @ self.in_basis.square().mT
        return [part.squeeze(0) for part in self._by_parameter(matrix.unsqueeze(0))]

    def _by_parameter(self, matrix: Tensor) -> list[Tensor]:
        parts = matrix.split([shape.numel() // self.variances.shape[0] for shape in self.shapes], 2)
        return [part.reshape(len(part), *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class DenseBlock(Block):
    """Several parameters, every entry correlated with every other.

    Args:
        factor: lower Cholesky factor L of their precision ``[P, P]``.
        shapes: of the parameters, in the order of its rows.
    """

    def __init__(self, factor: Tensor, shapes: Sequence[torch.Size]):
        self.factor, self.shapes = factor, tuple(shapes)
        self.variances = factor.new_ones(factor.shape[0])

    def into_basis(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Block`; L⁻¹g ``[n, P]``."""
        return torch.linalg.solve_triangular(self.factor, self._as_columns(tensors), upper=False).mT

    def from_basis(self, coordinates: Tensor) -> list[Tensor]:
        """See `Block`; L⁻ᵀz."""
        return self._by_parameter(torch.linalg.solve_triangular(self.factor.mT, coordinates.mT, upper=True))

    def solve(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Block`; L Lᵀ g."""
        return self._by_parameter(self.factor @ (self.factor.mT @ self._as_columns(tensors)))  # U⁻¹ = Lᵀ

    def precision(self) -> Tensor:
        """See `Block`; L Lᵀ."""
        return self.factor @ self.factor.mT

    def diagonal(self) -> list[Tensor]:
        """See `Block`; the diagonal of (L Lᵀ)⁻¹."""
        return [part.squeeze(0) for part in self._by_parameter(self._variance_of_entries.unsqueeze(1))]

    def diagonal_precision(self) -> list[Tensor]:
        """See `Block`; the diagonal of L Lᵀ."""
        return [part.squeeze(0) for part in self._by_parameter(self.factor.square().sum(1, keepdim=True))]

    def log_volume(self) -> Tensor:
        """See `Block`; -log det L."""
        return -widened(self.factor.diagonal()).log().sum()

    @cached_property
    def _variance_of_entries(self) -> Tensor:
        return torch.cholesky_inverse(self.factor).diagonal()

    def _as_columns(self, tensors: Sequence[Tensor]) -> Tensor:
        return (
            torch.cat([tensor.reshape(len(tensor), tensor[0].numel()) for tensor in tensors], 1)
            .to(self.factor.dtype)
            .mT
        )

    def _by_parameter(self, columns: Tensor) -> list[Tensor]:
        parts = columns.mT.split([shape.numel() for shape in self.shapes], 1)
        return [part.reshape(len(part), *shape) for part, shape in zip(parts, self.shapes, strict=True)]
