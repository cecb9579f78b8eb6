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
import torch.nn.functional as F
from torch.utils.data import DataLoader

import vlearn
from tests.distributed.ranks import skip_what_torch_cannot
from tests.distributed.shares import dataset, network, posterior_of
from tests.distributed.sweep import COUNT
from vlearn.record.row_record import RowRecord

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A script that the launcher has run."""
    path = Path(__file__).with_name(script)
    root = path.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(path), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )


def launch(script: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two ranks have found."""
    ran = run(script, folder)
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


@pytest.fixture(scope="module")
def sharded_by_frameworks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return launch("sharded_frameworks.py", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("how", ["lightning", "accelerate", "trainer"])
def test_frameworks_shard_the_model(sharded_by_frameworks: tuple[dict[str, Any], dict[str, Any]], how: str) -> None:
    """Two of them after the optimizer was made, and all as one process would train with all examples."""
    from tests.distributed.sharded_frameworks import alone

    first, second = (found[how] for found in sharded_by_frameworks)
    skip_what_torch_cannot(str(first))
    assert isinstance(first, dict) and first, first
    assert isinstance(second, dict), second
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and bool(tensor.isfinite().all()), name
    if how != "trainer":
        torch.testing.assert_close(first, alone(), rtol=1e-4, atol=1e-6)


def test_a_sweep_goes_on_after_a_process_was_killed(tmp_path: Path) -> None:
    assert run("sweep.py", tmp_path).returncode != 0
    record = RowRecord(tmp_path / "sweep")
    assert not record.is_complete
    before = set(record.rows()["index"].tolist())
    of_killed = {number for number in before if number % 2}
    assert of_killed == {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23}, "all but the batch that it was at"
    ran = run("sweep.py", tmp_path, processes=3)  # the same command, also with more processes
    assert ran.returncode == 0, ran.stderr
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(3)]
    data = dataset(COUNT)
    alone = vlearn.sweep(
        network(), posterior_of(network()), DataLoader(data), F.cross_entropy, leverage=None, progress=False
    )
    for each in found:
        assert each["index"].tolist() == list(range(COUNT))
        torch.testing.assert_close(each["loo_loss"], alone.loo_loss, rtol=1e-12, atol=1e-12)
