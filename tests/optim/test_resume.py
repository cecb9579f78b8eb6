"""What is saved, copied or loaded decides the next step, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vlearn
from tests.optim.table import LOOPS, Entry, data, equal, family, loss_of, made, network, plain, states, weights

loops = pytest.mark.parametrize("loop", LOOPS)


def through_disk(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


@family
@loops
@pytest.mark.parametrize("taken", [0, 4])
def test_a_run_resumed_from_disk_is_the_uninterrupted_one(entry: Entry, loop: str, taken: int) -> None:
    x, y = data()
    model = network()
    optimizer = made(entry, loop, model)
    torch.manual_seed(9)
    for _ in range(taken):
        LOOPS[loop](optimizer, model, x, y)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    random_state = torch.get_rng_state()
    for _ in range(4):
        LOOPS[loop](optimizer, model, x, y)

    resumed = network(seed=3)
    again = made(entry, loop, resumed, lr=0.7, **({"hess_init": 3.0} if taken else {}))
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    torch.set_rng_state(random_state)
    for _ in range(4):
        LOOPS[loop](again, resumed, x, y)
    assert equal(weights(resumed) + states(again), weights(model) + states(optimizer))


@family
@loops
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("taken", [0, 2])
def test_model_and_optimizer_copied_together_go_on_alike_and_apart(
    entry: Entry, loop: str, copied: Callable[[Any], Any], taken: int
) -> None:
    x, y = data()
    model = network()
    optimizer = made(entry, loop, model, generator=torch.Generator().manual_seed(5))
    for _ in range(taken):
        LOOPS[loop](optimizer, model, x, y)
    other, again = copied((model, optimizer))
    for m, o in ((model, optimizer), (other, again)):
        for _ in range(3):
            LOOPS[loop](o, m, x, y)
    assert equal(weights(model) + states(optimizer), weights(other) + states(again))


@family
@loops
def test_loading_its_own_state_before_the_first_step_changes_nothing(entry: Entry, loop: str) -> None:
    """What Accelerate's `prepare` does."""
    x, y = data()
    results = []
    for load in (False, True):
        model = network()
        optimizer = made(entry, loop, model)
        if load:
            optimizer.load_state_dict(optimizer.state_dict())
        torch.manual_seed(4)
        for _ in range(3):
            LOOPS[loop](optimizer, model, x, y)
        results.append(weights(model) + states(optimizer))
    assert equal(*results)


