"""State: what is saved decides the next step, and the mean is what is saved."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.table import LOOPS, Entry, data, equal, family, loss_of, made, network, plain, weights

loops = pytest.mark.parametrize("loop", LOOPS)


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@family
def test_state_dict_holds_tensors_and_scalars_alone(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    loss_of(model, x, y).backward()  # a draw is pending
    state = optimizer.state_dict()
    assert all(isinstance(v, torch.Tensor) for entry_ in state["state"].values() for v in entry_.values())
    through_disk(state)
    size = sum(v.numel() for entry_ in state["state"].values() for v in entry_.values())
    assert size == sum(entry.state_size(p, model) + 1 for p in model.parameters())


@family
def test_model_state_dict_holds_the_mean_while_a_draw_is_active(entry: Entry) -> None:
    model, (x, y) = network(), data()
    mean = network().state_dict()
    optimizer = entry.make(model)
    loss_of(model, x, y).backward()
    assert not torch.equal(model[0].weight, mean["0.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, mean[name])
    assert torch.equal(model[2].state_dict()["weight"], mean["2.weight"])
    outer = nn.Sequential(model)
    assert torch.equal(outer.state_dict()["0.0.weight"], mean["0.weight"])
    optimizer.step()


@family
def test_tied_weights_share_one_mean_tensor_in_the_state_dict(entry: Entry) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    optimizer = entry.make(model, **entry.of_squares)
    model(torch.ones(2, 3)).square().mean().backward()
    state = model.state_dict()
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr() != model[0].weight.data_ptr()
    optimizer.step()


@family
def test_loading_a_model_drops_the_pending_draw(entry: Entry) -> None:
    model, (x, y) = network(), data()
    other = network(seed=4).state_dict()
    optimizer = entry.make(model)
    loss_of(model, x, y).backward()
    model.load_state_dict(other)
    assert equal(weights(model), list(other.values()))
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()
    model.zero_grad()
    plain(optimizer, model, x, y)


@family
def test_a_deep_copy_of_a_watched_model_is_at_the_mean_and_unwatched(entry: Entry) -> None:
    model, (x, y) = network(), data()
    mean = weights(model)
    optimizer = entry.make(model)
    loss_of(model, x, y).backward()
    alone = copy.deepcopy(model)
    assert equal(weights(alone), mean)
    alone(x)
    assert equal(weights(alone), mean)
    optimizer.step()
    assert equal(weights(alone), mean)


@family
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_model_and_optimizer_copied_together_go_on_alike(entry: Entry, how: str) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    both = (model, optimizer)
    other, again = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    for m, o in ((model, optimizer), (other, again)):
        torch.manual_seed(1)
        plain(o, m, x, y)
        plain(o, m, x, y)
    assert equal(weights(model), weights(other))
    torch.testing.assert_close(optimizer.sensitivities().self_influence, again.sensitivities().self_influence)


@family
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("together", [False, True])
def test_a_model_pickled_within_a_step_is_at_the_mean(entry: Entry, how: str, together: bool) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    mean = weights(model)
    loss_of(model, x, y).backward()
    drawn = weights(model)
    what = (model, optimizer) if together else model
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(what))
    else:
        buffer = io.BytesIO()
        torch.save(what, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    copied = loaded[0] if together else loaded
    assert equal(weights(copied), mean) and equal(weights(model), drawn)
    loss_of(copied, x, y).backward()
    if not together:
        assert equal(weights(copied), mean)  # inert
    optimizer.step()


@family
def test_unwatching_removes_every_hook(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss_of(model, x, y).backward()
    optimizer.unwatch()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
    assert equal(weights(model), weights(network()))
    model(x)
    assert equal(weights(model), weights(network()))


@family
def test_groups_that_differ_in_ess_need_num_data(entry: Entry) -> None:
    if entry.name == "VAdamW":
        pytest.skip("it needs num_data anyway")
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "ess": 70}]
    with pytest.raises(ValueError, match="ess=50, 70 differ between parameter groups.*pass num_data"):
        entry.make(groups)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "ess": 70}]
    assert entry.make(groups, num_data=60).num_data == 60


@family
@pytest.mark.parametrize("loop", ["plain", "modes"])
def test_a_parameter_unfrozen_before_any_gradient_joins_the_draw(entry: Entry, loop: str) -> None:
    """As when two optimizers take turns and each freezes the other's parameters."""
    model, (x, y) = network(), data()
    optimizer = made(entry, loop, model)
    before = weights(model)
    for p in model.parameters():
        p.requires_grad_(False)
    if loop == "modes":
        optimizer.train()
    model(x)
    for p in model.parameters():
        p.requires_grad_(True)
    LOOPS[loop](optimizer, model, x, y)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@family
def test_a_generator_gives_the_noise(entry: Entry) -> None:
    x, y = data()

    def train() -> list[torch.Tensor]:
        model = network()
        optimizer = entry.make(model, generator=torch.Generator().manual_seed(4))
        before = torch.get_rng_state()
        plain(optimizer, model, x, y)
        assert torch.equal(before, torch.get_rng_state())
        return weights(model)

    assert equal(train(), train())
