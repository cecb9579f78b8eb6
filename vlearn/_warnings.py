"""Warnings that point at the line of the user's which led to them."""

from __future__ import annotations

import inspect
import warnings

INSIDE = ("vlearn", "torch", "contextlib", "functools")  # packages whose lines are not the user's


def warn_user(message: str) -> None:
    """Warn at the innermost line that is outside vlearn and torch, however deep the call is."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
