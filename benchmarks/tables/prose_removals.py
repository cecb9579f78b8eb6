"""Numbers in the sentences on removals, and on which examples a model depends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report.markdown import both, from_to, percent, roughly, short
from benchmarks.report.records import read

KRONECKER, DIAGONAL = ("KFACVON", "fit, K-FAC", "fit, EK-FAC"), ("IVON", "VON", "Adam", "Laplace, diagonal")
STOPPED = tuple(f"{name}, stopped" for name in KRONECKER)
DIGITS = ("digits", "digits-strong-prior")
LAPLACE = "Laplace, Kronecker"


def _whole_percent(value: float) -> str:
    return percent(value, 0)


def _below(value: float) -> str:
    """Two digits of a number that is as large or larger."""
    return short(math.floor(100 * value) / 100, 2)


def _fidelity_pearson() -> str:
    names = ("full", "EK-FAC", "K-FAC", "K-FAC of laplace-torch", "diagonal")
    results = read("fidelity")["results"]
    return _below(min(result["structures"][name]["pearson"] for result in results for name in names))


def _refined_kfac() -> str:
    results = read("fidelity")["results"]
    return both((result["structures"]["K-FAC"]["refined_loo_loss"] for result in results), lambda loss: short(loss, 3))


def _own_loss(name: str) -> dict[str, Any]:
    """Agreement on the increase of the own loss, by estimate."""
    return read(f"retraining/{name}")["table"]["own_loss"]


def _least_spearman() -> str:
    tables = map(_own_loss, DIGITS)
    return _below(min(row["spearman"][0] for table in tables for name, row in table.items() if name != "TracIn"))


def _excess(method: str, name: str) -> float:
    """A leave-one-out loss over the mean of the retrained, less one."""
    return _own_loss(name)[method]["loo_loss"] / read(f"retraining/{name}")["seeds"][0]["loo_loss_retrained"] - 1


def _errors_by_fifths(method: str) -> list[float]:
    """Median relative error of the predicted increase, by fifths of the examples from small to large effects."""
    run = read("retraining/digits")["seeds"][0]
    truth, predicted = (np.array(each) for each in (run["retrained"]["own_loss"], run["predicted"][method]["own_loss"]))
    order = np.argsort(run["predicted"]["full Gauss-Newton"]["own_loss"])
    return [float(np.median(np.abs(predicted[part] / truth[part] - 1))) for part in np.array_split(order, 5)]


def _times_too_large(methods: tuple[str, ...]) -> str:
    tables = [_own_loss(name) for name in ("mnist", "fashion-mnist")]
    return from_to((table[method]["mean_over_true_mean"] for table in tables for method in methods), roughly)


def _slopes(name: str, methods: tuple[str, ...]) -> str:
    return from_to((_own_loss(name)[method]["slope"][0] for method in methods), lambda slope: short(slope, 2))


def _at_half_of_the_epochs(name: str) -> float:
    changes = read(f"retraining/{name}")["seeds"][0]["by_epoch"]["true_own_loss"]
    return changes[len(changes) // 2 - 1] / changes[-1]


def _best_pearson(methods: tuple[str, ...]) -> float:
    """Of the change of the probabilities on MNIST."""
    table = read("retraining/mnist")["table"]["probabilities"]
    return max(table[method]["pearson"][0] for method in methods)


def _own_state(method: str, epochs: int, delta: int, where: str) -> dict[str, Any]:
    return read("fidelity_trained")["table"][f"{method}, {epochs} epochs, δ = {delta}, {where}"]


def _kfacvon(quantity: str, epochs: int, where: str, deltas: tuple[int, ...] = (1, 5)) -> list[float]:
    """Of KFACVON without and with the eigenvalue correction, at each prior precision."""
    runs = [_own_state(method, epochs, delta, where) for method in ("K-FAC", "EK-FAC") for delta in deltas]
    return [run["mean"][quantity] for run in runs]


def _own_state_apart() -> str:
    losses = zip(_kfacvon("loo_loss", 100, "mean"), _kfacvon("test_loss", 100, "mean"), strict=True)
    return percent(max(abs(loo / test - 1) for loo, test in losses))


def _longer(quantity: str) -> str:
    return from_to(_kfacvon(quantity, 300, "mean", (1,)), lambda loss: short(loss, 3))


def _evon_longer() -> str:
    run = _own_state("EVON", 300, 1, "minimum")
    return f"{run['mean']['slope']:.2f} ± {short(run['deviation']['slope'], 2)}"


def _groups(prediction: str) -> str:
    """The slopes of the rises of groups by training on over those by a prediction."""
    table = read("group_removal/fashion-mnist-5k")["table"]
    return from_to((row["mean"][f"slope: {prediction}"] for row in table.values()), lambda slope: short(slope, 2))


def _classes(estimate: str) -> dict[tuple[str, str], float]:
    """Mean loss on a class that is left out, over that after retraining, by network and posterior."""
    found = {}
    for network in ("mlp-10000", "lenet5-5000"):
        table = read(f"class_removal/{network}")["table"]
        for posterior in (LAPLACE, "IVON"):
            row = table[posterior][estimate]
            found[network, posterior] = row["mean"] / row["removed"]["mean"]
    return found


def _joint_too_large() -> str:
    return from_to((ratio for of, ratio in _classes("joint").items() if of != ("mlp-10000", LAPLACE)), roughly)


def _classes_while_there() -> str:
    table = read("class_removal/lenet5-5000")["table"]
    found = (table[posterior]["trained"]["removed"]["pearson"] for posterior in (LAPLACE, "IVON"))
    return both(found, lambda value: short(value, 2))


def _cook() -> str:
    """The largest error of Cook's formula over the data sets, relative to the largest value."""
    return f"{max(error for found in read('linear')['sets'].values() for error in found['formula'].values()):.0e}"


