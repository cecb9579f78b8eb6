"""DistributedDataParallel with a draw in each process: two ranks are one process with both draws."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problems import (
    STEPS,
    alternating,
    batches,
    record,
    refusal,
    replay,
    state_of,
    together,
    train,
    with_all_draws,
)
from tests.distributed.ranks import Ranks
from tests.optim import table
from tests.optim.table import (
    EVON,
    FAMILY,
    IVON,
    LOOPS,
    NUMBERS,
    VADAMW,
    VON_PRICE,
    Entry,
    data,
    equal,
    loss_of,
    named,
    network,
    numbered,
    plain,
    weights,
)
from tests.optim.test_prior import random_prior
from tests.pairs import pairs

pytestmark = pytest.mark.slow
MICRO = [(1, False), (2, False), (2, True)]  # micro-batches of a step, and whether no_sync() is around all but one


def made(entry: Entry, loop: str, wrapper: DistributedDataParallel, **kwargs: Any) -> Any:
    """The optimizer that sees the wrapper, the model in it ("inner"), or its parameters alone."""
    if loop == "inner":
        return table.made(entry, "plain", wrapper.module, **kwargs)
    return table.made(entry, loop, wrapper, **kwargs)


def own_draws(rank: int, number: int, loop: str, parts: int, no_sync: bool, options: dict, settings: dict) -> Any:
    wrapper = DistributedDataParallel(network(seed=rank), **options)
    optimizer = made(FAMILY[number], loop, wrapper, loss_scale=1 / parts, **settings)
    draws = record(optimizer)
    for _ in range(STEPS):
        train(loop, optimizer, wrapper, batches(rank, parts), no_sync)
    return draws, state_of(optimizer)


def assert_two_are_one(ranks: Ranks, number: int, loop: str, parts: int = 1, no_sync: bool = False, **options: Any):
    settings = options.pop("settings", {})
    (first, state), (second, other) = ranks(own_draws, number, loop, parts, no_sync, options, settings)
    assert equal(state, other)
    for one, two in zip(first, second, strict=True):
        pairs = [*zip(one.weights, two.weights, strict=True), *zip(one.probes, two.probes, strict=True)]
        assert not any(torch.equal(a, b) for a, b in pairs)
    rule = {key: value for key, value in settings.items() if key != "mc_samples"}
    one = with_all_draws(FAMILY[number], network(), [first, second], parts, **rule)
    unaligned = FAMILY[number].rotated and options.get("gradient_as_bucket_view")  # matrix products round otherwise
    if (parts == 1 or no_sync) and "mc_samples" not in settings and not unaligned:
        assert equal(state, state_of(one))
    for a, b in zip(state, state_of(one), strict=True):  # else the sums are taken in another order
        torch.testing.assert_close(a, b, **FAMILY[number].rounding(1e-13))


@pytest.mark.parametrize(("number", "loop", "micro"), pairs(NUMBERS, [*LOOPS, "inner"], MICRO), ids=named)
def test_two_ranks_are_one_process_with_both_draws(
    ranks: Ranks, number: int, loop: str, micro: tuple[int, bool]
) -> None:
    assert_two_are_one(ranks, number, loop, *micro)


def own_draws_with_prior(rank: int, number: int) -> Any:
    return own_draws(rank, number, "plain", 1, False, {}, {"prior": random_prior(network())})


@numbered
def test_two_ranks_with_a_prior_are_one_process_with_both_draws(ranks: Ranks, number: int) -> None:
    (first, state), (second, other) = ranks(own_draws_with_prior, number)
    model = network()
    prior = random_prior(model)
    prior.belong_to(dict(model.named_parameters()))  # it is made from parameters without names
    one = with_all_draws(FAMILY[number], model, [first, second], 1, prior=prior)
    assert equal(state, other) and equal(state, state_of(one))


def starts(number: int, loop: str, option: str, micro: tuple[int, bool]) -> bool:
    """Whether torch's own reducer does, which fails where it starts under no_sync() with a static graph."""
    return option != "static_graph" or micro != (2, True)


@pytest.mark.parametrize(
    ("number", "loop", "option", "micro"),
    pairs(
        NUMBERS,
        ["plain", "context"],
        ["gradient_as_bucket_view", "static_graph", "find_unused_parameters"],
        MICRO,
        allowed=starts,
    ),
    ids=named,
)
def test_so_they_are_with_every_option_of_the_wrapper(
    ranks: Ranks, number: int, loop: str, option: str, micro: tuple[int, bool]
) -> None:
    assert_two_are_one(ranks, number, loop, *micro, **{option: True})


