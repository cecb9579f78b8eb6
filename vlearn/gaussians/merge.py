"""The product of posteriors of different data over one prior: the posterior of all of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from vlearn._wide import widened
from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.full import Full
from vlearn.gaussians.gaussian import Gaussian, weights_at


def merge(posteriors: Sequence[Gaussian]) -> Gaussian:
    """Merge the posteriors that models of one architecture have learned from different data under one prior.

        p(θ) Π_k q_k(θ)/p(θ):  P = Σ_k P_k - (K - 1)P₀,  m = P⁻¹[Σ_k P_k m_k - (K - 1)P₀m₀]

    With q_k = N(m_k, P_k⁻¹) exact it is the posterior given all of the data, each example of which must have been seen
    by one of them only. Where the models are not linear it is a local approximation: train all from one start, or with
    one ``prior=``.

    Args:
        posteriors: `Diagonal` ones, or `Full` ones, of the same parameters and the same prior. A product of Kronecker
            factors is none; merge its neighbours `Diagonal.nearest(posterior)`.
    Returns:
        A posterior of the same kind and prior, of as many examples as all have together; it belongs to the model of the
        first, if that belongs to one. `model.load_state_dict(dict(merged.mean), strict=False)` takes its mean.
    Raises:
        ValueError: if they are not of one kind, of the same parameters, or of one known prior, or the precision that is
            left is not positive.
        RuntimeError: if one is a view of an optimizer's state that has changed since, or has an arbitrary scale.
    """
    posteriors = list(posteriors)
    _check(posteriors)
    first = posteriors[0]
    _check_prior(posteriors)
    num_data = math.fsum(posterior.num_data for posterior in posteriors)
    ess = {name: math.fsum(each.ess.get(name, each.num_data) for each in posteriors) for name in first.names}
    product = _of_diagonals if isinstance(first, Diagonal) else _of_dense
    mean, merged = product(posteriors, num_data, ess)
    merged.prior, merged.prior_mean = first.prior, dict(first.prior_mean)
    merged.num_data_given = all(posterior.num_data_given for posterior in posteriors)
    merged.parameters = dict(first.parameters)
    if merged.parameters:
        merged.at_mean = partial(weights_at, merged.parameters, mean, first.at_mean)
    return merged


def _check(posteriors: list[Gaussian]) -> None:
    if not posteriors:
        raise ValueError("there is nothing to merge: give a sequence of posteriors.")
    for posterior in posteriors:
        posterior.check_fresh()
        posterior.require_calibrated("product with others")
        if math.isfinite(posterior.training_time):
            raise ValueError(
                f"a posterior has the training time {posterior.training_time:g}, so its precision is not the sum of "
                "curvature and prior: merge the posteriors as they were fitted."
            )
    kinds = {type(posterior) for posterior in posteriors}
    if len(kinds) > 1 or not issubclass(kinds.pop(), Diagonal | Full):
        listed = ", ".join(dict.fromkeys(type(posterior).__name__ for posterior in posteriors))
        raise ValueError(
            f"the posteriors are of the kind {listed}, but only a product of Diagonal ones or of Full ones is of their "
            "kind: merge [vlearn.posterior.Diagonal.nearest(posterior) for each]."
        )
    first = posteriors[0]
    for posterior in posteriors:
        same = posterior.names == first.names
        if not same or any(posterior.mean[name].shape != first.mean[name].shape for name in first.names):
            raise ValueError(
                "the posteriors are not of the same parameters in the same order: merge those of models of one "
                "architecture."
            )


def _check_prior(posteriors: list[Gaussian]) -> None:
    """Raise ValueError unless all have the same prior, and tell it."""
    first = posteriors[0]
    for posterior in posteriors:
        for name in first.names:
            pairs = zip(_prior_of(first, name), _prior_of(posterior, name), strict=True)
            if not all(torch.allclose(left, right, rtol=1e-5) for left, right in pairs):
                raise ValueError(
                    f"the prior of {name!r} is not the same in all posteriors: give their optimizers one prior, "
                    "num_data·weight_decay or prior=."
                )
        if isinstance(first, Full) and not torch.allclose(_joint_prior(first), _joint_prior(posterior), rtol=1e-5):
            raise ValueError(
                "the posteriors differ in the correlations of their prior: give their optimizers one prior=."
            )


def _prior_of(posterior: Gaussian, name: str) -> tuple[Tensor, Tensor]:
    """(precision, mean) of the prior of a parameter's entries, in its shape."""
    mean = widened(posterior.mean[name])
    if posterior.prior is not None:
        return posterior.prior.precision[name].to(mean), posterior.prior.mean[name].to(mean)
    precision = torch.as_tensor(posterior.prior_precision.get(name, 0.0), dtype=mean.dtype, device=mean.device)
    if not bool((precision > 0).all()):
        raise ValueError(
            f"the prior precision of {name!r} is zero or unknown, but a product over one prior divides by it: give "
            "the posteriors their prior_precision (an optimizer a weight_decay)."
        )
    center = posterior.prior_mean.get(name)
    return precision.expand_as(mean), torch.zeros_like(mean) if center is None else center.to(mean)


