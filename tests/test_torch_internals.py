"""What each private name of torch is trusted with holds on the torch that is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from vlearn import _torch_internals
from vlearn._torch_internals import (
    CONVENTIONS,
    added_factor,
    after_backward,
    arguments_of_call,
    begin_schedule,
    current_node,
    forward_pre_hooks,
    frame_of_call,
    fsdp_groups,
    global_offset,
    graph_task_id,
    has_compiled,
    in_functorch_transform,
    is_flattened,
    is_sharded,
    let_go_of_gathered_weights,
    lets_processes_stop_early,
    next_sequence_number,
    roots_of_backward_passes,
    saved_axis,
    saved_order,
    sequence_number,
    set_versions,
    sharded_parameters,
    unsharded_class,
    view_base,
    without_onednn,
)


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def leaf() -> Tensor:
    return torch.ones(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for owner, names in CONVENTIONS.items() for name in names],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_a_conventional_name_exists(owner, name):
    made = {nn.Module: nn.Module, nn.Conv1d: lambda: nn.Conv1d(1, 1, 1)}  # names that only an instance has
    assert hasattr(made.get(owner, lambda: owner)(), name)


def test_a_schedule_begins_anew():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
    optimizer.param_groups[0]["lr"], scheduler.last_epoch = 0.3, -1
    begin_schedule(scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.15 and scheduler.last_epoch == 0


def test_every_function_is_tested():
    functions = {
        name
        for name, value in vars(_torch_internals).items()
        if getattr(value, "__module__", None) == _torch_internals.__name__ and not isinstance(value, type)
    }
    assert functions <= vars(sys.modules[__name__]).keys()


def test_a_backward_pass_has_a_number_of_its_own_and_outside_there_is_none():
    x, seen = leaf(), []

    def inner(gradient: Tensor) -> None:
        seen.append(graph_task_id())
        y = leaf()
        y.register_hook(lambda g: seen.append(graph_task_id()))
        with torch.enable_grad():
            y.sum().backward()
        seen.append(graph_task_id())

    x.register_hook(inner)
    assert graph_task_id() == -1
    x.sum().backward()
    assert graph_task_id() == -1
    outer, nested, after = seen
    assert outer == after and len({-1, outer, nested}) == 3


def test_what_a_backward_pass_was_started_from_is_seen_from_within():
    x = leaf()
    y, seen = 2 * x, []
    loss, other, gradient = y.sum(), x.sum(), torch.full_like(y, 5.0)

    def look(_: Tensor) -> None:
        with ThreadPoolExecutor(1) as elsewhere:  # as where an accelerator's nodes run
            seen.extend((roots_of_backward_passes(), elsewhere.submit(roots_of_backward_passes).result()))

    y.register_hook(look)
    loss.backward(retain_graph=True)
    torch.autograd.grad([loss, other, y], [x], [None, None, gradient])
    assert roots_of_backward_passes() == []
    for passes in seen[:2]:
        (root, of_one), *_ = passes[0]
        assert root is loss and float(of_one) == 1
    for passes in seen[2:]:
        assert [root for root, _ in passes[0]] == [loss, other, y] and passes[0][2][1] is gradient


def test_nodes_are_numbered_in_the_order_in_which_they_are_made():
    x = leaf()
    older = x * 2
    number = next_sequence_number()
    assert next_sequence_number() == number
    newer = older + x
    assert sequence_number(older.grad_fn) < number == sequence_number(newer.grad_fn) < next_sequence_number()


@pytest.mark.parametrize("kind", ["before the node", "after the node", "on its output"])
def test_a_hook_finds_the_node_it_is_on(kind):
    x, seen = leaf(), []
    y = x.exp()
    node = y.grad_fn
    assert node is not None
    if kind == "before the node":
        node.register_prehook(lambda gradients: seen.append(current_node()))
    elif kind == "after the node":
        node.register_hook(lambda gradients, outputs: seen.append(current_node()))
    else:
        y.register_hook(lambda gradient: seen.append(current_node()))
    assert current_node() is None
    y.sum().backward()
    assert current_node() is None
    assert seen == [node]


def test_a_callback_comes_after_every_hook_and_after_earlier_callbacks_and_before_backward_returns():
    x, seen = leaf(), []
    y = x.exp()

    def ask(gradient: Tensor) -> None:
        after_backward(lambda: seen.append("first"))
        after_backward(lambda: seen.append("second"))

    y.register_hook(ask)
    y.register_hook(lambda gradient: seen.append("node"))
    x.register_hook(lambda gradient: seen.append("leaf"))
    x.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    y.sum().backward()
    assert seen == ["node", "leaf", "accumulated", "first", "second"]


def test_versions_are_set_one_for_each_tensor():
    first, second, third = torch.zeros(2), nn.Parameter(torch.zeros(3)), torch.zeros(1)
    with torch.no_grad():
        for _ in range(3):
            first.add_(1), second.add_(1), third.add_(1)
    set_versions({first: 1, second: 2})
    assert (first._version, second._version, third._version) == (1, 2, 3)
    set_versions({})


def test_autograd_takes_a_tensor_whose_version_is_set_back_as_not_written():
    x = leaf()
    y = (x * x).sum()
    with torch.no_grad():
        x.add_(1).sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(retain_graph=True)
    set_versions({x: 0})
    y.backward()


def test_a_reduction_tells_its_axis_and_a_product_has_none():
    x = leaf()
    axes = [saved_axis(y.grad_fn) for y in (x.mean(0), x.mean(1), x.softmax(0), x.softmax(1))]
    assert None not in axes and axes[0] != axes[1] and axes[2] != axes[3]
    assert saved_axis((x * x).grad_fn) is None


def test_an_index_tells_which_rows_it_has_taken():
    x, order = leaf(), torch.tensor([1, 0])
    for taken in (x[order], x.index_select(0, order), x[order, 0]):
        assert torch.equal(saved_order(taken.grad_fn), order)
    for other in (x.index_select(1, order), x[:, order], x[0], x * x):
        assert saved_order(other.grad_fn) is None


def test_a_sum_tells_the_factor_of_its_second_term():
    x = leaf()
    assert added_factor((x + x).grad_fn) == 1
    assert added_factor(torch.add(x, x, alpha=-3).grad_fn) == -3


def test_a_view_tells_what_it_is_a_view_of():
    x = torch.zeros(2, 3)
    assert view_base(x) is None and view_base(x + 1) is None
    assert view_base(x.T) is x and view_base(x.T[0]) is x


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "vjp"])
def test_a_transform_of_functions_is_seen(transform):
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(in_functorch_transform())
        return x.sum()

    x = torch.ones(2)
    assert not in_functorch_transform()
    if transform == "jvp":
        torch.func.jvp(f, (x,), (x,))
    elif transform == "vjp":
        torch.func.vjp(f, x)
    else:
        getattr(torch.func, transform)(f)(x)
    f(x)
    assert seen == [True, False]


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_is_off_inside_and_as_before_outside_and_keeps_its_other_settings(monkeypatch, enabled):
    def settings() -> tuple[bool, bool]:
        return torch._C._get_mkldnn_enabled(), bool(torch.backends.mkldnn.deterministic)

    monkeypatch.setattr(torch.backends.mkldnn, "deterministic", True)
    with nullcontext() if enabled else without_onednn():
        with pytest.raises(KeyError), without_onednn():
            assert settings() == (False, True)
            raise KeyError
        assert settings() == (enabled, True)


def test_the_hooks_before_a_forward_are_listed():
    module, first, second = nn.Linear(1, 1), (lambda *_: None), (lambda *_: None)
    assert forward_pre_hooks(module) == []
    module.register_forward_pre_hook(first)
    module.register_forward_pre_hook(second, with_kwargs=True)
    module.register_forward_hook(lambda *_: None)
    assert forward_pre_hooks(module) == [first, second]


class Asks(nn.Module):
    """Notes the frame of its call."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.frames = inner, []
        self.register_forward_pre_hook(lambda *_: self.frames.append(frame_of_call()))
        self.register_forward_hook(lambda *_: self.frames.append(frame_of_call()))

    def forward(self, x: Tensor) -> Tensor:
        self.frames.append(frame_of_call())
        return x if self.inner is None else self.inner(x)


