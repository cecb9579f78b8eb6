"""One row per example: what a sweep gives, in memory or on disk, of one process or gathered from several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlearn._extras import require
from vlearn._short_repr import ShortRepr
from vlearn.collectives import joined_rows, process_count, told_by_all
from vlearn.linearized.processes import Fingerprint, same_network
from vlearn.record.example_order import example_order
from vlearn.record.row_record import RowRecord
from vlearn.sensitivity.summary import row_norms, summarize


@dataclass(frozen=True, repr=False)
class SensitivityTable(ShortRepr):
    """One row per example, on the CPU, in the order of their numbers (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        index: ``[N]`` example numbers.
        loss: ``[N]`` each example's own training loss, in the loss's units.
        loo_loss: ``[N]`` the same at the output predicted without the example, ℓ(y, f + Δf), Eq. 15; its mean
            predicts the test loss. NaN if not asked for.
        deviation: ``[N, C]`` Δf, change of the output if the example were removed: V e, Eq. 12, or its refined form
            if that was asked for; ``[N, 1]`` of NaN if it was not kept.
        self_influence: ``[N]`` gᵀΣg, first-order increase of the example's own loss if it were removed.
        leverage: ``[N]`` tr(ΛV), which may be negative where the loss is not convex in the output, Λ the Hessian of
            the loss in it; None if not asked for. Probed ones are unbiased, but what is convex in them is not:
            the mean of v/(1 - v) comes out too large (RandALO, Nobel et al., 2024, arXiv:2409.09781); take exact ones.
        prediction_error: ``[N]`` ‖residual‖/√2; of log-probabilities with `F.nll_loss` that of logits.
        function_variance: ``[N, C, C]`` V, posterior covariance of the linearised output; None if not asked for.
        used_first_order: ``[N]`` where `refined` kept V e; None if not asked for.
        largest_eigenvalue: ``[N]`` of VΛ, which tells how far to trust a row: V e falls short by a factor of up to
            1/(1 - this) where Σ is exact, and where it nears 1 the refined form is not to be trusted either. At most
            the leverage of a loss that is convex in the output, which serves where this, None unless `refined`, was
            not asked for.
        position: ``[N]`` position in its sequence of each row with per="token", where N counts tokens; else None.
        deviation_norm: ``[N]`` ‖Δf‖, in the output's units.
        output: ``[N, C]`` f, kept where the deviation is; f + Δf is what the model would say without the example.
        network: what `gather` compares, so that rows of different networks or posteriors are not mixed; None for a
            sweep in a single process.
    """

    index: Tensor
    loss: Tensor
    loo_loss: Tensor
    deviation: Tensor
    self_influence: Tensor
    leverage: Tensor | None
    prediction_error: Tensor
    function_variance: Tensor | None = None
    used_first_order: Tensor | None = None
    position: Tensor | None = None
    deviation_norm: Tensor | None = None
    largest_eigenvalue: Tensor | None = None
    output: Tensor | None = None
    network: Fingerprint | None = field(default=None, repr=False)

    @property
    def num_first_order(self) -> int | None:
        """For how many examples `refined` kept V e; None if it was not asked for."""
        return None if self.used_first_order is None else int(self.used_first_order.sum())

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SensitivityTable:
        """Open the table that ``sweep(..., out=path)`` has written; its columns are views of the disk.

        Raises:
            FileNotFoundError: if the folder has none.
            RuntimeError: if the sweep has not come to its end.
        """
        record = RowRecord(path)
        if not record.is_complete:
            raise RuntimeError(
                f"the sweep that writes to {path} has {record.count} rows so far and has not come to its end: "
                "give the same command again, and it goes on."
            )
        return _of_records(record.rows())

    def gather(self, group: Any = None) -> SensitivityTable:
        """The rows of all processes of torch.distributed, each of which has swept its own share of the data.

        All must call it, and all get the same table, on the CPU: that of one process with all the data, in the order
        of the examples' numbers. A process may have no rows. What comes twice, as a DistributedSampler repeats
        examples to make shares equal, is there once. In a single process it gives the table in that order.

        Where the sweep of one has failed, the others wait here until it ends, or for the group's timeout;
        ``sweep(..., sync=True)`` tells them at once.

        Args:
            group: the processes; those of the default group by default.
        Returns:
            One row per example, or token, in the order of numbers, then of positions.
        Raises:
            ValueError: in all processes, if two rows of one number are of different examples, as where each process
                counts its own from 0; if the processes have swept different networks, or asked for different columns;
                or if none has a row.
        """
        columns: dict[str, Any] = {name: getattr(self, name) for name in COLUMNS}
        network, names, counts = self.network, ["this table"], [len(self)]
        if process_count() > 1:
            told = told_by_all((len(self), self.network, _kinds(columns)), group)
            counts = [count for count, _, _ in told]
            network = same_network([network for count, network, _ in told if count], "swept")
            kinds = _same_kinds([kinds for count, _, kinds in told if count])
            columns = {name: _joined(columns[name], kinds[name], counts, len(self), group) for name in COLUMNS}
            names = [f"process {rank}" for rank in range(len(told))]
        if not sum(counts):
            raise ValueError("the loader gave no batch in any process: pass one that can be iterated again.")
        position = None if columns["position"] is None else columns["position"].numpy()
        source = np.repeat(np.arange(len(counts)), counts)
        loss = columns["loss"].double().numpy()
        order = torch.from_numpy(example_order(columns["index"].numpy(), loss, source, names, position))
        rows: dict[str, Any] = {name: None if column is None else column[order] for name, column in columns.items()}
        return SensitivityTable(**rows, network=network)

    def columns(self) -> dict[str, np.ndarray]:
        """What there is with one value for each row, ``[N]``, by name: all but outputs and their changes."""
        kept = {name: getattr(self, name) for name in COLUMNS}
        return {
            name: column.numpy()
            for name, column in kept.items()
            if column is not None and column.dim() == 1 and not (name == "loo_loss" and column.isnan().all())
        }

    def to_pandas(self) -> Any:
        """The same as a ``pandas.DataFrame``, which sorts, filters and joins them."""
        return require("pandas", extra="pandas", feature="to_pandas()").DataFrame(self.columns())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the same as a Parquet file."""
        self.to_pandas().to_parquet(path, index=False)

    def summary(self, prefix: str = "") -> dict[str, float]:
        """Summarize the table by a few floats, as Lightning's ``log_dict`` or any other logger takes them.

        ===================================  =================================================================
        ``num_examples``                     rows of the table: examples, or tokens with per="token"
        ``num_nonfinite``                    rows with a NaN or an infinity in one of the columns below
        ``num_first_order``                rows for which `refined` kept V e; if `refined` was asked for
        ``loss``                             mean of the rows' losses, in the loss's units
        ``loo_loss``                         mean leave-one-out loss, which predicts the test loss; if asked for
        ``predicted_gap``                    ``loo_loss`` - ``loss``, the predicted generalization gap; likewise
        ``self_influence_mean``              mean of gᵀΣg over the rows, in the loss's units
        ``self_influence_q50``               its median
        ``self_influence_q95``               its 95% quantile
        ``self_influence_max``               its maximum
        ``prediction_error_mean``            mean of ‖residual‖/√2, in [0, 1] for hard-label cross-entropy
        ``prediction_error_q50``             its median
        ``prediction_error_q95``             its 95% quantile
        ``prediction_error_max``             its maximum
        ``deviation_norm_mean``              mean of ‖deviation‖, in the output's units
        ``deviation_norm_q50``               its median
        ``deviation_norm_q95``               its 95% quantile
        ``deviation_norm_max``               its maximum
        ``leverage_mean``                    mean of tr(ΛV), in effective parameters; these four keys are there
                                             if the leverage was asked for
        ``leverage_q50``                     its median; of the probe's noisy rows with leverage="probe"
        ``leverage_q95``                     its 95% quantile; likewise
        ``leverage_max``                     its maximum; likewise
        ===================================  =================================================================

        Quantiles are linearly interpolated. No row is left out: a statistic that a NaN or an infinity reaches is NaN.

        Args:
            prefix: put before every key, as in ``self.log_dict(table.summary("sweep/"))``.

        Returns:
            Python floats by key, finite or NaN.
        """
        means: dict[str, Tensor] = {"loss": self.loss}
        if not self.loo_loss.isnan().all():
            means |= {"loo_loss": self.loo_loss, "predicted_gap": self.loo_loss.double() - self.loss.double()}
        distributions = {
            "self_influence": self.self_influence,
            "prediction_error": self.prediction_error,
            "deviation_norm": row_norms(self.deviation) if self.deviation_norm is None else self.deviation_norm,
            "leverage": self.leverage,
        }
        summary = summarize(means, distributions, prefix)
        if self.used_first_order is not None:
            summary[f"{prefix}num_first_order"] = float(self.used_first_order.sum())
        return summary


def not_kept(rows: Tensor) -> Tensor:
    """What stands in the place of an output, or of its change, that is not kept: ``[N, 1]`` of NaN."""
    return rows.new_full((len(rows), 1), torch.nan)


OUTPUTS = ("deviation", "output")  # may not be kept
COLUMNS = tuple(each.name for each in fields(SensitivityTable) if each.name != "network")
Kinds = dict[str, tuple[torch.Size, torch.dtype] | None]


class GrowingTable:
    """Rows of batch after batch in columns that double when they are full.

    Small tensors that stay, between large ones that go, would keep the heap from being used again.

    Attributes:
        count: the number of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._columns: dict[str, Tensor | None] = {}

    def add(self, batch: Iterable[SensitivityTable]) -> None:
        """Add the rows of one batch, of one part or position of it after the other."""
        for rows in batch:
            self._add(rows)

    def rows(self, network: Fingerprint | None = None) -> SensitivityTable:
        """The table of all rows, in the order of the examples' numbers, then of positions."""
        columns: dict[str, Any] = {
            name: None if column is None else column[: self.count] for name, column in self._columns.items()
        }
        if self.count:
            keys = [columns[name].numpy() for name in ("position", "index") if columns[name] is not None]
            order = torch.from_numpy(np.lexsort(keys))  # by the last key first
            columns = {name: None if column is None else column[order] for name, column in columns.items()}
        if not self.count:
            nothing = torch.empty(0, device="cpu")
            required = ("loss", "loo_loss", "self_influence", "prediction_error")
            columns = dict.fromkeys(required, nothing) | {"index": nothing.long(), "deviation": nothing.unsqueeze(1)}
            columns["leverage"] = None
        return SensitivityTable(**columns, network=network)

    def _add(self, rows: SensitivityTable) -> None:
        for name in OUTPUTS:
            before, now = self._columns.get(name), getattr(rows, name)
            if before is not None and before.shape[1:] != now.shape[1:]:
                # Batches that are padded to different lengths.
                rows, self._columns[name] = replace(rows, **{name: not_kept(now)}), not_kept(before)
        earlier, variance = self._columns.get("function_variance"), rows.function_variance
        if earlier is not None and variance is not None and earlier.shape[1:] != variance.shape[1:]:
            raise _unlike_variances(earlier.shape[1], variance.shape[1])
        for name in COLUMNS:
            part: Tensor | None = getattr(rows, name)
            self._columns[name] = None if part is None else self._with(self._columns.get(name), part)
        self.count += len(rows)

    def _with(self, column: Tensor | None, part: Tensor) -> Tensor:
        needed = self.count + len(part)
        if column is None or len(column) < needed:
            grown = part.new_empty(2 * needed, *part.shape[1:])
            if column is not None:
                grown[: self.count] = column[: self.count]
            column = grown
        column[self.count : needed] = part
        return column


class TableOnDisk:
    """Rows of batch after batch that are written as they come; those of an earlier run that was killed stay.

    Args:
        record: the folder, begun.
        part: this process's place among those that write to it.
    """

    def __init__(self, record: RowRecord, part: int):
        earlier = record.key()
        self._earlier = earlier[np.argsort(earlier["index"], kind="stable")]
        self._numbers, starts = np.unique(self._earlier["index"], return_index=True)
        self._starts = np.append(starts, len(earlier))
        self._given = np.zeros(len(self._numbers), bool)
        self._path, self._writer = record.path, record.writer(part)

    def lacks(self, index: Tensor) -> bool:
        """Whether some of a batch's examples are still to be swept."""
        return not self._find(index.numpy())[0].all()

    def add(self, batch: Iterable[SensitivityTable]) -> None:
        """Write the rows of one batch, all or, after a kill, none of them; those that are there already stay.

        Raises:
            ValueError: if rows that are there already are of other examples.
        """
        rows = np.concatenate([_records(part) for part in batch])
        has, _ = self._find(rows["index"])
        if has.any():
            self.compare(**{name: rows[name][has] for name in self._earlier.dtype.names or ()})
        rows = rows[~has]
        if len(rows):
            self._writer.append(rows)

    def compare(self, index: np.ndarray, **columns: np.ndarray) -> None:
        """Compare examples of the loader with their rows that are there already, by their losses.

        Args:
            index: ``[n]`` their numbers.
            columns: "loss" ``[n]`` and, where tokens are the examples, "position" ``[n]``.
        Raises:
            ValueError: if they are other examples.
        """
        earlier, given = self._rows_of(index), {"index": index, **columns}
        both = {name: np.concatenate([earlier[name], given[name]]) for name in given}
        source = np.repeat([0, 1], [len(earlier), len(index)])
        try:
            example_order(source=source, names=["the folder", "the loader"], **both)
        except ValueError as error:
            raise self._of_other_data(str(error)) from None
        names = [name for name in given if name != "loss"]
        before, now = (np.unique([rows[name] for name in names], axis=1) for rows in (earlier, given))
        if not np.array_equal(before, now):
            raise self._of_other_data("other tokens of a sequence count")
        has, places = self._find(index)
        self._given[places[has]] = True

    def not_given(self) -> list[int]:
        """The numbers of the rows that are there already and that have not been compared so far."""
        return self._numbers[~self._given].tolist()

    def check_given(self, not_given: Iterable[list[int]]) -> None:
        """Raise ValueError if rows that are there already are of examples that no process's loader has given.

        Args:
            not_given: what `not_given` is in each process.
        """
        lacking = sorted(set.intersection(*map(set, not_given)))
        if lacking:
            raise self._of_other_data(
                f"the loader has not given {len(lacking)} of its examples, as number {lacking[0]}"
            )

    def close(self) -> None:
        """Let other processes write."""
        self._writer.close()

    def _find(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Whether each number is there already ``[n]``, its place among those that are)."""
        if not len(self._numbers):
            return np.zeros(len(index), bool), np.zeros(len(index), int)
        places = np.searchsorted(self._numbers, index).clip(max=len(self._numbers) - 1)
        return self._numbers[places] == index, places

    def _rows_of(self, index: np.ndarray) -> np.ndarray:
        """The rows that are there already of some numbers."""
        has, places = self._find(np.unique(index))
        ends = zip(self._starts[places[has]], self._starts[places[has] + 1], strict=True)
        return self._earlier[np.concatenate([np.empty(0, int), *(np.arange(start, end) for start, end in ends)])]

    def _of_other_data(self, why: str) -> ValueError:
        return ValueError(
            f"{self._path} holds a sweep of other data, or with another loss_fn: use another path, or delete it ({why})"
        )


def _records(rows: SensitivityTable) -> np.ndarray:
    """The rows as records ``[N]``, without what was not asked for or kept; bfloat16, which numpy lacks, as float32."""
    columns: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        column: Tensor | None = getattr(rows, name)
        if column is not None and not (name in OUTPUTS and _is_not_kept(column)):
            columns[name] = (column.float() if column.dtype == torch.bfloat16 else column).numpy()
    records = np.zeros(len(rows), np.dtype([(n, c.dtype.str, c.shape[1:]) for n, c in columns.items()], align=True))
    for name in columns:
        records[name] = columns[name]
    return records


def _of_records(records: np.ndarray) -> SensitivityTable:
    columns: dict[str, Any] = {name: torch.from_numpy(records[name]) for name in records.dtype.names or ()}
    for name in OUTPUTS:
        columns.setdefault(name, not_kept(columns["loss"]))
    columns.setdefault("leverage", None)
    return SensitivityTable(**columns)


def _is_not_kept(rows: Tensor) -> bool:
    return rows.shape[1:] == (1,) and bool(rows.isnan().all())


def _kinds(columns: dict[str, Tensor | None]) -> Kinds:
    return {name: None if column is None else (column.shape[1:], column.dtype) for name, column in columns.items()}


def _same_kinds(told: list[Kinds]) -> Kinds:
    """The kind of each column in all processes that have rows.

    Raises:
        ValueError: if they differ.
    """
    if not told:
        return dict.fromkeys(COLUMNS)
    kinds = dict(told[0])
    for name in COLUMNS:
        found = list(dict.fromkeys(each[name] for each in told))
        if len(found) == 1:
            continue
        shapes = [kind[0] for kind in found if kind is not None]
        if name in OUTPUTS and len(shapes) == len(found) and len({kind[1] for kind in found if kind}) == 1:
            kinds[name] = torch.Size([1]), found[0][1]  # pyright: ignore[reportOptionalSubscript]
        elif name == "function_variance" and len(shapes) == len(found):
            raise _unlike_variances(shapes[0][0], shapes[1][0])
        else:
            raise ValueError(
                f"the processes have {', '.join(map(str, found))} for the column {name!r}: call sweep with the same "
                "arguments in all, and with batches of one dtype."
            )
    return kinds


def _unlike_variances(first: int, second: int) -> ValueError:
    return ValueError(
        f"variance=True over batches whose outputs have {first} and {second} entries for each example: leave it out, "
        "or pad all batches to one length."
    )


def _joined(column: Tensor | None, kind: Any, counts: list[int], own: int, group: Any) -> Tensor | None:
    """A column of all processes; one of another shape than the kind's is not kept."""
    if kind is None:
        return None
    shape, dtype = kind
    if column is None or not own:
        column = torch.empty(0, *shape, dtype=dtype, device="cpu")
    return joined_rows(column if column.shape[1:] == shape else not_kept(column), counts, group)
