"""K-FAC's factors of a layer from a recorded pass, and EK-FAC's squares in the factors' eigenbasis.

With a [I] a row of the layer's input, a 1 appended for the bias, and b [O] the gradient of an output row, an example's
gradient is G_n = Σ_t b_nt a_ntᵀ over the positions t that share the weight. Two conventions for its mean square B ⊗ A:

    expand   A = mean_n mean_t a aᵀ               B = mean_n Σ_t b bᵀ              positions are independent
    reduce   A = mean_n (mean_t a)(mean_t a)ᵀ     B = mean_n (Σ_t b)(Σ_t b)ᵀ       positions have one input

(Eschenhagen et al., 2023, arXiv:2311.00636). Further uses of a weight are further positions. The input rows of an
embedding are unit vectors, so its A is diagonal, the tokens' frequencies; there the convention is always expand.

Everything is named after the parameter: "out_factor" is over its rows, "in_factor" over its columns, a vector where it
is diagonal. These are B and A, but the other way round for an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vlearn.capture.convolutions import Strips
from vlearn.capture.examples import checked_uses, chunks, form_of, gradient_rows
from vlearn.capture.fallback import Weights
from vlearn.capture.forms import Form, Indexed, Outer, Shift
from vlearn.capture.trace import Trace
from vlearn.capture.use import Use

CONVENTIONS = ("expand", "reduce")
CHUNK_ENTRIES = 2**20  # entries of the rows worked on together

Basis = tuple[Tensor | None, Tensor | None]  # over the rows and the columns; None is the identity


class Layer(NamedTuple):
    """A weight, and the bias that is its last column."""

    weight: Tensor
    bias: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def layers_of(
    trace: Trace, wanted: Container[Tensor], may_join: Callable[[Tensor, Tensor], bool], largest: int
) -> list[Layer]:
    """The layers of a recorded pass that have factors.

    Args:
        wanted: the parameters that may be in one.
        may_join: (weight, bias) -> whether the bias may be the weight's last column.
        largest: rows that a factor may have, unless it is diagonal.
    """
    uses_of = {p: uses for p, uses in trace.uses_of().items() if p in wanted}
    layers = []
    for weight, uses in uses_of.items():
        kind = _kind(uses, weight)
        if kind is None or not weight.numel():
            continue
        if max(weight[0].numel() + 1, 0 if kind == "table" else len(weight)) > largest:
            continue
        biases = [p for p in uses[0].parameters if uses_of.get(p) == uses and _is_shift(uses[0], p)]
        joined = kind == "matrix" and len(biases) == 1 and may_join(weight, biases[0])
        layers.append(Layer(weight, biases[0] if joined else None))
    return layers


def factor_sums(
    trace: Trace,
    layers: Iterable[Layer],
    weights: Weights,
    convention: str,
    bases: Mapping[Layer, Basis],
    due: Container[Layer],
    scale: float = 1.0,
) -> dict[tuple[Layer, str], Tensor]:
    """Sums over the examples of what each layer's factors are the means of.

    Args:
        trace: a recorded forward and backward pass.
        layers: those that may be in it.
        weights: the value of each parameter during the pass.
        convention: "expand" or "reduce".
        bases: of layers that EK-FAC's "squares" Σ_n (Q_outᵀ G_n Q_in)² are wanted of too.
        due: layers whose A is wanted even if it is dear, as with several positions, of which the rows are many.
        scale: what the pass's gradients are to be multiplied with.
    Raises:
        RuntimeError: if a layer is used in a way in which it has no factors, or see `checked_uses`.
    """
    uses_of = checked_uses(trace, {p for layer in layers for p in layer.parameters}, weights)
    sums: dict[tuple[Layer, str], Tensor] = {}
    for layer in layers:
        uses = next((uses_of[p] for p in layer.parameters if p in uses_of), [])
        if not uses:
            continue
        kind = _kind(uses, layer.weight)
        if kind is None:
            raise RuntimeError(
                f"{uses[0].path} ({type(uses[0].module).__name__}): its weight has Kronecker factors, but was used in "
                "a way in which it has none: call the module in the same way in every step."
            )
        for examples in _chunks(trace.num_examples, uses, layer.weight):
            rows = _Rows(layer, uses, examples, scale, kind)
            found = rows.table_factors() if kind == "table" else rows.factors(convention, layer in due)
            if layer in bases:
                found["squares"] = rows.squares(*bases[layer])
            for name, part in found.items():
                sums[layer, name] = sums[layer, name] + part if (layer, name) in sums else part
    return sums


@dataclass
class _Rows:
    """What enters and leaves a layer for some examples, over the positions of all its uses."""

    layer: Layer
    uses: list[Use]
    examples: slice
    scale: float
    kind: str  # see `_kind_of_one`

    def factors(self, convention: str, due: bool) -> dict[str, Tensor]:
        reduced = convention == "reduce" and self.b.shape[1] > 1
        outputs = _second_moment(self.b.sum(1) if reduced else self.b)
        names = ("in_factor", "out_factor") if self.kind == "transposed" else ("out_factor", "in_factor")
        if self.b.shape[1] > 1 and not due:
            return {names[0]: outputs}
        inputs = _second_moment(self.a.mean(1) if reduced else self.a)
        return {names[0]: outputs, names[1]: inputs if reduced else inputs.div_(self.a.shape[1])}

    def table_factors(self) -> dict[str, Tensor]:
        tokens, b = self.table.tokens, self.table.kept(self.table.b)
        counts = torch.bincount(tokens.flatten(), minlength=self.table.shape[0]).to(b.dtype)
        if self.table.padding is not None:
            counts[self.table.padding] = 0
        return {"out_factor": counts.div_(tokens.shape[1]), "in_factor": _second_moment(b)}

    def squares(self, out_basis: Tensor | None, in_basis: Tensor | None) -> Tensor:
        if self.kind == "table":
            return replace(self.table, b=_times(self.table.b, in_basis)).sum_of_squares()
        (o, i), t = (len(out_basis), len(in_basis)), self.b.shape[1]  # pyright: ignore  (both are matrices)
        if t > 1 and t * (i * i + o * o) > o * i * (o + i):  # turning G_n is less than turning its rows
            return (out_basis.mT @ self.gradients() @ in_basis).square_().sum(0)  # pyright: ignore
        transposed = self.kind == "transposed"
        b_basis, a_basis = (in_basis, out_basis) if transposed else (out_basis, in_basis)
        a, b = _times(self.a, a_basis).unsqueeze(1), _times(self.b, b_basis).unsqueeze(1)
        return Outer(a, b, torch.Size((o, i)), transposed).sum_of_squares()

    def gradients(self) -> Tensor:
        """G_n as the parameter's matrix, with the bias's column."""
        rows = len(self.layer.weight)
        total = sum(form.dense() for form in self.forms)
        assert isinstance(total, Tensor)
        weight = total.reshape(len(total), rows, -1) * self.scale
        return weight if self.layer.bias is None else torch.cat([weight, self.b.sum(1).unsqueeze(2)], 2)

    @cached_property
    def a(self) -> Tensor:
        """Rows of the input ``[n, T, I]``."""
        outers = [form.patches() if isinstance(form, Strips) else form for form in self.forms]
        rows = _joined([outer.a.squeeze(1) for outer in outers if isinstance(outer, Outer)], 1)
        return rows if self.layer.bias is None else torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)

    @cached_property
    def b(self) -> Tensor:
        """Gradients of the output rows ``[n, T, O]``."""
        rows = _joined([gradient_rows(use, self.examples).squeeze(1) for use in self.uses], 1)
        return rows if self.scale == 1 else rows * self.scale

    @cached_property
    def table(self) -> Indexed:
        tables = [form for form in self.forms if isinstance(form, Indexed)]
        tokens = _joined([table.tokens for table in tables], 1)
        return replace(tables[0], tokens=tokens, b=self.b.unsqueeze(1))

    @cached_property
    def forms(self) -> list[Form]:
        return [form_of(use, self.layer.weight, self.examples) for use in self.uses]


def _chunks(total: int, uses: list[Use], weight: Tensor) -> Iterable[slice]:
    forms = [form_of(use, weight, slice(0, 1)) for use in uses]
    positions = sum(form.b.shape[2] for form in forms)
    columns = 0 if isinstance(forms[0], Indexed) else weight.numel() // forms[0].b.shape[3]
    return chunks(total, positions * (columns + forms[0].b.shape[3]) if positions > 1 else 0, CHUNK_ENTRIES)


def _kind(uses: list[Use], weight: Tensor) -> str | None:
    """How a weight acts, if all its uses give rows of one group of channels in the same way; None if they do not."""
    kinds = {_kind_of_one(use, weight) for use in uses}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_of_one(use: Use, weight: Tensor) -> str | None:
    """ "matrix", "transposed" (the parameter holds [I, O]), "table" (an embedding), or None."""
    names = [name for name, p in use.module._parameters.items() if p is weight]
    if use.rule is None or len(names) != 1 or names[0] not in use.rule.forms:
        return None
    form = form_of(use, weight, slice(0, 1))
    if form.b.shape[1] > 1 or len(form.shape) < 2:
        return None
    if isinstance(form, Indexed):
        return "table"
    if isinstance(form, Outer):
        return "transposed" if form.transposed else "matrix"
    return "matrix" if isinstance(form, Strips) else None


def _is_shift(use: Use, p: Tensor) -> bool:
    return use.rule is not None and isinstance(form_of(use, p, slice(0, 1)), Shift)


def _second_moment(rows: Tensor) -> Tensor:
    """Σ over all rows of the outer product of each with itself."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.mT @ flat


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _times(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis
