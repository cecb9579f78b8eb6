"""What a run or a sweep says of the labels: which are likely wrong, and which examples are memorised or uncertain."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vlearn._extras import require
from vlearn._short_repr import ShortRepr
from vlearn._warnings import warn_user
from vlearn.audit.confident_learning import noise_joint
from vlearn.losses.class_scores import class_scores
from vlearn.record import TrainingRecord
from vlearn.record.running_averages import AVERAGED
from vlearn.sensitivity.sweep import SensitivityTable

GROUPS = ("unpredictable", "uncertain", "memorised", "easy")
LOWER_IS_WORSE = ("margin", "probability", "agreement")
OF_TABLE = ("loss", "loo_loss", "self_influence", "leverage", "prediction_error")
CONTESTED = "contested_loss"
LEARNED_BY_HEART = 0.99  # share of the labels, from which on a run that agrees with them fits wrong ones, too
HIGH_LEVERAGE = 2.0  # times the mean, from which on an example counts as a point of high leverage


@dataclass(frozen=True, repr=False)
class LabelIssues(ShortRepr):
    """Examples in the order in which their labels are worth a look, the worst first.

    Attributes:
        numbers: ``[K]`` of the examples.
        given: ``[K]`` labels they have.
        suggested: ``[K]`` what else they may be: the most probable class but the given one, if probabilities are known;
            else the class predicted last.
        score: ``[K]``, the higher the more likely wrong.
        group: ``[K]`` one of "unpredictable", "uncertain", "memorised" and "easy".
        probabilities: ``[K, C]`` out-of-sample probabilities, or averages over a run; None where they are not known.
        count: how many labels are expected to be wrong, the first so many; None without probabilities, and where the
            run has come to fit nearly all labels that it was given.
        joint: ``[C, C]`` expected shares of given (rows) and true label; None likewise.
    """

    numbers: np.ndarray
    given: np.ndarray
    suggested: np.ndarray
    score: np.ndarray
    group: np.ndarray
    probabilities: np.ndarray | None
    count: int | None
    joint: np.ndarray | None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def counts(self) -> dict[str, int]:
        """How many examples are in each group."""
        return {name: int(np.count_nonzero(self.group == name)) for name in GROUPS}

    def columns(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """``[K]`` ``number``, ``given``, ``suggested``, ``score``, ``group`` and ``is_issue``, the first ``count``.

        Args:
            names: of the classes, in the place of their numbers; where a class is not known, None.

        Raises:
            ValueError: if a class has no name.
        """
        given, suggested = self.given, self.suggested
        if names is not None:
            largest = int(max(given.max(initial=-1), suggested.max(initial=-1)))
            if largest >= len(names):
                raise ValueError(f"names has {len(names)} classes, but there is class {largest}: give those of all.")
            given, suggested = (_named(labels, names) for labels in (given, suggested))
        columns = {"number": self.numbers, "given": given, "suggested": suggested, "score": self.score}
        columns["group"] = self.group
        return columns if self.count is None else {**columns, "is_issue": np.arange(len(self)) < self.count}

    def to_pandas(self, names: Sequence[str] | None = None) -> Any:
        """The same as a ``pandas.DataFrame``."""
        return require("pandas", extra="pandas", feature="to_pandas()").DataFrame(self.columns(names))

    def to_parquet(self, path: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
        """The same as a Parquet file."""
        self.to_pandas(names).to_parquet(path, index=False)

    def for_cleanlab(self) -> dict[str, np.ndarray]:
        """``labels`` ``[K]`` and ``pred_probs`` ``[K, C]`` for ``cleanlab.filter.find_label_issues``.

        Their rows are in the order of ``numbers``.

        Raises:
            ValueError: if the probabilities are not known.
        """
        if self.probabilities is None:
            raise ValueError("the probabilities of all classes were not kept: record with probabilities=True.")
        return {"labels": self.given, "pred_probs": self.probabilities}


def label_issues(
    source: TrainingRecord | SensitivityTable, labels: Any = None, score: str | None = None
) -> LabelIssues:
    """Order examples by how likely their label is wrong, and say how many are expected to be.

    A run has seen all examples before it fitted them, so averages over it tell wrong labels apart where the losses of
    a network that has memorised them do not. Of a sweep the output that is predicted without the example, f + Δf,
    takes their place. How many labels are wrong is counted as confident learning counts it, see
    `vlearn.audit.confident_learning`; too few where the network had memorised them for much of the run, and not at all
    where it agrees with 99% of the labels at the end. With p the label's probability now and q that average, or out of
    sample:

    ===================  ================================================================================
    ``memorised``        p ≥ 1/2 > q: it is right because it was learned by heart, or late
    ``uncertain``        else, if the leverage is above twice its mean; where a record has no sweep with
                         leverage, if the prediction was the label in a quarter to three quarters of the run
    ``unpredictable``    else, if p < 1/2: the model does not come to believe the label
    ``easy``             all others
    ===================  ================================================================================

    Args:
        source: a record of a run, or what `vlearn.sweep` returned. The single output of a binary cross-entropy is the
            logit of class 1, beside class 0.
        labels: ``[num_data]`` whole numbers by example number; default those that the record has seen. It warns of
            others than these, as in another order, because losses and probabilities of a record are of what it saw.
        score: a column of the source by which to order, turned so that high is bad; default, of a sweep, the
            leave-one-out loss, and of a run "contested_loss": the average loss times the average probability of the
            suggested class. The loss alone is also high for examples that are like nothing else, whose probability is
            spread; of a record without probabilities it is the default.

    Returns:
        All examples that have a score.

    Raises:
        ValueError: if there are no labels, no such column, the table has not kept its outputs, or there is one class
            and no binary cross-entropy.
    """
    if isinstance(source, TrainingRecord):
        seen = source.labels
        if labels is None and not (seen >= 0).any():
            raise ValueError("the record has seen no labels of classes, one for each example: give labels.")
        given = seen if labels is None else _as_labels(labels)
        _check_reach(np.arange(source.num_data), given)
        if len(given) != len(seen):
            raise ValueError(f"labels has {len(given)}, but the record has {len(seen)} examples: give one for each.")
        numbers, values, now, later, uncertain, of_all, suggested = _of_record(source, given, score)
    elif isinstance(source, SensitivityTable):
        if labels is None:
            raise ValueError("labels is missing: a table has none; give those of all examples, by their numbers.")
        given = _as_labels(labels)
        _check_reach(source.index.numpy(), given)
        numbers, values, now, later, uncertain, of_all, suggested = _of_table(source, given, score)
    else:
        raise TypeError(f"source is a {type(source).__name__}, but it must be a TrainingRecord or a SensitivityTable.")
    kept = np.isfinite(values) & (given[numbers] >= 0)
    if not kept.any():
        raise ValueError(f"no example has a finite {score or 'score'} and a label: record or sweep some first.")
    order = np.flatnonzero(kept)[np.argsort(-values[kept], kind="stable")]
    own = given[numbers][order]
    count = joint = None
    probabilities = None if of_all is None else of_all[order]
    if probabilities is not None and np.isfinite(probabilities).all():
        if int(own.max()) >= probabilities.shape[1]:
            raise ValueError(f"labels hold class {own.max()}, but the model has {probabilities.shape[1]} classes.")
        if not (isinstance(source, TrainingRecord) and _fits_its_labels(source)):
            joint = noise_joint(own, probabilities)
            count = round(len(order) * (1 - float(np.trace(joint))))
    memorised, unpredictable = (now >= 0.5) & (later < 0.5), now < 0.5
    group = np.select([memorised, uncertain, unpredictable], ["memorised", "uncertain", "unpredictable"], "easy")
    if isinstance(source, TrainingRecord):
        _warn_of_others(source.labels, given)
    return LabelIssues(numbers[order], own, suggested[order], values[order], group[order], probabilities, count, joint)


def _of_record(record: TrainingRecord, labels: np.ndarray, score: str | None) -> tuple[Any, ...]:
    """Numbers, score, probability now and on average, whether uncertain, probabilities, and suggested class."""
    averages = record.averages
    of_all = averages.probabilities()
    if of_all is not None and of_all.shape[1] < 2:
        raise ValueError("the model has one output, but label issues need one for each class.")
    allowed = AVERAGED if of_all is None else (*AVERAGED, CONTESTED)
    score = score or ("loss" if of_all is None else CONTESTED)
    if score not in allowed:
        raise ValueError(f"score={score!r}, but a record has {', '.join(allowed)}: use one of them.")
    suggested, contest = averages.predicted, None
    if of_all is not None:
        suggested, contest = _beside(labels[: record.num_data], of_all, suggested)
    # CONTESTED is allowed only where there is a contest.
    values = averages.mean(score) if contest is None or score != CONTESTED else averages.mean("loss") * contest
    later = averages.mean("probability")
    live = record.memory.kinds == "live"
    now = later
    if live.any():
        last = record.memory.column("probability")[np.flatnonzero(live)[-1]].astype(np.float64)
        now = np.where(np.isfinite(last), last, later)
    uncertain = _high(_last_leverage(record))
    if uncertain is None:
        agreement = averages.mean("agreement")
        uncertain = (agreement > 0.25) & (agreement < 0.75)
    return (
        np.arange(record.num_data),
        -values if score in LOWER_IS_WORSE else values,
        now,
        later,
        uncertain,
        of_all,
        suggested,
    )


def _beside(labels: np.ndarray, probabilities: np.ndarray, otherwise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class beside each label, another one where they are not known, and its probability."""
    others = probabilities.astype(np.float64)
    known = np.isfinite(others).all(1)
    rows = np.flatnonzero((labels >= 0) & (labels < others.shape[1]))
    others[rows, labels[rows]] = -np.inf
    return np.where(known, others.argmax(1), otherwise), np.where(known, others.max(1), np.nan)


