"""What an output says of each example's label: loss, margin, probability, agreement.

one label             z ``[N, C]``, y ``[N]``: margin z_y - max_{k≠y} z_k, probability softmax(z)_y; of a model that
                      ends in softmax, z is the logarithm of its output
a label a position    z ``[N, C, T]`` or ``[N, T, C]``, y ``[N, T]``: means over an example's positions that count
several labels        z and y ``[N, L]`` with a binary cross-entropy of logits: means over the L labels, each with
                      margin (2y - 1)·z and probability sigmoid of that
anything else         the loss alone
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlearn._wide import upcast
from vlearn.losses.class_scores import class_scores
from vlearn.losses.example_loss import ExampleLoss, LossFunction

CHUNK = 2**24  # entries of logits at a time


@dataclass(frozen=True)
class OutputScores:
    """One row for each example of a batch.

    Attributes:
        columns: ``[N]`` ``loss``, ``margin``, ``probability``, ``agreement``, ``prediction_error`` by name, NaN where
            no target of an example counts or the output is NaN.
        predicted: ``[N]`` most probable class, -1 where the output is NaN; None unless an example has one label.
        label: ``[N]`` label, -1 where it is ignored; None likewise.
        probabilities: ``[N, C]`` of all classes, or of the several labels; None likewise.
        classes_last: whether the output's last dimension has the classes; None unless an example has several positions.
    """

    columns: dict[str, Tensor]
    predicted: Tensor | None = None
    label: Tensor | None = None
    probabilities: Tensor | None = None
    classes_last: bool | None = None


@torch.inference_mode(False)
@torch.no_grad()
def output_scores(
    output: Tensor,
    target: Any,
    loss_fn: LossFunction | None = None,
    is_trusted: bool = False,
    classes_last: bool | None = None,
) -> OutputScores:
    """Loss, margin, probability and agreement of each example, averaged over its tokens or labels if it has several.

    Args:
        output: ``[N, C]``, ``[N, C, T]`` or ``[N, T, C]`` logits, or what else the loss takes.
        target: ``[N]`` or ``[N, T]`` labels, or what else the loss takes.
        loss_fn: as of `vlearn.sweep`; default cross-entropy, where the target is whole numbers.
        is_trusted: the labels are classes of the output, which an accelerator need not be asked.
        classes_last: whether the output is ``[N, T, C]`` and not ``[N, C, T]``, where its shape fits both.

    Returns:
        float32 or wider, on the output's device.

    Raises:
        ValueError: if the target is no labels and no loss says what it is, or it does not fit the output.
    """
    output = output.detach()
    if loss_fn is not None and is_binary(loss_fn):
        return _of_several_labels(upcast(output), target, loss_fn)
    labels = _labels(output, target, loss_fn, is_trusted, classes_last)
    if labels is None:
        if loss_fn is None:
            given = f"{tuple(target.shape)} and {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"the target of {given} is no label of an output {tuple(output.shape)}: give the training loss as "
                "loss_fn, and if labels are in a part of the batch alone, the target by targets=."
            )
        return OutputScores({"loss": ExampleLoss(loss_fn)(upcast(output), target).detach()})
    if labels.dim() == 1:
        return _of_one_label(output, labels, target, loss_fn)
    return _of_positions(output, labels, loss_fn, classes_last)


def labels_of(
    output: Tensor, target: Any, loss_fn: LossFunction | None, classes_last: bool | None
) -> tuple[Tensor, int] | None:
    """(Labels ``[N, ...]``, -1 where they are ignored; axis of the output with their classes), None where it has none.

    Args:
        output, target, loss_fn, classes_last: of `output_scores`, which took them.
    """
    if loss_fn is not None and is_binary(loss_fn):
        return None
    labels = _labels(output, target, loss_fn, True, classes_last)
    if labels is None:
        return None
    return labels, -1 if labels.dim() > 1 and _classes_last(output, labels, classes_last) else 1


def _labels(
    output: Tensor, target: Any, loss_fn: LossFunction | None, is_trusted: bool, classes_last: bool | None
) -> Tensor | None:
    """Labels ``[N, ...]`` of which the output has classes, -1 where they are ignored; or None.

    Raises:
        ValueError: if they do not fit the output.
    """
    if not isinstance(target, Tensor) or output.dim() < 2 or (loss_fn is not None and not _is_of_classes(loss_fn)):
        return None
    if target.is_floating_point():
        is_soft = loss_fn is not None and target.shape == output.shape and output.dim() == 2
        return target.argmax(1) if is_soft else None
    if target.is_complex() or target.dtype == torch.bool or not output.is_floating_point():
        return None
    if output.dim() != target.dim() + 1 or output.shape[0] != target.shape[0]:
        return None
    classes = output.shape[-1 if _classes_last(output, target, classes_last) else 1]
    labels = target.long()
    labels = labels.masked_fill(labels == _ignore_index(loss_fn), -1)  # which may lie beyond the classes, as 255 does
    if labels.numel() and not (is_trusted and labels.device.type != "cpu") and int(labels.max()) >= classes:
        raise ValueError(
            f"the target holds class {int(labels.max())}, but the output {tuple(output.shape)} has {classes} classes: "
            "is it the model's output for these targets? Where that is no class, but marks what is ignored, give "
            f"loss_fn=nn.CrossEntropyLoss(ignore_index={int(labels.max())})."
        )
    return labels


def _classes_last(output: Tensor, target: Tensor, otherwise: bool | None) -> bool:
    """Whether the last dimension has the classes, by the shapes, or what is known otherwise where they fit both."""
    first = output.shape[2:] == target.shape[1:]
    last = output.shape[:-1] == target.shape
    if target.dim() > 1 and first and last:
        if otherwise is None:
            raise ValueError(
                f"an output {tuple(output.shape)} for targets {tuple(target.shape)} may have its classes in either of "
                "two dimensions: give classes_last=True where they are in the last, else False."
            )
        return otherwise
    if not first and not last:
        raise ValueError(
            f"an output {tuple(output.shape)} has no classes for targets {tuple(target.shape)}: it must be "
            "[N, C, positions] or [N, positions, C]."
        )
    return not first


def _of_one_label(output: Tensor, labels: Tensor, target: Tensor, loss_fn: LossFunction | None) -> OutputScores:
    ignored = labels < 0
    columns = _of_logits(output, labels.clamp(min=0))
    if loss_fn is not None:
        columns["loss"] = ExampleLoss(loss_fn)(upcast(output), target)
    columns = {name: values.masked_fill(ignored, torch.nan) for name, values in columns.items()}
    return OutputScores(columns, _predicted(output), labels.masked_fill(ignored, -1), class_scores(output).softmax(1))


def _of_positions(
    output: Tensor, labels: Tensor, loss_fn: LossFunction | None, classes_last: bool | None
) -> OutputScores:
    """Means over each example's positions that are not ignored."""
    classes_last = _classes_last(output, labels, classes_last)
    if classes_last:
        output = output.movedim(-1, 1)
    counted = labels >= 0
    example = counted.nonzero()[:, 0]
    logits = output.movedim(1, -1)[counted]  # [M, C]
    columns = _of_logits(logits, labels[counted])
    if loss_fn is not None:
        target = labels.masked_fill(~counted, _ignore_index(loss_fn))
        rows = ExampleLoss(loss_fn, per="token")(upcast(output).flatten(2), target.flatten(1))
        columns["loss"] = rows[counted.flatten(1)]
    counts = torch.bincount(example, minlength=len(labels))
    return OutputScores(
        {
            name: torch.zeros(len(labels), dtype=values.dtype, device=values.device).index_add(0, example, values)
            / counts
            for name, values in columns.items()
        },
        classes_last=classes_last,
    )


