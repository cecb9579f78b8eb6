"""What `summary()` of live sensitivities and of a sweep gives, and that loggers take it as it is."""

import csv
import logging
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.sensitivity.small import LABELS, N, inputs, loss_of, network, optimizer_of
from vlearn.sensitivity import Sensitivities, SensitivityTable

STATISTICS = ("mean", "q50", "q95", "max")


def live(**arguments):
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()
    return optimizer.sensitivities(**arguments)


def swept(leverage=None, **arguments):
    model = network()
    posterior = optimizer_of(model).posterior()
    return vlearn.sweep(model, posterior, [(inputs(), LABELS)], F.cross_entropy, leverage, progress=False, **arguments)


def keys_of(*names):
    return {f"{name}_{statistic}" for name in names for statistic in STATISTICS}


def by_numpy(name, column):
    rows = np.asarray(column.double())
    values = rows.mean(), np.quantile(rows, 0.5), np.quantile(rows, 0.95), rows.max()
    return dict(zip((f"{name}_{statistic}" for statistic in STATISTICS), values, strict=True))


def rows_of(count, **columns):
    """Live sensitivities of ones, but for the columns given."""
    ones = torch.ones(count)
    return Sensitivities(**{**dict.fromkeys(["residual", "self_influence", "prediction_error"], ones), **columns})


# -- keys and values --------------------------------------------------------------------------------------------------


def test_live_rows_are_summarized_as_numpy_does():
    s = live(deviation=True)
    summary = s.summary()
    expected = {"num_examples": N, "num_nonfinite": 0}
    expected |= by_numpy("self_influence", s.self_influence)
    expected |= by_numpy("prediction_error", s.prediction_error)
    expected |= by_numpy("deviation_norm", s.deviation.norm(dim=1))
    assert summary.keys() == expected.keys()
    assert summary == pytest.approx(expected, rel=1e-12)


def test_a_sweep_is_summarized_as_numpy_does():
    table = swept(leverage="exact")
    summary = table.summary()
    loss, loo_loss = np.asarray(table.loss), np.asarray(table.loo_loss)
    expected = {"num_examples": N, "num_nonfinite": 0, "loss": loss.mean(), "loo_loss": loo_loss.mean()}
    expected |= {"predicted_gap": (loo_loss - loss).mean()}
    for name in ("self_influence", "prediction_error", "leverage"):
        expected |= by_numpy(name, getattr(table, name))
    expected |= by_numpy("deviation_norm", table.deviation.norm(dim=1))
    assert summary.keys() == expected.keys()
    assert summary == pytest.approx(expected, rel=1e-12)


def test_what_was_not_asked_for_has_no_key():
    always = {"num_examples", "num_nonfinite"} | keys_of("self_influence", "prediction_error")
    assert live().summary().keys() == always
    of_sweeps = always | {"loss"} | keys_of("deviation_norm")
    assert swept(loo_loss=False).summary().keys() == of_sweeps
    assert swept().summary().keys() == of_sweeps | {"loo_loss", "predicted_gap"}


def test_num_first_order_are_counted():
    table = swept(refined=True, threshold=1e-9)
    assert table.summary()["num_first_order"] == table.num_first_order == N
    assert swept(refined=True).summary("a/")["a/num_first_order"] == 0


def test_every_key_has_the_prefix_and_every_value_is_a_float():
    for table in (live(deviation=True), swept(leverage="probe", refined=True)):
        plain, prefixed = table.summary(), table.summary("train/")
        assert list(prefixed) == [f"train/{key}" for key in plain]
        assert list(prefixed.values()) == list(plain.values())
        assert {type(value) for value in plain.values()} == {float}


@pytest.mark.parametrize("table", [Sensitivities, SensitivityTable])
def test_the_docstring_names_every_key(table):
    documented = set(re.findall(r"^ *``(\w+)``  ", table.summary.__doc__, re.MULTILINE))
    given = live(deviation=True) if table is Sensitivities else swept(leverage="exact", refined=True)
    assert documented == given.summary().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_averaged_in_float64(dtype):
    rows = torch.linspace(0, 1, 5000).to(dtype)
    s = rows_of(5000, self_influence=rows, deviation=None, step=1)
    assert s.summary()["self_influence_mean"] == np.asarray(rows.double()).mean()


def test_a_statistic_that_a_non_finite_row_reaches_is_nan():
    influence = torch.tensor([1.0, torch.inf, 2.0, 3.0])
    error = torch.tensor([0.5, torch.nan, torch.nan, 0.5])
    with np.errstate(all="raise"):
        summary = rows_of(4, self_influence=influence, prediction_error=error, deviation=None, step=1).summary()
    assert summary["num_nonfinite"] == 2
    assert summary["self_influence_q50"] == 2.5
    assert all(math.isnan(summary[f"self_influence_{name}"]) for name in ("mean", "q95", "max"))
    assert all(math.isnan(summary[key]) for key in keys_of("prediction_error"))


def test_infinities_of_both_signs_are_nan_without_a_warning():
    influence = torch.tensor([torch.inf, -torch.inf])
    summary = rows_of(2, self_influence=influence, deviation=None, step=1).summary()
    assert all(math.isnan(summary[f"self_influence_{name}"]) for name in STATISTICS)


def test_one_row_of_a_leave_one_out_loss_that_is_nan_does_not_hide_the_column():
    table = swept()
    loo_loss = table.loo_loss.clone()
    loo_loss[0] = torch.nan
    summary = replace(table, loo_loss=loo_loss).summary()
    assert math.isnan(summary["loo_loss"]) and math.isnan(summary["predicted_gap"])
    assert summary["num_nonfinite"] == 1 and math.isfinite(summary["loss"])


def test_no_rows_are_nan():
    empty = rows_of(0, deviation=torch.zeros(0, 3), step=1).summary()
    assert empty.pop("num_examples") == empty.pop("num_nonfinite") == 0
    assert empty.keys() == keys_of("self_influence", "prediction_error", "deviation_norm")
    assert all(math.isnan(value) for value in empty.values())


def test_outputs_without_a_class_dimension_and_with_several_have_norms():
    flat = rows_of(2, deviation=torch.tensor([3.0, -5.0]), step=1).summary()
    assert flat["deviation_norm_mean"] == 4
    deep = rows_of(2, deviation=torch.ones(2, 3, 4), step=1).summary()
    assert deep["deviation_norm_max"] == pytest.approx(math.sqrt(12))


# -- loggers ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_lightnings_log_dict_takes_it(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    summaries = [live(deviation=True).summary("train/"), swept(leverage="exact").summary("sweep/")]

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            for summary in summaries:
                self.log_dict(summary)
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(inputs(), batch_size=N))
    logged = {key: float(value) for key, value in trainer.logged_metrics.items()}
    assert logged == pytest.approx(summaries[0] | summaries[1], rel=1e-6)


def test_tensorboard_takes_it(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for key, value in swept().summary("sweep/").items():
            writer.add_scalar(key, value, global_step=3)
    assert list(tmp_path.iterdir())


def test_a_csv_writer_takes_it(tmp_path):
    summaries = [swept().summary(), swept().summary()]
    with open(tmp_path / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(summaries[0]))
        writer.writeheader()
        writer.writerows(summaries)
    with open(tmp_path / "log.csv", newline="") as file:
        read = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert read == summaries


def test_wandb_takes_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    expected = swept(leverage="exact").summary("sweep/")
    with wandb.init(mode="offline", dir=tmp_path, settings=settings) as run:
        run.log(expected)
        assert {key: run.summary[key] for key in expected} == expected
