"""Scores of predicted probabilities, and the ways to predict them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.problems.batches import CHUNK, batches
from benchmarks.training.calibration import calibration_error
from vlearn.gaussians.protocol import Posterior


def scores(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, mean negative log-likelihood in nats and expected calibration error of ``[N, C]`` probabilities."""
    right = probabilities.argmax(1) == y
    own = probabilities.double().gather(1, y.unsqueeze(1)).clamp_min(1e-30)
    return {
        "accuracy": right.double().mean().item(),
        "nll": -own.log().mean().item(),
        "ece": calibration_error(probabilities.amax(1), right),
    }


@torch.no_grad()
def at_mean(model: nn.Module, x: Tensor) -> Tensor:
    """``[N, C]`` probabilities at the model's weights."""
    model.eval()
    return torch.cat([model(rows).softmax(1) for rows in x.split(CHUNK)])


def by_draws(model: nn.Module, posterior: Posterior, x: Tensor, draws: int) -> Tensor:
    """``[N, C]`` probabilities averaged over draws of the weights, the same for all examples."""
    return torch.cat(
        [
            vlearn.predict(model, posterior, rows, draws, generator=torch.Generator(x.device).manual_seed(0))
            for rows in x.split(CHUNK)
        ]
    )


def linearised(model: nn.Module, posterior: Posterior, x: Tensor, y: Tensor, draws: int) -> Tensor:
    """``[N, C]`` probabilities averaged over draws of the output, f ~ N(f(m), J Σ Jᵀ): how a Laplace fit predicts.

    (Immer, Korzepa, Bauer, 2021, arXiv:2008.08400; laplace-torch's pred_type="glm".) The labels are not used.
    """
    table = vlearn.sweep(model, posterior, batches(x, y), F.cross_entropy, None, progress=False, variance=True)
    assert table.function_variance is not None
    variance = table.function_variance.double()  # [N, C, C]
    values, vectors = torch.linalg.eigh((variance + variance.mT) / 2)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    with torch.no_grad():
        output = torch.cat([model(rows) for rows in x.split(CHUNK)]).cpu().double()
    noise = torch.randn(draws, *output.shape, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (output + (root @ noise).squeeze(3)).softmax(2).mean(0).to(x.device)
