"""The curvature of the training loss in the model's output, as one random gradient that holds it on average.

For each row of the output (one prediction: an example's class scores, one position's, one number), with Λ the Hessian
of the row's loss in the output, a probe u has E[u uᵀ] = Λ, so that J_nᵀu_n has the Gauss-Newton matrix J_nᵀΛ_nJ_n as
its second moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

from vlearn.losses.output_hessian import hessian_root, output_hessian, softmax_root

Likelihood = str | Callable[[Tensor], Distribution]
LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
SUMS_TO_ZERO = 1e-3  # relative to the entries; of C independent entries the sum is 1/√C


def probe(
    likelihood: Likelihood,
    how: str,
    output: Tensor,
    residual: Tensor,
    weight_of: Callable[[int], float],
    generator: torch.Generator | None,
) -> Tensor:
    """u ``[N, ...]`` in the output's shape, for each example's own loss.

    Args:
        likelihood: "categorical" (softmax cross-entropy over the axis of the classes, see `class_axis`), "gaussian"
            (squared error, as `F.mse_loss` has it), "bernoulli" (binary cross-entropy of logits) or output ->
            distribution of the targets, whose negative log-likelihood is the loss.
        how: "ggn", u = R z with R Rᵀ = Λ and independent signs z; or "sampled", the residual of labels that are
            sampled from the model.
        output: the model's, ``[N, ...]``.
        residual: the loss's gradient with respect to it; rows where it is zero are not in the loss.
        weight_of: number of rows in the loss -> what an example's own loss multiplies each of its rows with.
        generator: of the random numbers (a distribution samples with torch's global one).
    Raises:
        ValueError: if the residual is not that of the likelihood, as far as it shows.
    """
    wide = output.detach() if torch.finfo(output.dtype).bits >= 32 else output.detach().float()
    if isinstance(likelihood, str):
        axis = class_axis(output, residual)
        _check_residual(likelihood, output, axis)
    if likelihood == "categorical":
        assert axis is not None
        counted = residual.ne(0).any(axis, keepdim=True)
        u = _categorical(wide.movedim(axis, -1), how, generator).movedim(-1, axis) * counted
        rows = int(counted.sum())
    elif likelihood == "gaussian":
        z = _signs(wide, generator) if how == "ggn" else _normal(wide, generator)
        u, rows = math.sqrt(2) * z, wide.numel()  # (f - y)² has the curvature 2; y ~ N(f, 1/2)
    elif likelihood == "bernoulli":
        u, rows = _bernoulli(wide, how, generator), wide.numel()
    else:
        assert callable(likelihood)
        u, rows = _distribution(likelihood, wide, how, generator)
    return u * math.sqrt(weight_of(max(rows, 1)))


def class_axis(output: Tensor, residual: Tensor) -> int | None:
    """The axis of the classes of a softmax cross-entropy, whose gradient sums to zero over them; None if none does.

    The last one, or axis 1 of ``[N, C, ...]``.

    Args:
        output: ``[N, ...]``.
        residual: the loss's gradient with respect to it.
    """
    last, wide = output.dim() - 1, residual.detach().float() if residual.dtype.itemsize < 4 else residual.detach()
    for axis in dict.fromkeys((last, 1)):
        if 0 < axis <= last and output.shape[axis] > 1:
            sums, sizes = wide.sum(axis).abs().sum(), wide.abs().sum()
            narrow = min(torch.finfo(each.dtype).bits for each in (output, residual)) < 32
            tolerance = min(3e-2, 0.3 / math.sqrt(output.shape[axis])) if narrow else SUMS_TO_ZERO
            if bool(sums <= tolerance * sizes):
                return axis
    return None


def _check_residual(likelihood: str, output: Tensor, axis: int | None) -> None:
    given = f"the loss's gradient with respect to the output of shape {tuple(output.shape)}"
    if likelihood == "categorical" and axis is None:
        raise ValueError(
            f"{given} does not sum to zero over any classes, so the loss is no softmax cross-entropy: pass "
            "likelihood='gaussian' (squared error), 'bernoulli' (binary cross-entropy of logits) or a callable output "
            "-> torch.distributions.Distribution."
        )
    if likelihood != "categorical" and axis is not None:
        raise ValueError(
            f"{given} sums to zero over axis {axis}, as that of softmax cross-entropy does, but likelihood="
            f"{likelihood!r} was given: pass likelihood='categorical'."
        )


def _bernoulli(logits: Tensor, how: str, generator: torch.Generator | None) -> Tensor:
    p = logits.sigmoid()
    if how == "sampled":
        return p - torch.bernoulli(p, generator=generator)
    return (p * (1 - p)).sqrt() * _signs(logits, generator)  # the curvature p(1 - p)


def _categorical(scores: Tensor, how: str, generator: torch.Generator | None) -> Tensor:
    p = scores.softmax(-1)
    if how == "sampled":
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        return p - F.one_hot(labels, p.shape[-1]).to(p.dtype)
    return softmax_root(p, _signs(scores, generator), -1)


@torch.enable_grad()
def _distribution(
    likelihood: Callable[[Tensor], Distribution], output: Tensor, how: str, generator: torch.Generator | None
) -> tuple[Tensor, int]:
    leaf = output.requires_grad_()
    distribution = likelihood(leaf)
    with torch.no_grad():
        target = distribution.sample()
    losses = -distribution.log_prob(target)
    (residual,) = torch.autograd.grad(losses.sum(), leaf, create_graph=how == "ggn")
    if how == "sampled":
        return residual, losses.numel()
    root = hessian_root(output_hessian(residual, leaf), leaf)  # [N, C, C]; does not depend on the target
    z = _signs(root[:, 0], generator).unsqueeze(2)
    return (root @ z).reshape(output.shape).detach(), losses.numel()


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent ±1."""
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like.dtype) * 2 - 1


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