def _joint_prior(posterior: Gaussian) -> Tensor:
    """The precision ``[P, P]`` of the prior of a dense posterior, in float64."""
    if posterior.prior is not None:
        return _precision(posterior.prior)
    return torch.cat([_prior_of(posterior, name)[0].reshape(-1) for name in posterior.names]).diag()


def _precision(dense: Gaussian) -> Tensor:
    """Σ⁻¹ ``[P, P]`` of a dense Gaussian, in float64."""
    return widened(dense.block(dense.names).precision())


def _of_diagonals(
    posteriors: list[Gaussian], num_data: float, ess: dict[str, float]
) -> tuple[dict[str, Tensor], Diagonal]:
    first, others = posteriors[0], len(posteriors) - 1
    mean, hessian, decay = {}, {}, {}
    for name in first.names:
        known, center = _prior_of(first, name)
        pairs = [(each.precision[name].to(center), each.mean[name].to(center)) for each in posteriors]
        precision = torch.stack([p for p, _ in pairs]).sum(0) - others * known
        _check_positive(name, precision)
        weighted = torch.stack([p * m for p, m in pairs]).sum(0) - others * known * center
        mean[name] = (weighted / precision).to(first.mean[name].dtype)
        hessian[name] = ((precision - known) / num_data).to(first.precision[name].dtype)
        decay[name] = first.prior_precision[name] / num_data
    return mean, Diagonal(mean, hessian, decay, ess, num_data)


def _of_dense(posteriors: list[Gaussian], num_data: float, ess: dict[str, float]) -> tuple[dict[str, Tensor], Full]:
    first, others = posteriors[0], len(posteriors) - 1
    names, sizes = first.names, [first.mean[name].numel() for name in first.names]
    joint = _joint_prior(first)
    precision, weighted = -others * joint, -others * joint @ _flat({name: _prior_of(first, name)[1] for name in names})
    for each in posteriors:
        own = _precision(each).to(joint)
        precision += own
        weighted += own @ _flat(each.mean).to(joint)
    factor, info = torch.linalg.cholesky_ex(precision)
    for name, part in zip(names, precision.diagonal().split(sizes), strict=True):
        _check_positive(name, part)
    if int(info) != 0:
        raise ValueError(
            "the precision that is left is not positive definite, for the curvature is negative where the posteriors "
            "were learned: train longer, or with a curvature that never is (FullVON with rule='von')."
        )
    solved = torch.cholesky_solve(weighted.unsqueeze(1), factor).squeeze(1)
    mean = {name: part.reshape(first.mean[name].shape) for name, part in zip(names, solved.split(sizes), strict=True)}
    mean = {name: tensor.to(first.mean[name].dtype) for name, tensor in mean.items()}
    dtype = first.block(names).variances.dtype
    return mean, Full(mean, precision.to(dtype), num_data, ess=ess, prior_precision=first.prior_precision)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries ``[P]``, in float64."""
    return torch.cat([widened(tensor.reshape(-1)) for tensor in tensors.values()])


def _check_positive(name: str, precision: Tensor) -> None:
    if not bool(((precision > 0) & precision.isfinite()).all()):
        raise ValueError(
            f"the precision that is left of {name!r} is not positive, for its curvature is negative where the "
            "posteriors were learned: train longer, or with a curvature that never is (VON, FullVON)."
        )
