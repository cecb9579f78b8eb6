"""The tables and numbers of the README and the manual are those that results/ gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import markdown, records
from benchmarks.report.markdown import (
    both,
    from_to,
    names_of,
    roughly,
    seconds,
    short,
    table,
    with_numbers,
    with_tables,
)
from benchmarks.tables import prose_losses, prose_optimizers, prose_removals
from benchmarks.tables.__main__ import DOCUMENTS, NUMBERS, ROOT, TABLES, differences, main

RESULTS = (ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "results").glob("*.md")))
WRITTEN = re.compile(r"<!-- table: .*?<!-- /table -->|<!--n .*?<!--/n-->", re.DOTALL)
CODE_OR_LINK = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
SETTING = re.compile(r"δ = [\d.]+|top 1%|95% bootstrap|Python 3\.10 or newer[^)]*\)")
FIGURE = re.compile(  # .637, 12.5, 63%, 3x, 17 s; not 2.5.1 nor arXiv:2310.19273
    r"(?<![\w.:/-])(?:\d*\.\d+(?!\.?\d)|\d[\d,]*(?:%|x\b|\s(?:s|ms|µs|MiB|MB|GB|nats|times)\b))"
)


def typed_figures(text: str) -> list[str]:
    """What looks measured outside code, links and the places of tables and numbers."""
    for pattern in (WRITTEN, CODE_OR_LINK, SETTING):
        text = pattern.sub(" ", text)
    return [" ".join(text[max(found.start() - 40, 0) : found.end()].split()) for found in FIGURE.finditer(text)]


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_table_has_one_place() -> None:
    places = [name for path in DOCUMENTS for name in names_of(path.read_text(encoding="utf-8"))]
    assert sorted(places) == sorted(TABLES)


def test_every_number_has_a_place_and_a_name_of_its_own() -> None:
    places = {name for path in DOCUMENTS for name in names_of(path.read_text(encoding="utf-8"), markdown.NUMBERS)}
    assert places == set(NUMBERS)
    assert len(NUMBERS) == sum(len(module.NUMBERS) for module in (prose_losses, prose_optimizers, prose_removals))


@pytest.mark.parametrize("page", RESULTS, ids=lambda path: path.stem)
def test_no_measured_number_is_typed(page: Path) -> None:
    assert typed_figures(page.read_text(encoding="utf-8")) == [], "make each a place, or a setting in backticks"


def test_a_typed_figure_is_seen_and_a_setting_or_a_written_number_is_not() -> None:
    for figure in (".637", "12.5", "3.4x", "63%", "17 s", "1,490 s", "28 times"):
        assert typed_figures(f"The gap is ({figure}), says | {figure} |.") != []
    assert typed_figures("`lr=0.1`, δ = .1, 60,000 images, 2.5.1, arXiv:2310.19273, [a](b.1.html), the top 1%") == []
    assert typed_figures("<!--n a-->.637<!--/n--> and\n<!-- table: b -->\n| .637 |\n<!-- /table -->") == []


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


def test_a_number_is_written_into_its_place() -> None:
    text = "a gap of <!--n gap-->.1<!--/n--> nats (<!--n gap--><!--/n-->)"
    assert (
        with_numbers(text, {"gap": lambda: ".2"}) == "a gap of <!--n gap-->.2<!--/n--> nats (<!--n gap-->.2<!--/n-->)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("of <!--n b-->1<!--/n-->", "no number 'b', but there are 'a'"),
        ("of <!--n a-->1", "a place of a number is not closed"),
        ("of <!--n a-->1 and <!--n a-->2<!--/n-->", "a place of a number is not closed"),
        ("of <!--n a-->1\nor 2<!--/n-->", "a place of a number is not closed"),
        ("of 1<!--/n-->", "not opened"),
        ("of <!-- n: a -->1<!-- /n -->", "write <!--n NAME-->, the number"),
        ("it is\n<!--n a-->1<!--/n-->", "the place of 'a' begins a line"),
        ("- <!--n a-->1<!--/n-->", "the place of 'a' begins a line"),
        ("1. <!--n a-->1<!--/n-->", "the place of 'a' begins a line"),
    ],
)
def test_a_place_that_would_not_be_written_or_shown_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_numbers(text, {"a": str})


def test_numbers_are_printed_as_the_pages_have_them() -> None:
    assert [short(value, 3) for value in (0.4171, -0.0339, 1.33104)] == [".417", "-.034", "1.331"]
    assert short(0.62658, 3, sign=True) == "+.627"
    assert [seconds(value) for value in (16.87, 470.2, 1490.3)] == ["17 s", "470 s", "1,490 s"]
    assert [roughly(value) for value in (1.354, 27.9, 110.7)] == ["1.4", "28", "111"]
    assert both((0.0376, 0.0262), lambda value: short(value, 3)) == ".038 and .026"
    assert [from_to(values, "{:.1f}".format) for values in ((2.6, 1.36, 2), (1.63, 1.56))] == ["1.4 to 2.6", "1.6"]
    assert table(("", "a"), [("b", ""), ("c", "1")]) == "| | a |\n|---|---|\n| b | |\n| c | 1 |"
