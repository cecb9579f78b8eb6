"""The house keeps its order: imports point down, no files import one another in a circle, and privates stay private."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vlearn._torch_internals import CONVENTIONS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "vlearn").rglob("*.py"))
ORACLES = sorted((ROOT / "tests" / "oracles").rglob("*.py"))

# Each room, with the rooms right below it; what is below those is below it too. `optim` is itself built of rooms.
RIGHT_BELOW = {
    "_torch_internals": (),
    "_extras": (),
    "_short_repr": (),
    "_warnings": (),
    "_wide": (),
    "collectives": (),
    "layers": (),
    "losses": ("_wide",),
    "capture": ("layers", "_torch_internals", "_wide"),
    "sharded": ("_torch_internals",),
    "per_example": ("capture", "sharded", "_warnings"),
    "gaussians": ("per_example",),
    "linearized": ("gaussians", "losses", "collectives", "_extras", "_short_repr"),
    "posterior": ("linearized",),
    "sensitivity": ("linearized", "record"),
    "optim.kernels": ("sharded",),
    "optim.parameters": ("optim.kernels", "capture"),
    "optim.distributed": ("optim.parameters", "per_example", "collectives"),
    "optim.sampling": ("optim.distributed", "gaussians"),
    "optim.structures": ("optim.sampling",),
    "optim.watch": ("optim.sampling", "per_example", "losses"),
    "optim.updates": ("optim.structures", "losses"),
    "optim.diagnostics": ("optim.structures", "linearized"),
    "optim": ("optim.updates", "optim.watch", "optim.diagnostics", "sensitivity"),
    "conjugate": (),
    "record": ("collectives", "_extras"),
    "plot": ("record", "_extras"),
    "audit": ("sensitivity", "posterior", "record"),
    "report_page": ("audit", "plot"),
    "integrations": ("optim", "plot", "conjugate", "audit"),
    "__init__": ("integrations", "report_page"),
    "__main__": ("report_page",),
}


def below(room: str) -> set[str]:
    """Every room that a room may import from, itself among them."""
    return {room}.union(*map(below, RIGHT_BELOW[room]))


# Packages that a room may name in any import statement; optional ones come through vlearn._extras.require.
PACKAGES = {"record": {"numpy"}, "plot": {"numpy"}, "conjugate": {"torch"}}
LARGEST_ROOM = 12  # files, beside __init__


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


def room_of(module: str) -> str:
    """The room of a module of vlearn, as `vlearn.optim.sampling.draw` or `vlearn.optim.sampling.draw.Draw`."""
    _, *parts = module.split(".")
    names = [".".join(parts[:depth]) for depth in (2, 1)]
    return next((name for name in names if name in RIGHT_BELOW), parts[0] if parts else "__init__")


def violations(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of ``source``, a file at ``path`` relative to the repository."""
    parts = path.with_suffix("").parts
    room = room_of(".".join(parts))
    if room not in RIGHT_BELOW:
        return [f"{path}: room {room!r} is unknown; add it to RIGHT_BELOW in tests/test_architecture.py"]
    wrong = []
    for item in imports(ast.parse(source), ".".join(parts[:-1])):
        root = item.module.partition(".")[0]
        where = f"{path}:{item.line}"
        if root == "ivon":
            wrong.append(f"{where}: ivon is a peer for tests and benchmarks, never imported by vlearn")
        elif root == "vlearn":
            if room_of(item.module) not in below(room):
                wrong.append(f"{where}: {room} imports {item.module}, which is not below it")
        elif root not in sys.stdlib_module_names | PACKAGES.get(room, {"torch", "numpy"}):
            never = room == "record" or root == "torch"
            if never or (item.at_run_time and item.at_module_level):
                wrong.append(f"{where}: {room} imports {item.module}; use vlearn._extras.require in the function")
    return wrong


def circles(sources: dict[str, str]) -> list[str]:
    """Files that import one another, directly or by way of others, also for their types alone.

    Args:
        sources: text of each module, by its name.
    """
    packages = {name.removesuffix(".__init__"): name for name in sources}

    def imported(name: str) -> set[str]:
        modules = {item.module for item in imports(ast.parse(sources[name]), name.rpartition(".")[0])}
        candidates = modules | {module.rpartition(".")[0] for module in modules}
        return {packages[module] for module in candidates if module in packages} - {name}

    arrows = {name: imported(name) for name in sources if not name.endswith("__init__")}
    ordered: set[str] = set()
    while ready := {name for name in arrows if name not in ordered and not arrows[name] & arrows.keys() - ordered}:
        ordered |= ready
    return sorted(arrows.keys() - ordered)


# Names with an underscore that are not vlearn's own: of torch's, see vlearn/_torch_internals.py.
OTHERS_PRIVATES = {name for names in CONVENTIONS.values() for name in names} | {
    "_replace",  # of named tuples
    "_H_factor",  # of laplace-torch, which has no public name for the noise in its precision
}


def private_reaches(source: str, path: Path) -> list[str]:
    """Where a file reads or writes private attributes of another file's objects, or imports private names of torch."""
    if path.name == "_torch_internals.py":
        return []
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = [
        f"{path}:{item.line}: {item.module}"
        for item in imports(tree, "")
        if item.module.startswith("torch.")
        and any(part.startswith("_") and part not in OTHERS_PRIVATES for part in item.module.split("."))
    ]
    return imported + [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not is_self(node.value)
        and node.attr not in own | OTHERS_PRIVATES
    ]


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


