"""Wrong labels: the labels that are drawn, the measures, and the smoke run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.label_errors import EXPERIMENTS, FOLDS, METHODS, SMOKE, Run, _measures, main
from benchmarks.problems import images
from benchmarks.problems.noisy_labels import HUMAN, PAIRS, given_labels


@pytest.fixture(scope="module")
def digits() -> images.Images:
    return images.load("digits")


@pytest.mark.parametrize("noise", ["symmetric", "pairs"])
def test_drawn_labels_are_wrong_as_often_as_asked(digits: images.Images, noise: str) -> None:
    given = given_labels(digits, noise, 0.3, seed=1)
    wrong = given != digits.y
    of_pairs = torch.tensor([int(y) in PAIRS["digits"] for y in digits.y]) if noise == "pairs" else wrong | True
    assert float(wrong[of_pairs].float().mean()) == pytest.approx(0.3, abs=0.05)
    assert not wrong[~of_pairs].any()
    assert torch.equal(given, given_labels(digits, noise, 0.3, seed=1))
    if noise == "pairs":
        assert all(PAIRS["digits"][int(y)] == int(g) for y, g in zip(digits.y[wrong], given[wrong], strict=True))
    assert int(given.min()) >= 0 and int(given.max()) <= 9


def test_human_labels_are_those_of_the_file(digits: images.Images, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10n"
    folder.mkdir()
    true = digits.y.numpy().astype(np.uint8)
    sets = dict.fromkeys(HUMAN, (true + 1) % 10)
    np.savez(folder / "cifar10n_labels.npz", clean_label=true, **sets)
    assert torch.equal(given_labels(digits, "worse_label", 0.0, 0, tmp_path), (digits.y + 1) % 10)
    np.savez(folder / "cifar10n_labels.npz", clean_label=true[::-1], **sets)
    with pytest.raises(ValueError, match="images in another order"):
        given_labels(digits, "worse_label", 0.0, 0, tmp_path)
    with pytest.raises(FileNotFoundError, match="no .*cifar10n_labels.npz"):
        given_labels(digits, "worse_label", 0.0, 0, tmp_path / "other")
    with pytest.raises(ValueError, match="noise 'all', but there are"):
        given_labels(digits, "all", 0.0, 0)


def test_measures_are_those_of_an_order() -> None:
    wrong = np.array([True, False, True, False, False])
    measured = _measures(np.array([5.0, 4.0, 3.0, 2.0, np.nan]), wrong, 1.0)
    assert measured["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert measured["auroc"] == pytest.approx(5 / 6)
    assert measured["precision_at_count"] == 0.5


def test_every_experiment_has_its_network_and_noise() -> None:
    from benchmarks.problems import networks

    for experiment in EXPERIMENTS.values():
        assert experiment.noise in ("symmetric", "pairs", *HUMAN) and experiment.dataset in images.LOADERS
        networks.build(experiment.network)


def test_a_run_goes_on_where_it_was_interrupted(digits: images.Images, tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(digits.x[:200], digits.y[:200])

    def run(folder: Path, stop: int | None = None) -> Run:
        made = Run(SMOKE, "IVON", data, torch.arange(200), 0, folder, "run")

        def advance(epoch: int) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

        made.train(advance)
        return made

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", stop=2)
    part = run(tmp_path / "part")
    assert all(map(torch.equal, part.model.state_dict().values(), whole.model.state_dict().values()))
    assert part.recorder is not None and whole.recorder is not None
    np.testing.assert_allclose(part.recorder.record.column("loss"), whole.recorder.record.column("loss"), rtol=1e-12)
    assert part.recorder.record.memory.steps.tolist() == whole.recorder.record.memory.steps.tolist()


@pytest.mark.slow
def test_the_smoke_run_writes_every_score_and_goes_on_from_what_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cleanlab")
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert set(first["table"]) == {*METHODS, FOLDS}
    for method, scores in first["table"].items():
        assert len(scores) == (1 if method == FOLDS else 6)
        assert all(0 < score["mean"]["average_precision"] <= 1 for score in scores.values())
    assert first["table"]["AdamW"]["loss, live"]["mean"]["average_precision"] > 0.4  # a fifth by chance
    assert first["record_cost"] > 0
    assert (tmp_path / "out" / "digits.png").stat().st_size > 10_000
    assert "cleanlab" in capsys.readouterr().out
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "digits.json").read_text())["table"] == first["table"]
