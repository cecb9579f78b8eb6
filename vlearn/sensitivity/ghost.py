"""Ghost products: gᵀΣg of every example, and J Σ g, without storing a gradient per example.

With G_n[p] the gradient of example n's own loss with respect to parameter p, summed over every use of p,
and Σ the posterior covariance (Nickl et al., 2023, arXiv:2310.19273, Eqs. 12 and 15):

    self-influence   Σ_p ⟨G_n[p], (ΣG_n)[p]⟩
    deviation        Δf_n = J_n Σ g_n: one forward-mode pass in which each use of p adds to its output tangent
                     what moving p by (ΣG_n)[p] does to its rows

Where a layer acts at one position (T = 1) and Σ is diagonal, both need one matrix product and nothing of
the size of G. Elsewhere G_n is formed for a few examples at a time, few enough to stay in cache. A Kronecker Σ
is diagonal in rotated coordinates, and the same products are taken there (`vlearn.sensitivity.rotated`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.examples import (
    CHUNK_ENTRIES,
    FALLBACK_ENTRIES,
    checked_uses,
    chunks,
    dense_gradients,
    entries_of,
    form_of,
)
from vlearn.capture.fallback import Weights, output_tangents
from vlearn.capture.replay import (
    as_recorded,
    call_with,
    forward_mode,
    same_random_numbers,
    tangents_in_reverse,
)
from vlearn.capture.separate import check_separate
from vlearn.capture.trace import Trace
from vlearn.capture.tree import tensor_leaves
from vlearn.capture.use import Use
from vlearn.posterior.blocks import DiagonalBlock, KroneckerBlock
from vlearn.posterior.covariance import Covariance
from vlearn.sensitivity.rotated import Rotated, rotated


@dataclass
class Moved:
    """Products with the posterior covariance, on the scale of the recorded backward pass.

    Attributes:
        self_influence: ``[N]`` g_nᵀΣg_n.
        tangents: for each use, what it adds to the tangents of its outputs; None if not asked for.
    """

    self_influence: Tensor
    tangents: dict[Use, list[Tensor]] | None

    def add(self, use: Use, output: int, examples: slice, tangent: Tensor) -> None:
        assert self.tangents is not None
        if use not in self.tangents:
            self.tangents[use] = [self.self_influence.new_zeros(shape) for shape in use.shapes]
        self.tangents[use][output][examples] += tangent

    def within(self, whole: Trace, part: Trace) -> Moved:
        """The products of a part (`part_of`) as rows among those of all examples, zero for the others."""
        assert self.tangents is not None

        def spread(rows: Tensor, total: tuple[int, ...]) -> Tensor:
            found = rows.new_zeros(total)
            found[part.examples] = rows
            return found

        tangents = {
            use: [spread(rows, shape) for rows, shape in zip(self.tangents[chosen], use.shapes, strict=True)]
            for use, chosen in zip(whole.uses, part.uses, strict=True)
            if chosen in self.tangents
        }
        return Moved(spread(self.self_influence, (whole.num_examples,)), tangents)


def moved(trace: Trace, covariance: Covariance, weights: Weights, deviation: bool) -> Moved:
    """Multiply every example's gradient by Σ.

    Args:
        trace: a recorded forward and backward pass.
        covariance: Σ of the parameters that move; the others stay.
        weights: the value of each parameter during the recorded pass.
        deviation: also form the tangents that `output_deviation` needs.
    """
    uses_of = checked_uses(trace, covariance, weights)
    result = Moved(covariance.zeros(trace.num_examples), {} if deviation else None)
    by_uses: dict[tuple[Use, ...], list[Tensor]] = {}
    rest: list[Tensor] = []
    for p, uses in uses_of.items():
        if all(use.rule is not None for use in uses) and isinstance(covariance.block_of(p)[1], DiagonalBlock):
            by_uses.setdefault(tuple(uses), []).append(p)
        else:
            rest.append(p)
    for uses, parameters in by_uses.items():
        _add_rows(result, uses, parameters, covariance)
    for parameters in _together(rest, uses_of, covariance):
        if not _add_rotated(result, parameters, uses_of, covariance):
            with as_recorded(trace):
                _add_dense(result, {p: uses_of[p] for p in parameters}, covariance, weights, trace.tolerance)
    check_separate(trace, weights)
    return result


def output_deviation(trace: Trace, moves: Moved, weights: Weights) -> list[Tensor]:
    """J_n Σ g_n of every example by one forward-mode pass, for each output tensor that required grad.

    The pass repeats the recorded forward: same inputs, weights, modes and random numbers. Buffers stay as they are.
    Where an operation has no forward derivative, two backward passes take its place.
    """
    root = trace.root
    assert moves.tangents is not None and root is not None
    trace.check_unchanged()
    # A module called again is told apart by the number of the call.
    uses_of: dict[tuple[nn.Module, int], list[Use]] = {}
    for use in moves.tangents:
        uses_of.setdefault((use.module, use.call), []).append(use)
    with as_recorded(trace):
        try:
            with forward_mode(root.modules()), forward_ad.dual_level():
                outputs = _replay(trace, weights, uses_of, moves.tangents, None)
                pairs = [forward_ad.unpack_dual(output) for output in outputs]
                return [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]
        except NotImplementedError:
            size = torch.zeros_like(moves.self_influence, requires_grad=True)
            outputs = _replay(trace, weights, uses_of, moves.tangents, size)
            return tangents_in_reverse(outputs, [size], [torch.ones_like(size)])


def _replay(
    trace: Trace,
    weights: Weights,
    uses_of: dict[tuple[nn.Module, int], list[Use]],
    tangents: dict[Use, list[Tensor]],
    size: Tensor | None,
) -> list[Tensor]:
    """Outputs of the recorded pass, each use's moved along its tangents: by `size` of them, or as dual numbers."""
    root = trace.root
    assert root is not None
    calls: dict[nn.Module, int] = {}
    dtype = next(iter(weights.values())).dtype

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        call = calls[module] = calls.get(module, -1) + 1
        for use in uses_of.get((module, call), ()):
            output = _moved_along(output, use.positions, tangents[use], size)
        return output

    handles = [module.register_forward_hook(move, prepend=True) for module in dict.fromkeys(m for m, _ in uses_of)]
    try:
        with same_random_numbers(trace), _known_outputs(trace, dtype) if size is None else nullcontext():
            leaves = tensor_leaves(call_with(root, weights, trace.args, trace.kwargs))
    finally:
        for handle in handles:
            handle.remove()
    outputs = [leaves[position] for position in trace.positions]
    trace.check_replayed(outputs)
    return outputs


