"""Kronecker factors from a recorded pass, against curvlinops and against their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.networks import at_draw, cross_entropy
from tests.optim.test_von import CERTAIN, mean_over_signs, plain_step
from tests.oracles.per_example import relative_error
from vlearn.per_example.kronecker_factors import CONVENTIONS

conventions = pytest.mark.parametrize("convention", CONVENTIONS)


class Shared(nn.Module):
    """Linear layers over five positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(x))).mean(1)


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Words(nn.Module):
    """An embedding, and a layer whose weight is the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(x)).mean(1))


def many(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 7, shape)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), many, (4,)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2, bias=False),
            nn.Tanh(),
            nn.Conv2d(3, 3, 1),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        many,
        (2, 5, 5),
    ),
    "sequence": (Shared, many, (5, 4)),
    "twice": (Twice, many, (4,)),
    "words": (Words, tokens, (5,)),
}
BY_CURVLINOPS = ("perceptron", "convolution", "sequence")


def problem(name: str, count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, inputs, shape = NETWORKS[name]
    return make().double(), inputs(count, *shape), torch.randint(0, 3, (count,))


def optimizer_of(model: nn.Module, **kwargs: Any) -> vlearn.KFACVON:
    """Its factors are those of the last pass, at a mean that stays."""
    return vlearn.KFACVON(
        model, **{"lr": 0.0, "ess": CERTAIN, "beta2": 0.0, "num_data": 50, "update_every": 1, **kwargs}
    )


def dense_hessian(optimizer: vlearn.KFACVON, model: nn.Module) -> Tensor:
    """The Hessian of the mean loss ``[P, P]`` that the factors stand for, B ⊗ A for each layer."""
    sizes = {p: p.numel() for p in model.parameters()}
    places = dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
    whole = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    for layer in optimizer._structure.layers():
        state = optimizer.state[layer.weight]
        rows = len(layer.weight)
        columns = torch.cat([places[p].reshape(rows, -1) for p in layer.parameters], 1)
        where = columns.flatten()
        whole[where.unsqueeze(1), where] = torch.kron(state["out_factor"], state["in_factor"])
    return whole


@conventions
@pytest.mark.parametrize("name", BY_CURVLINOPS)
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_they_are_those_of_curvlinops(name: str, convention: str, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = problem(name)

    def estimate() -> Tensor:
        optimizer = optimizer_of(model, curvature="ggn" if fisher == "type-2" else fisher, kfac_approx=convention)
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
        optimizer.unwatch()
        return dense_hessian(optimizer, model)

    found = mean_over_signs(monkeypatch, estimate)
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type=fisher,
        kfac_approx=convention,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    assert relative_error(found, operator @ torch.eye(len(found), dtype=torch.float64)) < 1e-10


@conventions
def test_a_layer_called_twice_has_further_positions(convention: str) -> None:
    model, x, y = problem("twice")
    optimizer = optimizer_of(model, curvature="empirical", kfac_approx=convention)
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad and len(output) == len(x):  # not a few examples alone, see `check_separate`
            seen["a"].append(args[0].detach())
            output.register_hook(lambda gradient: seen["b"].insert(0, gradient * len(x)))

    assert isinstance(model, Twice)
    model.inner.register_forward_hook(keep)
    plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
    a, b = torch.stack(seen["a"], 1), torch.stack(seen["b"], 1)
    a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
    if convention == "reduce":
        a, b = a.mean(1, keepdim=True), b.sum(1, keepdim=True)
    state = optimizer.state[model.inner.weight]
    assert relative_error(state["in_factor"], torch.einsum("nti,ntj->ij", a, a) / a[..., 0].numel()) < 1e-12
    assert relative_error(state["out_factor"], torch.einsum("nto,ntp->op", b, b) / len(b)) < 1e-12


@conventions
def test_an_embedding_has_its_tokens_frequencies(convention: str) -> None:
    model, x, y = problem("words")
    assert isinstance(model, Words)
    optimizer = optimizer_of(model, curvature="empirical", kfac_approx=convention)
    found: list[Tensor] = []
    model.words.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda g: found.append(g * len(x))) and None
    )
    plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
    kept = (x != 2).unsqueeze(2) * found[0]
    state = optimizer.state[model.words.weight]
    frequency = torch.bincount(x.flatten(), minlength=7).double() / x.numel()
    frequency[2] = 0  # the padding's row never moves
    torch.testing.assert_close(state["out_factor"], frequency)
    torch.testing.assert_close(state["in_factor"], torch.einsum("nto,ntp->op", kept, kept) / len(x))


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("name", NETWORKS)
def test_squares_are_those_of_the_examples_rotated_gradients(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EK-FAC's definition, from dense per-example gradients."""
    monkeypatch.setattr("vlearn.per_example.kronecker_factors.CHUNK_ENTRIES", chunk)
    model, x, y = problem(name)
    optimizer = optimizer_of(model, curvature="empirical", eigenvalue_correction=True)
    for _ in range(2):  # the first step makes the basis
        plain_step(optimizer, lambda: F.cross_entropy(model(x), y))
    optimizer.unwatch()
    sizes = [p.numel() for p in model.parameters()]
    gradients = at_draw(model, x, cross_entropy(y)).gradients.split(sizes, 1)
    by_parameter = dict(zip(model.parameters(), gradients, strict=True))
    layers = optimizer._structure.layers()
    assert {p for layer in layers for p in layer.parameters} == set(model.parameters())
    for layer in layers:
        state, rows = optimizer.state[layer.weight], len(layer.weight)
        g = torch.cat([by_parameter[p].reshape(len(x), rows, -1) for p in layer.parameters], 2)
        out_basis = state.get("out_basis", torch.eye(rows, dtype=torch.float64))
        turned = torch.einsum("po,npi,ij->noj", out_basis, g, state["in_basis"])
        assert relative_error(state["hessian"], turned.square().mean(0)) < 1e-10


def test_layers_are_linear_layers_convolutions_of_one_group_and_embeddings() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.linear = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.norm, self.grouped, self.tied = nn.LayerNorm(4), nn.Conv1d(4, 4, 1, groups=2), nn.Linear(4, 7)
            self.tied.weight = self.words.weight
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(torch.tanh(self.linear(self.words(x)))) * self.scale
            return self.tied(self.grouped(hidden.mT).mT).mean(1)

    torch.manual_seed(0)
    model = Several().double()
    optimizer = vlearn.KFACVON(model, 0.01, 50)
    x = tokens(5, 6)
    plain_step(optimizer, lambda: F.cross_entropy(model(x), x[:, 0]))
    assert [layer.parameters for layer in optimizer._structure.layers()] == [(model.linear.weight, model.linear.bias)]
    diagonal = {p for p in model.parameters() if optimizer.state[p].get("hessian", torch.ones(())).shape == p.shape}
    assert diagonal == set(model.parameters()) - {model.linear.weight, model.linear.bias}


def test_a_layer_that_is_used_in_another_way_later_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.directly = nn.Linear(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight) if self.directly else self.inner(x)

    model, y = Changing().double(), torch.tensor([0, 1])
    optimizer = vlearn.KFACVON(model, 0.01, 50)
    plain_step(optimizer, lambda: F.cross_entropy(model(many(2, 4)), y))
    model.directly = True
    with pytest.raises(RuntimeError, match="its weight has Kronecker factors, but was used in a way"):
        plain_step(optimizer, lambda: F.cross_entropy(model(many(2, 4)), y))
