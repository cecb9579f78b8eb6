"""Sensitivities of a whole data set at the posterior mean, in eval mode: the published definition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.posterior.base import Posterior
from vlearn.sensitivity.batches import batches, device_of, shown
from vlearn.sensitivity.linearize import Linearization, at_mean, linearize
from vlearn.sensitivity.live import Selector, prediction_error
from vlearn.sensitivity.losses import ExampleLoss, LossFunction, curvature_root
from vlearn.sensitivity.refined import check_threshold, function_variance, refine
from vlearn.sensitivity.tokens import by_position, kept_tokens, token_axis

# Small tensors that stay, between large ones that go, keep the heap from being used again: 20 times the table's size.
JOINED_BATCHES = 64


@dataclass(frozen=True)
class SensitivityTable:
    """One row per example, on the CPU, in loader order (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        index: ``[N]`` example numbers.
        loss: ``[N]`` each example's own training loss, in the loss's units.
        loo_loss: ``[N]`` the same at the output predicted without the example, ℓ(y, f + Δf), Eq. 15; its mean
            predicts the test loss. NaN if not asked for.
        deviation: ``[N, C]`` Δf, change of the output if the example were removed: V e, Eq. 12, or its refined form
            if that was asked for.
        self_influence: ``[N]`` gᵀΣg, first-order increase of the example's own loss if it were removed.
        leverage: ``[N]`` tr(ΛV); None if not asked for.
        prediction_error: ``[N]`` ‖residual‖/√2.
        function_variance: ``[N, C, C]`` V, posterior covariance of the linearised output; None if not asked for.
        fell_back: ``[N]`` where `refined` kept V e; None if not asked for.
        position: ``[N]`` position in its sequence of each row with per="token", where N counts tokens; else None.
    """

    index: Tensor
    loss: Tensor
    loo_loss: Tensor
    deviation: Tensor
    self_influence: Tensor
    leverage: Tensor | None
    prediction_error: Tensor
    function_variance: Tensor | None = None
    fell_back: Tensor | None = None
    position: Tensor | None = None

    @property
    def refined_fallbacks(self) -> int | None:
        """For how many examples `refined` kept V e; None if it was not asked for."""
        return None if self.fell_back is None else int(self.fell_back.sum())

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class _Asked:
    leverage: str | None
    refined: bool
    threshold: float
    variance: bool
    loo_loss: bool
    generator: torch.Generator | None
    per: str

    def check(self, posterior: Posterior) -> None:
        if self.loo_loss or self.refined:
            posterior.need_scale("leave-one-out loss")
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
) -> SensitivityTable:
    """Leave-one-out loss, deviation, self-influence and leverage of every example, without retraining.

        Δf_i = V_i e_i,  LOO_i = ℓ(y_i, f_i + Δf_i),  V_i = J_i Σ J_iᵀ

    Each batch costs one forward, one backward without weight gradients, the ghost products and one
    forward-mode pass; the leverage one more backward and its products; `refined`, `variance` and leverage="exact" as
    many as there are outputs. Memory does not grow with the number of parameters times examples.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move.
        loader: yields (x, y) or (x, y, index); see `IndexedDataset`.
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
            as long. Their number is `SensitivityTable.refined_fallbacks`.
        variance: also return V.
        per: "example" (a sequence is one), or "token": one row for each position whose target is not ignored, as if
            that token's loss alone were removed; num_data of the posterior must then count tokens. As many times
            slower as there are positions.
        loo_loss: False leaves it out: for a posterior whose Σ has an arbitrary scale, as SGD's, which only ranks.
    Returns:
        One row per example, or token.
    Raises:
        ValueError: if an argument breaks its rule, or the posterior belongs to another model.
        RuntimeError: if the examples of a batch have no gradient of their own, or the posterior has no scale.
    """
    asked = _Asked(leverage, refined, threshold, variance, loo_loss, generator, per)
    asked.check(posterior)
    losses = ExampleLoss(loss_fn, per)
    rows: list[SensitivityTable] = []
    parts: list[SensitivityTable] = []
    with at_mean(model, posterior) as covariance:
        for batch in shown(batches(loader, device_of(model)), loader, progress, "sweep"):
            at = linearize(model, covariance, batch, losses, output, asked.second_order)
            rows.append(_rows_of(at, asked) if per == "example" else _token_rows_of(at, asked))
            del at  # its graph goes before the next batch comes
            if len(rows) == JOINED_BATCHES:
                parts.append(_joined(rows))
                rows = []
    if not (parts or rows):
        raise ValueError("the loader gave no batch: pass one that can be iterated again.")
    return _joined(parts + rows)


def _joined(rows: list[SensitivityTable]) -> SensitivityTable:
    return _by_column(rows, torch.cat)


def _by_column(rows: list[SensitivityTable], function: Callable[[list[Tensor]], Tensor]) -> SensitivityTable:
    columns: dict[str, Any] = {}
    for field in fields(SensitivityTable):
        parts = [getattr(row, field.name) for row in rows]
        columns[field.name] = None if parts[0] is None else function(parts)
    return SensitivityTable(**columns)


def _token_rows_of(at: Linearization, asked: _Asked) -> SensitivityTable:
    """Rows of the tokens that count, position by position."""
    axis, kept = token_axis(at), kept_tokens(at).cpu()
    found = []
    for of_position, position in by_position(at):
        rows = _rows_of(of_position, asked)
        own = rows.deviation.select(axis, position)
        rows = replace(rows, deviation=own, position=torch.full_like(rows.index, position))
        found.append(_by_column([rows], lambda parts, mask=kept[:, position]: parts[0][mask]))
    return _joined(found)


def _rows_of(at: Linearization, asked: _Asked) -> SensitivityTable:
    self_influence, changes = at.own_gradients(deviation=True, last=not (asked.second_order or asked.variance))
    assert changes is not None  # asked for
    fell_back = leverage = variance = None
    change = changes[at.chosen]
    if asked.refined:
        at.check_one_output("refined=True")
        change, fell_back, leverage = refine(at, change, asked.threshold)
        changes = at.changes_of_chosen(change)
    loo = at.loss_at(changes)
    if asked.leverage is None:
        leverage = None
    elif leverage is None:
        leverage = _leverage(at, asked.leverage, asked.generator)
    if asked.variance:
        variance = function_variance(at)

    def kept(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().cpu()

    return SensitivityTable(
        index=at.batch.index,
        loss=kept(at.loss),
        loo_loss=kept(loo if asked.loo_loss else torch.full_like(loo, torch.nan)),
        deviation=kept(change),
        self_influence=kept(self_influence),
        leverage=kept(leverage),
        prediction_error=kept(prediction_error(at.residual)),
        function_variance=kept(variance),
        fell_back=kept(fell_back),
    )


def _leverage(at: Linearization, how: str, generator: torch.Generator | None) -> Tensor:
    """tr(Λ_n V_n) ``[N]`` = Σ_c r_cᵀV_n r_c over the columns of R, RRᵀ = Λ_n; a probe u = Rz has it as its mean."""
    if how == "probe":
        return at.along(at.probe(generator), deviation=False)[0]
    columns = curvature_root(at.curvature(), at.output).unbind(2)
    return torch.stack([at.along(column, deviation=False)[0] for column in columns]).sum(0)
