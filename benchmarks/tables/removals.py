"""Tables of predicted against retrained removals: structures, single examples, whole classes, linear models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report.markdown import percent, short, table
from benchmarks.report.records import read

GUARDED = "[guarded](#five-hundred-removals)"


def structures() -> str:
    """What each structure of Σ says at a minimum, at two prior precisions."""
    labels = {
        "full": "full",
        "EK-FAC": "EK-FAC",
        "K-FAC": "K-FAC",
        "K-FAC of laplace-torch": "K-FAC of laplace-torch, biases apart",
        "diagonal": "diagonal",
    }
    results = read("fidelity")["results"]
    header, refined = ["Σ"], ["full, `refined=True`"]
    rows = [[label] for label in labels.values()]
    for result in results:
        header += [f"δ = {result['prior_precision']:g}: LOO (test {short(result['test_loss'], 3)})", "slope"]
        full = result["structures"]["full"]
        refined += [short(full["refined_loo_loss"], 3), f"{full['refined_slope']:.2f}"]
        for row, name in zip(rows, labels, strict=True):
            numbers = result["structures"][name]
            row += [short(numbers["loo_loss"], 3), f"{numbers['slope']:.2f}"]
    return table(header, [refined, *rows])


def digits() -> str:
    """500 removals of digits at two prior precisions: the increase of the own loss."""
    labels = {
        "full, own Hessian": f"one Newton step, the loss's own Hessian, {GUARDED}",
        "full, refined": "full, `refined=True`",
        "KFACVON": "KFACVON, averaged over its draws",
        "KFACVON, at the mean": "KFACVON, draws narrowed by `ess`",
        "Laplace, Kronecker": "Laplace, Kronecker",
        "VON": "VON, averaged over its draws",
        "VON, at the mean": "VON, draws narrowed by `ess`",
        "Laplace, diagonal": "Laplace, diagonal",
        "IVON": "IVON, run on at the minimum",
        "IVON, as trained": "IVON, its state from training",
        "Adam": "√v̂ of Adam",
        "EL2N": "EL2N",
        "gradient norm": "gradient norm",
        "TracIn": "TracIn",
    }
    return _retraining(labels, {"digits": "δ = 1", "digits-strong-prior": "δ = 5"})


def images() -> str:
    """100 removals of each set of images: the increase of the own loss."""
    labels = {
        "KFACVON": "KFACVON",
        "KFACVON, stopped": "KFACVON, stopped",
        "Laplace, Kronecker": "Laplace, Kronecker",
        "fit, K-FAC": "fit, K-FAC",
        "fit, K-FAC, stopped": "fit, K-FAC, stopped",
        "fit, EK-FAC": "fit, EK-FAC",
        "fit, EK-FAC, stopped": "fit, EK-FAC, stopped",
        "IVON": "IVON",
        "IVON, stopped": "IVON, stopped",
        "VON": "VON",
        "Adam": "√v̂ of Adam",
        "Laplace, diagonal": "Laplace, diagonal",
        "TracIn": "TracIn",
        "gradient norm": "gradient norm",
        "EL2N": "EL2N",
    }
    return _retraining(labels, {"mnist": "MNIST, MLP(500, 300)", "fashion-mnist": "Fashion-MNIST, LeNet-5"})


def _retraining(labels: dict[str, str], cases: dict[str, str]) -> str:
    """Pearson's correlation with its interval, and the slope, by estimate and case."""
    header, rows = ["estimate"], [[label] for label in labels.values()]
    for name, title in cases.items():
        header += [f"{title}: Pearson", "slope"]
        by_method = read(f"retraining/{name}")["table"]["own_loss"]
        for row, method in zip(rows, labels, strict=True):
            value, low, high = (short(number, 3) for number in by_method[method]["pearson"])
            slope = f"{by_method[method]['slope'][0]:.2f}" if "slope" in by_method[method] else "-"
            row += [f"{value} [{low}, {high}]", slope]
    return table(header, rows)


