"""The benchmark of the running average: it runs, and takes the settings that it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("laplace")
pytest.importorskip("sklearn")

from benchmarks import running_average
from benchmarks.running_average import SMOKE, label


@pytest.mark.slow
def test_the_smoke_run_has_a_row_for_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert running_average.main(arguments) == 0
    record = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert list(record["table"]) == [label(*setting) for setting in SMOKE.settings]
    constant, warmed = (row["mean"] for row in record["table"].values())
    assert constant["loo_loss"] != warmed["loo_loss"]
    assert all(0 <= row["mean_relative_gap"] <= row["largest_relative_gap"] for row in (constant, warmed))
    assert (tmp_path / "out" / "digits.png").exists()
    assert "constant beta2, hess_init=0.1" in capsys.readouterr().out
