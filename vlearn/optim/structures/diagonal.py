"""A diagonal precision: its state, the draws from it, the posterior.

Per parameter the state is the Hessian diagonal h of the mean per-example loss, without the weight decay wd, and the
momentum of the gradient; the posterior precision is num_data·(h + wd), draws have ess·(h + wd).
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from vlearn.gaussians import Diagonal
from vlearn.gaussians.gaussian import Gaussian
from vlearn.optim.kernels.compiled import flat, kernel
from vlearn.optim.kernels.entries import as_real
from vlearn.optim.kernels.multi_tensor import copied, read
from vlearn.optim.kernels.nonfinite import is_low_precision
from vlearn.optim.kernels.threefry import new_key, normals
from vlearn.optim.parameters.options import tempered_ess_and_decay
from vlearn.optim.parameters.parameters import ByName, Group, Parameters, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.protocols import PosteriorContext
from vlearn.optim.structures.prior import decay_of, diagonal_prior, prior_means, rate_of
from vlearn.per_example.gradients import sums_of_squares
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.sharded.tensors import whole


class DiagonalStructure:
    """A `Structure` with a diagonal Hessian.

    Args:
        parameters: those of the optimizer, with their state.
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters

    def init_states(self) -> None:
        """See `Structure`."""
        for group in self.parameters.groups:
            capturable = group.get("capturable", False)
            for p in group["params"]:
                if p.requires_grad and not self.parameters.has_state(p):
                    self.parameters.state[p].update(initial_state(p, group["hess_init"], capturable))
                elif capturable and p.requires_grad and self.parameters.state[p]["step"].device != p.device:
                    self.parameters.state[p]["step"] = self.parameters.state[p]["step"].to(p.device)

    def take_prior(self, prior: Gaussian, named: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """See `Structure`; the diagonal of its precision."""
        return diagonal_prior(prior, named)

    def is_whole(self, p: Tensor) -> bool:
        """See `Structure`."""
        return False

    def draw_block(self, block: SliceBlock, noise: Noise) -> None:
        """Write m + ε/√(ess·(h + wd)) into the weights."""
        self.draw_slices(block.group, block.slices, noise)

    def draw_slices(
        self, group: Group, slices: list[ParameterSlice], noise: Noise, normals: list[Tensor] | None = None
    ) -> None:
        """As `draw_block` for some slices of a block.

        Args:
            normals: ε, in the shapes of the slices, if it has been drawn.
        """
        low_precision = is_low_precision(slices[0].weights)  # then the draw is made around the master mean and rounded
        samples = [piece.exact_mean(self.parameters) if low_precision else piece.weights for piece in slices]
        samples = copied(samples, samples[0].dtype) if low_precision else samples
        hessians = self.state_of(slices, "hessian")
        ess, decay = tempered_ess_and_decay(group)[0], decay_of(self.parameters, group, slices)
        compiled = group.get("compiled") and normals is None and not noise.is_by_place
        if not (compiled and _draw_compiled(samples, hessians, noise.on(hessians[0].device), ess, decay.rate)):
            columns = [samples, hessians, noise.normal(slices, hessians) if normals is None else normals]
            if use_foreach(group, slices):
                draw_normal(*columns, ess=ess, weight_decay=decay.rate)
            else:
                for i, row in enumerate(zip(*columns, strict=True)):
                    draw_normal(*([t] for t in row), ess=ess, weight_decay=decay.of(i).rate)
        if low_precision:
            torch._foreach_copy_([piece.weights for piece in slices], samples)

    def draw_jointly(self, blocks: list[SliceBlock], noise: Noise) -> None:
        """See `Structure`; all parameters are independent."""

    def posterior(self, context: PosteriorContext) -> Diagonal:
        """The posterior N(m, 1/(num_data·(h + wd))) as a view of the state."""
        named = {name: p for p, name in self.parameters.names().items() if self.parameters.has_state(p)}
        return self.posterior_of(named, context)

    def posterior_of(self, named: dict[str, Tensor], context: PosteriorContext) -> Diagonal:
        """The posterior of some parameters, by name."""
        groups = {p: group for group in self.parameters.groups for p in group["params"]}
        posterior = Diagonal(
            context.mean_of(named),
            ByName(named, lambda p: whole(self.parameters.state[p]["hessian"])),
            {name: rate_of(self.parameters, groups[p], p) for name, p in named.items()},
            {name: tempered_ess_and_decay(groups[p])[0] for name, p in named.items()},
            self.parameters.num_data,
            parameters=named,
            check=context.check,
            at_mean=context.at_mean,
        )
        posterior.prior_mean = prior_means(self.parameters, named)
        return posterior

    def diagonal_hessian(self) -> dict[Tensor, Tensor]:
        """See `Structure`."""
        return {p: state["hessian"] for p, state in self.parameters.state.items() if "hessian" in state}

    def has_curvature(self, p: Tensor) -> bool:
        """See `Structure`."""
        return True

    def hessian_rows(self, piece: ParameterSlice) -> Tensor:
        """See `Structure`."""
        return piece.of(self.parameters.state[piece.parameter]["hessian"])

    def pass_sums(self, recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Any, Tensor]:
        """Σ_n g_n² of each parameter."""
        return dict(sums_of_squares(recorded, wanted))

    def price_estimate(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """ess·(h + wd)·(θ - m)∘∇ℓ, the diagonal of Price's estimate."""
        rate = decay_of(self.parameters, group, slices).rate
        precisions = torch._foreach_add(self.state_of(slices, "hessian"), rate)
        torch._foreach_mul_(precisions, tempered_ess_and_decay(group)[0])
        torch._foreach_mul_(noise, gradients)
        return list(torch._foreach_mul(precisions, noise))

    def state_of(self, slices: list[ParameterSlice], key: str) -> list[Tensor]:
        """The rows of a state tensor that belong to the slices."""
        return [piece.of(self.parameters.state[piece.parameter][key]) for piece in slices]

    def count_step(self, group: Group, piece: ParameterSlice) -> float:
        """The correction of the momentum, 1 - β₁ᵗ; the step is counted at the first rows of a parameter."""
        return momentum_correction(group, self.count_steps([piece])[0])

    def count_steps(self, slices: list[ParameterSlice]) -> list[int]:
        """Count the step of the parameters that begin in a block; returns that of each slice, from 1."""
        return list(map(int, read(self._counted_steps(slices))))

    def corrections(self, group: Group, slices: list[ParameterSlice]) -> list[Tensor]:
        """As `count_step` of all slices where the step is on the device, and the correction is to stay there."""
        steps = self._counted_steps(slices)
        if not group["debias"]:
            return [torch.ones_like(step) for step in steps]
        # 1 - β₁ᵗ = -(exp(t log β₁) - 1)
        corrections = torch._foreach_mul(steps, math.log(group["beta1"]) if group["beta1"] else -math.inf)
        torch._foreach_expm1_(corrections)
        return list(torch._foreach_neg(corrections))

    def _counted_steps(self, slices: list[ParameterSlice]) -> list[Tensor]:
        steps = [self.parameters.state[piece.parameter]["step"] for piece in slices]
        first = [step for piece, step in zip(slices, steps, strict=True) if piece.is_first]
        if first:
            torch._foreach_add_(first, 1)
        return steps


def initial_state(p: Tensor, hess_init: float, capturable: bool = False) -> dict[str, Tensor]:
    """The state of a parameter with a diagonal Hessian.

    Args:
        capturable: the step is counted on the parameter's device.
    """
    dtype, real = state_dtype(p), as_real(p.detach())
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device if capturable else "cpu"),
        "momentum": torch.zeros_like(real, dtype=dtype),
        "hessian": torch.full_like(real, hess_init, dtype=dtype),
    }


