"""The benchmarks of fits run, and their rows are there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import fit_cost, stopped_training


@pytest.mark.slow
def test_the_smoke_run_of_the_cost_prints_every_fit(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    fit_cost.main(["--smoke"])
    printed = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    for words in ("an epoch of training", *fit_cost.STRUCTURES):
        assert words in printed


@pytest.mark.slow
def test_the_smoke_run_of_stopped_training_prints_both_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for optimizer in ({}, {"optimizer": "AdamW", "prior_precision": None, "lr": (1e-3, 0.0)}):
        monkeypatch.setattr(stopped_training, "SMOKE", dataclasses.replace(stopped_training.SMOKE, **optimizer))
        runs = tmp_path / str(len(optimizer))
        assert stopped_training.main(["--smoke", "--runs", str(runs)]) == 0
        printed = capsys.readouterr().out
        for words in ("training time", "test", "stopped", "mean gap"):
            assert words in printed
        assert stopped_training.main(["--smoke", "--runs", str(runs)]) == 0  # from what was saved
        assert capsys.readouterr().out == printed
