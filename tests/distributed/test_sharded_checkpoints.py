"""torch.distributed.checkpoint: saved on some ranks and resumed on others, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from tests.distributed.ranks import Ranks
from tests.distributed.sharded import assert_equal, make, new_model, results, sharded, train

# One process alone is told that it is.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
MAKERS = pytest.mark.parametrize("maker", ["IVON", "VON", "EVON", "VAdamW"])
OPTIONS = {"IVON": {"num_data": 20.0}}  # ess is 100: the noise of its Hessian is measured, another tensor of the state


def new(maker: str, how: str) -> tuple[nn.Module, Any]:
    model = sharded(new_model("transformer"), how)
    return model, make(model, maker, **OPTIONS.get(maker, {}))


def saved(rank: int, folder: str, maker: str, how: str) -> None:
    model, optimizer = new(maker, how)
    train(model, optimizer, "transformer", range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    if rank == 0:
        torch.save(optimizer.generator.get_state(), Path(folder) / "generator.pt")


def resumed(rank: int, folder: str, maker: str, how: str) -> dict[str, dict[str, Tensor]]:
    model, optimizer = new(maker, how)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert all(group["lr"] > 0 for group in optimizer.param_groups)
    optimizer.generator.set_state(torch.load(Path(folder) / "generator.pt"))
    train(model, optimizer, "transformer", range(3, 6))
    return results(model, optimizer)


def in_one_go(maker: str) -> dict[str, dict[str, Tensor]]:
    model, optimizer = new(maker, "plain")
    train(model, optimizer, "transformer", range(6))
    return results(model, optimizer)


def assert_same(found: Any, expected: Any, maker: str) -> None:
    if maker == "VAdamW":
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    else:
        assert_equal(found, expected)


@MAKERS
def test_four_ranks_save_and_two_and_one_go_on(ranks: Ranks, four_ranks: Ranks, tmp_path: Path, maker: str) -> None:
    four_ranks(saved, str(tmp_path), maker, "fsdp")
    expected = in_one_go(maker)
    for found in (*ranks(resumed, str(tmp_path), maker, "fsdp"), resumed(0, str(tmp_path), maker, "plain")):
        assert_same(found, expected, maker)


@MAKERS
def test_one_process_saves_and_four_go_on(four_ranks: Ranks, tmp_path: Path, maker: str) -> None:
    saved(0, str(tmp_path), maker, "plain")
    expected = in_one_go(maker)
    for found in four_ranks(resumed, str(tmp_path), maker, "hsdp"):
        assert_same(found, expected, maker)


def full_state(rank: int, maker: str, steps: int, how: str = "fsdp") -> tuple[Any, Any]:
    model, optimizer = new(maker, how)
    train(model, optimizer, "transformer", range(steps))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


@MAKERS
@pytest.mark.parametrize("steps", [0, 3])
def test_full_state_dicts_are_those_of_one_process(ranks: Ranks, maker: str, steps: int) -> None:
    first, _ = ranks(full_state, maker, steps)  # the first process gets it
    weights, state = full_state(0, maker, steps, "plain")
    torch.testing.assert_close(first[0], weights, rtol=1e-9, atol=1e-12)
    assert first[1]["state"].keys() == state["state"].keys()
    torch.testing.assert_close(first[1]["state"], state["state"], rtol=1e-9, atol=1e-12)


def from_full(rank: int, maker: str, weights: Any, state: Any) -> dict[str, dict[str, Tensor]]:
    model, optimizer = new(maker, "fsdp")
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    return results(model, optimizer)


@MAKERS
def test_full_state_dicts_are_loaded_in_shards(ranks: Ranks, maker: str) -> None:
    model, optimizer = new(maker, "plain")
    train(model, optimizer, "transformer", range(3))
    for found in ranks(from_full, maker, *full_state(0, maker, 3, "plain")):
        assert_equal(found, results(model, optimizer))


def before_the_first_step(rank: int, maker: str) -> bool:
    model, optimizer = new(maker, "fsdp")
    state = get_optimizer_state_dict(model, optimizer)
    assert all(group["lr"] > 0 for group in optimizer.param_groups)
    return bool(state["state"])


@MAKERS
def test_the_state_is_there_before_the_first_step(ranks: Ranks, maker: str) -> None:
    assert all(ranks(before_the_first_step, maker))
