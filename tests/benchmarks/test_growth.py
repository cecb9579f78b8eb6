"""The benchmark of how cost grows runs, and reads slopes off it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth


@pytest.mark.slow
def test_the_smoke_run_prints_the_slopes(capsys: pytest.CaptureFixture[str]) -> None:
    growth.main(["--smoke"])
    printed = capsys.readouterr().out
    for words in (
        "examples N",
        "batch",
        "parameters P",
        "classes C",
        "tokens T",
        "pixels",
        "peak memory",
        *growth.SHOWN,
    ):
        assert words in printed


def test_a_power_of_the_size_has_its_exponent_as_slope() -> None:
    sizes = [10, 20, 40, 80]
    assert growth.slope(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.slope(sizes, [7.0] * 4) == pytest.approx(0, abs=1e-12)


def test_the_picture_has_a_column_for_each_thing_that_grows(tmp_path: Path) -> None:
    lines = {name: [1.0, 2.0, 0.0] for name in growth.SHOWN}
    found = {axis: {"size": [1, 2, 4], "time, ms": lines, "memory, MiB": lines} for axis in growth.AXES}
    growth.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
