import json
import sys

import numpy as np
import pytest

pytest.importorskip("laplace")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from benchmarks import digits, digits_settings
from benchmarks.problems.digits import SMOKE, Digits
from benchmarks.report import tracking
from vlearn import MemoryMap

METHODS = ["IVON", "Laplace, diagonal", "Laplace, Kronecker"]
FILES = ["digits.json", "generalization.png", "memory_map.png", "retraining.png"]


@pytest.fixture
def smoke(tmp_path, monkeypatch):
    """Run the benchmark on little data, with W&B offline and all of its folders under the test's own."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder.lower()))
    monkeypatch.delenv("WANDB_DIR", raising=False)

    def run():
        return digits.main(["--smoke", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")])

    return run


def test_the_demo_writes_figures_and_numbers_and_prints_one_table(smoke, tmp_path, capsys):
    assert smoke() == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    numbers = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert list(numbers["table"]) == METHODS
    for row in numbers["table"].values():
        assert all(np.isfinite(value) for value in row.values())
        assert row["train_loss"] < row["loo_loss"]
    assert numbers["retraining"]["unconverged"] == 0
    assert np.isfinite(numbers["remaining_weight_of_hess_init"])
    assert {"command", "seed", "hardware", "versions"} <= set(numbers)

    memory = MemoryMap.open(tmp_path / "runs" / "memory")
    assert memory.kinds.tolist() == ["live", "sweep"] * 3
    assert np.isfinite(memory.column("self_influence")).all()
    assert list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))

    shown = capsys.readouterr().out
    assert all(shown.count(f"  {method}  ") == 1 for method in METHODS)
    assert "wandb sync" in shown


def test_without_wandb_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tracking.tracked("project", tmp_path, {}) as (run, said):
        assert run is None
        assert "not installed" in said


@pytest.mark.parametrize("wandb", [True, False])
def test_an_interrupted_demo_leaves_the_old_results_with_or_without_wandb(smoke, wandb, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "compare_retraining", interrupt)
    if not wandb:
        monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "digits.json").write_text("old")
    assert smoke() == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["digits.json"]
    assert (tmp_path / "out" / "digits.json").read_text() == "old"
    assert "Interrupted" in capsys.readouterr().err


def test_both_optimizers_see_the_same_minibatches_and_start():
    settings = SMOKE
    data = Digits.load(settings)
    first, second = (list(data.minibatches(settings)) for _ in range(2))
    assert all(a.equal(b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True))
    assert sorted(int(i) for index in first[0] for i in index) == list(range(settings.num_data))


def test_a_changed_setting_is_compared_with_the_benchmarked_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits_settings, "VARIATIONS", ({}, {"hess_init": 0.5}))
    digits_settings.vary(SMOKE, tmp_path)
    usual, changed = json.loads((tmp_path / "settings.json").read_text())["variations"]
    assert changed["changed"] == {"hess_init": 0.5}
    # A larger Hessian is a smaller covariance: less is predicted. Nothing changes for SGD.
    gap, smaller = (row["IVON"]["loo_loss"] - row["IVON"]["train_loss"] for row in (usual, changed))
    assert 0 < smaller < gap
    assert "Laplace, diagonal" in usual and "Laplace, diagonal" not in changed
    assert "as benchmarked" in capsys.readouterr().out
