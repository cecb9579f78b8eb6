"""The training loss of each example, whatever reduction the user's loss function has."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFunction = Callable[..., Tensor]


class ExampleLoss:
    """The training loss of each example: (output, target) -> ``[N]``.

    Scales: a mean loss is undone by its own denominator, so with class weights the loss of an example is w_y ℓ (and
    num_data Σw), and ignored targets have none. An example's entries are averaged by reduction="mean" and summed by
    "sum" and "batchmean", as the loss itself does. Of a sequence the entries are averaged, ignored ones as zeros, as
    reduction="mean" does where none is ignored; where the number of ignored ones varies, the mean over all tokens has
    no such form: use a callable that sums over the sequence, with num_data the number of tokens that count.

    Args:
        loss_fn: a torch-style loss with a `reduction` argument or attribute, which says what becomes of the entries
            beyond the first axis; where it is not torch's own, its value has the last word. Or a callable (output,
            target) -> ``[N]``, whose further axes are averaged. `nn.GaussianNLLLoss` takes a model that gives
            (mean, variance).
        per: "example", or "token" for ``[N, T]``, the loss of every position; entries beyond are averaged.

    Attributes:
        reduction: what becomes of an example's entries: "mean", "sum", "none", or None where it is not known.
        is_torchs: whether the loss is torch's own, and so takes one tensor.
        checked: shapes of outputs and targets for which each loss was seen to be of its own example.

    Raises:
        TypeError: if loss_fn is no function.
        ValueError: if loss_fn cannot be called with an output and a target.
    """

    def __init__(self, loss_fn: LossFunction, per: str = "example"):
        self.per, self.torch_style = per, True
        self.ignore_index: int = getattr(loss_fn, "ignore_index", -100)
        if isinstance(loss_fn, partial):
            self.ignore_index = loss_fn.keywords.get("ignore_index", self.ignore_index)
        self.reduction = _reduction_of(loss_fn)
        self.checked: set[Any] = set()
        if isinstance(loss_fn, nn.CTCLoss) or loss_fn is F.ctc_loss:
            raise ValueError(
                "nn.CTCLoss takes outputs [T, N, C] and lengths: pass a callable (output, target) -> [N] that calls "
                "F.ctc_loss(..., reduction='none') and divides by the target lengths, and a model of outputs [N, T, C]."
            )
        is_gaussian = isinstance(loss_fn, nn.GaussianNLLLoss) or loss_fn is F.gaussian_nll_loss
        if not is_gaussian:
            _check_takes_output_and_target(loss_fn)
        if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
            self.unreduced: LossFunction = copy.copy(loss_fn)
            self.unreduced.reduction = "none"  # type: ignore[attr-defined]
        elif "reduction" in _argument_names(loss_fn):
            self.unreduced = partial(loss_fn, reduction="none")
        else:
            self.unreduced, self.torch_style = loss_fn, False
        self.is_torchs = _is_torchs(loss_fn)
        self._is_binary_of_probabilities = _unwrapped(loss_fn) in (nn.BCELoss, F.binary_cross_entropy)
        self._is_gaussian = is_gaussian
        self._whole = loss_fn if self.torch_style and not self.is_torchs else None
        if is_gaussian:
            self.unreduced, self.torch_style = partial(_of_mean_and_variance, self.unreduced), False

    def __call__(self, output: Any, target: Any) -> Tensor:
        """The loss ``[N]`` of each example, or ``[N, T]`` of each position, in the loss's units."""
        rows = self.unreduced(output, target)
        if not isinstance(rows, Tensor) or rows.dim() == 0:
            raise ValueError(
                "loss_fn gave one number for the whole batch, but sensitivities need each example's own loss: pass a "
                "loss with a `reduction` argument, or a callable (output, target) -> [N]."
            )
        self._check_shapes(rows, output, target)
        if self._whole is not None and rows.numel() > len(rows):
            self.reduction, self._whole = _shown_reduction(self._whole, rows, output, target, self.reduction), None
        if self.per == "token":
            if rows.dim() == 1:
                raise ValueError(
                    "loss_fn gave one loss for each example, but per='token' needs one for each position: pass a loss "
                    "with a `reduction` argument on outputs [N, C, T], or a callable (output, target) -> [N, T]."
                )
            return rows if rows.dim() == 2 else self._reduced(rows.flatten(2))
        return rows if rows.dim() == 1 else self._reduced(rows.flatten(1))

    def is_outside(self, output: Any) -> Tensor | None:
        """The examples ``[N]`` whose output torch's own loss refuses; None of a loss that refuses none."""
        if self._is_binary_of_probabilities:
            return ((output < 0) | (output > 1)).reshape(len(output), -1).any(1)
        if self._is_gaussian:
            return (output[1] < 0).reshape(len(output[1]), -1).any(1)
        return None

    def _reduced(self, rows: Tensor) -> Tensor:
        """The entries along the last axis as the loss reduces them."""
        if self.reduction not in ("mean", "sum") and rows.shape[-1] > 1:
            has = "has reduction='none'" if self.reduction == "none" else "has a reduction of its own"
            raise ValueError(
                f"loss_fn {has} and gave {rows.shape[-1]} entries for each example, so that their weight is unclear: "
                "use reduction='mean' or 'sum', as by functools.partial(loss_fn, reduction='mean'), or a callable "
                "(output, target) -> [N]."
            )
        return rows.mean(-1) if self.reduction == "mean" else rows.sum(-1)

    def _check_shapes(self, rows: Tensor, output: Any, target: Any) -> None:
        """Raise ValueError where the target was broadcast, so that each example's output met those of others."""
        if not isinstance(output, Tensor) or rows.dim() < 2:
            return
        is_aligned = isinstance(target, Tensor) and target.dim() == output.dim() and len(target) == len(output)
        is_larger = rows.numel() > output.numel() and (self.torch_style or rows.shape[0] == rows.shape[1])
        # With as many outputs as examples the entries have the output's shape all the same; labels are no such target.
        hides = self.torch_style and rows.shape == output.shape and len(rows) > 1 and _is_of_numbers(target)
        if not is_aligned and (is_larger or hides):
            given = f"a target of shape {tuple(target.shape)}" if isinstance(target, Tensor) else "its target"
            raise ValueError(
                f"loss_fn gave {tuple(rows.shape)} entries for an output of shape {tuple(output.shape)} and {given}, "
                "which were broadcast against one another: give both the same shape, as by target.unsqueeze(1) or "
                "output.squeeze(1)."
            )


