"""Gaussian posteriors that have another structure for some parameters than for others."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlearn.gaussians.covariance_blocks import Block
from vlearn.gaussians.gaussian import Gaussian, unchanging

if TYPE_CHECKING:
    from typing_extensions import Self


class ProductPosterior(Gaussian):
    """q = Π q_k, independent posteriors over different parameters.

    Args:
        parts: posteriors with different names and the same num_data.
        parameters: the model's parameters by name, where the posterior belongs to a model; default those of the parts.
        check: called before anything is read; raises if the state has moved on.
        at_mean: gives a context in which the model's weights are the mean.

    Raises:
        ValueError: if a name is in two parts, or they differ in num_data.
    """

    def __init__(
        self,
        parts: Sequence[Gaussian],
        *,
        parameters: Mapping[str, Tensor] | None = None,
        check: Callable[[], None] = unchanging,
        at_mean: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        names = [name for part in parts for name in part.names]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is in two parts, but each parameter has one posterior.")
        sizes = {part.num_data for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"num_data={', '.join(f'{n:g}' for n in sorted(sizes))}, but all parts need the same.")

        super().__init__(
            ChainMap(*(part.mean for part in parts)),  # pyright: ignore  (they are read only)
            [group for part in parts for group in dict.fromkeys(part.groups.values())],
            sizes.pop(),
            ess={name: ess for part in parts for name, ess in part.ess.items()},
            prior_precision={name: prior for part in parts for name, prior in part.prior_precision.items()},
            parameters=parameters or {name: p for part in parts for name, p in part.parameters.items()},
            check=partial(_check_all, check, parts),
            at_mean=at_mean,
        )
        self._parts = list(parts)
        self.prior_mean = {name: mean for part in parts for name, mean in part.prior_mean.items()}
        self.training_time = min(part.training_time for part in parts)
        self.num_data_given = all(part.num_data_given for part in parts)
        without_scale = [part for part in parts if part.uncalibrated_reason]
        if without_scale:
            self.uncalibrated_reason = without_scale[0].uncalibrated_reason
            self.uncalibrated_draws = any(part.uncalibrated_draws for part in without_scale)

    def block(self, group: tuple[str, ...]) -> Block:
        """See `Gaussian`."""
        part = next(part for part in self._parts if group[0] in part.groups)
        return part.block(group)

    def block_state(self) -> dict[str, Any]:
        """See `Gaussian`."""
        return {"parts": [part.state() for part in self._parts]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """See `Gaussian`."""
        return cls([Gaussian.from_state(part) for part in state["parts"]])

    def stop_blocks(self, times: Mapping[str, float]) -> None:
        """See `Gaussian`."""
        for part in self._parts:
            part.stop_blocks(times)

    def damp_blocks(self, relative: float) -> None:
        """See `Gaussian`."""
        for part in self._parts:
            part.damp_blocks(relative)
        self.prior_precision = {name: prior for part in self._parts for name, prior in part.prior_precision.items()}
        self.prior = None

    def copy_blocks(self) -> None:
        """See `Gaussian`."""
        self._parts = [part.clone() for part in self._parts]


def _check_all(check: Callable[[], None], parts: Sequence[Gaussian]) -> None:
    check()
    for part in parts:
        part.check_fresh()
