"""A model with whole weights beside one that `fully_shard` has sharded: what replays and sweeps run on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from vlearn._torch_internals import let_go_of_gathered_weights, sharded_parameters, unsharded_class
from vlearn.sharded.tensors import is_dtensor, whole

# Whose hooks on modules are for the sharded model alone.
_HOOKS_OF = ("torch.distributed.fsdp", "vlearn.")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class WholeModel(NamedTuple):
    """A copy of a sharded model.

    Attributes:
        module_of: its module for each of the model's.
        parameter_of: its parameter for each of the model's.
    """

    module_of: dict[nn.Module, nn.Module]
    parameter_of: dict[Tensor, nn.Parameter]


def is_sharded_model(model: nn.Module) -> bool:
    """Whether any weights of a model are spread over processes."""
    return any(map(_is_sharded, model.modules())) or any(map(is_dtensor, model.parameters()))


def whole_model(model: nn.Module, values: Mapping[Tensor, Tensor] | None = None) -> WholeModel:
    """A copy with whole weights, which shares buffers and everything else with the model.

    All processes that have shards must ask for it. The copy takes the memory of the whole weights in each of them.

    Args:
        model: whose modules `fully_shard` has sharded.
        values: of some of its parameters, in the place of their own.
    Raises:
        RuntimeError: if tensor parallelism has sharded it, which computes on shards.
    """
    modules, by_fsdp = list(model.modules()), set[Tensor]()
    for module in filter(_is_sharded, modules):
        let_go_of_gathered_weights(module)
        by_fsdp.update(sharded_parameters(module, also_otherwise=False))
    if any(is_dtensor(p) and p not in by_fsdp for p in model.parameters()):
        raise RuntimeError(
            "tensor parallelism computes on parts of the weights, so examples have no gradients of their own here: "
            "sweep a model that is not parallelised, with a copy of optimizer.posterior(), see Gaussian.belong_to."
        )
    module_of = {module: _shell(module) for module in modules}
    parameter_of: dict[Tensor, nn.Parameter] = {}
    for module, copied in module_of.items():
        for name, p in module._parameters.items():
            if p is not None and p not in parameter_of:
                value = whole((values or {}).get(p, p.detach())).detach()
                parameter_of[p] = nn.Parameter(value, requires_grad=p.requires_grad)
            copied._parameters[name] = None if p is None else parameter_of[p]
        copied._modules.update({name: None if m is None else module_of[m] for name, m in module._modules.items()})
    return WholeModel(module_of, parameter_of)


def _is_sharded(module: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _shell(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, without the weights and the hooks that only the sharded one needs."""
    shell = object.__new__(unsharded_class(module))
    shell.__dict__.update(module.__dict__)
    for name in ("_parameters", "_modules", *_HOOKS):
        shell.__dict__[name] = type(module.__dict__[name])(module.__dict__[name])
    for name in _HOOKS:
        hooks = shell.__dict__[name]
        for number, hook in list(hooks.items()):
            if str(getattr(hook, "__module__", "")).startswith(_HOOKS_OF):
                del hooks[number]
    shell.__dict__["_compiled_call_impl"] = None
    return shell
