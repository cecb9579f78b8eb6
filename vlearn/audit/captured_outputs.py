"""The outputs of a model's training forward passes, seen by hooks that change nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlearn.audit.scores import OutputScores, output_scores
from vlearn.capture.hooks import hooks_are_silent
from vlearn.capture.pytrees import Selector, select, tensor_leaves
from vlearn.losses.example_loss import LossFunction

COMPARED = 8  # rows of two tensors


class Call(NamedTuple):
    """One training forward pass.

    Attributes:
        name: of the module.
        output: the tensor that is chosen of its output.
        version: how often that had been written to.
        gradients: of each backward pass, the gradient in it, while they are looked at.
        given: the tensors that the module was given by position.
    """

    name: str
    output: Tensor
    version: int
    gradients: list[Tensor]
    given: list[Tensor]


class CapturedOutputs:
    """Keeps the outputs of some modules' forward passes in training, from `begin` to `end`.

    Args:
        modules: by name; of several, which one gives the output is seen by the first batch.
        output: which tensor of a module's output; default the only one, or ``logits``.

    Attributes:
        looks_at_gradients: whether calls have the gradients in their outputs; that is asked of where there are several
            calls in a batch.
        has_several: whether there were.
        takes_inputs: whether the module that was chosen of several is given the inputs of a batch as they are.
    """

    def __init__(self, modules: Mapping[str, nn.Module], output: Selector = None):
        self._output = output
        self._calls: list[Call] = []
        self._active = False
        self._inputs: list[Tensor] = []
        self.looks_at_gradients = self.takes_inputs = True
        self.has_several = False
        self._chosen: str | None = next(iter(modules)) if len(modules) == 1 else None
        self._handles = {
            name: module.register_forward_hook(_Hook(self, name), always_call=False) for name, module in modules.items()
        }

    @property
    def chosen(self) -> str | None:
        """The module whose output it is, once that is known."""
        return self._chosen

    @property
    def has_calls(self) -> bool:
        """Whether there were any since the batch began."""
        return bool(self._calls)

    def begin(self, batch: Any = None) -> None:
        """A batch begins."""
        self._calls, self._active = [], True
        self._inputs = tensor_leaves(batch)

    def end(self) -> list[Call]:
        """The calls since, of the batch that is over."""
        calls, self._calls, self._active = self._calls, [], False
        for call in calls:
            if call.output._version != call.version:
                raise RuntimeError(
                    f"the output of {call.name or 'the model'} was written to in place after its forward pass: write "
                    "to a copy, or name another module by module=."
                )
        return calls

    def see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """A module's forward pass is over."""
        # Passes that vlearn makes itself, as for sensitivities, are none of the loop's.
        if self._active and module.training and torch.is_grad_enabled() and not hooks_are_silent():
            tensor = self._selected(output)
            if tensor is not None and tensor.dim() > 0 and tensor.is_floating_point():
                gradients: list[Tensor] = []
                if self.looks_at_gradients and tensor.requires_grad and not torch.compiler.is_compiling():
                    shape = tensor.shape  # a hook that held the tensor would keep its graph
                    _source(tensor, output).register_hook(lambda g: gradients.append(g.reshape(shape)))
                self._calls.append(Call(name, tensor.detach(), tensor._version, gradients, tensor_leaves(args)))

    def of_chosen(
        self,
        calls: list[Call],
        target: Any,
        loss_fn: LossFunction | None,
        loss: Any,
        classes_last: bool | None = None,
    ) -> list[Call]:
        """Those of the module that is chosen, by these calls if none is yet, that are of the batch's examples.

        Of several calls those are left out whose output the loss does not depend on, as in domain adaptation, and those
        that were given less of the batch than another, as in semi-supervised training. Calls with one part of the batch
        after the other are one.

        Args:
            target: of the batch.
            loss: what the training loop made of it, which tells outputs apart; None where that is not known.
            classes_last: of `output_scores`.

        Raises:
            ValueError: if no output fits the target, or several do.
        """
        is_first = self._chosen is None
        if self._chosen is None:
            self._chosen = self._choice(calls, target, loss_fn, loss, classes_last)
            for name, handle in self._handles.items():
                if name != self._chosen:
                    handle.remove()
        own = [call for call in calls if call.name == self._chosen]
        if is_first:
            self.takes_inputs = any(not call.given or self._num_inputs(call) for call in own)
        self.has_several = self.has_several or len(own) > 1
        if len(own) > 1 and not _have_the_same_inputs(own):
            own = [call for call in own if any(bool(gradient.any()) for gradient in call.gradients)] or own
            inputs = [self._num_inputs(call) for call in own]
            own = [call for call, number in zip(own, inputs, strict=True) if number == max(inputs)]
        whole = _joined(own, self._inputs)
        self._inputs = []
        return own if whole is None else [whole]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()

    def _num_inputs(self, call: Call) -> int:
        """How many tensors the module was given that the batch holds, or copies of them, as on another device."""
        return sum(any(_are_the_same(each, leaf) for leaf in self._inputs) for each in call.given)

    def _selected(self, output: Any) -> Tensor | None:
        if self._output is not None:
            return select(output, self._output, may_compute=True)
        if isinstance(output, Tensor):
            return output
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        tensors = tensor_leaves(output)
        return tensors[0] if len(tensors) == 1 else None

    def _choice(
        self, calls: list[Call], target: Any, loss_fn: LossFunction | None, loss: Any, classes_last: bool | None
    ) -> str:
        rows = len(target) if isinstance(target, Tensor) and target.dim() else None
        fitting: dict[str, OutputScores] = {}
        for call in calls:
            if rows is None or len(call.output) == rows:
                try:
                    fitting[call.name] = output_scores(call.output, target, loss_fn, classes_last=classes_last)
                except (ValueError, RuntimeError, IndexError, TypeError):  # it is not what the loss takes
                    continue
        if not fitting:
            seen = ", ".join(f"{call.name or 'the model'} {tuple(call.output.shape)}" for call in calls) or "none"
            raise ValueError(
                f"no output of the model fits its target (seen: {seen}): name the submodule that gives the logits by "
                "module=, the loss by loss_fn= and what is predicted by targets=."
            )
        same = fitting
        if not _are_alike(same) and loss is not None:
            same = {
                name: each
                for name, each in fitting.items()
                if math.isclose(float(each.columns["loss"].nanmean()), float(loss), rel_tol=1e-3)
            }
        if not same or not _are_alike(same):
            raise ValueError(
                f"{', '.join(repr(name or 'the model') for name in fitting)} give outputs that fit the target, so "
                "which one is the prediction is not clear: name it by module=."
            )
        return next(iter(same))


