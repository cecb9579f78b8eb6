import dataclasses
import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import linear
from benchmarks.problems.linear_regression import Problem, load
from benchmarks.reference.cooks_distance import closed_form, diagonal_limit, refits


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator) @ torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(40, generator=generator)
    return Problem.standardised(x, y, prior_precision=1.0)


def test_the_formula_is_the_refit_without_each_example(problem):
    truth, formula = refits(problem), closed_form(problem)
    torch.testing.assert_close(formula.change, truth.change, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(formula.distance, truth.distance, rtol=1e-9, atol=1e-12)


def test_components_change_the_coordinates_and_nothing_else(problem):
    truth, rotated = refits(problem), refits(problem.on_components())
    torch.testing.assert_close(rotated.change, truth.change, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rotated.distance, truth.distance, rtol=1e-9, atol=1e-12)
    # There a diagonal posterior knows all; on correlated features it does not.
    limit = diagonal_limit(problem.on_components())
    torch.testing.assert_close(limit.change, truth.change, rtol=1e-9, atol=1e-12)
    assert linear.relative_error(diagonal_limit(problem).change, truth.change) > 0.05


@pytest.mark.slow
def test_ivons_state_comes_to_the_exact_removal_on_components(problem):
    settings = dataclasses.replace(linear.Settings(), lengths=(2000,))
    truth = refits(problem)
    run = linear.run_of(problem, settings, length=2000, seed=0)
    assert list(run) == list(linear.LOOKS)
    _, refined, fallbacks = run[linear.COMPONENTS]
    assert fallbacks == 0
    # The Hessian is a mean over 200 noisy estimates or so: a tenth, where the plain start is off by the whole change.
    assert linear.relative_error(refined.change, truth.change) < 0.1
    assert linear.relative_error(refined.distance, truth.distance) < 0.2


def test_the_smoke_run_writes_its_figure_and_numbers(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert linear.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["linear.json", "linear.png"]
    numbers = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert {"command", "seed", "hardware", "versions"} <= set(numbers)
    diabetes = numbers["sets"]["diabetes"]
    assert diabetes["formula"]["change_largest_error"] < 1e-10
    assert diabetes["formula"]["distance_largest_error"] < 1e-10
    assert all(len(each["refined"]) == 2 for each in diabetes["methods"].values())
    assert "diabetes: IVON's state, components" in capsys.readouterr().out


def test_a_set_is_read_by_its_columns_and_one_that_is_not_there_says_where_to_put_it(tmp_path):
    folder = tmp_path / "uci" / "yacht" / "data"
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text("1 2 7 5\n3 4 7 6\n9 8 7 4\n")
    (folder / "index_features.txt").write_text("0\n1\n2\n")
    (folder / "index_target.txt").write_text("3\n")
    x, y = load("yacht", tmp_path)
    assert x.tolist() == [[1, 2], [3, 4], [9, 8]]  # the column that does not vary says nothing
    assert y.tolist() == [5, 6, 4]
    with pytest.raises(FileNotFoundError, match="no boston in .*: give the folder above uci with --data-root"):
        load("boston", tmp_path)
