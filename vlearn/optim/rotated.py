"""What the optimizers with an eigenbasis for each layer share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from vlearn.gaussians import ProductPosterior
from vlearn.optim.diagnostics.diagnostics import Diagnostics
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.structures.rotated import RotatedStructure

R = TypeVar("R", bound=RotatedStructure)


class RotatedOptimizer(VariationalOptimizer[R, ProductPosterior]):
    """Base class: the count of eigendecompositions that failed."""

    @property
    def decomposition_failures(self) -> int:
        """The number of eigendecompositions that failed, where the last good basis stayed."""
        return self._structure.decomposition_failures

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "decomposition_failures": self.decomposition_failures}

    def __setstate__(self, state: dict[str, Any]) -> None:
        failures = state.pop("decomposition_failures", None)
        super().__setstate__(state)
        if failures is not None:
            self._structure.decomposition_failures = failures

    def _read_diagnostics(self) -> Diagnostics:
        return replace(super()._read_diagnostics(), decomposition_failures=self.decomposition_failures)
