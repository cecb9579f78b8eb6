"""How the settings of the digits benchmark were chosen, and how much its leave-one-out losses hang on each.

    python -m benchmarks.digits_settings [--tune] [--seed 0] [--out FOLDER]

Both learning rates are 0.2. `--tune` prints the loss on held-out training data for six of them: from 0.2 upwards it
stays within its standard error (0.03) for either optimizer.

Prior precision, number of epochs, hess_init and beta2 were chosen with the curves in view. Without `--tune` one setting
at a time is changed, for all methods: this takes five minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks.problems.digits import Digits, Settings
from benchmarks.report.curves import losses
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table
from benchmarks.training.digits import TRAINED_BY, train_ivon, train_sgd
from benchmarks.training.evaluation import STRUCTURES

VARIATIONS: tuple[dict[str, float], ...] = (
    {},
    {"lr": 0.1, "sgd_lr": 0.1},
    {"lr": 0.5, "sgd_lr": 0.5},
    {"prior_precision": 1.0},
    {"prior_precision": 10.0},
    {"epochs": 50},
    {"epochs": 200},
    {"epochs": 300},
    {"hess_init": 0.05},
    {"hess_init": 0.5},
    {"beta2": 0.9995},
)


def tune(settings: Settings) -> None:
    """Loss on 200 held-out training examples after training on the other 800, for each learning rate."""
    settings = dataclasses.replace(settings, num_data=800, num_test=200)
    data = Digits.load(settings)
    lines = []
    for lr in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        chosen = dataclasses.replace(settings, lr=lr, sgd_lr=lr)
        ivon = train_ivon(chosen, data, None, None, lambda: None)[2]
        sgd = train_sgd(chosen, data, (), lambda: None)[1]
        lines.append((f"{lr:g}", f"{ivon.test_loss[-1]:.4f}", f"{sgd.test_loss[-1]:.4f}"))
    print_table("Loss on held-out training data", ("learning rate", "IVON", "SGD"), lines)


def vary(settings: Settings, out: Path) -> None:
    """Leave-one-out and test loss at the end when one setting changes, printed and written to settings.json."""
    data = Digits.load(settings)
    lines, rows = [], []
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        for changed in bar.track(VARIATIONS, description="one setting at a time"):
            chosen = dataclasses.replace(settings, **changed)
            runs = {"IVON": train_ivon(chosen, data, None, None, lambda: None)[2]}
            if not {"hess_init", "beta2"} & set(changed):
                runs["SGD"] = train_sgd(chosen, data, tuple(STRUCTURES), lambda: None)[1]
            row: dict[str, Any] = {"changed": changed, "remaining_weight_of_hess_init": chosen.beta2**chosen.steps}
            for method, name in TRAINED_BY.items():
                if name in runs:
                    row[method] = losses(runs[name], method)
            rows.append(row)
            cells = [_loo_and_test(row[method]) if method in row else "" for method in TRAINED_BY]
            name = ", ".join(f"{key} {value:g}" for key, value in changed.items() if key != "sgd_lr")
            lines.append((name or "as benchmarked", f"{row['remaining_weight_of_hess_init']:.2f}", *cells))
    command = f"python -m benchmarks.digits_settings --seed {settings.seed}"
    write_json(out / "settings.json", {**provenance(command, settings.seed), "variations": rows})
    print_table(
        "Leave-one-out and test loss at the end, and their mean relative distance over the epochs",
        ("", "β2^T", *TRAINED_BY),
        lines,
    )


def _loo_and_test(row: dict[str, float]) -> str:
    return f"{row['loo_loss']:.3f} {row['test_loss']:.3f} ({row['mean_relative_gap']:.0%})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="print the held-out loss of each learning rate and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "digits", help="the folder of settings.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small
    settings = Settings(seed=arguments.seed)
    if arguments.tune:
        tune(settings)
    else:
        vary(settings, arguments.out)


if __name__ == "__main__":
    main()
