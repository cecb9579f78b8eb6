"""Inner products ⟨g_i, Σg_j⟩ of the gradients of a pass with directions that are held.

Of a layer at one position both gradients have rank one, G = b aᵀ, and in the coordinates in which Σ is diagonal, with v
its variances,

    ⟨G_i, ΣG_j⟩ = Σ_oi v_oi (b̃_i ∘ b̃_j)_o (ã_i ∘ ã_j)_i

so that O + I numbers are held of each, and no gradient is formed. The eigenvalues of K-FAC are products, so that
v = 1/(N(d_B d_Aᵀ + wd)) = Σ_r p_r q_rᵀ has few terms to rounding, 18 in float32 for a layer of 120 x 401, and

    ⟨G_i, ΣG_j⟩ = Σ_r ⟨p_r ∘ b̃_i, b̃_j⟩ ⟨q_r ∘ ã_i, ã_j⟩

costs 18·(O + I) products for a pair in the place of O·I. Elsewhere Σg_j is held, and the gradients are formed a few
examples at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlearn._wide import widened
from vlearn.capture.layer_call import LayerCall
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.covariance_blocks import Block, KroneckerBlock
from vlearn.linearized.kronecker_products import RotatedGradients, RotatedLayer
from vlearn.linearized.solver import Vectors
from vlearn.per_example.forms import FALLBACK_ENTRIES, chunks, form_of
from vlearn.per_example.gradients import dense_gradients
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded

BlockParameters = tuple[Tensor, ...]
WORTHWHILE = 0.7  # of the products of the full sum, up to which that by terms is faster
MOST_TERMS = 80  # of a v = 1/(x yᵀ + c) to rounding in float64, over twelve orders of magnitude
PAIR_ENTRIES = 2**18  # that the full sum over pairs of examples makes at once, so that they stay in cache


class Terms:
    """The variances of a Kronecker block as a sum of few products, v = Σ_r p_r q_rᵀ, to rounding.

    Attributes:
        out: p ``[R, O]``.
        inputs: q ``[R, I]``.
    """

    def __init__(self, out: Tensor, inputs: Tensor):
        self.out, self.inputs = out, inputs

    @classmethod
    def of(cls, block: KroneckerBlock) -> Terms | None:
        """The terms; None where they do not pay, as of EK-FAC, whose eigenvalues are any."""
        v = block.variances
        if not v.numel():
            return None
        # The terms of a part of the rows and columns are no more than those of all.
        part = v[:: max(1, len(v) // (2 * MOST_TERMS)), :: max(1, v.shape[1] // (2 * MOST_TERMS))]
        if _eliminated(part, MOST_TERMS) is None:
            return None
        found = _eliminated(v, min(MOST_TERMS, int(WORTHWHILE * v.numel() / sum(v.shape))))
        return None if found is None else cls(*found)


@dataclass(frozen=True)
class RankOne:
    """Gradients b aᵀ of m examples in the coordinates of their block: a ``[m, I]``, b ``[m, O]``."""

    a: Tensor
    b: Tensor
    block: KroneckerBlock

    def inner(self, others: RankOne, terms: Terms | None) -> Tensor:
        """⟨G_n, ΣG_m⟩ ``[n, m]`` with the others as columns, by the terms of v where it has few."""
        if terms is None:
            return self._full_sum(others)
        total = self.a.new_zeros(len(self.a), len(others.a))
        for p, q in zip(terms.out, terms.inputs, strict=True):
            total.addcmul_((self.b * p) @ others.b.mT, (self.a * q) @ others.a.mT)
        return total

    def _full_sum(self, others: RankOne) -> Tensor:
        """(b̃_n ∘ b̃_m)ᵀ v (ã_n ∘ ã_m); the narrower side is summed last."""
        if len(self.a) < len(others.a):
            return others._full_sum(self).mT
        sides, v = [(self.b, others.b), (self.a, others.a)], self.block.variances
        if v.shape[0] > v.shape[1]:
            sides, v = sides[::-1], v.mT
        (narrow, of_narrow), (wide, of_wide) = sides
        count, width = len(wide), narrow.shape[1]
        by_pairs = count < width  # else v times each of the others is smaller than every pair's wide side
        entries = count * wide.shape[1] if by_pairs else max(count, wide.shape[1]) * width
        at_once = max(1, PAIR_ENTRIES // max(1, entries))
        parts = []
        for x, y in zip(of_narrow.split(at_once), of_wide.split(at_once), strict=True):
            if by_pairs:
                products = (wide.unsqueeze(1) * y) @ v.mT * x
            else:
                scaled = (y.unsqueeze(1) * v).mul_(x.unsqueeze(2))  # [m, narrow, wide]
                products = (wide @ scaled.flatten(0, 1).mT).unflatten(1, (len(x), width))
            parts.append(products.mul_(narrow.unsqueeze(1)).sum(2))  # of [n, m, narrow]
        return torch.cat(parts, 1)

    def moved(self) -> list[Tensor]:
        """ΣG ``[m, *shape]`` of each parameter of the block."""
        return self.block.from_basis(self.block.variances * self.b.unsqueeze(2) * self.a.unsqueeze(1))


class Directions:
    """Σg_j of m examples, held so that inner products with many gradients are cheap.

    Attributes:
        index: ``[m]`` numbers of the examples.
        dense: by parameter ``[m, *shape]``.
        rank_one: of the blocks that are held by their factors.
    """

    def __init__(self, index: Tensor, dense: Vectors, rank_one: Mapping[BlockParameters, RankOne] | None = None):
        self.index, self.dense, self.rank_one = index, dense, dict(rank_one or {})

    def __len__(self) -> int:
        return len(self.index)

    @property
    def entries(self) -> int:
        """How many numbers are held."""
        held = [*self.dense.values(), *(t for each in self.rank_one.values() for t in (each.a, each.b))]
        return sum(tensor.numel() for tensor in held)

    def hold_dense(self, block: BlockParameters) -> None:
        """Hold a block by parameter from now on."""
        self.dense.update(zip(block, self.rank_one.pop(block).moved(), strict=True))


class InnerProducts:
    """Makes directions of the gradients of one pass, and their inner products with those of another.

    Args:
        covariance: Σ.
    """

    def __init__(self, covariance: Covariance):
        self._covariance = covariance
        self._terms: dict[BlockParameters, Terms | None] = {}

    def directions(self, recorded: RecordedPass, index: Tensor, limit: int | None = None) -> Iterator[Directions]:
        """Σg of the examples of a pass, a chunk of them at a time.

        Args:
            recorded: the pass with the gradients of each example's own loss.
            index: numbers of its examples.
            limit: largest number of examples at a time.
        """
        calls_of = recorded.calls_of(recorded.weights)
        layers = dict(self._layers(calls_of))
        factored = {p for block in layers for p in block}
        rest = {p: calls for p, calls in calls_of.items() if p not in factored}
        for examples in _slices(len(index), sum(p.numel() for p in rest), limit):
            dense: Vectors = {}
            if rest:
                with as_recorded(recorded.trace):
                    gradients = dense_gradients(recorded, rest, examples)
                dense = self._covariance.multiply_only(gradients)
            rank_one = {block: rows for block, layer in layers.items() if (rows := _rank_one(layer.rows(examples)))}
            yield Directions(index[examples], dense, rank_one)

    def of(
        self, recorded: RecordedPass, directions: Directions
    ) -> Iterator[tuple[slice, list[tuple[BlockParameters, Tensor]]]]:
        """⟨g_i, Σg_j⟩, a chunk of the examples of a pass at a time: (which, ``[n, m]`` of each block or parameter)."""
        calls_of = recorded.calls_of(recorded.weights)
        layers = {block: layer for block, layer in self._layers(calls_of) if block in directions.rank_one}
        for block in list(directions.rank_one):
            if block not in layers and any(p in calls_of for p in block):
                directions.hold_dense(block)  # called twice here, or at several positions
        rest = {p: calls for p, calls in calls_of.items() if p in directions.dense}
        count = recorded.num_examples
        for examples in _slices(count, sum(p.numel() for p in rest), None):
            products: list[tuple[BlockParameters, Tensor]] = []
            for block, layer in layers.items():
                rows = _rank_one(layer.rows(examples))
                assert rows is not None
                products.append((block, rows.inner(directions.rank_one[block], self._terms[block])))
            if rest:
                with as_recorded(recorded.trace):
                    gradients = dense_gradients(recorded, rest, examples)
                products += [((p,), _rows(g) @ _rows(directions.dense[p]).mT.to(g.dtype)) for p, g in gradients.items()]
            yield examples, products

    def _layers(self, calls_of: Mapping[Tensor, Sequence[LayerCall]]) -> Iterator[tuple[BlockParameters, RotatedLayer]]:
        """The layers used once and at one position, of the blocks that are diagonal in coordinates of a layer."""
        for block, own in self._covariance.blocks:
            if any(p not in calls_of for p in block):
                continue
            layer = RotatedLayer.of(block, calls_of, self._covariance) or _of_entries(block, own, calls_of)
            if layer is None or _rank_one(layer.rows(slice(0, 1))) is None:
                continue
            if block not in self._terms:
                self._terms[block] = Terms.of(layer.block)
            yield block, layer


def joined(held: Sequence[Directions]) -> Directions:
    """The directions of several passes as one."""
    if len(held) == 1:
        return held[0]
    for block in {block for each in held for block in each.rank_one}:
        if not all(block in each.rank_one for each in held):
            for each in held:
                if block in each.rank_one:
                    each.hold_dense(block)
    parameters = dict.fromkeys(p for each in held for p in each.dense)
    index = torch.cat([each.index for each in held])
    dense = {
        p: torch.cat([each.dense[p] if p in each.dense else p.new_zeros(len(each), *p.shape) for each in held])
        for p in parameters
    }
    rank_one = {
        block: RankOne(
            torch.cat([each.rank_one[block].a for each in held]),
            torch.cat([each.rank_one[block].b for each in held]),
            rows.block,
        )
        for block, rows in held[0].rank_one.items()
    }
    return Directions(index, dense, rank_one)


def _eliminated(v: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """(p ``[R, O]``, q ``[R, I]``) with v = Σ_r p_r q_rᵀ to rounding; None where that takes more than `most` terms.

    By elimination with full pivoting (adaptive cross approximation), until no entry of what is left is above rounding.
    """
    dtype, v = v.dtype, widened(v)
    # Weighted by the mean precision of row and column, near which the squares b̃² and ã² lie: the terms cancel where
    # these are large, and an error there would be one of what is small.
    rows, columns = (v.reciprocal().mean(axis) for axis in (1, 0))
    left = rows.unsqueeze(1) * v * columns
    negligible = 4 * torch.finfo(dtype).eps * left.max()
    out: list[Tensor] = []
    inputs: list[Tensor] = []
    while len(out) < most:
        i, j = divmod(int(left.abs().argmax()), v.shape[1])
        if left[i, j].abs() <= negligible:
            return (torch.stack(out) / rows).to(dtype), (torch.stack(inputs) / columns).to(dtype)
        out.append(left[:, j] / left[i, j].abs().sqrt())
        inputs.append(left[i] / left[i, j].abs().sqrt() * left[i, j].sign())
        left = left - torch.outer(out[-1], inputs[-1])
    return None


def _of_entries(
    parameters: BlockParameters, block: Block, calls_of: Mapping[Tensor, Sequence[LayerCall]]
) -> RotatedLayer | None:
    """The layer of a matrix with independent entries, which are those of the identity's coordinates."""
    p, calls = parameters[0], calls_of[parameters[0]]
    if not block.is_elementwise or p.dim() < 2 or len(calls) > 1 or calls[0].rule is None:
        return None
    if form_of(calls[0], p, slice(0, 1)).kind != "matrix":
        return None
    return RotatedLayer(calls[0], parameters, KroneckerBlock(None, None, block.variances.flatten(1), block.shapes))


def _rank_one(rows: RotatedGradients | None) -> RankOne | None:
    """The gradients as b aᵀ; None where the layer acts at several positions."""
    if rows is None or rows.outer.a.shape[2] > 1:
        return None
    return RankOne(rows.outer.a.flatten(1), rows.outer.b.flatten(1), rows.block)


def _slices(count: int, entries: int, limit: int | None) -> Iterator[slice]:
    """Slices of the examples whose gradients are formed together."""
    step = max(1, FALLBACK_ENTRIES // entries) if entries else count
    return chunks(count, 1, max(1, min(step, limit or step)))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
