"""captum: TracIn over snapshots (Pruthi et al., 2020)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.reference.attribution.method import Method, Scorer, Subject
from vlearn._extras import require

CHUNK = 256


def tracin(subject: Subject) -> Scorer:
    """Every snapshot's gradients, with the learning rate as weight."""
    captum = require("captum.influence", "attribution", "benchmarks.attribution")

    def load(model: nn.Module, snapshot: Any) -> float:
        model.load_state_dict(snapshot)
        return subject.lr

    traced = captum.TracInCP(
        subject.own_model(),
        TensorDataset(subject.x, subject.y),
        list(subject.snapshots),
        checkpoints_load_func=load,
        loss_fn=partial(subject.loss, reduction="sum"),
        batch_size=CHUNK,
        sample_wise_grads_per_batch=True,
    )

    def score(x: Tensor, y: Tensor) -> Tensor:
        return traced.influence((x, y)).T.contiguous()

    return score


METHODS = (Method("TracInCP", "captum", tracin),)
