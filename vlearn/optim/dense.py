"""What an optimizer with a dense Hessian has: its state, the draws from it, the posterior and its health.

The Hessian H of the mean loss, ``[P, P]`` over all entries of all parameters, without the weight decay wd, is kept as
its rows by parameter, ``[*shape, P]``, so that a state dict holds it as any state. The posterior precision is
num_data·S, S = H + wd; draws have ess·S. Factors are made in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlearn.optim.diagnostics import Diagnostics, diagnose
from vlearn.optim.draw import Slot
from vlearn.optim.sampling import MeanView
from vlearn.posterior import Full

if TYPE_CHECKING:
    from vlearn.optim.base import VariationalOptimizer as _Optimizer
else:
    _Optimizer = object

LARGEST = 2**14  # parameters; their Hessian takes a GiB


class DenseState(_Optimizer):
    """Mixin beside VariationalOptimizer: the rows of H, `_perturb_all`, `posterior()` and `diagnostics()`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        count = sum(p.numel() for p in self.moving())
        if count > LARGEST:
            self.param_groups.pop()
            raise ValueError(
                f"{count} parameters, but a dense posterior takes at most {LARGEST}: use VON, or freeze all but a part."
            )

    def _joint(self) -> list[Tensor]:
        """The parameters in the order of the Hessian's rows: those that have a state."""
        return [p for p in self._every_parameter() if self.state.get(p)]

    def _prepare_states(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._add_rows()
        super()._prepare_states()

    def _add_rows(self) -> None:
        """Rows of H by parameter, ``[*shape, P]``; those of new parameters start as hess_init times the identity."""
        old = self._joint()
        joint = [p for p in self._every_parameter() if p.requires_grad or self.state.get(p)]
        if len(joint) > len(old):
            hessian = torch.block_diag(*(self._initial(p) for p in joint)).to(joint[0].device)
            if old:
                at = positions(old, joint).to(hessian.device)
                hessian[at.unsqueeze(1), at] = self._hessian(old)
            for p in joint:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.tensor(0.0, dtype=torch.float32),
                        "momentum": torch.zeros_like(p, dtype=self._state_dtype(p)),
                    }
            self._write_hessian(joint, hessian)

    def _initial(self, p: Tensor) -> Tensor:
        group = next(group for group in self.param_groups if any(p is q for q in group["params"]))
        return torch.eye(p.numel(), dtype=torch.float64, device=p.device) * group["hess_init"]

    def _hessian(self, joint: list[Tensor]) -> Tensor:
        """H ``[P, P]`` in float64, in which it is factorised too."""
        device = joint[0].device
        return torch.cat([rows_of(self.state[p]["hessian"]).to(device, torch.float64) for p in joint])

    def _write_hessian(self, joint: list[Tensor], hessian: Tensor) -> None:
        for p, rows in zip(joint, split(hessian, joint), strict=True):
            self.state[p]["hessian"] = rows.reshape(*p.shape, len(hessian)).to(p.device, self._state_dtype(p))

    def _by_entry(self, joint: list[Tensor], setting: str) -> Tensor:
        """A setting of the parameter groups for each row ``[P]``, in float64."""
        values = {p: float(group[setting]) for group in self.param_groups for p in group["params"]}
        filled = [torch.full((p.numel(),), values[p], dtype=torch.float64) for p in joint]
        return torch.cat(filled).to(joint[0].device)

    def _perturb_all(self, blocks: Iterator[tuple[dict[str, Any], list[Slot]]]) -> None:
        slots = [slot for _, block in blocks for slot in block]
        if not slots:
            return
        moving, joint = [slot.parameter for slot in slots], self._joint()
        at = positions(moving, joint).to(joint[0].device)  # of frozen parameters the draw is the conditional one
        precision = self._hessian(joint)[at.unsqueeze(1), at]
        precision.diagonal().add_(self._by_entry(moving, "weight_decay"))
        factor = cholesky(precision)
        noise = torch.cat([torch.randn(s.weights.shape, **self._noise_like(s)).reshape(-1) for s in slots])  # pyright: ignore
        # S = L Lᵀ, so L⁻ᵀ z has covariance S⁻¹
        moves = torch.linalg.solve_triangular(factor.mT, noise.to(factor).unsqueeze(1), upper=True).squeeze(1)
        moves /= self._by_entry(moving, "ess").sqrt()
        for slot, move in zip(slots, split(moves, moving), strict=True):
            mean = self._exact_mean(slot)
            slot.weights.copy_(mean + move.reshape(mean.shape).to(mean))

    def _noise_like(self, slot: Slot) -> dict[str, Any]:
        device = slot.weights.device
        return {
            "generator": self._noise.on(device),
            "device": device,
            "dtype": self._state_dtype(slot.parameter),
        }

    def posterior(self) -> Full:
        """The posterior N(m, (num_data·(H + wd))⁻¹) from the present state; stale after the next step."""
        self._prepare_states()
        joint, names = self._joint(), self._names()
        if not joint:
            raise ValueError("no parameter has a state, so there is no posterior: give some that require grad.")
        decay = self._by_entry(joint, "weight_decay")
        hessian = self._hessian(joint)
        precision = self.num_data * (hessian + decay.diag())
        settings = {p: group for group in self.param_groups for p in group["params"]}
        wide = any(self._state_dtype(p) == torch.float64 for p in joint)
        return Full(
            MeanView(self, {names[p]: p for p in joint}),
            precision if wide else precision.float(),
            self.num_data,
            ess={names[p]: settings[p]["ess"] for p in joint},
            prior_precision={names[p]: self.num_data * settings[p]["weight_decay"] for p in joint},
            parameters={names[p]: p for p in joint},
            check=self._staleness(),
            at_mean=self.at_mean,
        )

    def diagnostics(self) -> Diagnostics:
        """Whether the posterior learns, from the diagonal of its Hessian.

        Raises:
            ValueError: if no parameter requires grad.
        """
        self._prepare_states()
        means, names, joint = self.posterior().mean, self._names(), self._joint()
        diagonals = dict(zip(joint, split(self._hessian(joint).diagonal(), joint), strict=True))
        groups = [
            (
                group,
                [
                    (means[names[p]], {**self.state[p], "hessian": diagonals[p].reshape(p.shape)})
                    for p in group["params"]
                    if p in diagonals
                ],
            )
            for group in self.param_groups
        ]
        return diagnose(groups, self.nonfinite_count)


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
    return torch.cat([torch.arange(starts[p], starts[p] + p.numel()) for p in parameters])


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
