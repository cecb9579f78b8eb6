"""Sensitivities of a whole data set at the posterior mean, in eval mode: the published definition."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlearn._warnings import warn_user
from vlearn.capture.pytrees import Selector
from vlearn.collectives import process_count
from vlearn.gaussians.protocol import Posterior, check_posterior
from vlearn.linearized.batches import Batch, batches, device_of, with_progress_bar
from vlearn.linearized.linearization import Linearization, OutputTooLargeError, at_mean, linearize, part_of_batch
from vlearn.linearized.processes import Fingerprint, Processes, whole_network
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.losses.output_hessian import signed_root
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.record.row_record import RowRecord
from vlearn.sensitivity.live import prediction_error
from vlearn.sensitivity.refined import check_threshold, function_variance, refine
from vlearn.sensitivity.summary import row_norms
from vlearn.sensitivity.table import COLUMNS, OUTPUTS, GrowingTable, SensitivityTable, TableOnDisk, not_kept
from vlearn.sensitivity.tokens import by_position, kept_tokens, token_axis

KEPT_ENTRIES = 2**12  # of an example's deviation, which is kept by default
OUTPUT_ENTRIES = 2**24  # of a batch's output, beyond which it is swept in parts of fewer examples: 64 MiB of float32
FEWEST_ROWS, HIGHEST_LEVERAGE = 100, 0.75  # see `_warn_if_too_wide`
PART = 100  # times the examples of a sweep: an ess beyond is hardly the number of training examples


@dataclass(frozen=True)
class SweepOptions:
    """What `sweep` is asked for; see its arguments."""

    leverage: str | None
    refined: bool
    threshold: float
    variance: bool
    loo_loss: bool
    deviation: bool | str | None
    per: str

    def check(self, posterior: Posterior) -> None:
        """Raise where an option breaks its rule, or the posterior has no scale for it or is none."""
        check_posterior(posterior)
        if self.loo_loss or self.refined:
            posterior.require_calibrated("leave-one-out loss")
        if self.leverage not in ("probe", "exact", None):
            raise ValueError(f"leverage={self.leverage!r}, but it must be 'probe', 'exact' or None: use 'probe'.")
        check_threshold(self.threshold)
        if self.deviation not in ("small", True, False, None):
            raise ValueError(f"deviation={self.deviation!r}, but it must be 'small', True or None: use None.")
        if self.per not in ("example", "token"):
            raise ValueError(f"per={self.per!r}, but it must be 'example' or 'token': use 'example'.")
        if self.per == "token" and (self.refined or self.variance or self.leverage == "exact"):
            raise ValueError(
                "per='token' with refined, variance or leverage='exact', which need V of a whole output: use "
                "per='example', or leave them out (leverage='probe' or None)."
            )

    @property
    def second_order(self) -> bool:
        """Whether the curvature of the loss is needed."""
        return self.leverage is not None or self.refined or self.per == "token"


@torch.inference_mode(False)
@torch.no_grad()
def sweep(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    leverage: str | None = "probe",
    output: Selector = None,
    progress: bool | None = None,
    generator: torch.Generator | None = None,
    *,
    refined: bool = False,
    threshold: float = 0.95,
    variance: bool = False,
    per: str = "example",
    loo_loss: bool = True,
    deviation: bool | str | None = "small",
    example_index: ExampleIndex | None = None,
    out: str | os.PathLike[str] | None = None,
    sync: bool = False,
) -> SensitivityTable:
    """Leave-one-out loss, deviation, self-influence and leverage of every example, without retraining.

        Δf_i = V_i e_i,  LOO_i = ℓ(y_i, f_i + Δf_i),  V_i = J_i Σ J_iᵀ

    Each batch costs one forward, one backward without weight gradients, the ghost products and one
    forward-mode pass; the leverage one more backward and its products; `refined`, `variance` and leverage="exact" as
    many as there are outputs. Memory does not grow with the number of parameters times examples, nor with a batch whose
    output has more than 2²⁴ entries: it is swept in parts, at least an example at a time.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move. A copy of the
            model that it was learned by is matched by names, at weights of its own, see `vlearn.posterior.load`.
        loader: yields (x, y) or (x, y, index), see `IndexedDataset`, or dicts (also dataclasses and named tuples) with
            "labels" or "label" and, if they number their examples, "index" or "idx". Without an index an example's
            number is its place in the dataset, whatever order a DataLoader goes through it in, and its place in the
            loader if that is no DataLoader over a map-style dataset. x is a tensor, a tuple or list (positional
            arguments) or a dict (keyword arguments); or the only argument of a model that takes it whole.
        loss_fn: the training loss, with a `reduction` argument, or a callable (output, target) -> ``[N]``.
        leverage: "probe" (one unbiased random probe per example), "exact" (one backward per output; `refined`
            has it anyway) or None.
        output: which of several outputs loss, deviation and leverage speak of; a callable loss_fn gets the
            whole output all the same.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        generator: of the probe; default torch's global one, which goes on, as in every pass through a DataLoader: a
            training after the sweep draws other numbers.
        refined: Δf = (I - VΛ)⁻¹ V e, exact for linear regression, instead of its first order V e. For a Σ that is the
            inverse of Σ JᵀΛJ and a prior at these very weights; a diagonal or Kronecker Σ overstates it.
        threshold: examples whose largest eigenvalue of VΛ reaches it keep V e; at .95 the refined form is 20 times
            as long. Their number is `SensitivityTable.num_first_order`.
        variance: also return V.
        per: "example" (a sequence is one), or "token": one row for each position whose target is not ignored, as if
            that token's loss alone were removed; num_data of the posterior must then count tokens. As many times
            slower as there are positions.
        loo_loss: False leaves it out: for a posterior whose Σ has an arbitrary scale, as SGD's, which only ranks.
        deviation: keep Δf of every example, True or None; by default, "small", where it has at most 2¹² entries for
            each, and as many in every batch. A language model's outgrow any memory; the norms are always kept.
        example_index: for batches whose examples are concatenated, as graphs are by their nodes: the name of the
            argument of the model's forward that gives the example of each row, ``[rows]``, or a callable of the
            forward's arguments; see `VariationalOptimizer.watch`. There are as many examples as targets.
        out: a folder to which the rows of each batch are written as they come, so that no column is held in memory.
            After a kill the same command, of as many processes or others, goes on where it was: of what is there
            already only the losses are computed, to see that the data are the same. Its table, in the order of the
            examples' numbers, is on disk, and `SensitivityTable.open` opens it again;
            ``np.load("rows.npy", mmap_mode="r")["loss"]`` without vlearn.
        sync: sweep the data of all processes of torch.distributed, where the loader of each gives its own share, as by
            an `UnrepeatedDistributedSampler`; of the processes of a DistributedDataParallel model where that is given.
            All must call it, and all get the table of all, see `SensitivityTable.gather`; each probes with random
            numbers of its own. Some may have fewer batches, or none. Without it, a process sweeps what its own loader
            gives and waits for nobody.
    Returns:
        One row per example, or token, in the order of the examples' numbers, then of positions.
    Raises:
        TypeError: if an argument is of another kind, as an optimizer in place of its posterior.
        ValueError: if an argument breaks its rule, the posterior belongs to another model, the examples cannot be
            numbered, `out` holds a sweep of something else, or the processes differ in more than their data.
        RuntimeError: if the examples of a batch have no gradient of their own, the posterior has no scale, another
            process writes to `out`, or the sweep failed in another process.
    """
    options = SweepOptions(leverage, refined, threshold, variance, loo_loss, deviation, per)
    model, posterior = whole_network(model, posterior)
    processes = Processes(model, sync, "sweep")
    model = processes.model

    def checked() -> dict[str, Any]:
        options.check(posterior)
        if out is not None and not sync and process_count() > 1:
            raise ValueError(
                f"out={str(out)!r} in one of {process_count()} processes, each of which may be writing: call sweep "
                "with sync=True in all."
            )
        return asdict(options) | {"out": None if out is None else str(out)}

    with processes.alike(checked), ExitStack() as stack:
        losses = processes.agreed(lambda: ExampleLoss(loss_fn, per))
        covariance = processes.agreed(lambda: stack.enter_context(at_mean(model, posterior)))
        shared = out is not None or process_count() > 1
        network = processes.agreed(lambda: Fingerprint.of(model, covariance)) if shared else None
        generator = processes.own_generator(generator, device_of(model)) if leverage == "probe" else generator
        progress = progress if progress is not None or processes.rank == 0 else False

        parts = _Parts(
            partial(linearize, model, covariance, losses=losses, output=output, second_order=options.second_order)
        )

        def rows_of(batch: Batch) -> Iterator[SensitivityTable]:
            for lin in parts(batch):
                if per == "token":
                    yield from _token_rows_of(lin, options, generator)
                else:
                    yield _rows_of(lin, options, generator)
                del lin  # its graph goes before the next part comes

        def key_of(batch: Batch) -> dict[str, np.ndarray]:
            found: list[dict[str, Tensor]] = []
            for lin in parts(batch):
                found.append(_key_of(lin))
                del lin  # as above
            return {name: torch.cat([part[name] for part in found]).numpy() for name in found[0]}

        def go_through(table: GrowingTable | TableOnDisk) -> None:
            given = batches(loader, model, example_index)
            shown = with_progress_bar(given, loader, progress, "sweep")
            _sweep_into(
                table, shown, rows_of, key_of, may_be_empty=process_count() > 1 and not isinstance(loader, Iterator)
            )

        if out is None or network is None:
            in_memory = GrowingTable()
            processes.agreed(partial(go_through, in_memory))
            table = in_memory.rows(network)
            table = table if processes.group is None else table.gather(processes.group)
        else:
            _sweep_to_disk(RowRecord(out), options, network, processes, go_through)
            table = processes.agreed(lambda: SensitivityTable.open(out))
    scale_is_known = getattr(posterior, "num_data_given", True)
    if options.loo_loss and not scale_is_known and posterior.num_data > PART * len(table):
        warn_user(
            f"the loader has {len(table)} of the {posterior.num_data:g} training examples that the optimizer's ess "
            "stands for. Pass num_data to the optimizer: where it is less than ess, leave-one-out losses are too near "
            "the training loss."
        )
    if options.loo_loss:
        _warn_if_undefined(table)
    if options.loo_loss and not options.refined:
        _warn_if_too_wide(table)
    return table


def _warn_if_undefined(table: SensitivityTable) -> None:
    undefined = int((table.loo_loss.isnan() & table.loss.isfinite()).sum())
    if undefined:
        warn_user(
            f"{undefined} of {len(table)} leave-one-out losses are NaN: without the example, the output is predicted "
            "to be none that the loss takes, as a probability below 0 or a negative variance. Let the model give "
            "logits (nn.BCEWithLogitsLoss, F.cross_entropy), and the logarithm of a rate or of a variance. The mean "
            "over the others, loo_loss.nanmean(), lacks the largest."
        )


def _warn_if_too_wide(table: SensitivityTable) -> None:
    """Warn where the posterior is so wide that the size of leave-one-out losses cannot be believed.

    The leverages of all examples add up to the effective number of parameters. Where these are about as many as the
    examples, leaving one out is no small change, and V e is only the first order of it: above a mean of .75 the
    leave-one-out losses of small digits networks were mostly off by half or more. A sequence's many targets may
    determine as many parameters, so the losses must tell it, too. Of few rows means say little.
    """
    if table.leverage is None or len(table) < FEWEST_ROWS:
        return
    leverage, loss, loo = (rows.double().mean().item() for rows in (table.leverage, table.loss, table.loo_loss))
    if leverage > HIGHEST_LEVERAGE and loo > 2 * loss:
        warn_user(
            f"leave-one-out losses ({loo:.3g} on average, training loss {loss:.3g}) are not to be believed: the "
            f"posterior has {leverage:.2g} effective parameters for each example (the mean leverage), so that removing "
            "one is no small change. Diagonal posteriors overstate, and so does any after a short training, often "
            "several times. Take the order of the losses; for their size train by IVON or KFACVON, or fit a posterior "
            "that knows how long the network was trained, vlearn.posterior.fit(model, loader, loss_fn, "
            "training_time=vlearn.posterior.training_time(optimizer, steps, scheduler)), and look at a test set once."
        )


def _sweep_into(
    table: GrowingTable | TableOnDisk,
    given: Iterable[Batch],
    rows_of: Callable[[Batch], Iterator[SensitivityTable]],
    key_of: Callable[[Batch], dict[str, np.ndarray]],
    may_be_empty: bool,
) -> None:
    """Go through the batches of this process.

    Args:
        key_of: what `TableOnDisk.compare` takes of a batch.
    Raises:
        ValueError: if there are none, where no other process may have some or an iterator may be used up.
    """
    count = 0
    for batch in given:
        count += 1
        if isinstance(table, GrowingTable) or table.lacks(batch.index):
            table.add(rows_of(batch))
        else:
            table.compare(**key_of(batch))
    if not count and not may_be_empty:
        raise ValueError("the loader gave no batch: pass one that can be iterated again.")


class _Parts:
    """Batches linearized in parts, where the output of all examples would take too much memory.

    Beside the output itself its size is held by residuals, their graph, tangents and probes: some ten times.

    Args:
        linearize: a batch, with `largest` as for `vlearn.linearized.linearization.linearize`.
    """

    def __init__(self, linearize: Callable[..., Linearization]):
        self._linearize = linearize
        self._entries = 0  # of the largest output of an example so far, where one was too large
        self._checked: set[Any] = set()  # sizes and axes of batches that were cut

    def __call__(self, batch: Batch) -> Iterator[Linearization]:
        """The batch, or one part after the other; none is held."""
        count, kind = len(batch.index), (len(batch.index), *batch.axes)
        if not batch.example_rows and count * self._entries > OUTPUT_ENTRIES and kind in self._checked:
            yield from self._cut(batch)
            return
        try:
            lin = self._linearize(batch=batch, largest=OUTPUT_ENTRIES)
        except OutputTooLargeError as too_large:
            whole = too_large.with_traceback(None)  # which would hold the forward pass
        else:
            yield lin
            return
        self._entries = max(self._entries, whole.entries)
        yield from self._cut(batch, whole)
        self._checked.add(kind)

    def _cut(self, batch: Batch, whole: OutputTooLargeError | None = None) -> Iterator[Linearization]:
        size, count = max(1, OUTPUT_ENTRIES // self._entries), len(batch.index)
        for rows in torch.arange(count, device="cpu").split(size):
            with nullcontext() if whole is None else part_of_batch():
                lin = self._linearize(batch=batch.rows(rows))
            if whole is not None and int(rows[0]) == 0:
                whole.check_end(lin, 0)
            if whole is not None and int(rows[-1]) == count - 1:
                whole.check_end(lin, -1)
            yield lin
            del lin


def _sweep_to_disk(
    record: RowRecord,
    options: SweepOptions,
    network: Fingerprint,
    processes: Processes,
    go_through: Callable[[TableOnDisk], None],
) -> None:
    """Write the rows of all processes to a folder, each to its own part, and join them."""
    task = {"options": asdict(options), "weights": network.weights, "scales": list(network.scales)}

    def begin() -> None:
        if record.exists:
            found = record.task
            earlier = Fingerprint(found["weights"], tuple(found["scales"]))
            what = "its options" if found["options"] != task["options"] else earlier.difference(network)
            if what is not None:
                raise ValueError(
                    f"{record.path} holds a sweep of something else ({what} differ): use another path, or delete it."
                )
        record.begin(task)

    def in_first(work: Callable[[], None]) -> None:
        processes.agreed(work if processes.rank == 0 else lambda: None)

    in_first(begin)
    table = processes.agreed(lambda: TableOnDisk(record, processes.rank))  # all have read before any writes
    try:
        processes.agreed(partial(go_through, table))
        not_given = processes.each(table.not_given)
        processes.agreed(partial(table.check_given, not_given))
    finally:
        table.close()
    in_first(record.complete)


def _token_rows_of(
    lin: Linearization, options: SweepOptions, generator: torch.Generator | None
) -> Iterator[SensitivityTable]:
    """Rows of the tokens that count, position by position."""
    axis, counts = token_axis(lin), kept_tokens(lin).cpu()
    for of_position, position in by_position(lin):
        rows = _rows_of(of_position, options, generator)
        columns: dict[str, Any] = {name: getattr(rows, name) for name in COLUMNS}
        columns["position"] = torch.full_like(rows.index, position)
        for name in OUTPUTS:
            columns[name] = _kept(getattr(rows, name).select(axis, position), options)
        mask = counts[:, position]
        counted: dict[str, Any] = {name: None if column is None else column[mask] for name, column in columns.items()}
        yield SensitivityTable(**counted)


def _key_of(lin: Linearization) -> dict[str, Tensor]:
    """Number and loss of each example ``[n]``, on the CPU; of the tokens that count, with their positions."""
    loss = lin.loss.cpu().double()
    if loss.dim() == 1:
        return {"index": lin.batch.index, "loss": loss}
    counts = kept_tokens(lin).cpu()
    examples, position = counts.nonzero().unbind(1)
    return {"index": lin.batch.index[examples], "loss": loss[counts], "position": position}


def _kept(rows: Tensor, options: SweepOptions) -> Tensor:
    """An output or its change, if it is to be kept."""
    is_small = math.prod(rows.shape[1:]) <= KEPT_ENTRIES
    keeps = is_small if options.deviation == "small" else options.deviation
    return rows if keeps else not_kept(rows)


def _rows_of(lin: Linearization, options: SweepOptions, generator: torch.Generator | None) -> SensitivityTable:
    more = options.second_order or options.variance
    self_influence, changes = lin.self_influence_and_deviation(deviation=True, last=not more)
    assert changes is not None  # asked for
    used_first_order = leverage = variance = largest = None
    change = changes[lin.chosen]
    if options.refined:
        lin.check_one_output("refined=True")
        change, used_first_order, leverage, largest = refine(lin, change, options.threshold)
        changes = lin.changes_of_chosen(change)

    def kept(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().cpu()

    loo = lin.loss_at(changes) if options.loo_loss else torch.full_like(lin.loss, torch.nan)
    deviation = kept(change if lin.position is not None else _kept(change, options))
    norm = kept(row_norms(change))
    del changes, change  # as large as the output, which the leverage needs several of
    if options.leverage is None:
        leverage = None
    elif leverage is None:
        leverage = _leverage(lin, options.leverage, generator)
    if options.variance:
        variance = function_variance(lin)
    return SensitivityTable(
        index=lin.batch.index,
        loss=kept(lin.loss),
        loo_loss=kept(loo),
        deviation=deviation,
        self_influence=kept(self_influence),
        leverage=kept(leverage),
        prediction_error=kept(prediction_error(lin.residual)),
        function_variance=kept(variance),
        used_first_order=kept(used_first_order),
        deviation_norm=norm,
        largest_eigenvalue=kept(largest),
        output=kept(lin.output if lin.position is not None else _kept(lin.output, options)),
    )


def _leverage(lin: Linearization, how: str, generator: torch.Generator | None) -> Tensor:
    """tr(Λ_n V_n) ``[N]`` = Σ_c d_c r_cᵀV_n r_c over the columns of R, R diag(d) Rᵀ = Λ_n; or an estimate of it."""
    if how == "probe":
        return lin.leverage_estimate(generator)
    root, signs = signed_root(lin.hessian(), lin.output)
    each = [lin.quadratic_and_product(column, product=False)[0] for column in root.unbind(2)]
    return (torch.stack(each, 1) * signs).sum(1)
