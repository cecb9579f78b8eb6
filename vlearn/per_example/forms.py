"""The gradients of the calls of layers with rules, as forms, and going through a batch a few examples at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vlearn._wide import upcast
from vlearn.capture.layer_call import LayerCall
from vlearn.layers.example_rows import ChosenRows
from vlearn.layers.gradient_forms import Form

CHUNK_ENTRIES = 2**20  # entries of G and of the rows worked on together, 4 MiB of float32: they stay in cache
FALLBACK_ENTRIES = 2**24  # entries of G of all fallback modules together, which one pass per chunk forms


def form_of(call: LayerCall, p: Tensor, examples: slice) -> Form:
    """The gradient of one parameter from one use."""
    assert call.rule is not None and call.cotangents[0] is not None
    chosen, rows = _rows_of(call, examples)
    form = call.rule.form(call.module, p, upcast(call.input[rows]), upcast(call.cotangents[0][rows]))
    return form if chosen is None else chosen.by_example(form)


def gradient_rows(call: LayerCall, examples: slice) -> Tensor:
    """The gradient of the output rows ``[n, G, T, O]``, without what a form needs of the input."""
    assert call.rule is not None and call.cotangents[0] is not None
    chosen, rows = _rows_of(call, examples)
    gradient = call.rule.rows(call.module, upcast(call.cotangents[0][rows]))
    return gradient if chosen is None else chosen.together(gradient)


def _rows_of(call: LayerCall, examples: slice) -> tuple[ChosenRows | None, slice | Tensor]:
    """(The rows of the examples, if they have several each; which rows to give to the rule)."""
    if call.rows is None:
        return None, examples
    chosen = call.rows.of(examples)
    return chosen, chosen.rows if len(chosen.rows) else chosen.rows.new_zeros(1)  # not every rule takes none at all


def chunks(total: int, entries: int, limit: int = CHUNK_ENTRIES) -> Iterator[slice]:
    """Slices of at most `limit` entries, given the entries that one example needs."""
    step = max(1, limit // entries) if entries else max(1, total)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def entries_of(calls: tuple[LayerCall, ...], parameters: list[Tensor]) -> int:
    """Entries per example that a chunk holds; 0 where no gradient is formed and all examples go at once."""
    if len(calls) == 1 and len(calls[0].shapes[0]) == 2 and calls[0].rows is None:  # one row per example
        return 0
    forms = [form_of(call, p, slice(0, 1)) for call in calls for p in parameters]
    formed = sum(p.numel() for p in parameters) if len(calls) > 1 else 0
    return sum(form.entries for form in forms) + formed
