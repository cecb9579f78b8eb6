"""The launcher that users have, and a script as they write it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_a_script_trains_under_torchrun_with_its_own_draw_in_each_process(tmp_path: Path) -> None:
    script = Path(__file__).with_name("train.py")
    root = script.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, cwd=root, capture_output=True, text=True, timeout=180
    )
    assert ran.returncode == 0, ran.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["loss"] == second["loss"] < 0.5 * math.log(3)
    assert not any(torch.equal(a, b) for a, b in zip(first["draws"], second["draws"], strict=True))
    for name, mean in first["model"].items():
        assert torch.equal(mean, second["model"][name])
    for number, state in first["state"].items():
        assert all(torch.equal(value, second["state"][number][key]) for key, value in state.items())
    assert not torch.equal(first["influence"], second["influence"])  # of each process's own minibatch