def _are_alike(scores: dict[str, OutputScores]) -> bool:
    """Whether all say the same, as a module does that hands on another's output."""
    first, *others = (each.columns["loss"] for each in scores.values())
    return all(torch.equal(first, other) for other in others)


def _source(tensor: Tensor, output: Any) -> Tensor:
    """What the loop has of a tensor that was selected: itself, or that of which it is another shape, as by squeeze."""
    leaves = tensor_leaves(output)
    if any(tensor is leaf for leaf in leaves) or not tensor.is_contiguous():
        return tensor
    reshaped = [leaf for leaf in leaves if leaf.is_contiguous() and leaf.numel() == tensor.numel()]
    return next((leaf for leaf in reshaped if leaf.data_ptr() == tensor.data_ptr()), tensor)


def _have_the_same_inputs(calls: list[Call]) -> bool:
    """Whether the very same tensors were given in all calls, as in several draws of one batch: no device is asked."""
    first = calls[0].given
    return bool(first) and all([*map(id, call.given)] == [*map(id, first)] for call in calls)


def _joined(calls: list[Call], inputs: list[Tensor]) -> Call | None:
    """The calls as one, where all that they were given are parts of the inputs, one after the other; else None."""
    rows = [len(call.output) for call in calls]
    wholes = [each for each in inputs if each.dim() > 0 and len(each) == sum(rows)]
    if len(calls) < 2 or not wholes:
        return None
    for call, *parts in zip(calls, *(whole.split(rows) for whole in wholes), strict=True):
        if not call.given or not all(any(_are_the_same(each, part) for part in parts) for each in call.given):
            return None
    one_each = all(len(call.gradients) == 1 for call in calls)
    gradients = [torch.cat([call.gradients[0] for call in calls])] if one_each else []
    return Call(calls[0].name, torch.cat([call.output for call in calls]), 0, gradients, wholes)


@torch.no_grad()
def _are_the_same(tensor: Tensor, other: Tensor) -> bool:
    if tensor is other:
        return True
    if any(each.layout is not torch.strided or each.is_nested for each in (tensor, other)):
        return False
    if tensor.shape != other.shape or tensor.dim() == 0:
        return False
    rows, others = tensor[:COMPARED], other[:COMPARED]
    return torch.equal(rows, others.to(rows.device, rows.dtype))


class _Hook:
    """A forward hook that a copy of the model does not have."""

    def __init__(self, captured: CapturedOutputs | None, name: str):
        self._captured = (lambda: None) if captured is None else weakref.ref(captured)
        self._name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        captured = self._captured()
        if captured is not None:
            captured.see(self._name, module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._name)
