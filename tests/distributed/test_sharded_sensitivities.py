"""Sensitivities of sharded models: each process's own examples, equal to those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, Subset, TensorDataset

import vlearn
from tests.distributed.ranks import Ranks
from tests.distributed.sharded import batch, loss_of, make, new_model, sharded, train
from vlearn.sharded.tensors import whole


def live(rank: int, kind: str, how: str, maker: str, count: int) -> list[tuple[Tensor, ...]]:
    """Rows of this rank's part of the batch, between backward and step and after it."""
    model = sharded(new_model(kind), how)
    optimizer = make(model, maker)
    found = []
    for step in range(3):
        x, y = batch(kind, step, count=8)
        if count > 1:
            x, y = x.chunk(count)[rank], y.chunk(count)[rank]
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        rows = optimizer.sensitivities(deviation=True)
        found.append((rows.self_influence, rows.residual, rows.deviation, rows.prediction_error))
        optimizer.step()
        found.append((optimizer.sensitivities(examples=[1, 2]).self_influence,))
    return found


@pytest.mark.parametrize(("kind", "how"), [("mlp", "fsdp"), ("transformer", "whole")])
@pytest.mark.parametrize("maker", ["IVON", "EVON", "VAdamW"])
def test_each_process_has_the_rows_of_its_own_examples(ranks: Ranks, kind: str, how: str, maker: str) -> None:
    expected = live(0, kind, "plain", maker, 1)
    found = ranks(live, kind, how, maker, 2)
    for step in range(3):
        for place, rows in enumerate(expected[2 * step]):
            both = torch.cat([each[2 * step][place] for each in found])
            # Eigenbases make more of it that gradients of halves of a batch are rounded otherwise than its own.
            torch.testing.assert_close(both, rows, rtol=1e-7 if maker == "EVON" else 1e-9, atol=1e-14)
    assert float(expected[0][0].min()) > 0
    assert all(len(each[1][0]) == 2 for each in found)


def with_dropout(rank: int, how: str) -> Tensor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Dropout(0.5), torch.nn.Linear(9, 3)).double()
    model = sharded(model, how)
    optimizer = make(model, "IVON")
    torch.manual_seed(3)
    loss_of(model, *batch("mlp", 0)).backward()
    before = torch.get_rng_state()
    rows = optimizer.sensitivities().self_influence
    assert torch.equal(torch.get_rng_state(), before)
    loss_of(model, *batch("mlp", 1)).backward()  # the pass that was made again has left nothing behind
    optimizer.step()
    return rows


def test_the_pass_is_made_again_with_its_random_numbers(ranks: Ranks) -> None:
    expected = with_dropout(0, "plain")
    for found in ranks(with_dropout, "fsdp"):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def unchanged(rank: int, asks: bool) -> list[Tensor]:
    model = sharded(new_model("transformer"), "fsdp")
    optimizer = make(model, "IVON")
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, *batch("transformer", step)).backward()
        if asks:
            optimizer.sensitivities()
        optimizer.step()
        if asks:
            optimizer.sensitivities()
    return [p.full_tensor().detach() for p in model.parameters()]  # pyright: ignore


def test_training_goes_on_as_if_nobody_had_asked(ranks: Ranks) -> None:
    for asked, not_asked in zip(ranks(unchanged, True), ranks(unchanged, False), strict=True):
        assert all(map(torch.equal, asked, not_asked))


def in_low_precision(rank: int, how: str) -> Tensor:
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if how == "fsdp" else {}
    model = sharded(new_model("mlp", torch.float32), how, **policy)
    optimizer = make(model, "IVON")
    x, y = batch("mlp", 0, dtype=torch.float32)
    loss_of(model, x, y).backward()
    return optimizer.sensitivities().self_influence.float()


