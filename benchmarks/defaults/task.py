"""What a supervised task of the comparison is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # targets that count for nothing


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, its data and its training, but for the optimizer.

    Attributes:
        build: makes the network; its weights come from torch's global generator.
        x, y, x_val, y_val: inputs ``[N, ...]`` and targets of both halves, in memory.
        loss: (output, targets) -> mean loss of the batch.
        batch, epochs: of training.
        classifies: targets are classes, of each example or of each position of one; IGNORED ones are left out.
        outputs: what the network returns -> the tensor that loss and accuracy read.
        other_source: the validation half is not drawn as the training half was, as the last scenes of a text.
    """

    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    epochs: int
    classifies: bool = True
    outputs: Callable[[Any], Tensor] = lambda output: output
    other_source: bool = False

    @property
    def num_data(self) -> int:
        return len(self.x)

    @property
    def num_terms(self) -> int:
        """Of the loss over all data: examples, or the positions in them that have a class of their own."""
        return int((self.y != IGNORED).sum()) if self.classifies else self.num_data

    @property
    def steps(self) -> int:
        """Of the whole run; the last batch of an epoch is left out if it is not whole."""
        return self.epochs * (self.num_data // self.batch)

    def val_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The validation half in the batches of training."""
        return list(zip(self.x_val.split(self.batch), self.y_val.split(self.batch), strict=True))


def class_loss(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over the last axis of the output, whatever comes before it."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of one output."""
    return F.mse_loss(output.squeeze(-1), y)