def from_scratch() -> str:
    """Each optimizer's own state after 100 epochs from scratch."""
    numbers = read("fidelity_trained")["table"]
    rows = []
    for method, label in {"IVON": "IVON", "EVON": "EVON", "K-FAC": "KFACVON", "EK-FAC": "KFACVON, EK-FAC"}.items():
        for delta in (1, 5):
            run = f"{method}, 100 epochs, δ = {delta}"
            mean = numbers[f"{run}, mean"]["mean"]
            found = [
                f"{each['mean'][quantity]:.2f} ± {each['deviation'][quantity]:.2f}"
                for quantity in ("pearson", "slope")
                for each in (numbers[f"{run}, minimum"], numbers[f"{run}, minimum, Σ made there"])
            ]
            rows.append((label, str(delta), f"{mean['loo_loss']:.3f} / {mean['test_loss']:.3f}", *found))
    header = (
        "",
        "δ",
        "LOO / test loss at the mean",
        "Pearson: its state",
        "Σ made there",
        "slope: its state",
        "Σ made there",
    )
    return table(header, rows)


PREDICTIONS = ("its state", "its state, stopped", "EK-FAC made there, stopped")


def groups() -> str:
    """Each optimizer's own state of LeNet-5, and a fit at its weights, against groups of images left out at once."""
    rows = []
    for method, row in read("group_removal/fashion-mnist-5k")["table"].items():
        mean, deviation = row["mean"], row["deviation"]
        cells = [f"{mean['highest_pearson']:.2f}"]
        for name in PREDICTIONS:
            pair = (f"{mean[f'{q}: {name}']:.2f} ± {deviation[f'{q}: {name}']:.2f}" for q in ("pearson", "slope"))
            cells.append(", ".join(pair))
        rows.append((method, f"{mean['loo_loss']:.3f} / {mean['test_loss']:.3f}", *cells))
    header = ("", "LOO / test loss", "highest Pearson", *(f"Pearson, slope: {name}" for name in PREDICTIONS))
    return table(header, rows)


def classes_mlp() -> str:
    """Whole classes left out of an MLP."""
    return _classes("mlp-10000")


def classes_lenet5() -> str:
    """Whole classes left out of LeNet-5."""
    return _classes("lenet5-5000")


def _classes(name: str) -> str:
    """Mean loss on a class that is left out, and its correlation with retraining over the classes."""
    labels = {
        "published": "published: one example at a time",
        "joint": "joint (Eq. 14)",
        "refined": "refined",
        "Gauss-Newton": "refined, the Gauss-Newton matrix itself",
    }
    record = read(f"class_removal/{name}")
    methods = {"Laplace, Kronecker": "SGD + Laplace, Kronecker", "IVON": "IVON"}
    by_method = [record["table"][method] for method in methods]

    def cells(rows: dict[str, Any], estimate: str) -> Sequence[str]:
        if rows[estimate].get("fallbacks") == len(record["classes"]):
            return ("as joint: every class falls back", "")
        return (_loss(rows[estimate]["mean"]), short(rows[estimate]["removed"]["pearson"], 2))

    lines = [("retrained", *(cell for rows in by_method for cell in (_loss(rows["joint"]["removed"]["mean"]), "")))]
    for estimate, label in labels.items():
        if estimate in by_method[0]:
            lines.append((label, *(cell for rows in by_method for cell in cells(rows, estimate))))
    header = ("estimate", *(cell for title in methods.values() for cell in (title, "Pearson over classes")))
    return table(header, lines)


def _loss(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def linear() -> str:
    """The relative error of the refined Δf in linear regression, after IVON's longest runs."""
    sets = read("linear")["sets"]
    labels = {
        "IVON's state, components": "IVON's state, on principal components (the precision is diagonal there)",
        "IVON's state, features": "IVON's state, on the features",
        "limit": "the limit of any diagonal on the features",
        "dense precision, IVON's mean": "exact dense precision at IVON's mean on the features",
    }

    def error(row: dict[str, Any], name: str) -> str:
        value = row["diagonal_limit_error"] if name == "limit" else np.mean(row["methods"][name]["refined"][-1])
        return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"

    rows = [(label, *(error(row, name) for row in sets.values())) for name, label in labels.items()]
    return table(("", *sets), rows)


def changed_labels() -> str:
    """Which measure finds labels that were changed at random."""
    found = read("memory_maps/measures")["table"]
    shares = {
        "changed, of its top 1%": "share_of_top_1_percent",
        "among as many on top, of all changed": "share_found",
    }
    rows = [
        (name, *(percent(row["mean"][share], 0) for share in shares.values()))
        for name, row in sorted(found.items(), key=lambda item: -item[1]["mean"]["share_found"])
    ]
    return table(("", *shares), rows)
