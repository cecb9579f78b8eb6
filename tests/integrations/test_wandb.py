import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlearn.integrations.wandb import GeneralizationLogger
from vlearn.optim.diagnostics.diagnostics import Diagnostics
from vlearn.sensitivity import Sensitivities, SensitivityTable

wandb = pytest.importorskip("wandb")

N = 12


@pytest.fixture
def run(tmp_path, monkeypatch):
    for folder in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder.lower()))
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(mode="offline", project="vlearn", dir=tmp_path, settings=settings)
    yield run
    run.finish()


def records(run):
    """The records of a finished offline run, as W&B's own reader shows them."""
    run.finish()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", run.settings.sync_file]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in shown.splitlines()]


def history(run):
    return [record["history"]["item"] for record in records(run) if record["type"] == "history"]


def files(read):
    """Where the files of all artifacts lie, by their path inside the artifact."""
    artifacts = [record["artifact"] for record in read if record["type"] == "artifact"]
    contents = [entry for artifact in artifacts for entry in artifact["manifest"]["contents"]]
    return {entry["path"]: Path(entry["local_path"]) for entry in contents}


def optimizer(step=1000, **s):
    """Stands for an optimizer: what the logger reads of one."""
    health = Diagnostics(step, 0.999**step, 0.5, 0.75, 4.0, 0.1, float("inf"), 0.0, 2)
    s = {
        "residual": torch.ones(3, 2),
        "self_influence": torch.tensor([0.1, 0.3, 0.0]),
        "prediction_error": torch.tensor([0.2, 0.4, 0.6]),
        "deviation": None,
    } | s
    sensitivities = Sensitivities(step=step, **s)
    return SimpleNamespace(diagnostics=lambda: health, sensitivities=lambda: sensitivities)


def table(**replaced):
    columns = {name: torch.rand(N) for name in ("loss", "loo_loss", "leverage", "prediction_error")}
    columns |= {"self_influence": torch.arange(N) / N, "index": torch.arange(N), "deviation": torch.rand(N, 3)}
    return SensitivityTable(**(columns | replaced))


def test_a_training_run_reads_back_with_losses_table_images_and_scores(run):
    images, labels = torch.rand(N, 1, 8, 8), torch.arange(N) % 3
    logger = GeneralizationLogger(run, every=10, images=images, labels=labels, top=5)
    logger.log_step(optimizer(step=1000))
    sweep = table()
    logger.log_sweep(1000, sweep, test_loss=torch.tensor(0.75))
    logger.close()
    read = records(run)

    metrics = {m.get("name", m.get("glob_name")): m for m in (r["metric"] for r in read if "metric" in r)}
    assert metrics["vlearn/*"]["step_metric"] == "vlearn/step"

    rows = [record["history"]["item"] for record in read if record["type"] == "history"]
    assert len(rows) == 1
    row = rows[0]
    assert row["vlearn/step"] == 1000
    for key, value in sweep.summary("vlearn/").items():
        assert row[key] == value
    assert {"vlearn/loss", "vlearn/loo_loss", "vlearn/predicted_gap"} < row.keys()
    assert row["vlearn/test_loss"] == 0.75
    assert row["vlearn/gap"] == pytest.approx(0.75 - float(sweep.loss.mean()))
    assert row["vlearn/hess_init_weight"] == pytest.approx(0.999**1000)
    assert [row[f"vlearn/hessian_{name}"] for name in ("min", "median", "max")] == [0.5, 0.75, 4.0]
    assert row["vlearn/nonfinite_count"] == 2
    assert "vlearn/signal_to_noise" not in row  # infinite
    assert row["vlearn/live_self_influence_mean"] == pytest.approx(0.4 / 3)
    assert row["vlearn/live_prediction_error_mean"] == pytest.approx(0.4)
    assert row["vlearn/most_sensitive._type"] == "table-file"
    assert row["vlearn/most_sensitive.nrows"] == 5

    content = json.loads(files(read)["vlearn/most_sensitive.table.json"].read_text())
    columns = "rank index label loss loo_loss self_influence leverage prediction_error image"
    assert content["columns"] == columns.split()
    assert [line[:3] for line in content["data"]] == [[i + 1, N - 1 - i, str((N - 1 - i) % 3)] for i in range(5)]
    assert [line[-1]["caption"] for line in content["data"]] == [f"#{N - 1 - i}" for i in range(5)]
    assert all((line[-1]["width"], line[-1]["height"]) == (8, 8) for line in content["data"])

    with np.load(files(read)["scores.npz"]) as arrays:
        np.testing.assert_array_equal(arrays["index"], np.arange(N))
        np.testing.assert_array_equal(arrays["loo_loss"], sweep.loo_loss)
    assert len([path for path in files(read) if path.endswith(".png")]) == 5
    assert "vlearn-scores" in [record["artifact"]["type"] for record in read if record["type"] == "artifact"]


def test_without_a_run_it_logs_to_the_active_one(run):
    GeneralizationLogger(every=3).log_step(optimizer())
    assert history(run)[0]["vlearn/step"] == 1000


def test_without_a_run_and_none_active_it_says_so():
    assert wandb.run is None
    with pytest.raises(RuntimeError) as error:
        GeneralizationLogger()
    assert str(error.value) == "GeneralizationLogger() without a run, but no run is active: call wandb.init() first."


