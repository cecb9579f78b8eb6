"""Numbers in the sentences on leave-one-out losses."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from benchmarks.report.markdown import both, from_to, percent, roughly, seconds, short
from benchmarks.report.records import read

IVON, KRONECKER, DIAGONAL = "IVON", "Laplace, Kronecker", "Laplace, diagonal"
ENDS = ("K-FAC, to the end", "EK-FAC, to the end")
STOPPED = ("K-FAC, stopped", "EK-FAC, stopped")
OVERFIT = "fashion-mnist-overfit"
SGD, ADAMW = ("fashion-mnist", OVERFIT), ("fashion-mnist-adamw",)
FIRST, MIDDLE, LAST, ALL = (1,), range(3, 21), (30,), range(1, 31)  # epochs


def _three(value: float) -> str:
    return short(value, 3)


def _rows(name: str) -> list[dict[str, float]]:
    """Losses by epoch, of training that was stopped there."""
    return read(f"stopped_training/{name}")["rows"]


def _first_and_last(name: str, column: str) -> str:
    rows = _rows(name)
    return both((rows[0][column], rows[-1][column]), _three)


def _over_test(names: tuple[str, ...], columns: tuple[str, ...], epochs: Container[int]) -> list[float]:
    """Leave-one-out loss over test loss."""
    rows = [row for name in names for row in _rows(name) if int(row["epoch"]) in epochs]
    return [row[column] / row["test"] for row in rows for column in columns]


def _gaps(columns: tuple[str, ...]) -> str:
    """Mean gap to the test loss, of the published settings."""
    table = read("stopped_training/fashion-mnist-published")["table"]
    return both((table[column]["mean"]["mean_absolute_gap"] for column in columns), _three)


def _varied(name: str, value: float) -> str:
    """IVON's last leave-one-out loss, and test loss, on digits with another setting."""
    (found,) = (each[IVON] for each in read("digits/settings")["variations"] if each["changed"] == {name: value})
    return f"{_three(found['loo_loss'])} against {_three(found['test_loss'])}"


def _torch_over_ivon(method: str) -> float:
    """Seconds of laplace-torch's fit and functional variance over those of an IVON sweep."""
    record = read("generalization/fashion-mnist")
    own = record["laplace_torch"][method]
    return (own["fit"] + own["own_deviation_scaled"]) / record["table"][IVON]["mean"]["seconds_of_sensitivities_each"]


def _diagonal_over_classes(method: str) -> str:
    own = read("generalization/fashion-mnist")["laplace_torch"][method]
    return f"{_three(own['own_loo_loss_of_part'])} to {_three(own['diagonal_loo_loss_of_part'])}"


def _mean(name: str, quantity: str, method: str = IVON) -> float:
    return read(f"generalization/{name}")["table"][method]["mean"][quantity]


def _weight(name: str) -> str:
    """What `hess_init` still weighs at the end."""
    return short(read(f"generalization/{name}")["remaining_weight_of_hess_init"], 2)


def _cifar_losses() -> str:
    return " / ".join(_three(_mean("cifar-10", f"{which}_loss")) for which in ("train", "loo", "test"))


def _overfit_curve(name: str) -> dict[str, Any]:
    return read("generalization/overfit")["curves"][name][0]


def _lowest_to_last_test() -> str:
    losses = _overfit_curve(IVON)["test_loss"]
    return f"{_three(min(losses))} to {_three(losses[-1])}"


def _kronecker_before() -> str:
    """SGD's largest leave-one-out loss, and the test loss then."""
    curve = _overfit_curve("SGD")
    loss, test = max(zip(curve["loo_loss"][KRONECKER], curve["test_loss"], strict=True))
    return f"{loss:.1f} against {_three(test)}"


def _kronecker_at_the_end() -> str:
    return " against ".join(_three(_mean("overfit", f"{which}_loss", KRONECKER)) for which in ("loo", "test"))


def _overfit_stopped(row: int) -> str:
    found = _rows(OVERFIT)[row]
    return f"{_three(found['K-FAC, stopped'])} for {_three(found['test'])}"


