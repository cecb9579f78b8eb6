from __future__ import annotations

import pytest

from benchmarks import report_page


@pytest.mark.slow
def test_the_smoke_run_prints_what_a_page_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "in_browser", lambda page, seconds: {"opened": float(page.stat().st_size > 10**5)})
    report_page.main(["--smoke"])
    printed = capsys.readouterr().out
    for words in ("300 examples", "seconds to make", "peak MiB", "page, MB", "opened"):
        assert words in printed
