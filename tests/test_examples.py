"""The examples run as they stand, on made-up data of the same format."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vlearn.sensitivity import SensitivityTable

ROOT = Path(__file__).parent.parent / "examples"


def loaded(name: str) -> ModuleType:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.* are not to be believed")  # of a diagonal after two steps, rightly
@pytest.mark.parametrize("structure", ["last-layer-kronecker", "diagonal"])
def test_a_checkpoint_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str], structure: str) -> None:
    pytest.importorskip("torchvision", exc_type=ImportError)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        data = {b"data": torch.randint(0, 256, (150, 3072)).numpy(), b"labels": [n % 10 for n in range(150)]}
        (folder / name).write_bytes(pickle.dumps(data))
    module = loaded("your_checkpoint")
    module.main(["--data-root", str(tmp_path), "--epochs", "1", "--images", "100", "--structure", structure])
    printed = capsys.readouterr().out
    for words in ("trained for 2 steps", "without a test set", "Of the first 2,", "test image"):
        assert words in printed


@pytest.mark.slow
def test_wrong_labels_are_found_and_shown_on_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the tests after this one too
    module = loaded("audit")
    module.main(["--epochs", "5", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^  digit .*given \d, suggested \d", printed, re.MULTILINE)) == 10
    found = re.search(r"162 labels were changed, and (\d+)% of as many", printed)
    assert found is not None and int(found[1]) > 60
    assert (tmp_path / "report.html").as_uri() in printed and (tmp_path / "report.html").stat().st_size > 10**5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, of a view and a checkpoint, as in a script
def test_processes_shard_a_model_and_go_on_in_other_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_two(folder: Path, steps: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = [str(ROOT / "sharded.py"), "--folder", str(folder), "--steps", str(steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
        ran = subprocess.run(
            [*command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def by_one(folder: Path, steps: int) -> str:
        """In this process, as the launcher would start it."""
        with monkeypatch.context() as patch:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                patch.setenv("MASTER_PORT", str(free.getsockname()[1]))
            for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["sharded.py", "--folder", str(folder), "--steps", str(steps)])
            loaded("sharded").main()
        return capsys.readouterr().out

    losses = {}
    for name, parts in {"at once": [by_one], "two, then one": [by_two, by_one]}.items():
        (tmp_path / name).mkdir()
        printed = ""
        for run in parts:
            printed = run(tmp_path / name, 6 // len(parts))
            assert printed.count("passages it remembers") == (2 if run is by_two else 1)
        losses[name] = next(line for line in printed.splitlines() if line.startswith("step 6: loss"))
    assert losses["at once"] == losses["two, then one"]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "many_processes.py"), "--out", str(tmp_path)]
    ran = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "1001 examples by 2 processes" in ran.stdout and "leans on examples [" in ran.stdout
    found = re.search(r"of the 51 most sensitive examples (\d+)% have a wrong label, of all 5%", ran.stdout)
    assert found is not None and int(found[1]) > 40
    assert SensitivityTable.open(tmp_path / "sweep").index.tolist() == list(range(1001))
