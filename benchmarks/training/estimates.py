"""Every estimate of what removing an example would change, at the same weights of the same network.

Posteriors predict the change itself, in its own units: Σ_c |Λ V e|_c of the probabilities (Nickl et al., 2023,
arXiv:2310.19273, Eq. 13) and ℓ(y, f + V e) - ℓ(y, f) of the own loss. Gradient norm, EL2N and TracIn are scores: they
only rank, the same for both.

A retraining that goes on for a time moves the network as far as that time allows: the "stopped" posteriors know it.

Each optimizer gets its state by running on from the given weights with a learning rate of zero. So its mean stays
there, and all are asked about the same network. A variational one averages the curvature over its draws, where that is
not the curvature at the mean; "at the mean" is the same optimizer with draws a hundredth as wide, by ess, while its
sensitivities stay on the scale of the data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.problems.batches import Batches, batches
from benchmarks.reference import laplace
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.protocol import Posterior
from vlearn.posterior import from_laplace, from_optimizer
from vlearn.sensitivity import measures
from vlearn.sensitivity.table import SensitivityTable

NARROW = 1e4  # times the effective sample size


@dataclass(frozen=True)
class Estimate:
    """What one method says of every example.

    Attributes:
        probabilities: ``[N]`` |Δp|₁ of the example's own probabilities.
        own_loss: ``[N]`` change of its own loss, nats.
        score: the numbers have no units, and are the same for both.
    """

    probabilities: np.ndarray
    own_loss: np.ndarray
    score: bool = False


@dataclass(frozen=True)
class Held:
    """How long optimizers run at the weights they are held at, and IVON's own settings there.

    Attributes:
        training_time: of the retraining that is to be predicted; None where that goes to the end.
    """

    epochs: int
    batch: int
    prior_precision: float
    hess_init: float
    beta2: float
    seed: int = 0
    training_time: float | None = None


def change(table: SensitivityTable) -> np.ndarray:
    """Predicted change of each example's own loss if it is removed, ``[N]`` nats."""
    return (table.loo_loss - table.loss).double().numpy()


def evenly_ranked(values: np.ndarray, count: int) -> np.ndarray:
    """The examples at ``count`` evenly spaced ranks of the values ``[N]``, from the smallest to the largest."""
    places = np.linspace(0, len(values) - 1, count).round().astype(int)
    return np.argsort(values, kind="stable")[places]


def by_posterior(model: nn.Module, posterior: Posterior, batches: Batches, refined: bool = False) -> Estimate:
    """What a posterior predicts at the model's weights."""
    table = vlearn.sweep(model, posterior, batches, F.cross_entropy, None, progress=False, refined=refined)
    return by_deviation(model, table.deviation, batches)


def by_deviation(model: nn.Module, deviation: Tensor, batches: Batches) -> Estimate:
    """What a change ``[N, C]`` of each example's outputs means for its probabilities and its loss."""
    output, y = outputs(model, batches).double(), torch.cat([y.cpu() for _, y in batches])
    p, deviation = output.softmax(1), deviation.double()
    moved = p * (deviation - (p * deviation).sum(1, keepdim=True))  # ΛΔf, Λ = diag p - p pᵀ
    left_out, loss = (F.cross_entropy(each, y, reduction="none") for each in (output + deviation, output))
    return Estimate(moved.abs().sum(1).numpy(), (left_out - loss).numpy())


@torch.no_grad()
def outputs(model: nn.Module, batches: Batches) -> Tensor:
    """The outputs ``[N, C]`` of all examples, on the CPU."""
    return torch.cat([model(x).cpu() for x, _ in batches])


def posteriors(model: nn.Module, x: Tensor, y: Tensor, held: Held) -> dict[str, Callable[[], Posterior]]:
    """By name, functions that make each posterior at the model's weights.

    "stopped" are those that know how long the retraining goes on, see `vlearn.gaussians.stopped_training`.
    """
    num_data, decay = len(y), held.prior_precision / len(y)

    def run(make: Callable[[nn.Module, torch.Generator], Any]) -> tuple[Any, nn.Module]:
        torch.manual_seed(held.seed)
        copied = copy.deepcopy(model).train()
        optimizer = make(copied, torch.Generator(y.device).manual_seed(held.seed))
        order = torch.Generator().manual_seed(held.seed)
        for _ in range(held.epochs):
            for index in torch.randperm(num_data, generator=order).split(held.batch):
                index = index.to(y.device)
                optimizer.zero_grad()
                F.cross_entropy(copied(x[index]), y[index]).backward()
                optimizer.step()
        return optimizer, copied

    def variational(make: Callable[..., Any], **settings: Any) -> Callable[[], Gaussian]:
        common = {"lr": 0.0, "ess": num_data, "weight_decay": decay, **settings}

        def posterior() -> Gaussian:
            optimizer, _ = run(lambda copied, generator: make(copied, **common, generator=generator))
            state = optimizer.posterior().clone()
            optimizer.unwatch()
            return state

        return posterior

    def adam() -> Posterior:
        optimizer, copied = run(lambda copied, _: torch.optim.Adam(copied.parameters(), lr=0.0, weight_decay=decay))
        return from_optimizer(optimizer, copied, num_data, held.prior_precision)

    def fitted(structure: str) -> Callable[[], Posterior]:
        return lambda: from_laplace(laplace.fit(model, x, y, structure, held.prior_precision))

    def fit(structure: str) -> Callable[[], Gaussian]:
        draws = torch.Generator(y.device).manual_seed(held.seed)
        told = {"prior_precision": held.prior_precision, "generator": draws, "progress": False}
        return lambda: vlearn.posterior.fit(model, batches(x, y), F.cross_entropy, structure, **told)

    narrow = {"ess": NARROW * num_data, "num_data": num_data}
    made: dict[str, Callable[[], Any]] = {
        "IVON": variational(vlearn.IVON, hess_init=held.hess_init, beta2=held.beta2),
        "VON": variational(vlearn.VON),
        "VON, at the mean": variational(vlearn.VON, **narrow),
        "Laplace, diagonal": fitted("diag"),
        "Laplace, Kronecker": fitted("kron"),
        "Adam": adam,
        "KFACVON": variational(vlearn.KFACVON),
        "KFACVON, at the mean": variational(vlearn.KFACVON, **narrow),
        "fit, K-FAC": fit("kronecker"),
        "fit, EK-FAC": fit("eigenvalue-corrected"),
    }
    if (time := held.training_time) is not None:
        for name in ("IVON", "KFACVON", "fit, K-FAC", "fit, EK-FAC"):
            made[f"{name}, stopped"] = lambda make=made[name]: make().stopped_at(time)
    return made


def scores(
    model: nn.Module, batches: Batches, snapshots: Sequence[Mapping[str, Tensor]], rates: Sequence[float]
) -> dict[str, Estimate]:
    """The measures without a posterior; TracIn sums over the snapshots of training."""
    values_by_measure = {
        "gradient norm": measures.gradient_norm(model, batches, F.cross_entropy),
        "EL2N": measures.el2n(model, batches, F.cross_entropy),
        "TracIn": measures.tracin(model, snapshots, batches, F.cross_entropy, rates),
    }
    return {name: Estimate(*(2 * (values.double().numpy(),)), score=True) for name, values in values_by_measure.items()}
