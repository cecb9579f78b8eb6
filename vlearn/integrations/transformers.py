"""Hugging Face's Trainer: a callback that records what a training run sees of every example.

`SensitivityCallback` is a subclass of `transformers.TrainerCallback`, made when it is first asked for.
"""

from __future__ import annotations

import functools
import math
import os
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlearn._extras import require
from vlearn.audit.example_numbers import CARRIED, CARRIED_TARGETS
from vlearn.audit.metric_loggers import active_loggers, log_metrics
from vlearn.audit.recorder import Recorder
from vlearn.capture.hooks import hooks_are_silent

_FILE = "vlearn_averages.npz"  # in a checkpoint
_TARGETS = ("labels", "label", "label_ids")


class _Kept(Recorder):
    """A recorder that keeps its last summary."""

    last: dict[str, float] | None = None

    def logged(self, metrics: dict[str, float], step: int) -> None:
        self.last = metrics


class SensitivityHooks:
    """Record what a training run sees of every example, as `vlearn.Recorder`, and change nothing of it.

    The numbers of the examples travel with the batches and are taken out before the model sees them, so
    ``remove_unused_columns`` may stay as it is. Labels of a causal language model are shifted as its loss shifts them.
    At the end of an epoch the record gets a snapshot, the data are swept if that is due, and the summary goes to
    ``state.log_history`` and to a run of W&B or MLflow that is active. Checkpoints have the record's averages.

    Args:
        path: folder of the record.
        shift_labels: whether the labels at a position are those of the position before; default what the model's own
            loss shows.
        **options: of `vlearn.Recorder`. With ``key="idx"`` and ``dataset=`` numbers are those of a column of a dataset,
            also where the Trainer has dropped it; ``targets`` is a callable from a batch of the collator. With
            ``logger=trainer`` summaries go where the Trainer's own logs go.

    Attributes:
        recorder: None before training.

    Example::

        Trainer(model, args, train_dataset=data, callbacks=[SensitivityCallback("runs/sst2")]).train()
    """

    def __init__(self, path: str | os.PathLike[str], shift_labels: bool | None = None, **options: Any):
        Recorder(path, **options)  # what it refuses is refused here
        self._path, self._shift, self._options = path, shift_labels, options
        self.recorder: _Kept | None = None
        self._handles: list[Any] = []
        self._carried: Tensor | None = None
        self._labels: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the training batches carry their numbers, watch the model, and go on where a checkpoint is."""
        if getattr(args, "n_gpu", 1) > 1:
            raise ValueError("nn.DataParallel has several models: start one process for each GPU, as by torchrun.")
        self.recorder = recorder = _Kept(self._path, **self._options)
        targets = recorder.targets or _labels_of
        recorder.loader = recorder.numbers.carry(given["train_dataloader"], targets)
        model: nn.Module = given["model"]
        recorder.watch(model, given.get("optimizer"))
        link = _Link(self)
        self._handles = [
            model.register_forward_pre_hook(link.before, with_kwargs=True, prepend=True),
            model.register_forward_hook(link.after, with_kwargs=True),
        ]
        if state.global_step:
            places = [args.resume_from_checkpoint, Path(args.output_dir, f"checkpoint-{state.global_step}")]
            files = [Path(place, _FILE) for place in places if isinstance(place, str | os.PathLike)]
            file = next((file for file in files if file.exists()), None)
            if file is not None:
                recorder.load(file)
            recorder.go_on(state.global_step, is_resumed=file is None)
            if file is not None and math.isclose(state.epoch, round(state.epoch)):  # saved before the epoch's end
                recorder.end_open_epoch(state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A micro-batch is over."""
        self._end_batch(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A step is over."""
        self._end_batch(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """An epoch is over."""
        recorder = self._recorder()
        recorder.end_epoch(state.global_step)
        if recorder.last is not None and self._options.get("logger") is None:
            state.log_history.append({"epoch": state.epoch, "step": state.global_step, **recorder.last})
            for logger in active_loggers():
                log_metrics(logger, recorder.last, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the record's averages into the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self._recorder().save(folder / _FILE if folder.is_dir() else Path(self._path, _FILE))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the record and remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._carried, self._labels = [], None, None
        self._recorder().close()

    def take_numbers(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Take the numbers out of a batch before the model sees it."""
        if CARRIED not in kwargs:
            return None
        kwargs = dict(kwargs)
        carried, labels = kwargs.pop(CARRIED), kwargs.pop(CARRIED_TARGETS)
        is_new = carried is not self._carried  # a loop may call the model several times with one batch
        if is_new and model.training and torch.is_grad_enabled() and not hooks_are_silent():
            recorder = self._recorder()
            self._carried, self._labels = carried, labels
            recorder.begin_examples(recorder.numbers.of_carried(carried), labels)
        return args, kwargs

    def see_output(self, model: nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        """The first output shows what the labels are, and how sweeps are to be made."""
        recorder = self._recorder()
        logits = getattr(output, "logits", None)
        if recorder.sweep_output is None and isinstance(logits, Tensor):
            recorder.sweep_output = "logits"
        if recorder.loss_fn is None and isinstance(self._labels, Tensor) and self._labels.is_floating_point():
            recorder.loss_fn = _loss_of(model)
        if self._shift is None and isinstance(logits, Tensor):
            self._shift = _is_shifted(model, logits, self._labels, output, kwargs)
        if isinstance(self._labels, Tensor) and self._labels.dim() == 2 and recorder.classes_last is None:
            recorder.classes_last = True
        is_of_tokens = isinstance(self._labels, Tensor) and _are_of_tokens(logits, self._labels)
        if is_of_tokens and recorder.sweep_loss is None and recorder.loss_fn is None:
            recorder.sweep_loss = _causal_loss if self._shift else _token_loss

    def _end_batch(self, step: int) -> None:
        target = _shifted(self._labels) if self._shift else self._labels
        self._recorder().end_batch(step=step, target=target)
        self._carried = self._labels = None

    def _recorder(self) -> _Kept:
        if self.recorder is None:
            raise RuntimeError("SensitivityCallback is called before training: give it to Trainer(callbacks=[...]).")
        return self.recorder


class _Link:
    """Hooks of a model that a copy of it does not have."""

    def __init__(self, callback: SensitivityHooks | None):
        self._callback = (lambda: None) if callback is None else weakref.ref(callback)

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]] | None:
        callback = self._callback()
        return None if callback is None else callback.take_numbers(model, args, kwargs)

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        callback = self._callback()
        if callback is not None and model.training and torch.is_grad_enabled() and not hooks_are_silent():
            callback.see_output(model, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Link, (None,)


def _labels_of(batch: Mapping[str, Any]) -> Any:
    name = next((name for name in _TARGETS if name in batch), None)
    if name is None:
        raise ValueError(
            f"the collator gave a batch of {', '.join(map(repr, batch))} without 'labels': give targets=, a callable "
            "from the batch to the targets, and loss_fn= for what they are."
        )
    return batch[name]


def _shifted(labels: Tensor) -> Tensor:
    """Labels of the next token, of which the last position has none."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)


def _are_of_tokens(logits: Any, labels: Tensor) -> bool:
    """Whether there is a label, a whole number, for the logits of each position."""
    is_whole = isinstance(logits, Tensor) and not labels.is_floating_point()
    return is_whole and labels.dim() > 1 and logits.shape[:-1] == labels.shape


def _is_shifted(model: nn.Module, logits: Tensor, labels: Any, output: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's loss takes the logits of a position for the label of the next.

    Raises:
        ValueError: if that cannot be seen.
    """
    if not isinstance(labels, Tensor) or not _are_of_tokens(logits, labels) or labels.shape[1] < 2:
        return False
    loss, items = getattr(output, "loss", None), kwargs.get("num_items_in_batch")
    fitting = set()
    for shift in (True, False):
        target = _shifted(labels) if shift else labels
        total = float(F.cross_entropy(logits.detach().flatten(0, 1).float(), target.flatten(), reduction="sum"))
        for count in (int((target != -100).sum()), items):
            if loss is not None and count and math.isclose(float(loss.detach()), total / float(count), rel_tol=1e-3):
                fitting.add(shift)
    if len(fitting) == 1:
        return fitting.pop()
    name = type(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model).__name__
    if re.search("CausalLM|LMHeadModel", name):
        return True
    if re.search("MaskedLM|TokenClassification", name):
        return False
    raise ValueError(f"it cannot be seen whether the loss of {name} shifts its labels: give shift_labels=.")


def _loss_of(model: nn.Module) -> Any:
    """The loss of floating-point labels by what the model's settings call its problem."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits
    return _squared_error if problem == "regression" else None


def _squared_error(output: Any, target: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    return (logits.reshape(len(logits), -1) - target.reshape(len(target), -1)).square().mean(1)


def _causal_loss(output: Any, target: Tensor) -> Tensor:
    """Mean over the tokens of each example of the loss of the next token."""
    return _token_loss(output, _shifted(target))


def _token_loss(output: Any, target: Tensor) -> Tensor:
    """Mean over the tokens of each example of the loss of its labels."""
    rows = F.cross_entropy(output.logits.movedim(-1, 1), target, reduction="none")
    return rows.sum(1) / (target != -100).sum(1).clamp(min=1)


@functools.cache
def _callback() -> type:
    base = require("transformers", extra="transformers", feature="vlearn.integrations.transformers").TrainerCallback
    content = {"__doc__": SensitivityHooks.__doc__, "__module__": __name__}
    return type("SensitivityCallback", (SensitivityHooks, base), content)


if TYPE_CHECKING:
    SensitivityCallback = SensitivityHooks


def __getattr__(name: str) -> Any:
    if name == "SensitivityCallback":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
