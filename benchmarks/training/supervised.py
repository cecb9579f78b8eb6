"""Training of a classifier on images, saved after every epoch.

The objective is Σ_i ℓ(y_i, f_i(θ)) + δ‖θ‖²/2 whichever optimizer minimises it: each works on its mean over the
data, with weight decay δ/N.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.problems.images import Images
from benchmarks.report.pictures import IVON, KRONECKER
from benchmarks.training.checkpoint import Checkpoint, set_training_state, training_state

TRAINERS = {"SGD": KRONECKER, "IVON": IVON}  # the posterior after each: a Laplace fit, or its own state


def steps(num_data: int, epochs: int, batch: int) -> int:
    """Number of optimizer steps of a whole run."""
    return epochs * -(-num_data // batch)


def ivon(
    model: nn.Module,
    num_data: int,
    total_steps: int,
    *,
    prior_precision: float,
    lr: float,
    hess_init: float,
    beta2: float,
    beta2_warmup: float | None = None,
) -> tuple[vlearn.IVON, Any]:
    """IVON with its schedule, along which the rate falls to zero as a cosine."""
    optimizer = vlearn.IVON(
        model,
        lr=lr,
        ess=num_data,
        hess_init=hess_init,
        beta2=beta2,
        beta2_warmup=beta2_warmup,
        weight_decay=prior_precision / num_data,
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def sgd(
    model: nn.Module, num_data: int, total_steps: int, *, prior_precision: float, lr: tuple[float, float]
) -> tuple[torch.optim.SGD, Any]:
    """SGD with momentum and its schedule, a cosine from the first rate to the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr[0], momentum=0.9, weight_decay=prior_precision / num_data)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps, eta_min=lr[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained by "IVON" and by "SGD"; what a script adds to it is an experiment.

    Attributes:
        lr, hess_init: IVON's; the rate falls to zero along a cosine.
        remaining: weight that hess_init still has at the end of IVON's run, β₂ᵗ; gives β₂ for any number of steps.
        beta2_warmup: of a run whose Hessian is a running average at first.
        sgd_lr: first and last rate of SGD with momentum .9, along a cosine.
        num_data, num_test: the first examples of either half; None for all.
    """

    title: str
    dataset: str
    network: str
    epochs: int
    batch: int
    lr: float
    hess_init: float
    remaining: float
    sgd_lr: tuple[float, float]
    num_data: int | None = None
    num_test: int | None = None
    beta2_warmup: float | None = None

    def cut(self, epochs: int) -> Recipe:
        """The same with another number of epochs."""
        return dataclasses.replace(self, epochs=epochs)

    def beta2(self, total_steps: int) -> float:
        """IVON's decay of the Hessian."""
        return self.remaining ** (1 / total_steps)

    def training(
        self,
        trainer: str,
        model: nn.Module,
        data: Images,
        *,
        prior_precision: float,
        seed: int,
        file: Path,
        epochs: int | None = None,
    ) -> Training:
        """The run by one of the trainers, saved in a file that tells the settings it was saved with.

        Args:
            trainer: "IVON" or "SGD".
            model: starts at its present weights.
            prior_precision: δ on the scale of the summed loss.
            epochs: instead of the recipe's own.
        """
        epochs = epochs or self.epochs
        total = steps(len(data.y), epochs, self.batch)
        if trainer == "IVON":
            own = {"lr": self.lr, "hess_init": self.hess_init, "beta2": self.beta2(total)}
            made = ivon(
                model, len(data.y), total, prior_precision=prior_precision, beta2_warmup=self.beta2_warmup, **own
            )
        else:
            made = sgd(model, len(data.y), total, prior_precision=prior_precision, lr=self.sgd_lr)
        others = {"IVON": {"sgd_lr"}, "SGD": {"lr", "hess_init", "remaining", "beta2_warmup"}}[trainer]
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)} | {
            "trainer": trainer,
            "prior_precision": prior_precision,
            "seed": seed,
            "epochs": epochs,
            "num_data": len(data.y),
        }
        settings = {name: value for name, value in settings.items() if name not in others}
        return Training(
            model, *made, data, batch=self.batch, epochs=epochs, seed=seed, checkpoint=Checkpoint(file, settings)
        )


class Training:
    """One network in training, which goes on from the last epoch that was saved.

    Iterating trains an epoch and gives its number; once the loop's body is through with it, everything is saved.

    Args:
        model, optimizer, schedule: as they are before the first epoch.
        data: what is trained on; its test half is not touched.
        batch: examples of a step.
        epochs: of the whole run.
        seed: of the order of the examples.
        checkpoint: where the state is.
        recorded: what the loop's body adds to; it is saved with the state.

    Attributes:
        recorded: the same, as it was saved last; "seconds" has those of training, by epoch.
        done: epochs that were saved before.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        data: Images,
        *,
        batch: int,
        epochs: int,
        seed: int,
        checkpoint: Checkpoint,
        recorded: dict[str, Any] | None = None,
    ):
        self.model, self.optimizer, self.schedule, self.data = model, optimizer, schedule, data
        self.batch, self.epochs, self.checkpoint = batch, epochs, checkpoint
        self.order = torch.Generator().manual_seed(seed)
        self.recorded: dict[str, Any] = {**(recorded or {}), "seconds": []}
        self.done = 0
        if (saved := checkpoint.load()) is not None:
            set_training_state(saved, model, optimizer, schedule, self.order)
            self.recorded, self.done = saved["found"], saved["done"]

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self.done + 1, self.epochs + 1):
            began = time.perf_counter()
            for index in torch.randperm(len(self.data.y), generator=self.order).split(self.batch):
                index = index.to(self.data.x.device)
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(self.data.x[index]), self.data.y[index]).backward()
                self.optimizer.step()
                self.schedule.step()
            self.recorded["seconds"].append(time.perf_counter() - began)
            yield epoch
            self._save(epoch)

    def close(self) -> None:
        """Take IVON's hooks off the model."""
        if isinstance(self.optimizer, vlearn.IVON):
            self.optimizer.unwatch()

    def _save(self, epoch: int) -> None:
        self.checkpoint.save(
            {
                **training_state(self.model, self.optimizer, self.schedule, self.order),
                "found": self.recorded,  # named as in the files of earlier runs
                "done": epoch,
            }
        )
        self.done = epoch
