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
from vlearn.losses.residual_checks import (
    LossMakeup,
    binary_weights,
    categorical_weights,
    check_squared_error,
)

Likelihood = str | Callable[[Tensor], Distribution]
LIKELIHOODS = ("categorical", "gaussian", "bernoulli")


def probe(
    likelihood: Likelihood,
    how: str,
    output: Tensor,
    residual: Tensor,
    makeup: LossMakeup,
    generator: torch.Generator | None,
) -> Tensor:
    """u ``[N, ...]`` in the output's shape, for each example's own loss.

    Args:
        likelihood: "categorical" (softmax cross-entropy, over whichever axis the residual shows), "bernoulli" (binary
            cross-entropy of logits), "gaussian" (squared error, as `F.mse_loss` has it) or output -> distribution of
            the targets, whose negative log-likelihood is the loss.
        how: "ggn", u = R z with R Rᵀ = Λ and independent signs z; or "sampled", the residual of labels that are
            sampled from the model.
        output: the model's, ``[N, ...]``.
        residual: the loss's gradient with respect to it; rows where it is zero are not in the loss.
        makeup: how the loss is made up of the examples' own.
        generator: of the random numbers (a distribution samples with torch's global one).
    Raises:
        ValueError: if the loss is not seen to be that of the likelihood. A callable is taken at its word.
    """
    wide = output.detach() if torch.finfo(output.dtype).bits >= 32 else output.detach().float()
    if likelihood == "categorical":
        axis, weights = categorical_weights(output.detach(), residual, makeup)
        u = _categorical(wide.movedim(axis, -1), how, generator).movedim(-1, axis)
        return u * weights.to(wide.dtype).sqrt()
    if likelihood == "bernoulli":
        return _bernoulli(wide, how, generator) * binary_weights(output.detach(), residual, makeup).to(wide).sqrt()
    if likelihood == "gaussian":
        check_squared_error(output.detach(), residual, makeup)
        z = _signs(wide, generator) if how == "ggn" else _normal(wide, generator)
        u, rows = math.sqrt(2) * z, wide.numel()  # (f - y)² has the curvature 2; y ~ N(f, 1/2)
    else:
        assert callable(likelihood)
        u, rows = _distribution(likelihood, wide, how, generator)
    return u * math.sqrt(makeup.weight_of(max(rows, 1)))


def _categorical(scores: Tensor, how: str, generator: torch.Generator | None) -> Tensor:
    p = scores.softmax(-1)
    if how == "sampled":
        labels = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        return p - F.one_hot(labels, p.shape[-1]).to(p.dtype)
    return softmax_root(p, _signs(scores, generator), -1)


def _bernoulli(logits: Tensor, how: str, generator: torch.Generator | None) -> Tensor:
    p = logits.sigmoid()
    if how == "sampled":
        return p - torch.bernoulli(p, generator=generator)
    return (p * (-logits).sigmoid()).sqrt() * _signs(logits, generator)


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
