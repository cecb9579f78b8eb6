"""Whether the examples of a batch see one another anywhere in the model, also outside the layers that are recorded.

`h - h.mean(0)` between two layers, attention over the batch, a batch sorted on the way: each layer's examples look
right, but the gradients that come back are sums over several examples. So for every sequence of calls that a model
makes, set of modules in train mode and structure of the graph, a few examples are run through it once, twice over:

    values      alone they must give what they give within the batch; not asked of a model that draws random numbers
    gradients   with c_n on the output of example n, what comes back must be c_n times what came with 1; powers of two,
                so that rounding makes no difference

What neither shows: examples that meet only in a model that draws random numbers, and without a gradient; and a model
that passed, and then comes to let them meet without a gradient and without another operation in its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.replay import as_recorded, call_with, same_random_numbers
from vlearn.capture.trace import Trace, is_close
from vlearn.capture.tree import rows_of, tensor_leaves
from vlearn.capture.use import Use

FEW = 4
VALUES_AGREE = 1e-2  # relative to the largest: an accelerator's TF32 rounds otherwise for another batch size
GRADIENTS_AGREE = 1e-4

_known: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()  # what was found right, by root


def check_separate(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Raise RuntimeError if an example's output depends on the other examples of the batch."""
    total, root = trace.num_examples, trace.root
    assert root is not None
    few = min(total - 1, FEW)
    calls = tuple((use.path, use.call) for use in trace.uses)
    key = (calls, few, trace.paths_in_train_mode, trace.graph_structure)
    if trace.examples is not None or few < 1 or key in _known.setdefault(root, set()):
        return
    with as_recorded(trace):
        met = _met_in_values(trace, weights, few) or _met_in_gradients(trace, weights, few)
    if met is not None:
        raise RuntimeError(
            f"{met} depends on the other examples of the batch, so no example has a gradient of its own: let the model "
            "treat dimension 0 as examples, in their order and without statistics over them (GroupNorm, LayerNorm or "
            "filter response normalisation instead of the batch's)."
        )
    _known[root].add(key)


def _met_in_values(trace: Trace, weights: dict[Tensor, Tensor], few: int) -> str | None:
    """What a module is given or gives that is not the same without the rest of the batch."""
    with torch.no_grad():
        try:
            part = _values(trace, weights, few, few)
        except Exception:  # a model that needs whole batches
            return None
        whole = _values(trace, weights, trace.num_examples, few)
        met = _first_difference(whole, part)
        if met is not None and _first_difference(part, _values(trace, weights, few, few, shift=True)) is not None:
            return None  # it draws random numbers, and others for a part
    return met


Values = list[tuple[str, list[Tensor | None]]]  # in order: what, and its rows of the few, None where it has none


def _values(trace: Trace, weights: dict[Tensor, Tensor], count: int, few: int, shift: bool = False) -> Values:
    seen: Values = []

    def rows(tree: Any) -> list[Tensor | None]:
        leaves = tensor_leaves(tree)
        return [x[:few].clone() if x.is_floating_point() and x.shape[:1] == (count,) else None for x in leaves]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((f"what goes into {trace.paths[module]} ({type(module).__name__})", rows((args, kwargs))))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((f"the output of {trace.paths[module]} ({type(module).__name__})", rows(output)))

    with same_random_numbers(trace):
        if shift:
            for device in {p.device for p in trace.tracked}:
                torch.rand(1, device=device)
        with _hooked(list(trace.paths), enter, leave):
            call_with(_root(trace), weights, *_first_examples(trace, count))
    return seen


def _first_difference(left: Values, right: Values) -> str | None:
    for (what, those), (_, these) in zip(left, right, strict=False):
        for a, b in zip(those, these, strict=False):
            if a is not None and b is not None and a.shape == b.shape and not is_close(a, b, VALUES_AGREE):
                return what
    return None


def _met_in_gradients(trace: Trace, weights: dict[Tensor, Tensor], few: int) -> str | None:
    """The last recorded output whose gradients are not those of single examples."""
    try:
        found = _gradients(trace, weights, few)
    except Exception:
        try:
            found = _gradients(trace, weights, trace.num_examples)
        except Exception:  # it cannot be repeated at all, which the deviation says
            return None
    for use, gradient, expected in reversed(found):
        if not is_close(gradient, expected, GRADIENTS_AGREE):
            name = f"{use.path} ({type(use.module).__name__})"
            return f"what the model makes of the output of {name}"
    return None


def _gradients(trace: Trace, weights: dict[Tensor, Tensor], count: int) -> list[tuple[Use, Tensor, Tensor]]:
    """For each use: gradients of outputs weighted by c_n, and c_n times those of outputs weighted by 1."""
    if count < 2:
        return []
    probes: list[tuple[Use, Tensor]] = []
    uses_of: dict[tuple[nn.Module, int], list[Use]] = {}
    for use in trace.uses:
        if use.reached and use.parameters and use.seen_by is None:
            uses_of.setdefault((use.module, use.call), []).append(use)
    calls: dict[nn.Module, int] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = calls[module] = calls.get(module, -1) + 1
        leaves, structure = tree_flatten(output)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for use in uses_of.get((module, call), ()):
            for position, shape in zip(use.positions, use.shapes, strict=True):
                leaf = leaves[where[position]]
                if shape[:1] == (trace.num_examples,) and leaf.shape[:1] == (count,):
                    probe = torch.zeros_like(leaf, requires_grad=True)
                    probes.append((use, probe))
                    leaves[where[position]] = leaf + probe
        return tree_unflatten(leaves, structure)

    with same_random_numbers(trace), _hooked(list(dict.fromkeys(m for m, _ in uses_of)), None, leave):
        outputs = tensor_leaves(call_with(_root(trace), weights, *_first_examples(trace, count)))
    ends = [
        outputs[position]
        for position, cotangent in zip(trace.positions, trace.cotangents, strict=True)
        if cotangent is not None and cotangent.shape[:1] == (trace.num_examples,) and outputs[position].requires_grad
    ]
    if not ends or not probes:
        return []
    plain = [torch.arange(1, e.numel() + 1, device=e.device, dtype=e.dtype).cos().reshape(e.shape) for e in ends]
    found = []
    for cotangents in (plain, [_by_example(tensor) for tensor in plain]):
        found.append(
            torch.autograd.grad(ends, [p for _, p in probes], cotangents, retain_graph=True, allow_unused=True)
        )
    return [
        (use, weighted, _by_example(once))
        for (use, _), once, weighted in zip(probes, *found, strict=True)
        if once is not None and weighted is not None
    ]


def _by_example(tensor: Tensor) -> Tensor:
    factors = 2.0 ** (torch.arange(len(tensor), device=tensor.device) % FEW)
    return tensor * factors.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))


def _first_examples(trace: Trace, count: int) -> tuple[Any, Any]:
    return rows_of((trace.args, trace.kwargs), trace.num_examples, slice(count))


def _root(trace: Trace) -> nn.Module:
    assert trace.root is not None
    return trace.root


@contextmanager
def _hooked(modules: list[nn.Module], enter: Callable[..., None] | None, leave: Callable[..., Any]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for module in modules:
            if enter is not None:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
