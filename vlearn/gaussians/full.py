"""Gaussian posteriors with a dense covariance, for models of up to a few thousand parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlearn.gaussians.covariance_blocks import DenseBlock
from vlearn.gaussians.gaussian import Gaussian, unchanging
from vlearn.gaussians.stopped_training import stopped

if TYPE_CHECKING:
    from typing_extensions import Self


class Full(Gaussian):
    """q = N(m, S⁻¹) with a dense precision S.

    Args:
        mean: posterior mean of each parameter by name; the order gives that of the precision's rows.
        precision: S ``[P, P]``, summed over the training data, prior included.
        num_data: number of training examples N.
        ess: effective sample size of the draws, whose precision is S·ess/num_data; default num_data. By name, where
            it differs: √(ess/num_data) S √(ess/num_data).
        prior_precision: δ of the prior N(0, 1/δ) by name, which `kl` needs.
        parameters: the model's parameters by name, where the posterior belongs to a model.
        check: called before anything is read; raises if the state has moved on.
        at_mean: gives a context in which the model's weights are the mean; by default they are taken as they are.

    Raises:
        ValueError: if the precision's shape does not fit, or it is not symmetric and positive definite.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        precision: Tensor,
        num_data: float,
        *,
        ess: float | Mapping[str, float] | None = None,
        prior_precision: Mapping[str, float | Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        check: Callable[[], None] = unchanging,
        at_mean: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        count = sum(tensor.numel() for tensor in mean.values())
        if precision.shape != (count, count):
            raise ValueError(
                f"precision has shape {tuple(precision.shape)}, but the {count} entries of the mean need "
                f"({count}, {count})."
            )
        scale = precision.diagonal().abs().max()
        if bool((precision - precision.mT).abs().max() > 1e-5 * scale):  # cholesky reads one triangle alone
            raise ValueError("precision is not symmetric: use (S + S.mT) / 2 if it is so but for rounding.")
        factor, info = torch.linalg.cholesky_ex(precision)
        if int(info) != 0:
            raise ValueError("precision is not positive definite: add the prior precision to its diagonal.")
        super().__init__(
            mean,
            [tuple(mean)],
            num_data,
            ess=ess if ess is None or isinstance(ess, Mapping) else dict.fromkeys(mean, ess),
            prior_precision=prior_precision,
            parameters=parameters,
            check=check,
            at_mean=at_mean,
        )
        self._dense = DenseBlock(factor, [tensor.shape for tensor in mean.values()])

    def block(self, group: tuple[str, ...]) -> DenseBlock:
        """See `Gaussian`."""
        return self._dense

    def block_state(self) -> dict[str, Any]:
        """See `Gaussian`."""
        factor = self._dense.factor
        return {"precision": factor @ factor.mT}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """See `Gaussian`."""
        given = {name: state[name] for name in ("ess", "prior_precision")}
        return cls(state["mean"], state["precision"], state["num_data"], **given)

    def stop_blocks(self, times: Mapping[str, float]) -> None:
        """See `Gaussian`; P^-½ w/(1 - e^{-w}) P^-½ of the eigenvalues w of P^½WP^½, P = η of each entry."""
        curvature = self._dense.factor @ self._dense.factor.mT / self.num_data
        root = torch.cat(
            [
                curvature.new_full((shape.numel(),), math.sqrt(times[name]))
                for name, shape in zip(self.names, self._dense.shapes, strict=True)
            ]
        )
        values, basis = torch.linalg.eigh(root.unsqueeze(1) * curvature * root)
        basis = basis / root.unsqueeze(1)
        stopped_precision = (basis * stopped(values.clamp_min(0), 1.0) * self.num_data) @ basis.mT
        self._dense = DenseBlock(torch.linalg.cholesky(stopped_precision), self._dense.shapes)

    def damp_blocks(self, relative: float) -> None:
        """See `Gaussian`."""
        if self.prior is not None or any(name not in self.prior_precision for name in self.names):
            raise ValueError("the prior that this precision holds is not known: pass prior_precision, of each name.")
        factor = self._dense.factor
        precision = factor @ factor.mT
        prior = [
            torch.as_tensor(self.prior_precision[name], dtype=factor.dtype, device=factor.device).expand(shape)
            for name, shape in zip(self.names, self._dense.shapes, strict=True)
        ]
        diagonal = precision.diagonal() - torch.cat([each.flatten() for each in prior])
        mean = float(diagonal.mean())
        self._replace_prior(dict.fromkeys(self.names, mean / self.num_data), relative)
        damped = precision.diagonal_scatter(diagonal + relative * mean)
        self._dense = DenseBlock(torch.linalg.cholesky(damped), self._dense.shapes)

    def copy_blocks(self) -> None:
        """See `Gaussian`."""
        pass  # the factor is its own
