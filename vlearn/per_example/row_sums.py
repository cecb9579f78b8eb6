"""Whether the examples' gradients add up to the gradient of the pass, which they must: a check of everything at once.

They do not where the forward pass reaches a parameter by a second reference (a list, a closure), where a layer rule
computes something else than its layer, where a hook changes a gradient, and where the loss itself reads a parameter.
Of each gradient one number is compared, its product with a fixed direction (`vlearn.capture.pass_gradients`), once for
each kind of pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlearn._warnings import warn_user
from vlearn._wide import wide_dtype
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.pass_gradients import direction, product
from vlearn.capture.trace import Trace
from vlearn.per_example.forms import FALLBACK_ENTRIES, chunks, form_of
from vlearn.per_example.replay import as_recorded, gradients_of_replay
from vlearn.per_example.vmap_fallback import Weights, per_example_gradients

AGREE = 2e-3  # relative to the sum of the examples' sizes
AGREE_ON_ACCELERATOR = 1e-2  # TF32
ROUNDING = 1e3  # times eps, relative to the largest parameter: below it is noise, as of a bias before a LayerNorm


class _Sum(NamedTuple):
    total: float = 0.0  # Σ_n ⟨G_n, direction⟩
    size: float = 0.0  # Σ_n |⟨G_n, direction⟩|


def check_row_sums(trace: Trace, weights: Weights) -> None:
    """Raise RuntimeError if the examples' gradients are not those of the pass; warn if the loss reads a parameter.

    Args:
        trace: a recorded forward and backward pass.
        weights: the value of each tracked parameter during the pass.
    """
    root = trace.root
    assert root is not None
    checks = ModelChecks.of(root)
    if trace.kind in checks.row_sums:
        return
    products = trace.gradient_products()
    came = None if products is None else {p: float(value) for p, value in products.items()}
    rows = _row_sums(trace, weights, weights if came is None else came)
    differing = set(weights) if came is None else _differing(trace, rows, came)
    if differing:
        of_model = _sums_of_model(trace, weights)
        wrong = _differing(trace, rows, of_model) & differing
        if wrong:
            name, again = _name_of(root, wrong.pop()), ""
            if came is None:
                # The replay has the present weights, of which other optimizers may have moved those that are not
                # tracked: the next pass tells by its own gradients.
                checks.takes_gradients[trace.kind] = True
                again = " If another optimizer has stepped since the pass, ask again after the next pass."
            raise RuntimeError(
                f"the examples' gradients of {name} do not add up to the gradient of the pass, so they are not its "
                "parts: the model may reach the parameter by a second reference that is no attribute of its module (a "
                "list, a closure), a hook may change its gradient, or a layer rule may not fit its layer. Use the "
                f"parameter by its attribute, or leave it out of the posterior.{again}"
            )
        if came is not None and not _is_penalty(differing, rows, came, weights):
            names = ", ".join(sorted(_name_of(root, p) for p in differing))
            warn_user(
                f"the loss reads {names} itself, beside the model's output, and no example's row counts that part of "
                "its gradient. Right for a penalty on the weights; else compute the loss in the model's forward pass."
            )
    if came is None:
        checks.takes_gradients[trace.kind] = True  # whether the loss reads one, the next pass of this kind tells
    elif any(came.values()) and all(map(math.isfinite, came.values())):
        remember(checks.row_sums, trace.kind)


def came_by(trace: Trace, weights: Weights, output: int) -> bool:
    """Whether the examples' gradients add up to what the gradient of one output brings in a replay: all came by it."""
    alone = copy.copy(trace)
    alone.cotangents = [each if place == output else None for place, each in enumerate(trace.cotangents)]
    return not _differing(trace, _row_sums(trace, weights, weights), _sums_of_model(alone, weights))


def agreement(trace: Trace) -> float:
    """The relative difference that rounding may make between two sums of products with examples' gradients."""
    on_accelerator = any(p.device.type != "cpu" for p in trace.tracked)
    return max(AGREE_ON_ACCELERATOR if on_accelerator else AGREE, trace.tolerance if trace.is_narrow else 0.0)


def _row_sums(trace: Trace, weights: Weights, wanted: Container[Tensor]) -> dict[Tensor, _Sum]:
    sums: dict[Tensor, _Sum] = {}

    def add(p: Tensor, of_examples: Tensor) -> None:
        before, wide = sums.get(p, _Sum()), wide_dtype(of_examples.device)
        sums[p] = _Sum(
            before.total + float(of_examples.sum(dtype=wide)),
            before.size + float(of_examples.abs().sum(dtype=wide)),
        )

    with as_recorded(trace), torch.no_grad():
        for call in trace.layer_calls:
            if not (call.reached and any(p in wanted for p in call.parameters)):
                continue
            if call.rule is None:
                _add_fallback(trace, call, weights, add)
                continue
            for p in call.parameters:
                for examples in chunks(trace.num_examples, call.cotangent_entries):
                    form = form_of(call, p, examples)
                    moved = form.output_jvp(direction(p, form.b.dtype).unsqueeze(0))
                    add(p, (form.b * moved).flatten(1).sum(1))
    return sums


def _add_fallback(trace: Trace, call: LayerCall, weights: Weights, add: Callable[[Tensor, Tensor], None]) -> None:
    entries = sum(p.numel() for p in call.parameters)
    for examples in chunks(trace.num_examples, entries, FALLBACK_ENTRIES):
        for p, gradient in per_example_gradients(call, examples, weights, trace.tolerance).items():
            add(p, (gradient * direction(p, gradient.dtype)).reshape(len(gradient), -1).sum(1))


def _differing(trace: Trace, rows: dict[Tensor, _Sum], came: dict[Tensor, float]) -> set[Tensor]:
    """The parameters whose examples' gradients do not add up to what came."""
    agree = agreement(trace)
    largest = max((each.size for each in rows.values()), default=0.0)
    differing = set()
    for p in {**rows, **came}:
        row, value = rows.get(p, _Sum()), came.get(p, 0.0)
        if not math.isfinite(value + row.size):
            continue  # it is for the step to say so
        noise = ROUNDING * torch.finfo(p.dtype).eps * largest
        if not abs(row.total - value) <= agree * max(row.size, abs(value)) + noise:
            differing.add(p)
    return differing


def _sums_of_model(trace: Trace, weights: Weights) -> dict[Tensor, float]:
    """What the output's gradient brings to each parameter in a replay, by whatever way the model reaches it."""
    try:
        gradients = gradients_of_replay(trace, weights)
    except Exception as error:
        raise RuntimeError(
            "the examples' gradients do not add up to the gradient of the pass, and the pass cannot be repeated to "
            f"find out why ({type(error).__name__}: {error})."
        ) from error
    return {p: float(product(gradient)) for p, gradient in gradients.items()}


def _is_penalty(differing: set[Tensor], rows: dict[Tensor, _Sum], came: dict[Tensor, float], weights: Weights) -> bool:
    """Whether the rest is one multiple of the weights, or of their signs: an L2 or L1 penalty, of no example."""
    rest = torch.tensor([came.get(p, 0.0) - rows.get(p, _Sum()).total for p in differing], device="cpu")
    for of_weight in (lambda w: w, torch.sign):
        ratio = rest / torch.tensor([float(product(of_weight(weights[p]))) for p in differing], device="cpu")
        if len(ratio) > 1 and bool(((ratio - ratio[0]).abs() <= 1e-2 * ratio.abs()).all()):
            return True
    return False


def _name_of(root: nn.Module, p: Tensor) -> str:
    return next((repr(name) for name, q in root.named_parameters() if q is p), f"a parameter of shape {tuple(p.shape)}")