def _is_of_numbers(target: Any) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point()


def _reduction_of(loss_fn: LossFunction) -> str | None:
    """What the loss says that it does to the entries of an example: "mean", "sum" (also "batchmean") or "none"."""
    if isinstance(loss_fn, partial):
        given = loss_fn.keywords.get("reduction")
        return _reduction_of(loss_fn.func) if given is None else _known(given)
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        return _known(loss_fn.reduction)
    try:
        argument = inspect.signature(loss_fn).parameters.get("reduction")
    except (TypeError, ValueError):
        argument = None
    return "mean" if argument is None else _known(argument.default)


def _known(reduction: Any) -> str | None:
    if reduction in ("sum", "batchmean"):
        return "sum"
    return reduction if reduction in ("mean", "none") else None


@torch.no_grad()
def _shown_reduction(
    loss_fn: LossFunction, entries: Tensor, output: Any, target: Any, declared: str | None
) -> str | None:
    """What a loss does to the entries of an example by its value; what it says where its value shows nothing."""
    try:
        value = loss_fn(output, target)
    except Exception:  # its reduction must be given
        return declared
    if not isinstance(value, Tensor) or value.numel() != 1:
        return declared
    total = entries.sum()
    means = {"mean": [total / entries.numel()], "sum": [total, total / len(entries)]}
    fits = [
        name for name, values in means.items() if any(torch.isclose(value.reshape(()), v, rtol=1e-3) for v in values)
    ]
    return declared if declared in fits or len(fits) != 1 else fits[0]


def _is_torchs(loss_fn: LossFunction) -> bool:
    """Whether a loss is torch's own, whose reductions mean what they say."""
    return str(getattr(_unwrapped(loss_fn), "__module__", "")).split(".")[0] == "torch"


def _unwrapped(loss_fn: LossFunction) -> Any:
    """The function, or the class of the module, of which a loss is made."""
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    return type(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn


def _check_takes_output_and_target(loss_fn: LossFunction) -> None:
    if not callable(loss_fn) or isinstance(loss_fn, type):
        given = f"the class {loss_fn.__name__}" if isinstance(loss_fn, type) else f"of type {type(loss_fn).__name__}"
        made = f": pass {loss_fn.__name__}()" if isinstance(loss_fn, type) else ""
        raise TypeError(f"loss_fn is {given}, but it is called with the model's output and the target{made}.")
    try:
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, **({"reduction": "none"} if "reduction" in signature.parameters else {}))
    except TypeError as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"loss_fn is called with the model's output and the target, but {name} takes {signature} ({error}): pass a "
            "callable (output, target) -> [N], for instance lambda output, target: loss(*output, target)."
        ) from error


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
