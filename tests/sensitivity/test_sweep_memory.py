"""A sweep's memory is some multiple of one example's output, whatever the batch and however many examples there are."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from vlearn.losses import output_hessian
from vlearn.posterior import Diagonal
from vlearn.sensitivity import SensitivityTable
from vlearn.sensitivity.table import COLUMNS

N, LENGTH, VOCABULARY = 7, 4, 11
sweep = importlib.import_module("vlearn.sensitivity.sweep")


class LanguageModel(nn.Module):
    """An embedding, a layer, a head; or a model whose examples see one another."""

    def __init__(self, vocabulary: int, features: int, is_coupled: bool = False):
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(vocabulary, features), nn.Linear(features, features)
        self.head, self.is_coupled = nn.Linear(features, vocabulary), is_coupled

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.hidden(self.tokens(x)).tanh()
        return self.head(h - h.mean(0) if self.is_coupled else h)


def of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.mT, target, reduction="none")


def posterior_of(model: nn.Module) -> Diagonal:
    mean: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    return Diagonal.from_precision(mean, {name: 1e3 + p.square() for name, p in mean.items()}, num_data=N)


def swept(batch_size: int = N, is_coupled: bool = False, **options: Any) -> SensitivityTable:
    torch.manual_seed(0)
    model = LanguageModel(VOCABULARY, 5, is_coupled).double()
    data = TensorDataset(torch.randint(VOCABULARY, (N, LENGTH)), torch.randint(VOCABULARY, (N, LENGTH)))
    loader = DataLoader(data, batch_size=batch_size)
    return vlearn.sweep(model, posterior_of(model), loader, of_tokens, progress=False, **options)


def assert_equal(table: SensitivityTable, other: SensitivityTable) -> None:
    for name in COLUMNS:
        a, b = getattr(table, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("limit", [1, 1.5, 2, 3, 6])
@pytest.mark.parametrize("options", [{"leverage": "exact"}, {"per": "token", "leverage": None}], ids=["exact", "token"])
def test_outputs_that_are_too_large_are_swept_in_parts(
    monkeypatch: pytest.MonkeyPatch, limit: float, options: dict[str, Any]
) -> None:
    expected = swept(**options).gather()
    sizes: list[int] = []

    def counted(*args: Any, **given: Any) -> Any:
        lin = linearize(*args, **given)
        sizes.append(len(lin.batch.index))
        return lin

    linearize = sweep.linearize
    monkeypatch.setattr(sweep, "linearize", counted)
    monkeypatch.setattr(sweep, "OUTPUT_ENTRIES", int(limit * LENGTH * VOCABULARY))
    assert_equal(swept(**options).gather(), expected)
    assert max(sizes) == int(limit) and sum(sizes) == N
    sizes.clear()
    assert_equal(swept(batch_size=2, **options).gather(), expected)
    assert max(sizes) == min(int(limit), 2)


def test_parts_of_coupled_examples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="depends on the other examples|see one another|other examples"):
        swept(is_coupled=True, leverage=None)
    monkeypatch.setattr(sweep, "OUTPUT_ENTRIES", 1)
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        swept(is_coupled=True, leverage=None)


class WithPlaces(LanguageModel):
    """Adds to its embeddings a table of places that is given to it."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        h = self.tokens(x) + places
        return self.head(h + self.hidden(h).tanh())


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("sizes", [[LENGTH], [N + 2, LENGTH]])
def test_parts_of_an_input_that_all_examples_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], limit: int
) -> None:
    torch.manual_seed(0)
    model = WithPlaces(VOCABULARY, 5).double()
    tokens, places = torch.randint(VOCABULARY, (sum(sizes), LENGTH)), torch.randn(LENGTH, 5).double()
    loader = [((part, places), part) for part in tokens.split(sizes)]
    options: dict[str, Any] = {"leverage": None, "progress": False}
    whole = vlearn.sweep(model, posterior_of(model), loader, lambda o, t: of_tokens(o, t).mean(1), **options)
    assert bool(whole.self_influence.isfinite().all())
    monkeypatch.setattr(sweep, "OUTPUT_ENTRIES", limit * LENGTH * VOCABULARY)
    with pytest.raises(RuntimeError, match="expand it to a row for each example"):
        vlearn.sweep(model, posterior_of(model), loader, lambda o, t: of_tokens(o, t).mean(1), **options)


class WithAuxiliary(LanguageModel):
    """Beside its scores it gives a number for the whole batch, as a mixture of experts does, which no loss reads."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.head.weight.square().mean()


def test_parts_of_several_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "OUTPUT_ENTRIES", 3 * LENGTH * VOCABULARY)
    torch.manual_seed(0)
    model = WithAuxiliary(VOCABULARY, 5).double()
    x, y = torch.randint(VOCABULARY, (N, LENGTH)), torch.randint(VOCABULARY, (N, LENGTH))
    options: dict[str, Any] = {"leverage": None, "output": 0, "progress": False}
    table = vlearn.sweep(model, posterior_of(model), [(x, y)], lambda o, t: of_tokens(o[0], t).mean(1), **options)
    assert_equal(table, swept(leverage=None))


@pytest.mark.parametrize("entries", [1, 10, 100])
def test_a_probe_in_pieces_is_the_probe(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    random = [torch.Generator().manual_seed(4) for _ in range(2)]
    expected = swept(generator=random[0]).leverage
    monkeypatch.setattr(output_hessian, "PIECE_ENTRIES", entries)
    torch.testing.assert_close(swept(generator=random[1]).leverage, expected, rtol=1e-12, atol=1e-12)


PEAK = """
import resource, torch, vlearn
from torch.utils.data import DataLoader, TensorDataset
from tests.sensitivity.test_sweep_memory import LanguageModel, of_tokens, output_hessian, posterior_of, sweep
torch.set_num_threads(1)
torch.manual_seed(0)
sweep.OUTPUT_ENTRIES //= {smaller}
output_hessian.PIECE_ENTRIES //= {smaller}


# What a sweep adds to the peak, which never falls, in units of an example's output.
def swept(count, batch_size, length, vocabulary):
    model = LanguageModel(vocabulary, 8)
    data = TensorDataset(torch.randint(vocabulary, (count, length)), torch.randint(vocabulary, (count, length)))
    posterior, loader = posterior_of(model), DataLoader(data, batch_size=batch_size)
    before = peak()
    vlearn.sweep(model, posterior, loader, of_tokens, {leverage!r}, progress=False, deviation=None)
    return (peak() - before) / (4 * length * vocabulary / 1024)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


swept(2, 2, 3, 5)  # what the first one imports
one = swept(1, 1, 256, (2**16 + 2**12) // {smaller})
print(one, one + swept(4, 2, 256, (2**16 + 2**12) // {smaller}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count in other units")
@pytest.mark.parametrize(("leverage", "limit"), [(None, 12), ("probe", 18)])
def test_peak_memory_is_that_of_one_large_output(leverage: str | None, limit: int) -> None:
    """A sequence's output of 4 million entries, in units of itself, where a batch's may have no more."""
    script = PEAK.format(leverage=leverage, smaller=4)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # else the C library keeps what is freed
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    one, more = map(float, ran.stdout.split())
    assert one < limit
    assert more < max(one, 3.0) + 2, "but for the forward pass of a batch, no more than of one"
