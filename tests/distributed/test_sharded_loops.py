"""What a training loop does with a sharded model beside forward, backward and step: each as with a whole one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import vlearn
from tests.distributed.ranks import Ranks
from tests.distributed.sharded import assert_equal, batch, loss_of, make, mlp, new_model, results, sharded, train, whole

KIND = {"stale": "transformer"}
Loop = Callable[[nn.Module, Any], None]


def clip(model: nn.Module, optimizer: Any) -> None:
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, *batch("mlp", step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def accumulate(model: nn.Module, optimizer: Any) -> None:
    for step in range(5):
        optimizer.zero_grad()
        for part in range(2):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(part == 1)
            (loss_of(model, *batch("mlp", 2 * step + part)) / 2).backward()
        optimizer.step()


def evaluate_between(model: nn.Module, optimizer: Any) -> None:
    """An eval forward shows the mean, between a training forward and its backward too."""
    x = batch("mlp", 100)[0]
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, *batch("mlp", step))
        model.eval()
        with torch.no_grad():
            first = model(x)
        model.train()
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            assert step == 0 or not torch.equal(first, model(x))
            torch.testing.assert_close(model(x), at_mean(optimizer, model, x))
        model.train()


def at_mean(optimizer: Any, model: nn.Module, x: Tensor) -> Tensor:
    mean = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    return torch.func.functional_call(mlp().double(), mean, (x,))


def stale(model: nn.Module, optimizer: Any) -> None:
    """The outermost module of `fully_shard` keeps what it gathers in an eval forward, and until backward."""
    tokens = batch("transformer", 100)[0]
    for step in range(5):
        model.eval()
        with torch.no_grad():
            model(tokens)
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model, *batch("transformer", step))
        model.eval()
        with torch.no_grad():
            seen = model(tokens)
        model.train()
        loss.backward()
        optimizer.step()
        mean = {name: whole(p) for name, p in model.named_parameters()}
        model.eval()
        with torch.no_grad():
            assert not torch.equal(model(tokens), seen)
            expected = torch.func.functional_call(new_model("transformer"), mean, (tokens,))
            torch.testing.assert_close(model(tokens), expected)
        model.train()


def contexts(model: nn.Module, optimizer: Any) -> None:
    """Two draws a step, and one for predicting between."""
    for step in range(5):
        optimizer.zero_grad()
        for part in range(2):
            with optimizer.sampled_params(train=True):
                loss_of(model, *batch("mlp", 2 * step + part)).backward()
        model.eval()
        with optimizer.sampled_params(), torch.no_grad():
            model(batch("mlp", 0)[0])
        model.train()
        optimizer.step()


def closure(model: nn.Module, optimizer: Any) -> None:
    for step in range(5):

        def run(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, *batch("mlp", step))
            loss.backward()
            return loss

        optimizer.step(run)


def modes(model: nn.Module, optimizer: Any) -> None:
    for step in range(5):
        optimizer.train()
        optimizer.zero_grad()
        loss_of(model, *batch("mlp", step)).backward()
        optimizer.step()
        optimizer.eval()


def partly_frozen(model: nn.Module, optimizer: Any) -> None:
    for step in range(6):
        next(model.parameters()).requires_grad_(step % 3 != 1)
        optimizer.zero_grad()
        loss_of(model, *batch("mlp", step)).backward()
        optimizer.step()


def skip_nonfinite(model: nn.Module, optimizer: Any) -> None:
    """The infinite entry is in one process's shard alone."""
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, *batch("mlp", step)).backward()
        if step == 2:
            gradient = next(model.parameters()).grad
            assert gradient is not None
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 1:
                local[0] = torch.inf
        optimizer.step()
    assert optimizer.nonfinite_count == 1


LOOPS: dict[str, tuple[Loop, dict[str, Any]]] = {
    "clip": (clip, {}),
    "accumulate": (accumulate, {}),
    "eval": (evaluate_between, {}),
    "stale": (stale, {}),
    "contexts": (contexts, {}),
    "closure": (closure, {"mc_samples": 2}),
    "modes": (modes, {}),
    "frozen": (partly_frozen, {}),
    "nonfinite": (skip_nonfinite, {"nonfinite": "skip"}),
}


def looped(rank: int, name: str, how: str, late: bool = False) -> dict[str, dict[str, Tensor]]:
    loop, options = LOOPS[name]
    model = new_model(KIND.get(name, "mlp"))
    if late:  # as Accelerate does
        optimizer = make(model, "IVON", **options)
        model = sharded(model, how)
        optimizer.param_groups[0]["params"] = list(model.parameters())
    else:
        model = sharded(model, how)
        optimizer = make(model, "IVON", **options)
    loop(model, optimizer)
    return results(model, optimizer)


