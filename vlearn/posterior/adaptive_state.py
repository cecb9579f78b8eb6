"""What the state of torch's adaptive optimizers says of the curvature: √v̂ of minibatch gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

# Their decay adds λθ to the gradient; torch's others decay the weights alone (Adafactor, Muon), or by more (ASGD).
PENALISE = (SGD, Adam, RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a training framework's has in its `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def root_second_moments(optimizer: Optimizer, debias: bool = True) -> dict[Tensor, Tensor]:
    """√v̂ of each parameter that the optimizer has moved, per example; float32 or wider. Empty for SGD.

        Adam, AdamW    v̂ = exp_avg_sq/(1 - β₂ᵗ); with amsgrad, max_exp_avg_sq
        RMSprop        v̂ = square_avg/(1 - αᵗ)
        vlearn.VAdamW  as AdamW

    Args:
        debias: divide v by 1 - βᵗ.
    Raises:
        TypeError: for another optimizer.
    """
    own = getattr(optimizer, "root_second_moments", None)
    if own is not None:
        return own()
    keys = _keys(optimizer)
    known = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return {
        p: _root(optimizer.state[p], group, keys, debias)
        for p, group in known
        if p in optimizer.state and any(key in optimizer.state[p] for key in keys)
    }


def decouples_weight_decay(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the decay of a parameter group acts on the weights alone, past the preconditioner."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay", False))


def penalises_weights(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether the decay of a parameter group is an L2 penalty on the loss, as of variational optimizers it is."""
    return isinstance(optimizer, PENALISE) or "ess" in group


def _keys(optimizer: Optimizer) -> tuple[str, ...]:
    """Keys of v in the optimizer's state, the first that is there counts; none for SGD."""
    if isinstance(optimizer, SGD):
        return ()
    if isinstance(optimizer, Adam | AdamW):
        return ("max_exp_avg_sq", "exp_avg_sq")
    if isinstance(optimizer, RMSprop):
        return ("square_avg",)
    raise TypeError(
        f"{type(optimizer).__name__} is not among SGD, RMSprop, Adam and AdamW of torch.optim, whose state is known "
        "to give a posterior."
    )


def _root(state: dict[str, Any], group: dict[str, Any], keys: tuple[str, ...], debias: bool) -> Tensor:
    v = next(state[key] for key in keys if key in state)
    v = v.detach().to(torch.promote_types(v.dtype, torch.float32), copy=True)
    if debias:
        decay = float(group["betas"][1] if "betas" in group else group["alpha"])
        v /= 1 - decay ** float(state["step"])
    return v.sqrt_()
