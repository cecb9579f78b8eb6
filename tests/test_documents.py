"""What the README and the manual say runs, stands in step with its sources, and leads somewhere.

The python blocks of a page run as they stand, in their order and in one namespace, as a reader pastes them.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "docs").rglob("*.md"))
REPOSITORY = "https://github.com/vlearn/vlearn"
RAW = "https://raw.githubusercontent.com/vlearn/vlearn"
BLOCK = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
SLOW: set[str] = set()  # pages that take more than a few seconds
EXTRAS = {"frameworks.md": ("lightning", "transformers"), "lora.md": ("peft",), "from-laplace.md": ("laplace",)}


class Block(NamedTuple):
    line: int
    code: str


def blocks_of(text: str) -> list[Block]:
    """The python blocks of a page."""
    return [
        Block(text.count("\n", 0, block.start("code")), block["code"])
        for block in BLOCK.finditer(text)
        if block["language"] == "python"
    ]


def run(blocks: list[Block], page: Path = README) -> dict:
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        # The blank lines make a traceback name the page's own line.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
    return namespace


PAGES = {path: blocks for path in (README, *MANUAL) if (blocks := blocks_of(path.read_text(encoding="utf-8")))}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in SLOW else [])
        for path in PAGES
        if path != README
    ],
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS.get(page.name, ()):
        pytest.importorskip(package)
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(PAGES[page], page)


def test_the_script_of_the_readme_prints_what_its_last_comment_says(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = PAGES[README]
    assert script.code.count("\n") <= 30
    run([script])
    printed, said = capsys.readouterr().out.splitlines()[-1], script.code.splitlines()[-1].removeprefix("# ")
    number = re.compile(r"\d+\.\d+")
    assert number.sub("", printed) == number.sub("", said)
    # One of the last digit is rounding, which torch's versions do in their own ways.
    numbers = zip(number.findall(printed), number.findall(said), strict=True)
    assert all(float(one) == pytest.approx(float(other), abs=0.011) for one, other in numbers)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_links_of_the_readme_lead_from_anywhere_and_to_a_file() -> None:
    for target in LINK.findall(README.read_text(encoding="utf-8")):
        assert target.startswith("https://")
        if target.startswith((REPOSITORY, RAW)):
            path = re.sub(rf"^({REPOSITORY}/(blob|tree)|{RAW})/main/", "", target.partition("#")[0])
            assert (ROOT / path).exists(), target


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_of_other_pages_lead_to_a_file(name: str) -> None:
    page = ROOT / name
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target.partition("#")[0]).exists(), target


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    for module in ("", ".audit", ".capture", ".conjugate", ".optim", ".plot", ".posterior", ".record", ".sensitivity"):
        found = importlib.import_module(f"vlearn{module}")
        assert {name for name in found.__all__ if not isinstance(getattr(found, name), ModuleType)} <= shown


def test_the_functions_that_the_mathematics_names_are_where_it_says() -> None:
    text = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    named = re.findall(r"((?:`\w+`(?: and )?)+)\s\(`(vlearn/[\w/]+\.py)`\)", text)
    assert len(named) > 25
    for names, path in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names.replace(" and ", " ")):
            assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{name} is not in {path}"


def test_the_notebooks_are_in_step_with_their_pages() -> None:
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    assert notebooks.REPOSITORY == REPOSITORY
    for name in notebooks.PAGES:
        written = (ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert written == notebooks.notebook(name), f"{name}.ipynb is old: python docs/notebooks.py"


EXAMPLE = """# name

```python
# not a heading
y = 2
```
## other
```bash
exit 1
```
```python
z = y + 1
raise KeyError
```
"""


def test_blocks_of_a_page_share_a_namespace() -> None:
    blocks = blocks_of(EXAMPLE.replace("raise KeyError\n", ""))
    assert len(blocks) == 2
    assert run(blocks)["z"] == 3


def test_an_error_names_the_line_of_the_page() -> None:
    with pytest.raises(KeyError) as error:
        run(blocks_of(EXAMPLE))
    assert error.traceback[-1].lineno + 1 == 13
