"""What is uploaded: the source archive has all that the tests need, and the wheel of it runs the README's script."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import vlearn
from tests.test_documents import PAGES, README

pytest.importorskip("build")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vlearn", "tests", "benchmarks", "docs", "examples")
WRITTEN_BY_RUNS = {".pyc", ".png"}  # and the figures of benchmarks, which no test reads


def run(*command: str | Path, folder: Path) -> str:
    ran = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the archive, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    return folder


def test_the_source_archive_has_what_the_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    here = {path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {str(path) for path in here if path.suffix not in WRITTEN_BY_RUNS} <= names
    assert {"LICENSE", "CHANGELOG.md", "README.md", "pyproject.toml", "constraints.txt", "Makefile"} <= names


def test_the_wheel_runs_the_script_of_the_readme_in_a_bare_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    # torch and what it needs, by their folder: a path in a .pth file brings packages, not what they are editable by.
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path)
    (Path(packages) / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))

    script = tmp_path / "script.py"
    script.write_text(PAGES[README][0].code)
    run(python, "-I", script, folder=tmp_path)
    facts = "import vlearn, importlib.metadata as m; print(vlearn.__file__, vlearn.__version__, m.version('vlearn'))"
    where, version, recorded = run(python, "-I", "-c", facts, folder=tmp_path).split()
    assert where.startswith(packages) and version == recorded == vlearn.__version__
    assert (Path(packages) / "vlearn" / "py.typed").exists()
