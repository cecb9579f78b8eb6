"""Whether the labels that are recorded are those that the training's loss asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlearn.audit.scores import is_binary, labels_of
from vlearn.losses.class_scores import class_scores
from vlearn.losses.example_loss import LossFunction

BATCHES = 20  # that are looked at
ROWS = 256  # of each
ENOUGH = 20  # rows, from which on something is said
SHARE = 1 / 5  # of them that speak of other labels


class LabelCheck:
    """Compares labels with the gradients of the loss in the outputs, in the first batches of a training.

    A loss of classes asks for more of the label than of any other class, so that ∂ℓ/∂z is the least there; with smooth
    labels, until the model believes it. Rows count where the label's probability is below 1/2. Labels that the loop
    shifts, permutes or mixes after it got the batch are others than the batch's.
    """

    def __init__(self) -> None:
        self._batches = 0
        self._counts: Tensor | None = None  # rows that tell, and those of other labels, where the outputs are

    @property
    def is_over(self) -> bool:
        """Whether enough batches were seen."""
        return self._batches >= BATCHES

    @torch.no_grad()
    def add(
        self,
        output: Tensor,
        gradients: Sequence[Tensor],
        target: Any,
        loss_fn: LossFunction | None,
        classes_last: bool | None,
    ) -> None:
        """Look at a batch, if its target is labels and one backward pass went through its output.

        Args:
            output: ``[N, C]``, ``[N, C, T]`` or ``[N, T, C]``; of a binary cross-entropy of the target's shape.
            gradients: of the training's loss in it, whatever its scale, of each backward pass.
            target, loss_fn, classes_last: of `output_scores`, which took them.
        """
        if self.is_over:
            return
        self._batches += 1
        if len(gradients) != 1:
            return
        z, g = output.detach(), gradients[0]
        if loss_fn is not None and is_binary(loss_fn):  # two classes of each label, with the scores 0 and z
            labels, axis = target.round().long(), -1
            z, g = torch.stack([torch.zeros_like(z), z], -1), torch.stack([-g, g], -1)
        else:
            found = labels_of(output, target, loss_fn, classes_last)
            if found is None:
                return
            labels, axis = found
        if not labels.numel():
            return
        places = torch.linspace(0, labels.numel() - 1, min(ROWS, labels.numel()), device=labels.device).long()
        rows = torch.unravel_index(places, labels.shape)
        y = labels[rows]
        z, g = (each.movedim(axis, -1)[rows] for each in (z, g))  # [rows, C]
        p = class_scores(z).softmax(1).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
        tells = (y >= 0) & (p < 0.5) & g.isfinite().all(1) & g.ne(0).any(1)
        counts = torch.stack([tells.sum(), (tells & (g.argmin(1) != y)).sum()])
        self._counts = counts if self._counts is None else self._counts + counts.to(self._counts.device)

    def message(self) -> str | None:
        """What is to be warned of, if anything, once."""
        told, others = (0, 0) if self._counts is None else self._counts.tolist()
        is_wrong = told >= ENOUGH and others > SHARE * told
        if is_wrong or self.is_over:
            self._batches, self._counts = BATCHES, None
        if not is_wrong:
            return None
        return (
            f"Of {told} outputs that do not yet give the batch's label, the training's loss asks {others} for another "
            "class: what is recorded is not of the labels that are trained. Where the loop shifts labels, as a causal "
            "language model does, permutes examples or mixes them, give targets=, a callable from the batch to the "
            "labels as the loss gets them, or let the loader do it."
        )