@pytest.mark.parametrize(("how", "late"), [("fsdp", False), ("whole", True)], ids=["", "sharded after the optimizer"])
@pytest.mark.parametrize("name", list(LOOPS))
def test_loops_are_those_of_one_process(ranks: Ranks, name: str, how: str, late: bool) -> None:
    expected = looped(0, name, "plain")
    for found in ranks(looped, name, how, late):
        if name == "clip":  # the norm adds the shards' in another order
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        else:
            assert_equal(found, expected)


def raised(rank: int) -> list[str]:
    model = sharded(new_model("mlp"), "fsdp")
    optimizer = make(model, "IVON")
    loss_of(model, *batch("mlp", 0)).backward()
    before = [whole(p) for p in optimizer._parameters.every()]
    if rank == 1:
        next(model.parameters()).grad.to_local()[0] = torch.nan  # pyright: ignore
    messages = []
    try:
        optimizer.step()
    except FloatingPointError as error:
        messages.append(str(error))
    mean = [whole(p) for p in model.parameters()]
    assert not all(map(torch.equal, before, mean)), "the weights are the mean again"
    loss_of(model, *batch("mlp", 0)).backward()
    optimizer.zero_grad()
    train(model, optimizer, "mlp", range(1))
    for bad in (lambda: make(model, "IVON", sync=True), lambda: vlearn.KFACVON(model, lr=0.1, ess=10.0)):
        try:
            train(model, bad(), "mlp", range(1))
        except (RuntimeError, TypeError) as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_is_refused_in_all_processes(ranks: Ranks) -> None:
    for nonfinite, sync, captures in ranks(raised):
        assert "is not finite" in nonfinite
        assert "drop sync=True" in sync
        assert "use IVON, EVON, VAdamW or VON" in captures


def convolutions(rank: int, how: str) -> dict[str, dict[str, Tensor]]:
    """Matrices of more axes than two, with the posterior of another data set as the prior."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 5, 3), nn.Tanh(), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(12, 3)
    model = sharded(nn.Sequential(*layers).double(), how)
    names = [name for name, _ in model.named_parameters()]
    prior = vlearn.posterior.Diagonal(
        {name: torch.full(p.shape, 0.1, dtype=p.dtype) for name, p in model.named_parameters()},
        {name: torch.full(p.shape, 0.2, dtype=p.dtype) for name, p in model.named_parameters()},
        dict.fromkeys(names, 0.01),
        dict.fromkeys(names, 50.0),
        50.0,
    )
    optimizer = make(model, "EVON", prior=prior)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x, y = torch.randn(4, 1, 6, 6, generator=generator).double(), torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    optimizer.refresh_bases()
    return results(model, optimizer)


def test_eigenbases_of_convolutions_with_a_prior(ranks: Ranks) -> None:
    expected = convolutions(0, "plain")
    for found in ranks(convolutions, "fsdp"):
        assert_equal(found, expected)


def sharded_by_columns(rank: int) -> str:
    from torch.distributed.tensor import Shard

    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)
    try:
        make(model, "EVON")
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def test_eigenbases_of_convolutions_are_of_those_sharded_by_outputs(ranks: Ranks) -> None:
    for message in ranks(sharded_by_columns):
        assert "shard it along the first, or use IVON" in message


# -- options of fully_shard -----------------------------------------------------------------------------------------


def with_low_precision(rank: int) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """bfloat16 in the layers, float32 shards and state."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(new_model("mlp", torch.float32), "fsdp", mp_policy=policy)
    seen: list[torch.dtype] = []
    layer = next(model.children())
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    optimizer = make(model, "IVON")
    for step in range(5):
        optimizer.zero_grad()
        x, y = batch("mlp", step, dtype=torch.float32)
        loss_of(model, x, y).float().backward()
        optimizer.step()
    state = next(iter(optimizer.state.values()))
    return results(model, optimizer), (set(seen), state["hessian"].dtype)


def test_mixed_precision_keeps_float32_shards(ranks: Ranks) -> None:
    (first, (seen, dtype)), (second, _) = ranks(with_low_precision)
    assert_equal(first, second)
    assert seen == {torch.bfloat16} and dtype == torch.float32


def low_precision_weights(rank: int, maker: str, how: str) -> dict[str, dict[str, Tensor]]:
    model = sharded(new_model("mlp", torch.bfloat16), how)
    optimizer = make(model, maker)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, *batch("mlp", step, dtype=torch.bfloat16)).backward()
        optimizer.step()
    for p in model.parameters():
        assert torch.equal(whole(optimizer.state[p]["mean"]).to(p.dtype), whole(p))
    return results(model, optimizer)


@pytest.mark.parametrize("maker", ["IVON", "EVON"])
def test_bfloat16_weights_have_sharded_master_copies(ranks: Ranks, maker: str) -> None:
    expected = low_precision_weights(0, maker, "plain")
    for found in ranks(low_precision_weights, maker, "fsdp"):
        assert_equal(found, expected)


