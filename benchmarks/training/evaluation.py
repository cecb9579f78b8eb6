"""Losses, posterior and leave-one-out loss of a trained image classifier."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.problems.batches import CHUNK, batches
from benchmarks.problems.images import Images
from benchmarks.reference import laplace
from benchmarks.report.pictures import DIAGONAL, KRONECKER
from benchmarks.training.supervised import Training
from vlearn.gaussians.protocol import Posterior

STRUCTURES = {DIAGONAL: "diag", KRONECKER: "kron"}  # of laplace-torch's fits, by method


@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses of a model at its weights, in nats, and whether each example is classified right."""

    train: Tensor
    test: Tensor
    right: Tensor

    @property
    def test_error(self) -> float:
        """Standard error of the mean test loss."""
        return (self.test.std() / len(self.test) ** 0.5).item()


def measure(model: nn.Module, data: Images) -> Losses:
    """Every example's loss, of both halves, in eval mode and float64."""
    train, _ = example_losses(model, data.x, data.y)
    test, right = example_losses(model, data.x_test, data.y_test)
    return Losses(train, test, right)


@torch.no_grad()
def example_losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's cross-entropy ``[N]`` in eval mode, and whether it is classified right."""
    training = model.training
    model.eval()
    output = torch.cat([model(rows) for rows in x.split(CHUNK)])
    model.train(training)
    return F.cross_entropy(output, y, reduction="none").double(), (output.argmax(1) == y).double()


def posterior_after(training: Training, prior_precision: float) -> Posterior:
    """IVON's own state, or a Kronecker Laplace approximation at the weights that SGD found."""
    if isinstance(training.optimizer, vlearn.IVON):
        return training.optimizer.posterior()
    return laplace_posterior(training.model, training.data, "kron", prior_precision)


def stopped_fit(training: Training, prior_precision: float) -> Posterior:
    """K-FAC's posterior at the weights that SGD found, which knows for how long it was trained."""
    data = training.data
    count = len(training.recorded["seconds"]) * -(-len(data.y) // training.batch)
    return vlearn.posterior.fit(
        training.model,
        batches(data.x, data.y),
        F.cross_entropy,
        prior_precision=prior_precision,
        generator=torch.Generator(data.x.device).manual_seed(0),
        training_time=vlearn.posterior.training_time(training.optimizer, count, training.schedule),
        progress=False,
    )


def laplace_posterior(model: nn.Module, data: Images, structure: str, prior_precision: float) -> Posterior:
    """A Laplace approximation of laplace-torch at the model's weights: "diag" or "kron"."""
    return vlearn.posterior.from_laplace(laplace.fit(model, data.x, data.y, structure, prior_precision, batch=256))


def loo_loss(model: nn.Module, posterior: Posterior, data: Images) -> float:
    """Mean leave-one-out loss of the training examples, in nats."""
    table = vlearn.sweep(model, posterior, batches(data.x, data.y), F.cross_entropy, leverage=None, progress=False)
    return table.loo_loss.double().mean().item()
