"""A posterior as the next task's prior keeps what was learned of split digits, and the benchmark runs."""

from __future__ import annotations

import pytest

from benchmarks import continual


@pytest.mark.slow
def test_the_smoke_run_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    continual.main(["--smoke"])
    printed = capsys.readouterr().out
    for words in ("one head", "a head for each task", "Two sites", "merged", *continual.OPTIMIZERS):
        assert words in printed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "heads", "epochs"), [("FullVON", 1, 15), ("IVON", continual.TASKS, 60)])
def test_tasks_with_a_prior_come_near_all_tasks_at_once_and_without_one_are_forgotten(
    name: str, heads: int, epochs: int
) -> None:
    found = continual.one_after_the_other(name, heads, seed=0, epochs=epochs)
    assert found["with prior"] > found["without"] + 0.1
    assert found["with prior"] > found["at once"] - 0.1


@pytest.mark.slow
def test_a_merged_posterior_knows_the_classes_of_both_sites() -> None:
    found = continual.sites(seed=0, epochs=40)
    assert found["merged"] > found["a site alone"] + 0.2