def momentum_correction(group: Group, step: float | Tensor) -> float:
    """1 - β₁ᵗ after t steps, which the momentum is divided by; 1 without debiasing."""
    return 1 - group["beta1"] ** float(step) if group["debias"] else 1.0


def use_foreach(group: Group, slices: list[ParameterSlice]) -> bool:
    """Whether to work through a block by multi-tensor operations."""
    return len(slices) > 1 if group["foreach"] is None else group["foreach"]


def _draw_compiled(
    weights: list[Tensor],
    hessians: list[Tensor],
    generator: torch.Generator | None,
    ess: float,
    weight_decay: float | list[Tensor],
) -> bool:
    """As `draw_normal` for one large tensor, in a kernel that makes the noise too; False if the block is not one."""
    if (
        len(weights) > 1
        or weights[0].dtype != torch.float32
        or weights[0].numel() % 2
        or isinstance(weight_decay, list)
    ):
        return False
    tensors = flat(weights[0], hessians[0])
    if tensors is None:
        return False
    kernel(_draw)(*tensors, new_key(generator, weights[0].device), float(ess), weight_decay)
    return True


def _draw(weights: Tensor, hessian: Tensor, key: Tensor, ess: float, weight_decay: float) -> None:
    """`draw_normal` of one tensor as one expression, to be compiled."""
    half = len(weights) // 2
    for rows, noise in zip((slice(None, half), slice(half, None)), normals(key, half), strict=True):
        weights[rows].add_(noise * (ess * (hessian[rows] + weight_decay)).rsqrt())


def draw_normal(
    weights: list[Tensor],
    hessians: list[Tensor],
    noise: list[Tensor],
    *,
    ess: float,
    weight_decay: float | list[Tensor],
) -> None:
    """Mean to draw, in place: weights ← weights + noise/√(ess·(h + wd)), of several tensors."""
    scales = torch._foreach_add(hessians, weight_decay)
    torch._foreach_mul_(scales, ess)
    torch._foreach_rsqrt_(scales)
    torch._foreach_addcmul_(weights, noise, scales)
