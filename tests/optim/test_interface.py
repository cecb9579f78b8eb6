"""What torch's own tests ask of every optimizer in torch.optim, and hooks, copies and printing."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optim.table import (
    LOOPS,
    Entry,
    data,
    equal,
    family,
    loss_of,
    made,
    needs_gradients_alone,
    network,
    plain,
    states,
    weights,
)

loops = pytest.mark.parametrize("loop", LOOPS)


@family
def test_parameters_may_come_in_every_form_torch_takes(entry: Entry) -> None:
    needs_gradients_alone(entry)
    x, y = data()
    forms = (
        lambda m: list(m.parameters()),
        lambda m: (p for p in m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: [{"params": list(m.named_parameters()), "lr": 0.1}],
        lambda m: [{"params": p, "note": "kept"} for p in m.parameters()],
        lambda m: m,
    )
    results = []
    for form in forms:
        model = network()
        optimizer = entry.make(form(model))
        if optimizer._watch is None:
            optimizer.watch(model)
        generator = torch.Generator().manual_seed(1)
        with optimizer.sampled_params(train=True), torch.no_grad():
            for p, mean in zip(model.parameters(), network().parameters(), strict=True):
                p.copy_(mean + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        results.append(weights(model))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    optimizer = entry.make([{"params": network().parameters(), "note": "kept"}])
    assert optimizer.state_dict()["param_groups"][0]["note"] == "kept"


@family
def test_parameters_are_refused_as_torch_refuses_them(entry: Entry) -> None:
    p, q = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))
    for params, error, message in (
        (p, TypeError, "should be an iterable of Tensors or dicts"),
        ([], ValueError, "empty parameter list"),
        (["p"], TypeError, "can only optimize Tensors"),
        ([2 * p], ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": p}, {"params": p}], ValueError, "some parameters appear in more than one parameter group"),
        ([{"params": {p, q}}], TypeError, "use a list instead"),
        ([("p", p), q], ValueError, "with/without names"),
        ([{"params": [p]}, {"params": [("q", q)]}], ValueError, "with/without names"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            entry.make(params)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        entry.make([p, p])
    optimizer = entry.make([p])
    for group, error in (([q], TypeError), ({"params": [2 * q]}, ValueError), ({"params": [p]}, ValueError)):
        with pytest.raises(error):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@family
def test_unknown_arguments_are_type_errors(entry: Entry) -> None:
    names = ("maximize", "capturable", "differentiable", "fused", "amsgrad")
    for name in names if entry.name != "IVON" else (names[0], *names[2:]):  # which has a capturable step
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            entry.make(network(), **{name: True})


@family
def test_it_prints_its_groups(entry: Entry) -> None:
    optimizer = entry.make([{"params": network()[0].parameters(), "lr": 0.3}, {"params": network()[2].parameters()}])
    printed = repr(optimizer)
    assert printed.startswith(f"{entry.name} (\nParameter Group 0\n")
    assert "lr: 0.3" in printed and "Parameter Group 1" in printed


@family
@loops
def test_steps_reduce_the_loss_of_contiguous_and_strided_parameters(entry: Entry, loop: str) -> None:
    class Affine(nn.Module):
        def __init__(self, strided: bool) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)[..., 0]
            self.weight = nn.Parameter(weight if strided else weight.contiguous())
            self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * F.linear(x, self.weight, self.bias) + self.empty.sum()

    x, y = data()
    results = []
    for strided in (True, False):
        model = Affine(strided)
        optimizer = made(entry, loop, model)
        with torch.no_grad():
            before = loss_of(model, x, y)
        torch.manual_seed(2)
        for _ in range(30):
            LOOPS[loop](optimizer, model, x, y)
        with torch.no_grad():
            assert loss_of(model, x, y) < 0.8 * before
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@family
def test_deep_copies_have_every_public_attribute(entry: Entry) -> None:
    optimizer = entry.make(network().parameters())

    def public(o: Any) -> set[str]:
        return {name for name in vars(o) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


@family
@loops
def test_step_runs_without_grad_mode_closures_with_it_and_both_are_put_back(entry: Entry, loop: str) -> None:
    x, y = data()
    for enabled in (True, False):
        model = network()
        optimizer = made(entry, loop, model)
        for _ in range(2):  # which may run a few examples alone, see `check_independent`
            LOOPS[loop](optimizer, model, x, y)
        seen = []
        handle = model[1].register_forward_hook(lambda *args, seen=seen: seen.append(torch.is_grad_enabled()))
        with torch.set_grad_enabled(enabled or loop != "closure"):  # step(closure) enables it by itself
            LOOPS[loop](optimizer, model, x, y)
            assert torch.is_grad_enabled() == (enabled or loop != "closure")
        handle.remove()
        assert seen == [True]
        assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in model.parameters())
        assert not any(tensor.requires_grad for tensor in states(optimizer))


@family
@loops
def test_step_hooks_of_one_optimizer_and_of_all_run_in_torchs_order(entry: Entry, loop: str) -> None:
    model, (x, y) = network(), data()
    mean = weights(model)
    optimizer = made(entry, loop, model)
    seen: list[str] = []

    def after(o: Any, args: Any, kwargs: Any) -> None:
        assert o is optimizer and not equal(weights(model), mean)
        seen.append("after")

    handles = [
        register_optimizer_step_pre_hook(lambda *args: seen.append("before all")),
        register_optimizer_step_post_hook(lambda *args: seen.append("after all")),
        optimizer.register_step_pre_hook(lambda *args: seen.append("before")),
        optimizer.register_step_post_hook(after),
    ]
    try:
        LOOPS[loop](optimizer, model, x, y)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before all", "before", "after", "after all"]
    LOOPS[loop](optimizer, model, x, y)
    assert len(seen) == 4


@family
def test_a_step_pre_hook_may_change_the_closure(entry: Entry) -> None:
    model = network()
    optimizer = made(entry, "closure", model)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: calls.append(1)), {}))
    optimizer.step(lambda: calls.append(2))
    assert calls == [1]


@family
def test_a_step_pre_hook_may_clip_gradients(entry: Entry) -> None:
    x, y = data()
    results = []
    for by_hook in (True, False):
        model = network()
        optimizer = entry.make(model)

        def clip(*args: Any, model: nn.Module = model) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)

        if by_hook:
            optimizer.register_step_pre_hook(clip)
        torch.manual_seed(1)
        loss_of(model, x, y).backward()
        if not by_hook:
            clip()
        optimizer.step()
        results.append(weights(model))
    assert equal(*results)


@family
def test_the_profiler_sees_steps_by_the_optimizers_name(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    copied_model, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (copied_model, copied)):
        with torch.autograd.profiler.profile() as profile:
            plain(o, m, x, y)
        names = {event.name for event in profile.function_events or ()}
        assert {f"Optimizer.step#{entry.name}.step", f"Optimizer.zero_grad#{entry.name}.zero_grad"} <= names


@family
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_may_set_to_none_or_zero(entry: Entry, set_to_none: bool) -> None:
    x, y = data()
    results = []
    for clear in (set_to_none, True):
        model = network()
        optimizer = entry.make(model)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=clear)
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
            loss_of(model, x, y).backward()
            optimizer.step()
        results.append(weights(model))
    assert equal(*results)


@family
@loops
@pytest.mark.parametrize("foreach", [True, False])
def test_multi_tensor_and_plain_loops_give_the_same_step(entry: Entry, loop: str, foreach: bool) -> None:
    if entry.dense:
        pytest.skip("the step is one of all parameters together")
    x, y = data()
    results = []
    for setting in (foreach, None):
        model = network()
        optimizer = made(entry, loop, model, foreach=setting)
        torch.manual_seed(2)
        for _ in range(5):
            LOOPS[loop](optimizer, model, x, y)
        results.append(weights(model) + states(optimizer))
    for a, b in zip(*results, strict=True):  # a multiplication and addition may be one operation or two
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@family
def test_gradients_that_require_grad_are_taken_as_they_are(entry: Entry) -> None:
    needs_gradients_alone(entry)
    x, y = data()
    results = []
    for create_graph in (True, False):
        model = network()
        optimizer = made(entry, "context", model)
        torch.manual_seed(1)
        with optimizer.sampled_params(train=True):
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss_of(model, x, y), parameters, create_graph=create_graph)
            for p, gradient in zip(parameters, gradients, strict=True):
                assert gradient.requires_grad == create_graph
                p.grad = gradient
        optimizer.step()
        assert not any(tensor.requires_grad for tensor in states(optimizer))
        results.append(weights(model) + states(optimizer))
    assert equal(*results)


@family
def test_a_tensor_rate_of_several_entries_is_refused(entry: Entry) -> None:
    with pytest.raises(ValueError, match="it must be one number: use a parameter group for each rate"):
        entry.make(network(), lr=torch.tensor([0.1, 0.2]))


@family
@pytest.mark.parametrize("loop", ["context", "closure"])
def test_sparse_gradients_are_refused_before_anything_changes(entry: Entry, loop: str) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = made(entry, loop, model)
    before = weights(model)
    with pytest.raises(
        RuntimeError, match="does not support sparse gradients \\('(weight|param_0)'\\): use sparse=Fal"
    ):
        LOOPS[loop](optimizer, model, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert equal(weights(model), before)


@family
def test_complex_parameters_are_refused_where_no_row_has_them(entry: Entry) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    if entry.captures or entry.dense:
        with pytest.raises(TypeError, match="hold them as pairs of reals"):
            entry.make([p])
    optimizer = entry.make([nn.Parameter(torch.ones(2))])
    if entry.captures or entry.dense:
        with pytest.raises(TypeError, match="hold them as pairs of reals"):
            optimizer.add_param_group({"params": [p]})
        assert len(optimizer.param_groups) == 1
    else:
        optimizer.add_param_group({"params": [p]})
    needs_gradients_alone(entry)
    real = nn.Parameter(torch.view_as_real(p.detach().clone()))
    optimizer = entry.make([real])
    with optimizer.sampled_params(train=True):
        torch.view_as_complex(real).abs().square().sum().backward()
    optimizer.step()
