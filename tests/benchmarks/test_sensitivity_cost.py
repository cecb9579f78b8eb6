"""The benchmark of what sensitivities cost runs, and asks for what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks import sensitivity_cost


@pytest.mark.slow
def test_the_smoke_run_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        sensitivity_cost.main(["--smoke"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for words in ("live self-influence", "live with deviation", "sweep with LOO", "LeNet-5", "GPT", "vmap(jacrev)"):
        assert words in printed


def test_lenet_has_the_papers_number_of_parameters() -> None:
    assert sum(p.numel() for p in sensitivity_cost.lenet5().parameters()) == 61_706


def test_the_language_model_has_about_a_million_parameters() -> None:
    assert 0.9e6 < sum(p.numel() for p in sensitivity_cost.LanguageModel().parameters()) < 1.1e6
