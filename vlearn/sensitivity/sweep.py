"""Sensitivities of a whole data set at the posterior mean, in eval mode: the published definition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.pytrees import Selector
from vlearn.gaussians.protocol import Posterior
from vlearn.linearized.batches import batches, with_progress_bar
from vlearn.linearized.linearization import Linearization, at_mean, linearize
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.losses.output_hessian import hessian_root
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.sensitivity.live import prediction_error
from vlearn.sensitivity.refined import check_threshold, function_variance, refine
from vlearn.sensitivity.summary import row_norms, summarize
from vlearn.sensitivity.tokens import by_position, kept_tokens, token_axis

KEPT_ENTRIES = 2**12  # of an example's deviation, which is kept by default
PART = 100  # times the examples of a sweep: an ess beyond is hardly the number of training examples


@dataclass(frozen=True)
class SensitivityTable:
    """One row per example, on the CPU, in loader order (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        index: ``[N]`` example numbers.
        loss: ``[N]`` each example's own training loss, in the loss's units.
        loo_loss: ``[N]`` the same at the output predicted without the example, ℓ(y, f + Δf), Eq. 15; its mean
            predicts the test loss. NaN if not asked for.
        deviation: ``[N, C]`` Δf, change of the output if the example were removed: V e, Eq. 12, or its refined form
            if that was asked for; ``[N, 1]`` of NaN if it was not kept.
        self_influence: ``[N]`` gᵀΣg, first-order increase of the example's own loss if it were removed.
        leverage: ``[N]`` tr(ΛV); None if not asked for. Probed ones are unbiased, but what is convex in them is not:
            the mean of v/(1 - v) comes out too large (RandALO, Nobel et al., 2024, arXiv:2409.09781); take exact ones.
        prediction_error: ``[N]`` ‖residual‖/√2.
        function_variance: ``[N, C, C]`` V, posterior covariance of the linearised output; None if not asked for.
        used_first_order: ``[N]`` where `refined` kept V e; None if not asked for.
        largest_eigenvalue: ``[N]`` of VΛ, which tells how far to trust a row: V e falls short by a factor of up to
            1/(1 - this) where Σ is exact, and where it nears 1 the refined form is not to be trusted either. At most
            the leverage, which serves where this, None unless `refined`, was not asked for.
        position: ``[N]`` position in its sequence of each row with per="token", where N counts tokens; else None.
        deviation_norm: ``[N]`` ‖Δf‖, in the output's units.
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

    @property
    def num_first_order(self) -> int | None:
        """For how many examples `refined` kept V e; None if it was not asked for."""
        return None if self.used_first_order is None else int(self.used_first_order.sum())

    def __len__(self) -> int:
        return len(self.index)

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


@dataclass(frozen=True)
class SweepOptions:
    """What `sweep` is asked for; see its arguments."""

    leverage: str | None
    refined: bool
    threshold: float
    variance: bool
    loo_loss: bool
    deviation: bool | None
    generator: torch.Generator | None
    per: str

    def check(self, posterior: Posterior) -> None:
        """Raise ValueError if an option breaks its rule, RuntimeError if the posterior has no scale for it."""
        if self.loo_loss or self.refined:
            posterior.require_calibrated("leave-one-out loss")
        if self.leverage not in ("probe", "exact", None):
            raise ValueError(f"leverage={self.leverage!r}, but it must be 'probe', 'exact' or None: use 'probe'.")
        check_threshold(self.threshold)
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
    deviation: bool | None = None,
    example_index: ExampleIndex | None = None,
) -> SensitivityTable:
    """Leave-one-out loss, deviation, self-influence and leverage of every example, without retraining.

        Δf_i = V_i e_i,  LOO_i = ℓ(y_i, f_i + Δf_i),  V_i = J_i Σ J_iᵀ

    Each batch costs one forward, one backward without weight gradients, the ghost products and one
    forward-mode pass; the leverage one more backward and its products; `refined`, `variance` and leverage="exact" as
    many as there are outputs. Memory does not grow with the number of parameters times examples.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move.
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
        generator: of the probe.
        refined: Δf = (I - VΛ)⁻¹ V e, exact for linear regression, instead of its first order V e. For a Σ that is the
            inverse of Σ JᵀΛJ and a prior at these very weights; a diagonal or Kronecker Σ overstates it.
        threshold: examples whose largest eigenvalue of VΛ reaches it keep V e; at .95 the refined form is 20 times
            as long. Their number is `SensitivityTable.num_first_order`.
        variance: also return V.
        per: "example" (a sequence is one), or "token": one row for each position whose target is not ignored, as if
            that token's loss alone were removed; num_data of the posterior must then count tokens. As many times
            slower as there are positions.
        loo_loss: False leaves it out: for a posterior whose Σ has an arbitrary scale, as SGD's, which only ranks.
        deviation: keep Δf of every example; by default where it has at most 2¹² entries for each, and as many in every
            batch. A language model's outgrow any memory; the norms are always kept.
        example_index: for batches whose examples are concatenated, as graphs are by their nodes: the name of the
            argument of the model's forward that gives the example of each row, ``[rows]``, or a callable of the
            forward's arguments; see `VariationalOptimizer.watch`. There are as many examples as targets.
    Returns:
        One row per example, or token.
    Raises:
        ValueError: if an argument breaks its rule, the posterior belongs to another model, or the examples cannot be
            numbered.
        RuntimeError: if the examples of a batch have no gradient of their own, or the posterior has no scale.
    """
    options = SweepOptions(leverage, refined, threshold, variance, loo_loss, deviation, generator, per)
    options.check(posterior)
    losses = ExampleLoss(loss_fn, per)
    table = _GrowingTable()
    with at_mean(model, posterior) as covariance:
        for batch in with_progress_bar(batches(loader, model, example_index), loader, progress, "sweep"):
            lin = linearize(model, covariance, batch, losses, output, options.second_order)
            for rows in (_rows_of(lin, options),) if per == "example" else _token_rows_of(lin, options):
                table.add(rows)
            del lin  # its graph goes before the next batch comes
    if not table.count:
        raise ValueError("the loader gave no batch: pass one that can be iterated again.")
    given = getattr(posterior, "num_data_given", True)
    if options.loo_loss and not given and posterior.num_data > PART * table.count:
        warnings.warn(
            f"the loader has {table.count} of the {posterior.num_data:g} training examples that the optimizer's ess "
            "stands for. Pass num_data to the optimizer: where it is less than ess, leave-one-out losses are too near "
            "the training loss.",
            stacklevel=4,
        )
    return table.rows()


