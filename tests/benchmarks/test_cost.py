"""The cost benchmark runs, and asks for what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cost


@pytest.mark.slow
def test_the_smoke_run_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ivon")
    threads = torch.get_num_threads()
    try:
        cost.main(["--smoke"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for words in ("live self-influence", "sweep with LOO", "LeNet-5", "ivon-opt", "bytes per parameter"):
        assert words in printed


def test_lenet_has_the_papers_number_of_parameters() -> None:
    assert sum(p.numel() for p in cost.lenet5().parameters()) == 61_706
