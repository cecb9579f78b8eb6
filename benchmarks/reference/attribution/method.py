"""What a method of data attribution is given, and what it gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]
# Attributions [N, Q] of queries x, y: positive where the training example lowers the query's loss, on any scale.
Scorer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A network that SGD has trained, and what it was trained on.

    Attributes:
        model: the network at its last weights.
        snapshots: weights from the course of training, evenly spaced, the last ones at the end.
        x, y: the training examples.
        loss: of torch.nn.functional, the mean over a minibatch is minimised.
        lr, weight_decay: SGD's.
        training_time: η = Σ_t lr/(1 - momentum).
        first: the weights before training.
        batch, epochs: of the training, for methods that train a network of their own.
        seed: that it was trained with.
    """

    model: nn.Module
    snapshots: Sequence[Mapping[str, Tensor]]
    x: Tensor
    y: Tensor
    loss: Callable[..., Tensor]
    lr: float
    weight_decay: float
    training_time: float
    first: Mapping[str, Tensor]
    batch: int
    epochs: int
    seed: int

    @property
    def regression(self) -> bool:
        return self.loss is F.mse_loss

    def own_model(self) -> nn.Module:
        """A copy, which may be hooked or wrapped."""
        return copy.deepcopy(self.model).eval()


@dataclass(frozen=True)
class Method:
    """One way to attribute.

    Attributes:
        name: what its row is called.
        by: whose implementation it is, a package.
        make: (subjects, setting) -> a function from queries to attributions; whatever does not depend on the queries
            is done here. Several subjects, trained alike from other weights, give one answer for all.
        settings: keyword arguments of `make` to choose among, the recommended ones first.
        prepare: what no setting changes, of one network; given to `make` after the subject.
        own_ensemble: several networks are averaged in a way of its own; else by the mean of their attributions.
        averaged: it is run on several networks too.
        removed: its top examples are removed too.
    """

    name: str
    by: str
    make: Callable[..., Scorer]
    settings: Sequence[dict[str, Any]] = field(default_factory=lambda: [{}])
    prepare: Callable[[Subject], Any] | None = None
    own_ensemble: bool = False
    averaged: bool = False
    removed: bool = False

    def scorer(self, subjects: Sequence[Subject], setting: dict[str, Any], prepared: Any = None) -> Scorer:
        """Attributions by one network, or averaged over several.

        Args:
            prepared: what `prepare` gave for the only one of them; default: it is made.
        """
        if self.own_ensemble:
            return self.make(subjects, **setting)
        scorers = [self._of(subject, setting, prepared) for subject in subjects]
        return lambda x, y: torch.stack([scorer(x, y) for scorer in scorers]).mean(0)

    def _of(self, subject: Subject, setting: dict[str, Any], prepared: Any) -> Scorer:
        if self.prepare is None:
            return self.make(subject, **setting)
        return self.make(subject, self.prepare(subject) if prepared is None else prepared, **setting)
