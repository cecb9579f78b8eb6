"""Rows of several examples in one tensor, as the nodes of a batch of graphs have them, brought together by example.

A layer treats each of R rows alone, so its rule gives a form with a row for each. With `index` ``[R]`` saying which of
the N examples each row is of, the rows of one example become its positions,

    a, b  [R, G, t, F]  ->  [N, G, T·t, F],  T = the most rows that an example has

zero where it has fewer: with b = 0 such a position is in no sum over positions, so every product is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlearn.layers.gradient_forms import Bias, Elementwise, Form, Indexed


class ExampleRows:
    """Which example each row of tensors ``[R, ...]`` is of.

    Args:
        index: ``[R]`` the number of each row's example, in any order; an example may have no row.
        num_examples: N.
        told_by: what gave the index.
    """

    def __init__(self, index: Tensor, num_examples: int, told_by: Any = None):
        self.index, self.num_examples, self.told_by = index, num_examples, told_by
        self._chosen: dict[tuple[int, ...], ChosenRows] = {}

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def most(self) -> int:
        """T, the most rows that an example has; at least 1."""
        return max(1, *self._counts)

    def of(self, examples: slice | Sequence[int]) -> ChosenRows:
        """The rows of some of the examples."""
        numbers = tuple(range(*examples.indices(self.num_examples)) if isinstance(examples, slice) else examples)
        if numbers not in self._chosen:
            rows = torch.cat([self._rows[n] for n in numbers])
            counts = torch.tensor([self._counts[n] for n in numbers], device=rows.device)
            example = torch.arange(len(numbers), device=rows.device).repeat_interleave(counts)
            first = (counts.cumsum(0) - counts)[example]
            place = torch.arange(len(rows), device=rows.device) - first
            self._chosen[numbers] = ChosenRows(rows, example, place, len(numbers), self.most)
        return self._chosen[numbers]

    @cached_property
    def _counts(self) -> list[int]:
        return self.index.bincount(minlength=self.num_examples).tolist()

    @cached_property
    def _rows(self) -> Sequence[Tensor]:
        """Those of each example."""
        return self.index.argsort(stable=True).split(self._counts)


@dataclass(frozen=True)
class ChosenRows:
    """The rows of n examples.

    Attributes:
        rows: ``[r]`` their numbers among all rows, those of one example after those of another.
        example: ``[r]`` which of the n examples each is of.
        place: ``[r]`` which of its example's rows each is.
        num_examples: n.
        most: T.
    """

    rows: Tensor
    example: Tensor
    place: Tensor
    num_examples: int
    most: int

    def exist(self) -> Tensor:
        """``[n, T]`` whether an example has so many rows."""
        mask = torch.zeros(self.num_examples, self.most, dtype=torch.bool, device=self.rows.device)
        mask[self.example, self.place] = True
        return mask

    def together(self, tensor: Tensor) -> Tensor:
        """``[r, G, t, F]`` as ``[n, G, T·t, F]``, zero where there is no row; of r = 0 rows there may be one more."""
        groups, t, features = tensor.shape[1:]
        padded = tensor.new_zeros(self.num_examples, self.most, groups, t, features)
        padded[self.example, self.place] = tensor[: len(self.rows)]
        return padded.transpose(1, 2).reshape(self.num_examples, groups, self.most * t, features)

    def apart(self, tensor: Tensor) -> Tensor:
        """``[n, G, T·t, F]`` as ``[r, G, t, F]``; ``[n, G, 1, F]``, alike at every position, as ``[r, G, 1, F]``."""
        if tensor.shape[2] == 1:
            return tensor[self.example]
        return tensor.unflatten(2, (self.most, -1))[self.example, :, self.place]

    def by_example(self, form: Form) -> Form:
        """The form of the r rows as one of the n examples; of r = 0 rows there may be one more.

        Raises:
            RuntimeError: if a layer's output rows overlap, so that they cannot become positions.
        """
        if isinstance(form, Bias):
            b = form.b.new_zeros(self.num_examples, *form.b.shape[1:]).index_add_(
                0, self.example, form.b[: len(self.rows)]
            )
            return replace(form, b=b)
        if isinstance(form, Indexed):
            tokens = form.tokens.new_zeros(self.num_examples, self.most, form.tokens.shape[1])
            tokens[self.example, self.place] = form.tokens[: len(self.rows)]
            return replace(form, tokens=tokens.flatten(1), b=self.together(form.b))
        rows = form if isinstance(form, Elementwise) else form.as_outer()
        if rows is None:
            raise RuntimeError(
                f"a gradient of the form {type(form).__name__} cannot be summed over the rows of an example: give the "
                "layer one row for each example, or leave its parameters out of the posterior."
            )
        return replace(rows, a=self.together(rows.a), b=self.together(rows.b))
