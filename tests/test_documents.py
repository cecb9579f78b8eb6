"""The python blocks of the README and of docs/ run as they stand, each section in order in one namespace.

A comment right before a block is not shown by the README but read here: ``<!-- setup: CODE -->`` runs CODE
first, ``<!-- skip-test: REASON -->`` leaves the block out.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
PIECE = re.compile(
    r"^##? (?P<heading>[^\n]+)$"
    r"|(?:^<!--\s*(?P<kind>setup|skip-test)\s*:?(?P<comment>.*?)-->\s*)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    line: int
    setup: str
    code: str


def sections(text: str) -> dict[str, list[Block]]:
    """The python blocks to run by heading; a section without one is left out."""
    blocks: dict[str, list[Block]] = {}
    heading = "start"
    for piece in PIECE.finditer(text):
        if piece["heading"]:
            heading = piece["heading"].strip()
        elif piece["language"] == "python" and piece["kind"] != "skip-test":
            line = text.count("\n", 0, piece.start("code"))
            blocks.setdefault(heading, []).append(Block(line, (piece["comment"] or "").strip(), piece["code"]))
    return blocks


def run(blocks: list[Block], document: Path = DOCUMENTS[0]) -> dict:
    namespace: dict = {"__name__": "document"}
    for block in blocks:
        exec(compile(block.setup, f"{document.name} (setup)", "exec"), namespace)
        # The blank lines make a traceback name the document's own line.
        exec(compile("\n" * block.line + block.code, str(document), "exec"), namespace)
    return namespace


SECTIONS = [(path, heading, blocks) for path in DOCUMENTS for heading, blocks in sections(path.read_text()).items()]


def test_each_document_has_python_blocks():
    assert {path for path, _, _ in SECTIONS} == set(DOCUMENTS)


@pytest.mark.parametrize(
    ("path", "blocks"),
    [(path, blocks) for path, _, blocks in SECTIONS],
    ids=[f"{path.name}-{heading}" for path, heading, _ in SECTIONS],
)
def test_the_blocks_of_a_section_run(path, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(blocks, path)


EXAMPLE = """# name
<!-- setup:
x = 1
-->
```python
# not a heading
y = x + 1
```
```python
z = y + 1
```
## other
```bash
exit 1
```
<!-- skip-test: needs a GPU -->
```python
raise SystemExit
```
<!-- an ordinary comment -->
```python
w = 4
```
"""


def test_blocks_of_one_section_share_a_namespace_and_its_setup():
    namespace = run(sections(EXAMPLE)["name"])
    assert (namespace["y"], namespace["z"]) == (2, 3)


def test_only_python_blocks_without_skip_are_run():
    by_heading = sections(EXAMPLE)
    assert list(by_heading) == ["name", "other"]
    assert [block.code for block in by_heading["other"]] == ["w = 4\n"]


def test_an_error_names_the_line_of_the_document():
    text = "# name\n\n```python\nfine = 1\nraise KeyError\n```\n"
    with pytest.raises(KeyError) as error:
        run(sections(text)["name"])
    assert error.traceback[-1].lineno + 1 == 5
