"""What produced the numbers of a benchmark: command, seed, hardware and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

PACKAGES = ("vlearn", "torch", "numpy", "laplace-torch", "ivon-opt", "scikit-learn", "cleanlab", "wandb")


def provenance(command: str, seed: int) -> dict[str, Any]:
    """Command, seed, hardware and versions: what is needed to make the numbers again."""
    return {
        "command": command,
        "seed": seed,
        "hardware": {"processor": _processor(), "cores": cores(), "accelerator": _accelerator()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
