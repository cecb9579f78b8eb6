"""The names of a model's modules and parameters, and how its forward takes what a loader yields.

One after the other, by name, or all in one argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, keyword


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's name in the model; the model itself is called by its class."""
    return {module: name or type(model).__name__ for name, module in model.named_modules()}


def named_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A model's named parameters, with the names that they have without DistributedDataParallel and torch.compile."""
    wrappers = [path for path, module in model.named_modules() if isinstance(module, DistributedDataParallel)]
    prefixes = [f"{path}." if path else "" for path in sorted(wrappers, key=len, reverse=True)]  # inner ones first
    named = []
    for name, p in model.named_parameters():
        for prefix in prefixes:
            if name.startswith(f"{prefix}module."):
                name = prefix + name.removeprefix(f"{prefix}module.")
        named.append((uncompiled_name(name), p))
    return named


def uncompiled_name(name: str) -> str:
    """A parameter's name as it is without torch.compile."""
    return name.replace("_orig_mod.", "")


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


def argument_of(model: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
    """What the model's forward gets under a name, of the arguments that the model is called with.

    Raises:
        ValueError: if it has no argument of that name, or is called without it.
    """
    signature = _signature(model)
    try:
        given = kwargs if signature is None else signature.bind(*args, **kwargs).arguments
        return given[name] if name in given else kwargs[name]
    except (KeyError, TypeError):
        raise ValueError(
            f"{type(model).__name__} is called without an argument {name!r}: name another one of its forward, or pass "
            "a callable of its arguments."
        ) from None


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