@numbered
@pytest.mark.parametrize("bucket_view", [False, True])
def test_so_they_are_with_several_draws_in_each(ranks: Ranks, number: int, bucket_view: bool) -> None:
    assert_two_are_one(ranks, number, "closure", settings={"mc_samples": 3}, gradient_as_bucket_view=bucket_view)


def test_so_they_are_with_squared_gradients(ranks: Ranks) -> None:
    assert_two_are_one(ranks, 0, "plain", 2, True, settings={"hess_approx": "gradsq"})


def large(rank: int, number: int, compiled: bool) -> Any:
    """Steps of a network with a tensor that has a kernel of its own; here it runs as the function it is made of."""
    modules = [m for name, m in sys.modules.items() if name.startswith("vlearn.optim.") and hasattr(m, "kernel")]
    run, calls = modules[0].kernel, []
    for module in modules:
        module.kernel = lambda function: calls.append(function.__name__) or function
    try:
        torch.manual_seed(0)
        wrapper = DistributedDataParallel(nn.Sequential(nn.Linear(6, 4096), nn.Tanh(), nn.Linear(4096, 3)).double())
        optimizer = FAMILY[number].make(wrapper, compiled=compiled)
        torch.manual_seed(1)
        for _ in range(STEPS):
            train("plain", optimizer, wrapper, batches(rank))
    finally:
        for module in modules:
            module.kernel = run
    return state_of(optimizer), calls


@pytest.mark.parametrize("number", [n for n in range(len(FAMILY)) if FAMILY[n] is IVON])
def test_a_compiled_step_takes_the_local_products_too(ranks: Ranks, number: int) -> None:
    plainly = ranks(large, number, False)[0][0]
    (first, calls), (second, _) = ranks(large, number, True)
    assert equal(first, second) and not calls  # the kernel would multiply the noise with the averaged gradient
    for a, b in zip(first, plainly, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def compiled_model(rank: int, number: int, how: str) -> list[torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    wrapper = DistributedDataParallel(network())
    optimizer = FAMILY[number].make(wrapper)
    called: Any = wrapper
    if how == "wrapper":
        called = torch.compile(wrapper, backend="aot_eager")
    if how == "inside":
        wrapper.module.compile(backend="aot_eager")
    for _ in range(STEPS):
        train("plain", optimizer, called, batches(rank))
    return state_of(optimizer)


@numbered
def test_a_compiled_model_trains_as_the_eager_one(ranks: Ranks, number: int) -> None:
    eager, _ = ranks(compiled_model, number, "")
    for how in ("wrapper", "inside"):
        first, second = ranks(compiled_model, number, how)
        assert equal(first, eager) and equal(second, eager), how


class Branches(nn.Module):
    """Uses one of its branches, or on odd ranks the other; `never` not at all, `frozen` as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.odd, self.never = (nn.Linear(6, 3, dtype=torch.float64) for _ in range(3))
        self.frozen = nn.Linear(3, 3, dtype=torch.float64)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, which: int = 0) -> torch.Tensor:
        return self.frozen((self.even, self.odd)[which](x))


def branches_on(rank: int, number: int) -> Any:
    model = Branches()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = made(FAMILY[number], "context", wrapper)
    draws = record(optimizer)
    x, y = batches(rank)[0]
    for _ in range(STEPS):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapper(x, rank), y).backward()
        optimizer.step()
    return draws, state_of(optimizer)


@numbered
def test_a_parameter_that_one_rank_does_not_use_counts_as_zero_there(ranks: Ranks, number: int) -> None:
    (first, state), (second, other) = ranks(branches_on, number)
    assert equal(state, other)
    model = Branches()
    optimizer = table.made(FAMILY[number], "context", model)
    replay(optimizer, alternating([first, second]))
    for _ in range(STEPS):
        for rank in range(2):
            x, y = batches(rank)[0]
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x, rank), y).backward()
        optimizer.step()
    for a, b in zip(state, state_of(optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


# -- what the local gradients do not explain -----------------------------------------------------------------------


def changed_gradients(rank: int, number: int, loop: str, how: str) -> Any:
    wrapper = DistributedDataParallel(network())
    optimizer = made(FAMILY[number], loop, wrapper)
    before = weights(wrapper)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x, y = batches(rank)[0]

    def step() -> None:
        loss = loss_of(wrapper, x, y)
        (scaler.scale(loss) if how in ("scaler", "unscale_") else loss).backward()
        if how == "clip":
            torch.nn.utils.clip_grad_norm_(wrapper.parameters(), 1e-3)
        if how == "value":
            torch.nn.utils.clip_grad_value_(wrapper.parameters(), 1e-3)
        if how == "written":
            wrapper.module[0].bias.grad = torch.zeros_like(wrapper.module[0].bias)
        if how == "unscale_":
            scaler.unscale_(optimizer)

    def whole() -> None:
        if loop == "context":
            with optimizer.sampled_params(train=True):
                step()
        elif loop == "closure":
            optimizer.step(step)
            return
        else:
            if loop == "modes":
                optimizer.train()
            step()
        scaler.step(optimizer) if how in ("scaler", "unscale_") else optimizer.step()

    message = refusal(whole)
    return message, equal(weights(wrapper), before)


def has_scaler(number: int, loop: str, how: str) -> bool:
    """Whether torch's scaler takes part, which refuses closures itself."""
    return loop != "closure" or how not in ("unscale_", "scaler")


@pytest.mark.parametrize(
    ("number", "loop", "how"),
    pairs(NUMBERS, list(LOOPS), ["clip", "value", "written", "unscale_", "scaler"], allowed=has_scaler),
    ids=named,
)
def test_gradients_that_change_between_backward_and_step_are_refused(
    ranks: Ranks, number: int, loop: str, how: str
) -> None:
    for message, untouched in ranks(changed_gradients, number, loop, how):
        assert re.search(r"gradient of '.*' was changed after backward\(\) \(clipped.*pass shared_noise=True", message)
        assert untouched


def two_micro_batches(optimizer: Any, model: nn.Module, inner: nn.Module, micro: list[Any], how: str) -> None:
    """Two backward passes; between them something is done to the gradient of the first."""
    optimizer.zero_grad()
    loss_of(model, *micro[0]).backward()
    if how == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    if how == "zero_grad":
        optimizer.zero_grad()
    if how == "model.zero_grad":
        model.zero_grad()
    if how == "in place":
        model.zero_grad(set_to_none=False)
    if how == "autograd.grad":
        torch.autograd.grad(loss_of(inner, *micro[1]), list(model.parameters()))
    loss_of(model, *micro[1]).backward()


def between_micro_batches(rank: int, number: int, how: str, bucket_view: bool) -> Any:
    wrapper = DistributedDataParallel(network(), gradient_as_bucket_view=bucket_view)
    optimizer = FAMILY[number].make(wrapper)
    draws, messages = record(optimizer), []
    for _ in range(STEPS):
        two_micro_batches(optimizer, wrapper, wrapper.module, batches(rank, 2), how)
        messages.append(refusal(optimizer.step))
    return draws, state_of(optimizer), messages


@pytest.mark.parametrize(
    ("number", "how", "bucket_view"),
    pairs(NUMBERS, ["clip", "zero_grad", "model.zero_grad", "in place", "autograd.grad"], [False, True]),
    ids=named,
)
def test_what_happens_to_gradients_between_micro_batches_counts_or_is_refused(
    ranks: Ranks, number: int, how: str, bucket_view: bool
) -> None:
    (first, state, messages), (second, other, _) = ranks(between_micro_batches, number, how, bucket_view)
    if how == "clip":
        assert all("was changed after backward()" in message for message in messages)
        return
    assert set(messages) == {"nothing was raised"}
    assert equal(state, other)
    optimizer = table.made(FAMILY[number], "context", model := network())
    replay(optimizer, alternating([first, second]))
    for _ in range(STEPS):
        for rank in range(2):
            with optimizer.sampled_params(train=True):
                two_micro_batches(optimizer, model, model, batches(rank, 2), how)
        optimizer.step()
    for a, b in zip(state, state_of(optimizer), strict=True):
        torch.testing.assert_close(a, b, **FAMILY[number].rounding(1e-13))


def by_hand(rank: int, number: int, where: str) -> Any:
    """A reducer of one's own: gradients are averaged in hooks, or after backward()."""
    model = network()
    optimizer = FAMILY[number].make(model, shared_noise=where == "after, shared")
    draws = record(optimizer)

    def average() -> None:
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2

    hook = model[0].weight.register_post_accumulate_grad_hook(
        lambda p: torch.autograd.Variable._execution_engine.queue_callback(average) if where == "in backward" else None
    )
    x, y = batches(rank)[0]
    loss_of(model, x, y).backward()
    hook.remove()
    if where != "in backward":
        average()
    return refusal(optimizer.step), draws, state_of(optimizer)


@numbered
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("in backward", r"changed inside backward\(\).*not by DistributedDataParallel.*shared_noise=True"),
        ("after", r"changed after backward\(\) by more than clipping.*shared_noise=True"),
    ],
)
def test_gradients_that_something_else_averages_are_refused(
    ranks: Ranks, number: int, where: str, expected: str
) -> None:
    for message, _, _ in ranks(by_hand, number, where):
        assert re.search(expected, message)


