"""What users do with an optimizer: vlearn does it, ivon-opt 0.1.3 does not. The table of docs/guides/from-ivon.md.

Each test runs the same code with both optimizers and states what each does.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import data, equal, network, weights

ivon = pytest.importorskip("ivon")
both = pytest.mark.parametrize("package", [ivon, vlearn], ids=["ivon-opt", "vlearn"])
X, Y = data(count=40, dtype=torch.float32)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return network(dtype=dtype)


def make(package: Any, params: Any, **settings: Any) -> Any:
    params = params.parameters() if isinstance(params, nn.Module) else params
    return package.IVON(params, **{"lr": 0.1, "ess": 40, "hess_init": 0.5, "beta2": 0.99, **settings})


def sampled(optimizer: Any, model: nn.Module, scale: float = 1.0) -> None:
    """ivon-opt's own loop, up to its step."""
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        (scale * F.cross_entropy(model(X.to(model[0].weight.dtype)), Y)).backward()  # type: ignore[index]


def momentum(optimizer: Any) -> Tensor:
    group = optimizer.param_groups[0]
    if "momentum" in group:
        return group["momentum"].clone()
    return torch.cat([optimizer.state[p]["momentum"].flatten() for p in group["params"]])


def hessian(optimizer: Any) -> Tensor:
    group = optimizer.param_groups[0]
    if "hess" in group:
        return group["hess"].clone()
    return torch.cat([optimizer.state[p]["hessian"].flatten() for p in group["params"]])


def test_the_readmes_import_line_is_all_that_changes() -> None:
    """Arguments, their order and their defaults, and the loop; that the steps are the same is tested with the rule."""
    peer, ours = (inspect.signature(package.IVON).parameters for package in (ivon, vlearn))
    assert list(ours)[: len(peer)] == list(peer)
    assert all(ours[name].default == peer[name].default for name in peer)
    for package in (ivon, vlearn):
        model = model_of()
        optimizer = package.IVON(model.parameters(), 0.1, 40)
        for _ in range(3):
            for _ in range(2):
                sampled(optimizer, model)
            optimizer.step()
        with torch.no_grad(), optimizer.sampled_params():
            model(X)


@both
def test_plain_loop(package: Any) -> None:
    model = model_of()
    optimizer = make(package, model)
    if package is vlearn:
        optimizer.watch(model)
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    if package is ivon:
        with pytest.raises(TypeError):
            optimizer.step()
    else:
        optimizer.step()
        assert not equal(weights(model), before)


@both
def test_closure(package: Any) -> None:
    model = model_of()
    mean = weights(model)
    optimizer = make(package, model)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(weights(model))
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    if package is ivon:
        with pytest.raises(TypeError):
            optimizer.step(closure)
        assert equal(seen[0], mean)  # not a draw
    else:
        assert optimizer.step(closure).item() > 0
        assert not equal(seen[0], mean)


