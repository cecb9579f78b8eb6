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
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlearn.capture.convolutions import Strips
from vlearn.capture.examples import checked_uses, chunks, form_of
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


def layers_of(trace: Trace, wanted: Container[Tensor], may_join: Callable[[Tensor, Tensor], bool]) -> list[Layer]:
    """The layers of a recorded pass that have factors.

    Args:
        wanted: the parameters that may be in one.
        may_join: (weight, bias) -> whether the bias may be the weight's last column.
    """
    uses_of = {p: uses for p, uses in trace.uses_of().items() if p in wanted}
    layers = []
    for weight, uses in uses_of.items():
        kind = _kind(uses, weight)
        if kind is None:
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
    scale: float = 1.0,
) -> dict[tuple[Layer, str], Tensor]:
    """Sums over the examples of what each layer's factors are the means of.

    Args:
        trace: a recorded forward and backward pass.
        layers: those that may be in it.
        weights: the value of each parameter during the pass.
        convention: "expand" or "reduce".
        bases: of layers that EK-FAC's "squares" Σ_n (Q_outᵀ G_n Q_in)² are wanted of too.
        scale: what the pass's gradients are to be multiplied with.
    Raises:
        RuntimeError: if a layer is used in a way in which it has no factors, or see `checked_uses`.
    """
    uses_of = checked_uses(trace, {p for layer in layers for p in layer.parameters}, weights)
    sums: dict[tuple[Layer, str], Tensor] = {}
    for layer in layers:
        uses = next((uses_of[p] for p in layer.parameters if p in uses_of), [])
        if uses and _kind(uses, layer.weight) is None:
            raise RuntimeError(
                f"{uses[0].path} ({type(uses[0].module).__name__}): its weight has Kronecker factors, but was used in "
                "a way in which it has none: call the module in the same way in every step."
            )
        for examples in _chunks(trace.num_examples, uses, layer.weight) if uses else ():
            rows = _rows(layer, uses, examples, scale)
            found = rows.factors(convention)
            if layer in bases:
                found["squares"] = rows.squares(*bases[layer])
            for name, part in found.items():
                sums[layer, name] = sums[layer, name] + part if (layer, name) in sums else part
    return sums


class _MatrixRows(NamedTuple):
    """A layer that is a matrix product: rows a ``[n, T, I]`` of its input, b ``[n, T, O]`` of its output."""

    a: Tensor
    b: Tensor
    transposed: bool  # the parameter holds [I, O]

    def factors(self, convention: str) -> dict[str, Tensor]:
        a, b = self.a, self.b
        if convention == "reduce" and a.shape[1] > 1:
            a, b = a.mean(1, keepdim=True), b.sum(1, keepdim=True)
        found = _second_moment(b), _second_moment(a).div_(a.shape[1])
        return dict(zip(("out_factor", "in_factor"), found[:: -1 if self.transposed else 1], strict=True))

    def squares(self, out_basis: Tensor | None, in_basis: Tensor | None) -> Tensor:
        (_, t, i), o = self.a.shape, self.b.shape[2]
        b_basis, a_basis = (in_basis, out_basis) if self.transposed else (out_basis, in_basis)
        if t > 1 and t * (i * i + o * o) > o * i * (o + i):  # turning G_n is less than turning its rows
            gradients = _times(_times(self.a.mT @ self.b, b_basis).mT, a_basis)  # [n, O, I]
            total = gradients.square_().sum(0)
            return total.mT if self.transposed else total
        a, b = _times(self.a, a_basis), _times(self.b, b_basis)
        shape = torch.Size((i, o) if self.transposed else (o, i))
        return Outer(a.unsqueeze(1), b.unsqueeze(1), shape, self.transposed).sum_of_squares()


class _TableRows(NamedTuple):
    """An embedding."""

    form: Indexed

    def factors(self, convention: str) -> dict[str, Tensor]:
        tokens, b = self.form.tokens, self.form.kept(self.form.b)
        counts = torch.bincount(tokens.flatten(), minlength=self.form.shape[0]).to(b.dtype)
        if self.form.padding is not None:
            counts[self.form.padding] = 0
        return {"out_factor": counts.div_(tokens.shape[1]), "in_factor": _second_moment(b)}

    def squares(self, out_basis: Tensor | None, in_basis: Tensor | None) -> Tensor:
        return replace(self.form, b=_times(self.form.b, in_basis)).sum_of_squares()


def _rows(layer: Layer, uses: list[Use], examples: slice, scale: float) -> _MatrixRows | _TableRows:
    forms = [form_of(use, layer.weight, examples) for use in uses]
    if isinstance(forms[0], Indexed):
        tokens = torch.cat([form.tokens for form in forms], 1)  # pyright: ignore
        b = torch.cat([form.b for form in forms], 2)
        return _TableRows(replace(forms[0], tokens=tokens, b=b if scale == 1 else b * scale))
    outers = [outer for form in forms if isinstance(outer := _written_out(form), Outer)]
    inputs, outputs = [outer.a.squeeze(1) for outer in outers], [outer.b.squeeze(1) for outer in outers]
    a = inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)
    b = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    if layer.bias is not None:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
    return _MatrixRows(a, b if scale == 1 else b * scale, outers[0].transposed)


def _written_out(form: Form) -> Form:
    return form.patches() if isinstance(form, Strips) else form


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


def _times(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis
