"""Mixed precision: autocast, gradient scalers, and parameters narrower than float32."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import (
    LOOPS,
    Entry,
    data,
    equal,
    family,
    loss_of,
    made,
    needs_no_probe,
    network,
    plain,
    states,
    weights,
)

scaled_loops = pytest.mark.parametrize("loop", ["plain", "context", "modes"])
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def backward(loop: str, optimizer: Any, model: nn.Module, scaler: Any, cast: Any) -> None:
    """Forward and backward pass of a loop without closure, as one writes them with a scaler."""
    x, y = data(dtype=torch.float32)
    optimizer.zero_grad()
    if loop == "modes":
        optimizer.train()
    with optimizer.sampled_params(train=True) if loop == "context" else nullcontext():
        with cast:
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
    if loop == "modes":
        optimizer.eval()


def train(
    entry: Entry,
    loop: str,
    scale: float,
    how: str = "step",
    overflow_at: int | None = None,
    cast: torch.dtype | None = None,
    count: int = 5,
) -> tuple[list[Tensor], Any]:
    """(weights and state after some steps, the optimizer); a scale of 0 is a scaler that is not enabled."""
    model = network(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, backoff_factor=0.5, enabled=scale > 0)
    optimizer = made(entry, loop, model, scaler.get_scale)
    generator_state = torch.Generator().manual_seed(2).get_state()
    torch.set_rng_state(generator_state)
    taken = attempts = 0
    while taken < count:
        before = torch.get_rng_state()
        backward(loop, optimizer, model, scaler, nullcontext() if cast is None else torch.autocast("cpu", dtype=cast))
        overflow = attempts == overflow_at
        if overflow:
            model[0].weight.grad[0, 0] = float("inf")  # type: ignore[index]
        if how != "step":
            scaler.unscale_(optimizer)
        if how == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        attempts += 1
        taken += not overflow
        if overflow and loop == "context":  # its draw goes, so the next one is to have the same noise
            torch.set_rng_state(before)
    return weights(model) + states(optimizer), optimizer


@family
@scaled_loops
@pytest.mark.parametrize("how", ["step", "unscale", "clip"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_gradients_are_unscaled_exactly_once(entry: Entry, loop: str, how: str, cast: torch.dtype | None) -> None:
    with_scaler, _ = train(entry, loop, 1024.0, how, cast=cast)
    without, _ = train(entry, loop, 0.0, how, cast=cast)
    assert equal(with_scaler, without)
    if how == "clip":
        assert not equal(without, train(entry, loop, 0.0, cast=cast)[0])


@family
@scaled_loops
def test_a_step_that_the_scaler_skips_changes_nothing(entry: Entry, loop: str) -> None:
    if loop != "context":  # the draw is kept, and a second pass made under it
        needs_no_probe(entry)
    skipped, optimizer = train(entry, loop, 1024.0, overflow_at=2)
    assert equal(skipped, train(entry, loop, 1024.0)[0])
    assert optimizer.nonfinite_count == (loop == "context")  # the other loops keep the draw


@family
def test_a_skipped_step_leaves_the_draw_pending_and_the_mean_in_eval_forwards(entry: Entry) -> None:
    x, _ = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = made(entry, "plain", model, loss_scale=scaler.get_scale)
    backward("plain", optimizer, model, scaler, nullcontext())
    draw = weights(model)
    model[0].weight.grad.fill_(float("nan"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    with torch.no_grad():
        assert torch.equal(model(x), network(dtype=torch.float32)(x))
    backward("plain", optimizer, model, scaler, nullcontext())
    assert equal(weights(model), draw)


@family
@scaled_loops
def test_float16_autocast_with_a_scaler_trains_as_float32_does(entry: Entry, loop: str) -> None:
    half, _ = train(entry, loop, 1024.0, cast=torch.float16, count=20)
    single, _ = train(entry, loop, 0.0, count=20)
    for a, b, start in zip(half, single, weights(network(dtype=torch.float32)), strict=False):
        assert float((a - b).norm()) < 0.02 * float((b - start).norm())


@family
def test_scalers_and_clipping_are_refused_where_several_draws_are_averaged(entry: Entry) -> None:
    model = network(dtype=torch.float32)
    mean = weights(model)
    optimizer = made(entry, "context", model)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        backward("context", optimizer, model, scaler, nullcontext())
    with pytest.raises(RuntimeError, match="the last of 2 draws alone.*once per step, or use loop \\(a\\) or \\(d\\)"):
        scaler.step(optimizer)
    for _ in range(2):
        backward("context", optimizer, model, torch.amp.GradScaler("cpu", enabled=False), nullcontext())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="was changed after .* but those of 3 earlier draws were not: clip inside"):
        optimizer.step()
    assert equal(weights(model), mean)


@family
def test_clipping_inside_each_of_several_contexts_counts(entry: Entry) -> None:
    x, y = data()

    def run(bound: float) -> list[Tensor]:
        model = network()
        optimizer = made(entry, "context", model)
        torch.manual_seed(1)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        return weights(model)

    assert not equal(run(0.1), run(1e9))


@family
def test_a_closure_under_a_scaler_is_refused_as_torch_refuses_it(entry: Entry) -> None:
    model = network(dtype=torch.float32)
    optimizer = made(entry, "closure", model)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    assert equal(weights(model), weights(network(dtype=torch.float32)))


@family
def test_the_optimizer_does_not_claim_to_unscale_by_itself(entry: Entry) -> None:
    """Lightning would refuse to clip, Accelerate would miss skipped steps."""
    assert not entry.make(network())._step_supports_amp_scaling


# -- autocast keeps a cache of cast weights ----------------------------------------------------------------


@family
@scaled_loops
@narrow
def test_one_autocast_region_may_hold_forwards_at_the_draw_and_at_the_mean(
    entry: Entry, loop: str, dtype: torch.dtype
) -> None:
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = made(entry, loop, model)

    def at_mean() -> None:
        model.eval()
        assert torch.equal(model(x), expected)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(x), expected)

    def at_draw() -> Tensor:
        if loop == "modes":
            optimizer.train()
        with optimizer.sampled_params(train=True) if loop == "context" else nullcontext():
            output = model(x)
            F.cross_entropy(output, y).backward()
        if loop == "modes":
            optimizer.eval()
        return output.detach()

    with torch.autocast("cpu", dtype=dtype):
        expected = network(dtype=torch.float32)(x).detach()
        at_mean()
        torch.manual_seed(0)
        draw = at_draw()
        at_mean()
        assert not torch.equal(draw, expected)
    fresh = network(dtype=torch.float32)
    optimizer, model = made(entry, loop, fresh), fresh
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(at_draw(), draw)


@family
@narrow
def test_ensembles_and_predictions_inside_autocast_leave_the_mean(entry: Entry, dtype: torch.dtype) -> None:
    x, y = data(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    model.eval()
    with torch.autocast("cpu", dtype=dtype):
        expected = model(x).detach()
        seen = []
        for _ in range(2):
            with optimizer.sampled_params():
                seen.append(model(x).detach())
            assert torch.equal(model(x), expected)
        assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], expected)
        probabilities = vlearn.predict(model, optimizer.posterior(), x, draws=4)
        assert not torch.equal(probabilities, model(x).softmax(-1))
        assert torch.equal(model(x), expected)


@family
def test_draws_and_updates_inside_autocast_are_those_outside(entry: Entry) -> None:
    x, y = data(dtype=torch.float32)
    results = []
    for region in (partial(torch.autocast, "cpu", dtype=torch.bfloat16), nullcontext):
        model = network(dtype=torch.float32)
        optimizer = made(entry, "modes", model)
        torch.manual_seed(2)
        for _ in range(3):
            with region():
                optimizer.train()
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            with region():
                optimizer.step()
        results.append(weights(model) + states(optimizer))
    assert equal(*results)


@family
def test_sensitivities_do_not_depend_on_the_loss_scale(entry: Entry) -> None:
    def run(scale: float, cast: Any) -> Any:
        model = network(dtype=torch.float32)
        optimizer = entry.make(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1, enabled=scale > 0)
        optimizer.watch(model, loss_scale=scaler.get_scale)
        torch.manual_seed(1)
        for _ in range(3):
            backward("plain", optimizer, model, scaler, cast)
            scaler.step(optimizer)
            scaler.update()  # the next scale is twice as large
        assert scaler.get_scale() == (scale * 8 if scale else 1.0)
        return optimizer.sensitivities(deviation=True)

    for cast in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with_scaler, without = run(256.0, cast), run(0.0, cast)
        for name in ("residual", "self_influence", "prediction_error", "deviation"):
            assert torch.equal(getattr(with_scaler, name), getattr(without, name)), name


# -- parameters narrower than float32 ----------------------------------------------------------------------


@family
@narrow
def test_narrow_parameters_have_a_float32_state_and_master_mean(entry: Entry, dtype: torch.dtype) -> None:
    model, (x, y) = network(dtype=dtype), data(dtype=dtype)
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    for p in model.parameters():
        state = {key: value for key, value in optimizer.state[p].items() if key != "step"}
        assert all(value.dtype == torch.float32 for value in state.values())
        assert sum(value.nbytes for value in state.values()) == 4 * (entry.state_size(p, model) + p.numel())
        assert torch.equal(state["mean"].to(dtype), p)
    wide = network(dtype=torch.float32)
    optimizer = entry.make(wide)
    plain(optimizer, wide, *data(dtype=torch.float32))
    p = wide[0].weight
    assert sum(v.nbytes for key, v in optimizer.state[p].items() if key != "step") == 4 * entry.state_size(p, wide)


@family
def test_the_whole_state_of_bfloat16_parameters_moves_in_one_step(entry: Entry) -> None:
    """Also the Hessian, of which a step with the default beta2 changes 1e-5."""
    model, (x, y) = network(dtype=torch.bfloat16), data(dtype=torch.bfloat16)
    settings = {"update_every": 1} if entry.kronecker or entry.rotated else {}
    optimizer = entry.make(model, beta2=0.99999, **settings)
    plain(optimizer, model, x, y)
    before = {(p, key): value.clone() for p in model.parameters() for key, value in optimizer.state[p].items()}
    plain(optimizer, model, x, y)
    for (p, key), then in before.items():
        if key not in (
            "column_of",
            "in_factor",
            "in_basis",
            "in_age",
            "out_age",
        ):  # the same inputs have the same factor
            assert float((optimizer.state[p][key] != then).float().mean()) > 0.9


@family
@narrow
@pytest.mark.parametrize("loop", LOOPS)
def test_narrow_parameters_resume_bitwise(entry: Entry, loop: str, dtype: torch.dtype) -> None:
    x, y = data(dtype=dtype)
    model = network(dtype=dtype)
    optimizer = made(entry, loop, model)
    for _ in range(5):
        LOOPS[loop](optimizer, model, x, y)
    saved, mean = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    random_state = torch.get_rng_state()
    for _ in range(5):
        LOOPS[loop](optimizer, model, x, y)
    for optimizer_first in (True, False):
        other = network(seed=2, dtype=dtype)
        again = made(entry, loop, other)
        for load in (again, other) if optimizer_first else (other, again):
            load.load_state_dict(copy.deepcopy(saved if load is again else mean))
        torch.set_rng_state(random_state)
        for _ in range(5):
            LOOPS[loop](again, other, x, y)
        assert equal(weights(other) + states(again), weights(model) + states(optimizer))


@family
@narrow
def test_what_the_user_writes_into_narrow_parameters_wins_over_the_master_mean(
    entry: Entry, dtype: torch.dtype
) -> None:
    model, (x, y) = network(dtype=dtype), data(dtype=dtype)
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    p = model[0].weight
    master = optimizer.state[p]["mean"].clone()
    with torch.no_grad():
        p[0].fill_(3.0)
    mean = optimizer.posterior().mean["0.weight"]
    assert bool((mean[0] == 3.0).all()) and torch.equal(mean[1:], master[1:])
    plain(optimizer, model, x, y)
    assert float((p[0].detach().float() - 3.0).abs().max()) < 0.5


@family
@pytest.mark.parametrize("other_dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_be_cast_between_steps_and_load_a_state_of_another_dtype(
    entry: Entry, other_dtype: torch.dtype
) -> None:
    before, after = torch.float32, other_dtype
    for first, second in ((before, after), (after, before)):
        model = network(dtype=first)
        optimizer = entry.make(model)
        plain(optimizer, model, *data(dtype=first))
        other = network(dtype=second)
        again = entry.make(other)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.load_state_dict(model.state_dict())
        for m, o in ((model.to(second), optimizer), (other, again)):
            start = weights(m)
            torch.manual_seed(1)
            plain(o, m, *data(dtype=second))
            assert not any(torch.equal(a, b) for a, b in zip(weights(m), start, strict=True))
            assert all(("mean" in state) == (second == torch.bfloat16) for state in o.state.values())
        assert equal(weights(model) + states(optimizer), weights(other) + states(again))
