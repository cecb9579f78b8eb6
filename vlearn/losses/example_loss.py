"""The training loss of each example, whatever reduction the user's loss function has."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

LossFunction = Callable[..., Tensor]


class ExampleLoss:
    """The training loss of each example: (output, target) -> ``[N]``.

    Scales: a mean loss is undone by its own denominator, so with class weights the loss of an example is w_y ℓ (and
    num_data Σw), and ignored targets have none. Of a sequence the entries are averaged, ignored ones as zeros, as
    reduction="mean" does where none is ignored; where the number of ignored ones varies, the mean over all tokens has
    no such form: use a callable that sums over the sequence, with num_data the number of tokens that count.

    Args:
        loss_fn: a torch-style loss with a `reduction` argument or attribute, whose entries beyond the first axis
            are averaged as reduction="mean" does; or a callable (output, target) -> ``[N]``. `nn.GaussianNLLLoss`
            takes a model that gives (mean, variance).
        per: "example", or "token" for ``[N, T]``, the loss of every position; entries beyond are averaged.
    """

    def __init__(self, loss_fn: LossFunction, per: str = "example"):
        self.per, self.torch_style = per, True
        self.ignore_index: int = getattr(loss_fn, "ignore_index", -100)
        if isinstance(loss_fn, partial):
            self.ignore_index = loss_fn.keywords.get("ignore_index", self.ignore_index)
        if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
            self.unreduced: LossFunction = copy.copy(loss_fn)
            self.unreduced.reduction = "none"  # type: ignore[attr-defined]
        elif "reduction" in _argument_names(loss_fn):
            self.unreduced = partial(loss_fn, reduction="none")
        else:
            self.unreduced, self.torch_style = loss_fn, False
        if isinstance(loss_fn, nn.GaussianNLLLoss) or loss_fn is F.gaussian_nll_loss:
            self.unreduced, self.torch_style = partial(_of_mean_and_variance, self.unreduced), False

    def __call__(self, output: Any, target: Any) -> Tensor:
        """The loss ``[N]`` of each example, or ``[N, T]`` of each position, in the loss's units."""
        rows = self.unreduced(output, target)
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            raise ValueError(
                "loss_fn gave one number for the whole batch, but sensitivities need each example's own loss: pass a "
                "loss with a `reduction` argument, or a callable (output, target) -> [N]."
            )
        if self.per == "token":
            if rows.dim() == 1:
                raise ValueError(
                    "loss_fn gave one loss for each example, but per='token' needs one for each position: pass a loss "
                    "with a `reduction` argument on outputs [N, C, T], or a callable (output, target) -> [N, T]."
                )
            return rows if rows.dim() == 2 else rows.flatten(2).mean(2)
        return rows if rows.dim() == 1 else rows.flatten(1).mean(1)


def _of_mean_and_variance(loss: LossFunction, output: Any, target: Any) -> Tensor:
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise ValueError(
            f"a Gaussian loss of a model that gives {type(output).__name__}, but it needs (mean, variance): for a "
            "fixed variance use partial(F.gaussian_nll_loss, var=...)."
        )
    return loss(output[0], target, output[1])


def _argument_names(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
