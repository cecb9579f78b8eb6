"""Tables and numbers as Markdown, in their places between markers, and how the pages print a number.

The place of a table is ``<!-- table: NAME -->``, the table, ``<!-- /table -->``, each marker on a line of its own.
That of a number in a sentence is ``<!--n NAME-->``, the number, ``<!--/n-->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

Contents = Mapping[str, Callable[[], str]]


class Places(NamedTuple):
    """The places of one kind: a whole one, any of its two markers, and how one is written."""

    noun: str
    whole: re.Pattern[str]
    marker: re.Pattern[str]
    form: str


TABLES = Places(
    "table",
    re.compile(r"^(?P<begin><!-- table: (?P<name>\S+) -->\n).*?^(?P<end><!-- /table -->)$", re.DOTALL | re.MULTILINE),
    re.compile(r"<!--\s*/?table\b.*?-->"),
    "<!-- table: NAME -->, the table and <!-- /table -->, each marker on a line of its own",
)
NUMBERS = Places(
    "number",
    re.compile(r"(?P<begin><!--n (?P<name>[\w-]+?)-->).*?(?P<end><!--/n-->)"),
    re.compile(r"<!--\s*/?n\b.*?-->"),
    "<!--n NAME-->, the number and <!--/n-->, on one line",
)
# Markdown takes a line that begins with a comment for HTML and ends the paragraph there.
BEGINS_A_LINE = re.compile(r"^[\s>*+-]*(?:\d+[.)]\s+)?<!--n (?P<name>[\w-]+?)-->", re.MULTILINE)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a final newline."""
    lines = [_line(header), "|" + "---|" * len(header)]
    return "\n".join([*lines, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def names_of(text: str, places: Places = TABLES) -> list[str]:
    """The tables, or the numbers, that a document has places for."""
    return [place["name"] for place in places.whole.finditer(text)]


def with_tables(text: str, tables: Contents) -> str:
    """The document with every table made anew.

    Raises:
        ValueError: if a place names a table that there is not, or is not closed before the next one.
    """
    return _filled(text, TABLES, tables, after="\n")


def with_numbers(text: str, numbers: Contents) -> str:
    """The document with every number in its sentences made anew.

    Raises:
        ValueError: if a place names a number that there is not, is not closed on its line, or begins a line.
    """
    if first := BEGINS_A_LINE.search(text):
        raise ValueError(f"the place of {first['name']!r} begins a line, which makes it HTML: put a word before it.")
    return _filled(text, NUMBERS, numbers)


def _filled(text: str, places: Places, contents: Contents, after: str = "") -> str:
    names = names_of(text, places)
    if unknown := [name for name in names if name not in contents]:
        raise ValueError(f"no {places.noun} {unknown[0]!r}, but there are {', '.join(map(repr, contents))}.")
    if len(places.marker.findall(text)) != 2 * len(names):
        raise ValueError(f"a place of a {places.noun} is not closed, or not opened: write {places.form}.")
    return places.whole.sub(lambda place: place["begin"] + contents[place["name"]]() + after + place["end"], text)


def short(value: float, digits: int, sign: bool = False) -> str:
    """A number without the zero before its point: .417, -.034, 1.331."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{'+' if sign else ''}.{digits}f}")


def percent(value: float, digits: int = 1) -> str:
    """A share as 85.3%."""
    return f"{value:.{digits}%}"


def seconds(value: float) -> str:
    """Whole seconds, of long times the first three digits: 17 s, 1,490 s."""
    return f"{float(f'{value:.3g}') if value >= 1000 else value:,.0f} s"


def roughly(value: float) -> str:
    """Two digits, or all those before the point: 1.4, 28, 110."""
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def both(values: Iterable[float], shown: Callable[[float], str]) -> str:
    """Two numbers beside each other: .038 and .026."""
    return " and ".join(map(shown, values))


def from_to(values: Iterable[float], shown: Callable[[float], str]) -> str:
    """The smallest to the largest: 1.4 to 2.6; one number where the two are printed alike."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys(map(shown, (ordered[0], ordered[-1]))))
