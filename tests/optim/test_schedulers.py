"""Every learning-rate scheduler of torch at its defaults."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from tests.optim.table import LOOPS, Entry, data, equal, made, network, plain, representatives, states, weights

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    found = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")  # SequentialLR to torch 2.8
@representatives
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("loop", ["plain", "closure"])
def test_a_scheduled_run_is_the_run_with_the_same_rates_and_momenta_set_by_hand(
    entry: Entry, name: str, loop: str
) -> None:
    x, y = data()
    model = network()
    optimizer = made(entry, loop, model)
    scheduler = SCHEDULERS[name](optimizer)
    torch.manual_seed(3)
    used = []
    for _ in range(6):
        group = optimizer.param_groups[0]
        used.append((group["lr"], group["betas"]))
        LOOPS[loop](optimizer, model, x, y)
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    assert len({lr for lr, _ in used}) > 1
    assert (len({betas for _, betas in used}) > 1) == (name in ("OneCycleLR", "CyclicLR"))  # they cycle momentum too

    by_hand = network()
    other = made(entry, loop, by_hand)
    torch.manual_seed(3)
    for lr, betas in used:
        other.param_groups[0].update(lr=lr, betas=betas)
        LOOPS[loop](other, by_hand, x, y)
        assert (other.param_groups[0]["beta1"], other.param_groups[0]["beta2"]) == betas
    assert equal(weights(model) + states(optimizer), weights(by_hand) + states(other))


@representatives
@pytest.mark.parametrize("how", ["itself", "copied", "loaded"])
def test_beta1_and_betas_are_one_setting_that_either_may_be_written(entry: Entry, how: str) -> None:
    x, y = data()

    def copied(model: Any, optimizer: Any) -> tuple[Any, Any]:
        if how == "loaded":
            optimizer.unwatch()
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = entry.make(model.parameters(), beta1=0.3)
            optimizer.load_state_dict(state)
            optimizer.watch(model)
        return copy.deepcopy((model, optimizer)) if how == "copied" else (model, optimizer)

    results = []
    for write in ({"betas": (0.5, 0.98)}, {"beta1": 0.5, "beta2": 0.98}, {"betas": (0.5, 0.98), "beta1": 0.1}):
        model = network()
        optimizer = entry.make(model)
        torch.manual_seed(3)
        plain(optimizer, model, x, y)
        model, optimizer = copied(model, optimizer)
        optimizer.param_groups[0].update(write)
        for _ in range(2):
            plain(optimizer, model, x, y)
            group = optimizer.param_groups[0]
            assert (group["beta1"], group["beta2"]) == group["betas"] == (0.5, 0.98)
        results.append(weights(model) + states(optimizer))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@representatives
def test_a_tensor_rate_is_followed_by_its_scheduler(entry: Entry) -> None:
    x, y = data()
    rates = [0.125, torch.tensor(0.125), torch.tensor([0.125])]
    if torch.__version__ < "2.8":
        rates.pop()  # torch's schedulers raise at a rate with an axis
    results = []
    for lr in rates:
        model = network()
        optimizer = entry.make(model, lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        torch.manual_seed(3)
        for _ in range(3):
            plain(optimizer, model, x, y)
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
        results.append(weights(model))
    assert all(equal(results[0], other) for other in results)


@representatives
def test_a_scheduler_may_be_made_before_groups_are_added_and_after_steps(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model[0].parameters())
    optimizer.watch(model)
    plain(optimizer, model, x, y)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.3})
    model.zero_grad()
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    plain(optimizer, model, x, y)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.03])
