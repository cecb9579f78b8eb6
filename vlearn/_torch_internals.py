"""Every name that torch does not document as public, in one place, with what it is needed for.

`tests/test_torch_internals.py` holds each of these functions to what it promises, on every torch that is supported.
Names with an underscore that torch's own optimizers and layers are written in are used where they are needed; they
are listed in `CONVENTIONS` under the module or the class that has them, and the same test finds each of them.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

CONVENTIONS: dict[Any, tuple[str, ...]] = {
    torch: (
        *("_foreach_add", "_foreach_add_", "_foreach_addcdiv_", "_foreach_addcmul", "_foreach_addcmul_"),
        *("_foreach_clamp_max_", "_foreach_clamp_min", "_foreach_clamp_min_", "_foreach_copy_", "_foreach_div"),
        *("_foreach_div_", "_foreach_expm1_", "_foreach_lerp_", "_foreach_maximum_", "_foreach_mul", "_foreach_mul_"),
        *("_foreach_neg", "_foreach_norm"),
        *("_foreach_reciprocal_", "_foreach_rsqrt_", "_foreach_sqrt", "_foreach_sub", "_foreach_sub_"),
    ),
    Tensor: ("_version",),
    nn.Module: ("_parameters", "_buffers", "_modules"),
    nn.Conv1d: ("_conv_forward", "_reversed_padding_repeated_twice"),
    nn.modules.batchnorm: ("_BatchNorm",),
    torch.utils: ("_pytree",),
}

_VERSIONS_AT_ONCE = torch.__version__ >= "2.7"  # compared as versions, not as text
_MODULE_GLOBALS = vars(nn.modules.module)


def graph_task_id() -> int:
    """The number of the backward pass that runs on this thread, -1 outside any."""
    return torch._C._current_graph_task_id()


def current_node() -> Any:
    """The node of the autograd graph whose backward hooks run now; None outside a backward pass."""
    return torch._C._current_autograd_node()  # pyright: ignore


def roots_of_backward_passes() -> list[list[tuple[Any, Tensor | None]]]:
    """What each backward pass that runs now was started from: tensors, or edges, each with its given gradient.

    Passes that were started from elsewhere than Python are not seen.
    """
    started = getattr(torch.autograd.graph, "_engine_run_backward", None)
    found: list[list[tuple[Any, Tensor | None]]] = []
    # An accelerator's nodes run on threads of their own.
    for innermost in (sys._getframe(), *sys._current_frames().values()):
        frame: FrameType | None = innermost
        while frame is not None:
            if started is not None and frame.f_code is started.__code__:
                found.append(list(zip(frame.f_locals["t_outputs"], frame.f_locals["args"][0], strict=True)))
            frame = frame.f_back
    return found


def next_sequence_number() -> int:
    """The number that the next node of the autograd graph gets which this thread makes; they rise by one."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore


def sequence_number(node: Any) -> int:
    """The number of a node of the autograd graph, among those of the thread that made it."""
    return node._sequence_nr()


def after_backward(callback: Callable[[], None]) -> None:
    """Call back once the backward pass that runs now has ended, after what has been asked for before."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore


def set_versions(versions: Mapping[Tensor, int]) -> None:
    """Set how often tensors count as written in place."""
    setter = torch._C._autograd._unsafe_set_version_counter  # pyright: ignore
    if _VERSIONS_AT_ONCE:
        setter(tuple(versions), tuple(versions.values()))
    else:
        for tensor, version in versions.items():
            setter(tensor, version)


def saved_axis(node: Any) -> str | None:
    """The axes along which the operation of a graph's node works, if the node keeps them."""
    return str(node._saved_dim) if hasattr(node, "_saved_dim") else None


def saved_order(node: Any) -> Tensor | None:
    """Which rows along the first axis the operation of a graph's node has taken, if it indexes."""
    kind = type(node).__name__
    if kind == "IndexSelectBackward0":
        return node._saved_index if node._saved_dim == 0 else None
    return node._saved_indices[0] if kind == "IndexBackward0" else None


