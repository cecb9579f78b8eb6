"""The look that every figure shares: colours that colour-blind readers can tell apart, and no frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlearn._extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008), Color Universal Design.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
INK, GREY, PALE = "#222222", "#7A7A7A", "#E6E6E6"


def new_axes(width: float, height: float, right: float | None = None) -> Axes:
    """Axes of a new figure, sized in inches; ``right`` is where they end if something stands there."""
    plt = require("matplotlib.pyplot", "plot")
    if right is None:
        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    left, bottom, top = 0.75 / width, 0.6 / height, 1 - 0.12 / height
    return plt.figure(figsize=(width, height)).add_axes((left, bottom, right - left, top - bottom))


def tidy(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Label the axes and take away the frame."""
    ax.set_xlabel(xlabel, fontsize=11, color=INK)
    ax.set_ylabel(ylabel, fontsize=11, color=INK)
    ax.tick_params(which="both", colors=GREY, labelcolor=INK, labelsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.grid(color=PALE, linewidth=0.8)
    ax.set_axisbelow(True)
