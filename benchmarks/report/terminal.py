"""What a benchmark says on the terminal: tables, and what has just been done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Advance = Callable[[str], None]  # says what has just been done


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print one table; its first column is aligned to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    # Not cut to 80 columns where the output goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)


@contextmanager
def progress() -> Iterator[Advance]:
    """A function that says what has just been done: on one line of a terminal, or line by line in a file."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda said: print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr, flush=True)


def relative(path: Path) -> Path:
    """A path as the reader would type it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
