"""A dense precision over all entries of all parameters: its state, the draws from it, the posterior.

The Hessian H of the mean loss, ``[P, P]`` over all entries of all parameters, without the weight decay wd, is kept as
its rows by parameter, ``[*shape, P]``, so that a state dict holds it as any state; likewise a prior with correlations.
The posterior precision is num_data·S, S = H + wd, or H + P₀/N; draws have ess·S. Factors are made in float64.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from vlearn._wide import wide_dtype, widened
from vlearn.gaussians import Full
from vlearn.gaussians.gaussian import Gaussian
from vlearn.optim.parameters.options import tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, Parameters, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.protocols import PosteriorContext
from vlearn.optim.structures.prior import diagonal_prior, prior_means, rate_of
from vlearn.per_example.gradients import sums_of_products
from vlearn.per_example.recorded_pass import RecordedPass

LARGEST = 2**14  # parameters; their Hessian takes a GiB


class DenseStructure:
    """A `Structure` with a dense Hessian over all parameters.

    Args:
        parameters: those of the optimizer, with their state.
    """

    def __init__(self, parameters: Parameters):
        self.parameters = parameters

    def joint(self) -> list[Tensor]:
        """The parameters in the order of the Hessian's rows: those that have a state."""
        return [p for p in self.parameters.every() if self.parameters.has_state(p)]

    def init_states(self) -> None:
        """Rows of H by parameter; those of new parameters start as hess_init times the identity."""
        with torch.no_grad():
            old = self.joint()
            kept = {*old, *self._joined_by_prior()}
            joint = [p for p in self.parameters.every() if p.requires_grad or p in kept]
            if len(joint) == len(old):
                return
            hessian = torch.block_diag(*(self._initial(p) for p in joint)).to(joint[0].device)
            if old:
                at = positions(old, joint).to(hessian.device)
                hessian[at.unsqueeze(1), at] = self.hessian(old)
            for p in joint:
                if not self.parameters.has_state(p):
                    self.parameters.state[p].update(
                        step=torch.tensor(0.0, dtype=torch.float32, device="cpu"),
                        momentum=torch.zeros_like(p, dtype=state_dtype(p)),
                    )
            self.write_hessian(joint, hessian)

    def take_prior(self, prior: Gaussian, named: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """See `Structure`; beside the diagonal of its precision the rows, ``[*shape, Q]`` over all that it joins."""
        states = diagonal_prior(prior, named)
        groups = [group for group in dict.fromkeys(prior.groups.values()) if any(name in named for name in group)]
        blocks = {group: block for group in groups if not (block := prior.block(group)).is_elementwise}
        if not blocks:
            return states
        for name in (name for group in blocks for name in group):
            if name not in named or not named[name].requires_grad:
                raise ValueError(
                    f"the prior has correlations of {name!r}, which is frozen or in another parameter group: unfreeze "
                    "it, or take vlearn.posterior.Diagonal.nearest(prior)."
                )
        check_size(list(named.values()))
        before = self._joined_by_prior()
        listed = [*before, *(named[name] for group in blocks for name in group)]
        device, members = listed[0].device, set(listed)
        parts = ([self._prior_rows(before)] if before else []) + [block.precision() for block in blocks.values()]
        joined = [p for p in self.parameters.every() if p in members]
        at = positions(joined, listed).to(device)
        precision = torch.block_diag(*(part.to(device, wide_dtype(device)) for part in parts))[at.unsqueeze(1), at]
        for p, rows in zip(joined, split(precision, joined), strict=True):
            rows = rows.reshape(*p.shape, len(precision)).to(p.device, state_dtype(p))
            states.setdefault(p, {})["prior_rows"] = rows
        return states

    def _joined_by_prior(self) -> list[Tensor]:
        """The parameters whose priors have correlations, in the order of its rows."""
        return [p for p in self.parameters.every() if "prior_rows" in self.parameters.state.get(p, {})]

    def _prior_rows(self, joined: list[Tensor]) -> Tensor:
        device = joined[0].device
        rows = (rows_of(self.parameters.state[p]["prior_rows"]) for p in joined)
        return torch.cat([part.to(device, wide_dtype(device)) for part in rows])

    def prior(self, joint: list[Tensor]) -> Tensor:
        """The precision of the prior, wd or P₀/N, ``[P, P]`` in float64."""
        joined = self._joined_by_prior()
        members, groups = set(joined), self._groups()
        rates = [0.0 if p in members else rate_of(self.parameters, groups[p], p) for p in joint]
        matrix = filled(rates, joint).diag()
        if joined:
            at = positions(joined, joint).to(matrix.device)
            matrix[at.unsqueeze(1), at] = self._prior_rows(joined) / self.parameters.num_data
        return matrix

    def pull_of_prior(self, joint: list[Tensor], prior: Tensor) -> Tensor:
        """The gradient of the prior at the means, which are in the weights: P₀/N (m - m₀), or wd·m, ``[P]``."""
        return prior @ torch.cat([(widened(self.parameters.mean_of(p)) - self._center(p)).reshape(-1) for p in joint])

    def _center(self, p: Tensor) -> Tensor | float:
        return self.parameters.state[p]["prior_mean"] if self.parameters.has_prior(p) else 0.0

    def _groups(self) -> dict[Tensor, Group]:
        return {p: group for group in self.parameters.groups for p in group["params"]}

    def _initial(self, p: Tensor) -> Tensor:
        hess_init = self.parameters.group_of(p)["hess_init"]
        return torch.eye(p.numel(), dtype=wide_dtype(p.device), device=p.device) * hess_init

    def hessian(self, joint: list[Tensor]) -> Tensor:
        """H ``[P, P]`` in float64, in which it is factorised too."""
        device = joint[0].device
        rows = (rows_of(self.parameters.state[p]["hessian"]) for p in joint)
        return torch.cat([part.to(device, wide_dtype(device)) for part in rows])

    def write_hessian(self, joint: list[Tensor], hessian: Tensor) -> None:
        """Keep H ``[P, P]`` in the states."""
        for p, rows in zip(joint, split(hessian, joint), strict=True):
            self.parameters.state[p]["hessian"] = rows.reshape(*p.shape, len(hessian)).to(p.device, state_dtype(p))

    def ess_by_entry(self, joint: list[Tensor]) -> Tensor:
        """The effective sample size of each row ``[P]``, in float64."""
        groups = self._groups()
        return filled([float(tempered_ess_and_decay(groups[p])[0]) for p in joint], joint)

    def precision_of(self, moving: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(S of some parameters ``[M, M]``, the positions of its rows in H)."""
        joint = self.joint()
        at = positions(moving, joint).to(joint[0].device)
        precision = self.hessian(joint).add_(self.prior(joint))
        return precision[at.unsqueeze(1), at], at

    def is_whole(self, p: Tensor) -> bool:
        """See `Structure`."""
        return False

    def draw_block(self, block: SliceBlock, noise: Noise) -> None:
        """See `Structure`; no parameter is independent of the others."""

    def draw_jointly(self, blocks: list[SliceBlock], noise: Noise) -> None:
        """Write m + (ess·S)^-½ ε into the weights; of frozen parameters the draw is the conditional one."""
        slices = [piece for block in blocks for piece in block.slices]
        if not slices:
            return
        moving = [piece.parameter for piece in slices]
        factor = cholesky(self.precision_of(moving)[0])
        epsilon = torch.cat([_normal(piece, noise).reshape(-1) for piece in slices])
        # S = L Lᵀ, so L⁻ᵀ z has covariance S⁻¹
        moves = torch.linalg.solve_triangular(factor.mT, epsilon.to(factor).unsqueeze(1), upper=True).squeeze(1)
        moves /= self.ess_by_entry(moving).sqrt()
        for piece, move in zip(slices, split(moves, moving), strict=True):
            mean = piece.exact_mean(self.parameters)
            piece.weights.copy_(mean + move.reshape(mean.shape).to(mean))

    def posterior(self, context: PosteriorContext) -> Full:
        """The posterior N(m, (num_data·(H + wd))⁻¹) from the present state."""
        joint, names, num_data = self.joint(), self.parameters.names(), self.parameters.num_data
        if not joint:
            raise ValueError("no parameter has a state, so there is no posterior: give some that require grad.")
        prior, groups = num_data * self.prior(joint), self._groups()
        precision = num_data * self.hessian(joint) + prior
        wide = any(state_dtype(p) == torch.float64 for p in joint)
        named = {names[p]: p for p in joint}
        correlated = bool(self._joined_by_prior())
        rates = {} if correlated else {name: rate_of(self.parameters, groups[p], p) for name, p in named.items()}
        posterior = Full(
            context.mean_of(named),
            precision if wide else precision.float(),
            num_data,
            ess={name: tempered_ess_and_decay(groups[p])[0] for name, p in named.items()},
            prior_precision={name: num_data * rate for name, rate in rates.items()},
            parameters=named,
            check=context.check,
            at_mean=context.at_mean,
        )
        posterior.prior_mean = prior_means(self.parameters, named)
        if correlated and bool((prior.diagonal() > 0).all()):
            centers = {name: torch.zeros_like(p, dtype=state_dtype(p)) + self._center(p) for name, p in named.items()}
            posterior.prior = Full(centers, prior, num_data)
        return posterior

    def diagonal_hessian(self) -> dict[Tensor, Tensor]:
        """See `Structure`."""
        joint = self.joint()
        if not joint:
            return {}
        parts = split(self.hessian(joint).diagonal(), joint)
        return {p: part.reshape(p.shape) for p, part in zip(joint, parts, strict=True)}

    def has_curvature(self, p: Tensor) -> bool:
        """See `Structure`."""
        return True

    def hessian_rows(self, piece: ParameterSlice) -> Tensor:
        """See `Structure`."""
        return piece.of(self.parameters.state[piece.parameter]["hessian"])

    def pass_sums(self, recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Any, Tensor]:
        """Rows of Σ_n g_n g_nᵀ by parameter, ``[*shape, P]``."""
        joint = self.joint()
        products = sums_of_products(recorded, joint, wanted)
        return {p: rows.reshape(*p.shape, len(products)) for p, rows in zip(joint, split(products, joint), strict=True)}

    def price_estimate(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """∇ℓ (ess·S(θ - m))ᵀ by rows, whose mean is the Hessian by Price's theorem; symmetric once averaged."""
        precision, at = self.precision_of(draw.parameters)
        root = self.ess_by_entry(draw.parameters).sqrt()
        moves = [piece.draw - piece.exact_mean(self.parameters) for piece in draw.slices]
        score = precision.new_zeros(sum(p.numel() for p in self.joint()))
        score[at] = root * (precision @ (root * torch.cat([move.reshape(-1).to(precision) for move in moves])))
        return [torch.outer(g.reshape(-1).to(score), score).reshape(*g.shape, len(score)).to(g) for g in gradients]


def check_size(parameters: list[Tensor]) -> None:
    """Raise ValueError if a dense Hessian over these parameters would be too large."""
    count = sum(p.numel() for p in parameters)
    if count > LARGEST:
        raise ValueError(
            f"{count} parameters, but a dense posterior takes at most {LARGEST}: use VON, or freeze all but a part."
        )


def filled(values: Sequence[float | Tensor], parameters: list[Tensor]) -> Tensor:
    """A number of each parameter for all its entries, or one of each entry, in float64."""
    device, pairs = parameters[0].device, zip(values, parameters, strict=True)
    tensors = [(torch.as_tensor(value, dtype=wide_dtype(device), device=device), p) for value, p in pairs]
    return torch.cat([tensor.expand(p.shape).reshape(-1) for tensor, p in tensors])


def rows_of(tensor: Tensor) -> Tensor:
    """``[*shape, P]`` -> ``[entries, P]``."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def split(rows: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Rows of all entries by parameter."""
    return rows.split([p.numel() for p in parameters])


def positions(parameters: list[Tensor], joint: list[Tensor]) -> Tensor:
    """Where the entries of some parameters are among those of all."""
    starts: dict[Tensor, int] = {}
    count = 0
    for p in joint:
        starts[p] = count
        count += p.numel()
    return torch.cat([torch.arange(starts[p], starts[p] + p.numel(), device=joint[0].device) for p in parameters])


def cholesky(precision: Tensor) -> Tensor:
    """L with precision = L Lᵀ.

    Raises:
        RuntimeError: if there is none.
    """
    factor, info = torch.linalg.cholesky_ex(precision)
    if int(info) != 0:
        raise RuntimeError(
            "the precision is not positive definite any more, by rounding: use a larger weight_decay, or a beta2 "
            "nearer 1."
        )
    return factor


def _normal(piece: ParameterSlice, noise: Noise) -> Tensor:
    device = piece.weights.device
    dtype = state_dtype(piece.parameter)
    return torch.randn(piece.weights.shape, generator=noise.on(device), device=device, dtype=dtype)