def _fidelity() -> dict[str, Any]:
    """Digits at a minimum, under the weak prior."""
    return read("fidelity")["results"][0]


def _over_prior(name: str) -> str:
    """Mean gap to the test loss over the prior precisions: with the training time, and without."""
    table = read(f"hyperparameter/{name}")["table"]
    return both((table[method]["mean_absolute_gap"] for method in ("K-FAC, stopped", KRONECKER)), _three)


NUMBERS: dict[str, Callable[[], str]] = {
    "adamw-stopped": lambda: _first_and_last("fashion-mnist-adamw", "EK-FAC, stopped"),
    "adamw-to-end": lambda: _first_and_last("fashion-mnist-adamw", "EK-FAC, to the end"),
    "adamw-test": lambda: _first_and_last("fashion-mnist-adamw", "test"),
    "longer": lambda: _varied("epochs", 300),
    "init-larger": lambda: _varied("hess_init", 0.5),
    "torch-times": lambda: both(map(_torch_over_ivon, (DIAGONAL, KRONECKER)), roughly),
    "classes-diagonal": lambda: _diagonal_over_classes(DIAGONAL),
    "classes-kronecker": lambda: _diagonal_over_classes(KRONECKER),
    "published-weight": lambda: _weight("fashion-mnist"),
    "stopped-first": lambda: f"{max(_over_test(SGD, STOPPED, FIRST)):.2f}",
    "to-end-first": lambda: from_to(_over_test(SGD, ENDS, FIRST), roughly),
    "stopped-middle": lambda: from_to(_over_test(SGD, STOPPED, MIDDLE), roughly),
    "to-end-middle": lambda: from_to(_over_test(SGD, ENDS, MIDDLE), roughly),
    "gaps-to-end": lambda: _gaps(ENDS),
    "gaps-stopped": lambda: _gaps(STOPPED),
    "adamw-times": lambda: from_to(_over_test(ADAMW, ENDS, ALL), roughly),
    "adamw-first": lambda: percent(max(_over_test(ADAMW, STOPPED, FIRST)) - 1),
    "adamw-last": lambda: from_to(_over_test(ADAMW, STOPPED, LAST), roughly),
    "cifar-gap": lambda: _three(_mean("cifar-10", "mean_absolute_gap")),
    "cifar-pearson": lambda: short(_mean("cifar-10", "pearson_over_epochs"), 4),
    "cifar-losses": _cifar_losses,
    "cifar-accuracy": lambda: percent(_mean("cifar-10", "test_accuracy")),
    "cifar-sweep": lambda: seconds(_mean("cifar-10", "seconds_of_sensitivities_each")),
    "cifar-epoch": lambda: seconds(_mean("cifar-10", "seconds_of_training_epoch")),
    "overfit-rise": _lowest_to_last_test,
    "overfit-ivon": lambda: _three(_mean("overfit", "loo_loss")),
    "overfit-weight": lambda: _weight("overfit"),
    "overfit-before": _kronecker_before,
    "overfit-loo": lambda: both((_mean("overfit", "loo_loss", method) for method in (IVON, KRONECKER)), _three),
    "overfit-test": lambda: both((_mean("overfit", "test_loss", method) for method in (IVON, KRONECKER)), _three),
    "overfit-sgd": _kronecker_at_the_end,
    "overfit-first": lambda: _overfit_stopped(0),
    "overfit-last": lambda: _overfit_stopped(-1),
    "exact-test": lambda: _three(_fidelity()["test_loss"]),
    "exact-first-order": lambda: _three(_fidelity()["structures"]["full"]["loo_loss"]),
    "exact-refined": lambda: _three(_fidelity()["structures"]["full"]["refined_loo_loss"]),
    "prior-fashion-mnist": lambda: _over_prior("fashion-mnist-5000"),
    "prior-mnist": lambda: _over_prior("mnist-5000"),
    "prior-weight": lambda: short(read("hyperparameter/mnist-5000")["experiment"]["remaining"], 1),
}
