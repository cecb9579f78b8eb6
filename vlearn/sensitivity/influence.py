"""Influence of training examples on other examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from vlearn._short_repr import ShortRepr
from vlearn.collectives import joined_rows, process_count, told_by_all
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.protocol import Posterior, match
from vlearn.linearized.batches import Batch, batches, with_progress_bar
from vlearn.linearized.gauss_newton import GaussNewton, check_steps
from vlearn.linearized.inner_products import BlockParameters, Directions, InnerProducts, joined
from vlearn.linearized.jacobian_products import jacobian_vector_product
from vlearn.linearized.linearization import Linearization, at_mean, linearize
from vlearn.linearized.numbering import SamePasses
from vlearn.linearized.processes import Fingerprint, Processes, same_network, whole_network
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.record.example_order import example_order
from vlearn.sensitivity.tokens import kept_tokens

DIRECTION_ENTRIES = 2**27  # entries of Σg_j of the test examples that are held at once, 512 MiB of float32
SOLVER_VECTORS = 8  # as many vectors of their size do conjugate gradients hold

By = str | Callable[[str], Any] | None


@dataclass(frozen=True, repr=False)
class Influence(ShortRepr):
    """First-order change of each test example's loss if a training example were removed, on the CPU.

    Attributes:
        values: ``[N_train, N_test]`` g_jᵀΣg_i in the loss's units, positive where training example i helps; with
            top_k the k of largest size for each test example, ``[k, N_test]``, largest first. With per="token" there
            is a row for each token of the training examples that counts.
        train_index: numbers of the training examples, ``[N_train]``, rising; with top_k ``[k, N_test]``.
        test_index: ``[N_test]`` numbers of the test examples.
        parts: with `by`, what each module or group of parameters adds to the values, in their shape; else None.
        position: with per="token", the position in its sequence of each row, in the shape of train_index; else None.
        residual: with `refine`, how near each test example's solution came, ``[N_test]``: √(rᵀΣr) of r = g_j - Hx over
            √(g_jᵀΣg_j); NaN where H was seen not to be positive definite and Σg_j was kept; else None.
        top_k: the k that was asked for, else None.
        seen: the loss of every training example that was gone through, by its number, which `gather` compares.
        network: what tells networks and posteriors apart, likewise; None in a single process.
    """

    values: Tensor
    train_index: Tensor
    test_index: Tensor
    parts: dict[Any, Tensor] | None = None
    position: Tensor | None = None
    residual: Tensor | None = None
    top_k: int | None = None
    seen: dict[int, float] | None = field(default=None, repr=False)
    network: Fingerprint | None = field(default=None, repr=False)

    def gather(self, group: Any = None) -> Influence:
        """The influence of all processes' training examples, each of which has gone through its own share of them.

        All must call it, after the same test examples, and all get the same: what one process has with all training
        data, in the order of their numbers. A process may have no training examples. What comes twice, as a
        DistributedSampler repeats examples to make shares equal, is there once. In a single process it changes nothing.

        Args:
            group: the processes; those of the default group by default.
        Raises:
            ValueError: in all processes, if two of them have different training examples under one number, or other
                test examples, arguments, networks or posteriors; or if `refine` took the curvature of each one's own
                share (pass sync=True to `influence`).

        Where one has failed before, the others wait here as in `SensitivityTable.gather`.
        """
        if process_count() == 1:
            return self
        alone = told_by_all(self.residual is not None, group)
        if any(alone):
            raise ValueError(
                "refine in each process takes the curvature of its own share of the training data: pass sync=True to "
                "influence, which takes that of all."
            )
        return _gathered(self, group)


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
    by: By = None,
    per: str = "example",
    refine: int = 0,
    progress: bool | None = None,
    example_index: ExampleIndex | None = None,
    sync: bool = False,
) -> Influence:
    """How much each training example lowers the loss of each test example: g_jᵀ Σ g_i.

    The first-order change of ℓ_j if training example i were removed (Nickl et al., 2023, arXiv:2310.19273, Eq. 8);
    -1/N times the influence on the loss of Koh and Liang (2017, arXiv:1703.04730), who take the Hessian of the mean
    loss. Of an example on itself it is the self-influence.

    Σg_j is held for a chunk of test examples, for each of which the training data are gone through once: the cost is
    2·N_train·N_test·P operations beside a forward and a backward pass of the training data per chunk. Of a layer at one
    position, under a diagonal or a Kronecker posterior, I + O numbers of each test example are held in the place of its
    P = I·O entries; under K-FAC as many operations, a few times, are all that a pair takes
    (`vlearn.linearized.inner_products`).

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move. A copy of the
            model that it was learned by is matched by names, at weights of its own, see `vlearn.posterior.load`.
        train_loader: yields batches as for `vlearn.sweep`, every example once and the same each time it is iterated.
        test_loader: the same, iterated once.
        loss_fn: the training loss, as for `vlearn.sweep`; taken of the test examples too.
        top_k: keep only the k training examples of largest influence, by size, on each test example; then nothing of
            size N_train x N_test is held.
        chunk: number of test examples at a time; default as many as fit 2²⁷ entries of what is held of Σg_j.
        by: also give what each module adds, by its name: "module"; or each group of parameters, by a function from a
            parameter's name to that of its group. A parameter that is used by several modules counts for the first.
        per: "example" (a sequence is one), or "token": one row for each position of a training example whose target is
            not ignored, as if that token's loss alone were removed. Summed over an example's tokens it is the example's
            value where the loss sums over positions, and T times that where it averages T of them. Each test example
            then takes a forward-mode pass of the training data, in the place of its inner products.
        refine: take H⁻¹g_j in the place of Σg_j, by so many steps of conjugate gradients that Σ preconditions, each of
            which goes through the training data once for a chunk of test examples; H = N·GGN + δ is the curvature of
            the examples of train_loader, N times their mean, with the posterior's num_data and prior precision. It
            needs a Σ without training time.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        example_index: which example each row of concatenated inputs is of, as for `vlearn.sweep`.
        sync: the training data are those of all processes of torch.distributed, where the train_loader of each gives
            its own share, as by an `UnrepeatedDistributedSampler`, and the test_loader the same examples in all. All
            must call it, and all get the influence of all, see `Influence.gather`; `refine` takes the curvature of all.
            Some may have fewer training batches, or none. Without it, the rows are those of this process's own loader.
    Returns:
        Values with the numbers of their examples.
    Raises:
        TypeError: if an argument is of another kind, as an optimizer in place of its posterior.
        ValueError: if an argument breaks its rule, the posterior belongs to another model, the examples cannot be
            numbered, or the training loader gives one twice, or others when it is iterated again; if `by` divides
            parameters that Σ correlates, or is joined with what has no parts; if `refine` does not know the prior; if
            the processes differ in more than their training data.
        RuntimeError: if the examples of a batch have no gradient of their own, or it failed in another process.
    """
    model, posterior = whole_network(model, posterior)
    processes = Processes(model, sync, "influence")
    model = processes.model
    progress = progress if progress is not None or processes.rank == 0 else False

    def settings() -> dict[str, Any]:
        _check(top_k, chunk, by, per, refine)
        if refine:
            GaussNewton.check(posterior)
        named = {"top_k": top_k, "chunk": chunk, "per": per, "refine": refine}
        return named | {"by": "callable" if callable(by) else by}

    def own(stack: ExitStack) -> Influence:
        losses = ExampleLoss(loss_fn)
        row_losses = losses if per == "example" else ExampleLoss(loss_fn, per)
        covariance = stack.enter_context(at_mean(model, posterior))
        group_of = None if by is None else _groups(by, match(model, posterior), covariance)
        products = InnerProducts(covariance)

        def train_batches() -> Iterator[Batch]:
            given = batches(train_loader, model, example_index)
            yield from with_progress_bar(given, train_loader, progress, "influence")

        curvature, passes = None, SamePasses()
        if refine:
            of_examples = passes if per == "example" else None  # a sequence's loss is the mean of its tokens' losses
            curvature = GaussNewton(
                model, posterior, covariance, train_batches, losses, processes=processes, passes=of_examples
            )

        def directions() -> Iterator[tuple[Directions, Tensor | None]]:
            """(Σg_j or H⁻¹g_j, residual of the solution) of one chunk of test examples after the other."""
            held: list[Directions] = []
            limit = DIRECTION_ENTRIES // (SOLVER_VECTORS if refine else 1)
            for batch in batches(test_loader, model, example_index):
                lin = linearize(model, covariance, batch, losses)
                parts = _gradients(lin, chunk) if curvature else _directions(products, lin, chunk, per == "token")
                for part in parts:
                    size = chunk or max(1, limit * len(part) // max(1, part.entries))
                    if held and sum(map(len, held)) + len(part) > size:
                        yield _solved(curvature, joined(held), refine, processes)
                        held = []
                    held.append(part)
            if held:
                yield _solved(curvature, joined(held), refine, processes)

        columns: list[_Best | _All] = []
        test_index: list[Tensor] = []
        residuals: list[Tensor] = []
        for of_test, residual in directions():
            column = _All() if top_k is None else _Best(top_k)
            for batch in train_batches():
                lin = linearize(model, covariance, batch, row_losses, second_order=per == "token")
                passes.add(batch.index, lin.loss if per == "example" else lin.loss.sum(1))
                if per == "token":
                    column.add(*_token_rows(lin, of_test))
                    continue
                for examples, parts in products.of(lin.backprop_residuals(last=True), of_test):
                    numbers = batch.index[examples]
                    column.add(numbers.unsqueeze(1), _by_group(parts, group_of, len(numbers), of_test, covariance))
            passes.end()
            columns.append(column)
            test_index.append(of_test.index)
            residuals += [] if residual is None else [residual]
        may_be_empty = process_count() > 1 and not isinstance(train_loader, Iterator)
        if not columns or not (passes.losses or may_be_empty):
            raise ValueError("a loader gave no batch: pass one that can be iterated again.")
        tests = torch.cat(test_index)
        if passes.losses:
            values, labels = _beside(columns)
        else:
            names = 0 if group_of is None else len(set(group_of.values()))
            values = covariance.zeros(0).cpu().reshape(1 + names, 0, len(tests))
            shape = (0, 1 + (per == "token")) if top_k is None else (0, len(tests), 1 + (per == "token"))
            labels = torch.empty(shape, dtype=torch.long, device="cpu")
        return Influence(
            values=values[0],
            train_index=labels[..., 0],
            test_index=tests,
            parts=None if group_of is None else dict(zip(dict.fromkeys(group_of.values()), values[1:], strict=True)),
            position=labels[..., 1] if per == "token" else None,
            residual=torch.cat(residuals) if refine else None,
            top_k=top_k,
            seen=passes.losses,
            network=Fingerprint.of(model, covariance) if process_count() > 1 else None,
        )

    with processes.alike(settings), ExitStack() as stack:
        found = processes.agreed(partial(own, stack))
        return found if processes.group is None else _gathered(found, processes.group)


def _check(top_k: int | None, chunk: int | None, by: By, per: str, refine: int) -> None:
    for name, value in (("top_k", top_k), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}, but it must be positive: leave it out for the default.")
    if not (by is None or by == "module" or callable(by)):
        raise ValueError(
            f"by={by!r}, but it must be 'module' or a function from a parameter's name to that of its group: use "
            "'module'."
        )
    if per not in ("example", "token"):
        raise ValueError(f"per={per!r}, but it must be 'example' or 'token': use 'example'.")
    check_steps("refine", refine)
    if by is not None and (per == "token" or refine):
        also = "per='token'" if per == "token" else "refine, whose H correlates all modules"
        raise ValueError(f"by with {also}: ask for one of them at a time.")


def _groups(by: By, parameters: dict[str, nn.Parameter], covariance: Covariance) -> dict[Tensor, Any]:
    """The group of each parameter that requires grad.

    Raises:
        ValueError: if a block of Σ has parameters of two groups.
    """
    names: dict[Tensor, str] = {p: name for name, p in parameters.items() if p.requires_grad}
    group_of = {p: by(name) if callable(by) else name.rpartition(".")[0] for p, name in names.items()}
    for whole, _ in covariance.blocks:
        block = [p for p in whole if p in group_of]
        other = next((p for p in block if group_of[p] != group_of[block[0]]), None)
        if other is not None:
            raise ValueError(
                f"the posterior correlates {names[block[0]]!r} with {names[other]!r}, which `by` puts into two groups "
                f"({group_of[block[0]]!r} and {group_of[other]!r}): neither has a share of its own. Put them into one, "
                "or pass a posterior of independent layers."
            )
    return group_of


def _directions(products: InnerProducts, lin: Linearization, limit: int | None, dense: bool) -> Iterator[Directions]:
    """Σg_j of a batch of test examples."""
    for part in products.directions(lin.backprop_residuals(last=True), lin.batch.index, limit):
        for block in list(part.rank_one) if dense else ():
            part.hold_dense(block)
        yield part


def _gradients(lin: Linearization, limit: int | None) -> Iterator[Directions]:
    """g_j of a batch of test examples, which are to be solved for."""
    for examples, gradients in lin.example_gradients(limit):
        yield Directions(lin.batch.index[examples], gradients)


def _solved(
    curvature: GaussNewton | None, held: Directions, steps: int, processes: Processes
) -> tuple[Directions, Tensor | None]:
    """(H⁻¹g_j, its residual), or the directions as they are where there is no curvature."""
    if curvature is None:
        return held, None
    tests = processes.each(lambda: held.index.tolist())
    if any(numbers != tests[0] for numbers in tests):
        raise ValueError("the processes have other test examples: give all of them the same test_loader.")
    solution = curvature.solve(held.dense, steps)
    residual = torch.where(solution.indefinite, torch.nan, solution.residual)
    return Directions(held.index, solution.x), residual.cpu()


def _token_rows(lin: Linearization, of_test: Directions) -> tuple[Tensor, Tensor]:
    """(number and position ``[rows, 2]``, influence ``[1, rows, m]``) of the tokens of a batch that count."""
    kept = kept_tokens(lin)
    columns = []
    for j in range(len(of_test)):
        changes = jacobian_vector_product(lin, {p: v[j] for p, v in of_test.dense.items() if p in lin.weights})
        columns.append(lin.loss_change(changes)[kept])
    examples, positions = kept.cpu().nonzero().unbind(1)
    return torch.stack([lin.batch.index[examples], positions], 1), torch.stack(columns, 1).unsqueeze(0)


def _by_group(
    parts: Sequence[tuple[BlockParameters, Tensor]],
    group_of: dict[Tensor, Any] | None,
    count: int,
    of_test: Directions,
    covariance: Covariance,
) -> Tensor:
    """``[1 + groups, n, m]``: the sum of the parts of all parameters, then that of each group."""
    names = [] if group_of is None else list(dict.fromkeys(group_of.values()))
    values = covariance.zeros(count * len(of_test) * (1 + len(names))).reshape(1 + len(names), count, -1)
    for block, part in parts:
        values[0] += part
        if group_of is not None:
            values[1 + names.index(group_of[block[0]])] += part
    return values


class _All:
    """Rows of all training examples, in the order of their numbers."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, labels: Tensor, values: Tensor) -> None:
        """Add rows: labels ``[n, L]`` that begin with the example's number, values ``[1 + groups, n, m]``."""
        self._labels.append(labels)
        self._values.append(values.cpu())

    def result(self) -> tuple[Tensor, Tensor]:
        """(values ``[1 + groups, N, m]``, labels ``[N, L]``); what was added is given up."""
        labels = torch.cat(self._labels)
        order = labels[:, 0].argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu")
        first, start = self._values[0], 0
        values = first.new_empty(len(first), len(order), first.shape[2])
        self._values.reverse()
        while self._values:  # nothing is held twice for long
            part = self._values.pop()
            values[:, place[start : start + part.shape[1]]] = part
            start += part.shape[1]
        return values, labels[order]


