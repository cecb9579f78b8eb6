"""One record of what several processes see: each keeps its own averages, the first writes those of all."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlearn.audit.scores import OutputScores, output_scores
from vlearn.collectives import process_count, process_rank, told_by_all
from vlearn.losses.example_loss import LossFunction
from vlearn.record import TrainingRecord
from vlearn.record.running_averages import RunningAverages, differ

KEPT_BATCHES = 16  # whose outputs wait, to be scored at once
LARGEST_KEPT = 2**16  # entries of such an output


def from_each(own: Any) -> list[Any]:
    """What every process has, in their order; all must call it."""
    return told_by_all(own) if process_count() > 1 else [own]


class SharedRecord:
    """The record in the first process, and averages on their way to it in the others.

    Args:
        num_data, path, probabilities, overwrite: as of `TrainingRecord`.

    Attributes:
        classes_last: of `output_scores`, as a batch has shown.
        record: None in all processes but the first.
    """

    def __init__(self, num_data: int, path: str | os.PathLike[str], probabilities: bool | None, overwrite: bool):
        self._num_data, self._probabilities = num_data, probabilities
        self._averages = RunningAverages(num_data)  # unused in the first process
        self._waiting: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._loss_fn: LossFunction | None = None
        self.classes_last: bool | None = None
        self._is_trusted = False  # whether a batch has shown that its labels are the output's classes
        self.record: TrainingRecord | None = None
        self._earlier: np.ndarray | None = None  # labels that a record has which is continued
        if process_rank() == 0:
            self.record = TrainingRecord(num_data, path, probabilities=probabilities, overwrite=overwrite)

    def go_on(self) -> None:
        """What comes is of the examples that the record has, with the labels that they have there."""
        averages = None if self.record is None else self.record.averages
        self._earlier = None if averages is None or averages.relabelled.any() else averages.label

    def add(
        self,
        numbers: Tensor,
        output: Tensor,
        target: Any,
        loss_fn: LossFunction | None,
        step: int,
        classes_last: bool | None = None,
    ) -> None:
        """Add what a batch's output says of its examples; a small one may wait for others until `add_waiting`.

        Args:
            numbers: ``[n]``, on the CPU.
            output, target, loss_fn, classes_last: of `output_scores`.

        Raises:
            ValueError: if a record that is continued is of other labels.
        """
        is_small = isinstance(target, Tensor) and output.dim() == 2 and output.numel() <= LARGEST_KEPT
        if self._is_trusted and is_small and len(target) == len(output):
            kinds = [(t.shape[1:], t.dtype, t.device) for waiting in self._waiting[:1] for t in waiting[1:3]]
            if kinds and kinds != [(t.shape[1:], t.dtype, t.device) for t in (output, target)]:
                self.add_waiting()
            self._loss_fn = loss_fn
            # The loop may write to them, or the next pass of a CUDA graph.
            self._waiting.append((numbers, output.clone(), target.clone(), step))
            if len(self._waiting) >= KEPT_BATCHES:
                self.add_waiting()
            return
        self.add_waiting()
        classes_last = self.classes_last if classes_last is None else classes_last
        scores = output_scores(output, target, loss_fn, self._is_trusted, classes_last)
        self._add(numbers, scores, torch.full_like(numbers, step))
        self._is_trusted = True
        self.classes_last = self.classes_last if scores.classes_last is None else scores.classes_last

    def add_waiting(self) -> None:
        """Bring what the last outputs say from the device to the averages."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            numbers, outputs, targets, steps = zip(*waiting, strict=True)
            each = [torch.full_like(n, step) for n, step in zip(numbers, steps, strict=True)]
            scores = output_scores(torch.cat(outputs), torch.cat(targets), self._loss_fn, self._is_trusted)
            self._add(torch.cat(numbers), scores, torch.cat(each))

    def _add(self, numbers: Tensor, scores: OutputScores, steps: Tensor) -> None:
        """Add scores of examples ``[n]``, each of its step ``[n]``."""
        keeps = TrainingRecord.keeps_probabilities
        if scores.probabilities is not None and not keeps(
            self._num_data, scores.probabilities.shape[1], self._probabilities
        ):
            scores = replace(scores, probabilities=None)
        values = torch.stack(list(scores.columns.values())).double().cpu().numpy()
        columns = dict(zip(scores.columns, values, strict=True))
        predicted, label, probabilities = (
            None if each is None else each.cpu().numpy()
            for each in (scores.predicted, scores.label, scores.probabilities)
        )
        if self.record is not None:
            self._check_same(numbers.numpy(), label)
            self.record.record(
                numbers, step=steps, predicted=predicted, label=label, probabilities=probabilities, **columns
            )
            return
        if probabilities is not None:
            self._averages.num_classes = probabilities.shape[1]
        self._averages.add(numbers.numpy(), columns, steps.numpy(), predicted, label, probabilities)

    def _check_same(self, numbers: np.ndarray, label: np.ndarray | None) -> None:
        if self._earlier is None or label is None:
            return
        wrong = differ(self._earlier[numbers], label)
        if wrong.any():
            k = int(wrong.argmax())
            i = int(numbers[k])
            raise ValueError(
                f"the record is continued, in which example {i} has the label {self._earlier[i]}, but now it is "
                f"{label[k]}: its averages would be those of two labels. If labels have been corrected, or these are "
                "other examples, give overwrite=True or another path."
            )

    def add_self_influence(self, numbers: Tensor, self_influence: Tensor, step: int) -> None:
        """Add live self-influence ``[n]`` of examples that are added by `add`."""
        values = self_influence.double().cpu().numpy()
        if self.record is not None:
            self.record.record(numbers, step=step, self_influence=values)
        else:
            self._averages.add(numbers.numpy(), {"self_influence": values}, step, seen=False)

    def gather(self) -> None:
        """Give the first process what all have seen since the last time; all must call it."""
        self.add_waiting()
        own = None if self.record is not None else (self._averages.num_classes, self._averages.arrays())
        for message in from_each(own):
            if self.record is not None and message is not None:
                num_classes, arrays = message
                self.record.merge(RunningAverages.of_arrays(arrays, num_classes))
        self._averages = RunningAverages(self._num_data)