@contextmanager
def _known_outputs(trace: Trace, dtype: torch.dtype) -> Iterator[None]:
    """Layers whose outputs were kept carry tangents alone, which is half of the forward-mode pass."""
    uses_of: dict[nn.Module, list[Use]] = {}
    for use in trace.uses:
        uses_of.setdefault(use.module, []).append(use)

    def is_known(use: Use) -> bool:
        output = use.intact_output if use.rule is not None and use.rule.linear is not None else None
        return output is not None and output.dtype == dtype

    known = {m: uses for m, uses in uses_of.items() if len(uses) == trace.calls[m] and all(map(is_known, uses))}
    called: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda m, args: called.append(m)) for module in known]
    try:
        for module, uses in known.items():
            module.forward = partial(_carry_tangent, trace, module, iter(uses), called)  # pyright: ignore
        yield
    finally:
        for module, handle in zip(known, handles, strict=True):
            handle.remove()
            module.__dict__.pop("forward", None)  # a layer with a rule has none of its own


def _carry_tangent(trace: Trace, module: nn.Module, uses: Iterator[Use], called: list[nn.Module], x: Tensor) -> Tensor:
    """Forward of a layer with a rule: the recorded output, and the linear image of the input's tangent."""
    if not called:  # by module.forward(x), which no hook has recorded
        return type(module).forward(module, x)
    called.pop()
    use = next(uses)
    assert use.rule is not None and use.rule.linear is not None and use.intact_output is not None
    primal, tangent = forward_ad.unpack_dual(x)
    trace.check_repeats(primal, use.input)
    if tangent is None:
        return use.intact_output
    return forward_ad.make_dual(use.intact_output, use.rule.linear(use.module, tangent))


def _add_rows(result: Moved, uses: tuple[Use, ...], parameters: list[Tensor], covariance: Covariance) -> None:
    """Parameters that share the same uses, all of them with rules, under a diagonal Σ."""
    for examples in chunks(result.self_influence.shape[0], entries_of(uses, parameters)):
        rows: dict[Use, Tensor] = {}
        for p in parameters:
            variance = covariance.block_of(p)[1].variances
            forms = [form_of(use, p, examples) for use in uses]
            # Gradients of tied uses are summed before they are squared.
            gradient = sum(form.dense() for form in forms) if len(forms) > 1 else None
            if gradient is not None:
                direction = gradient * variance
                result.self_influence[examples] += _row_sums(gradient * direction)
            if result.tangents is None:
                if gradient is None:
                    result.self_influence[examples] += forms[0].weighted_square(variance)
                continue
            for use, form in zip(uses, forms, strict=True):
                if gradient is None:
                    tangent = form.output_tangent(variance)
                    result.self_influence[examples] += (form.b * tangent).flatten(1).sum(1)
                else:
                    tangent = form.moved_rows(direction)
                rows[use] = rows[use] + tangent if use in rows else tangent
        for use, tangent in rows.items():
            _add_row_tangent(result, use, examples, tangent)


