"""The README's python blocks run as they stand, each section in order in one namespace.

A comment right before a block is not shown by the README but read here: ``<!-- setup: CODE -->`` runs CODE
first, ``<!-- skip-test: REASON -->`` leaves the block out.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
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
    found: dict[str, list[Block]] = {}
    heading = "start"
    for piece in PIECE.finditer(text):
        if piece["heading"]:
            heading = piece["heading"].strip()
        elif piece["language"] == "python" and piece["kind"] != "skip-test":
            line = text.count("\n", 0, piece.start("code"))
            found.setdefault(heading, []).append(Block(line, (piece["comment"] or "").strip(), piece["code"]))
    return found


def run(blocks: list[Block]) -> dict:
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block.setup, "README.md (setup)", "exec"), namespace)
        # The blank lines make a traceback name the README's own line.
        exec(compile("\n" * block.line + block.code, str(README), "exec"), namespace)
    return namespace


SECTIONS = sections(README.read_text()) if README.exists() else {}


@pytest.mark.skipif(not README.exists(), reason="README.md does not exist")
def test_the_readme_has_python_blocks():
    assert SECTIONS


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_blocks_of_a_section_run(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(SECTIONS[heading])


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
    found = sections(EXAMPLE)
    assert list(found) == ["name", "other"]
    assert [block.code for block in found["other"]] == ["w = 4\n"]


def test_an_error_names_the_line_of_the_readme():
    text = "# name\n\n```python\nfine = 1\nraise KeyError\n```\n"
    with pytest.raises(KeyError) as error:
        run(sections(text)["name"])
    assert error.traceback[-1].lineno + 1 == 5
