"""Posteriors read out of torch's own optimizers (Nickl et al., 2023, arXiv:2310.19273, Table 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from vlearn.capture.names import named_parameters
from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.gaussian import weights_at

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

        Adam, AdamW    Σ = 1/(N√v̂ + δ), v̂ = exp_avg_sq/(1 - β₂ᵗ); with amsgrad, max_exp_avg_sq
        RMSprop        the same, v̂ = square_avg/(1 - αᵗ)
        SGD            Σ = I, of arbitrary scale: it ranks examples, but predicts no leave-one-out loss

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
        A posterior over the parameters that the optimizer has moved.
    Raises:
        TypeError: for another optimizer.
        ValueError: if an argument breaks its rule, or the optimizer has none of the model's parameters.
        RuntimeError: if it has taken no step.
    """
    optimizer = _unwrapped(optimizer)
    moments = _second_moments(optimizer)
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

    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    known = {name: p for name, p in named_parameters(model) if p in groups and p.requires_grad}
    if not known:
        raise ValueError(
            f"{type(optimizer).__name__} trains none of the parameters of this {type(model).__name__}: pass the model "
            "whose parameters it was given."
        )
    if moments:
        known = {name: p for name, p in known.items() if any(key in optimizer.state[p] for key in moments)}
        if not known:
            raise RuntimeError(f"{type(optimizer).__name__} has taken no step, so it knows no curvature: train first.")
    mean = {name: p.detach().clone() for name, p in known.items()}
    if is_sgd:
        hessian, decay = {name: torch.zeros_like(value) for name, value in mean.items()}, 1 / num_data
    else:
        hessian = {name: _root(optimizer.state[p], groups[p], moments, debias) for name, p in known.items()}
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


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a training framework's has in its `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _second_moments(optimizer: Optimizer) -> tuple[str, ...]:
    """Keys of v in the optimizer's state, the first that is there counts; none for SGD."""
    if isinstance(optimizer, SGD):
        return ()
    if isinstance(optimizer, Adam | AdamW):
        return ("max_exp_avg_sq", "exp_avg_sq")
    if isinstance(optimizer, RMSprop):
        return ("square_avg",)
    own = " It has a posterior of its own: optimizer.posterior()." if hasattr(optimizer, "posterior") else ""
    raise TypeError(
        f"{type(optimizer).__name__} is not among SGD, RMSprop, Adam and AdamW of torch.optim, whose state is known "
        f"to give a posterior.{own}"
    )


def _root(state: dict[str, Any], group: dict[str, Any], moments: tuple[str, ...], debias: bool) -> Tensor:
    """√v̂, per example; float32 or wider."""
    v = next(state[key] for key in moments if key in state)
    v = v.detach().to(torch.promote_types(v.dtype, torch.float32), copy=True)
    if debias:
        decay = float(group["betas"][1] if "betas" in group else group["alpha"])
        v /= 1 - decay ** float(state["step"])
    return v.sqrt_()
