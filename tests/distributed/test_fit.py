"""Fits over several processes are those of one with all the data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.distributed.problems import refusal
from tests.distributed.ranks import Ranks
from tests.pairs import pairs
from vlearn.gaussians.gaussian import Gaussian
from vlearn.posterior.fit import STRUCTURES, fit

pytestmark = pytest.mark.slow
CLASSES = 3
# Which of the six batches each of two processes has.
SHARES = {"equal": ([0, 1, 2], [3, 4, 5]), "fewer": ([0, 1, 2, 3, 4], [5]), "none": ([0, 1, 2, 3, 4, 5], [])}


class Branches(nn.Module):
    """A layer that only some batches go through, a scale that has no factors, and one parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.even, self.odd = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.norm, self.last = nn.LayerNorm(5), nn.Linear(5, CLASSES)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x[:, :4]).tanh()
        h = self.even(h) if x.shape[1] == 4 else self.odd(h)
        return self.last(self.norm(h.tanh()))


def network() -> Branches:
    torch.manual_seed(1)
    return Branches().double()


def data() -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 and of 3 examples by turns, of 4 and of 5 features."""
    random = torch.Generator().manual_seed(2)
    sizes = [(4, 4), (3, 5)] * 3
    return [
        (torch.randn(size, generator=random, dtype=torch.float64), torch.randint(CLASSES, size[:1], generator=random))
        for size in sizes
    ]


def fit_on(rank: int, structure: str, share: str, wrapped: bool, settings: dict[str, Any]) -> Any:
    inner = network()
    before = copy.deepcopy(inner.state_dict())
    model = DistributedDataParallel(inner, find_unused_parameters=True) if wrapped else inner
    batches = [data()[k] for k in SHARES[share][rank]]
    posterior = fit(model, batches, F.cross_entropy, structure, progress=False, sync=True, **settings)
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items()) and inner.training
    return posterior.state()


def same(one: Any, other: Any) -> bool:
    """Bit for bit, with the same names in the same order."""
    (these, structure), (those, its) = tree_flatten(one), tree_flatten(other)
    equal = (torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(these, those, strict=True))
    return structure == its and all(equal)


def covariance(posterior: Gaussian) -> Tensor:
    """Σ ``[P, P]``, in the order of the parameters' names."""
    model = network()
    named: dict[str, Tensor] = {name: p for name, p in sorted(model.named_parameters()) if name in posterior.groups}
    sizes = [p.numel() for p in named.values()]
    rows = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    given: dict[Tensor, Tensor] = {p: part.reshape(-1, *p.shape) for p, part in zip(named.values(), rows, strict=True)}
    moved = posterior.covariance(named).multiply(given)
    return torch.cat([moved[p].flatten(1) for p in named.values()], 1)


@pytest.mark.parametrize(
    ("structure", "share", "curvature"), pairs(STRUCTURES, list(SHARES), ["ggn-exact", "empirical"])
)
def test_two_processes_fit_what_one_does(ranks: Ranks, structure: str, share: str, curvature: str) -> None:
    settings: Any = {"curvature": curvature, "prior_precision": "marginal-likelihood"}
    first, second = ranks(fit_on, structure, share, share == "fewer", settings)
    assert same(first, second)

    alone = fit(network(), data(), F.cross_entropy, structure, progress=False, **settings)
    together = Gaussian.from_state(first)
    assert together.num_data == alone.num_data == 21
    for name, value in alone.prior_precision.items():
        assert together.prior_precision[name] == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(covariance(together), covariance(alone), rtol=1e-10, atol=1e-10)


def probes(rank: int) -> Any:
    """Both processes have the same batch and the same seed."""
    found, model = [], network()
    for sync, generator in ((False, None), (True, None), (True, torch.Generator().manual_seed(5))):
        torch.manual_seed(5)
        settings: Any = {"sync": sync, "generator": generator, "progress": False}
        found.append(fit(model, data()[:1], F.cross_entropy, "full", **settings).state())
    return found


def test_probes_differ_between_processes(ranks: Ranks) -> None:
    (apart, both, seeded), (other, *others) = ranks(probes)
    assert same(apart, other), "each fits its own"
    assert same(both, others[0]) and same(both, seeded) and same(both, others[1])

    def rank_of_curvature(state: Any) -> int:
        return int((torch.linalg.eigvalsh(covariance(Gaussian.from_state(state))) < 1 - 1e-9).sum())  # the prior's is 1

    assert rank_of_curvature(apart) == 4, "one direction for each example"
    assert rank_of_curvature(both) > 4


def with_a_sampler(rank: int) -> Any:
    x, y = (torch.cat(parts)[:7] for parts in zip(*data()[::2], strict=True))
    given = TensorDataset(x, y)
    sampler = DistributedSampler(given, shuffle=True)
    loader = DataLoader(given, batch_size=2, sampler=sampler)
    posterior = fit(network(), loader, F.cross_entropy, "diagonal", curvature="empirical", sync=True, progress=False)
    sampler.set_epoch(0)
    return posterior.state(), list(sampler)


