"""Groups left out: the smoke run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.group_removal import METHODS, main


@pytest.mark.slow
def test_the_smoke_run_writes_every_method_and_goes_on_from_what_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert set(first["table"]) == set(METHODS)
    for method, each in first["removals"].items():
        assert len(each["predicted"]) == len(each["retrained"]) == 24, method
        assert first["table"][method]["mean"]["loo_loss"] > first["table"][method]["mean"]["train_loss"]
    assert (tmp_path / "out" / "digits.png").stat().st_size > 10_000
    assert "EVON" in capsys.readouterr().out
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "digits.json").read_text())["table"] == first["table"]