def test_the_hooks_and_the_forward_of_one_call_run_in_one_frame_within_that_of_the_caller():
    inner = Asks()
    outer = Asks(inner)
    outer(torch.ones(1))
    outer(torch.ones(1))
    assert len(set(outer.frames[:3])) == len(set(inner.frames[:3])) == 1
    assert len({outer.frames[0], outer.frames[3], inner.frames[0], inner.frames[3]}) == 4
    for call in (0, 3):
        frame = inner.frames[call]
        while frame is not outer.frames[call]:
            assert frame.f_back is not None
            frame = frame.f_back


def test_a_hook_on_all_modules_can_see_keyword_arguments():
    seen = []
    module = nn.Bilinear(1, 1, 1)
    with register_module_forward_pre_hook(lambda module, args: seen.append(arguments_of_call(frame_of_call()))):
        module(leaf()[:, :1], input2=leaf()[:, :1])
    ((args, kwargs),) = seen
    assert len(args) == 1 and list(kwargs) == ["input2"]


def test_a_compilation_is_seen():
    from torch._dynamo.utils import counters

    counters.clear()
    assert not has_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert has_compiled()


def test_a_wrapper_whose_processes_may_stop_early_is_seen(group):
    wrapper = DistributedDataParallel(nn.Linear(1, 1))
    assert not lets_processes_stop_early(wrapper)
    with wrapper.join():
        assert lets_processes_stop_early(wrapper)
    assert lets_processes_stop_early(wrapper)  # torch goes on as if inside
    with wrapper.join(enable=False):
        assert not lets_processes_stop_early(wrapper)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("kind", ["tensor", "fully_shard", "original", "flat"])
