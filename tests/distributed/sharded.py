"""Models that are sharded in several ways, and their training, on one rank or in a process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import vlearn

STEPS = 8  # past the warm-up of IVON.warmup and two new bases of EVON
VOCABULARY, WIDTH = 11, 6
KEPT = ("momentum", "hessian", "out_factor", "in_factor", "out_basis", "in_basis")

MAKERS: dict[str, Callable[..., Any]] = {
    "IVON": lambda model, **other: vlearn.IVON(model, lr=0.1, ess=100.0, hess_init=0.5, **other),
    "IVON.warmup": lambda model, **other: vlearn.IVON(
        model, lr=0.5, ess=100.0, beta2_warmup=5.0, rescale_lr=False, clip_radius=0.05, **other
    ),
    "VON": lambda model, **other: vlearn.VON(model, lr=0.05, ess=100.0, curvature="price", hess_init=0.5, **other),
    "EVON": lambda model, **other: vlearn.EVON(
        model, lr=0.5, ess=100.0, clip_radius=0.05, update_every=3, beta3=0.9, **other
    ),
    "VAdamW": lambda model, **other: vlearn.VAdamW(model, lr=0.01, num_data=100, **other),
}


class Block(nn.Module):
    """A block of a small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.attention(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    """Two blocks, with an embedding whose weight the output layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp() -> nn.Sequential:
    """Layers whose rows no number of ranks divides."""
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def new_model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return (mlp() if kind == "mlp" else Transformer()).to(dtype)


def batch(kind: str, step: int, count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same batch in every process."""
    generator = torch.Generator().manual_seed(step)
    if kind == "mlp":
        x = torch.randn(count, 4, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(3, (count,), generator=generator)
    tokens = torch.randint(VOCABULARY, (count, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of a batch."""
    output = model(x)
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def sharded(model: nn.Module, how: str, **options: Any) -> nn.Module:
    """The model, sharded by `fully_shard` ("whole": in one piece) or wrapped."""
    if how == "plain":
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    count = torch.distributed.get_world_size()
    shape, names = ((2, count // 2), ("copies", "shards")) if how == "hsdp" else ((count,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    parts = model.blocks if isinstance(model, Transformer) else [m for m in model.children() if list(m.parameters())]
    for part in parts if how != "whole" else ():  # pyright: ignore
        fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def make(model: nn.Module, kind: str, **other: Any) -> Any:
    """An optimizer whose draw is the same in all processes."""
    return MAKERS[kind](model, generator=torch.Generator().manual_seed(1), shared_noise=True, **other)


def train(model: nn.Module, optimizer: Any, kind: str, steps: range = range(STEPS)) -> None:
    """Steps of the plain loop."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, *batch(kind, step)).backward()
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """All entries, in any process."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def results(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Mean, momentum, Hessian and bases by name, whole."""
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):  # the outermost has whole weights after a forward pass without a backward
            module.reshard()
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        tensors = {"mean": p, **{key: state[key] for key in KEPT if key in state}}
        found[name.removeprefix("module.")] = {key: whole(tensor) for key, tensor in tensors.items()}
    return found


def assert_equal(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), (name, key, float((found[name][key] - tensor).abs().max()))