@numbered
def test_gradients_that_are_averaged_by_hand_are_right_with_shared_noise(ranks: Ranks, number: int) -> None:
    (message, first, state), (_, second, other) = ranks(by_hand, number, "after, shared")
    assert message == "nothing was raised" and equal(state, other)
    optimizer = FAMILY[number].make(model := network())
    replay(optimizer, [together(a, b) for a, b in zip(first, second, strict=True)])
    plain(optimizer, model, *data(count=12))
    for a, b in zip(state, state_of(optimizer), strict=True):
        torch.testing.assert_close(a, b, **FAMILY[number].rounding(1e-12))


def train_alone(optimizer: Any, model: nn.Module, rank: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer.watch(model, loss_scale=scaler.get_scale)
    for k in range(STEPS + rank):
        optimizer.zero_grad()
        for x, y in batches(rank, 2):
            scaler.scale(loss_of(model, x, y)).backward()
        scaler.unscale_(optimizer)
        if k == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if k == 1:
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()


def alone(rank: int, number: int) -> Any:
    """Each process trains a model of its own; nothing waits for the other."""
    model = network(seed=rank)
    optimizer = FAMILY[number].make(model)
    draws = record(optimizer)
    train_alone(optimizer, model, rank)
    return draws, state_of(optimizer)


@numbered
def test_processes_that_train_each_their_own_model_are_left_alone(ranks: Ranks, number: int) -> None:
    for rank, (draws, state) in enumerate(ranks(alone, number)):
        model = network(seed=rank)
        optimizer = FAMILY[number].make(model)
        replay(optimizer, draws)
        train_alone(optimizer, model, rank)
        assert equal(state, state_of(optimizer))


def joined(rank: int, number: int, watched: bool) -> str:
    wrapper = DistributedDataParallel(network())
    optimizer = FAMILY[number].make(wrapper if watched else wrapper.parameters())
    with wrapper.join():
        optimizer.train() if not watched else None
        message = refusal(lambda: (loss_of(wrapper, *batches(rank)[0]).backward(), optimizer.step()))
    return message


@numbered
@pytest.mark.parametrize("watched", [True, False])
def test_uneven_inputs_are_refused(ranks: Ranks, number: int, watched: bool) -> None:
    for message in ranks(joined, number, watched):
        assert "give all processes the same number of batches" in message


# -- noise ---------------------------------------------------------------------------------------------------------


def first_draws(rank: int, generator: bool, seed: int) -> Any:
    torch.manual_seed(seed)
    kwargs = {"generator": torch.Generator().manual_seed(seed)} if generator else {}
    optimizer = FAMILY[0].make(network().parameters(), **kwargs)
    torch.manual_seed(seed)
    draws = record(optimizer)
    for _ in range(2):
        with optimizer.sampled_params():
            pass
    return draws


@pytest.mark.parametrize("generator", [False, True])
def test_processes_seeded_alike_draw_differently_and_again_the_same(ranks: Ranks, generator: bool) -> None:
    first, second = ranks(first_draws, generator, 3)
    every = [draw.weights[0] for draw in first + second]
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    again, _ = ranks(first_draws, generator, 3)
    assert all(equal(a.weights, b.weights) for a, b in zip(first, again, strict=True))
    other, _ = ranks(first_draws, generator, 4)
    assert not equal(first[0].weights, other[0].weights)


def many_draws(rank: int, count: int) -> torch.Tensor:
    p = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    optimizer = FAMILY[0].make([p], ess=1.0, hess_init=1.0, weight_decay=0.0)
    rows = []
    for _ in range(count):
        with optimizer.sampled_params():
            rows.append(p.detach().clone())
    return torch.stack(rows)


def test_the_noise_of_ranks_and_steps_is_standard_normal_and_uncorrelated(ranks: Ranks) -> None:
    first, second = ranks(many_draws, 400)
    count = first.numel()
    assert abs(float(first.mean())) < 5 / count**0.5
    assert abs(float(first.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((first * second).mean())) < 5 / count**0.5
    assert abs(float((first[1:] * first[:-1]).mean())) < 5 / count**0.5


# -- sharded parameters --------------------------------------------------------------------------------------------


def sharded(rank: int, number: int, how: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model: nn.Module = network(dtype=torch.float32)
    if how == "fully_shard":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=how == "original", device_id=torch.device("cpu"))
    try:
        FAMILY[number].make(model)
    except TypeError as error:
        return str(error)
    return "nothing was raised"


@numbered
@pytest.mark.parametrize("how", ["fully_shard", "original", "flat"])
def test_sharded_parameters_are_refused_where_they_cannot_be(ranks: Ranks, number: int, how: str) -> None:
    expected = "use fully_shard (FSDP2)"
    if how == "fully_shard":
        takes = FAMILY[number] in (IVON, VON_PRICE, EVON, VADAMW)
        expected = "nothing was raised" if takes else "is sharded over processes (fully_shard"
    for message in ranks(sharded, number, how):
        assert expected in message