def _fits_its_labels(record: TrainingRecord) -> bool:
    """Whether a run has come to agree with the labels that it was given, right or wrong ones."""
    live = np.flatnonzero(record.memory.kinds == "live")
    if not len(live):
        return False
    agreement = record.memory.column("agreement")[live[-1]]
    agreement = agreement[np.isfinite(agreement)]
    return bool(len(agreement)) and float(agreement.mean()) >= LEARNED_BY_HEART


def _of_table(table: SensitivityTable, labels: np.ndarray, score: str | None) -> tuple[Any, ...]:
    """As `_of_record`, of a sweep, whose numbers the labels reach."""
    has_loo = not bool(table.loo_loss.isnan().all())
    score = score or ("loo_loss" if has_loo else "loss")
    column = getattr(table, score, None) if score in OF_TABLE else None
    if column is None:
        has = [name for name in OF_TABLE if getattr(table, name) is not None]
        raise ValueError(f"score={score!r}, but the table has {', '.join(has)}: use one of them.")
    output, change = table.output, table.deviation
    if table.position is not None or output is None or output.dim() > 2 or bool(output.isnan().all()):
        raise ValueError(
            "the table has no output [N, C] of one row for each example: sweep a classifier with deviation=True."
        )
    if math.prod(output.shape[1:]) == 1:
        if not _is_logistic(output.reshape(-1), table.loss, torch.from_numpy(labels[table.index.numpy()])):
            raise ValueError(
                "the model has one output, but label issues need one for each class, or the logit of a binary "
                "cross-entropy, as of nn.BCEWithLogitsLoss(): sweep with that loss, without smoothing."
            )
        output, change = (F.pad(each.reshape(-1, 1), (1, 0)) for each in (output, change))
    index = table.index.numpy()
    # Without a scale of Σ, Δf has no size, and the output itself is all there is.
    moved = output + change if has_loo else output
    without = class_scores(output, moved=moved).double().softmax(1).numpy()
    own = labels[index].clip(0, output.shape[1] - 1)
    rows = np.arange(len(index))
    now, later = class_scores(output).double().softmax(1).numpy()[rows, own], without[rows, own]
    uncertain = None if table.leverage is None else _high(table.leverage.double().numpy())
    if uncertain is None:
        uncertain = np.zeros(len(index), bool)
    values = column.double().numpy()
    return index, values, now, later, uncertain, without, _beside(own, without, without.argmax(1))[0]


