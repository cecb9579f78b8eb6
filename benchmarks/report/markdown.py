"""Tables as Markdown, in their places between markers, and numbers as the pages print them.

A place is ``<!-- table: NAME -->``, the table, ``<!-- /table -->``, each marker on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

PLACE = re.compile(r"^<!-- table: (?P<name>\S+) -->\n.*?^<!-- /table -->$", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"^<!-- table: \S+ -->$", re.MULTILINE)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a final newline."""
    lines = [_line(header), "|" + "---|" * len(header)]
    return "\n".join([*lines, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def names_of(text: str) -> list[str]:
    """The tables that a document has a place for."""
    return [place["name"] for place in PLACE.finditer(text)]


def with_tables(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The document with every table made anew.

    Raises:
        ValueError: if a place names a table that there is not, or is not closed before the next one.
    """
    names = names_of(text)
    if unknown := [name for name in names if name not in tables]:
        raise ValueError(f"no table {unknown[0]!r}, but there are {', '.join(map(repr, tables))}.")
    if len(OPENING.findall(text)) != len(names):
        raise ValueError("a place of a table is not closed: end each with a line '<!-- /table -->'.")
    return PLACE.sub(lambda place: f"<!-- table: {place['name']} -->\n{tables[place['name']]()}\n<!-- /table -->", text)


def short(value: float, digits: int, sign: bool = False) -> str:
    """A number without the zero before its point: .417, -.034, 1.331."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{'+' if sign else ''}.{digits}f}")


def percent(value: float, digits: int = 1) -> str:
    """A share as 85.3%."""
    return f"{value:.{digits}%}"


def seconds(value: float) -> str:
    """Whole seconds, of long times the first three digits: 17 s, 1,490 s."""
    return f"{float(f'{value:.3g}') if value >= 1000 else value:,.0f} s"
