"""What optimizers with a diagonal Hessian share: its state, the draws from it, the posterior and its health.

Per parameter the state is the Hessian diagonal h of the mean per-example loss, without the weight decay wd, and the
momentum of the gradient; the posterior precision is num_data·(h + wd), draws have ess·(h + wd).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlearn.optim.compiled import flat, kernel
from vlearn.optim.diagnostics import Diagnostics, diagnose
from vlearn.optim.draw import Slot
from vlearn.optim.nonfinite import is_narrow
from vlearn.optim.sampling import MeanView
from vlearn.optim.threefry import new_key, normals
from vlearn.posterior import Diagonal

if TYPE_CHECKING:
    from vlearn.optim.base import VariationalOptimizer as _Optimizer
else:
    _Optimizer = object


class DiagonalState(_Optimizer):
    """Mixin beside VariationalOptimizer: `_init_state`, `_perturb`, `posterior()` and `diagnostics()`."""

    def _scales(self, group: dict[str, Any]) -> tuple[float, float]:
        """(effective sample size of the draws, weight decay) of a parameter group."""
        return group["ess"], group["weight_decay"]

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> None:
        dtype = self._state_dtype(p)
        self.state[p] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "momentum": torch.zeros_like(p, dtype=dtype),
            "hessian": torch.full_like(p, group["hess_init"], dtype=dtype),
        }

    def _perturb(self, group: dict[str, Any], block: list[Slot]) -> None:
        narrow = is_narrow(block[0].weights)  # then the draw is made around the master mean and rounded
        samples = [self._exact_mean(slot).clone() if narrow else slot.weights for slot in block]
        hessians = self._state_of(block, "hessian")
        generator = self._noise.on(hessians[0].device)
        ess, weight_decay = self._scales(group)
        if not (group.get("compiled") and _draw_compiled(samples, hessians, generator, ess, weight_decay)):
            draw = _foreach_draw if use_foreach(group, block) else _plain_draw
            draw(samples, hessians, normal(hessians, generator), ess=ess, weight_decay=weight_decay)
        if narrow:
            for slot, sample in zip(block, samples, strict=True):
                slot.weights.copy_(sample)

    def _state_of(self, block: list[Slot], key: str) -> list[Tensor]:
        """The block's part of a state tensor."""
        return [slot.of(self.state[slot.parameter][key]) for slot in block]

    def _correction(self, group: dict[str, Any], slot: Slot) -> float:
        """1 - β₁ᵗ; counts the step at the first rows of a parameter."""
        step = self.state[slot.parameter]["step"]
        if slot.rows is None or slot.rows[0] == 0:
            step += 1
        return 1 - group["beta1"] ** float(step) if group["debias"] else 1.0

    def diagnostics(self) -> Diagnostics:
        """Whether the posterior learns: range of its Hessian, how much of it is still hess_init, signal to noise.

        Raises:
            ValueError: if no parameter requires grad.
        """
        means, names = self.posterior().mean, self._names()
        groups = []
        for group in self.param_groups:
            ess, weight_decay = self._scales(group)
            settings = {**group, "ess": ess, "weight_decay": weight_decay}
            groups.append((settings, [(means[names[p]], self.state[p]) for p in group["params"] if p in self.state]))
        return diagnose(groups, self.nonfinite_count)

    def posterior(self) -> Diagonal:
        """The posterior N(m, 1/(num_data·(h + wd))) as a view of the state: no copy, stale after the next step."""
        self._prepare_states()
        return self._diagonal_posterior({name: p for p, name in self._names().items() if p in self.state})

    def _diagonal_posterior(self, names: dict[str, Tensor]) -> Diagonal:
        scales = {p: self._scales(group) for group in self.param_groups for p in group["params"]}
        return Diagonal(
            MeanView(self, names),
            {name: self.state[p]["hessian"] for name, p in names.items()},
            {name: scales[p][1] for name, p in names.items()},
            {name: scales[p][0] for name, p in names.items()},
            self.num_data,
            parameters=names,
            check=self._staleness(),
            at_mean=self.at_mean,
        )


def use_foreach(group: dict[str, Any], block: list[Slot]) -> bool:
    """Whether to work through a block by multi-tensor operations."""
    return len(block) > 1 if group["foreach"] is None else group["foreach"]


def normal(like: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Standard normal noise in the shapes of a block, drawn at once."""
    first = like[0]
    count = sum(tensor.numel() for tensor in like)
    noise = torch.randn(count, dtype=first.dtype, device=first.device, generator=generator)
    parts = noise.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _draw_compiled(
    weights: list[Tensor],
    hessians: list[Tensor],
    generator: torch.Generator | None,
    ess: float,
    weight_decay: float,
) -> bool:
    """As `_plain_draw` for one large tensor, in a kernel that makes the noise too; False if the block is not one."""
    if len(weights) > 1 or weights[0].dtype != torch.float32 or weights[0].numel() % 2:
        return False
    tensors = flat(weights[0], hessians[0])
    if tensors is None:
        return False
    kernel(_draw)(*tensors, new_key(generator, weights[0].device), float(ess), float(weight_decay))
    return True


def _draw(weights: Tensor, hessian: Tensor, key: Tensor, ess: float, weight_decay: float) -> None:
    """`_plain_draw` of one tensor as one expression, to be compiled."""
    half = len(weights) // 2
    for rows, noise in zip((slice(None, half), slice(half, None)), normals(key, half), strict=True):
        weights[rows].add_(noise * (ess * (hessian[rows] + weight_decay)).rsqrt())


def _plain_draw(
    weights: list[Tensor], hessians: list[Tensor], noise: list[Tensor], *, ess: float, weight_decay: float
) -> None:
    """Mean to draw: weights ← weights + noise/√(ess·(h + wd)), one tensor at a time."""
    for weight, hessian, epsilon in zip(weights, hessians, noise, strict=True):
        weight.addcmul_(epsilon, hessian.add(weight_decay).mul_(ess).rsqrt_())


def _foreach_draw(
    weights: list[Tensor], hessians: list[Tensor], noise: list[Tensor], *, ess: float, weight_decay: float
) -> None:
    """As `_plain_draw`, all tensors of a block at once."""
    scales = torch._foreach_add(hessians, weight_decay)
    torch._foreach_mul_(scales, ess)
    torch._foreach_rsqrt_(scales)
    torch._foreach_addcmul_(weights, noise, scales)
