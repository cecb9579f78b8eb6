"""The benchmarks of fits run, and their rows are there."""

from __future__ import annotations

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
def test_the_smoke_run_of_stopped_training_prints_both_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    stopped_training.main(["--smoke"])
    printed = capsys.readouterr().out
    for words in ("training time", "test", *stopped_training.STRUCTURES, "stopped"):
        assert words in printed
