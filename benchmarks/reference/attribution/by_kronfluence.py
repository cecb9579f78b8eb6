"""kronfluence: influence functions by EK-FAC (Grosse et al., 2023, arXiv:2308.03296) and K-FAC."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.reference.attribution.method import Method, Scorer, Subject
from vlearn._extras import require

CHUNK = 256


@dataclass(frozen=True)
class Factors:
    """A network with its factors, which lie in a folder as long as this lives."""

    analyzer: Any
    train: TensorDataset
    folder: tempfile.TemporaryDirectory[str]


def factors(subject: Subject, strategy: str) -> Factors:
    """The Fisher matrix of a network by "ekfac" or "kfac"."""
    analyzers, arguments = _kronfluence("analyzer"), _kronfluence("arguments")
    task = _task(subject)
    model = analyzers.prepare_model(subject.own_model(), task)
    folder, train = tempfile.TemporaryDirectory(), TensorDataset(subject.x, subject.y)
    with _quiet():
        analyzer = analyzers.Analyzer(
            "attribution", model, task, cpu=True, output_dir=folder.name, disable_tqdm=True, disable_model_save=True
        )
        torch.manual_seed(0)  # of the sampled labels
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=CHUNK,
            factor_args=arguments.FactorArguments(strategy=strategy),
            overwrite_output_dir=True,
        )
    return Factors(analyzer, train, folder)


def influence(subject: Subject, factors: Factors, damping: float | None) -> Scorer:
    """Gradients times the inverse of the Fisher matrix with damping.

    Args:
        damping: added to the eigenvalues; None is a tenth of their mean, layer by layer.
    """
    arguments = _kronfluence("arguments")

    def score(x: Tensor, y: Tensor) -> Tensor:
        with _quiet():
            factors.analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                TensorDataset(x, y),
                factors.train,
                per_device_query_batch_size=CHUNK,
                per_device_train_batch_size=CHUNK,
                score_args=arguments.ScoreArguments(damping_factor=damping),
                overwrite_output_dir=True,
            )
            return factors.analyzer.load_pairwise_scores("scores")["all_modules"].T.contiguous()

    return score


DAMPING = [{"damping": value} for value in (1e-8, None, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)]
METHODS = (
    Method(
        "influence, EK-FAC",
        "kronfluence",
        influence,
        DAMPING,
        prepare=partial(factors, strategy="ekfac"),
        averaged=True,
        removed=True,
    ),
    Method("influence, K-FAC", "kronfluence", influence, DAMPING, prepare=partial(factors, strategy="kfac")),
)


def _kronfluence(module: str) -> Any:
    return require(f"kronfluence.{module}", "attribution", "benchmarks.attribution")


def _task(subject: Subject) -> Any:
    class Task(_kronfluence("task").Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            output = model(x)
            if sample:
                y = _sampled(output.detach(), subject.regression)
            return subject.loss(output, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Task()


def _sampled(output: Tensor, regression: bool) -> Tensor:
    """Targets drawn from the model: (f - y)² is the negative log-likelihood of a variance of one half."""
    if regression:
        return torch.normal(output, std=0.5**0.5)
    return torch.multinomial(F.softmax(output, -1), 1).flatten()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its notes on every step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
