"""The tests on a pretend accelerator, `tests/accelerator`, in processes that have had no other device.

By hand: VLEARN_PRETEND=1 python -m pytest tests/accelerator
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "accelerator").glob("test_*.py"))
QUICK = ("test_capturable.py", "test_multi_tensor.py", "test_pretend.py")


@pytest.mark.parametrize(
    "paths",
    [
        *(pytest.param([path], marks=pytest.mark.slow, id=path.stem) for path in FILES if path.name not in QUICK),
        pytest.param([path for path in FILES if path.name in QUICK], id="the quick ones"),
    ],
)
def test_on_a_pretend_accelerator(paths: list[Path]) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} has no devices that are written in Python")
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *map(str, paths)],
        cwd=ROOT,
        env={**own, "VLEARN_PRETEND": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-10_000:] + ran.stderr[-2_000:]


def test_elsewhere_the_room_is_left_out() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VLEARN_PRETEND"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/accelerator", "--collect-only"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 5, ran.stdout  # no tests were collected
