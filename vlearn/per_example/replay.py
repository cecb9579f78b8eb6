"""Running a model again: in eval mode, or as in a recorded pass, with other weights, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from vlearn._torch_internals import without_onednn
from vlearn.capture.autograd_graph import outputs_inside
from vlearn.capture.hooks import hooked, hooks_paused
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import rows_of, tensor_leaves
from vlearn.capture.random_state import random_numbers_from
from vlearn.capture.trace import Trace
from vlearn.sharded.tensors import is_dtensor


def call_with(module: nn.Module, weights: Mapping[Tensor, Tensor], args: Any, kwargs: Any) -> Any:
    """Call a module with other values of its parameters and with copies of its buffers.

    Args:
        weights: value of each parameter that has another than its own.
    """
    state: dict[str, Tensor] = {}
    copies: dict[Tensor, Tensor] = {}
    # Tied parameters under each of their names, but a module that is there twice once: torch's own tying
    # (`tie_weights=True`) leaves such a module with the values it was called with.
    for prefix, owner in module.named_modules():
        lead = prefix + "." if prefix else ""
        for name, p in owner._parameters.items():
            if p is not None:
                state[lead + name] = weights[p] if p in weights else p.detach()
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                state[lead + name] = copies.setdefault(buffer, buffer.clone())
    return _called(module, state, args, kwargs, tie_weights=False)


def call_in_place(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a module with its own parameters and with copies of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return _called(module, buffers, args, kwargs)


def _called(module: nn.Module, state: dict[str, Tensor], args: Any, kwargs: Any, tie_weights: bool = True) -> Any:
    if isinstance(module, nn.DataParallel):  # which torch.func refuses, but not inside another module
        module, state = _Holder(module), {f"held.{name}": value for name, value in state.items()}
    return functional_call(module, state, args, kwargs, tie_weights=tie_weights)


class _Holder(nn.Module):
    def __init__(self, held: nn.Module):
        super().__init__()
        self.held = held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


@contextmanager
def placed(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Parameters hold other values inside, wherever the model has a reference to them; on any exit their own.

    Args:
        weights: by parameter, in its shape; of complex ones also as pairs of reals.
    Raises:
        RuntimeError: if a parameter is sharded, whose model would not see them.
    """
    if any(is_dtensor(p) for p in weights):
        raise RuntimeError(
            "the parameters are sharded over processes (fully_shard, tensor parallelism), which cannot hold whole "
            "weights: pass a model that is not sharded."
        )
    before = {p: p.data for p in weights}
    try:
        for p, value in weights.items():
            is_pair = p.is_complex() and not value.is_complex()
            p.data = (torch.view_as_complex(value) if is_pair else value).to(p.dtype)
        torch.clear_autocast_cache()
        yield
    finally:
        for p, data in before.items():
            p.data = data
        torch.clear_autocast_cache()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside, each of its modules as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def native_recurrence(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Recurrent layers run without cuDNN inside, where they have a backward pass in train mode alone, and no vmap."""
    before: list[bool] = []

    def enter(*_: Any) -> None:
        before.append(torch.backends.cudnn.enabled)
        torch.backends.cudnn.enabled = False

    def leave(*_: Any) -> None:
        torch.backends.cudnn.enabled = before.pop()

    layers = [module for module in modules if isinstance(module, nn.RNNBase)]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    # Before the hooks of a context around this one, which entered first.
    handles += [layer.register_forward_hook(leave, prepend=True, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_fastpath() -> Iterator[None]:
    """Transformer layers run in eval mode inside as they do where their gradients are taken.

    Torch's fast path nests the tensors of padded sequences, whose sizes cannot be read, and gives zeros for padding.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def as_recorded(trace: Trace) -> Iterator[None]:
    """Modules are in the modes of the recorded pass inside; afterwards all their attributes are as before."""
    before = [(module, dict(module.__dict__)) for module in trace.paths]
    device = next(iter(trace.tracked)).device.type if trace.tracked else "cpu"
    try:
        training = set(trace.in_train_mode)
        for module in trace.paths:
            if module.training != (module in training):
                module.training = module in training
        for module, held in trace.statistics.items():
            module._buffers = dict(module._buffers)
            held.put_into(module)
        with (
            hooks_paused(),
            native_recurrence(trace.paths),
            without_fastpath(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            yield
    finally:
        for module, attributes in before:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


@contextmanager
def same_random_numbers(trace: Trace) -> Iterator[None]:
    """Random numbers as in the recorded forward (dropout masks); the generators go on as if nothing was drawn."""
    with random_numbers_from(trace.random_state):
        yield


def rerun(
    trace: Trace,
    weights: Mapping[Tensor, Tensor],
    examples: slice | list[int] = slice(None),
    modules: Iterable[nn.Module] = (),
    enter: Callable[..., None] | None = None,
    leave: Callable[..., Any] | None = None,
    other_random_numbers: bool = False,
) -> list[Tensor]:
    """The output tensors of a recorded pass that is made once more; to be called inside `as_recorded`.

    Args:
        weights: the value of each parameter.
        examples: on which of the examples.
        modules, enter, leave: hooks that these modules have meanwhile, see `hooked`.
        other_random_numbers: draw others than the recorded pass did.
    """
    root = trace.root
    assert root is not None
    args, kwargs = trace.args, trace.kwargs
    if examples != slice(None):
        args, kwargs = rows_of((args, kwargs), trace.input_axes, examples)
    with same_random_numbers(trace), hooked(modules, enter, leave):
        for device in {p.device for p in trace.tracked} if other_random_numbers else ():
            torch.rand(1, device=device)
        return tensor_leaves(call_with(root, weights, args, kwargs))


def rerun_with(
    trace: Trace,
    weights: Mapping[Tensor, Tensor],
    calls: Iterable[LayerCall],
    change: Callable[[LayerCall, Any], Any],
    examples: slice = slice(None),
) -> list[Tensor]:
    """As `rerun`, where what each of these calls gives is changed as (call, output) -> output says."""
    calls_of: dict[tuple[nn.Module, int], list[LayerCall]] = {}
    for call in calls:  # of a module that is called again each has its number
        calls_of.setdefault((call.module, call.number), []).append(call)
    num_calls: dict[nn.Module, int] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        number = num_calls[module] = num_calls.get(module, -1) + 1
        for call in calls_of.get((module, number), ()):
            output = change(call, output)
        return output

    return rerun(trace, weights, examples, dict.fromkeys(module for module, _ in calls_of), leave=leave)


def gradients_of_replay(trace: Trace, weights: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The parameters' gradients from the recorded gradients of the outputs, in a pass that is made once more.

    The parameters themselves hold the weights, so that second references to them count too.
    """
    root = trace.root
    assert root is not None
    with as_recorded(trace), placed(weights), same_random_numbers(trace):
        outputs = tensor_leaves(call_in_place(root, trace.args, trace.kwargs))
        reached = zip(trace.positions, trace.cotangents, strict=True)
        pairs = [(outputs[at], c) for at, c in reached if c is not None and outputs[at].requires_grad]
        if trace.cotangents_are_total:
            pairs = direct_cotangents(pairs)
        parameters = [p for p in weights if p.requires_grad]
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            parameters,
            [cotangent.to(output.dtype) for output, cotangent in pairs],
            allow_unused=True,
        )
    return {p: gradient for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def direct_cotangents(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The outputs of a call with a loss's gradients with respect to them as separate values.

    To a value inside the graph comes what came through the outputs that are made of it, too:
    direct_i = total_i - Σ_j (dO_j/dO_i)ᵀ direct_j over those O_j.

    Args:
        pairs: outputs with their graph, and the gradient that came to each.
    """
    inside = outputs_inside([output for output, _ in pairs], set())
    direct: dict[int, Tensor] = {}

    def find(number: int) -> Tensor:
        if number not in direct:
            output, total = pairs[number]
            total = total.to(output.dtype)
            outer = [j for j in range(len(pairs)) if number in _all_inside(inside, j)]
            if outer:
                cotangents = [find(j) for j in outer]
                (through,) = torch.autograd.grad([pairs[j][0] for j in outer], output, cotangents, retain_graph=True)
                total = total - through
            direct[number] = total
        return direct[number]

    return [(output, find(number)) for number, (output, _) in enumerate(pairs)]


def _all_inside(inside: list[tuple[set[int], set[Tensor]]], number: int) -> set[int]:
    found: set[int] = set()
    waiting = list(inside[number][0])
    while waiting:
        inner = waiting.pop()
        if inner not in found:
            found.add(inner)
            waiting += inside[inner][0]
    return found


@contextmanager
def forward_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forward derivatives that agree with backward ones.

    Attention by its mathematics and recurrent layers without oneDNN, whose other kernels have no forward
    derivative; and none through what is computed under `torch.no_grad()` or through the padding row of an
    embedding, which forward mode would not stop at.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    onednn = without_onednn() if recurrent else nullcontext()
    with without_fastpath(), onednn, sdpa_kernel(SDPBackend.MATH), _BackwardsStops():
        yield


def tangents_in_reverse(outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """J v by backward passes, where an operation has no forward derivative.

    Two of them, J v = ∂/∂u ⟨Jᵀu, v⟩; where an operation cannot be differentiated twice, one for each output entry of
    an example.

    Args:
        outputs: ``[n, ...]`` with their graph.
        inputs: what J is taken with respect to, shared if n = 1, else ``[n, ...]`` one for each example.
        directions: v, in the shapes of the inputs.
    """
    reached = [output for output in outputs if output.requires_grad]
    if not reached:
        return [torch.zeros_like(output) for output in outputs]
    try:
        products = _pulled_twice(reached, inputs, directions)
    except RuntimeError:
        products = None
    if products is None:
        products = [_by_entry(output, inputs, directions) for output in reached]
    tangents = iter(products)
    return [next(tangents) if output.requires_grad else torch.zeros_like(output) for output in outputs]


def _pulled_twice(outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor]) -> list[Tensor] | None:
    probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
    pulled = torch.autograd.grad(outputs, inputs, probes, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(pulled, directions, strict=True) if g is not None]
    pulled_back = torch.autograd.grad(
        [g for g, _ in pairs], probes, [v for _, v in pairs], retain_graph=True, allow_unused=True
    )
    tangents = [torch.zeros_like(probe) if t is None else t for probe, t in zip(probes, pulled_back, strict=True)]
    # A backward written in Python may hide from autograd that it depends on its argument (once_differentiable
    # does), which only the other way round shows: ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ for any u.
    numbers = [torch.arange(t.numel(), device=t.device, dtype=t.dtype).cos().reshape(t.shape) for t in tangents]
    pulled = torch.autograd.grad(outputs, inputs, numbers, retain_graph=True, allow_unused=True)
    there = sum(_rows(t * u).sum(1) for t, u in zip(tangents, numbers, strict=True))
    count = len(outputs[0])
    back = sum((g * v).reshape(count, -1).sum(1) for g, v in zip(pulled, directions, strict=True) if g is not None)
    size = sum(_rows(t * u).abs().sum(1) for t, u in zip(tangents, numbers, strict=True))
    return tangents if bool(((there - back).abs() <= 1e-3 * (size + abs(back))).all()) else None  # pyright: ignore


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))


def _by_entry(output: Tensor, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    columns = []
    for column in _rows(output).unbind(1):
        pulled = torch.autograd.grad(column.sum(), inputs, retain_graph=True, allow_unused=True)
        products = [g * v for g, v in zip(pulled, directions, strict=True) if g is not None]
        columns.append(sum((p.reshape(len(column), -1).sum(1) for p in products), torch.zeros_like(column)))
    return torch.stack(columns, 1).reshape(output.shape).detach()


def _whatever_the_layout(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function gives; some forward derivatives of torch (group_norm's) want their tensors contiguous."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return func(*tree_map(_contiguous, args), **tree_map(_contiguous, kwargs))


def _contiguous(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


class _BackwardsStops(TorchFunctionMode):
    """Tangents end where gradients do: under `torch.no_grad()`, and in the padding row of an embedding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled():
            result = _whatever_the_layout(func, args, kwargs or {})
            padding = (kwargs or {}).get("padding_idx") if func is F.embedding else None
            if padding is None:
                return result
            indices, weight = args
            return torch.where((indices == padding % len(weight)).unsqueeze(-1), result.detach(), result)
        originals: dict[int, Tensor] = {}

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            detached = leaf.detach()
            originals[id(detached)] = leaf
            return detached

        plain_args, plain_kwargs = tree_map(plain, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        return originals.get(id(result), result)  # of an in-place operation: the same tensor, its tangent too