def test_rows_of_layers_in_bfloat16(ranks: Ranks) -> None:
    expected = in_low_precision(0, "plain")
    for found in ranks(in_low_precision, "fsdp"):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def by_tensor_parallelism(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    optimizer = make(model, "IVON")
    loss_of(model, *batch("mlp", 0)).backward()
    try:
        optimizer.sensitivities()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def test_tensor_parallelism_has_no_rows(ranks: Ranks) -> None:
    for message in ranks(by_tensor_parallelism):
        assert "tensor parallelism computes on parts of the weights" in message


def swept(rank: int, kind: str, maker: str, how: str, count: int) -> tuple[Any, ...]:
    """A sweep, an influence and groups left out of this rank's part of the data, with the model as it was trained."""
    model = sharded(new_model(kind), how)
    optimizer = make(model, maker)
    train(model, optimizer, kind, range(3))
    x, y = batch(kind, 100, count=12)
    data = TensorDataset(x, y if kind == "mlp" else y[:, -1])
    own = range(rank * 12 // count, (rank + 1) * 12 // count)
    loader = DataLoader(Subset(vlearn.IndexedDataset(data), list(own)), batch_size=4)
    model.train()
    loss = last_token if kind == "transformer" else F.cross_entropy
    table = vlearn.sweep(model, optimizer.posterior(), loader, loss)
    influence = vlearn.influence(model, optimizer.posterior(), loader, DataLoader(data, batch_size=5), loss)
    groups = {"a": list(own[:2]), "b": list(own[2:5])}
    left_out = vlearn.leave_group_out(model, optimizer.posterior(), loader, groups, loss)
    assert model.training
    train(model, optimizer, kind, range(3, 5))  # nothing was left behind
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in optimizer._parameters.every()]
    return table.self_influence, table.deviation, table.loo_loss, influence.values, left_out.left_out_loss, weights


def swept_together(rank: int, how: str) -> tuple[Tensor, ...]:
    model = sharded(new_model("mlp"), how)
    optimizer = make(model, "IVON")
    train(model, optimizer, "mlp", range(3))
    data = vlearn.IndexedDataset(TensorDataset(*batch("mlp", 100, count=13)))
    sampler = vlearn.UnrepeatedDistributedSampler(data) if how != "plain" else None
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    table = vlearn.sweep(model, optimizer.posterior(), loader, F.cross_entropy, sync=how != "plain")
    return table.index, table.self_influence, table.loo_loss


def test_processes_sweep_a_sharded_model_together(ranks: Ranks) -> None:
    expected = swept_together(0, "plain")
    for found in ranks(swept_together, "fsdp"):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def last_token(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output[:, -1], target, reduction=reduction)


@pytest.mark.parametrize(("kind", "maker"), [("mlp", "IVON"), ("mlp", "EVON"), ("transformer", "IVON")])
def test_sweeps_take_the_model_as_it_was_trained(ranks: Ranks, kind: str, maker: str) -> None:
    found = ranks(swept, kind, maker, "fsdp", 2)
    for rank, rows in enumerate(found):
        expected = swept(rank, kind, maker, "plain", 2)
        for own, of_one in zip(rows, expected, strict=True):
            torch.testing.assert_close(own, of_one, rtol=1e-9, atol=1e-13)


def fitted(rank: int, how: str) -> tuple[Any, ...]:
    """A fit, a prediction, and a sweep with a posterior that belongs to no model, while a draw is in the weights."""
    model = sharded(new_model("transformer"), how)
    optimizer = make(model, "IVON")
    train(model, optimizer, "transformer", range(3))
    x, y = batch("transformer", 100, count=8)
    loader = DataLoader(TensorDataset(x, y[:, -1]), batch_size=4)
    loss_of(model, *batch("transformer", 3)).backward()
    if how == "plain":  # of a whole model the draw must go first
        optimizer.eval()
    posterior = vlearn.posterior.fit(model, loader, last_token, structure="kronecker", prior_precision=1.0)
    table = vlearn.sweep(model, posterior, loader, last_token)
    generator = torch.Generator().manual_seed(0)
    prediction = vlearn.posterior.predict(
        model, optimizer.posterior(), x, draws=3, link=lambda f: f.softmax(-1), generator=generator
    )
    optimizer.step()
    return dict(posterior.variance), table.loss, table.self_influence, prediction


def test_sharded_models_are_fitted_and_predict_at_the_mean_and_draws(ranks: Ranks) -> None:
    expected = fitted(0, "plain")
    for found in ranks(fitted, "fsdp"):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def placed_whole(rank: int) -> str:
    model = sharded(new_model("mlp"), "fsdp")
    posterior = make(model, "IVON").posterior().clone()
    try:
        with posterior.at_mean():
            return "nothing was raised"
    except RuntimeError as error:
        return str(error)


def test_shards_hold_no_whole_weights(ranks: Ranks) -> None:
    for message in ranks(placed_whole):
        assert "which cannot hold whole weights" in message


def damped(rank: int, how: str) -> dict[str, Tensor]:
    model = sharded(new_model("mlp"), how)
    optimizer = make(model, "IVON")
    train(model, optimizer, "mlp", range(3))
    posterior = optimizer.posterior().damped()
    return {name: whole(posterior.variance[name]) for name in posterior.names}


def test_a_sharded_state_is_damped_by_its_whole_curvature(ranks: Ranks) -> None:
    expected = damped(0, "plain")
    for found in ranks(damped, "fsdp"):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def swept_after_adamw(rank: int, how: str) -> Tensor:
    model = sharded(new_model("mlp"), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, "mlp", range(3))
    posterior = vlearn.posterior.from_optimizer(optimizer, model, num_data=12, prior_precision=1.0)
    loader = DataLoader(TensorDataset(*batch("mlp", 100, count=12)), batch_size=4)
    return vlearn.sweep(model, posterior, loader, F.cross_entropy).loo_loss


def test_the_state_of_another_optimizer_is_gathered(ranks: Ranks) -> None:
    expected = swept_after_adamw(0, "plain")
    for found in ranks(swept_after_adamw, "fsdp"):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
