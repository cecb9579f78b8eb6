"""Going through the examples of a recorded pass, a few at a time where their gradients are formed.

`dense_gradients` forms them, `sums_of_squares` only sums their squares: where a layer acts at one position,
Σ_n G_n² = (b²)ᵀ(a²) is one matrix product and nothing of size N x P is formed.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from vlearn._wide import upcast
from vlearn.capture.layer_call import LayerCall
from vlearn.per_example.forms import FALLBACK_ENTRIES, chunks, entries_of, form_of
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded
from vlearn.per_example.vmap_fallback import per_example_gradients


def sums_of_squares(recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Tensor, Tensor]:
    """Σ_n G_n∘G_n of each wanted parameter, G_n the gradient of an example's own loss, summed over all calls.

    Args:
        recorded: the pass.
        wanted: the parameters.
    """
    dense: dict[Tensor, list[LayerCall]] = {}
    sums: dict[Tensor, Tensor] = {}
    for p, calls in recorded.calls_of(wanted).items():
        if any(call.rule is None for call in calls):
            dense[p] = calls
            continue
        for examples in chunks(recorded.num_examples, entries_of(tuple(calls), [p])):
            forms = [form_of(call, p, examples) for call in calls]
            # Gradients of several calls are summed before they are squared.
            squares = (
                forms[0].sum_of_squares()
                if len(forms) == 1
                else _squared(torch.stack([form.dense() for form in forms]).sum(0))
            )
            sums[p] = sums[p] + squares if p in sums else squares
    if dense:
        with as_recorded(recorded.trace), torch.no_grad():
            for examples in chunks(recorded.num_examples, sum(p.numel() for p in dense), FALLBACK_ENTRIES):
                for p, gradient in dense_gradients(recorded, dense, examples).items():
                    squares = _squared(gradient)
                    sums[p] = sums[p] + squares if p in sums else squares
    return sums if recorded.scale == 1 else {p: squares * recorded.scale**2 for p, squares in sums.items()}


def sums_of_products(recorded: RecordedPass, joint: list[Tensor], wanted: Container[Tensor]) -> Tensor:
    """Σ_n g_n g_nᵀ ``[P, P]``, g_n all gradients of one example's own loss as a vector.

    Args:
        recorded: the pass.
        joint: the parameters in the order of the rows.
        wanted: those of them that count; the others' gradients are taken to be zero.
    """
    calls_of = recorded.calls_of(wanted)
    count = sum(p.numel() for p in joint)
    total: Tensor | None = None
    with as_recorded(recorded.trace), torch.no_grad():
        for examples in chunks(recorded.num_examples, count, FALLBACK_ENTRIES):
            by_parameter = dense_gradients(recorded, calls_of, examples)
            size = examples.stop - examples.start
            columns = [
                upcast(by_parameter[p]).reshape(size, p.numel())
                if p in by_parameter
                else torch.zeros(size, p.numel(), device=p.device)
                for p in joint
            ]
            gradients = torch.cat([column.to(joint[0].device) for column in columns], 1)
            products = gradients.mT @ gradients
            total = products if total is None else total + products
    assert total is not None
    return total if recorded.scale == 1 else total * recorded.scale**2


def dense_gradients(
    recorded: RecordedPass, calls_of: dict[Tensor, list[LayerCall]], examples: slice
) -> dict[Tensor, Tensor]:
    """The gradients ``[n, *shape]`` of the given parameters and examples, on the scale of the recorded backward pass.

    To be called inside `vlearn.per_example.replay.as_recorded`.

    Args:
        recorded: the pass.
        calls_of: every call of each parameter.
        examples: which examples.
    """
    gradients: dict[Tensor, Tensor] = {}
    for call in dict.fromkeys(call for calls in calls_of.values() for call in calls):
        if call.rule is None:
            of_call = per_example_gradients(call, examples, recorded.weights, recorded.trace.tolerance)
        else:
            of_call = {p: form_of(call, p, examples).dense() for p in call.parameters if p in calls_of}
        for p, gradient in of_call.items():
            if p in calls_of:
                gradients[p] = gradients[p] + gradient if p in gradients else gradient
    return gradients


def _squared(gradients: Tensor) -> Tensor:
    return upcast(gradients).square().sum(0)
