"""Imports point down only: each room of vlearn sees the rooms below it and no others."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "vlearn").rglob("*.py"))
ORACLES = sorted((ROOT / "tests" / "oracles").rglob("*.py"))

BELOW = {
    "capture": set(),
    "posterior": {"capture"},
    "sensitivity": {"capture", "posterior"},
    "optim": {"capture", "posterior", "sensitivity"},
    "conjugate": set(),
    "record": set(),
    "plot": {"record"},
}
BELOW["integrations"] = set(BELOW)
BELOW["__init__"] = set(BELOW)
EVERYWHERE = {"_extras"}
BELOW["_extras"] = set()

# Packages that a room may name in any import statement; optional ones come through vlearn._extras.require.
PACKAGES = {room: {"torch", "numpy"} for room in BELOW} | {
    "conjugate": {"torch"},
    "record": {"numpy"},
    "plot": {"numpy"},
}


class Import(NamedTuple):
    module: str
    line: int
    at_run_time: bool
    at_module_level: bool


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every module that a file imports, in absolute form; ``from a import b`` gives ``a.b``."""

    def walk(node: ast.AST, at_run_time: bool, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, False, at_module_level)
            for child in node.orelse:
                yield from walk(child, at_run_time, at_module_level)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_run_time, at_module_level)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_run_time, at_module_level)
        inside = at_module_level and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_run_time, inside)

    yield from walk(tree, True, True)


def violations(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of ``source``, a file at ``path`` relative to the repository."""
    parts = path.with_suffix("").parts
    room = parts[1]
    if room not in BELOW:
        return [f"{path}: room {room!r} is unknown; add it to BELOW in tests/test_architecture.py"]
    found = []
    for item in imports(ast.parse(source), ".".join(parts[:-1])):
        root, _, rest = item.module.partition(".")
        target = rest.partition(".")[0]
        where = f"{path}:{item.line}"
        if root == "ivon":
            found.append(f"{where}: ivon is a peer for tests and benchmarks, never imported by vlearn")
        elif root == "vlearn":
            if target != room and target not in BELOW[room] | EVERYWHERE:
                found.append(f"{where}: {room} imports {item.module}, which is not below it")
        elif root not in sys.stdlib_module_names | PACKAGES[room]:
            never = room == "record" or root == "torch"
            if never or (item.at_run_time and item.at_module_level):
                found.append(f"{where}: {room} imports {item.module}; use vlearn._extras.require in the function")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert violations(path.read_text(), path.relative_to(ROOT)) == []


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.name)
def test_oracles_import_nothing_from_vlearn(path):
    modules = [item.module for item in imports(ast.parse(path.read_text()), "tests.oracles")]
    assert not [module for module in modules if module.partition(".")[0] == "vlearn"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlearn/capture/hooks.py", "from vlearn.optim.ivon import IVON"),
        ("vlearn/capture/hooks.py", "from ..posterior import diagonal"),
        ("vlearn/capture/hooks.py", "from .. import optim"),
        ("vlearn/capture/hooks.py", "def late():\n    from vlearn import sensitivity"),
        ("vlearn/posterior/diagonal.py", "import vlearn"),
        ("vlearn/posterior/diagonal.py", "from vlearn import IVON"),
        ("vlearn/posterior/from_laplace.py", "import laplace"),
        (
            "vlearn/posterior/from_laplace.py",
            "try:\n    import laplace\nexcept ImportError:\n    laplace = None",
        ),
        ("vlearn/optim/ivon.py", "def parity():\n    import ivon"),
        ("vlearn/record/memory_map.py", "def late():\n    import torch"),
        ("vlearn/plot/memory_map.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("vlearn/plot/memory_map.py", "import matplotlib.pyplot as plt"),
        ("vlearn/optim/base.py", "import vlearn.integrations.wandb"),
        ("vlearn/integrations/wandb.py", "import wandb"),
        ("vlearn/utils.py", ""),
    ],
)
def test_an_upward_or_foreign_import_is_found(path, source):
    assert violations(source, Path(path)) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "vlearn/optim/ivon.py",
            "from vlearn.capture import forms\nfrom .base import Base\nimport torch, math",
        ),
        ("vlearn/plot/memory_map.py", "from vlearn.record import MemoryMap\nfrom .._extras import require"),
        ("vlearn/plot/memory_map.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
        ("vlearn/sensitivity/sweep.py", "def progress():\n    from tqdm import tqdm"),
        ("vlearn/integrations/wandb.py", "from vlearn.sensitivity import sweep\nfrom vlearn import optim"),
        ("vlearn/__init__.py", "from vlearn.optim import IVON\nfrom vlearn import plot"),
    ],
)
def test_a_downward_import_is_allowed(path, source):
    assert violations(source, Path(path)) == []