class _Best:
    """Rows of the k training examples of largest size, for each test example."""

    def __init__(self, count: int):
        self._count = count
        self._labels: Tensor | None = None
        self._values: Tensor | None = None

    def add(self, labels: Tensor, values: Tensor) -> None:
        """Add rows, as for `_All`."""
        labels = labels.to(values.device).unsqueeze(1).expand(-1, values.shape[2], -1)
        if self._values is not None and self._labels is not None:
            labels, values = torch.cat([self._labels, labels]), torch.cat([self._values, values], 1)
        best = values[0].abs().topk(min(self._count, values.shape[1]), 0).indices
        self._labels = labels.gather(0, best.unsqueeze(2).expand(-1, -1, labels.shape[2]))
        self._values = values.gather(1, best.expand(len(values), -1, -1))

    def result(self) -> tuple[Tensor, Tensor]:
        """(values ``[1 + groups, k, m]``, labels ``[k, m, L]``)."""
        assert self._values is not None and self._labels is not None
        return self._values.cpu(), self._labels.cpu()


def _beside(columns: Sequence[_All | _Best]) -> tuple[Tensor, Tensor]:
    """Values and labels of all chunks of test examples, side by side; labels of all rows are the same in each."""
    found = [column.result() for column in columns]
    values, labels = found[0]
    if len(found) > 1:
        values = torch.cat([each for each, _ in found], 2)
        labels = labels if labels.dim() == 2 else torch.cat([each for _, each in found], 1)
    return values, labels