def offloaded(rank: int) -> dict[str, dict[str, Tensor]]:
    model = sharded(new_model("mlp"), "fsdp", offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = make(model, "IVON")
    train(model, optimizer, "mlp")
    return results(model, optimizer)


def alone() -> dict[str, dict[str, Tensor]]:
    model = new_model("mlp")
    optimizer = make(model, "IVON")
    train(model, optimizer, "mlp")
    return results(model, optimizer)


def test_shards_may_be_offloaded(ranks: Ranks) -> None:
    for found in ranks(offloaded):
        assert_equal(found, alone())


def from_meta(rank: int) -> dict[str, dict[str, Tensor]]:
    weights = {name: p.detach() for name, p in new_model("mlp").named_parameters()}
    with torch.device("meta"):
        model = new_model("mlp")
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    optimizer = make(model, "IVON")
    train(model, optimizer, "mlp")
    return results(model, optimizer)


def test_models_may_be_made_on_the_meta_device(ranks: Ranks) -> None:
    for found in ranks(from_meta):
        assert_equal(found, alone())


def checkpointed(rank: int, how: str) -> dict[str, dict[str, Tensor]]:
    from torch.utils.checkpoint import checkpoint

    model = new_model("transformer")
    for block in model.blocks:  # pyright: ignore
        block.forward = _recomputed(block.forward, checkpoint)  # pyright: ignore
    model = sharded(model, how)
    optimizer = make(model, "IVON")
    train(model, optimizer, "transformer", range(5))
    return results(model, optimizer)


def _recomputed(forward: Any, checkpoint: Any) -> Any:
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def test_activations_may_be_checkpointed(ranks: Ranks) -> None:
    expected = checkpointed(0, "plain")
    for found in ranks(checkpointed, "fsdp"):
        assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed")
def test_blocks_may_be_compiled(ranks: Ranks) -> None:
    for found in ranks(compiled):
        for name, tensors in compiled(0, "plain").items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(found[name][key], tensor, rtol=1e-9, atol=1e-12)


def compiled(rank: int, how: str = "fsdp") -> dict[str, dict[str, Tensor]]:
    model = new_model("transformer")
    for block in model.blocks:  # pyright: ignore
        block.compile()  # pyright: ignore
    model = sharded(model, how)
    optimizer = make(model, "IVON")
    train(model, optimizer, "transformer", range(3))
    return results(model, optimizer)


# -- what is read from the state -----------------------------------------------------------------------------------


def read(rank: int, how: str, maker: str) -> Any:
    model = sharded(new_model("mlp"), how)
    options = {"num_data": 20.0} if maker == "IVON" else {}  # ess is 100: its noise is measured
    optimizer = make(model, maker, **options)
    train(model, optimizer, "mlp")
    posterior = optimizer.posterior()
    has_size = maker in ("VON", "EVON")
    drawn = posterior.sample(torch.Generator().manual_seed(5)) if has_size else {}
    entropy = posterior.entropy() if has_size else 0.0
    return (
        optimizer.diagnostics(),
        {name: (posterior.mean[name].clone(), posterior.variance[name].clone()) for name in posterior.names},
        drawn,
        entropy,
        posterior.clone().state() if has_size else None,
    )


@pytest.mark.parametrize("maker", ["IVON", "VON", "EVON", "VAdamW"])
def test_posterior_and_diagnostics_are_those_of_the_whole_model(ranks: Ranks, maker: str) -> None:
    expected = read(0, "plain", maker)
    assert maker != "IVON" or expected[0].hessian_noise > 0
    for found in ranks(read, "fsdp", maker):
        torch.testing.assert_close(vars(found[0]), vars(expected[0]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-9, atol=1e-12)
        assert found[3] == pytest.approx(expected[3], rel=1e-12)


def bytes_of_state(rank: int, maker: str) -> tuple[int, int]:
    torch.manual_seed(0)
    model = sharded(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)), "fsdp")
    optimizer = make(model, maker)
    x = torch.randn(4, 64)
    model(x).square().mean().backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.to_local().nbytes for t in tensors), sum(p.numel() * p.element_size() for p in model.parameters())  # pyright: ignore


def test_each_process_keeps_its_part_of_the_state(four_ranks: Ranks) -> None:
    for own, weights in four_ranks(bytes_of_state, "IVON"):
        assert own == pytest.approx(2 * weights / 4, rel=0.05)


def test_each_process_keeps_its_part_of_factors_and_bases(four_ranks: Ranks) -> None:
    squares = 2 * 4 * 2 * (64**2 + 256**2)  # of each matrix two factors and two bases
    for own, weights in four_ranks(bytes_of_state, "EVON"):
        assert own == pytest.approx((2 * weights + squares) / 4, rel=0.05)
