"""How a model takes the inputs that a loader yields: one after the other, by name, or all in one argument."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, keyword


def model_arguments(model: nn.Module, x: Any) -> Arguments:
    """The arguments that a model is called with on inputs x.

    A tuple or a list gives positional arguments, a mapping keyword arguments; where the model's forward has no place
    for these but takes one argument, they are that one. Everything else is one argument.
    """
    if isinstance(x, Mapping):
        whole, spread = dict(x), ((), dict(x))
    elif isinstance(x, tuple | list):
        whole, spread = x, (tuple(x), {})
    else:
        return (x,), {}
    if not _takes(model, spread) and _takes(model, ((whole,), {})):
        return (whole,), {}
    return spread


def argument_names(model: nn.Module) -> set[str]:
    """The names that a model's forward gives its arguments."""
    signature = _signature(model)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return set() if signature is None else {p.name for p in signature.parameters.values() if p.kind not in kinds}


def _takes(model: nn.Module, arguments: Arguments) -> bool:
    signature = _signature(model)
    if signature is None:
        return True
    try:
        signature.bind(*arguments[0], **arguments[1])
    except TypeError:
        return False
    return True


def _signature(model: nn.Module) -> inspect.Signature | None:
    """That of a model's forward, None if it has none to be read; of a wrapper (DataParallel, AveragedModel, compiled
    code), which passes on whatever it is given, that of the model inside."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    inner = next((each for name in ("_orig_mod", "module") if (each := getattr(model, name, None)) is not None), None)
    kinds = {p.kind for p in signature.parameters.values()}
    if isinstance(inner, nn.Module) and kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return _signature(inner)
    return signature
