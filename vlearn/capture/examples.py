"""Going through the examples of a recorded pass, a few at a time where their gradients are formed.

`dense_gradients` forms them, `sums_of_squares` only sums their squares: where a layer acts at one position,
Σ_n G_n² = (b²)ᵀ(a²) is one matrix product and nothing of size N x P is formed.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor

from vlearn.capture.fallback import Weights, per_example_gradients
from vlearn.capture.forms import Form
from vlearn.capture.layout import check_layout
from vlearn.capture.replay import as_recorded
from vlearn.capture.trace import Trace
from vlearn.capture.use import Use

CHUNK_ENTRIES = 2**20  # entries of G and of the rows worked on together, 4 MiB of float32: they stay in cache
FALLBACK_ENTRIES = 2**24  # entries of G of all fallback modules together, which one pass per chunk forms


def checked_uses(trace: Trace, wanted: Container[Tensor], weights: Weights) -> dict[Tensor, list[Use]]:
    """The uses, which the backward pass reached, of each wanted parameter.

    Raises:
        RuntimeError: if a use does not have the examples along dimension 0, or its input was written since.
    """
    check_layout(trace, weights)
    uses_of = {p: uses for p, uses in trace.uses_of().items() if p in wanted}
    for use in dict.fromkeys(use for uses in uses_of.values() for use in uses):
        use.check_unchanged()
    return uses_of


def sums_of_squares(trace: Trace, wanted: Container[Tensor], weights: Weights) -> dict[Tensor, Tensor]:
    """Σ_n G_n∘G_n of each parameter, G_n summed over the parameter's uses, on the scale of the recorded pass.

    Args:
        trace: a recorded forward and backward pass.
        wanted: the parameters.
        weights: the value of each parameter during the pass.
    """
    total = trace.num_examples
    dense: dict[Tensor, list[Use]] = {}
    sums: dict[Tensor, Tensor] = {}
    for p, uses in checked_uses(trace, wanted, weights).items():
        if any(use.rule is None for use in uses):
            dense[p] = uses
            continue
        for examples in chunks(total, entries_of(tuple(uses), [p])):
            forms = [form_of(use, p, examples) for use in uses]
            # Gradients of several uses are summed before they are squared.
            found = (
                forms[0].sum_of_squares()
                if len(forms) == 1
                else _squared(torch.stack([f.dense() for f in forms]).sum(0))
            )
            sums[p] = sums[p] + found if p in sums else found
    if dense:
        with as_recorded(trace), torch.no_grad():
            for examples in chunks(total, sum(p.numel() for p in dense), FALLBACK_ENTRIES):
                for p, gradient in dense_gradients(dense, examples, weights, trace.tolerance).items():
                    found = _squared(gradient)
                    sums[p] = sums[p] + found if p in sums else found
    return sums


def sums_of_products(trace: Trace, joint: list[Tensor], wanted: Container[Tensor], weights: Weights) -> Tensor:
    """Σ_n g_n g_nᵀ ``[P, P]``, g_n all gradients of one example as a vector, on the scale of the recorded pass.

    Args:
        trace: a recorded forward and backward pass.
        joint: the parameters in the order of the rows.
        wanted: those of them that count; the others' gradients are taken to be zero.
        weights: the value of each parameter during the pass.
    """
    uses_of = checked_uses(trace, wanted, weights)
    count = sum(p.numel() for p in joint)
    total: Tensor | None = None
    with as_recorded(trace), torch.no_grad():
        for examples in chunks(trace.num_examples, count, FALLBACK_ENTRIES):
            found = dense_gradients(uses_of, examples, weights, trace.tolerance)
            size = examples.stop - examples.start
            columns = [
                _wide(found[p]).reshape(size, -1) if p in found else torch.zeros(size, p.numel(), device=p.device)
                for p in joint
            ]
            gradients = torch.cat([column.to(joint[0].device) for column in columns], 1)
            products = gradients.mT @ gradients
            total = products if total is None else total + products
    assert total is not None
    return total


def dense_gradients(
    uses_of: dict[Tensor, list[Use]], examples: slice, weights: Weights, tolerance: float
) -> dict[Tensor, Tensor]:
    """The gradients ``[n, *shape]`` of the given parameters and examples, to be called inside `as_recorded`.

    Args:
        uses_of: every use of each parameter.
        examples: which examples.
        weights: the value of each parameter during the pass.
        tolerance: see `per_example_gradients`.
    """
    gradients: dict[Tensor, Tensor] = {}
    for use in dict.fromkeys(use for uses in uses_of.values() for use in uses):
        if use.rule is None:
            found = per_example_gradients(use, examples, weights, tolerance)
        else:
            found = {p: form_of(use, p, examples).dense() for p in use.parameters if p in uses_of}
        for p, gradient in found.items():
            if p in uses_of:
                gradients[p] = gradients[p] + gradient if p in gradients else gradient
    return gradients


def form_of(use: Use, p: Tensor, examples: slice) -> Form:
    """The gradient of one parameter from one use."""
    assert use.rule is not None and use.cotangents[0] is not None
    return use.rule.form(use.module, p, _wide(use.input[examples]), _wide(use.cotangents[0][examples]))


def gradient_rows(use: Use, examples: slice) -> Tensor:
    """The gradient of the output rows ``[n, G, T, O]``, without what a form needs of the input."""
    assert use.rule is not None and use.cotangents[0] is not None
    return use.rule.rows(use.module, _wide(use.cotangents[0][examples]))


def chunks(total: int, entries: int, limit: int = CHUNK_ENTRIES) -> Iterator[slice]:
    """Slices of at most `limit` entries, given the entries that one example needs."""
    step = max(1, limit // entries) if entries else max(1, total)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def entries_of(uses: tuple[Use, ...], parameters: list[Tensor]) -> int:
    """Entries per example that a chunk holds; 0 where no gradient is formed and all examples go at once."""
    if len(uses) == 1 and len(uses[0].shapes[0]) == 2:  # one row per example
        return 0
    forms = [form_of(use, p, slice(0, 1)) for use in uses for p in parameters]
    formed = sum(p.numel() for p in parameters) if len(uses) > 1 else 0
    return sum(form.entries for form in forms) + formed


def _squared(gradients: Tensor) -> Tensor:
    return _wide(gradients).square().sum(0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