def added_factor(node: Any) -> Any:
    """The factor α of a node AddBackward0, of a + α b."""
    return node._saved_alpha


def view_base(tensor: Tensor) -> Tensor | None:
    """The tensor that a view is a view of, None where it is none."""
    return tensor._base


def in_functorch_transform() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) is at work on this thread."""
    return torch._C._are_functorch_transforms_active()


@contextmanager
def without_onednn() -> Iterator[None]:
    """Inside, no operation uses oneDNN; torch.backends.mkldnn.flags would reset its precision settings too."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def begin_schedule(scheduler: LRScheduler) -> None:
    """Set the first learning rates of a schedule, as its constructor does; a SequentialLR begins its first part."""
    scheduler.last_epoch = -1
    if not isinstance(scheduler, SequentialLR):
        scheduler._initial_step()
        return
    scheduler.last_epoch = 0
    for each in scheduler._schedulers:
        each.optimizer, each.last_epoch = scheduler.optimizer, -1
    begin_schedule(scheduler._schedulers[bisect_right(scheduler._milestones, 0)])


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before a module's forward."""
    return list(module._forward_pre_hooks.values())


def frame_of_call() -> FrameType:
    """The frame of torch that runs the hooks of a module and its forward, from within a hook."""
    frame = sys._getframe(1)
    while frame.f_globals is not _MODULE_GLOBALS:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


def arguments_of_call(frame: FrameType) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call that `frame_of_call` gave the frame of; hooks on all modules do not get keywords."""
    return frame.f_locals["args"], frame.f_locals["kwargs"]


def has_compiled() -> bool:
    """Whether torch.compile has been at work in this process."""
    from torch._dynamo.utils import counters

    return bool(counters["stats"])


def lets_processes_stop_early(wrapper: DistributedDataParallel) -> bool:
    """Whether a wrapper is inside its `join()`, or has been: torch goes on as if inside until `join(enable=False)`."""
    return wrapper._join_config.enable


def is_flattened(p: Tensor) -> bool:
    """Whether a parameter is part of one that the first FSDP has flattened."""
    return getattr(p, "_fsdp_flattened", False)


def is_sharded(p: Tensor) -> bool:
    """Whether this process has only a part of a parameter: a DTensor, or one that the first FSDP has flattened."""
    return getattr(p, "device_mesh", None) is not None or is_flattened(p)


def sharded_parameters(module: Any, also_otherwise: bool = True) -> list[Tensor]:
    """The parameters that a module of `fully_shard` has shards of, also while its submodules have the whole ones.

    Args:
        also_otherwise: those too that were sharded before, by tensor parallelism.
    """
    parameters = (each for group in fsdp_groups(module) for each in group.fsdp_params)
    return [each.sharded_param for each in parameters if also_otherwise or not each.is_dtensor]


def unsharded_class(module: nn.Module) -> type:
    """The class that a module had before `fully_shard` gave it another."""
    mro = type(module).__mro__
    index = getattr(type(module), "_orig_cls_mro_index", 2)
    return mro[index] if any(each.__name__ == "FSDPModule" for each in mro) else mro[0]


def fsdp_groups(module: Any) -> list[Any]:
    """What a module of `fully_shard` gathers together: one group of parameters, or none, or several."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # one at most in earlier versions
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return groups


def let_go_of_gathered_weights(module: Any) -> None:
    """Free the whole weights that a module of `fully_shard` keeps, whose shards have changed.

    Its `reshard()` keeps them in a forward pass that has begun, where they are gathered again here.
    """
    for group in fsdp_groups(module):
        if group.is_sharded and group._all_gather_result is None:
            continue
        group.wait_for_unshard()
        group._to_sharded()
        if group._training_state.name == "FORWARD":
            group.unshard()
            group.wait_for_unshard()


def global_offset(p: Tensor) -> tuple[int, ...]:
    """Where the part of a distributed tensor that this process has begins, on each axis of the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1]  # pyright: ignore
