"""Checkpoints of long runs: what has been done so far, on disk, so that an interrupt costs little."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Where the classes of older files have gone to.
MOVED = {
    "benchmarks.pictures": "benchmarks.report.curves",
    "benchmarks.estimates": "benchmarks.training.estimates",
    "benchmarks.regression_predictive": "benchmarks.family.regression_predictive",
    "benchmarks.logistic_posterior": "benchmarks.family.logistic_posterior",
}


class _Pickle:
    """The pickle module as torch.load takes it, but for classes that have moved."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return super().find_class(MOVED.get(module, module), name)


class Checkpoint:
    """One file that holds the state of one piece of work; written beside and moved, so it is always whole.

    Args:
        path: the file.
        settings: what the state depends on; a file of other settings is refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def load(self) -> dict[str, Any] | None:
        """The state saved last, None if there is none.

        Raises:
            ValueError: if it was saved with other settings.
        """
        if not self.path.exists():
            return None
        # Our own file: curves and random states beside tensors.
        saved = torch.load(self.path, weights_only=False, pickle_module=_Pickle)
        if saved["settings"] != self.settings:
            changed = [k for k in self.settings if saved["settings"].get(k) != self.settings[k]]
            raise ValueError(
                f"{self.path} belongs to other settings ({', '.join(changed)}): give another --runs folder, or delete "
                "the file to start anew."
            )
        return saved["state"]

    def save(self, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(f".{os.getpid()}.new")
        torch.save({"settings": self.settings, "state": state}, beside)
        beside.replace(self.path)


def kept(path: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What ``make()`` gives: read from a file if it is there, else made and saved in it."""
    checkpoint = Checkpoint(path, settings)
    state = checkpoint.load()
    if state is None:
        state = make()
        checkpoint.save(state)
    return state


def training_state(model: Any, optimizer: Any, schedule: Any, order: torch.Generator) -> dict[str, Any]:
    """What a training goes on from: network, optimizer, schedule, and the generators of noise and of batches."""
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    return {**states, "random": random_state(), "order": order.get_state()}


def set_training_state(
    saved: dict[str, Any], model: Any, optimizer: Any, schedule: Any, order: torch.Generator
) -> None:
    """Undo of `training_state`."""
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    set_random_state(saved["random"])
    order.set_state(saved["order"])


def random_state() -> dict[str, Any]:
    """The state of torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Give torch's generators a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
