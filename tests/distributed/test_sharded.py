"""Models that processes hold in shards: the steps of one process, bit for bit, however they are sharded."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import Ranks
from tests.distributed.sharded import (
    MAKERS,
    assert_equal,
    batch,
    loss_of,
    make,
    new_model,
    results,
    sharded,
    train,
    whole,
)

EXACTLY = {"rtol": 0.0, "atol": 0.0}
optimizers = pytest.mark.parametrize("maker", list(MAKERS))


def trained(rank: int, kind: str, maker: str, how: str) -> dict[str, dict[str, Tensor]]:
    model = sharded(new_model(kind), how)
    optimizer = make(model, maker)
    train(model, optimizer, kind)
    return results(model, optimizer)


@cache
def alone(kind: str, maker: str) -> dict[str, dict[str, Tensor]]:
    return trained(0, kind, maker, "plain")


def assert_same(found: Any, expected: Any, maker: str) -> None:
    if maker == "VAdamW":  # its scale is a sum over all entries, which processes add in another order
        for name, tensors in expected.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(found[name][key], tensor, rtol=1e-9, atol=1e-12)
    else:
        assert_equal(found, expected)


@optimizers
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_two_ranks_make_the_steps_of_one_process(ranks: Ranks, maker: str, how: str) -> None:
    expected = alone("mlp", maker)
    for found in ranks(trained, "mlp", maker, how):
        assert_same(found, expected, maker)


@optimizers
@pytest.mark.parametrize("how", ["fsdp", "hsdp"])
def test_four_ranks_make_the_steps_of_one_process(four_ranks: Ranks, maker: str, how: str) -> None:
    expected = alone("transformer", maker)
    for found in four_ranks(trained, "transformer", maker, how):
        assert_same(found, expected, maker)


# -- tensor parallelism --------------------------------------------------------------------------------------------


def beside_a_whole_model(rank: int, maker: str, shape: tuple[int, ...]) -> bool:
    """Train by tensor parallelism, and a whole model by the gathered gradients: their steps must be the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")[-len(shape) :])
    model = parallelize_module(layers(), mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if len(shape) == 2:
        fully_shard(model, mesh=mesh["data"])
    other = layers()
    optimizer, of_other = make(model, maker), make(other, maker)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, *batch("mlp", step)).backward()
        drawn = [whole(p) for p in model.parameters()]
        with of_other.sampled_params(train=True):
            for p, q, weights in zip(model.parameters(), other.parameters(), drawn, strict=True):
                torch.testing.assert_close(weights, q.detach(), **({} if maker == "VAdamW" else EXACTLY))
                assert p.grad is not None
                q.grad = whole(p.grad)
        optimizer.step()
        of_other.step()
    assert_same(results(model, optimizer), results(other, of_other), maker)
    return True


@optimizers
def test_tensor_parallelism_makes_the_steps_of_a_whole_model(ranks: Ranks, maker: str) -> None:
    assert all(ranks(beside_a_whole_model, maker, (2,)))


@optimizers
def test_tensor_parallelism_inside_fsdp_makes_the_steps_of_a_whole_model(four_ranks: Ranks, maker: str) -> None:
    assert all(four_ranks(beside_a_whole_model, maker, (2, 2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 6), Block(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x))).mean(1)


def parts_of_sequences(rank: int, context: bool) -> bool:
    """The norm's parameters are whole in each process, and their gradients sums over processes that are not formed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as tp

    torch.manual_seed(0)
    model: Any = Sequences().double()
    other = Sequences().double()
    other.load_state_dict(model.state_dict())
    plan: Any = {
        "embed": tp.ColwiseParallel(output_layouts=Shard(1)),
        "block.norm": tp.SequenceParallel(),
        "block": tp.PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Shard(1),), use_local_output=False
        ),
        "block.up": tp.ColwiseParallel(input_layouts=Shard(1)),
        "block.down": tp.RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "head": tp.ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    model = tp.parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    optimizer, of_other = make(model, "IVON"), make(other, "IVON")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, y = torch.randn(5, 4, 4, generator=generator).double(), torch.randint(3, (5,), generator=generator)
        for each, own in ((model, optimizer), (other, of_other)):
            own.zero_grad()
            with own.sampled_params(train=True) if context else nullcontext():
                nn.functional.cross_entropy(each(x), y).backward()
            own.step()
    torch.testing.assert_close(results(model, optimizer), results(other, of_other), rtol=1e-9, atol=1e-13)
    return True


@pytest.mark.parametrize("context", [False, True])
def test_gradients_that_are_sums_over_processes_are_formed(ranks: Ranks, context: bool) -> None:
    assert all(ranks(parts_of_sequences, context))