def _of_several_labels(output: Tensor, target: Any, loss_fn: LossFunction) -> OutputScores:
    if not isinstance(target, Tensor) or target.shape != output.shape:
        given = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"a binary cross-entropy of an output {tuple(output.shape)} and a target of {given}: both must be of one "
            "shape, with 0 or 1 for each label, as by output=lambda output: output.squeeze(1), or by targets=."
        )
    target = target.to(output.dtype)
    logits, labels = output.reshape(len(output), -1), target.reshape(len(target), -1)
    margin, probabilities = (2 * labels.round() - 1) * logits, logits.sigmoid()
    columns = {
        "loss": ExampleLoss(loss_fn)(output, target),
        "margin": margin.mean(1),
        "probability": margin.sigmoid().mean(1),
        "agreement": (margin > 0).to(margin.dtype).masked_fill(margin.isnan(), torch.nan).mean(1),
        "prediction_error": (probabilities - labels).abs().mean(1),
    }
    if logits.shape[1] > 1:
        return OutputScores(columns, probabilities=probabilities)
    both = torch.cat([1 - probabilities, probabilities], 1)
    return OutputScores(columns, _predicted(both), labels[:, 0].round().long(), both)


def _predicted(output: Tensor) -> Tensor:
    """Most probable class ``[N]``, -1 where an output is NaN, of which argmax takes the first for the largest."""
    return output.argmax(1).masked_fill(output.isnan().any(1), -1)


def _of_logits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Columns ``[M]`` of logits ``[M, C]`` and labels ``[M]``, a part at a time: a vocabulary is long."""
    parts = [_of_part(z, y) for z, y in _parts(logits, labels)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _parts(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK // logits.shape[1])
    yield from zip(logits.split(size), labels.split(size), strict=True)


def _of_part(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    z = class_scores(z)
    own = z.gather(1, y[:, None])
    others = z.scatter(1, y[:, None], -torch.inf).amax(1) if z.shape[1] > 1 else own[:, 0]
    log_probabilities = z.log_softmax(1)
    loss = -log_probabilities.gather(1, y[:, None])[:, 0]
    probabilities = log_probabilities.exp()
    probability = probabilities.gather(1, y[:, None])[:, 0]
    squares = probabilities.square().sum(1) - 2 * probability + 1  # ‖p - y‖²
    return {
        "loss": loss,
        "margin": own[:, 0] - others,
        "probability": probability,
        "agreement": (z.argmax(1) == y).to(z.dtype).masked_fill(z.isnan().any(1), torch.nan),
        "prediction_error": (squares.clamp(min=0) / 2).sqrt(),
    }


def _ignore_index(loss_fn: LossFunction | None) -> int:
    return -100 if loss_fn is None else ExampleLoss(loss_fn).ignore_index


def _unwrapped(loss_fn: LossFunction) -> Any:
    while isinstance(loss_fn, partial):
        loss_fn = loss_fn.func
    return loss_fn


def is_binary(loss_fn: LossFunction) -> bool:
    """Whether a loss is the binary cross-entropy of logits, one for each label."""
    own = _unwrapped(loss_fn)
    return isinstance(own, nn.BCEWithLogitsLoss) or own is F.binary_cross_entropy_with_logits


def _is_of_classes(loss_fn: LossFunction) -> bool:
    """Whether a loss may take logits of classes: any but those that torch has for something else."""
    own = _unwrapped(loss_fn)
    of = type(own) if isinstance(own, nn.Module) else own
    is_torchs = str(getattr(of, "__module__", "")).split(".")[0] == "torch"
    return not is_torchs or of in (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
