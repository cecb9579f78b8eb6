"""The per-example gradient of one parameter in the form in which its layer gives it.

A layer brings what goes in and what comes out to rows,

    a  [N, G, T, I]   rows of the input      n example, t position (token, pixel), i input feature
    b  [N, G, T, O]   gradient of example n's own loss with respect to the output rows, o output feature

with G groups (1 but for grouped convolutions). A weight's per-example gradient is then G_n = Σ_t b_nt a_ntᵀ,
[G, O, I]. Moving the weight by w ∘ G_n, w the diagonal posterior variance, adds (w ∘ G_n) a_nt to the output rows;
the self-influence is ⟨G_n, w ∘ G_n⟩ = Σ_t b_ntᵀ (w ∘ G_n) a_nt. With one position both come from one matrix
product, (w ∘ b aᵀ) a = b ∘ (w a²), and nothing of size N x P is formed.

Every form has

    b                        the gradient of the output rows, ``[N, G, T, O]`` or summed over the positions
    shape                    of the parameter
    entries                  entries per example that the products work on; 0 where they are few
    dense()                  the gradients ``[N, *shape]``
    output_jvp(D)            change of the output rows ``[N, G, T, O]`` when example n's parameter moves by D_n
    weighted_square(w)       ⟨G_n, w ∘ G_n⟩ ``[N]``
    weighted_output_jvp(w)   output_jvp(w ∘ G_n)
    sum_of_squares()         Σ_n G_n ∘ G_n in the parameter's shape
    kind                     how the parameter acts: "matrix" on rows, also of patches; "transposed", where it holds
                             [I, O]; "table", an embedding; "elementwise"; "bias"; "overlapping", output rows that
                             are added up
    as_outer()               the same as an `Outer`, of a "matrix" or "transposed"; else None
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """The per-example gradient of one parameter, with the operations that this file's docstring lists."""

    @property
    def b(self) -> Tensor:
        """The gradient of the output rows ``[N, G, T, O]``, or summed over the positions."""
        ...

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        ...

    @property
    def entries(self) -> int:
        """Entries per example that the products work on; 0 where they are few."""
        ...

    def dense(self) -> Tensor:
        """The gradients G_n ``[N, *shape]``."""
        ...

    def output_jvp(self, direction: Tensor) -> Tensor:
        """The change of the output rows ``[N, G, T, O]`` when example n's parameter moves by D_n ``[N, *shape]``."""
        ...

    def weighted_square(self, variance: Tensor) -> Tensor:
        """⟨G_n, w ∘ G_n⟩ ``[N]``, w in the parameter's shape."""
        ...

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """output_jvp(w ∘ G_n) ``[N, G, T, O]``, w in the parameter's shape."""
        ...

    def sum_of_squares(self) -> Tensor:
        """Σ_n G_n ∘ G_n in the parameter's shape."""
        ...

    def as_outer(self) -> Outer | None:
        """The same as an `Outer`, of a "matrix" or "transposed"; else None."""
        ...

    @property
    def kind(self) -> str:
        """How the parameter acts, see the top of this file."""
        ...


@dataclass(frozen=True)
class Outer:
    """G_n = Σ_t b_nt a_ntᵀ, the weight of a linear layer or of a convolution with one position."""

    a: Tensor  # [N, G, T, I]
    b: Tensor  # [N, G, T, O]
    shape: torch.Size
    transposed: bool = False  # the parameter holds [G, I, O], not [G, O, I]

    @property
    def kind(self) -> str:
        """ "transposed" where the parameter holds [I, O], else "matrix"."""
        return "transposed" if self.transposed else "matrix"

    @property
    def entries(self) -> int:
        """See `Form`; none where there is one position."""
        return 0 if self.b.shape[2] == 1 else self.shape.numel() + self.a[0].numel() + self.b[0].numel()

    def dense(self) -> Tensor:
        """See `Form`; Σ_t b_nt a_ntᵀ."""
        return self._product().reshape(len(self.b), *self.shape)

    def output_jvp(self, direction: Tensor) -> Tensor:
        """See `Form`; D_n a_nt."""
        return self._times(self._matrix(direction))

    def weighted_square(self, variance: Tensor) -> Tensor:
        """See `Form`; with one position b² · (w a²)."""
        if self.b.shape[2] == 1:
            return self._weighted_inputs(variance).mul_(self.b).mul_(self.b).flatten(1).sum(1)
        return self._product().square_().flatten(1) @ variance.flatten()

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """See `Form`; with one position b ∘ (w a²)."""
        if self.b.shape[2] == 1:
            return self.b * self._weighted_inputs(variance)
        return self._times(self._product().mul_(self._matrix(variance)))

    def sum_of_squares(self) -> Tensor:
        """See `Form`; with one position (b²)ᵀ a²."""
        if self.b.shape[2] > 1:
            return self._product().square_().sum(0).reshape(self.shape)
        a, b = (rows.squeeze(2).square().transpose(0, 1) for rows in (self.a, self.b))  # [G, N, I], [G, N, O]
        return (a.mT @ b if self.transposed else b.mT @ a).reshape(self.shape)

    def as_outer(self) -> Outer:
        """The form itself."""
        return self

    def _product(self) -> Tensor:
        """G_n as the parameter holds it."""
        return self.a.mT @ self.b if self.transposed else self.b.mT @ self.a

    def _times(self, matrix: Tensor) -> Tensor:
        """The input rows times a matrix as the parameter holds it."""
        return self.a @ (matrix if self.transposed else matrix.mT)

    def _weighted_inputs(self, variance: Tensor) -> Tensor:
        """Σ_i w_oi a_ni² ``[N, G, 1, O]`` of the single position: one product with all examples as rows."""
        rows = self.a.square().squeeze(2).transpose(0, 1)  # [G, N, I]
        matrix = self._matrix(variance)
        return (rows @ (matrix if self.transposed else matrix.mT)).transpose(0, 1).unsqueeze(2)

    def _matrix(self, tensor: Tensor) -> Tensor:
        lead = tensor.shape[: tensor.dim() - len(self.shape)]
        rows, columns = self.b.shape[3], self.a.shape[3]
        return tensor.reshape(*lead, self.a.shape[1], *((columns, rows) if self.transposed else (rows, columns)))


