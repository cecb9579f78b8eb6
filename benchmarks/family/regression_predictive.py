"""The predictive of a small network on a regression in one dimension, against Hamiltonian Monte Carlo.

A network with one hidden layer of tanh, 40 points in two clusters, known noise. The reference is long-run: many chains
over all weights, whose agreement is reported (split R̂ of the function over the grid). A variational method's band comes
from draws of the weights, that of the Laplace approximation from the linearised network (laplace-torch's predictive).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.training.loop import finish

HIDDEN = 20
NOISE = 0.1  # standard deviation
# The targets are scaled so that mean squared error is the negative log-likelihood, whose noise variance is then 1/2.
SCALE = NOISE * math.sqrt(2)
PRIOR_PRECISION = 0.2
REFERENCE, LAPLACE = "Hamiltonian Monte Carlo", "MAP + Laplace, Kronecker"
CLUSTERS = ((-1.8, -0.6), (0.6, 1.8))


@dataclasses.dataclass(frozen=True)
class Band:
    """Mean and standard deviation of the function over a grid ``[G]``, in the targets' units."""

    mean: Tensor
    deviation: Tensor


def data() -> tuple[Tensor, Tensor, Tensor]:
    """The inputs ``[40, 1]``, the targets ``[40, 1]`` and the grid ``[121, 1]`` on which bands are compared."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([low + (high - low) * torch.rand(20, 1, generator=generator) for low, high in CLUSTERS])
    y = torch.sin(2.5 * x) + 0.3 * x + NOISE * torch.randn(40, 1, generator=generator)
    return x, y, torch.linspace(-3, 3, 121).unsqueeze(1)


def network() -> nn.Sequential:
    """One hidden layer of tanh with fixed initial weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def function(weights: Tensor, x: Tensor) -> Tensor:
    """Outputs ``[K, N]`` of K networks whose weights are the rows ``[K, 3·HIDDEN + 1]``."""
    inner, shift, outer, last = weights.split([HIDDEN, HIDDEN, HIDDEN, 1], 1)
    hidden = torch.tanh(inner.unsqueeze(1) * x + shift.unsqueeze(1))  # [K, N, HIDDEN]
    return (hidden @ outer.unsqueeze(2)).squeeze(2) + last


