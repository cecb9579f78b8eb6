"""Groups left out, and influence, over several processes are those of one process with all the data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import vlearn
from tests.distributed.problems import refusal
from tests.distributed.ranks import Ranks
from tests.distributed.shares import CLASSES, Failing, dataset, loader_of, network, of_tokens, posterior_of
from vlearn.sensitivity import GroupTable, Influence

pytestmark = pytest.mark.slow
GROUPS = {"across": [0, 1, 5, 8], "of the first": [2, 4], "of the second": [3], "overlapping": [1, 2]}
GROUP_OPTIONS: dict[str, dict[str, Any]] = {
    "first order": {},
    "refined": {"refined": True, "tolerance": 1e-10},
    "near exact": {"refine": 50, "tolerance": 1e-10},
    "near exact, refined": {"refine": 50, "refined": True, "tolerance": 1e-10},
}
INFLUENCE_OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "best": {"top_k": 7},
    "more than there are": {"top_k": 20},
    "parts": {"by": "module"},
    "best parts": {"by": "module", "top_k": 3},
    "chunks": {"chunk": 2},
    "tokens": {"per": "token"},
    "best tokens": {"per": "token", "top_k": 30},
    "near exact": {"refine": 8, "chunk": 3},
}


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)


def left_out(loader: Any, groups: Any = GROUPS, sync: bool = False, **options: Any) -> GroupTable:
    model = network()
    return vlearn.leave_group_out(
        model, posterior_of(model), loader, groups, F.cross_entropy, progress=False, sync=sync, **options
    )


def leave_out_on(rank: int, how: str, options: dict[str, Any]) -> GroupTable:
    if how == "one has none":
        return left_out([(*dataset()[:], range(11))] if rank == 0 else [], sync=True, **options)
    return left_out(loader_of(dataset()), sync=True, **options)


@pytest.mark.parametrize("how", ["shares", "one has none"])
@pytest.mark.parametrize("options", GROUP_OPTIONS)
def test_groups_with_members_in_both_processes(ranks: Ranks, options: str, how: str) -> None:
    first, second = ranks(leave_out_on, how, GROUP_OPTIONS[options])
    alone = left_out(DataLoader(dataset(), batch_size=3), **GROUP_OPTIONS[options])
    for table in (first, second):
        assert table.group == alone.group and table.size.tolist() == [4, 2, 1, 2]
        for name in ("loss", "left_out_loss", "index", "deviation", "largest_eigenvalue", "used_first_order"):
            assert_equal(getattr(table, name), getattr(alone, name))
        if options != "first order":
            assert bool(table.converged.all()) and not bool(table.used_first_order.any())


def test_groups_over_four_processes_by_label(four_ranks: Ranks) -> None:
    tables = four_ranks(by_label_on)
    alone = left_out(DataLoader(dataset(), batch_size=11), groups=dataset().tensors[1])
    for table in tables:
        assert_equal(table.left_out_loss, alone.left_out_loss)
        assert_equal(table.deviation, alone.deviation)


def by_label_on(rank: int) -> GroupTable:
    return left_out(loader_of(dataset()), groups=dataset().tensors[1], sync=True)


def influence_of(model: nn.Module, loader: Any, test: Any = None, **options: Any) -> Influence:
    loss_fn = of_tokens if options.get("per") == "token" else F.cross_entropy
    test = DataLoader(of_tests(options), batch_size=4) if test is None else test
    return vlearn.influence(model, posterior_of(model), loader, test, loss_fn, progress=False, **options)


def of_tests(options: dict[str, Any]) -> Any:
    return dataset(5, tokens=options.get("per") == "token")


def influence_on(rank: int, how: str, options: dict[str, Any], sync: bool) -> Influence:
    data = dataset(tokens=options.get("per") == "token")
    loader = ([(*data[:], range(11))] if rank == 0 else []) if how == "one has none" else loader_of(data, how)
    found = influence_of(network(), loader, sync=sync, **options)
    return found if sync else found.gather()


@pytest.mark.parametrize("how", ["sampler", "repeated", "one has none"])
@pytest.mark.parametrize("options", INFLUENCE_OPTIONS)
def test_influence_of_both_processes(ranks: Ranks, options: str, how: str) -> None:
    asked = INFLUENCE_OPTIONS[options]
    if options == "near exact" and how == "repeated":
        pytest.skip("the curvature counts an example as often as it comes")
    first, second = ranks(influence_on, how, asked, options == "near exact" or how == "sampler")
    data = dataset(tokens=asked.get("per") == "token")
    alone = influence_of(network(), DataLoader(data, batch_size=3), **asked)
    for found in (first, second):
        for name in ("values", "train_index", "test_index", "parts", "position", "residual"):
            if name in ("values", "parts") or "near" not in options:
                assert_equal(getattr(found, name), getattr(alone, name))


@pytest.mark.parametrize("options", ["all", "best", "tokens"])
def test_influence_of_four_processes_of_which_two_have_nothing(four_ranks: Ranks, options: str) -> None:
    tokens = options == "tokens"
    alone = influence_of(network(), DataLoader(dataset(2, tokens), batch_size=3), **INFLUENCE_OPTIONS[options])
    for found in four_ranks(influence_of_two, INFLUENCE_OPTIONS[options]):
        assert_equal(found.values, alone.values)
        assert_equal(found.train_index, alone.train_index)


def influence_of_two(rank: int, options: dict[str, Any]) -> Influence:
    return influence_of(network(), loader_of(dataset(2, options.get("per") == "token")), **options).gather()


def with_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()


def after_training(rank: int) -> Any:
    wrapper = DistributedDataParallel(with_batch_norm())
    x, y = dataset().tensors
    F.cross_entropy(wrapper(x[rank::2]), y[rank::2]).backward()
    own = copy.deepcopy(wrapper.module.state_dict())
    loader = loader_of(dataset())
    table = vlearn.leave_group_out(
        wrapper, posterior_of(wrapper), loader, GROUPS, F.cross_entropy, progress=False, sync=True
    )
    return own, table, influence_of(wrapper, loader, sync=True)


def test_batch_norm_has_the_statistics_of_the_first_process(ranks: Ranks) -> None:
    (own, *found), (_, *others) = ranks(after_training)
    model, loader = with_batch_norm(), DataLoader(dataset(), batch_size=3)
    model.load_state_dict(own)
    alone = vlearn.leave_group_out(model, posterior_of(model), loader, GROUPS, F.cross_entropy, progress=False)
    for table, influence in (found, others):
        assert_equal(table.left_out_loss, alone.left_out_loss)
        assert_equal(influence.values, influence_of(model, loader).values)


class FailingIn(nn.Module):
    """A network whose forward fails in the n-th call."""

    def __init__(self, calls: int):
        super().__init__()
        self.inner, self.left = network(), calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise OSError("the device is gone")
        return self.inner(x)


def unlike(rank: int, how: str, what: str) -> tuple[str, bool]:
    model: nn.Module = network()
    data = dataset()
    loader: Any = loader_of(data)
    groups: Any = GROUPS
    factor = 1.0
    test: Any = DataLoader(dataset(5), batch_size=4)
    if how == "posterior" and rank:
        factor = 1.1
    elif how == "groups" and rank:
        groups = {"across": [0]}
    elif how == "repeated":
        loader, groups = loader_of(data, "repeated"), data.tensors[1]
    elif how == "own numbers":
        loader = [tuple(data[rank::2])]
    elif how == "failing":
        loader = loader_of(Failing(*data.tensors))
    elif how.startswith("failing in pass"):
        model = FailingIn(10**6 if rank == 0 else int(how.split()[-1]))
    elif how == "tests" and rank:
        test = DataLoader(dataset(4), batch_size=1)
    elif how == "empty":
        loader = []
    common: Any = {"progress": False, "sync": True, "refine": 3 if how == "tests" or "failing" in how else 0}
    posterior = posterior_of(model, factor)

    def call() -> Any:
        if what == "groups":
            return vlearn.leave_group_out(model, posterior, loader, groups, F.cross_entropy, **common)
        return vlearn.influence(model, posterior, loader, test, F.cross_entropy, **common)

    try:
        message = refusal(call)
    except OSError as error:
        message = str(error)
    return message, len(left_out(loader_of(data), sync=True)) == len(GROUPS)


@pytest.mark.parametrize(
    ("what", "how", "expected"),
    [
        ("groups", "posterior", "the posteriors differ between the processes"),
        ("groups", "groups", "groups is '"),
        ("groups", "repeated", "of them: use a loader that gives every example once"),
        ("groups", "own numbers", "of them: use a loader that gives every example once"),
        ("groups", "failing", "no such file"),
        ("groups", "failing in pass 3", "the device is gone"),
        ("groups", "failing in pass 7", "the device is gone"),
        ("groups", "empty", "gave 0 of them"),
        ("influence", "posterior", "different networks (their posteriors' variances differ)"),
        ("influence", "own numbers", "example 0 has the loss"),
        ("influence", "failing", "no such file"),
        ("influence", "failing in pass 3", "the device is gone"),
        ("influence", "failing in pass 7", "the device is gone"),
        ("influence", "tests", "the processes have other test examples"),
        ("influence", "empty", "gave"),
    ],
)
def test_processes_that_differ_are_told_in_all_and_none_hangs(ranks: Ranks, what: str, how: str, expected: str) -> None:
    for message, works_afterwards in ranks(unlike, how, what):
        assert expected in message and works_afterwards


def refined_apart(rank: int) -> str:
    return refusal(lambda: influence_of(network(), loader_of(dataset()), refine=2).gather())


def test_curvatures_of_shares_are_not_gathered(ranks: Ranks) -> None:
    for message in ranks(refined_apart):
        assert "pass sync=True to influence" in message
