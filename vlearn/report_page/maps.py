"""The maps of a page: two numbers of every example, at several times of the run, and what they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vlearn.record import MemoryMap
from vlearn.report_page.packing import in_16_bits

SMALLEST_DRAWN = 1e-5  # of the largest value on a logarithmic axis
MOST_BYTES = 12 * 2**20  # of all positions of all maps, by which the number of snapshots in the page is bounded
LARGEST_COUNT = 100  # of snapshots

Position = Callable[[int], tuple[np.ndarray, np.ndarray]]  # x and y of all examples at a snapshot


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        bounds: what it reaches at least, whatever the data.
    """

    label: str
    log: bool = False
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Map:
    """Two numbers of every example over the run.

    Attributes:
        about: one sentence on what it shows.
        regions: what examples in a part of the map are called, and where: x and y in [0, 1], from the lower left.
        snapshots: places in the record.
        at: x and y ``[N]`` at a snapshot, by its place in the record.
    """

    key: str
    title: str
    about: str
    x: Axis
    y: Axis
    regions: tuple[tuple[str, float, float], ...]
    steps: Sequence[int]
    snapshots: Sequence[int]
    at: Position


LEVERAGE = Axis("leverage tr(ΛV), effective parameters", log=True)
SELF_INFLUENCE = Axis("self-influence gᵀΣg, in the loss's units", log=True)
PREDICTION_ERROR = Axis("prediction error ‖p − y‖/√2", bounds=(0.0, 1.0))
MEMORY_REGIONS = (("unpredictable", 0.03, 0.96), ("uncertain", 0.97, 0.06), ("predictable", 0.03, 0.06))


def maps_of(memory: MemoryMap) -> list[Map]:
    """Every map that a record has the columns for, the most telling first."""
    found: list[Map] = []
    for kind, name in (("sweep", "leverage"), ("sweep", "self_influence"), ("live", "self_influence")):
        if not any(each.key == "memory" for each in found):
            found += _memory_map(memory, kind, name)
    return [*found, *_data_map(memory), *_loss_and_margin(memory)]


def map_of_table(columns: dict[str, np.ndarray]) -> list[Map]:
    """The memory map of one sweep."""
    for name, axis in (("leverage", LEVERAGE), ("self_influence", SELF_INFLUENCE)):
        if name in columns:
            pair = columns[name], columns["prediction_error"]
            return [_memory(name, axis, [0], [0], partial(_same, pair))]
    return []


def _same(pair: tuple[np.ndarray, np.ndarray], snapshot: int) -> tuple[np.ndarray, np.ndarray]:
    return pair


def _memory(name: str, axis: Axis, steps: Sequence[int], snapshots: Sequence[int], at: Position) -> Map:
    what = "how much the model leans on it" if name == "leverage" else "how much its loss would rise without it"
    about = (
        f"Each point is an example. Up: the model does not predict its label. Right: {what}. Mislabelled and "
        "ambiguous examples are at the top."
    )
    return Map("memory", "Memory map", about, axis, PREDICTION_ERROR, MEMORY_REGIONS, steps, snapshots, at)


def _memory_map(memory: MemoryMap, kind: str, name: str) -> list[Map]:
    x, y = memory.column(name), memory.column("prediction_error")
    places = _snapshots(memory, kind, x, y)
    if not places:
        return []
    axis = LEVERAGE if name == "leverage" else SELF_INFLUENCE
    return [_memory(name, axis, memory.steps[places].tolist(), places, lambda s: (x[s], y[s]))]