def test_a_part_of_a_parameter_is_seen(group, kind):
    model: nn.Module = nn.Linear(2, 2)
    assert not any(map(is_sharded, model.parameters()))
    if kind == "tensor":
        model.weight = nn.Parameter(distribute_tensor(model.weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
        assert is_sharded(model.weight) and not is_sharded(model.bias)
        return
    if kind == "fully_shard":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=kind == "original", device_id=torch.device("cpu"))
    assert all(map(is_sharded, model.parameters()))
    assert all(is_flattened(p) is (kind != "fully_shard") for p in model.parameters())


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch 2.6
def test_the_part_of_a_parameter_has_a_place(group):
    weight = distribute_tensor(torch.zeros(3, 4), init_device_mesh("cpu", (1, 1)), [Shard(0), Shard(1)])
    assert tuple(global_offset(weight)) == (0, 0)  # in several processes: tests/distributed/test_sharded.py


@pytest.mark.skipif(torch.__version__ < "2.7", reason="fully_shard of torch 2.6 gathers on accelerators alone")
def test_a_module_of_fully_shard_shows_what_it_gathers(group):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model[0])
    assert unsharded_class(model[0]) is nn.Linear and unsharded_class(model[1]) is nn.Linear
    fully_shard(model)
    assert len(fsdp_groups(model)) == len(fsdp_groups(model[0])) == 1
    sharded = list(model[1].parameters())
    assert all(p is q for p, q in zip(sharded_parameters(model), sharded, strict=True))
    assert sharded_parameters(model, also_otherwise=False) == sharded_parameters(model)
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, 2))
    assert not any(map(is_sharded, model[1].parameters()))  # the outermost module keeps what it gathers
    assert all(p is q for p, q in zip(sharded_parameters(model), sharded, strict=True))
    let_go_of_gathered_weights(model)
    assert all(p is q for p, q in zip(model[1].parameters(), sharded, strict=True))