def _add_rotated(
    result: Moved, parameters: list[Tensor], uses_of: dict[Tensor, list[Use]], covariance: Covariance
) -> bool:
    """Parameters of one layer that is used once, under a Kronecker Σ; False if they are not, or G_n costs less."""
    columns, block = covariance.block_of(parameters[0])
    uses = {use for p in parameters for use in uses_of[p]}
    if not isinstance(block, KroneckerBlock) or len(uses) > 1 or len(parameters) < len(columns):
        return False
    (use,) = uses
    if use.rule is None:
        return False

    def rows_of(examples: slice) -> Rotated | None:
        return rotated([form_of(use, p, examples) for p in columns], block)

    first = rows_of(slice(0, 1))
    if first is None:
        return False
    for examples in chunks(result.self_influence.shape[0], first.entries):
        rows = rows_of(examples)
        assert rows is not None
        if result.tangents is None:
            result.self_influence[examples] += rows.self_influence()
        else:
            tangent = rows.tangent()
            result.self_influence[examples] += rows.self_influence(tangent)
            _add_row_tangent(result, use, examples, rows.back(tangent))
    return True


def _add_dense(
    result: Moved, uses_of: dict[Tensor, list[Use]], covariance: Covariance, weights: Weights, tolerance: float
) -> None:
    """Parameters whose gradients are formed: those of fallback modules, and those correlated with others."""
    uses = dict.fromkeys(use for found in uses_of.values() for use in found)
    entries = sum(p.numel() for p in uses_of)
    # One layer at a time stays in cache; a fallback module and a dense Σ want many examples at once.
    by_layer = all(isinstance(covariance.block_of(p)[1], KroneckerBlock) for p in uses_of)
    limit = CHUNK_ENTRIES if by_layer and all(use.rule is not None for use in uses) else FALLBACK_ENTRIES
    for examples in chunks(result.self_influence.shape[0], entries, limit):
        gradients = dense_gradients(uses_of, examples, weights, tolerance)
        directions = covariance.multiply(gradients)
        for p, gradient in gradients.items():
            result.self_influence[examples] += _row_sums(gradient * directions[p])
        if result.tangents is None:
            continue
        for use in uses:
            moving = {p: directions[p] for p in use.parameters if p in directions}
            if use.rule is not None:
                for p, direction in moving.items():
                    _add_row_tangent(result, use, examples, form_of(use, p, examples).moved_rows(direction))
            else:
                for output, tangent in enumerate(output_tangents(use, examples, weights, moving)):
                    result.add(use, output, examples, tangent)


def _together(parameters: list[Tensor], uses_of: dict[Tensor, list[Use]], covariance: Covariance) -> list[list[Tensor]]:
    """The parameters in groups that need one another: those of one block of Σ, those of one fallback module."""
    group_of: dict[Any, tuple[list[Tensor], list[Any]]] = {}  # by what links them: the parameters, and their links
    for p in parameters:
        links: list[Any] = [covariance.block_of(p)[1], *(use for use in uses_of[p] if use.rule is None)]
        members = [p]
        for others, their_links in {id(g): g for link in links if (g := group_of.get(link))}.values():
            members, links = others + members, list(dict.fromkeys(their_links + links))
        group_of.update(dict.fromkeys(links, (members, links)))
    return [members for members, _ in {id(group): group for group in group_of.values()}.values()]


def _add_row_tangent(result: Moved, use: Use, examples: slice, rows: Tensor) -> None:
    assert use.rule is not None
    shape = (rows.shape[0], *use.shapes[0][1:])
    if rows.shape[2] == 1:  # a bias moves every position alike
        rows = rows.expand_as(use.rule.rows(use.module, rows.new_empty(1).expand(shape)))
    result.add(use, 0, examples, use.rule.from_rows(use.module, rows, shape))


def _moved_along(output: Any, positions: list[int], tangents: list[Tensor], size: Tensor | None) -> Any:
    """The same output with the tensors at the given positions moved, see `_replay`."""
    leaves, structure = tree_flatten(output)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for position, extra in zip(positions, tangents, strict=True):
        leaf = leaves[where[position]]
        extra = extra.to(leaf.dtype)
        if size is not None:
            leaves[where[position]] = leaf + size.reshape(-1, *[1] * (extra.dim() - 1)) * extra
        else:
            if leaf.shape != extra.shape:  # of a call that all examples share
                leaf = leaf.expand(extra.shape).clone()
            primal, tangent = forward_ad.unpack_dual(leaf)
            leaves[where[position]] = forward_ad.make_dual(primal, extra if tangent is None else tangent + extra)
    return tree_unflatten(leaves, structure)


def _row_sums(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1).sum(1)
