"""Writes the notebooks of docs/notebooks/ from their pages: `python docs/notebooks.py`.

A notebook is its page with the blocks as cells, a cell that installs vlearn, and links that lead from anywhere.
"""

from __future__ import annotations

import re
from pathlib import Path

import jupytext
import nbformat

DOCS = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/vlearn/vlearn"
PAGES = {"train": "", "wrong-labels": "[plot]"}  # in tutorials/, with the extras that they need
LINK = re.compile(r"\]\((?P<path>(?!https?:|#)[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
COLAB = re.compile(r"^\[Open in Colab\]\(.*\)\n\n", re.MULTILINE)
INSTALL = '%pip install -q "vlearn{extras} @ git+{repository}" scikit-learn'


def notebook(name: str) -> str:
    """The notebook of a tutorial as JSON, the same for the same page."""
    page = DOCS / "tutorials" / f"{name}.md"

    def absolute(link: re.Match[str]) -> str:
        at = (page.parent / link["path"]).resolve().relative_to(DOCS.parent)
        return f"]({REPOSITORY}/blob/main/{at.as_posix()}{link['anchor'] or ''})"

    text = LINK.sub(absolute, COLAB.sub("", page.read_text(encoding="utf-8")))
    made = jupytext.reads(text, fmt="md")
    made.cells.insert(1, nbformat.v4.new_code_cell(INSTALL.format(extras=PAGES[name], repository=REPOSITORY)))
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    made.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return nbformat.writes(made) + "\n"


def main() -> None:
    """Write every notebook."""
    for name in PAGES:
        (DOCS / "notebooks" / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")


if __name__ == "__main__":
    main()
