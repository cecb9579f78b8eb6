"""K-FAC's factors of a layer from a recorded pass, and EK-FAC's squares in the factors' eigenbasis.

With a [I] a row of the layer's input, a 1 appended for the bias, and b [O] the gradient of an output row, an example's
gradient is G_n = Σ_t b_nt a_ntᵀ over the positions t that share the weight. Two conventions for its mean square B ⊗ A:

    expand   A = mean_n mean_t a aᵀ               B = mean_n Σ_t b bᵀ              positions are independent
    reduce   A = mean_n (mean_t a)(mean_t a)ᵀ     B = mean_n (Σ_t b)(Σ_t b)ᵀ       positions have one input

(Eschenhagen et al., 2023, arXiv:2311.00636). Where an index gives the examples, which have different numbers of rows,
"expand" takes the mean of a aᵀ over all rows. Further uses of a weight are further positions. The input rows of an
embedding are unit vectors, so its A is diagonal, the tokens' frequencies; there the convention is always expand.

Everything is named after the parameter: "out_factor" is over its rows, "in_factor" over its columns, a vector where it
is diagonal. These are B and A, but the other way round for an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vlearn.capture.layer_call import LayerCall
from vlearn.layers.convolution import ConvWeightGradient
from vlearn.layers.gradient_forms import Form, Indexed, Outer
from vlearn.per_example.forms import chunks, form_of, gradient_rows
from vlearn.per_example.recorded_pass import RecordedPass

CONVENTIONS = ("expand", "reduce")
LARGEST = 2**13  # rows of a factor that is not diagonal: it takes 256 MiB, and its decomposition a minute of a CPU
CHUNK_ENTRIES = 2**20  # entries of the rows worked on together

Basis = tuple[Tensor | None, Tensor | None]  # over the rows and the columns; None is the identity


class Layer(NamedTuple):
    """A weight, and the bias that is its last column."""

    weight: Tensor
    bias: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def layers_of(
    recorded: RecordedPass, wanted: Container[Tensor], may_join: Callable[[Tensor, Tensor], bool]
) -> list[Layer]:
    """The layers of a recorded pass that have factors.

    Args:
        recorded: the pass.
        wanted: the parameters that may be in one.
        may_join: (weight, bias) -> whether the bias may be the weight's last column, if they are alike.
    """
    calls_of = recorded.calls_of(wanted)
    layers = []
    for weight, calls in calls_of.items():
        kind = _kind(calls, weight)
        if kind is None or not weight.numel():
            continue
        if max(weight[0].numel() + 1, 0 if kind == "table" else len(weight)) > LARGEST:
            continue
        biases = [p for p in calls[0].parameters if calls_of.get(p) == calls and _is_bias(calls[0], p)]
        joined = kind == "matrix" and len(biases) == 1 and _alike(weight, biases[0]) and may_join(weight, biases[0])
        layers.append(Layer(weight, biases[0] if joined else None))
    return layers


def factor_sums(
    recorded: RecordedPass,
    layers: Iterable[Layer],
    convention: str,
    bases: Mapping[Layer, Basis],
    due: Container[Layer],
) -> dict[tuple[Layer, str], Tensor]:
    """Sums over the examples of what each layer's factors are the means of, for the gradients of their own losses.

    Args:
        recorded: the pass.
        layers: those that may be in it.
        convention: "expand" or "reduce".
        bases: the layers for which EK-FAC's "squares" Σ_n (Q_outᵀ G_n Q_in)² are wanted too, with their bases.
        due: the layers whose input covariance is recomputed although it is expensive (several positions).
    Raises:
        RuntimeError: if a layer is used in a way in which it has no factors.
    """
    calls_of = recorded.calls_of({p for layer in layers for p in layer.parameters})
    sums: dict[tuple[Layer, str], Tensor] = {}
    for layer in layers:
        calls = next((calls_of[p] for p in layer.parameters if p in calls_of), [])
        if not calls:
            continue
        kind = _kind(calls, layer.weight)
        if kind is None:
            raise RuntimeError(
                f"{calls[0]}: its weight has Kronecker factors, but was used in "
                "a way in which it has none: call the module in the same way in every step."
            )
        for examples in _chunks(recorded.num_examples, calls, layer.weight, layer in bases):
            rows = _Rows(layer, calls, examples, recorded.scale, kind)
            factors = rows.table_factors() if kind == "table" else rows.factors(convention, layer in due)
            if layer in bases:
                factors["squares"] = rows.squares(*bases[layer])
            for name, part in factors.items():
                sums[layer, name] = sums[layer, name] + part if (layer, name) in sums else part
    return sums


@dataclass
class _Rows:
    """What enters and leaves a layer for some examples, over the positions of all its calls."""

    layer: Layer
    calls: list[LayerCall]
    examples: slice
    scale: float
    kind: str  # see `_kind_of_one`

    def factors(self, convention: str, due: bool) -> dict[str, Tensor]:
        reduced = convention == "reduce" and self.b.shape[1] > 1
        outputs = _second_moment(self.b.sum(1) if reduced else self.b)
        names = ("in_factor", "out_factor") if self.kind == "transposed" else ("out_factor", "in_factor")
        if self.b.shape[1] > 1 and not due:
            return {names[0]: outputs}
        inputs = (
            _second_moment(self.a.sum(1) / self.exist.sum(1).clamp_min(1))
            if reduced
            else self.input_moment().div_(self.mean_positions)
        )
        return {names[0]: outputs, names[1]: inputs}

    def input_moment(self) -> Tensor:
        """Σ a aᵀ over all rows of the input."""
        form = self.forms[0]
        if len(self.forms) == 1 and isinstance(form, ConvWeightGradient):
            moment, total = form.patch_moments()
        else:
            moment, total = _second_moment(self.inputs), self.inputs.sum((0, 1))
        if self.layer.bias is None:
            return moment
        whole = F.pad(moment, (0, 1, 0, 1))
        whole[-1, :-1] = whole[:-1, -1] = total
        whole[-1, -1] = self.exist.sum()
        return whole

    def table_factors(self) -> dict[str, Tensor]:
        tokens, b = self.table.tokens, self.table.kept(self.table.b)
        counts = torch.bincount(tokens.flatten(), minlength=self.table.shape[0]).to(b.dtype)
        counts[0] -= (1 - self.exist).sum()  # what stands where there is no row
        if self.table.padding is not None:
            counts[self.table.padding] = 0
        return {"out_factor": counts.div_(self.mean_positions), "in_factor": _second_moment(b)}

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
    def inputs(self) -> Tensor:
        """Rows of the input ``[n, T, I]``, without the bias's 1."""
        outers = [form.as_outer() for form in self.forms]
        return _joined([outer.a.squeeze(1) for outer in outers if outer is not None], 1)

    @cached_property
    def a(self) -> Tensor:
        """Rows of the input ``[n, T, I]``."""
        return self.inputs if self.layer.bias is None else torch.cat([self.inputs, self.exist], 2)

    @cached_property
    def exist(self) -> Tensor:
        """``[n, T, 1]`` 1 at each position, 0 where an example has fewer rows than others."""
        masks = []
        for call, form in zip(self.calls, self.forms, strict=True):
            n, positions = form.b.shape[0], form.b.shape[2]
            mask = form.b.new_ones(n, 1) if call.rows is None else call.rows.of(self.examples).exist().to(form.b.dtype)
            masks.append(mask.repeat_interleave(positions // mask.shape[1], 1))
        return _joined(masks, 1).unsqueeze(2)

    @property
    def mean_positions(self) -> float:
        """How many positions an example of the batch has on average."""
        rows_of = [call.rows for call in self.calls]
        shares = [1.0 if rows is None else len(rows) / (rows.num_examples * rows.most) for rows in rows_of]
        return sum(form.b.shape[2] * share for form, share in zip(self.forms, shares, strict=True))

    @cached_property
    def b(self) -> Tensor:
        """Gradients of the output rows ``[n, T, O]``."""
        rows = _joined([gradient_rows(call, self.examples).squeeze(1) for call in self.calls], 1)
        return rows if self.scale == 1 else rows * self.scale

    @cached_property
    def table(self) -> Indexed:
        tables = cast(list[Indexed], self.forms)
        tokens = _joined([table.tokens for table in tables], 1)
        return replace(tables[0], tokens=tokens, b=self.b.unsqueeze(1))

    @cached_property
    def forms(self) -> list[Form]:
        return [form_of(call, self.layer.weight, self.examples) for call in self.calls]


def _chunks(total: int, calls: list[LayerCall], weight: Tensor, squares: bool) -> Iterable[slice]:
    forms = [form_of(call, weight, slice(0, 1)) for call in calls]
    positions = sum(form.b.shape[2] for form in forms)
    if positions == 1:
        return chunks(total, 0, CHUNK_ENTRIES)
    columns = 0 if forms[0].kind == "table" else weight.numel() // forms[0].b.shape[3]
    if isinstance(forms[0], ConvWeightGradient) and not squares:  # patches are not written out
        columns //= weight.shape[2]
    return chunks(total, positions * (columns + forms[0].b.shape[3]), CHUNK_ENTRIES)


def _kind(calls: list[LayerCall], weight: Tensor) -> str | None:
    """How a weight acts, if all its calls give rows of one group of channels in the same way; None if they do not."""
    kinds = {_kind_of_one(call, weight) for call in calls}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_of_one(call: LayerCall, weight: Tensor) -> str | None:
    """ "matrix", "transposed" (the parameter holds [I, O]), "table" (an embedding), or None."""
    names = [name for name, p in call.module._parameters.items() if p is weight]
    if call.rule is None or len(names) != 1 or names[0] not in call.rule.forms:
        return None
    form = form_of(call, weight, slice(0, 1))
    if form.b.shape[1] > 1 or len(form.shape) < 2:
        return None
    return form.kind if form.kind in ("matrix", "transposed", "table") else None


def _alike(weight: Tensor, bias: Tensor) -> bool:
    return weight.dtype == bias.dtype and weight.device == bias.device and len(weight) == bias.numel()


def _is_bias(call: LayerCall, p: Tensor) -> bool:
    return call.rule is not None and form_of(call, p, slice(0, 1)).kind == "bias"


def _second_moment(rows: Tensor) -> Tensor:
    """Σ over all rows of the outer product of each with itself."""
    if rows.dim() == 3 and rows.shape[1] > 1 and rows.mT.is_contiguous():  # of images, whose channels come first
        columns = rows.permute(2, 0, 1).reshape(rows.shape[2], -1)
        return columns @ columns.mT
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.mT @ flat


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _times(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis
