"""A watched wrapper: sensitivities of the rank's own minibatch, names, and the mean wherever one looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problems import STEPS, batches, record, replay, state_of, train
from tests.distributed.ranks import Ranks
from tests.optim.networks import at_draw, covariance_of, cross_entropy
from tests.optim.table import FAMILY, NUMBERS, equal, loss_of, made, named, network, numbered, plain, weights
from tests.oracles.per_example import relative_error
from tests.pairs import pairs

pytestmark = pytest.mark.slow


def live(rank: int, number: int, options: dict[str, bool], inner: bool) -> Any:
    wrapper = DistributedDataParallel(network(), **options)
    optimizer = FAMILY[number].make(wrapper.module if inner else wrapper)
    for _ in range(STEPS):
        plain(optimizer, wrapper, *batches(rank)[0])
    before = {"model": wrapper.module.state_dict(), "optimizer": optimizer.state_dict()}
    draws = record(optimizer)
    optimizer.zero_grad()
    loss_of(wrapper, *batches(rank)[0]).backward()
    return before, draws, optimizer.sensitivities(deviation=True)


@numbered
@pytest.mark.parametrize("option", ["", "gradient_as_bucket_view", "static_graph", "find_unused_parameters", "inner"])
def test_sensitivities_are_those_of_one_process_with_that_draw_and_minibatch(
    ranks: Ranks, number: int, option: str
) -> None:
    options = {option: True} if option not in ("", "inner") else {}
    for rank, (before, draws, found) in enumerate(ranks(live, number, options, option == "inner")):
        model = network(seed=7)
        optimizer = FAMILY[number].make(model)
        model.load_state_dict(before["model"])
        optimizer.load_state_dict(before["optimizer"])
        replay(optimizer, draws)
        x, y = batches(rank)[0]
        loss_of(model, x, y).backward()
        expected = optimizer.sensitivities(deviation=True)
        for name in ("residual", "self_influence", "prediction_error", "deviation"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert found.step == STEPS + 1

        truth = at_draw(model, x, cross_entropy(y))
        covariance = covariance_of(optimizer, model)
        assert relative_error(found.self_influence, truth.self_influence(covariance)) < 1e-10
        assert relative_error(found.residual, truth.residual) < 1e-12


def names_and_means(rank: int, number: int) -> None:
    wrapper = DistributedDataParallel(network())
    outer = nn.ModuleDict({"network": wrapper})
    x, y = batches(rank)[0]
    mean, plainly = weights(wrapper), network().state_dict()
    with torch.no_grad():
        expected = network()(x)

    optimizer = FAMILY[number].make(wrapper)
    assert sorted(optimizer.posterior().variance) == sorted(plainly)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(plainly)
    by_parameters = FAMILY[number].make(network().parameters())
    by_parameters.watch(outer)
    assert list(by_parameters._sampler.parameters.names_in_model.values()) == [f"network.{name}" for name in plainly]
    by_parameters.unwatch()

    loss_of(wrapper, x, y).backward()
    assert not any(torch.equal(a, b) for a, b in zip(weights(wrapper), mean, strict=True))
    assert equal(list(wrapper.state_dict().values()), mean)
    assert list(wrapper.state_dict()) == [f"module.{name}" for name in plainly]
    assert equal(list(wrapper.module.state_dict().values()), mean)
    assert equal(list(wrapper.module[0].state_dict().values()), mean[:2])
    for model in (wrapper, wrapper.module):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        model.eval()
        assert torch.equal(model(x).detach(), expected)
        model.train()
    optimizer.step()
    after = weights(wrapper)
    assert not equal(after, mean)
    assert equal(weights(wrapper), after)
    optimizer.unwatch()
    assert not any(module._forward_hooks for module in wrapper.modules())


@numbered
def test_names_and_the_mean_are_those_of_the_model_inside(ranks: Ranks, number: int) -> None:
    ranks(names_and_means, number)


# -- state ---------------------------------------------------------------------------------------------------------


def many_steps(rank: int, number: int, loop: str, settings: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    width = 10 if FAMILY[number].dense else 300
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    model = model.to(settings.pop("dtype", torch.float32))
    wrapper = DistributedDataParallel(model)
    optimizer = made(FAMILY[number], loop, wrapper, loss_scale=1 / 2, **settings)
    dtype = next(model.parameters()).dtype
    micro = [(x.to(dtype), y) for x, y in batches(rank, 2)]
    for _ in range(10):
        train(loop, optimizer, wrapper, micro, no_sync=True)
    return state_of(optimizer)


@pytest.mark.parametrize(
    ("number", "loop", "settings"),
    pairs(NUMBERS, ["plain", "context"], [{}, {"shared_noise": True}, {"dtype": torch.bfloat16}]),
    ids=named,
)
def test_the_state_of_the_ranks_stays_bitwise_equal(
    ranks: Ranks, number: int, loop: str, settings: dict[str, Any]
) -> None:
    first, second = ranks(many_steps, number, loop, settings)
    assert all(bool(tensor.isfinite().all()) for tensor in first)
    assert equal(first, second)


def resumed(rank: int, number: int, folder: str, settings: dict[str, Any]) -> Any:
    def steps(optimizer: Any, wrapper: nn.Module, count: int) -> None:
        for _ in range(count):
            plain(optimizer, wrapper, *batches(rank)[0])

    torch.manual_seed(rank if settings else 0)
    wrapper = DistributedDataParallel(network())
    optimizer = FAMILY[number].make(wrapper, **settings)
    steps(optimizer, wrapper, 3)
    random_state = torch.get_rng_state()
    if rank == 0:
        saved = {"model": wrapper.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, f"{folder}/checkpoint.pt")
    torch.distributed.barrier()
    steps(optimizer, wrapper, 3)

    checkpoint = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
    model = network(seed=5)
    model.load_state_dict(checkpoint["model"])
    again_wrapper = DistributedDataParallel(model)
    again = FAMILY[number].make(again_wrapper, lr=0.7, **settings)
    again.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(random_state)
    steps(again, again_wrapper, 3)
    return state_of(optimizer), state_of(again)


@numbered
@pytest.mark.parametrize("settings", [{}, {"shared_noise": True}], ids=str)
def test_both_ranks_resume_bitwise_from_what_one_has_saved(
    ranks: Ranks, number: int, tmp_path: Any, settings: dict[str, Any]
) -> None:
    for uninterrupted, again in ranks(resumed, number, str(tmp_path), settings):
        assert equal(uninterrupted, again)
