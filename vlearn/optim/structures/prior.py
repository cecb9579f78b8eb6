"""A Gaussian prior N(m₀, P₀⁻¹) of some parameters, in the place of the weight decay wd, which is N(0, 1/(N·wd)).

A parameter that has one keeps it in its state, summed over the data:

    prior_mean       m₀, in the parameter's shape
    prior_precision  the diagonal of P₀, likewise; a dense structure has `prior_rows` beside it

With P₀/N for wd and m - m₀ for m every formula that has a weight decay holds, entry by entry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlearn.gaussians.eigenbasis import rotate_diagonal
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.protocol import of_same_name
from vlearn.optim.kernels.entries import as_real
from vlearn.optim.parameters.options import tempered_ess_and_decay, tempering_of
from vlearn.optim.parameters.parameters import Group, Parameters, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.per_example.kronecker_factors import Basis, Layer
from vlearn.sharded.tensors import sharded_as, whole


class Decay(NamedTuple):
    """The weight decay of some tensors, or the prior that stands for it.

    Attributes:
        rate: wd; or P₀/N of each.
        center: m₀ of each; nothing is 0.
    """

    rate: float | list[Tensor]
    center: list[Tensor] | tuple[()] = ()

    def of(self, i: int) -> Decay:
        """That of one of the tensors."""
        if isinstance(self.rate, list):
            return Decay([self.rate[i]], [self.center[i]])
        return self

    def damped(self, damping: float) -> float | list[Tensor]:
        """wd + damping, or P₀/N + damping of each."""
        return list(torch._foreach_add(self.rate, damping)) if isinstance(self.rate, list) else self.rate + damping

    def pull(self, means: list[Tensor], factor: float = 1.0) -> list[Tensor]:
        """factor·wd∘(m - m₀), as new tensors."""
        if isinstance(self.rate, list):
            pulls = torch._foreach_sub(means, self.center)
            torch._foreach_mul_(pulls, self.rate)
            torch._foreach_mul_(pulls, factor)
            return list(pulls)
        return list(torch._foreach_mul(means, self.rate * factor))


def decay_of(parameters: Parameters, group: Group, slices: list[ParameterSlice]) -> Decay:
    """That of slices of one block, which all have a prior, or none."""
    states = [parameters.state[piece.parameter] for piece in slices]
    if "prior_precision" not in states[0]:
        return Decay(float(tempered_ess_and_decay(group)[1]))
    pairs = list(zip(slices, states, strict=True))
    precisions = [piece.of(state["prior_precision"]) for piece, state in pairs]
    rates = torch._foreach_mul(precisions, tempering_of(group) / parameters.num_data)
    return Decay(list(rates), [piece.of(state["prior_mean"]) for piece, state in pairs])


def decay_of_whole(parameters: Parameters, group: Group, p: Tensor) -> Decay:
    """That of a whole parameter."""
    state = parameters.state[p]
    if "prior_precision" not in state:
        return Decay(float(tempered_ess_and_decay(group)[1]))
    return Decay([state["prior_precision"] * (tempering_of(group) / parameters.num_data)], [state["prior_mean"]])


def rate_of(parameters: Parameters, group: Group, p: Tensor) -> float | Tensor:
    """wd of a whole parameter, or P₀/N in its shape."""
    rate = decay_of_whole(parameters, group, p).rate
    return whole(rate[0]) if isinstance(rate, list) else rate


def rate_of_layer(parameters: Parameters, group: Group, layer: Layer, basis: Basis) -> float | Tensor:
    """wd of a layer, or the diagonal ``[O, I]`` of P₀/N in a basis, with which q is nearest to the posterior there."""
    if not any(parameters.has_prior(p) for p in layer.parameters):
        return float(tempered_ess_and_decay(group)[1])
    rates = [
        torch.as_tensor(rate_of(parameters, group, p), dtype=state_dtype(p), device=p.device) for p in layer.parameters
    ]
    columns = [rate.expand(p.shape).reshape(len(p), -1) for rate, p in zip(rates, layer.parameters, strict=True)]
    return rotate_diagonal(torch.cat(columns, 1), (None, None), basis)


def prior_means(parameters: Parameters, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """m₀ of those parameters that have one, by name."""
    return {name: whole(parameters.state[p]["prior_mean"]) for name, p in named.items() if parameters.has_prior(p)}


def parameters_of_prior(parameters: Parameters, prior: Any, candidates: list[Tensor], whole: bool) -> dict[str, Tensor]:
    """The parameters that a prior speaks of, by its names: the same tensors, or else those of the same names.

    Args:
        prior: what the user gave.
        candidates: the parameters that may be meant.
        whole: each of the prior's parameters must be among them; else at least one.
    Raises:
        TypeError, ValueError: if it is no prior for them.
        RuntimeError: if it is a view of an optimizer's state that has changed since.
    """
    if not isinstance(prior, Gaussian):
        raise TypeError(
            f"prior={prior!r}, but it must be a posterior of vlearn's: use optimizer.posterior() or posterior.fit()."
        )
    prior.check_fresh()
    prior.require_calibrated("prior")
    own = {id(p): p for p in candidates}
    found = {name: own[id(p)] for name, p in prior.parameters.items() if id(p) in own and name in prior.groups}
    if not found:
        names = parameters.names()
        found = of_same_name({names[p]: p for p in candidates}, prior.names)
    missing = [name for name in prior.names if name not in found]
    if missing and (whole or not found):
        raise ValueError(
            f"the prior has {missing[0]!r}, which is none of the parameters here: pass its model, or that model's "
            'named_parameters(), or the prior in a parameter group, {"params": ..., "prior": posterior}, of what both '
            "have."
        )
    for name, p in found.items():
        shape = as_real(p.detach()).shape
        if prior.mean[name].shape != shape:
            raise ValueError(
                f"the prior's {name!r} has shape {tuple(prior.mean[name].shape)}, but that of the model has "
                f"{tuple(shape)}: pass the prior in a parameter group of the others, "
                '{"params": ..., "prior": posterior}.'
            )
        precision = prior.precision[name]
        if not bool(((precision > 0) & precision.isfinite() & prior.mean[name].isfinite()).all()):
            raise ValueError(f"the prior of {name!r} is not finite, or its precision not positive: fit it anew.")
    return found


def diagonal_prior(prior: Gaussian, named: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """What a prior puts into the state of each parameter: its mean, and the diagonal of its precision."""
    return {
        p: {"prior_mean": _in_state(prior.mean[name], p), "prior_precision": _in_state(prior.precision[name], p)}
        for name, p in named.items()
    }


def _in_state(tensor: Tensor, p: Tensor) -> Tensor:
    return sharded_as(p, tensor.detach().to(p.device, state_dtype(p), copy=True))
