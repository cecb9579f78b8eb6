"""Tables of leave-one-out losses: against the test loss over training, and over the prior precision."""

from __future__ import annotations

from typing import Any

from benchmarks.report.markdown import percent, seconds, table
from benchmarks.report.records import RESULTS, read

LABELS = {
    "IVON": "IVON, its own state",
    "Laplace, Kronecker": "SGD + Laplace, Kronecker",
    "Laplace, diagonal": "SGD + Laplace, diagonal",
}


def stopped_training(experiment: str) -> str:
    """Leave-one-out losses with and without the training time, beside the test loss."""
    rows = read(f"stopped_training/{experiment}")["rows"]
    columns = [name for name in rows[0] if name not in ("epoch", "training time")]
    return table(
        ("epoch", "training time", *columns),
        [(f"{row['epoch']:.0f}", f"{row['training time']:.0f}", *(f"{row[c]:.3f}" for c in columns)) for row in rows],
    )


def fashion_mnist() -> str:
    """Fashion-MNIST with the published settings, and laplace-torch's own way beside the sweep."""
    record = read("generalization/fashion-mnist")
    rows = []
    for method, label in LABELS.items():
        mean = record["table"][method]["mean"]
        sweep = seconds(mean["seconds_of_sensitivities_each"])
        if (own := record["laplace_torch"].get(method)) is not None:
            sweep += f"; {seconds(own['fit'] + own['own_deviation_scaled'])} by laplace-torch alone"
        rows.append(
            (
                label,
                _gap(record["table"][method]),
                f"{mean['pearson_over_epochs']:.4f}",
                f"{mean['spearman_over_epochs']:.3f}",
                _last(mean),
                percent(mean["test_accuracy"], 2),
                sweep,
            )
        )
    header = ("posterior", "mean gap, nats", "Pearson", "Spearman", "last train / LOO / test loss", "accuracy")
    return table((*header, "a sweep, fit included"), rows)


def digits() -> str:
    """The demonstration on digits: over training, and against retraining."""
    labels = {name: LABELS[name] for name in ("IVON", "Laplace, diagonal", "Laplace, Kronecker")}
    by_method = read("digits/digits")["table"]
    rows = [
        (
            label.replace("IVON", "vlearn.IVON"),
            f"{by_method[method]['mean_absolute_gap']:.3f}",
            f"{by_method[method]['pearson_over_epochs']:.4f}",
            _last(by_method[method]),
            f"{by_method[method]['retraining_pearson']:.3f}",
            f"{by_method[method]['retraining_slope']:.2f}",
        )
        for method, label in labels.items()
    ]
    header = ("posterior", "mean gap, nats", "Pearson over training", "last train / LOO / test loss")
    return table((*header, "Pearson, retraining", "slope (1 is right)"), rows)


def prior_precision() -> str:
    """The prior precision that leave-one-out chooses, beside that of the test loss."""
    labels = {
        "Laplace, Kronecker": "SGD + Laplace, Kronecker",
        "K-FAC, stopped": "SGD + fit, with the training time",
        "IVON": "IVON",
        "IVON, warmed up": "IVON, `beta2_warmup=600`",
    }
    cases = {"fashion-mnist-5000": "Fashion-MNIST, LeNet-5", "mnist-5000": "MNIST, MLP(500, 300)"}
    rows = []
    for name, title in cases.items():
        found = read(f"hyperparameter/{name}")["table"]
        if (RESULTS / f"hyperparameter/{name}-warmed-up.json").exists():
            found["IVON, warmed up"] = read(f"hyperparameter/{name}-warmed-up")["table"]["IVON"]
        for method, row in found.items():
            regret = f"{row['regret']:.3f} ± {row['regret_standard_error']:.3f}" if row["grid_steps_apart"] else "0"
            rows.append(
                (
                    title if method == next(iter(labels)) else "",
                    labels[method],
                    f"{row['loo_minimiser']:g}",
                    f"{row['test_minimiser']:g}",
                    str(row["grid_steps_apart"]),
                    regret,
                    f"{row['pearson_over_grid']:.3f}",
                )
            )
    header = ("", "posterior", "δ by LOO", "δ by the test loss", "steps apart", "regret, nats")
    return table((*header, "Pearson over the grid"), rows)


def running_average() -> str:
    """A run that overfits, by IVON with a running average of the Hessian, on both data sets."""
    tables = [read(f"running_average/{name}")["table"] for name in ("mnist", "fashion-mnist")]

    def cells(mean: dict[str, float]) -> list[str]:
        apart = f"{percent(mean['mean_relative_gap'], 0)}, {percent(mean['largest_relative_gap'], 0)}"
        return [apart, _last(mean), percent(mean["test_accuracy"])]

    rows = [(name, *(cell for found in tables for cell in cells(found[name]["mean"]))) for name in tables[0]]
    header = [
        f"{title}: {column}"
        for title in ("MNIST", "Fashion-MNIST")
        for column in ("mean and largest gap, of the test loss", "last train / LOO / test loss", "accuracy")
    ]
    return table(("", *header), rows)


def _gap(row: dict[str, Any]) -> str:
    return f"{row['mean']['mean_absolute_gap']:.3f} ± {row['deviation']['mean_absolute_gap']:.3f}"


def _last(numbers: dict[str, float]) -> str:
    return " / ".join(f"{numbers[f'{which}_loss']:.3f}" for which in ("train", "loo", "test"))
