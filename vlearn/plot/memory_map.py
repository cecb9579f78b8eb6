"""Memory map: which examples does the model lean on? One point an example: prediction error over leverage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlearn._extras import require
from vlearn.plot.style import BLUE, GREY, INK, VERMILLION, new_axes, tidy
from vlearn.plot.thumbnails import thumbnails
from vlearn.record import MemoryMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS_OF_THUMBNAILS = 2
SMALLEST_DRAWN = 1e-5  # of the largest leverage


def memory_map(
    memory: MemoryMap | None = None,
    snapshot: int | None = None,
    *,
    leverage: Any = None,
    prediction_error: Any = None,
    self_influence: Any = None,
    images: Any = None,
    labels: Any = None,
    top: int = 8,
    ax: Axes | None = None,
) -> Axes:
    """Scatter the training examples by leverage and prediction error and circle the most sensitive ones.

    An example near the origin is predictable. One with a high error at low leverage is unpredictable (often
    mislabelled or ambiguous), one with high leverage uncertain: the model leans on it (Tailor et al., 2024).

    Args:
        memory: a record; or None, and give the arrays.
        snapshot: which snapshot of ``memory``, negative from the end; default the last one with leverage.
        leverage: ``[N]`` tr(Λ_i V_i), effective parameters, best from a sweep with leverage="exact": the probe
            of a sweep is noisy in a single row. Drawn on a log scale; what is below 10⁻⁵ of the largest stands at
            its left end.
        prediction_error: ``[N]`` ‖p_i - y_i‖/√2.
        self_influence: ``[N]`` g_iᵀΣg_i; the ``top`` largest are circled and numbered. Default none is.
        images: ``[N, H, W]``, ``[N, 1, H, W]``, ``[N, 3, H, W]`` or ``[N, H, W, 3]``; the circled examples
            are drawn beside the map.
        labels: ``[N]`` numbers or names, written under the images.
        top: how many examples to circle.
        ax: where to draw; default a new figure. Images stand to its right, where the caller leaves room for
            half its width.

    Returns:
        The axes of the map.

    Raises:
        ValueError: if there is no leverage, a length differs, or the images have another shape.
    """
    if memory is not None:
        snapshot = _last_with_leverage(memory) if snapshot is None else snapshot
        leverage, prediction_error, self_influence = (
            memory.column(name)[snapshot] for name in ("leverage", "prediction_error", "self_influence")
        )
    labels = labels.tolist() if hasattr(labels, "iloc") else labels  # of pandas, by place and not by index
    if leverage is None or prediction_error is None:
        raise ValueError("leverage or prediction_error is missing: give a memory, or both arrays.")
    x, y = _floats(leverage), _floats(prediction_error)
    strength = np.full(len(x), np.nan) if self_influence is None else _floats(self_influence)
    for name, values in {
        "prediction_error": y,
        "self_influence": strength,
        "labels": labels,
        "images": images,
    }.items():
        if values is not None and len(values) != len(x):
            raise ValueError(f"{name} has {len(values)} rows, but leverage has {len(x)}: give one per example.")
    drawn = np.isfinite(x) & np.isfinite(y)
    if not drawn.any():
        raise ValueError("No example has both leverage and prediction error: sweep with leverage='probe'.")
    circled = np.argsort(np.where(drawn & np.isfinite(strength), -strength, np.inf), kind="stable")
    circled = circled[: min(top, np.count_nonzero(drawn & np.isfinite(strength)))]
    pictures = None if images is None else thumbnails(images, circled)

    if ax is None:
        ax = new_axes(6.2, 4.4) if pictures is None else new_axes(8.6, 4.4, right=0.7)
    # Leverage of learned examples falls towards zero without end; below the floor it no longer matters.
    largest = x[drawn].max()
    x = np.maximum(x, SMALLEST_DRAWN * largest if largest > 0 else 1.0)
    ax.set_xscale("log")
    crowd = np.sqrt(drawn.sum())
    size, alpha = float(np.clip(1000 / crowd, 4, 14)), float(np.clip(60 / crowd, 0.15, 0.7))
    ax.scatter(x[drawn], y[drawn], s=size, color=BLUE, alpha=alpha, linewidths=0, rasterized=True)
    ax.scatter(x[circled], y[circled], s=70, facecolors="none", edgecolors=VERMILLION, linewidths=1.4)
    tidy(ax, "leverage  tr(ΛV)", "prediction error  ‖p − y‖/√2")
    _name_regions(ax)
    _number(ax, np.stack([x[circled], y[circled]], axis=1))
    if pictures is not None:
        _draw_thumbnails(ax, pictures, circled, labels)
    return ax


def _last_with_leverage(memory: MemoryMap) -> int:
    leverage = memory.column("leverage")
    for snapshot in reversed(range(len(memory))):
        if np.isfinite(leverage[snapshot]).any():
            return snapshot
    raise ValueError("memory holds no leverage: record a sweep made with leverage='probe' or 'exact'.")


def _floats(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)


def _name_regions(ax: Axes) -> None:
    for name, x, y, side in [
        ("unpredictable", 0.02, 0.96, "left"),
        ("uncertain", 0.98, 0.05, "right"),
        ("predictable", 0.02, 0.13, "left"),
    ]:
        style = {"fontsize": 11, "fontstyle": "italic", "color": GREY, "ha": side, "va": "center"}
        ax.text(x, y, name, transform=ax.transAxes, zorder=0.9, **style)


def _number(ax: Axes, points: np.ndarray) -> None:
    """Write 1, 2, ... beside the points, each on the side with the most room."""
    if len(points) == 0:
        return
    ax.autoscale_view()
    inches = ax.transData.transform(points) / ax.figure.dpi
    angles = np.arange(12) * np.pi / 6 + np.pi / 6
    sides = 0.15 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.zeros((0, 2))
    halo = require("matplotlib.patheffects", "plot").withStroke(linewidth=3, foreground="white")
    for place, (point, inch) in enumerate(zip(points, inches, strict=True)):
        others = np.concatenate([np.delete(inches, place, axis=0), labels, [[-9, -9]]])
        room = np.linalg.norm((inch + sides)[:, None] - others, axis=-1).min(axis=1)
        side = sides[np.argmax(np.minimum(room, 0.25))]
        labels = np.vstack([labels, inch + side])
        style = {"fontsize": 9, "color": VERMILLION, "ha": "center", "va": "center", "path_effects": [halo]}
        ax.annotate(str(place + 1), point, 72 * side, textcoords="offset points", **style)


def _draw_thumbnails(ax: Axes, pictures: np.ndarray, circled: np.ndarray, labels: Any) -> None:
    rows = max(4, -(-len(pictures) // COLUMNS_OF_THUMBNAILS))
    width, height = 0.17, 1 / rows
    for place, (picture, i) in enumerate(zip(pictures, circled, strict=True)):
        row, column = divmod(place, COLUMNS_OF_THUMBNAILS)
        left, top = 1.05 + column * (width + 0.02), 1 - row * height
        share = max(0.4, 1 - (0.055 if labels is None else 0.08) * rows)
        small = ax.inset_axes((left, top - share * height, width, share * height))
        small.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        small.set_xticks([])
        small.set_yticks([])
        small.spines[:].set(color=VERMILLION, linewidth=1.2)
        style = {"fontsize": 9, "color": VERMILLION, "ha": "right", "va": "top"}
        small.text(-0.08, 1.0, str(place + 1), transform=small.transAxes, **style)
        small.set_xlabel(_caption(i, labels), fontsize=8, color=INK, labelpad=2, linespacing=1.05)


def _caption(i: int, labels: Any) -> str:
    if labels is None:
        return f"#{i}"
    label = labels[i].item() if hasattr(labels[i], "item") else labels[i]
    return f"#{i}\n{label}" if isinstance(label, str) else f"#{i}\nlabel {label:g}"