@both
def test_first_update_after_resuming(package: Any) -> None:
    model = model_of()
    optimizer = make(package, model)
    for _ in range(50):
        sampled(optimizer, model)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = model_of()
    again = make(package, resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    updates = []
    for m, o in ((model, optimizer), (resumed, again)):
        before = weights(m)
        torch.manual_seed(1)
        sampled(o, m)
        o.step()
        updates.append(torch.cat([(a - b).flatten() for a, b in zip(weights(m), before, strict=True)]))
    ratio = float(updates[1].norm() / updates[0].norm())
    if package is ivon:
        assert ratio == pytest.approx(9.96, abs=0.01)  # (1 - 0.9^51)/(1 - 0.9)
    else:
        assert torch.equal(updates[0], updates[1])


@both
@pytest.mark.parametrize("unscale", [True, False])
def test_gradient_scaler(package: Any, unscale: bool) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = model_of()
        optimizer = make(package, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(3)
        sampled(optimizer, model, scale)
        scaler.scale(torch.zeros(1))  # what makes it ready; the loss is scaled above
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        found.append(momentum(optimizer))
    torch.testing.assert_close(found[1], (1024 if package is ivon else 1) * found[0])


@both
def test_clipping_after_backward(package: Any) -> None:
    found = []
    for bound in (1e9, 1e-3):
        model = model_of()
        optimizer = make(package, model)
        torch.manual_seed(3)
        sampled(optimizer, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        found.append(momentum(optimizer))
    if package is ivon:
        assert torch.equal(*found)
    else:
        assert float(found[1].norm()) == pytest.approx(0.1 * 1e-3, rel=1e-4)


@both
def test_accumulation_over_contexts(package: Any) -> None:
    """One context for each of two micro-batches; ivon-opt counts the first twice unless zero_grad comes between."""
    found = []
    for zero_between in (True, False):
        model = model_of()
        optimizer = make(package, model)
        torch.manual_seed(3)
        optimizer.zero_grad()
        for x, y in zip(X.chunk(2), Y.chunk(2), strict=True):
            with optimizer.sampled_params(train=True):
                if zero_between:
                    optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(momentum(optimizer))
    if package is ivon:
        assert float(found[1].norm() / found[0].norm()) > 1.3
    else:
        assert torch.equal(*found)


@both
def test_exception_inside_a_context(package: Any) -> None:
    model = model_of()
    mean = weights(model)
    optimizer = make(package, model)
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=True):
        raise KeyboardInterrupt
    assert equal(weights(model), mean) == (package is vlearn)


@both
def test_parameter_without_gradient(package: Any) -> None:
    model = model_of()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    optimizer = make(package, model)
    if package is ivon:
        with pytest.raises(AttributeError):
            sampled(optimizer, model)
    else:
        sampled(optimizer, model)
        optimizer.step()


@both
def test_add_param_group(package: Any) -> None:
    model = model_of()
    optimizer = make(package, model[0])
    group = {"params": list(model[2].parameters())}
    if package is ivon:
        with pytest.raises(KeyError):
            optimizer.add_param_group(group)
            sampled(optimizer, model)
    else:
        optimizer.add_param_group(group)
        sampled(optimizer, model)
        optimizer.step()


@both
def test_mixed_dtypes_and_devices(package: Any) -> None:
    for other in ({"dtype": torch.float64}, {"device": "meta"}):
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, **other))]
        if package is ivon:
            with pytest.raises(ValueError, match="different (dtypes|devices)"):
                make(package, params)
        else:
            make(package, params)


@both
def test_bfloat16_parameters(package: Any) -> None:
    model = model_of(torch.bfloat16)
    optimizer = package.IVON(model.parameters(), lr=0.1, ess=40)
    for step in range(200):
        sampled(optimizer, model)
        optimizer.step()
        if step == 0 and package is vlearn:
            assert hessian(optimizer).dtype == torch.float32
    moved = float((hessian(optimizer) != 1.0).float().mean())
    assert moved == 0.0 if package is ivon else moved > 0.99


@both
def test_weights_frozen_after_construction(package: Any) -> None:
    model = model_of()
    optimizer = make(package, model)
    sampled(optimizer, model)
    optimizer.step()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    sampled(optimizer, model)
    optimizer.step()
    assert torch.equal(model[0].weight, frozen) == (package is vlearn)


@both
def test_gradsq_with_sync(package: Any, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = model_of()
        optimizer = make(package, model, sync=True, hess_approx="gradsq")
        sampled(optimizer, model)
        if package is ivon:
            with pytest.raises(TypeError):
                optimizer.step()
        else:
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


@both
def test_one_cycle_at_its_defaults(package: Any) -> None:
    for make_scheduler in (
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=5),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
    ):
        optimizer = make(package, model_of())
        if package is ivon:
            with pytest.raises(ValueError, match="optimizer must support momentum"):
                make_scheduler(optimizer)
        else:
            make_scheduler(optimizer)


@both
def test_nonfinite_gradient(package: Any) -> None:
    model = model_of()
    optimizer = make(package, model)
    with optimizer.sampled_params(train=True):
        F.cross_entropy(model(X), Y).backward()
        model[0].weight.grad[0, 0] = float("nan")  # type: ignore[index]
    if package is ivon:
        optimizer.step()
    else:
        with pytest.raises(FloatingPointError):
            optimizer.step()
    assert bool(model[0].weight.isnan().any()) == (package is ivon)
