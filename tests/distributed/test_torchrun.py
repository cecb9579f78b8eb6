"""The launcher that users have, and scripts as they write them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def launch(script: str, folder: Path, *arguments: str, **settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two ranks have found."""
    path = Path(__file__).with_name(script)
    root = path.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **settings}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, str(path), str(folder), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def test_a_script_trains_with_its_own_draw_in_each_process(tmp_path: Path) -> None:
    first, second = launch("train.py", tmp_path)
    assert first["loss"] == second["loss"] < 0.5 * math.log(3)
    assert not any(torch.equal(a, b) for a, b in zip(first["draws"], second["draws"], strict=True))
    for name, mean in first["model"].items():
        assert torch.equal(mean, second["model"][name])
    for number, state in first["state"].items():
        assert all(torch.equal(value, second["state"][number][key]) for key, value in state.items())
    assert not torch.equal(first["influence"], second["influence"])  # of each process's own minibatch


def test_lightning_and_accelerate_train_with_several_processes(tmp_path: Path) -> None:
    """They wrap the model themselves: nothing tells the optimizer."""
    first, second = launch("frameworks.py", tmp_path)
    assert len(first) == 6
    for how, state in first.items():
        if how.endswith("shared=False, clip=True"):
            assert "pass shared_noise=True" in state and "pass shared_noise=True" in second[how], how
        else:
            assert torch.equal(state, second[how]) and bool(state.isfinite().all()), how


@pytest.mark.parametrize("how", ["lightning", "accelerate", "trainer"])
def test_frameworks_shard_the_model(tmp_path: Path, how: str) -> None:
    """Two of them after the optimizer was made, and all as one process would train with all examples."""
    from tests.distributed.sharded_frameworks import alone

    settings = {} if how == "lightning" else {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    first, second = launch("sharded_frameworks.py", tmp_path, how, **settings)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and bool(tensor.isfinite().all()), name
    if how != "trainer":
        torch.testing.assert_close(first, alone(), rtol=1e-4, atol=1e-6)