def _evolution(quantity: str, epochs: tuple[str, ...]) -> str:
    found = read("evolution/fashion-mnist")["epochs"]
    *most, last = (percent(found[epoch][quantity], 0) for epoch in epochs)
    return f"{', '.join(most)} and {last}"


def _over_epochs(quantity: str, shown: Callable[[float], str]) -> str:
    """A number of the memory maps after the first and the last epoch."""
    first, *_, last = read("memory_maps/epochs")["table"].values()
    return f"{shown(first[quantity])} to {shown(last[quantity])}"


def _former_outliers() -> dict[str, float]:
    return read("memory_maps/complexity")["former_outliers"]


def _priors() -> str:
    table = read("memory_maps/complexity")["table"]
    return ", ".join(short(row["test_loss"], 3) for row in table.values())


def _attribution(method: str, networks: int = 1, task: str = "fashion-mnist") -> str:
    """The score of one of vlearn's attributions."""
    rows = read(f"attribution/{task}")["rows"]
    (row,) = (r for r in rows if (r["by"], r["method"], r["networks"]) == ("vlearn", method, networks))
    return short(row["score"][0], 2)


NUMBERS: dict[str, Callable[[], str]] = {
    "attribution-alike": lambda: _attribution("K-FAC, over snapshots alike"),
    "attribution-alike-networks": lambda: _attribution("K-FAC, over snapshots alike", 3),
    "attribution-plain": lambda: _attribution("EK-FAC, over snapshots"),
    "attribution-last": lambda: _attribution("K-FAC, damped"),
    "attribution-mnist-alike": lambda: _attribution("K-FAC, over snapshots alike", task="mnist"),
    "attribution-mnist-networks": lambda: _attribution("K-FAC, over snapshots alike", 3, "mnist"),
    "attribution-mnist-plain": lambda: _attribution("EK-FAC, over snapshots", task="mnist"),
    "attribution-mnist-last": lambda: _attribution("K-FAC, damped", task="mnist"),
    "structures-pearson": _fidelity_pearson,
    "refined-kfac": _refined_kfac,
    "ranks": _least_spearman,
    "refined-excess": lambda: both((_excess("full, refined", name) for name in DIGITS), percent),
    "own-hessian": lambda: percent(max(abs(_excess("full, own Hessian", name)) for name in DIGITS)),
    "first-order": lambda: from_to(_errors_by_fifths("full Gauss-Newton")[:-1], _whole_percent),
    "first-order-last": lambda: percent(_errors_by_fifths("full Gauss-Newton")[-1], 0),
    "refined": lambda: from_to(_errors_by_fifths("full, refined"), _whole_percent),
    "kronecker-rows": lambda: from_to(_errors_by_fifths(LAPLACE), _whole_percent),
    "kronecker-times": lambda: _times_too_large((LAPLACE, *KRONECKER)),
    "diagonal-times": lambda: _times_too_large(DIAGONAL),
    "slopes-mnist": lambda: _slopes("mnist", KRONECKER),
    "slopes-mnist-stopped": lambda: _slopes("mnist", STOPPED),
    "slopes-fashion-mnist": lambda: _slopes("fashion-mnist", KRONECKER),
    "slopes-fashion-mnist-stopped": lambda: _slopes("fashion-mnist", STOPPED),
    "half-of-epochs": lambda: both(map(_at_half_of_the_epochs, ("mnist", "fashion-mnist")), _whole_percent),
    "probabilities": lambda: " against ".join(
        short(_best_pearson(methods), 3) for methods in (DIAGONAL, (LAPLACE, *KRONECKER, *STOPPED))
    ),
    "own-state-apart": _own_state_apart,
    "own-state-slopes": lambda: from_to(_kfacvon("slope", 100, "minimum"), lambda slope: short(slope, 2)),
    "evon-longer": _evon_longer,
    "kfacvon-longer": lambda: _longer("loo_loss"),
    "kfacvon-longer-test": lambda: _longer("test_loss"),
    "groups": lambda: _groups("its state"),
    "groups-stopped": lambda: _groups("its state, stopped"),
    "classes-published": lambda: from_to((1 / ratio for ratio in _classes("published").values()), roughly),
    "classes-joint": _joint_too_large,
    "classes-while-there": _classes_while_there,
    "cook": _cook,
    "top-share": lambda: _evolution("share_of_top_1_percent", ("1", "100")),
    "top-early": lambda: _evolution("top_1_percent_shared_with_last", ("1", "20", "50")),
    "effective-parameters": lambda: _over_epochs("effective_parameters", "{:,.0f}".format),
    "large-errors": lambda: _over_epochs("share_with_error_above_half", percent),
    "priors-test": _priors,
    "outliers": lambda: f"{_former_outliers()['outliers_of_the_fit_model']:.0f}",
    "outliers-left": lambda: percent(_former_outliers()["share_still_outliers_where_it_overfits"], 0),
    "norm-influence": lambda: percent(
        read("memory_maps/measures")["shared_of_top_1_percent"]["influence"]["gradient norm"], 0
    ),
}
