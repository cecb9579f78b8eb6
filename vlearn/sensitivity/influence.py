"""Influence of training examples on other examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.gaussians.protocol import Posterior
from vlearn.linearized.batches import Batch, batches, with_progress_bar
from vlearn.linearized.linearization import at_mean, linearize
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.per_example.measured_rows import ExampleIndex

DIRECTION_ENTRIES = 2**27  # entries of Σg_j of the test examples that are held at once, 512 MiB of float32

Vectors = dict[Tensor, Tensor]  # by parameter ``[m, *shape]``


@dataclass(frozen=True)
class Influence:
    """First-order change of each test example's loss if a training example were removed, on the CPU.

    Attributes:
        values: ``[N_train, N_test]`` g_jᵀΣg_i in the loss's units, positive where training example i helps; with
            top_k the k of largest size for each test example, ``[k, N_test]``, largest first.
        train_index: numbers of the training examples, ``[N_train]``, rising; with top_k ``[k, N_test]``.
        test_index: ``[N_test]`` numbers of the test examples.
    """

    values: Tensor
    train_index: Tensor
    test_index: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def influence(
    model: nn.Module,
    posterior: Posterior,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    loss_fn: LossFunction,
    *,
    top_k: int | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
    example_index: ExampleIndex | None = None,
) -> Influence:
    """How much each training example lowers the loss of each test example: g_jᵀ Σ g_i.

    The first-order change of ℓ_j if training example i were removed (Nickl et al., 2023, arXiv:2310.19273, Eq. 8);
    -1/N times the influence on the loss of Koh and Liang (2017, arXiv:1703.04730), who take the Hessian of the mean
    loss. Of an example on itself it is the self-influence.

    Σg_j is held for a chunk of test examples, for each of which the training data are gone through once: the cost is
    2·N_train·N_test·P operations beside a forward and a backward pass of the training data per chunk.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move.
        train_loader: yields batches as for `vlearn.sweep`, every example once and the same each time it is iterated.
        test_loader: the same, iterated once.
        loss_fn: the training loss, as for `vlearn.sweep`; taken of the test examples too.
        top_k: keep only the k training examples of largest influence, by size, on each test example; then nothing of
            size N_train x N_test is held.
        chunk: number of test examples at a time; default as many as fit 2²⁷ entries of the parameters' size.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        example_index: which example each row of concatenated inputs is of, as for `vlearn.sweep`.
    Returns:
        Values with the numbers of their examples.
    Raises:
        ValueError: if an argument breaks its rule, the posterior belongs to another model, the examples cannot be
            numbered, or the training loader gives one twice, or others when it is iterated again.
        RuntimeError: if the examples of a batch have no gradient of their own.
    """
    for name, value in (("top_k", top_k), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}, but it must be positive: leave it out for the default.")
    losses = ExampleLoss(loss_fn)
    columns: list[_Best | _All] = []
    test_index: list[Tensor] = []
    first: _Pass | None = None
    with at_mean(model, posterior) as covariance:

        def gradients(batch: Batch, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor, Vectors]]:
            lin = linearize(model, covariance, batch, losses)
            for examples, of_examples in lin.example_gradients(limit):
                yield lin.batch.index[examples], lin.loss[examples].cpu(), of_examples

        def directions() -> Iterator[tuple[Tensor, Vectors]]:
            """Σg_j of one chunk of test examples after the other."""
            held: list[tuple[Tensor, Vectors]] = []
            for batch in batches(test_loader, model, example_index):
                for index, _, of_examples in gradients(batch, chunk):
                    size = chunk or max(1, DIRECTION_ENTRIES // sum(v[0].numel() for v in of_examples.values()))
                    if held and sum(len(i) for i, _ in held) + len(index) > size:
                        yield _joined(held)
                        held = []
                    moved = covariance.multiply(of_examples)
                    held.append((index, {p: moved[p] for p in of_examples}))
            if held:
                yield _joined(held)

        for index, moved in directions():
            now, column = _Pass(), _All() if top_k is None else _Best(top_k)
            for batch in with_progress_bar(
                batches(train_loader, model, example_index), train_loader, progress, "influence"
            ):
                for numbers, loss, of_examples in gradients(batch):
                    now.add(numbers, loss)
                    column.add(numbers, _inner(of_examples, moved))
            first = now if first is None else now.check_same(first)
            columns.append(column)
            test_index.append(index)
    if first is None or not first.losses:
        raise ValueError("a loader gave no batch: pass one that can be iterated again.")
    parts = [column.result(sorted(first.losses)) for column in columns]
    values = torch.cat([values for values, _ in parts], 1)
    rows = parts[0][1] if top_k is None else torch.cat([rows for _, rows in parts], 1)
    return Influence(values, rows, torch.cat(test_index))


class _Pass:
    """The training examples of one pass with their losses, to see that each pass has the same."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def add(self, numbers: Tensor, loss: Tensor) -> None:
        for i, value in zip(numbers.tolist(), loss.tolist(), strict=True):
            if i in self.losses:
                raise ValueError(
                    f"the training loader gave example {i} twice: use one that gives every example once, without "
                    "replacement and without filling up the last batch."
                )
            self.losses[i] = value

    def check_same(self, first: _Pass) -> _Pass:
        same = self.losses.keys() == first.losses.keys()
        values = torch.tensor(
            [[first.losses[i], self.losses[i]] for i in first.losses] if same else [[0.0, 1.0]], device="cpu"
        )
        if not torch.allclose(*values.unbind(1), rtol=1e-3, atol=1e-3 * float(values.abs().mean())):
            raise ValueError(
                "the training loader gave other examples when it was iterated again: turn shuffling and random "
                "augmentation off (or wrap the dataset in vlearn.IndexedDataset), and pass a loader, not an iterator."
            )
        return first