def not_kept(deviation: Tensor) -> Tensor:
    """What stands in the place of an output change that is not kept: ``[N, 1]`` of NaN."""
    return deviation.new_full((len(deviation), 1), torch.nan)


class _GrowingTable:
    """Rows of batch after batch in columns that double when they are full.

    Small tensors that stay, between large ones that go, would keep the heap from being used again.

    Attributes:
        count: the number of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._columns: dict[str, Tensor | None] = {}

    def add(self, rows: SensitivityTable) -> None:
        """Add the rows of one batch, or of one position of it."""
        deviation = self._columns.get("deviation")
        if deviation is not None and deviation.shape[1:] != rows.deviation.shape[1:]:
            # Batches that are padded to different lengths.
            rows, self._columns["deviation"] = replace(rows, deviation=not_kept(rows.deviation)), not_kept(deviation)
        earlier, variance = self._columns.get("function_variance"), rows.function_variance
        if earlier is not None and variance is not None and earlier.shape[1:] != variance.shape[1:]:
            raise ValueError(
                f"variance=True over batches whose outputs have {earlier.shape[1]} and {variance.shape[1]} entries for "
                "each example: leave it out, or pad all batches to one length."
            )
        for field in fields(SensitivityTable):
            part: Tensor | None = getattr(rows, field.name)
            self._columns[field.name] = None if part is None else self._with(self._columns.get(field.name), part)
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

    def rows(self) -> SensitivityTable:
        """The table of all rows."""
        columns: dict[str, Any] = {
            name: None if column is None else column[: self.count].clone() for name, column in self._columns.items()
        }
        return SensitivityTable(**columns)


def _token_rows_of(lin: Linearization, options: SweepOptions) -> Iterator[SensitivityTable]:
    """Rows of the tokens that count, position by position."""
    axis, counts = token_axis(lin), kept_tokens(lin).cpu()
    for of_position, position in by_position(lin):
        rows = _rows_of(of_position, options)
        columns: dict[str, Any] = {field.name: getattr(rows, field.name) for field in fields(SensitivityTable)}
        columns["position"] = torch.full_like(rows.index, position)
        columns["deviation"] = _kept(rows.deviation.select(axis, position), options)
        mask = counts[:, position]
        counted: dict[str, Any] = {name: None if column is None else column[mask] for name, column in columns.items()}
        yield SensitivityTable(**counted)


def _kept(deviation: Tensor, options: SweepOptions) -> Tensor:
    """An output change, if it is to be kept."""
    keeps = math.prod(deviation.shape[1:]) <= KEPT_ENTRIES if options.deviation is None else options.deviation
    return deviation if keeps else not_kept(deviation)


def _rows_of(lin: Linearization, options: SweepOptions) -> SensitivityTable:
    more = options.second_order or options.variance
    self_influence, changes = lin.self_influence_and_deviation(deviation=True, last=not more)
    assert changes is not None  # asked for
    used_first_order = leverage = variance = largest = None
    change = changes[lin.chosen]
    if options.refined:
        lin.check_one_output("refined=True")
        change, used_first_order, leverage, largest = refine(lin, change, options.threshold)
        changes = lin.changes_of_chosen(change)
    loo = lin.loss_at(changes)
    if options.leverage is None:
        leverage = None
    elif leverage is None:
        leverage = _leverage(lin, options.leverage, options.generator)
    if options.variance:
        variance = function_variance(lin)

    def kept(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().cpu()

    return SensitivityTable(
        index=lin.batch.index,
        loss=kept(lin.loss),
        loo_loss=kept(loo if options.loo_loss else torch.full_like(loo, torch.nan)),
        deviation=kept(change if lin.position is not None else _kept(change, options)),
        self_influence=kept(self_influence),
        leverage=kept(leverage),
        prediction_error=kept(prediction_error(lin.residual)),
        function_variance=kept(variance),
        used_first_order=kept(used_first_order),
        deviation_norm=kept(row_norms(change)),
        largest_eigenvalue=kept(largest),
    )


def _leverage(lin: Linearization, how: str, generator: torch.Generator | None) -> Tensor:
    """tr(Λ_n V_n) ``[N]`` = Σ_c r_cᵀV_n r_c over the columns of R, RRᵀ = Λ_n; a probe u = Rz has it as its mean."""
    if how == "probe":
        return lin.leverage_estimate(generator)
    columns = hessian_root(lin.hessian(), lin.output).unbind(2)
    return torch.stack([lin.quadratic_and_product(column, product=False)[0] for column in columns]).sum(0)
