"""The benchmark of what influences cost runs and prints every structure."""

from __future__ import annotations

import pytest

from benchmarks import influence_cost


@pytest.mark.slow
def test_the_smoke_run_prints_every_call_of_every_structure(capsys: pytest.CaptureFixture[str]) -> None:
    influence_cost.main(["--smoke"])
    printed = capsys.readouterr().out
    for structure in influence_cost.STRUCTURES:
        for call in (influence_cost.SWEEP, influence_cost.ALL, influence_cost.LARGEST, influence_cost.PRODUCTS):
            assert f"{structure}: {call}" in printed