@dataclass
class _All:
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, numbers: Tensor, values: Tensor) -> None:
        self.parts.append((numbers, values.cpu()))

    def result(self, order: list[int]) -> tuple[Tensor, Tensor]:
        row_of = {i: row for row, i in enumerate(torch.cat([numbers for numbers, _ in self.parts]).tolist())}
        rows = torch.tensor([row_of[i] for i in order], device="cpu")
        return torch.cat([values for _, values in self.parts])[rows], torch.tensor(order, device="cpu")


@dataclass
class _Best:
    count: int
    numbers: Tensor | None = None
    values: Tensor | None = None

    def add(self, numbers: Tensor, values: Tensor) -> None:
        numbers = numbers.to(values.device).unsqueeze(1).expand_as(values)
        if self.values is not None and self.numbers is not None:
            numbers, values = torch.cat([self.numbers, numbers]), torch.cat([self.values, values])
        best = values.abs().topk(min(self.count, len(values)), 0).indices
        self.numbers, self.values = numbers.gather(0, best), values.gather(0, best)

    def result(self, order: list[int]) -> tuple[Tensor, Tensor]:
        assert self.values is not None and self.numbers is not None
        return self.values.cpu(), self.numbers.cpu()


def _joined(held: list[tuple[Tensor, Vectors]]) -> tuple[Tensor, Vectors]:
    if len(held) == 1:
        return held[0]
    parameters = dict.fromkeys(p for _, moved in held for p in moved)
    return torch.cat([index for index, _ in held]), {
        p: torch.cat([moved[p] if p in moved else p.new_zeros(len(i), *p.shape) for i, moved in held])
        for p in parameters
    }


def _inner(gradients: Vectors, directions: Vectors) -> Tensor:
    """⟨g_i, Σg_j⟩ ``[n, m]``."""
    products = [_rows(gradients[p]) @ _rows(directions[p]).mT for p in gradients if p in directions]
    return torch.stack(products).sum(0)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)
