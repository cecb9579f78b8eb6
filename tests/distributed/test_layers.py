"""Layers with Kronecker factors: what is averaged over processes, and the eigenbases that one of them makes for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.problems import alternating, batches, record, replay, state_of
from tests.distributed.ranks import Ranks
from tests.distributed.test_captures import made
from tests.optim import table
from tests.optim.table import FAMILY, equal, network

pytestmark = pytest.mark.slow
kronecker = [number for number in range(len(FAMILY)) if FAMILY[number].kronecker]
family = pytest.mark.parametrize("number", kronecker, ids=[str(FAMILY[number]) for number in kronecker])


class Words(nn.Module):
    """A table, a layer at several positions, one at a single position, and parameters that are in none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(9, 4, dtype=torch.float64), nn.LayerNorm(4, dtype=torch.float64)
        self.inner, self.out = nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.norm(self.table(tokens)))).mean(1))


def sentences(rank: int) -> tuple[Tensor, Tensor]:
    """More of them on the second rank."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(0, 9, (12, 6), generator=generator), torch.randint(0, 3, (12,), generator=generator)
    return (tokens[:4], labels[:4]) if rank == 0 else (tokens[4:], labels[4:])


def on_words(rank: int, number: int, setting: str, contexts: int) -> Any:
    optimizer, model = made(number, setting, Words())
    draws = record(optimizer)
    for _ in range(5):
        draw_and_send_back(optimizer, model, rank, contexts)
        optimizer.step()
    return draws, state_of(optimizer)


def draw_and_send_back(optimizer: Any, model: nn.Module, rank: int, contexts: int) -> None:
    tokens, labels = sentences(rank)
    for _ in range(contexts):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), labels).backward()


@family
@pytest.mark.parametrize(("setting", "contexts"), [("own", 1), ("shared", 1), ("sync", 1), ("own", 2), ("sync", 2)])
def test_two_ranks_are_one_process_with_every_kind_of_layer(
    ranks: Ranks, number: int, setting: str, contexts: int
) -> None:
    (first, state), (second, other) = ranks(on_words, number, setting, contexts)
    assert equal(state, other)
    optimizer = table.made(FAMILY[number], "context", model := Words())
    replay(optimizer, alternating([first, second], contexts))
    for _ in range(5):
        for rank in range(2):
            draw_and_send_back(optimizer, model, rank, contexts)
        optimizer.step()
    layers = [model.table.weight], [model.inner.weight, model.inner.bias], [model.out.weight, model.out.bias]
    assert [[id(p) for p in layer.parameters] for layer in optimizer._structure.layers()] == [
        [id(p) for p in ps] for ps in layers
    ]
    for a, b in zip(state, state_of(optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def with_another_eigh_on_the_second(rank: int, number: int, how: str) -> Any:
    wrapper = DistributedDataParallel(network())
    optimizer = FAMILY[number].make(wrapper, update_every=1)
    table.plain(optimizer, wrapper, *batches(rank)[0])
    before = [optimizer._structure.basis(layer) for layer in optimizer._structure.layers()]
    eigh = torch.linalg.eigh

    def another(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if how == "fails":
            raise torch.linalg.LinAlgError("it did not converge")
        return eigh(matrix + 1e-3 * matrix.diagonal().diag())

    try:
        torch.linalg.eigh = another if rank == 1 else eigh
        table.plain(optimizer, wrapper, *batches(rank)[0])
    finally:
        torch.linalg.eigh = eigh
    after = [optimizer._structure.basis(layer) for layer in optimizer._structure.layers()]
    kept = [equal(list(old), list(new)) for old, new in zip(before, after, strict=True)]
    return state_of(optimizer), optimizer.decomposition_failures, kept


@family
def test_all_ranks_have_the_eigenbases_of_the_one_that_made_them(ranks: Ranks, number: int) -> None:
    (state, failures, kept), (other, *too) = ranks(with_another_eigh_on_the_second, number, "differs")
    assert equal(state, other)
    assert (failures, kept) == (0, [False, False]) == tuple(too)


@family
def test_a_decomposition_that_fails_on_one_rank_counts_on_all(ranks: Ranks, number: int) -> None:
    (state, failures, kept), (other, *too) = ranks(with_another_eigh_on_the_second, number, "fails")
    assert equal(state, other)
    assert (failures, kept) == (1, [False, True]) == tuple(too)


def with_a_bias_of_its_own(rank: int, number: int) -> Any:
    """Each rank trains a bias that the wrapper leaves alone."""
    model = network()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.bias"])
    optimizer = FAMILY[number].make(wrapper := DistributedDataParallel(model))
    for _ in range(3):
        table.plain(optimizer, wrapper, *batches(rank)[0])
    return [(p.detach(), *optimizer.state[p].values()) for p in model.parameters()]


@family
def test_a_bias_that_is_not_averaged_is_in_no_layer(ranks: Ranks, number: int) -> None:
    first, second = ranks(with_a_bias_of_its_own, number)
    same = [
        all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in zip(first, second, strict=True)
    ]
    assert same == [True, False, True, True]


def in_groups_of_one(rank: int, number: int) -> Any:
    groups = [torch.distributed.new_group([member]) for member in range(2)]
    wrapper = DistributedDataParallel(network(seed=rank), process_group=groups[rank])
    optimizer = FAMILY[number].make(wrapper)
    draws = record(optimizer)
    for _ in range(3 + rank):
        table.plain(optimizer, wrapper, *batches(rank)[0])
    return draws, state_of(optimizer)


@family
def test_processes_in_another_group_are_not_asked(ranks: Ranks, number: int) -> None:
    for rank, (draws, state) in enumerate(ranks(in_groups_of_one, number)):
        optimizer = FAMILY[number].make(model := network(seed=rank))
        replay(optimizer, draws)
        for _ in range(3 + rank):
            table.plain(optimizer, model, *batches(rank)[0])
        assert equal(state, state_of(optimizer))
