"""Time of calls that take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronised(step: Callable[[], None], device: str) -> Callable[[], None]:
    """The same step, which returns only when the device has finished it."""
    if device == "cpu":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize()

    return call
