"""Shows docstrings in the manual as they are meant: their tables, which are reStructuredText, and their sections."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

RULE = re.compile(r"^(?P<indent> *)(?P<columns>=+(?: +=+)+)$")
SECTION = re.compile(r"(?<=\S)\n(?P<heading> *(?:Args|Attributes|Returns|Yields|Raises|Examples):)$", re.MULTILINE)
NAMES = re.compile(r"^ +\w+(?:, \w+)+(?=: )", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called of every module, class, function and attribute."""
        if obj.docstring is not None:
            text = with_markdown_tables(obj.docstring.value).replace("Example::", "For example:")
            text = SECTION.sub(r"\n\n\g<heading>", text)  # a section begins after an empty line
            # "lr, betas: as in AdamW" is one entry, not a name and a type.
            obj.docstring.value = NAMES.sub(lambda names: names[0].replace(", ", ",\u00a0"), text)


def with_markdown_tables(text: str) -> str:
    """The text with its simple tables, which have no header row, as Markdown tables."""
    lines, done = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        rule = RULE.match(line)
        if rule is None or line not in lines:
            done.append(line)
            continue
        body, lines = lines[: lines.index(line)], lines[lines.index(line) + 1 :]
        starts = [rule.start("columns") + column.start() for column in re.finditer("=+", rule["columns"])]
        rows: list[list[str]] = []
        for row in body:
            cells = [row[i:j].strip() for i, j in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0] or not rows:
                rows.append(cells)
            else:  # goes on with the row above
                rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        bars = [[cell.replace("``", "`").replace("|", "&#124;") for cell in row] for row in rows]
        header = "| " * len(starts) + "|\n" + rule["indent"] + "|---" * len(starts) + "|"
        done += [rule["indent"] + header, *(f"{rule['indent']}| {' | '.join(row)} |" for row in bars)]
    return "\n".join(done)
