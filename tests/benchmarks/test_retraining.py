"""The benchmark of predicted against true removals: it runs, goes on where it was, and truth is what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("laplace")
pytest.importorskip("sklearn")

from benchmarks import retraining
from benchmarks.problems import images as datasets
from benchmarks.report import experiments
from benchmarks.report.terminal import Advance

METHODS = {"IVON", "VON", "Laplace, diagonal", "Laplace, Kronecker", "Adam", "gradient norm", "EL2N", "TracIn"}


@dataclasses.dataclass(frozen=True)
class Smoke:
    """A smoke run: the folder of its results, what it printed, and what `run_seed` gave of each experiment."""

    out: Path
    printed: str
    whole: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    folder, printed, whole = tmp_path_factory.mktemp("smoke"), io.StringIO(), {}
    run_seed = retraining.run_seed

    def kept(experiment: Any, *rest: Any) -> dict[str, Any]:
        whole[experiment.title] = run_seed(experiment, *rest)
        return whole[experiment.title]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(folder)
        patch.setattr(retraining, "run_seed", kept)
        assert retraining.main(["--smoke", "--runs", str(folder / "runs"), "--out", str(folder / "out")]) == 0
    return Smoke(folder / "out", printed.getvalue(), whole)


@pytest.mark.slow
def test_the_smoke_run_compares_every_method_on_both_targets(smoke: Smoke) -> None:
    for name, more in (
        ("digits", {"IVON, as trained", "full Gauss-Newton", "full, refined", "full, own Hessian"}),
        ("digits-warm-start", set()),
    ):
        numbers = json.loads((smoke.out / f"{name}.json").read_text())
        (run,) = numbers["seeds"]
        for target in ("probabilities", "own_loss"):
            rows = run["table"][target]
            assert METHODS | more <= set(rows)
            values = [row["pearson"][0] for row in rows.values()]
            assert values == sorted(values, reverse=True)
            assert "slope" not in rows["EL2N"] and "slope" in rows["IVON"]
            assert (smoke.out / f"{name}-{target.replace('_', '-')}.png").exists()
    assert "predicted against true |Δp|₁" in smoke.printed


@pytest.mark.slow
@pytest.mark.parametrize("name", list(retraining.SMOKE))
def test_an_interrupted_run_goes_on_after_the_last_removal(name: str, tmp_path: Path, smoke: Smoke) -> None:
    experiment = retraining.SMOKE[name]
    images = datasets.load("digits").first(experiment.num_data)

    def stop(said: str) -> None:
        if "without 2 of" in said:
            raise KeyboardInterrupt

    def run(advance: Advance) -> dict:
        return retraining.run_seed(experiment, images, 0, tmp_path, advance)

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    said: list[str] = []
    resumed, whole = run(said.append), smoke.whole[experiment.title]
    assert sum("retrained without" in each for each in said) == experiment.retrained - 2
    assert not any("estimated by" in each for each in said)
    for target in retraining.TARGETS:
        np.testing.assert_allclose(resumed["retrained"][target], whole["retrained"][target], rtol=1e-6, atol=1e-9)
        for method, numbers in whole["predicted"].items():
            np.testing.assert_array_equal(resumed["predicted"][method][target], numbers[target])


def test_truth_is_the_difference_between_the_runs_with_and_without_an_example() -> None:
    torch.manual_seed(0)
    kept, y, examples = torch.randn(2, 5, 4), torch.tensor([0, 3, 1, 2, 2]), torch.tensor([4, 1, 2])
    removed = {int(example): torch.randn(2, 4) for example in examples}
    found = retraining.truths({"kept": kept, "removed": removed}, examples, y)
    for place, example in enumerate(examples.tolist()):
        before, after = kept[1, example].double(), removed[example][1].double()
        moved = (after.softmax(0) - before.softmax(0)).abs().sum()
        risen = F.cross_entropy(after, y[example]) - F.cross_entropy(before, y[example])
        assert found["probabilities"][1, place] == pytest.approx(float(moved))
        assert found["own_loss"][1, place] == pytest.approx(float(risen))


def test_examples_are_spread_over_the_quantiles_and_fewer_are_the_first_of_more() -> None:
    values = np.random.default_rng(0).permutation(1000)
    many = retraining.spread(values, 200)
    assert len(set(many.tolist())) == 200
    assert np.diff(np.sort(values[many])).max() <= 2 * 1000 / 200
    assert values[many[0]] == 999
    np.testing.assert_array_equal(retraining.spread(values, 50), many[:50])


def test_options_change_the_experiment_and_are_part_of_the_command() -> None:
    arguments = retraining.parse(["--experiments", "mnist", "--num-data", "500", "--retraining-epochs", "2"])
    experiment = retraining.chosen(arguments)["mnist"]
    assert experiment.num_data == 500
    assert experiment.retraining is not None and experiment.retraining[0] == 2
    command = experiments.command("retraining", arguments, "mnist", 1)
    assert command == (
        "python -m benchmarks.retraining --experiments mnist --seeds 1 --num-data 500 --retraining-epochs 2"
    )
