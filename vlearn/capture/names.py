"""The names of a model's modules and parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


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