def _data_map(memory: MemoryMap) -> list[Map]:
    """Mean and spread of the label's probability (dataset cartography, Swayamdipta et al., 2020, arXiv:2009.10795)."""
    column = memory.column("probability")
    places = _snapshots(memory, "live", column)
    if len(places) < 2:
        return []

    def at(snapshot: int) -> tuple[np.ndarray, np.ndarray]:
        count, total, squares = (np.zeros(memory.num_data) for _ in range(3))
        for s in places[: places.index(snapshot) + 1]:
            p = column[s].astype(np.float64)
            seen = np.isfinite(p)
            count += seen
            total[seen] += p[seen]
            squares[seen] += p[seen] ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = total / count
            spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return spread, mean

    about = (
        "Each point is an example. Up: the model believed its label for most of the run. Right: it changed its mind. "
        "Mislabelled examples are at the bottom left."
    )
    x = Axis("spread of the label's probability over the epochs", bounds=(0.0, 0.5))
    y = Axis("mean probability of the label over the epochs", bounds=(0.0, 1.0))
    regions = (("easy", 0.03, 0.96), ("ambiguous", 0.97, 0.5), ("hard to learn", 0.03, 0.04))
    later = places[1:]  # a spread needs two
    return [Map("data", "Data map", about, x, y, regions, memory.steps[later].tolist(), later, at)]


def _loss_and_margin(memory: MemoryMap) -> list[Map]:
    loss, margin = memory.column("loss"), memory.column("margin")
    places = _snapshots(memory, "live", loss, margin)
    if not places:
        return []
    about = (
        "Each point is an example, by averages over the epoch. Left of 0, another class has the larger logit. "
        "Mislabelled examples stay at the top left."
    )
    x, y = Axis("margin: logit of the label minus the largest other"), Axis("loss of the example", log=True)
    regions = (("against the label", 0.03, 0.96), ("with the label", 0.97, 0.06))
    steps = memory.steps[places].tolist()
    title = "Loss and margin"
    return [Map("loss", title, about, x, y, regions, steps, places, lambda s: (margin[s], loss[s]))]


def _snapshots(memory: MemoryMap, kind: str, *columns: np.ndarray) -> list[int]:
    """Those of a kind in which each column has a finite value."""
    found = np.flatnonzero(memory.kinds == kind).tolist()
    return [s for s in found if all(bool(np.isfinite(column[s]).any()) for column in columns)]


def packed_positions(found: Map, kept: Sequence[int], add: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """A map's description and, by ``add``, its positions in 16 bits; on one scale for all its snapshots.

    Args:
        kept: which of the map's snapshots.
    """
    axes = []
    for side, axis in enumerate((found.x, found.y)):
        low, high = _range([found.at(found.snapshots[s])[side] for s in kept], axis.log)
        if axis.bounds is not None:
            low, high = min(low, axis.bounds[0]), max(high, axis.bounds[1])
        axes.append({"label": axis.label, "log": axis.log, "low": low, "high": high})
    positions = []
    for s in kept:
        pair = found.at(found.snapshots[s])
        positions.append(
            [
                add(in_16_bits(np.asarray(values, np.float64), a["low"], a["high"], a["log"]))
                for values, a in zip(pair, axes, strict=True)
            ]
        )
    return {
        "key": found.key,
        "title": found.title,
        "about": found.about,
        "x": axes[0],
        "y": axes[1],
        "regions": [list(region) for region in found.regions],
        "steps": [int(found.steps[s]) for s in kept],
        "positions": positions,
    }


def kept_snapshots(count: int, num_data: int, num_maps: int) -> list[int]:
    """Which snapshots of a map go into the page: all, or evenly many with the first and the last."""
    most = max(2, min(LARGEST_COUNT, MOST_BYTES // (4 * num_data * max(num_maps, 1))))
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def scale_of(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The ends of a scale that all finite values fit on; below 10⁻⁵ of the largest a logarithmic one ends."""
    return _range([values], log)


def _range(rows: Sequence[np.ndarray], log: bool) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for values in rows:
        finite = values[np.isfinite(values)]
        if log:
            finite = finite[finite > 0]
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        return (1e-5, 1.0) if log else (0.0, 1.0)
    if log:
        low = max(low, SMALLEST_DRAWN * high)
        return (low, high) if low < high else (low / 10, high * 10)
    return (low, high) if low < high else (low - 0.5, high + 0.5)
