"""What sensitivities and predictions need of a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlearn.capture.names import named_parameters, uncompiled_name
from vlearn.gaussians.covariance import Covariance


class Posterior(Protocol):
    """A Gaussian over named parameters, on the scale of a sum over num_data examples."""

    num_data: float
    parameters: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        ...

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """The mean of each parameter by name, in its shape."""
        ...

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of every parameter by name, on the scale of the draws."""
        ...

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the model's weights are the mean."""
        ...

    def covariance(self, parameters: Mapping[str, Tensor]) -> Covariance:
        """Σ keyed by the given parameters, summed over num_data."""
        ...

    def require_calibrated(self, what: str) -> None:
        """Raise RuntimeError if the scale of Σ, which a quantity depends on, is arbitrary."""
        ...


def check_posterior(posterior: object) -> None:
    """Raise TypeError where it is none, as an optimizer in place of its posterior."""
    if callable(getattr(posterior, "covariance", None)):
        return
    name = type(posterior).__name__
    if callable(getattr(posterior, "posterior", None)):
        raise TypeError(
            f"posterior is the {name} itself, but it must be what {name} has learned: optimizer.posterior()."
        )
    raise TypeError(
        f"posterior is of type {name}, but it must be that of an optimizer, optimizer.posterior(), or of a fit, "
        "vlearn.posterior.fit(model, loader, loss_fn)."
    )


def match(model: nn.Module, posterior: Posterior) -> dict[str, nn.Parameter]:
    """The model's parameters by the posterior's names: the same objects, or else the same names.

    Names are compared without what DistributedDataParallel, DataParallel, AveragedModel and torch.compile put before
    them; the copy that such a wrapper holds is matched like the model itself.

    Raises:
        TypeError: if the posterior is none.
        ValueError: if none matches, or one by name has another shape.
    """
    check_posterior(posterior)
    own = dict(model.named_parameters())
    same = {id(p): name for name, p in posterior.parameters.items()}
    matched = {same[id(p)]: p for p in own.values() if id(p) in same}
    if not matched:
        matched: Any = of_same_name(dict(named_parameters(model)), posterior.names)
        for name, p in matched.items():
            if posterior.mean[name].shape != p.shape:
                raise ValueError(
                    f"the posterior's {name!r} has shape {tuple(posterior.mean[name].shape)}, but that of this "
                    f"{type(model).__name__} has {tuple(p.shape)}: pass the model that was trained."
                )
    if not matched:
        raise ValueError(
            f"the posterior's parameters ({', '.join(posterior.names[:3])}, ...) are not those of this "
            f"{type(model).__name__} ({', '.join(list(own)[:3])}, ...): pass the model that was trained."
        )
    return matched


def of_same_name(named: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters that have these names, by them; or have them but for wrappers that hold the model."""
    found = {name: named[name] for name in names if name in named}
    if found:
        return found
    inside = {_unwrapped_name(name): p for name, p in named.items()}
    if len(inside) < len(named):  # "module." is more than a wrapper's
        return {}
    return {name: inside[_unwrapped_name(name)] for name in names if _unwrapped_name(name) in inside}


def _unwrapped_name(name: str) -> str:
    """A parameter's name as it is without wrappers that hold the model as their `module`."""
    name = uncompiled_name(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
