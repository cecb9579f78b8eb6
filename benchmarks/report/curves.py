"""The losses of one training run over its epochs, and how well leave-one-out follows the test loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.report.agreement import agreement


@dataclass
class Curves:
    """Mean losses of one training run in nats; ``loo_loss`` and ``seconds`` by method."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)  # standard error of test_loss
    test_accuracy: list[float] = field(default_factory=list)
    loo_loss: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # fit, if there is one, and sweep


def losses(curves: Curves, method: str) -> dict[str, float]:
    """Leave-one-out against test loss, over the epochs and at the end."""
    loo, test = np.array(curves.loo_loss[method]), np.array(curves.test_loss)
    return {
        "mean_absolute_gap": np.abs(loo - test).mean(),
        "mean_relative_gap": (np.abs(loo - test) / test).mean(),
        "pearson_over_epochs": agreement(loo, test)[0],
        "train_loss": curves.train_loss[-1],
        "loo_loss": loo[-1],
        "test_loss": test[-1],
        "test_loss_standard_error": curves.test_error[-1],
        "test_accuracy": curves.test_accuracy[-1],
    }
