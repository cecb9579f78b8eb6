"""Long work that survives an interrupt: what has been done so far, on disk, and progress for the one who waits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


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
        saved = torch.load(self.path, weights_only=False)  # our own file: curves and random states beside tensors
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


def random_state() -> dict[str, Any]:
    """State of torch's generators, to be saved."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
