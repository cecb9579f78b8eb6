"""One object that watches a training loop, whichever library makes it: which examples, what outputs, when to sweep."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlearn._warnings import warn_user
from vlearn.audit.captured_outputs import CapturedOutputs
from vlearn.audit.example_numbers import ExampleNumbers, Following, Key
from vlearn.audit.label_check import LabelCheck
from vlearn.audit.metric_loggers import check_logger, log_metrics
from vlearn.audit.shared_record import SharedRecord, from_each
from vlearn.audit.sweeps import Sweeps, Swept
from vlearn.capture.pytrees import Selector
from vlearn.collectives import process_count, process_rank
from vlearn.linearized.batches import split
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.posterior.adaptive_state import unwrapped
from vlearn.record import TrainingRecord


class Recorder:
    """Records what a training run sees of every example, and changes nothing of the run.

    Of each training batch it takes the model's output in the loop's own forward pass, at no cost but that of a softmax,
    and averages each example's loss, margin and so on in a `TrainingRecord`. At the end of an epoch it writes a
    snapshot, sweeps the data where that is asked for, and logs a summary. The optimizer may be any. With several
    processes, each records what it sees, and the first writes what all saw. Several forward passes of a batch are views
    of its examples, but for those whose output has no part in the loss, and, where others were given the batch's own
    tensors, those that were not, as the unlabelled examples of semi-supervised training.

    Args:
        path: folder of the record. A folder that already holds one is continued, with the labels that it has.
        model: whose training forward passes give the outputs; also as DistributedDataParallel or torch.compile wrap it.
            May be given later, to `watch`.
        optimizer: for live self-influence and sweeps.
        dataset: the whole whose places are the examples' numbers; default the dataset of the loader. Of a `Subset` or
            `ConcatDataset` of it the numbers are kept.
        key: where a batch has the numbers itself, as of an iterable dataset: the name or position of an entry, or a
            callable from the batch to ``[n]`` integers. Of a Hugging Face dataset, the column that has them.
        num_data: number of examples N; default the length of the dataset.
        module: which submodule gives the output, by name; default the model.
        output: which tensor of its output; default the only one, or ``logits``.
        targets: callable from a batch to its targets; default the second entry, or "labels" or "label" of a dict.
        loss_fn: the training loss, see `vlearn.sweep`; default cross-entropy of whole numbers.
        classes_last: whether outputs of sequences or images have their classes in the last dimension and not in the
            second, where the shapes fit both; default what the batches before have shown.
        probabilities: keep average probabilities of all classes; default up to 2²⁶ entries ``[N, C]``.
        self_influence_every: also record an optimizer of vlearn's live self-influence at every k-th batch.
        sweeps: when to sweep the data, `Sweeps`, or a number of epochs.
        logger: where summaries go: see `vlearn.audit.log_metrics`; of several, a list.
        prefix: put before the names of what is logged.
        overwrite: start anew; a record that the folder holds is deleted.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if one breaks its rule.

    Attributes:
        numbers: which example is which.
        loader: of the training; a sweep takes its dataset, batch size and collate function.
        sweep_loss, sweep_output: loss and output of sweeps, where they are others than the loop's.

    Example::

        with vlearn.Recorder("runs/fmnist", model) as recorder:
            for epoch in range(epochs):
                for x, y in recorder.follow(loader):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
        vlearn.label_issues(recorder.record)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        dataset: Any = None,
        key: Key | None = None,
        num_data: int | None = None,
        module: str | None = None,
        output: Selector = None,
        targets: Callable[[Any], Any] | None = None,
        loss_fn: LossFunction | None = None,
        classes_last: bool | None = None,
        probabilities: bool | None = None,
        self_influence_every: int | None = None,
        sweeps: Sweeps | int | None = None,
        logger: Any = None,
        prefix: str = "vlearn/",
        overwrite: bool = False,
    ):
        check_logger(logger)
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path is a {type(path).__name__}, but it must be the folder of the record.")
        if Path(path).is_file():
            raise ValueError(f"path={str(path)!r} is a file, but it must be the folder of the record.")
        if targets is not None and not callable(targets):
            raise TypeError(f"targets={targets!r}, but it must be a callable from a batch to its targets.")
        if not isinstance(sweeps, Sweeps | int | None):
            raise TypeError(
                f"sweeps={sweeps!r}, but it must be a number of epochs, or vlearn.audit.Sweeps(...): its every= takes "
                "the epochs themselves too."
            )
        if loss_fn is not None:
            ExampleLoss(loss_fn)  # what it refuses is refused here
        if self_influence_every is not None and self_influence_every < 1:
            raise ValueError(f"self_influence_every={self_influence_every}, but it must be positive: 1 is every batch.")
        self.numbers = ExampleNumbers(dataset, key, num_data)
        self._path, self._module, self._output = path, module, output
        self.targets, self.loss_fn, self.classes_last = targets, loss_fn, classes_last
        self._probabilities, self._overwrite = probabilities, overwrite
        self._self_influence_every = self_influence_every
        self._sweeps = Sweeps(sweeps) if isinstance(sweeps, int) else sweeps
        self._logger, self._prefix = logger, prefix
        self._shared: SharedRecord | None = None
        self._batch: tuple[Tensor, Any] | None = None
        self.loader: Any = None
        self._step = self._batches = self._epoch = self._offset = 0
        self._warned: set[str] = set()
        self._has_several_labels = False
        self.sweep_loss: LossFunction | None = None
        self.sweep_output: Selector = output
        self._captured: CapturedOutputs | None = None
        self._label_check = LabelCheck()
        if model is not None:
            self.watch(model, optimizer)

    def watch(self, model: nn.Module, optimizer: Any = None, with_children: bool = False) -> None:
        """Watch a model's training forward passes.

        Args:
            model: as of the constructor.
            optimizer: likewise.
            with_children: the loop may call parts of the model instead; the first batch shows which gives the output.

        Raises:
            TypeError: if the model is no module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is a {type(model).__name__}, but it must be an nn.Module: Recorder(path, model, optimizer)."
            )
        self._model, self._optimizer = inner_module(model), optimizer
        modules = self._modules(model)
        if with_children and self._module is None:
            modules |= dict(self._model.named_children())
        if self._captured is not None:
            self._captured.close()
        self._captured = CapturedOutputs(modules, self._output)

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        module, named = self._module, dict(self._model.named_modules())
        if module is None:
            return {"": model}
        if module not in named:
            some = ", ".join(repr(name) for name in named if name and "." not in name)
            raise ValueError(f"module={module!r}, but the model has none of that name: use one of {some}, or a deeper.")
        return {module: named[module]}

    @property
    def record(self) -> TrainingRecord:
        """The record, up to what was seen last.

        Raises:
            RuntimeError: in another process than the first, which alone has it.
        """
        shared = self._started()
        self._end_seen_batch()
        if shared.record is None:
            raise RuntimeError("the record is that of the first process: read it there, or TrainingRecord.open(path).")
        shared.add_waiting()
        return shared.record

    def follow(self, loader: Any) -> Following:
        """The loader's batches, unchanged, for a training loop to go through; its end is the end of an epoch.

        Raises:
            ValueError: if the loader's examples cannot be numbered.
        """
        its = self.numbers.follow(loader)  # also to be refused early
        self.loader = loader

        def begin(_: Any) -> Any:
            return self.numbers.follow(loader)

        def each(batch: Any) -> None:
            if not self.numbers.follows(loader):
                raise ValueError("two loaders are followed by turns: give each a Recorder of its own.")
            self.end_batch()
            self.begin_batch(batch)

        def end() -> None:
            self.end_batch()
            self.end_epoch()

        return Following(its, begin, each, end)

    def begin_batch(self, batch: Any, numbers: Tensor | None = None, loader: Any = None) -> None:
        """A training batch begins, whose forward passes are to be recorded.

        Args:
            batch: as the loop gets it.
            numbers: ``[n]`` of its examples; default those that the loader that is followed drew.
            loader: that it comes from, for sweeps.
        """
        self.loader = self.loader if loader is None else loader
        target = _target_of(batch) if self.targets is None else self.targets(batch)
        if numbers is None:
            count = len(target) if isinstance(target, Tensor) and target.dim() else None
            numbers = self.numbers.of(batch, count)
        self.begin_examples(numbers, target, batch)

    def begin_examples(self, numbers: Tensor, target: Any, batch: Any = None) -> None:
        """A training batch begins, of examples of these numbers ``[n]`` and targets.

        Raises:
            RuntimeError: if no model is watched.
        """
        self._started()
        if self._captured is None:
            raise RuntimeError("no model is watched: give it to the Recorder, or call watch(model).")
        self._batch = (numbers, target)
        self._captured.begin(batch)

    def end_batch(self, loss: Any = None, step: int | None = None, target: Any = None) -> None:
        """A training batch is over; nothing happens where none has begun.

        Args:
            loss: what the loop made of it, which tells outputs apart where several fit.
            step: of the training, counted in optimizer steps; default the batches.
            target: in the place of that with which the batch began.
        """
        if self._batch is None or self._captured is None:
            return
        (numbers, given), self._batch = self._batch, None
        target = given if target is None else target
        calls = self._captured.end()
        self._batches += 1
        self._step = self._batches if step is None else step + self._offset
        if not calls:
            if self._captured.chosen is None or self._batches == 1:
                raise ValueError(
                    "the batch saw no forward pass of the model in train mode with gradients: give the model that the "
                    "loop calls, or name a submodule that it calls by module=."
                )
            return
        target = target.to(calls[0].output.device) if isinstance(target, Tensor) else target
        shared = self._started()
        for call in self._captured.of_chosen(calls, target, self.loss_fn, loss, self.classes_last):
            output = call.output
            if len(output) != len(numbers):
                raise ValueError(
                    f"the output has {len(output)} rows for {len(numbers)} examples: let the model give one for each, "
                    "or select them by output=."
                )
            shared.add(numbers, output, target, self.loss_fn, self._step, self.classes_last)
            self._label_check.add(output, call.gradients, target, self.loss_fn, shared.classes_last)
        if self._label_check.is_over:
            self._captured.looks_at_gradients = self._captured.has_several
            self._warn_of_other_labels()
        if self._self_influence_every is not None and (self._batches - 1) % self._self_influence_every == 0:
            self._add_self_influence(numbers)

    def end_epoch(self, step: int | None = None, test_loss: float | None = None) -> None:
        """An epoch is over: write a snapshot, sweep if it is due, and log. Every process must call it.

        Args:
            step: of the training, counted in optimizer steps; default that of the last batch.
            test_loss: mean loss on test data, if known; kept with a sweep. Default that of the sweep's `test` data.
        """
        shared, at = self._started(), self._step if step is None else step + self._offset
        self._epoch += 1
        self._warn_of_other_labels()
        shared.gather()
        metrics: dict[str, float] = {}
        if shared.record is not None:
            self._warn_of_several_labels(shared.record)
            if shared.record.is_open:
                at = shared.record.next_step(at)
                shared.record.new_snapshot(at)
            metrics = shared.record.summary(self._prefix)
        if self._sweeps is not None and self._sweeps.is_due(self._epoch):
            swept = self._sweep(self._sweeps)
            if shared.record is not None and swept is not None:
                test_loss = swept.test_loss if test_loss is None else test_loss
                shared.record.record_sweep(at, swept.table, test_loss)
                metrics |= swept.table.summary(f"{self._prefix}sweep_")
        if shared.record is not None:
            log_metrics(self._logger, metrics, at)
            self.logged(metrics, at)

    def end_open_epoch(self, step: int | None = None) -> None:
        """End an epoch of which a checkpoint has all batches but not the end. Every process must call it."""
        record = self._started().record
        if from_each(record is not None and record.is_open)[0]:
            self.end_epoch(step)

    def logged(self, metrics: dict[str, float], step: int) -> None:
        """What is done with a summary beside the logger's; nothing."""

    def state_dict(self) -> dict[str, Any]:
        """All averages, for a checkpoint; the snapshots stay in the folder. Every process must call it.

        Empty in all processes but the first.
        """
        shared = self._started()
        self._end_seen_batch()
        shared.gather()
        if shared.record is None:
            return {}
        arrays = {name: torch.from_numpy(values.copy()) for name, values in shared.record.state_dict().items()}
        return {"epoch": self._epoch, "batches": self._batches, "step": self._step, "record": arrays}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the averages as a file, for a checkpoint. Every process must call it."""
        shared = self._started()
        self._end_seen_batch()
        shared.gather()
        if shared.record is not None:
            shared.record.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go back to what `save` has written."""
        shared = self._started()
        if shared.record is not None:
            shared.record.load(path)
        shared.go_on()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint: what was recorded after it is taken back."""
        shared = self._started()
        if state and shared.record is not None:
            shared.record.load_state_dict(state["record"])
        shared.go_on()
        if state:
            self._epoch, self._batches, self._step = state["epoch"], state["batches"], state["step"]

    def close(self) -> None:
        """Save what was recorded and remove the hooks from the model. Every process must call it."""
        self._end_seen_batch()
        self._unhook()
        if self._shared is not None:
            self._shared.gather()
            if self._shared.record is not None:
                self._shared.record.save()

    def break_off(self) -> None:
        """Save what this process has seen, as where an error ends the training; others need not call it."""
        self._unhook()
        if self._shared is not None and self._shared.record is not None:
            self._shared.add_waiting()
            self._shared.record.save()

    def _unhook(self) -> None:
        self._batch = None
        if self._captured is not None:
            self._captured.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.break_off()

    def _started(self) -> SharedRecord:
        """The record, made once the number of examples and the processes are known."""
        if self._shared is None:
            self._shared = SharedRecord(self.numbers.num_data, self._path, self._probabilities, self._overwrite)
            self._shared.go_on()
            self.go_on()
        return self._shared

    @property
    def has_started(self) -> bool:
        """Whether there is a record, which is made with the first batch."""
        return self._shared is not None

    def go_on(self, training_step: int = 0, is_resumed: bool = False) -> None:
        """Count steps and epochs on from where the record is.

        Args:
            training_step: where the training's own count begins.
            is_resumed: it goes on from a checkpoint that knows nothing of the record.

        Raises:
            ValueError: if the record has seen what the training will see again.
        """
        record = self._started().record
        if record is not None and is_resumed and record.step > training_step:
            raise ValueError(
                f"{record.path} has a record up to step {record.step}, but training goes on at step {training_step} "
                "from a checkpoint without one: give overwrite=True, or another path."
            )
        if record is not None and record.step:
            self._step = self._batches = record.step
            self._epoch = record.num_epochs
        # All processes sweep after the same epochs.
        self._step, self._batches, self._epoch = from_each((self._step, self._batches, self._epoch))[0]
        self._offset = max(0, self._step - training_step)

    def _add_self_influence(self, numbers: Tensor) -> None:
        optimizer: Any = unwrapped(self._optimizer)
        try:
            if not hasattr(optimizer, "sensitivities"):
                raise RuntimeError(f"{type(optimizer).__name__} has none; an optimizer of vlearn's has.")
            values = optimizer.sensitivities().self_influence
            if len(values) != len(numbers):
                raise RuntimeError(f"the step has {len(values)} rows for {len(numbers)} examples.")
        except (RuntimeError, ValueError) as error:
            self._warn(f"No live self-influence is recorded: {error}")
            return
        self._started().add_self_influence(numbers, values, self._step)

    def _sweep(self, sweeps: Sweeps) -> Swept | None:
        """The sweep of all processes' shares, by number; None, with a warning, where there is none to be had."""
        swept, failure = None, ""
        try:
            if not hasattr(self.loader, "dataset") or not hasattr(self.loader.dataset, "__getitem__"):
                raise ValueError("the training loader has no map-style dataset that can be swept.")
            loss_fn, output = self.sweep_loss or self.loss_fn or nn.functional.cross_entropy, self.sweep_output
            share = (process_rank(), process_count())
            swept = sweeps.run(self._predictor(), self._optimizer, self.loader, loss_fn, output, share)
            numbers = self.numbers.of_places(torch.from_numpy(swept.places))
            swept = swept._replace(table=replace(swept.table, index=numbers))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            failure = f"{type(error).__name__}: {error}"
        failure = next(filter(None, from_each(failure)), "")
        if swept is not None and not failure:
            try:
                return swept._replace(table=swept.table.gather())
            except ValueError as error:  # in all processes alike
                failure = str(error)
        self._warn(f"The data are not swept: {failure} See the posterior and options of vlearn.audit.Sweeps.")
        return None

    def _predictor(self) -> nn.Module:
        """The module that a sweep calls with the inputs of a batch."""
        captured = self._captured
        if captured is None or not captured.chosen or not captured.takes_inputs:
            return self._model
        return dict(self._model.named_modules())[captured.chosen]

    def _warn_of_other_labels(self) -> None:
        message = self._label_check.message()
        if message is not None:
            self._warn(message)

    def _warn_of_several_labels(self, record: TrainingRecord) -> None:
        relabelled = record.averages.relabelled
        if relabelled.any() and not self._has_several_labels:
            self._has_several_labels = True
            warn_user(
                f"{np.count_nonzero(relabelled)} examples, as {relabelled.argmax()}, have come with other labels than "
                "before, and their averages are over all of these. Where labels are drawn or examples are mixed, give "
                "targets=, a callable from the batch to the labels that are to be judged."
            )

    def _end_seen_batch(self) -> None:
        """A batch whose forward pass was made is over, though the loop has not asked for the next."""
        if self._captured is not None and self._captured.has_calls:
            self.end_batch()

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            warn_user(message)
        self._warned.add(message)


def _target_of(batch: Any) -> Any:
    try:
        return split(batch)[1]
    except ValueError as error:
        raise ValueError(f"{error} Or give targets=, a callable from the batch to its targets.") from error


def inner_module(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
