"""Products of every example's gradient with the posterior covariance, without storing a gradient per example.

With G_n[p] the gradient of example n's own loss with respect to parameter p, summed over every call that uses p,
and Σ the posterior covariance (Nickl et al., 2023, arXiv:2310.19273, Eqs. 12 and 15):

    self-influence   Σ_p ⟨G_n[p], (ΣG_n)[p]⟩
    tangents         what moving p by (ΣG_n)[p] does to the output rows of each call that uses p

Where a layer acts at one position (T = 1) and Σ is diagonal, both need one matrix product and nothing of
the size of G. Elsewhere G_n is formed for a few examples at a time, few enough to stay in cache. A Kronecker Σ
is diagonal in rotated coordinates, and the same products are taken there (`vlearn.linearized.kronecker_products`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlearn.capture.layer_call import LayerCall
from vlearn.gaussians.covariance import Covariance
from vlearn.linearized.kronecker_products import RotatedLayer
from vlearn.per_example.forms import CHUNK_ENTRIES, FALLBACK_ENTRIES, chunks, entries_of, form_of
from vlearn.per_example.gradients import dense_gradients
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded
from vlearn.per_example.vmap_fallback import output_tangents


@dataclass
class CovarianceProducts:
    """Products with the posterior covariance, on the scale of the recorded backward pass.

    Attributes:
        self_influence: ``[N]`` g_nᵀΣg_n.
        tangents: for each call, what it adds to the tangents of its outputs; None if not asked for.
    """

    self_influence: Tensor
    tangents: dict[LayerCall, list[Tensor]] | None

    def add(self, call: LayerCall, output: int, examples: slice, tangent: Tensor) -> None:
        """Add to the tangent of one output of a call, for some of the examples, whose rows come first."""
        assert self.tangents is not None
        axis = call.output_axes[output]
        assert axis is not None
        if call not in self.tangents:
            self.tangents[call] = [self.self_influence.new_zeros(shape) for shape in call.shapes]
        rows = self.tangents[call]
        if tangent.is_complex() and not rows[output].is_complex():
            rows[output] = rows[output].to(tangent.dtype)
        rows[output].movedim(axis, 0)[_rows(call, output, examples)] += tangent

    def within(self, whole: RecordedPass, part: RecordedPass) -> CovarianceProducts:
        """The products of a subset of the examples as rows among those of all, zero for the others."""
        assert self.tangents is not None

        assert part.trace.examples is not None
        examples = part.trace.examples.tolist()

        def spread(rows: Tensor, shape: tuple[int, ...], axis: int | None, chosen: Any) -> Tensor:
            of_all = rows.new_zeros(shape)
            if axis is not None:
                of_all.movedim(axis, 0)[chosen] = rows.movedim(axis, 0)
            return of_all

        tangents = {
            call: [
                spread(rows, call.shapes[output], call.output_axes[output], _rows(call, output, examples))
                for output, rows in enumerate(self.tangents[chosen])
            ]
            for call, chosen in zip(whole.trace.layer_calls, part.trace.layer_calls, strict=True)
            if chosen in self.tangents
        }
        return CovarianceProducts(spread(self.self_influence, (whole.num_examples,), 0, examples), tangents)


def _rows(call: LayerCall, output: int, examples: slice | list[int]) -> Any:
    """Where some of the examples lie in an output of a call, along their axis."""
    rows = call.output_rows[output] if call.output_rows else None
    return examples if rows is None else rows.of(examples).rows


def covariance_products(recorded: RecordedPass, covariance: Covariance, tangents: bool) -> CovarianceProducts:
    """Multiply every example's gradient by Σ.

    Args:
        recorded: the pass.
        covariance: Σ of the parameters that move; the others stay.
        tangents: also form the tangents that `vlearn.linearized.output_change.output_deviation` needs.
    """
    calls_of = recorded.calls_of(covariance)
    products = CovarianceProducts(covariance.zeros(recorded.num_examples), {} if tangents else None)
    by_calls: dict[tuple[LayerCall, ...], list[Tensor]] = {}
    rest: list[Tensor] = []
    for p, calls in calls_of.items():
        if all(call.rule is not None for call in calls) and covariance.block_of(p)[1].is_elementwise:
            by_calls.setdefault(tuple(calls), []).append(p)
        else:
            rest.append(p)
    for calls, parameters in by_calls.items():
        _add_rows(products, calls, parameters, covariance)
    for parameters in _together(rest, calls_of, covariance):
        if not _add_rotated(products, parameters, calls_of, covariance):
            with as_recorded(recorded.trace):
                _add_dense(products, recorded, {p: calls_of[p] for p in parameters}, covariance)
    return products


def _add_rows(
    products: CovarianceProducts, calls: tuple[LayerCall, ...], parameters: list[Tensor], covariance: Covariance
) -> None:
    """Parameters that share the same calls, all of them with rules, under a diagonal Σ."""
    for examples in chunks(products.self_influence.shape[0], entries_of(calls, parameters)):
        rows: dict[LayerCall, Tensor] = {}
        for p in parameters:
            forms = [form_of(call, p, examples) for call in calls]
            variance = covariance.block_of(p)[1].variances.to(forms[0].b.dtype)  # the model may be of another than Σ
            # Gradients of several calls are summed before they are squared.
            gradient = sum(form.dense() for form in forms) if len(forms) > 1 else None
            direction = None
            if gradient is not None:
                direction = gradient * variance
                products.self_influence[examples] += _row_sums(gradient * direction)
            if products.tangents is None:
                if gradient is None:
                    products.self_influence[examples] += forms[0].weighted_square(variance)
                continue
            for call, form in zip(calls, forms, strict=True):
                if direction is None:
                    tangent = form.weighted_output_jvp(variance)
                    products.self_influence[examples] += (form.b * tangent).flatten(1).sum(1)
                else:
                    tangent = form.output_jvp(direction)
                rows[call] = rows[call] + tangent if call in rows else tangent
        for call, tangent in rows.items():
            _add_row_tangent(products, call, examples, tangent)


def _add_rotated(
    products: CovarianceProducts,
    parameters: list[Tensor],
    calls_of: dict[Tensor, list[LayerCall]],
    covariance: Covariance,
) -> bool:
    """Parameters of one layer that is used once, under a Kronecker Σ; False if they are not, or G_n costs less."""
    layer = RotatedLayer.of(parameters, calls_of, covariance)
    first = None if layer is None else layer.rows(slice(0, 1))
    if layer is None or first is None:
        return False
    for examples in chunks(products.self_influence.shape[0], first.entries):
        rows = layer.rows(examples)
        assert rows is not None
        if products.tangents is None:
            products.self_influence[examples] += rows.self_influence()
        else:
            tangent = rows.tangent()
            products.self_influence[examples] += rows.self_influence(tangent)
            _add_row_tangent(products, layer.call, examples, rows.back(tangent))
    return True


def _add_dense(
    products: CovarianceProducts,
    recorded: RecordedPass,
    calls_of: dict[Tensor, list[LayerCall]],
    covariance: Covariance,
) -> None:
    """Parameters whose gradients are formed: those of fallback modules, and those correlated with others."""
    calls = dict.fromkeys(call for of_parameter in calls_of.values() for call in of_parameter)
    entries = sum(p.numel() for p in calls_of)
    # One layer at a time stays in cache; a fallback module and a dense Σ want many examples at once.
    by_layer = all(covariance.block_of(p)[1].as_kronecker() is not None for p in calls_of)
    limit = CHUNK_ENTRIES if by_layer and all(call.rule is not None for call in calls) else FALLBACK_ENTRIES
    for examples in chunks(products.self_influence.shape[0], entries, limit):
        gradients = dense_gradients(recorded, calls_of, examples)
        directions = covariance.multiply(gradients)
        for p, gradient in gradients.items():
            products.self_influence[examples] += _row_sums(gradient * directions[p])
        if products.tangents is None:
            continue
        for call in calls:
            moving = {p: directions[p].to(_wide(p)) for p in call.parameters if p in directions}
            if call.rule is not None:
                for p, direction in moving.items():
                    _add_row_tangent(products, call, examples, form_of(call, p, examples).output_jvp(direction))
            else:
                for output, tangent in enumerate(output_tangents(call, examples, recorded.weights, moving)):
                    if tangent is not None:
                        products.add(call, output, examples, tangent)


def _together(
    parameters: list[Tensor], calls_of: dict[Tensor, list[LayerCall]], covariance: Covariance
) -> list[list[Tensor]]:
    """The parameters in groups that need one another: those of one block of Σ, those of one fallback module."""
    group_of: dict[Any, tuple[list[Tensor], list[Any]]] = {}  # by what links them: the parameters, and their links
    for p in parameters:
        links: list[Any] = [covariance.block_of(p)[1], *(call for call in calls_of[p] if call.rule is None)]
        members = [p]
        for others, their_links in {id(g): g for link in links if (g := group_of.get(link))}.values():
            members, links = others + members, list(dict.fromkeys(their_links + links))
        group_of.update(dict.fromkeys(links, (members, links)))
    return [members for members, _ in {id(group): group for group in group_of.values()}.values()]


def _add_row_tangent(products: CovarianceProducts, call: LayerCall, examples: slice, rows: Tensor) -> None:
    assert call.rule is not None
    if call.rows is not None:
        rows = call.rows.of(examples).apart(rows)
    shape = (rows.shape[0], *call.shapes[0][1:])
    if rows.shape[2] == 1:  # a bias moves every position alike
        rows = rows.expand_as(call.rule.rows(call.module, rows.new_empty(1).expand(shape)))
    products.add(call, 0, examples, call.rule.from_rows(call.module, rows, shape))


def _wide(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradients of single examples."""
    return torch.promote_types(p.dtype, torch.float32)


def _row_sums(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1).sum(1)
