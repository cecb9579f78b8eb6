"""Averages of Kronecker factors over the processes that train a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlearn.collectives import gathered, summed
from vlearn.per_example.kronecker_factors import Layer

Key = tuple[Layer, str]

NAMES = ("out_factor", "in_factor", "squares")  # of the statistics, see `factor_sums`


def averages(
    drawn: Mapping[Key, list[Tensor]], parameters: list[Tensor], dtype_of: Callable[[Tensor], torch.dtype], group: Any
) -> dict[Key, Tensor]:
    """Average of each statistic over those draws of all processes that have it; one message for a layer.

    A process that does not reach a layer may not know it. What the first that does takes it for, holds in all.

    Args:
        drawn: the statistics of this process's draws.
        parameters: the same in all processes.
        dtype_of: of the statistics, by weight.
        group: the processes; None for this one alone.
    """
    if group is None:
        return {
            key: torch.stack(statistics).mean(0) if len(statistics) > 1 else statistics[0]
            for key, statistics in drawn.items()
        }
    place_of = {p: place for place, p in enumerate(parameters)}
    own: dict[int, tuple[list[int], dict[str, list[Tensor]]]] = {}
    for layer in dict.fromkeys(layer for layer, _ in drawn):
        statistics = {name: drawn[layer, name] for name in NAMES if (layer, name) in drawn}
        bias = -1 if layer.bias is None else place_of[layer.bias]
        kind = [bias, *(statistics[name][0].dim() if name in statistics else 0 for name in NAMES)]
        own.setdefault(place_of[layer.weight], ([max(map(len, statistics.values())), *kind], statistics))
    joint: dict[Key, Tensor] = {}
    for place, rows in enumerate(
        _gather_layer_table({place: row for place, (row, _) in own.items()}, parameters, group)
    ):
        kind = next((kind for count, *kind in rows if count), None)
        if kind is None:
            continue
        weight, (bias, *axes) = parameters[place], kind
        layer = Layer(weight, None if bias < 0 else parameters[bias])
        row, statistics = own.get(place, ([], {}))
        statistics = statistics if row[1:] == kind else {}
        shapes = {name: shape for name, shape in _shapes(layer, axes).items() if shape}
        dtype = dtype_of(weight)
        sums = [
            torch.stack(statistics[name]).sum(0).to(weight.device, dtype)
            if statistics
            else weight.new_zeros(shape, dtype=dtype)
            for name, shape in shapes.items()
        ]
        count = sum(count for count, *other in rows if other == kind)
        joint.update(
            {(layer, name): total.div_(count) for name, total in zip(shapes, summed(sums, group), strict=True)}
        )
    return joint


def _gather_layer_table(rows: Mapping[int, list[int]], parameters: list[Tensor], group: Any) -> list[list[list[int]]]:
    """By parameter, the row of each process: number of draws, place of the bias or -1, axes of each statistic."""
    mine = torch.zeros(len(parameters), 2 + len(NAMES), dtype=torch.int64, device="cpu")
    for place, row in rows.items():
        mine[place] = torch.tensor(row, device="cpu")
    return gathered(mine.to(parameters[0].device), group).transpose(0, 1).tolist()


def _shapes(layer: Layer, axes: list[int]) -> dict[str, tuple[int, ...]]:
    """Shape of each statistic, () of one that there is not."""
    rows = len(layer.weight)
    columns = sum(p.numel() for p in layer.parameters) // rows
    out_axes, in_axes, squares_axes = axes
    return {
        "out_factor": (rows,) * out_axes,
        "in_factor": (columns,) * in_axes,
        "squares": (rows, columns) if squares_axes else (),
    }
