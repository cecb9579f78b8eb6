"""Checkpoints give back what was saved, also by a version whose classes lay elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.report.curves import Curves
from benchmarks.training.checkpoint import MOVED, Checkpoint, kept


@pytest.mark.parametrize("old", MOVED)
def test_every_class_that_moved_is_where_it_is_said_to_be(old: str) -> None:
    assert __import__(MOVED[old], fromlist=["_"])


def test_a_file_that_names_a_class_by_its_old_module_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("benchmarks.pictures")
    module.Curves = type("Curves", (), {"__module__": module.__name__, "__qualname__": "Curves"})  # pyright: ignore
    monkeypatch.setitem(sys.modules, module.__name__, module)
    old = module.Curves()
    old.__dict__.update(vars(Curves(steps=[1, 2], train_loss=[0.5, 0.25])))
    Checkpoint(tmp_path / "run.pt", {"seed": 0}).save({"curves": old, "weights": torch.ones(3)})
    monkeypatch.delitem(sys.modules, module.__name__)
    state = Checkpoint(tmp_path / "run.pt", {"seed": 0}).load()
    assert state is not None and torch.equal(state["weights"], torch.ones(3))
    assert state["curves"] == Curves(steps=[1, 2], train_loss=[0.5, 0.25])


def test_what_is_kept_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> int:
        made.append(1)
        return 7

    assert [kept(tmp_path / "number.pt", {}, make) for _ in range(2)] == [7, 7]
    assert len(made) == 1