def hamiltonian(
    energy: Callable[[Tensor], Tensor], start: Tensor, warm_up: int, kept: int, leaps: int, seed: int = 0
) -> tuple[Tensor, float]:
    """Hamiltonian Monte Carlo in parallel chains (Neal, 2011, arXiv:1206.1901).

    Args:
        energy: rows ``[K, P]`` -> negative log densities ``[K]``.
        start: one row for each chain.
        warm_up: iterations that are thrown away, in which the step size moves to an acceptance of 0.8.
        leaps: of the leapfrog integrator, at most; each trajectory takes half of them or more.
    Returns:
        Draws ``[kept, K, P]`` and the mean acceptance.
    """
    generator = torch.Generator().manual_seed(seed)
    place, size, accepted, draws = start, 0.1, 0.0, []

    def look(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        value = energy(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), slope

    value, slope = look(place)
    for iteration in range(warm_up + kept):
        momentum = torch.randn(place.shape, generator=generator, dtype=place.dtype)
        moved, moved_value, moved_slope, p = place, value, slope, momentum - size / 2 * slope
        count = int(torch.randint(leaps // 2, leaps + 1, (), generator=generator))
        for leap in range(count):
            moved = moved + size * p
            moved_value, moved_slope = look(moved)
            p = p - (size if leap < count - 1 else size / 2) * moved_slope
        change = value - moved_value + (momentum.square() - p.square()).sum(1) / 2
        taken = change.nan_to_num(-math.inf).exp() > torch.rand(len(place), generator=generator, dtype=place.dtype)
        place = torch.where(taken.unsqueeze(1), moved, place)
        value, slope = torch.where(taken, moved_value, value), torch.where(taken.unsqueeze(1), moved_slope, slope)
        if iteration < warm_up:
            acceptance = change.nan_to_num(-math.inf).exp().clamp(max=1).mean().item()
            size *= math.exp(0.5 * (acceptance - 0.8) / math.sqrt(iteration + 1))
        else:
            draws.append(place)
            accepted += taken.double().mean().item() / kept
    return torch.stack(draws), accepted


def disagreement(values: Tensor) -> Tensor:
    """Split R̂ ``[G]`` of draws ``[S, K, G]`` in K chains (Gelman et al., Bayesian Data Analysis, 2013, 11.4)."""
    half = len(values) // 2
    chains = torch.cat([values[:half], values[half : 2 * half]], 1)
    within, between = chains.var(0).mean(0), chains.mean(0).var(0)
    return ((within * (half - 1) / half + between) / within).sqrt()


def reference(chains: int, warm_up: int, kept: int) -> tuple[Band, dict[str, float]]:
    """The band of the exact posterior, and how well the chains agree."""
    x, y, grid = (tensor.double() for tensor in data())

    def energy(weights: Tensor) -> Tensor:
        misfit = (function(weights, x) - (y / SCALE).squeeze(1)).square().sum(1)
        return misfit + PRIOR_PRECISION * weights.square().sum(1) / 2

    start = torch.randn(chains, 3 * HIDDEN + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws, accepted = hamiltonian(energy, start, warm_up, kept, leaps=30)
    values = torch.stack([function(rows, grid) for rows in draws[:: max(1, kept // 400)]]) * SCALE
    band = Band(values.mean((0, 1)), values.std((0, 1)))
    return band, {"acceptance": accepted, "largest_split_r_hat": disagreement(values).max().item()}


def optimizers() -> dict[str, Callable[..., Any]]:
    """By name, functions from a model and settings to an optimizer whose rate trains it in a few thousand steps."""
    gaussian = {"likelihood": "gaussian"}
    makers: dict[str, Callable[..., Any]] = {
        "IVON": lambda model, **settings: vlearn.IVON(model, lr=0.03, hess_init=1.0, beta2=0.9995, **settings),
        "VON": lambda model, **settings: vlearn.VON(model, lr=0.03, beta2=0.999, **gaussian, **settings),
        "VOGN": lambda model, **settings: vlearn.VOGN(model, lr=0.1, beta2=0.99, **settings),
        "FullVON": lambda model, **settings: vlearn.FullVON(model, lr=0.1, beta2=0.999, **gaussian, **settings),
    }
    for name, corrected in {"KFACVON": False, "EK-FAC": True}.items():
        makers[name] = lambda model, corrected=corrected, **settings: vlearn.KFACVON(
            model, lr=0.03, beta2=0.999, eigenvalue_correction=corrected, **gaussian, **settings
        )
    return makers


def trained(name: str, steps: int) -> Band:
    """The band of a variational method, by 512 draws."""
    x, y, grid = data()
    model = network()
    optimizer = optimizers()[name](
        model,
        ess=len(y),
        weight_decay=PRIOR_PRECISION / len(y),
        generator=torch.Generator().manual_seed(0),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y / SCALE).backward()
        optimizer.step()
        schedule.step()
    moments = vlearn.predict(
        model,
        optimizer.posterior(),
        grid,
        draws=512,
        link=lambda output: torch.cat([output, output.square()], 1).double() * SCALE,
        generator=torch.Generator().manual_seed(0),
    )
    finish(optimizer)
    mean, square = moments[:, 0], moments[:, 1] * SCALE
    return Band(mean, (square - mean.square()).clamp_min(0).sqrt())


def laplace_band(steps: int) -> Band:
    """laplace-torch's own predictive at the minimum that Adam finds."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    x, y, grid = data()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        prior = sum(p.square().sum() for p in model.parameters()) * PRIOR_PRECISION / 2
        (F.mse_loss(model(x), y / SCALE) + prior / len(y)).backward()
        optimizer.step()
        schedule.step()
    la = Laplace(model, "regression", "all", "kron", sigma_noise=math.sqrt(0.5), prior_precision=PRIOR_PRECISION)
    la.fit(DataLoader(TensorDataset(x, y / SCALE), batch_size=len(y)))
    mean, variance = la(grid)
    return Band(mean.detach().double().squeeze(1) * SCALE, variance.detach().double().flatten().sqrt() * SCALE)


def distances(band: Band, truth: Band, grid: Tensor) -> dict[str, float]:
    """How far a band is off: its mean in the reference's deviations, its width as a multiple, at data and between."""
    at_data = sum(((grid >= low) & (grid <= high)) for low, high in CLUSTERS).bool().squeeze(1)
    between = ((grid > CLUSTERS[0][1]) & (grid < CLUSTERS[1][0])).squeeze(1)
    ratio = (band.deviation / truth.deviation).log()
    return {
        "mean_off_at_data": ((band.mean - truth.mean).abs() / truth.deviation)[at_data].mean().item(),
        "width_at_data": ratio[at_data].mean().exp().item(),
        "width_between": ratio[between].mean().exp().item(),
    }


def compare(
    steps: int = 4000,
    chains: int = 24,
    warm_up: int = 600,
    kept: int = 1000,
    advance: Callable[[str], None] = lambda said: None,
) -> dict[str, Any]:
    """Every band, and its distances from the reference.

    Returns:
        {"bands": by name, the reference first, "chains": how well they agree, "distances": by name}.
    """
    truth, agreement = reference(chains, warm_up, kept)
    advance("regression: long-run reference sampled")
    bands = {REFERENCE: truth, LAPLACE: laplace_band(steps)}
    for name in optimizers():
        bands[name] = trained(name, steps)
        advance(f"regression: {name} trained")
    grid = data()[2]
    off = {name: distances(band, truth, grid) for name, band in bands.items() if name != REFERENCE}
    return {"bands": bands, "chains": agreement, "distances": off}
