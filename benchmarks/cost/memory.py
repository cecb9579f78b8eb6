"""Peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc/self")
MIB = 2**20


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a process that has imported vlearn and done nothing else; returns what it returns."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["vlearn"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def start_of_peak(device: str = "cpu") -> float:
    """Start to look for the peak; returns the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif PROC.exists():
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)  # glibc keeps what was freed, and the call would seem to need nothing
        (PROC / "clear_refs").write_text("5")  # the high-water mark starts anew
    return peak(device)


def peak(device: str = "cpu") -> float:
    """Peak bytes of this process. Not getrusage: on Linux that keeps the peak of the parent process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    if not PROC.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * float(line.split()[1])
