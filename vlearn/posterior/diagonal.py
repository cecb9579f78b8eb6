"""Gaussian posteriors with a diagonal covariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from vlearn.posterior.covariance import Covariance


class Diagonal:
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
        weight_decay: Mapping[str, float],
        ess: Mapping[str, float],
        num_data: float,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        check: Callable[[], None] = lambda: None,
        at_mean: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._mean = mean
        self._hessian = hessian
        self._weight_decay = dict(weight_decay)
        self._ess = dict(ess)
        self._check = check
        self.num_data = num_data
        self.parameters = dict(parameters or {})
        self.at_mean = at_mean

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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weight_decay)

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """Posterior mean by parameter name, in the parameter's shape."""
        return _ByName(self, lambda name: self._mean[name])

    @property
    def precision(self) -> Mapping[str, Tensor]:
        """Diagonal of Σ⁻¹ by parameter name, summed over num_data, prior included."""
        return _ByName(self, self._precision)

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Diagonal of Σ by parameter name, on the num_data scale that sensitivities use."""
        return _ByName(self, lambda name: self._precision(name).reciprocal_())

    @property
    def draw_variance(self) -> Mapping[str, Tensor]:
        """Variance of the draws by parameter name, on the ess scale."""
        return _ByName(self, lambda name: self._precision(name, self._ess[name]).reciprocal_())

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of every parameter by name, on the ess scale."""
        drawn = {}
        for name in self.names:
            mean, variance = self.mean[name], self.draw_variance[name]
            noise = torch.randn(variance.shape, dtype=variance.dtype, device=variance.device, generator=generator)
            drawn[name] = (mean + noise.mul_(variance.sqrt_())).to(mean.dtype)
        return drawn

    def entropy(self) -> float:
        """Entropy of q in nats, ½ Σ log(2πe σ²)."""
        logs = sum(float(self.precision[name].double().log_().sum()) for name in self.names)
        count = sum(self.mean[name].numel() for name in self.names)
        return 0.5 * (count * math.log(2 * math.pi * math.e) - logs)

    def kl(self) -> float:
        """KL(q ‖ prior) in nats; the prior is N(0, 1/(num_data·wd)).

        Raises:
            ValueError: if a weight decay is zero: the prior is then improper and the divergence infinite.
        """
        total = 0.0
        for name in self.names:
            prior = self.num_data * self._weight_decay[name]
            if prior <= 0:
                raise ValueError(
                    f"weight_decay=0 for {name!r}, so its prior is improper and the KL divergence infinite: "
                    "use a positive weight_decay."
                )
            ratio = prior * self.variance[name].double()
            total += 0.5 * float((ratio - 1 - ratio.log() + prior * self.mean[name].double().square()).sum())
        return total

    def clone(self) -> Diagonal:
        """A copy that later steps of the optimizer do not change; a sweep with it runs at its mean."""
        mean = {name: self.mean[name].detach().clone() for name in self.names}
        return Diagonal(
            mean,
            {name: self._hessian[name].clone() for name in self.names},
            self._weight_decay,
            self._ess,
            self.num_data,
            parameters=self.parameters,
            at_mean=lambda: _weights_at(self.parameters, mean, self.at_mean),
        )

    def covariance(self, parameters: Mapping[str, Tensor]) -> Covariance:
        """Σ keyed by the given parameters, for those of the names that this posterior has."""
        return Covariance({p: self.variance[name] for name, p in parameters.items() if name in self._weight_decay})

    def _precision(self, name: str, count: float | None = None) -> Tensor:
        """count·(h + wd) in one pass over h; count is num_data unless given."""
        count = self.num_data if count is None else count
        hessian = self._hessian[name]
        return torch.add(hessian.new_full((), count * self._weight_decay[name]), hessian, alpha=count)

    def __repr__(self) -> str:
        return f"Diagonal({len(self.names)} parameters, num_data={self.num_data:g})"


@contextmanager
def _weights_at(
    parameters: Mapping[str, Tensor], mean: Mapping[str, Tensor], outer: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """The parameters hold the mean inside; an optimizer whose draw is in them steps aside first."""
    with outer():
        before = {p: p.data for p in parameters.values()}
        try:
            for name, p in parameters.items():
                p.data = mean[name].to(p.dtype)
            torch.clear_autocast_cache()
            yield
        finally:
            for p, data in before.items():
                p.data = data
            torch.clear_autocast_cache()


class _ByName(Mapping[str, Tensor]):
    """Tensors by parameter name, each computed when it is read."""

    def __init__(self, posterior: Diagonal, get: Callable[[str], Tensor]):
        self._posterior, self._get = posterior, get

    def __getitem__(self, name: str) -> Tensor:
        self._posterior._check()
        if name not in self._posterior._weight_decay:
            raise KeyError(f"no parameter named {name!r}; there are {', '.join(self._posterior.names)}")
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._posterior.names)

    def __len__(self) -> int:
        return len(self._posterior.names)
