"""Posteriors read out of torch's own optimizers (Nickl et al., 2023, arXiv:2310.19273, Table 1)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from vlearn.capture.names import named_parameters
from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.gaussian import weights_at
from vlearn.posterior.adaptive_state import root_second_moments, unwrapped
from vlearn.sharded.tensors import whole

NO_SCALE = (
    "it comes from SGD, whose Σ is the identity times an arbitrary number, so self-influence and deviation rank the "
    "examples (sweep(..., loo_loss=False)) but have no size. Train with an adaptive or variational optimizer, or fit a "
    "Laplace approximation."
)


def from_optimizer(
    optimizer: Optimizer,
    model: nn.Module,
    num_data: float,
    prior_precision: float | None = None,
    debias: bool = True,
) -> Diagonal:
    """The diagonal posterior that the state of a torch optimizer implies, at the model's present weights.

        Adam, AdamW, RMSprop    Σ = 1/(N√v̂ + δ), v̂ as in `vlearn.posterior.adaptive_state.root_second_moments`
        SGD                     Σ = I, of arbitrary scale: it ranks examples, but predicts no leave-one-out loss

    It is a copy: later steps do not change it. √v̂ of minibatch gradients overestimates the curvature the more, the
    smaller the batch.

    Args:
        optimizer: has taken a step; also as Accelerate, Fabric or Lightning have wrapped it.
        model: the network it trains; gives the names.
        num_data: number of training examples N.
        prior_precision: δ of the prior N(0, 1/δ), on the scale of the summed loss. An L2 penalty on the mean loss
            with weight_decay λ is δ = N·λ; AdamW's decoupled decay is no prior. Not used for SGD.
        debias: divide v by 1 - βᵗ; False is the paper's own code.
    Returns:
        A posterior over the parameters that the optimizer has moved; whole where they are sharded, for which all
        processes must ask for it.
    Raises:
        TypeError: for another optimizer.
        ValueError: if an argument breaks its rule, or the optimizer has none of the model's parameters.
        RuntimeError: if it has taken no step.
    """
    optimizer = unwrapped(optimizer)
    if hasattr(optimizer, "posterior"):
        raise TypeError(f"{type(optimizer).__name__} has a posterior of its own: optimizer.posterior().")
    moments = root_second_moments(optimizer, debias)
    if not num_data > 0:
        raise ValueError(f"num_data={num_data}, but it must be positive: use the number of training examples.")
    is_sgd = isinstance(optimizer, SGD)
    if not is_sgd and prior_precision is None:
        raise ValueError(
            "prior_precision is missing: pass that of the prior on the scale of the summed loss, num_data times the "
            "weight of an L2 penalty on the mean loss."
        )
    if not is_sgd and not prior_precision > 0:  # pyright: ignore
        raise ValueError(f"prior_precision={prior_precision}, but it must be positive.")

    trained = {p for group in optimizer.param_groups for p in group["params"]}
    known = {name: p for name, p in named_parameters(model) if p in trained and p.requires_grad}
    if not known:
        raise ValueError(
            f"{type(optimizer).__name__} trains none of the parameters of this {type(model).__name__}: pass the model "
            "whose parameters it was given."
        )
    if not is_sgd:
        known = {name: p for name, p in known.items() if p in moments}
        if not known:
            raise RuntimeError(f"{type(optimizer).__name__} has taken no step, so it knows no curvature: train first.")
    mean = {name: whole(p.detach()).clone() for name, p in known.items()}
    if is_sgd:
        hessian, decay = {name: torch.zeros_like(value) for name, value in mean.items()}, 1 / num_data
    else:
        hessian = {name: whole(moments[p]) for name, p in known.items()}
        decay = prior_precision / num_data  # pyright: ignore
    posterior = Diagonal(
        mean,
        hessian,
        dict.fromkeys(mean, decay),
        dict.fromkeys(mean, float(num_data)),
        num_data,
        parameters=known,
        at_mean=lambda: weights_at(known, mean),
    )
    posterior.uncalibrated_reason = NO_SCALE if is_sgd else None
    return posterior