@each_source
def test_imports_point_down(path):
    assert violations(path.read_text(), path.relative_to(ROOT)) == []


@each_source
def test_no_file_reaches_into_the_privates_of_another(path):
    reaches = private_reaches(path.read_text(), path.relative_to(ROOT))
    assert reaches == [], "names of torch's go through vlearn/_torch_internals.py, or into its CONVENTIONS"


def test_no_files_import_one_another_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in SOURCES}
    assert circles(names) == []


def test_the_page_on_the_architecture_lists_every_room():
    page = ROOT / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("docs/ is not part of this distribution")
    listed = {line.split("`")[1] for line in page.read_text().splitlines() if line.startswith("| `")}
    assert RIGHT_BELOW.keys() - {"__init__", "__main__"} <= listed


def test_rooms_are_small():
    rooms = {path.parent for path in SOURCES}
    sizes = {room: len([path for path in room.glob("*.py") if path.name != "__init__.py"]) for room in rooms}
    assert {str(room.relative_to(ROOT)): size for room, size in sizes.items() if size > LARGEST_ROOM} == {}


def test_no_class_has_more_than_three_classes_of_vlearn_in_its_order_of_resolution():
    import vlearn

    optimizers = [getattr(vlearn.optim, name) for name in vlearn.optim.__all__]
    posteriors = [getattr(vlearn.posterior, name) for name in vlearn.posterior.__all__]
    for each in (*optimizers, *posteriors):
        if isinstance(each, type):
            assert len([base for base in each.__mro__ if base.__module__.startswith("vlearn")]) <= 3


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.name)
def test_oracles_import_nothing_from_vlearn(path):
    modules = [item.module for item in imports(ast.parse(path.read_text()), "tests.oracles")]
    assert not [module for module in modules if module.partition(".")[0] == "vlearn"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlearn/capture/hooks.py", "from vlearn.optim.ivon import IVON"),
        ("vlearn/capture/hooks.py", "from ..gaussians import diagonal"),
        ("vlearn/capture/hooks.py", "from .. import optim"),
        ("vlearn/capture/hooks.py", "def late():\n    from vlearn import sensitivity"),
        ("vlearn/capture/hooks.py", "if TYPE_CHECKING:\n    from vlearn.optim.ivon import IVON"),
        ("vlearn/optim/sampling/draw.py", "from vlearn.optim.watch.watch import Watch"),
        ("vlearn/optim/sampling/draw.py", "from vlearn.optim.optimizer import VariationalOptimizer"),
        ("vlearn/optim/watch/watch.py", "from vlearn.optim.structures.diagonal import DiagonalStructure"),
        ("vlearn/gaussians/diagonal.py", "import vlearn"),
        ("vlearn/gaussians/diagonal.py", "from vlearn import IVON"),
        ("vlearn/posterior/from_laplace.py", "import laplace"),
        (
            "vlearn/posterior/from_laplace.py",
            "try:\n    import laplace\nexcept ImportError:\n    laplace = None",
        ),
        ("vlearn/optim/ivon.py", "def parity():\n    import ivon"),
        ("vlearn/record/memory_map.py", "def late():\n    import torch"),
        ("vlearn/plot/memory_map.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("vlearn/plot/memory_map.py", "import matplotlib.pyplot as plt"),
        ("vlearn/optim/optimizer.py", "import vlearn.integrations.wandb"),
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
            "from vlearn.layers import gradient_forms\nfrom .optimizer import VariationalOptimizer\nimport torch, math",
        ),
        ("vlearn/optim/watch/watch.py", "from vlearn.optim.sampling.sampler import Sampler"),
        ("vlearn/plot/memory_map.py", "from vlearn.record import MemoryMap\nfrom .._extras import require"),
        ("vlearn/plot/memory_map.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
        ("vlearn/sensitivity/sweep.py", "def progress():\n    from tqdm import tqdm"),
        ("vlearn/integrations/wandb.py", "from vlearn.sensitivity import sweep\nfrom vlearn import optim"),
        ("vlearn/__init__.py", "from vlearn.optim import IVON\nfrom vlearn import plot"),
    ],
)
def test_a_downward_import_is_allowed(path, source):
    assert violations(source, Path(path)) == []


def test_a_circle_of_files_is_found_also_one_for_types_alone():
    typed = "if TYPE_CHECKING:\n    from vlearn.optim.b import B"
    files = {
        "vlearn.optim.a": typed,
        "vlearn.optim.b": "from .c import C",
        "vlearn.optim.c": "from vlearn.optim import a",
    }
    assert circles(files) == sorted(files)
    assert circles(files | {"vlearn.optim.c": "import torch"}) == []


def test_a_reach_into_the_privates_of_another_file_is_found():
    path = Path("vlearn/optim/ivon.py")
    assert private_reaches("optimizer._draw = None", path) and private_reaches("f(x._y._z())", path)
    assert private_reaches("from torch._dynamo.utils import counters", path)
    assert private_reaches("from torch.utils._pytree import tree_map", path) == []
    own = "class A:\n    def __init__(self, other):\n        self._x = other._x\n"
    assert private_reaches(own, path) == []