def test_what_a_sampler_repeats_counts_twice(ranks: Ranks) -> None:
    (state, first), (other, second) = ranks(with_a_sampler)
    assert same(state, other) and len(first + second) == 8
    x, y = (torch.cat(parts)[first + second] for parts in zip(*data()[::2], strict=True))
    alone = fit(network(), [(x, y)], F.cross_entropy, "diagonal", curvature="empirical", progress=False)
    together = Gaussian.from_state(state)
    assert together.num_data == 8
    torch.testing.assert_close(covariance(together), covariance(alone), rtol=1e-10, atol=1e-12)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()


def fit_after_training(rank: int) -> Any:
    wrapper = DistributedDataParallel(with_batch_norm())
    x, y = data()[2 * rank]
    F.cross_entropy(wrapper(x), y).backward()  # moves each one's running statistics by its own batch
    own = {name: buffer.clone() for name, buffer in wrapper.module.named_buffers()}
    batches = [data()[2 * rank]]
    settings: Any = {"curvature": "empirical", "sync": True, "progress": False}
    state = fit(wrapper, batches, F.cross_entropy, **settings).state()
    kept = all(torch.equal(buffer, own[name]) for name, buffer in wrapper.module.named_buffers())
    refused = refusal(lambda: fit(wrapper.module, batches, F.cross_entropy, **settings))
    nested = refusal(lambda: fit(nn.Sequential(wrapper), batches, F.cross_entropy, **settings))
    return own, state, kept, refused, nested


def test_batch_norm_has_the_statistics_of_the_first_process(ranks: Ranks) -> None:
    (own, state, *messages), (others, other, *_) = ranks(fit_after_training)
    assert not torch.equal(own["1.running_mean"], others["1.running_mean"]) and same(state, other)
    assert messages[0] and "the buffer '1.running_mean' differs" in messages[1] and "pass that module" in messages[2]
    model = with_batch_norm()
    model.load_state_dict(own, strict=False)
    alone = fit(model, data()[0:4:2], F.cross_entropy, curvature="empirical", progress=False)
    for name, value in alone.variance.items():
        torch.testing.assert_close(Gaussian.from_state(state).variance[name], value, rtol=1e-10, atol=1e-12)


class TwoEnds(nn.Module):
    """The last layer depends on the number of features, or how a weight is used does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.shared, self.even, self.odd = nn.Linear(4, 4), nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        narrow, x = x.shape[1] == 4, x[:, :4]
        if self.how == "uses":
            return self.even(self.shared(x) if narrow else F.linear(x, self.shared.weight))
        return (self.even if narrow else self.odd)(self.shared(x))


def unlike(rank: int, how: str) -> tuple[str, bool]:
    """What a fit of processes that differ says, and whether one of processes that do not still works afterwards."""
    batches: Any = [data()[k] for k in SHARES["equal"][rank]]
    model: nn.Module = network()
    settings: dict[str, Any] = {}
    if how == "weights" and rank == 1:
        model.load_state_dict({name: p + 1e-9 for name, p in model.state_dict().items()})
    elif how == "frozen" and rank == 1:
        model.even.bias.requires_grad_(False)  # type: ignore[union-attr]
    elif how == "argument" and rank == 1:
        settings["draws"] = 2
    elif how == "bad argument" and rank == 1:
        settings["prior_precision"] = -1.0
    elif how == "failing" and rank == 1:
        batches = [batches[0], "no batch"]
    elif how == "exhausted":
        settings["structure"] = "eigenvalue-corrected"
        batches = iter(batches) if rank == 1 else batches
    elif how == "empty":
        batches = []
    elif how in ("layers", "uses"):
        model, batches = TwoEnds(how).double(), [data()[rank]]
        settings["structure"] = "last-layer" if how == "layers" else "kronecker"
    message = refusal(lambda: fit(model, batches, F.cross_entropy, sync=True, progress=False, **settings))
    fit(network(), [data()[0]], F.cross_entropy, sync=True, progress=False)
    return message, model.training


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("weights", "the parameter 'first.weight' differs between the processes", ""),
        ("frozen", "the parameter 'even.bias' differs between the processes", ""),
        ("argument", "draws is 1, 2 in the processes", ""),
        (
            "bad argument",
            "it failed in process 1, by ValueError: the prior precision",
            "the prior precision of 'first.",
        ),
        ("failing", "it failed in process 1, by ValueError: the loader gave", "the loader gave a batch of str"),
        ("exhausted", "the loader gave no batch", ""),
        ("empty", "the loader gave no batch", ""),
        ("layers", "the last layer is that of 'even.weight' in some processes and of 'odd.weight' in others", ""),
        ("uses", "a parameter of shape (4, 4) acts in different ways in the processes", ""),
    ],
)
def test_processes_that_differ_are_told_in_all_and_none_hangs(ranks: Ranks, how: str, first: str, second: str) -> None:
    (message, training), (other, its) = ranks(unlike, how)
    assert first in message and (second or first) in other and training and its


def alone_in_a_group(rank: int) -> Any:
    """The first one fits what both have wrapped, the other does not call it."""
    wrapper = DistributedDataParallel(with_batch_norm())
    if rank == 1:
        return None
    return fit(wrapper, data()[::2], F.cross_entropy, curvature="empirical", progress=False).state()


def test_a_fit_in_one_process_waits_for_no_other(ranks: Ranks) -> None:
    state, _ = ranks(alone_in_a_group)
    alone = fit(with_batch_norm(), data()[::2], F.cross_entropy, curvature="empirical", progress=False)
    assert same(state, alone.state())
