"""The comparison of defaults: its tasks, its runs, its table."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.defaults.__main__ import main
from benchmarks.defaults.comparison import summary
from benchmarks.defaults.control import Control
from benchmarks.defaults.leave_one_out import LABELS, count_of, own_losses
from benchmarks.defaults.methods import METHODS
from benchmarks.defaults.report import show
from benchmarks.defaults.task import IGNORED, class_loss
from benchmarks.defaults.tasks import smoke_task, tasks
from benchmarks.defaults.training import pace, run, scores
from benchmarks.problems.images import default_root


@pytest.mark.slow
def test_the_smoke_run_writes_numbers_and_goes_on_from_what_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytorch_optimizer")
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert "tuned, is within 2% of AdamW, tuned, on 1 of 1 tasks" in capsys.readouterr().out
    assert main(arguments) == 0
    again = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert first["methods"] == again["methods"]
    assert set(first["methods"]) == set(METHODS)
    assert first["methods"]["VAdamW"]["line"]["mean"]["loss"] == pytest.approx(
        first["methods"]["AdamW"]["line"]["mean"]["loss"], rel=1e-3
    )


def test_leave_one_out_losses_of_the_lines_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--leave-one-out", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "out" / "leave_one_out" / "digits.json").read_text())
    assert list(written["methods"]) == list(LABELS) and written["swept"] == 500
    means = {label: row["mean"] for label, row in written["methods"].items()}
    assert means.pop("EVON")["loo_loss"] is None  # its draws are narrow, and of 20 steps its Hessian is their noise
    assert all(mean["loo_loss"] > mean["train_loss"] for mean in means.values())
    said = capsys.readouterr().out
    assert "Leave-one-out losses by one line" in said and "refused" in said


def test_the_loss_of_a_sequence_is_the_mean_over_the_classes_it_has() -> None:
    output, y = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    assert torch.allclose(own_losses(output, y).mean(), class_loss(output, y))
    y[0, 2:] = IGNORED
    assert torch.allclose(own_losses(output, y)[0], class_loss(output[:1, :2], y[:1, :2]))
    assert torch.allclose(own_losses(output[:, 0], y[:, 0]).mean(), class_loss(output[:, 0], y[:, 0]))
    task = smoke_task()
    assert count_of(task) == 500
    assert count_of(dataclasses.replace(task, y=torch.zeros(500, 40, 40, dtype=torch.long))) == 62


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's use of transformers
@pytest.mark.parametrize("name", list(tasks(Path(), Path())))
def test_every_task_trains_by_a_few_steps(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (default_root() / "text").exists():
        pytest.skip("needs the data: set VLEARN_DATA")
    for module, task in (("timm", "vit"), ("rtdl_revisiting_models", "ft-transformer"), ("peft", "lora")):
        if name == task:
            pytest.importorskip(module)
    if name in ("bert", "lora"):
        pytest.importorskip("transformers")
    monkeypatch.setattr("benchmarks.defaults.texts.PRETRAINING", 2)
    whole = tasks(default_root(), tmp_path)[name]()
    if isinstance(whole, Control):
        pytest.importorskip("stable_baselines3")
        short = dataclasses.replace(whole, num_data=64, batch=32, epochs=2, steps=128)
        assert 1 <= short.run(METHODS["VAdamW"], 1e-3, 0)["loss"] < math.inf
        return
    first = slice(2 * whole.batch)
    task = dataclasses.replace(
        whole, x=whole.x[first], y=whole.y[first], x_val=whole.x_val[first], y_val=whole.y_val[first], epochs=1
    )
    assert task.steps == 2
    row = run(task, METHODS["VAdamW"], 1e-3, seed=0)
    assert math.isfinite(row["loss"]) and math.isfinite(row["loss_by_draws"])
    assert ("accuracy" in row) == task.classifies


def test_scores_are_those_of_the_mean_probability() -> None:
    task = smoke_task()
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(len(y), 10, generator=generator) for _, y in task.val_batches()] for _ in range(3)]
    found = scores(task, drawn)
    mean = torch.stack([torch.cat(draw).softmax(1) for draw in drawn]).mean(0)
    own = mean.gather(1, task.y_val.unsqueeze(1))
    assert found["loss"] == pytest.approx(-own.log().mean().item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((mean.argmax(1) == task.y_val).double().mean().item())


def test_the_rate_rises_and_falls_and_divergence_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert [pace(step, 100) for step in (0, 4, 5)] == pytest.approx([0.2, 1.0, 1.0])
    assert pace(100, 100) == pytest.approx(0.0, abs=1e-12)
    diverged = summary([{"loss": 1.0, "accuracy": 0.5}, {"loss": math.inf}])
    assert diverged["mean"] == {"loss": math.inf}
    line = {"mean": {"loss": 1.0}}
    methods = {"AdamW": {"line": line, "tuned": line}, "SGD": {"tuned": line}, "ivon-opt": {"line": diverged}}
    methods["VAdamW"] = {"line": {"mean": {"loss": 1.04}}, "tuned": {"mean": {"loss": 1.03}}}
    methods["SOAP"] = {"tuned": line}
    methods["EVON"] = {"line": diverged, "tuned": line}
    show({"task": {"methods": methods}})
    said = " ".join(capsys.readouterr().out.split())
    assert "diverged" in said
    for sentence in (
        "VAdamW, tuned, is within 2% of AdamW, tuned, on 0 of 1 tasks.",
        "VAdamW, line, is within 5% of AdamW, line, on 1 of 1 tasks.",
        "EVON, tuned, is within 2% of AdamW, tuned, on 1 of 1 tasks.",
        "EVON, line, is within 5% of AdamW, line, on 0 of 1 tasks.",
    ):
        assert sentence in said