@dataclass(frozen=True)
class Indexed:
    """G_n[v] = Σ_{t: token = v} b_nt, a table of which each position reads one row: sums over the rows that are read.

    Nothing of the table's size is formed.
    """

    tokens: Tensor  # [N, T]
    b: Tensor  # [N, 1, T, O]
    shape: torch.Size  # [V, O]
    padding: int | None = None  # a row that counts as constant

    entries = 0
    kind = "table"

    def dense(self) -> Tensor:
        """See `Form`; the rows that are read, the others zero."""
        n, v = self.b.shape[0], self.shape[0]
        places = self.tokens + v * torch.arange(n, device=self.tokens.device).unsqueeze(1)
        table = self.b.new_zeros(n * v, self.shape[1]).index_add_(0, places.flatten(), self.kept(self.b).flatten(0, 2))
        return table.reshape(n, *self.shape)

    def output_jvp(self, direction: Tensor) -> Tensor:
        """See `Form`; the row of D_n that each position reads."""
        examples = torch.arange(len(direction), device=direction.device).unsqueeze(1)
        return self.kept(direction[examples, self.tokens].unsqueeze(1))

    def weighted_square(self, variance: Tensor) -> Tensor:
        """See `Form`, over the rows that are read."""
        example, token, _, sums = self._read
        return variance.new_zeros(len(self.b)).index_add_(0, example, (sums.square() * variance[token]).sum(1))

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """See `Form`, over the rows that are read."""
        _, token, place, sums = self._read
        return (sums * variance[token])[place].reshape(self.b.shape)

    def sum_of_squares(self) -> Tensor:
        """See `Form`."""
        _, token, _, sums = self._read
        return self.b.new_zeros(self.shape).index_add_(0, token, sums.square())

    def as_outer(self) -> None:
        """None."""
        return None

    @cached_property
    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the rows read: (example ``[S]``, token ``[S]``, the one of each position ``[N·T]``, G ``[S, O]``)"""
        v = self.shape[0]
        examples = torch.arange(len(self.b), device=self.tokens.device).unsqueeze(1)
        pairs, place = (self.tokens + v * examples).flatten().unique(return_inverse=True)
        sums = self.b.new_zeros(len(pairs), self.shape[1]).index_add_(0, place, self.kept(self.b).flatten(0, 2))
        return pairs // v, pairs % v, place, sums

    def kept(self, rows: Tensor) -> Tensor:
        """Rows ``[N, 1, T, O]`` with zeros at the padding."""
        if self.padding is None:
            return rows
        return rows.masked_fill((self.tokens == self.padding)[:, None, :, None], 0)


@dataclass(frozen=True)
class Elementwise:
    """G_n = Σ_t b_nt ∘ a_nt, the gain of a normalisation layer: a is what the gain multiplies."""

    a: Tensor  # [N, G, T, O]
    b: Tensor  # [N, G, T, O]
    shape: torch.Size

    kind = "elementwise"

    @property
    def entries(self) -> int:
        """See `Form`."""
        return 2 * self.b[0].numel()

    def dense(self) -> Tensor:
        """See `Form`; Σ_t b_nt ∘ a_nt."""
        return (self.a * self.b).sum(2).reshape(len(self.b), *self.shape)

    def output_jvp(self, direction: Tensor) -> Tensor:
        """See `Form`; D_n ∘ a_nt."""
        return self.a * direction.reshape(len(direction), self.b.shape[1], 1, self.b.shape[3])

    def weighted_square(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self.dense().square_().flatten(1) @ variance.flatten()

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self.output_jvp(self.dense().mul_(variance))

    def sum_of_squares(self) -> Tensor:
        """See `Form`."""
        return self.dense().square_().sum(0)

    def as_outer(self) -> None:
        """None."""
        return None


@dataclass(frozen=True)
class Bias:
    """G_n = Σ_t b_nt, a bias."""

    b: Tensor  # [N, G, 1, O], summed over positions
    shape: torch.Size

    entries = 0
    kind = "bias"

    def dense(self) -> Tensor:
        """See `Form`; Σ_t b_nt."""
        return self.b.reshape(len(self.b), *self.shape)

    def output_jvp(self, direction: Tensor) -> Tensor:
        """See `Form`; D_n at every position alike."""
        return direction.reshape(-1, *self.b.shape[1:])  # every position alike

    def weighted_square(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self.b.square().flatten(1) @ variance.flatten()

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """See `Form`, at every position alike."""
        return self.b * variance.reshape(1, self.b.shape[1], 1, self.b.shape[3])

    def sum_of_squares(self) -> Tensor:
        """See `Form`."""
        return self.b.square().sum(0).reshape(self.shape)

    def as_outer(self) -> None:
        """None."""
        return None
