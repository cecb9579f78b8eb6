"""The benchmark of constant batch statistics runs, and its rows are there."""

from __future__ import annotations

import pytest

from benchmarks import batch_norm


@pytest.mark.slow
def test_the_smoke_run_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    batch_norm.main(["--smoke"])
    printed = capsys.readouterr().out
    for words in ("Pearson", "Test accuracy", "of a plain pass", *batch_norm.OPTIMIZERS):
        assert words in printed
