"""The tables of the README and the manual are those that the numbers in results/ give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import records
from benchmarks.report.markdown import names_of, seconds, short, table, with_tables
from benchmarks.tables.__main__ import DOCUMENTS, TABLES, differences, main


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_table_has_one_place() -> None:
    places = [name for path in DOCUMENTS for name in names_of(path.read_text(encoding="utf-8"))]
    assert sorted(places) == sorted(TABLES)


def test_a_number_that_was_typed_is_a_difference_until_it_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "README.md"
    text = f"# name\n\n<!-- table: family-cost -->\n{TABLES['family-cost']()}\n<!-- /table -->\n\nend\n"
    document.write_text(text.replace("| 1 | 1.01 |", "| 1 | 0.99 |"), encoding="utf-8")
    assert main(["--check"], [document]) == 1
    said = capsys.readouterr().err
    assert "-| 1 | 0.99 |" in said and "+| 1 | 1.01 |" in said and "make tables" in said
    assert main([], [document]) == 0
    assert document.read_text(encoding="utf-8") == text
    assert differences([document]) == []


def test_another_result_is_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, numbers = TABLES["step-cost"](), records.read("step_cost")
    next(iter(numbers["steps"].values()))["vlearn"]["step, ms"] = 99.4
    (tmp_path / "step_cost.json").write_text(json.dumps(numbers), encoding="utf-8")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    after = TABLES["step-cost"]()
    assert before != after and "| `vlearn.IVON` | 99 ms, 0.34x |" in after


def test_a_place_of_an_unknown_table_and_one_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="no table 'b', but there are 'a'"):
        with_tables("<!-- table: b -->\n<!-- /table -->", {"a": str})
    with pytest.raises(ValueError, match="a place of a table is not closed"):
        with_tables("<!-- table: a -->\n| 1 |\n\n<!-- table: a -->\n<!-- /table -->", {"a": str})


def test_numbers_are_printed_as_the_pages_have_them() -> None:
    assert [short(value, 3) for value in (0.4171, -0.0339, 1.33104)] == [".417", "-.034", "1.331"]
    assert short(0.62658, 3, sign=True) == "+.627"
    assert [seconds(value) for value in (16.87, 470.2, 1490.3)] == ["17 s", "470 s", "1,490 s"]
    assert table(("", "a"), [("b", ""), ("c", "1")]) == "| | a |\n|---|---|\n| b | |\n| c | 1 |"
