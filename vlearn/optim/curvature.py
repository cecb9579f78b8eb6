"""Where Newton's methods here take their curvature from: a probe of the output, sampled labels, or Price's theorem."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vlearn.optim.likelihood import LIKELIHOODS, Likelihood, probe
from vlearn.sensitivity.live import Selector

if TYPE_CHECKING:
    from vlearn.optim.base import VariationalOptimizer as _Optimizer
    from vlearn.optim.watch import Watch
else:
    _Optimizer = object

SOURCES = ("probe", "sampled", "price")


class CurvatureProbe(_Optimizer):
    """Mixin beside VariationalOptimizer: the choice of the curvature, and the probe of a pass.

    Attributes:
        likelihood, hessian, output: see `VON`.
    """

    _copied = ("likelihood", "hessian", "output")

    def _set_curvature(self, likelihood: Likelihood, hessian: str, output: Selector) -> None:
        """Before the optimizer watches a model.

        Raises:
            ValueError: if one of them is unknown.
        """
        if not callable(likelihood) and likelihood not in LIKELIHOODS:
            raise ValueError(
                f"likelihood={likelihood!r}, but it must be 'categorical', 'gaussian' or a callable: use a callable "
                "that gives the targets' torch.distributions.Distribution for an output."
            )
        if hessian not in SOURCES:
            raise ValueError(f"hessian={hessian!r}, but it must be 'probe', 'sampled' or 'price': use 'probe'.")
        self.likelihood: Likelihood = likelihood
        self.hessian = hessian
        self.output: Selector = output

    def _needs_captures(self) -> bool:
        return self.hessian != "price"

    def _probes(self) -> bool:
        return self._needs_captures()

    def _probe(self, watch: Watch, output: Tensor, residual: Tensor) -> Tensor:
        generator = self._noise.of_examples.on(output.device)
        return probe(self.likelihood, self.hessian, output, residual, watch.weight_of_rows, generator)