@family
def test_a_pending_draw_is_not_saved(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    saved, random_state = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    loss_of(model, x, y).backward()
    pending = through_disk((model.state_dict(), optimizer.state_dict()))
    results = []
    for mean, state in (saved, pending):
        other = network(seed=3)
        again = entry.make(other)
        other.load_state_dict(mean)
        again.load_state_dict(state)
        torch.set_rng_state(random_state)
        plain(again, other, x, y)
        results.append(weights(other) + states(again))
    assert equal(*results)


@family
def test_state_dicts_saved_before_a_setting_existed_load_with_the_optimizers_own(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    for name in group.keys() - {"params"}:
        older = copy.deepcopy(saved)
        del older["param_groups"][0][name]
        optimizer.load_state_dict(older)
        assert optimizer.param_groups[0][name] == group[name], name
    plain(optimizer, model, x, y)


@family
def test_loading_and_saving_leave_the_dictionary_as_it_was(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    again = entry.make(network())
    again.load_state_dict(saved)
    assert saved["param_groups"] == before["param_groups"] == again.state_dict()["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(value, saved["state"][number][key]) for key, value in state.items())


@family
def test_a_state_of_another_optimizer_or_other_groups_is_refused_and_nothing_changes(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    before = weights(model) + states(optimizer)
    saved = optimizer.state_dict()
    foreign = {**saved, "state": {**saved["state"], "avg_grad": None}}
    with pytest.raises(ValueError, match="'avg_grad', which is no parameter, so it is another optimizer's: load the"):
        optimizer.load_state_dict(foreign)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(entry.make(network()[0]).state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(entry.make([{"params": [p]} for p in network().parameters()]).state_dict())
    for peer in (torch.optim.SGD(network().parameters(), lr=0.3), torch.optim.AdamW(network().parameters())):
        with pytest.raises(ValueError, match="has no 'ess', so it is another optimizer's: load the model's weights"):
            optimizer.load_state_dict(peer.state_dict())
    other = vlearn.VAdamW(network(), num_data=6)
    if isinstance(optimizer, vlearn.VAdamW):
        other = vlearn.VON(network(), lr=0.1, ess=6)
    kinds = type(other).__name__, type(optimizer).__name__
    with pytest.raises(ValueError, match="the state dict is of {}, and that of {} is another: load the".format(*kinds)):
        optimizer.load_state_dict(other.state_dict())
    backwards = entry.make(reversed(list(network().named_parameters())))
    with pytest.raises(ValueError, match=r"\[0\] is of a parameter of shape \(5, 6\), but .* one of \(3,\) there"):
        backwards.load_state_dict(saved)
    assert not backwards.state
    assert equal(weights(model) + states(optimizer), before)
    plain(optimizer, model, x, y)


@family
def test_state_dict_hooks_run_and_may_change_what_is_saved_and_loaded(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    again = entry.make(network())
    again.register_load_state_dict_pre_hook(lambda o, state: {**state, "state": {}})
    again.register_load_state_dict_post_hook(lambda o: seen.append("after loading"))
    again.load_state_dict(saved)
    assert seen == ["before saving", "after loading"]
    assert not any(again.state.values())
    assert set(saved["state"]) == {0, 1, 2, 3}


@family
def test_a_load_hook_may_match_parameters_by_name(entry: Entry) -> None:
    """The use that torch's documentation gives; the master means of bfloat16 parameters go along."""
    x, y = data(dtype=torch.bfloat16)
    model = network(dtype=torch.bfloat16)
    optimizer = entry.make(model.named_parameters())
    optimizer.watch(model)
    for _ in range(3):
        plain(optimizer, model, x, y)
    other = copy.deepcopy(model)
    again = entry.make(reversed(list(other.named_parameters())))

    def by_name(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        (saved,) = state["param_groups"]
        numbers = dict(zip(saved["param_names"], saved["params"], strict=True))
        names = o.param_groups[0]["param_names"]
        return {**state, "param_groups": [{**saved, "params": [numbers[n] for n in names], "param_names": names}]}

    again.register_load_state_dict_pre_hook(by_name)
    again.register_load_state_dict_post_hook(lambda o: dtypes.extend(v.dtype for v in states(o)))
    dtypes: list[torch.dtype] = []
    again.load_state_dict(optimizer.state_dict())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, again.state[q][key]), (name, key)
    assert set(dtypes) == {torch.float32}  # the user's hook sees the state as it stays


@family
def test_names_may_come_and_go_between_saving_and_loading(entry: Entry) -> None:
    x, y = data()
    model = network()
    for named, load_named in ((True, False), (False, True)):
        parameters = model.named_parameters() if named else model.parameters()
        optimizer = entry.make(parameters)
        optimizer.watch(model)
        plain(optimizer, model, x, y)
        other = network()
        again = entry.make(other.named_parameters() if load_named else other.parameters())
        again.load_state_dict(optimizer.state_dict())
        assert equal(states(again), states(optimizer))
        assert set(again.posterior().mean) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        optimizer.unwatch()


@family
def test_a_scheduler_resumes_with_its_optimizer(entry: Entry) -> None:
    x, y = data()

    def pair(model: nn.Module) -> tuple[Any, Any]:
        optimizer = entry.make(model)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8)

    def steps(model: nn.Module, optimizer: Any, scheduler: Any, count: int) -> None:
        for _ in range(count):
            plain(optimizer, model, x, y)
            scheduler.step()

    model = network()
    optimizer, scheduler = pair(model)
    steps(model, optimizer, scheduler, 3)
    saved = through_disk([part.state_dict() for part in (model, optimizer, scheduler)])
    random_state = torch.get_rng_state()
    steps(model, optimizer, scheduler, 4)
    other = network(seed=3)
    again, schedule = pair(other)
    for part, state in zip((other, again, schedule), saved, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random_state)
    steps(other, again, schedule, 4)
    assert equal(weights(other) + states(again), weights(model) + states(optimizer))
