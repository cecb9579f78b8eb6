"""A Gaussian over named parameters, made of independent blocks: what every structure of Σ shares."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vlearn._wide import widened
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.covariance_blocks import Block
from vlearn.gaussians.stopped_training import TrainingTime, times_by_name
from vlearn.per_example.replay import placed

if TYPE_CHECKING:
    from typing_extensions import Self


def unchanging() -> None:
    """The check of a posterior that no optimizer changes; it has a name, by which posteriors pickle."""


class Gaussian:
    """q = N(m, Σ) on the scale of a sum over num_data examples; a subclass says what the blocks of Σ are.

    Draws have the covariance Σ·num_data/ess; the two differ only where an optimizer is tempered.

    Args:
        mean: posterior mean of each parameter by name.
        groups: the names of each block.
        num_data: number of training examples N.
        ess: effective sample size of the draws by name; num_data where missing.
        prior_precision: δ of the prior N(μ, 1/δ) by name, that of the sum of num_data losses; unknown where missing.
        parameters: the model's parameters by name, where the posterior belongs to a model.
        check: called before anything is read; raises if the state has moved on.
        at_mean: gives a context in which the model's weights are the mean.

    Attributes:
        uncalibrated_reason: why the scale of Σ is arbitrary, if it is.
        uncalibrated_draws: whether that of draws and prior is then arbitrary too. An optimizer draws as it trains.
        num_data_given: False where num_data is the ess of an optimizer that was not told the number of examples.
        prior_mean: μ by name; 0 where missing.
        prior: the prior over the same blocks, where its entries are correlated and no prior_precision tells it.
        training_time: how long the network was trained where Σ knows it, see `stopped_at`, the shortest of its
            parameters'; else infinite.
    """

    uncalibrated_reason: str | None = None
    uncalibrated_draws: bool = True
    num_data_given: bool = True
    prior_mean: Mapping[str, Tensor] = {}
    prior: Gaussian | None = None
    training_time: float = math.inf

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        groups: Sequence[tuple[str, ...]],
        num_data: float,
        *,
        ess: Mapping[str, float] | None = None,
        prior_precision: Mapping[str, float | Tensor] | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        check: Callable[[], None] = unchanging,
        at_mean: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._mean = mean
        self.groups = {name: group for group in groups for name in group}
        self.ess = dict(ess or {})
        self.prior_precision = dict(prior_precision or {})
        self.check_fresh = check
        self.num_data = num_data
        self.parameters = dict(parameters or {})
        self.at_mean = at_mean

    def block(self, group: tuple[str, ...]) -> Block:
        """The block of these names, on the num_data scale."""
        raise NotImplementedError

    def copy_blocks(self) -> None:
        """Replace what the blocks are made of by copies."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(self.groups)

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """Posterior mean by parameter name, in the parameter's shape."""
        return LazyByName(self, self._mean.__getitem__)

    @property
    def variance(self) -> Mapping[str, Tensor]:
        """Diagonal of Σ by parameter name, on the num_data scale that sensitivities use."""
        return LazyByName(self, self._variance)

    @property
    def precision(self) -> Mapping[str, Tensor]:
        """Diagonal of Σ⁻¹ by parameter name, summed over num_data, prior included."""
        return LazyByName(self, self._precision)

    @property
    def draw_variance(self) -> Mapping[str, Tensor]:
        """Variance of the draws by parameter name, on the ess scale."""
        return LazyByName(self, lambda name: self._variance(name) * self._tempering(name))

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of every parameter by name, on the ess scale."""
        if self.uncalibrated_draws:
            self.require_calibrated("draws")
        drawn: dict[str, Tensor] = {}
        for group in self._each_group():
            for name, move in zip(group, self.block(group).draw(generator), strict=True):
                mean = self.mean[name]
                drawn[name] = torch.add(mean, move, alpha=math.sqrt(self._tempering(name))).to(mean.dtype)
        return {name: drawn[name] for name in self.names}

    def entropy(self) -> float:
        """Entropy of q in nats, ½ log det(2πe Σ)."""
        self.require_calibrated("entropy")
        count = sum(self.mean[name].numel() for name in self.names)
        return 0.5 * (count * math.log(2 * math.pi * math.e) + self._log_determinant())

    def kl(self) -> float:
        """KL(q ‖ prior) in nats, ½ Σ [δ(σ² + (m - μ)²) - 1 - log δ] - ½ log det Σ; the prior is N(μ, 1/δ), or `prior`.

        Raises:
            ValueError: if a prior precision is unknown, or zero: the prior is then improper, the divergence infinite.
        """
        self.require_calibrated("KL divergence")
        if self.prior is not None:
            return self._kl_to(self.prior)
        total = -self._log_determinant()
        for name in self.names:
            if name not in self.prior_precision:
                raise ValueError(f"the prior precision of {name!r} is unknown: pass prior_precision.")
            mean, variance = widened(self.mean[name]), widened(self.variance[name])
            prior = torch.as_tensor(self.prior_precision[name], dtype=mean.dtype, device=mean.device)
            if bool((prior <= 0).any()):
                raise ValueError(
                    f"weight_decay=0 for {name!r}, so its prior is improper and the KL divergence infinite: "
                    "use a positive weight_decay."
                )
            distance = mean - widened(self.prior_mean[name]) if name in self.prior_mean else mean
            total += float((prior * (variance + distance.square()) - 1 - prior.log()).sum())
        return 0.5 * total

    def _kl_to(self, other: Gaussian) -> float:
        """KL(q ‖ p), ½ [tr PΣ + (m - μ)ᵀP(m - μ) - dim - log det PΣ], of p = N(μ, P⁻¹) over the same blocks."""
        total = other._log_determinant() - self._log_determinant()
        for group in self._each_group():
            own, prior = self.block(group), other.block(group)
            entries = own.variances.numel()
            scales = torch.diag(own.variances.flatten().sqrt()).reshape(entries, *own.variances.shape)
            roots = own.from_basis(scales)  # the columns of U√v
            distance = [(self.mean[name] - other.mean[name]).unsqueeze(0) for name in group]
            for vectors in (roots, distance):
                total += sum(float((v * p).sum()) for v, p in zip(vectors, prior.solve(vectors), strict=True))
            total -= entries
        return 0.5 * total

    def clone(self) -> Self:
        """A copy that later steps of the optimizer do not change; a sweep with it runs at its mean."""
        mean = {name: self.mean[name].detach().clone() for name in self.names}
        kept, at_mean = object.__new__(type(self)), self.at_mean  # copy.copy would ask __getstate__, which clones
        kept.__dict__.update(self.__dict__)
        kept._mean, kept.check_fresh = mean, unchanging
        kept.at_mean = partial(weights_at, self.parameters, mean, at_mean)
        kept.copy_blocks()
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """That of a copy which follows no optimizer any more, for pickle and deepcopy.

        Raises:
            RuntimeError: if the optimizer whose state it is has moved on.
        """
        self.check_fresh()
        kept = self if self.check_fresh is unchanging else self.clone()
        mean = {name: kept.mean[name] for name in kept.names}
        return {**kept.__dict__, "at_mean": partial(weights_at, kept.parameters, mean)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file of tensors and numbers, which `vlearn.posterior.load` reads.

        Raises:
            RuntimeError: if the optimizer whose state it is has moved on.
        """
        self.check_fresh()
        # Clones: a view would take its whole storage along.
        plain = tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, self.state())
        torch.save(plain, path)

    def state(self) -> dict[str, Any]:
        """What `from_state` makes it of again: tensors, numbers and strings, in dicts and lists."""
        return {
            "kind": type(self).__name__,
            "mean": {name: self.mean[name] for name in self.names},
            "num_data": float(self.num_data),
            "ess": {name: float(value) for name, value in self.ess.items()},
            "prior_precision": dict(self.prior_precision),
            "prior_mean": dict(self.prior_mean),
            "prior": None if self.prior is None else self.prior.state(),
            "uncalibrated_reason": self.uncalibrated_reason,
            "uncalibrated_draws": self.uncalibrated_draws,
            "num_data_given": self.num_data_given,
            "training_time": self.training_time,
            **self.block_state(),
        }

    def block_state(self) -> dict[str, Any]:
        """What the blocks are made of, for `state`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved: it has no block_state and of_state.")

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Gaussian:
        """A posterior from what `state` gave; it belongs to no model.

        Raises:
            ValueError: if there is none of this kind.
        """
        kinds = {kind.__name__: kind for kind in Gaussian.__subclasses__()}
        if state.get("kind") not in kinds:
            raise ValueError(
                f"a state of kind {state.get('kind')!r} is that of no posterior: there are {', '.join(kinds)}."
            )
        posterior = kinds[state["kind"]].of_state(state)
        posterior.prior_mean, posterior.uncalibrated_reason = state["prior_mean"], state["uncalibrated_reason"]
        # What earlier files do not tell:
        posterior.training_time = state.get("training_time", math.inf)
        posterior.uncalibrated_draws = state.get("uncalibrated_draws", True)
        posterior.num_data_given = state.get("num_data_given", True)
        posterior.prior = None if state.get("prior") is None else Gaussian.from_state(state["prior"])
        return posterior

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """One of this class from its own state."""
        raise NotImplementedError

    def belong_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Let it be that of a model's parameters, by name: a sweep is made with its mean in them."""
        self.parameters = dict(parameters)
        self.at_mean = partial(weights_at, self.parameters, {name: self.mean[name] for name in parameters})

    def stopped_at(self, training_time: TrainingTime) -> Self:
        """The posterior of a network that gradient descent has trained only for so long: a copy.

        Its precision is N w/(1 - e^{-ηw}) in the place of N w, w an eigenvalue of the mean loss's curvature, prior
        included: see `vlearn.gaussians.stopped_training`.

        Args:
            training_time: η, of SGD the sum of the learning rates of all steps, over 1 - momentum; by name, or by
                parameter where the posterior belongs to a model, where they differ. `vlearn.posterior.training_time`
                has it for torch's optimizers. Infinite for a network that was trained to the end.
        Raises:
            ValueError: if it is not positive, or lacks a parameter, or the posterior has one already.
        """
        times = times_by_name(training_time, {name: self.parameters.get(name) for name in self.names})
        kept = self.clone()
        if any(map(math.isfinite, times.values())):
            if math.isfinite(self.training_time):
                raise ValueError(
                    f"this posterior has the training time {self.training_time:g} already, and its precision is no "
                    "longer the curvature that another one would act on: take the posterior as it was fitted."
                )
            kept.stop_blocks(times)
            kept.training_time = min(times.values())
        return kept

    def stop_blocks(self, times: Mapping[str, float]) -> None:
        """Replace the curvature of the blocks, which are copies, by that of training stopped at η, by name."""
        raise NotImplementedError

    def damped(self, relative: float = 0.1) -> Self:
        """A copy that ranks: each layer's prior is replaced by a share of its own mean curvature, as influences use it.

        Its precision is N(s + λ) in the place of N(s + wd), λ = `relative` times the mean of the layer's curvature s,
        or of all where the posterior is dense. Influences rank better by it where the weight decay is large beside the
        curvature and the training too short to feel it. Their size and leave-one-out losses want the training's prior.

        Args:
            relative: that share; a tenth is what Grosse et al., 2023 (arXiv:2308.03296) take.
        Raises:
            ValueError: if it is not positive, a layer has no curvature, the posterior has a training time, or it is
                dense and its prior is not known.
        """
        if not (relative > 0 and math.isfinite(relative)):
            raise ValueError(f"relative={relative}, but it must be positive: use 0.1.")
        if math.isfinite(self.training_time):
            raise ValueError(
                f"this posterior has the training time {self.training_time:g}, and its precision is no longer the "
                "curvature: damp the posterior as it was fitted."
            )
        kept = self.clone()
        kept.damp_blocks(relative)
        return kept

    def damp_blocks(self, relative: float) -> None:
        """Replace the prior of the blocks, which are copies, by a share of their mean curvature; see `damped`."""
        raise NotImplementedError

    def _replace_prior(self, curvatures: Mapping[str, float], relative: float) -> None:
        """δ = N·relative·s of each name, from its mean curvature s."""
        for name, curvature in curvatures.items():
            if not curvature > 0:
                raise ValueError(f"the mean curvature of {name!r} is {curvature:g}: there is nothing to damp it by.")
        self.prior_precision = {name: self.num_data * relative * s for name, s in curvatures.items()}
        self.prior = None

    def covariance(self, parameters: Mapping[str, Tensor]) -> Covariance:
        """Σ keyed by the given parameters, for those of the names that this posterior has.

        Raises:
            ValueError: if a block has some of them, but not all, or some of these are frozen.
        """
        blocks = []
        for group in self._each_group():
            missing = [name for name in group if name not in parameters]
            if len(missing) == len(group):
                continue
            if missing:
                raise ValueError(
                    f"the model has no trainable parameter {missing[0]!r}, but the posterior has, correlated with "
                    "others: pass the model that was trained."
                )
            frozen = [name for name in group if not parameters[name].requires_grad]
            if 0 < len(frozen) < len(group):
                raise ValueError(
                    f"{frozen[0]!r} is frozen (requires_grad=False), but the posterior correlates it with others that "
                    "are not, whose covariance is another one without it: fit a posterior to the model as it is."
                )
            blocks.append(([parameters[name] for name in group], self.block(group)))
        return Covariance(blocks)

    def require_calibrated(self, what: str) -> None:
        """Raises RuntimeError if the scale of Σ, which `what` depends on, is arbitrary."""
        if self.uncalibrated_reason:
            raise RuntimeError(f"this posterior gives no {what}: {self.uncalibrated_reason}")

    def _each_group(self) -> list[tuple[str, ...]]:
        self.check_fresh()
        return list(dict.fromkeys(self.groups.values()))

    def _variance(self, name: str) -> Tensor:
        group = self.groups[name]
        return self.block(group).diagonal()[group.index(name)]

    def _precision(self, name: str) -> Tensor:
        group = self.groups[name]
        return self.block(group).diagonal_precision()[group.index(name)]

    def _tempering(self, name: str) -> float:
        return self.num_data / self.ess.get(name, self.num_data)

    def _log_determinant(self) -> float:
        return sum(self.block(group).log_determinant() for group in self._each_group())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.names)} parameters, num_data={self.num_data:g})"


@contextmanager
def weights_at(
    parameters: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    outer: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """The parameters hold the mean inside; an optimizer whose draw is in them steps aside first."""
    with outer(), placed({p: mean[name] for name, p in parameters.items()}):
        yield


class LazyByName(Mapping[str, Tensor]):
    """Tensors by parameter name, each computed when it is read."""

    def __init__(self, posterior: Gaussian, get: Callable[[str], Tensor]):
        self._posterior, self._get = posterior, get

    def __getitem__(self, name: str) -> Tensor:
        self._posterior.check_fresh()
        if name not in self._posterior.groups:
            raise KeyError(f"no parameter named {name!r}; there are {', '.join(self._posterior.names)}")
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._posterior.names)

    def __len__(self) -> int:
        return len(self._posterior.names)
