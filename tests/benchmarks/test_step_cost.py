"""The benchmark of the step runs, and its rows are there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import step_cost


@pytest.mark.slow
def test_the_smoke_run_prints_every_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ivon")
    threads = torch.get_num_threads()
    try:
        step_cost.main(["--smoke"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for name in (*step_cost.OPTIMIZERS, "bytes per parameter"):
        assert name in printed
