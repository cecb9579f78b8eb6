"""Benchmarks lie in rooms: what is shared is imported downwards alone, and nothing imports a script."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.relative_to(ROOT) for path in sorted((ROOT / "benchmarks").rglob("*.py"))]

BELOW: dict[str, set[str]] = {
    "problems": set(),
    "report": {"problems"},
    "cost": set(),
    "reference": {"problems", "cost"},
    "training": {"problems", "report", "reference"},
}


def imported(source: str, path: Path) -> Iterator[tuple[str, ...]]:
    """The parts of every module below ``benchmarks`` that a file imports; of ``from a import b``, a and b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *parts = name.split(".")
            if root == "benchmarks" and parts:
                yield tuple(parts)


def violations(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of a file at ``path``, relative to the repository."""
    here = path.with_suffix("").parts[1]
    allowed = {here} | BELOW[here] if here in BELOW else set(BELOW)
    if here not in BELOW and len(path.parts) > 2:
        allowed.add(here)  # a script that is a package has files of its own
    return [f"{path} imports benchmarks.{'.'.join(to)}" for to in imported(source, path) if to[0] not in allowed]


def edges() -> dict[str, set[str]]:
    """The files that each file imports, by their dotted names."""
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for parts in imported((ROOT / path).read_text(), path):
            whole = ".".join(["benchmarks", *parts])
            graph[name].add(whole if whole in modules else whole.rpartition(".")[0])
    return graph


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_scripts_are_not_imported_and_rooms_import_those_below(path: Path) -> None:
    assert violations((ROOT / path).read_text(), path) == []


def test_no_file_comes_back_to_itself() -> None:
    graph, done = edges(), set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_file_outside_the_rooms_is_a_script_that_can_be_run() -> None:
    for path in SOURCES:
        if path.parts[1] not in BELOW and path.name != "__init__.py" and len(path.parts) == 2:
            assert '__name__ == "__main__"' in (ROOT / path).read_text(), path
    packages = {path.parts[1] for path in SOURCES if len(path.parts) > 2} - set(BELOW)
    assert all((ROOT / "benchmarks" / package / "__main__.py").exists() for package in packages)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("benchmarks/fidelity.py", "from benchmarks.digits import change"),
        ("benchmarks/fidelity.py", "from benchmarks import digits"),
        ("benchmarks/fidelity.py", "from benchmarks.family.scores import scores"),
        ("benchmarks/fidelity.py", "from . import digits"),
        ("benchmarks/reference/newton_step.py", "from benchmarks import fidelity"),
        ("benchmarks/reference/newton_step.py", "from benchmarks.training import digits"),
        ("benchmarks/reference/newton_step.py", "from ..training import digits"),
        ("benchmarks/report/pictures.py", "def late():\n    import benchmarks.reference.laplace"),
        ("benchmarks/family/cost.py", "from benchmarks.step_cost import peak"),
    ],
)
def test_an_import_of_a_script_or_upwards_is_seen(path: str, source: str) -> None:
    assert violations(source, Path(path)) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("benchmarks/fidelity.py", "from benchmarks.training.digits import sweep"),
        ("benchmarks/family/__main__.py", "from benchmarks.family import cost"),
        (
            "benchmarks/training/digits.py",
            "from benchmarks.reference import laplace\nfrom .evaluation import STRUCTURES",
        ),
        ("benchmarks/cost/timing.py", "import torch"),
    ],
)
def test_an_import_downwards_or_within_the_room_is_allowed(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []
