"""Gaussian posteriors with a diagonal covariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlearn.gaussians.covariance_blocks import DiagonalBlock
from vlearn.gaussians.gaussian import Gaussian, unchanging
from vlearn.gaussians.stopped_training import stopped
from vlearn.sharded.tensors import whole

if TYPE_CHECKING:
    from typing_extensions import Self


class Diagonal(Gaussian):
    """q = N(m, diag(σ²)), kept as the state of an optimizer.

    The precision is num_data·(h + wd), h the diagonal Hessian of the mean per-example loss and wd the weight
    decay: the precision of the sum of num_data losses and of the prior N(0, 1/(num_data·wd)). Draws use
    ess·(h + wd) instead; the two differ only where an optimizer is tempered (ess not num_data).

    Args:
        mean: posterior mean of each parameter by name.
        hessian: h by name, per example, without the weight decay.
        weight_decay: wd by name, per example.
        ess: effective sample size of the draws by name.
        num_data: number of training examples N.
        parameters: the model's parameters by name, where the posterior belongs to a model.
        check: called before anything is read; raises if the state has moved on.
        at_mean: gives a context in which the model's weights are the mean.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        hessian: Mapping[str, Tensor],
        weight_decay: Mapping[str, float | Tensor],
        ess: Mapping[str, float],
        num_data: float,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        check: Callable[[], None] = unchanging,
        at_mean: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        super().__init__(
            mean,
            [(name,) for name in weight_decay],
            num_data,
            ess=ess,
            prior_precision={name: num_data * decay for name, decay in weight_decay.items()},
            parameters=parameters,
            check=check,
            at_mean=at_mean,
        )
        self._hessian = hessian

    @classmethod
    def from_precision(
        cls,
        mean: Mapping[str, Tensor],
        precision: Mapping[str, Tensor],
        num_data: float,
        prior_precision: float = 0.0,
    ) -> Diagonal:
        """A posterior from its mean and the diagonal of Σ⁻¹, from wherever they come.

        Args:
            mean: posterior mean of each parameter by name.
            precision: diagonal of Σ⁻¹ by the same names, summed over num_data, prior included.
            num_data: number of training examples N.
            prior_precision: δ of the prior N(0, 1/δ), which `kl` needs.

        Raises:
            ValueError: if names or shapes differ, or a precision or num_data is not positive.
        """
        if not num_data > 0:
            raise ValueError(f"num_data={num_data}, but it must be positive: use the number of training examples.")
        if mean.keys() != precision.keys():
            name = min(mean.keys() ^ precision.keys())
            raise ValueError(f"{name!r} is in only one of mean and precision: give both by the same names.")
        for name, tensor in precision.items():
            if tensor.shape != mean[name].shape:
                raise ValueError(
                    f"precision[{name!r}] has shape {tuple(tensor.shape)}, but the mean has {tuple(mean[name].shape)}."
                )
            if not bool(((tensor > 0) & tensor.isfinite()).all()):
                raise ValueError(f"precision[{name!r}] is not positive and finite: add the prior precision.")
        weight_decay = prior_precision / num_data
        hessian = {name: tensor / num_data - weight_decay for name, tensor in precision.items()}
        return cls(mean, hessian, dict.fromkeys(mean, weight_decay), dict.fromkeys(mean, num_data), num_data)

    @classmethod
    def nearest(cls, posterior: Gaussian) -> Diagonal:
        """The Gaussian q of independent entries with the least KL(q ‖ p) to a posterior p.

        It has the mean of p and the diagonal of its Σ⁻¹; likewise of its prior.

        Args:
            posterior: p, of any structure.
        Returns:
            A copy, which belongs to the same model.
        """
        kept, num_data = posterior.clone(), posterior.num_data
        prior: Mapping[str, float | Tensor] = kept.prior_precision if kept.prior is None else kept.prior.precision
        decay = {name: prior[name] / num_data if name in prior else 0.0 for name in kept.names}
        nearest = cls(
            {name: kept.mean[name] for name in kept.names},
            {name: kept.precision[name] / num_data - decay[name] for name in kept.names},
            decay,
            {name: kept.ess.get(name, num_data) for name in kept.names},
            num_data,
            parameters=kept.parameters,
            at_mean=kept.at_mean,
        )
        nearest.prior_mean, nearest.training_time = dict(kept.prior_mean), kept.training_time
        nearest.uncalibrated_reason, nearest.uncalibrated_draws = kept.uncalibrated_reason, kept.uncalibrated_draws
        nearest.num_data_given = kept.num_data_given
        return nearest

    def _precision(self, name: str) -> Tensor:
        """N(h + wd) in one pass over h."""
        hessian = self._hessian[name]
        prior = torch.as_tensor(self.prior_precision[name], dtype=hessian.dtype, device=hessian.device)
        return torch.add(prior, hessian, alpha=self.num_data)

    def block(self, group: tuple[str, ...]) -> DiagonalBlock:
        """See `Gaussian`."""
        return DiagonalBlock(self._precision(group[0]).reciprocal_())

    def block_state(self) -> dict[str, Any]:
        """See `Gaussian`."""
        return {"hessian": {name: self._hessian[name] for name in self.names}}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """See `Gaussian`."""
        decay = {name: prior / state["num_data"] for name, prior in state["prior_precision"].items()}
        return cls(state["mean"], state["hessian"], decay, state["ess"], state["num_data"])

    def stop_blocks(self, times: Mapping[str, float]) -> None:
        """See `Gaussian`."""
        decay = {name: prior / self.num_data for name, prior in self.prior_precision.items()}
        self._hessian = {
            name: stopped(hessian + decay[name], times[name]) - decay[name] for name, hessian in self._hessian.items()
        }

    def damp_blocks(self, relative: float) -> None:
        """See `Gaussian`."""
        self._replace_prior({name: float(whole(hessian.mean())) for name, hessian in self._hessian.items()}, relative)

    def copy_blocks(self) -> None:
        """See `Gaussian`."""
        self._hessian = {name: self._hessian[name].clone() for name in self.names}