def _gathered(own: Influence, group: Any) -> Influence:
    """See `Influence.gather`."""
    parts = None if own.parts is None else list(own.parts)
    asked = own.test_index.tolist(), own.top_k, parts, own.position is not None, own.values.dtype
    told = told_by_all((asked, own.seen or {}, own.network), group)
    if any(each != told[0][0] for each, _, _ in told):
        raise ValueError(
            "the processes have asked for the influence on other test examples, or in other ways: give all of them the "
            "same test_loader and arguments."
        )
    network = same_network([network for _, _, network in told], "gone through")
    seen, repeated = _once([losses for _, losses, _ in told])
    is_repeated = torch.isin(
        own.train_index, torch.tensor(repeated[distributed.get_rank(group)], dtype=torch.long, device="cpu")
    )
    labels = own.train_index.unsqueeze(-1)
    labels = labels if own.position is None else torch.stack([own.train_index, own.position], -1)
    rows = torch.stack([own.values, *(own.parts or {}).values()], 1)  # [N, 1 + groups, M]
    if own.top_k is None:
        labels, rows = labels[~is_repeated], rows[~is_repeated]
    else:
        labels = labels.masked_fill(is_repeated.unsqueeze(-1), -1)
    counts = told_by_all(len(rows), group)
    labels, rows = joined_rows(labels, counts, group), joined_rows(rows, counts, group)
    if own.top_k is None:
        order = labels[:, 0].argsort(stable=True)
        labels, rows = labels[order], rows[order]
    else:
        size = rows[:, 0].abs().masked_fill(labels[..., 0] < 0, -1.0)
        best = size.topk(min(own.top_k, int((size >= 0).sum(0).min())), 0).indices
        labels = labels.gather(0, best.unsqueeze(-1).expand(-1, -1, labels.shape[2]))
        rows = rows.gather(0, best.unsqueeze(1).expand(-1, rows.shape[1], -1))
    return replace(
        own,
        values=rows[:, 0],
        train_index=labels[..., 0],
        parts=None if parts is None else {name: rows[:, 1 + i] for i, name in enumerate(parts)},
        position=None if own.position is None else labels[..., 1],
        seen=seen,
        network=network,
    )


def _once(told: list[dict[int, float]]) -> tuple[dict[int, float], list[list[int]]]:
    """(losses of all processes' examples by number, the numbers that each has after an earlier process).

    Raises:
        ValueError: if there are none, or two processes have different examples under one number.
    """
    if not any(told):
        raise ValueError("a loader gave no batch in any process: pass one that can be iterated again.")
    index = np.concatenate([np.fromiter(losses.keys(), np.int64, len(losses)) for losses in told])
    loss = np.concatenate([np.fromiter(losses.values(), np.float64, len(losses)) for losses in told])
    source = np.repeat(np.arange(len(told)), [len(losses) for losses in told])
    order = example_order(index, loss, source, [f"process {rank}" for rank in range(len(told))])
    first = np.zeros(len(index), bool)
    first[order] = True
    repeated = [index[(source == rank) & ~first].tolist() for rank in range(len(told))]
    return dict(zip(index[order].tolist(), loss[order].tolist(), strict=True)), repeated