def _is_logistic(logits: torch.Tensor, loss: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether these are binary cross-entropies ``[N]`` of logits ``[N]``, of whatever labels or weighed by these."""
    either = F.softplus(torch.stack([logits, -logits]).double())
    if bool(torch.isclose(either, loss.double(), rtol=1e-2, atol=1e-6).any(0).all()):
        return True
    weighed = [(loss.double() / either[label])[labels == label] for label in (0, 1)]
    if sum(map(len, weighed)) < len(labels):
        return False
    return all(bool(weights.max() - weights.min() <= 1e-2 * weights.min()) for weights in weighed if len(weights))


def _last_leverage(record: TrainingRecord) -> np.ndarray | None:
    column = record.memory.column("leverage")
    for snapshot in np.flatnonzero(record.memory.kinds == "sweep")[::-1]:
        if np.isfinite(column[snapshot]).any():
            return column[snapshot].astype(np.float64)
    return None


def _high(leverage: np.ndarray | None) -> np.ndarray | None:
    """Where the leverage is above twice its mean, the usual rule (Hoaglin and Welsch, 1978)."""
    if leverage is None:
        return None
    leverage = leverage.clip(0)  # negative where the loss curves downwards
    mean = leverage[np.isfinite(leverage)].mean()
    return np.nan_to_num(leverage, nan=0.0) > HIGH_LEVERAGE * mean


def _as_labels(labels: Any) -> np.ndarray:
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {array.shape} and type {array.dtype}, but they must be [num_data] whole numbers, one "
            "label for each example."
        )
    return array.astype(np.int64)


def _warn_of_others(seen: np.ndarray, labels: np.ndarray) -> None:
    """Warn of labels that are others than a record has seen."""
    differ = np.count_nonzero((seen >= 0) & (labels >= 0) & (seen != labels))
    if differ:
        warn_user(
            f"{differ} of the labels are others than the record has seen, of which its losses and probabilities are: "
            "leave labels out, or give them in the order of the examples' numbers."
        )


def _named(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The names of classes ``[K]``, None for -1."""
    named = [names[label] if label >= 0 else None for label in labels]
    return np.array(named, object if None in named else None)


def _check_reach(numbers: np.ndarray, labels: np.ndarray) -> None:
    if len(numbers) and int(numbers.max()) >= len(labels):
        raise ValueError(
            f"numbers reach {int(numbers.max())}, but labels has {len(labels)}: give those of all examples, by number."
        )