def test_only_every_nth_step_is_logged_from_the_first_on(run):
    logger = GeneralizationLogger(run, every=3)
    for step in range(1, 9):
        logger.log_step(optimizer(step=step))
    assert [row["vlearn/step"] for row in history(run)] == [1, 4, 7]


def test_the_users_own_log_calls_keep_their_steps_and_values(run):
    logger = GeneralizationLogger(run, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (10, 20, 30):
            run.log({"loss": step}, step=step)
            logger.log_step(optimizer(step=step))
            logger.log_sweep(step, table())
            run.log({"accuracy": -step}, step=step)
    rows = history(run)
    assert [row["_step"] for row in rows] == [10, 20, 30]
    assert [(row["loss"], row["accuracy"], row["vlearn/step"]) for row in rows] == [
        (10, -10, 10),
        (20, -20, 20),
        (30, -30, 30),
    ]
    assert all("vlearn/loo_loss" in row and "vlearn/hessian_min" in row for row in rows)


def test_nothing_is_lost_between_log_calls_without_a_step(run):
    logger = GeneralizationLogger(run, every=1)
    for step in (1, 2, 3, 4):
        logger.log_step(optimizer(step=step))
        if step == 2:
            run.log({"loss": 1.0})
    rows = history(run)
    assert [row["vlearn/step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("loss") for row in rows] == [None, 1, None, None]


def test_tables_follow_their_own_schedule(run):
    logger = GeneralizationLogger(run, table_every=2)
    for step in (1, 2, 3):
        logger.log_sweep(step, table())
    assert ["vlearn/most_sensitive._type" in row for row in history(run)] == [True, False, True]


def test_a_sweep_without_leave_one_out_or_leverage_logs_the_rest(run):
    logger = GeneralizationLogger(run)
    logger.log_sweep(1, table(loo_loss=torch.full((N,), torch.nan), leverage=None))
    (row,) = history(run)
    assert "vlearn/loss" in row
    assert not {"vlearn/loo_loss", "vlearn/test_loss", "vlearn/gap", "vlearn/predicted_gap"} & set(row)


def test_an_optimizer_without_sensitivities_warns_once_and_logs_its_hessian(run):
    def refuse():
        raise RuntimeError("this optimizer watches no model")

    logger = GeneralizationLogger(run, every=1)
    silent = optimizer()
    silent.sensitivities = refuse
    with pytest.warns(UserWarning, match="^No sensitivities to log: this optimizer watches no model$") as caught:
        logger.log_step(silent)
        logger.log_step(silent)
    assert len(caught) == 1
    assert "vlearn/hessian_min" in history(run)[0]


def test_non_finite_and_half_precision_values_are_logged(run):
    values = torch.tensor([float("inf"), float("nan"), 0.5], dtype=torch.bfloat16)
    logger = GeneralizationLogger(run, top=2)
    logger.log_step(optimizer(self_influence=values, prediction_error=values))
    strength = torch.arange(N, dtype=torch.bfloat16)
    strength[[0, 1, 2]] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=torch.bfloat16)
    logger.log_sweep(1000, table(self_influence=strength, index=torch.arange(N) + 2**25))
    logger.close()
    read = records(run)
    (row,) = [record["history"]["item"] for record in read if record["type"] == "history"]
    assert row["vlearn/live_num_nonfinite"] == 2
    assert row["vlearn/num_nonfinite"] == 3
    content = json.loads(files(read)["vlearn/most_sensitive.table.json"].read_text())
    assert [line[1] for line in content["data"]] == [2**25 + N - 1, 2**25 + N - 2]
    with np.load(files(read)["scores.npz"]) as arrays:
        np.testing.assert_array_equal(arrays["index"], np.arange(N) + 2**25)
        np.testing.assert_array_equal(arrays["self_influence"], strength.float())


def test_images_of_too_few_examples_are_refused(run):
    logger = GeneralizationLogger(run, images=np.zeros((5, 2, 2)))
    with pytest.raises(ValueError, match=r"^table\.index reaches 11, but images has 5 rows: give the images of"):
        logger.log_sweep(1, table())
    assert history(run) == []


def test_labels_of_pandas_go_by_their_place(run):
    pandas = pytest.importorskip("pandas")
    logger = GeneralizationLogger(run, labels=pandas.Series(range(N), index=range(N)[::-1]), top=3)
    logger.log_sweep(1, table())
    logger.close()
    content = json.loads(files(records(run))["vlearn/most_sensitive.table.json"].read_text())
    assert [line[1:3] for line in content["data"]] == [[n, str(n)] for n in (N - 1, N - 2, N - 3)]


@pytest.mark.parametrize("name", ["every", "top", "table_every"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=rf"^{name}=0, but it must be positive"):
        GeneralizationLogger(None, **{name: 0})


def test_a_missing_wandb_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"^vlearn\.integrations\.wandb needs wandb: pip install 'vlearn\[wandb\]'$"):
        GeneralizationLogger(None)


def test_a_disabled_run_accepts_everything():
    with wandb.init(mode="disabled") as disabled:
        logger = GeneralizationLogger(disabled, every=1)
        logger.log_step(optimizer())
        logger.log_sweep(1, table())
        logger.close()
