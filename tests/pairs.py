"""Choices of settings in which every two values of different settings meet, in the place of all combinations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any


def pairs(*axes: Sequence[Any], allowed: Callable[..., bool] = lambda *values: True) -> list[tuple[Any, ...]]:
    """Few combinations of one value from each axis, so that any two values that may occur together do.

    Greedily the one that has the most pairs that are missing; the same each time.

    Args:
        axes: the values of each setting.
        allowed: whether there is a combination.
    """
    every = [values for values in product(*map(range, map(len, axes))) if allowed(*_at(axes, values))]
    missing = {pair for values in every for pair in _pairs(values)}
    chosen = []
    while missing:
        # Of equally good ones the first: those of one optimizer go round the other axes.
        best = max(every, key=lambda values: len(missing & _pairs(values)))
        missing -= _pairs(best)
        chosen.append(best)
    return [_at(axes, values) for values in sorted(chosen)]


def _pairs(values: tuple[int, ...]) -> set[Any]:
    return set(combinations(enumerate(values), 2))


def _at(axes: Sequence[Sequence[Any]], values: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(axis[value] for axis, value in zip(axes, values, strict=True))
