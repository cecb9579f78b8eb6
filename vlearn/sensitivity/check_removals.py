"""Do the predictions of a sensitivity table hold for this model? Train on without some examples, and compare."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlearn._short_repr import ShortRepr
from vlearn.capture.pytrees import Selector
from vlearn.capture.random_state import untouched_random_numbers
from vlearn.gaussians.covariance import Covariance
from vlearn.linearized.batches import batches, with_progress_bar
from vlearn.linearized.linearization import linearize
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.per_example.replay import eval_mode, native_recurrence
from vlearn.sensitivity.agreement import Statistic, pearson, ratio_of_means, slope_through_origin, spearman
from vlearn.sensitivity.table import SensitivityTable

TrainOn = Callable[[nn.Module, Tensor], nn.Module | None]
Estimate = tuple[float, float, float]  # value, and the ends of its 95% interval

RESAMPLED = 2000


@dataclass(frozen=True, repr=False)
class RemovalCheck(ShortRepr):
    """What removing examples has changed, beside what was predicted; all in the loss's units.

    Attributes:
        index: ``[K]`` numbers of the examples that were removed, each once.
        group: ``[K]`` which were removed together.
        predicted: ``[K]`` predicted rise of each one's own loss.
        retrained: ``[K]`` rise of its loss by training on without its group.
        kept_change: root mean square of the changes of the examples that were not removed: noise, and the effect that
            a group has on others, of which `retrained` has as much.
        repeat_change: root mean square over all examples of the differences of two runs that remove nothing.
        num_groups: how many groups there would have been without an interrupt.
        calibrated: whether the predictions have the loss's units, or are only good for an order.
    """

    index: Tensor
    group: Tensor
    predicted: Tensor
    retrained: Tensor
    kept_change: float
    repeat_change: float
    num_groups: int
    calibrated: bool = True

    @property
    def slope(self) -> Estimate:
        """(Slope of the retrained over the predicted changes, through the origin, and its 95% interval).

        Where few examples have nearly all of the effect, they decide it, and the interval is too narrow.
        """
        return self._with_interval(slope_through_origin)

    @property
    def mean_ratio(self) -> Estimate:
        """(Mean retrained over mean predicted change, and its 95% interval): of the predicted generalization gap."""
        return self._with_interval(ratio_of_means)

    @property
    def pearson(self) -> Estimate:
        """(Pearson correlation, and its 95% interval)."""
        return self._with_interval(pearson)

    @property
    def spearman(self) -> Estimate:
        """(Correlation of the ranks, and its 95% interval)."""
        return self._with_interval(spearman)

    @property
    def highest_pearson(self) -> float:
        """The correlation that perfect predictions would have, given the changes of the kept examples.

        A kept example is changed by all m of a group, a removed one by the m - 1 others: what its variance has from
        them is taken to be kept_change²(m - 1)/m. Of examples that are removed alone it is 1.
        """
        variance = float(self.retrained.double().var(correction=0))
        others = 1 - len(self.group.unique()) / len(self.group)
        return math.sqrt(max(0.0, 1 - others * self.kept_change**2 / variance)) if variance else math.nan

    @property
    def verdict(self) -> str:
        """One sentence on how far to trust the numbers."""
        change = float(self.retrained.double().square().mean().sqrt())
        differ = (
            f"two runs that remove nothing differ by {self.repeat_change:.2g} where removals change losses by "
            f"{change:.2g}: let train_on draw the same random numbers in every run, from torch's, numpy's or Python's "
            "global generators"
        )
        if self.repeat_change > 0.5 * change:
            return f"Nothing can be said: {differ}."
        (r, low, high), (slope, least, most) = self.pearson, self.slope
        if not low > 0:
            advice = "the predictions cannot be told from noise: check more groups before you rely on them"
        elif low < 0.5:
            advice = "trust only who is among the most sensitive, not the order"
        elif not self.calibrated:
            advice = "trust the order; the predictions have no scale"
        elif least > 0.8 and most < 1.25:
            advice = "trust order and size"
        elif least > 0:
            advice = f"trust the order, and multiply the sizes by {slope:.2g}"
        else:
            advice = "trust the order, not the sizes"
        if r < self.highest_pearson < 0.9:
            advice += f"; in so noisy a check no correlation could exceed {self.highest_pearson:.2f}"
        if self.repeat_change > 0.1 * change:
            advice += f"; {differ}"
        return (
            f"Over {len(self.index)} removals, correlation {r:.2f} [{low:.2f}, {high:.2f}], slope {slope:.2f} "
            f"[{least:.2f}, {most:.2f}]: {advice}."
        )

    def summary(self, prefix: str = "") -> dict[str, float]:
        """Floats by key, for any logger: slope, mean_ratio, pearson, spearman with _low and _high, and the noise."""
        found: dict[str, float] = {"num_examples": float(len(self.index))}
        for name in ("slope", "mean_ratio", "pearson", "spearman"):
            found |= dict(zip((name, f"{name}_low", f"{name}_high"), getattr(self, name), strict=True))
        for name in ("highest_pearson", "kept_change", "repeat_change"):
            found[name] = getattr(self, name)
        return {prefix + name: value for name, value in found.items()}

    def __str__(self) -> str:
        return self.verdict

    def _with_interval(self, statistic: Statistic) -> Estimate:
        """By a bootstrap over groups, whose members share a run, and over the examples in each."""
        x, y, group = (column.double().numpy() for column in (self.predicted, self.retrained, self.group))
        generator = np.random.default_rng(0)
        names, place, sizes = np.unique(group, return_inverse=True, return_counts=True)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLED)
        weights = np.zeros((RESAMPLED, len(x)))
        for each, size in enumerate(sizes):
            members = generator.multinomial(size * drawn[:, each], np.full(size, 1 / size))
            weights[:, place == each] = members
        values = statistic(x, y, np.concatenate([np.ones((1, len(x))), weights]))
        low, high = np.nanquantile(values[1:], (0.025, 0.975)) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
        return float(values[0]), float(low), float(high)


def check_removals(
    model: nn.Module,
    table: SensitivityTable,
    train_on: TrainOn,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    *,
    groups: int = 20,
    share: float = 0.005,
    seed: int = 0,
    output: Selector = None,
    progress: bool | None = None,
    example_index: ExampleIndex | None = None,
) -> RemovalCheck:
    """Compare what a table predicts with what training on without some examples does.

    A copy of the model is trained on with all examples, twice, and once without each of some random groups, always
    from the same weights and random numbers. The rise of a removed example's loss over that run with all is held
    against the prediction, ``loo_loss - loss``.

    A group goes together, which saves most of the runs. Its members also change one another: by g_iᵀΣg_j, of either
    sign. Where training has ended these add up to nothing over all examples, so that m random others of N change an
    example by -m/N of its own effect on average, which the lower curvature without them makes up for; what is left is
    noise, and the examples that were kept show how much: see `RemovalCheck.highest_pearson`.

    Args:
        model: the network that was trained; left as it was.
        table: what `sweep` says of it, of every example or of some.
        train_on: (copy of the model, keep) -> None, or the model to look at. It trains on, long enough for the loss to
            settle, with those examples alone for which ``keep[number]`` is true (``[N]``, on the CPU). The minibatches
            are to be drawn from all examples and the loss to be divided by the size with those that are not kept, as
            in ``(losses * keep[number]).mean()``, so that all runs see the same and the prior keeps its weight.
        loader: yields all examples of the table, see `sweep`; gone through once after every run.
        loss_fn: the training loss, see `sweep`.
        groups: number of groups, each of which is a run.
        share: of the table's examples in each group.
        seed: of the choice of examples, and of torch's, numpy's and Python's generators before every run.
        output, example_index: see `sweep`.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
    Returns:
        The changes, their agreement with bootstrap intervals, and a verdict. An interrupt from the keyboard ends it
        with what the finished groups have shown, if there is one.
    Raises:
        ValueError: if an argument breaks its rule, the table is of another model, or training changes nothing.
    """
    _check(table, groups, share)
    predicted, calibrated = _predictions(table)
    size = max(1, round(share * len(table)))
    usable = predicted.isfinite().nonzero().flatten()
    if groups * size > len(usable):
        raise ValueError(
            f"{groups} groups of {size} examples are more than the {len(usable)} of the table: use fewer groups, or a "
            "smaller share."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = usable[torch.randperm(len(usable), generator=generator)[: groups * size]].view(groups, size)
    everyone = torch.ones(int(table.index.max()) + 1, dtype=torch.bool)
    runs = [everyone, everyone, *(everyone.index_fill(0, table.index[rows], False) for rows in chosen)]
    losses = ExampleLoss(loss_fn)

    def own_losses(trained: nn.Module) -> Tensor:
        return _own_losses(trained, table.index, batches(loader, trained, example_index), losses, output)

    found: list[Tensor] = []
    with _as_it_was(model), untouched_random_numbers():
        start = own_losses(model)
        _check_same(table, start)
        try:
            for keep in with_progress_bar(iter(runs), runs, progress, "check_removals", "run"):
                _seed_everything(seed)
                found.append(own_losses(_trained_on(train_on, model, keep.clone())))
                _check_run(start, found)
        except KeyboardInterrupt:
            if len(found) < 3:
                raise
    whole, again, *without = found
    changes = [each - whole for each in without]
    chosen = chosen[: len(changes)]
    kept = torch.cat([change[keep[table.index]] for change, keep in zip(changes, runs[2:], strict=False)])
    return RemovalCheck(
        index=table.index[chosen.flatten()],
        group=torch.arange(len(chosen)).repeat_interleave(size),
        predicted=predicted[chosen.flatten()],
        retrained=torch.cat([change[rows] for change, rows in zip(changes, chosen, strict=True)]),
        kept_change=float(kept.square().mean().sqrt()),
        repeat_change=float((again - whole).square().mean().sqrt()),
        num_groups=groups,
        calibrated=calibrated,
    )


def _check(table: SensitivityTable, groups: int, share: float) -> None:
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups={groups!r}, but it must be a positive whole number: use 20.")
    if not 0 < share <= 0.5:
        raise ValueError(f"share={share!r}, but it must be above 0 and at most .5: use .005.")
    if table.position is not None:
        raise ValueError("the table has a row for each token, but examples are removed: sweep with per='example'.")
    if len(table.index.unique()) < len(table.index):
        raise ValueError("the table has an example twice: sweep a loader that gives each once.")


def _trained_on(train_on: TrainOn, model: nn.Module, keep: Tensor) -> nn.Module:
    """A copy of the model after more training.

    Raises:
        ValueError: if the model itself was trained.
        TypeError: if something else than a model came back.
    """
    copied, before = copy.deepcopy(model), _state_of(model)
    with torch.inference_mode(False), torch.enable_grad():
        trained = train_on(copied, keep)
    if not all(torch.equal(own, then) for own, then in zip(_state_of(model), before, strict=True)):
        raise ValueError("train_on has trained the model itself: let it train the copy that it is given.")
    if trained is not None and not isinstance(trained, nn.Module):
        raise TypeError(f"train_on gave a {type(trained).__name__}: let it return nothing, or the model.")
    return copied if trained is None else trained


def _check_run(start: Tensor, found: list[Tensor]) -> None:
    """Raises ValueError where the losses ``[N]`` after each run show that training does not do what it should."""
    if bool((start.isfinite() & ~found[-1].isfinite()).any()):
        raise ValueError("train_on has left losses that are not finite: train on at a lower rate.")
    if len(found) == 1 and torch.equal(found[0], start):
        raise ValueError("train_on has not moved the model: let it train the copy that it is given.")
    if len(found) == 3 and torch.equal(found[2], found[0]):
        raise ValueError("train_on does the same without a group: let it leave out where keep is false.")


def _predictions(table: SensitivityTable) -> tuple[Tensor, bool]:
    """(The predicted rises ``[N]``, whether they are in the loss's units)."""
    if table.loo_loss.isnan().all():
        return table.self_influence.double(), False
    return table.loo_loss.double() - table.loss.double(), True


def _check_same(table: SensitivityTable, start: Tensor) -> None:
    """Raises ValueError where the model's losses are not those of the table."""
    claimed = table.loss.double()
    differ = ~torch.isclose(start, claimed, rtol=0.02, atol=1e-3 * float(claimed.abs().mean()), equal_nan=True)
    if bool(differ.any()):
        row = int(differ.nonzero()[0])
        raise ValueError(
            f"example {int(table.index[row])} has the loss {float(start[row]):.4g}, but {float(claimed[row]):.4g} in "
            "the table: pass the model, loader and loss that were swept."
        )


@torch.no_grad()
def _own_losses(
    model: nn.Module, numbers: Tensor, given: Iterator[Any], losses: ExampleLoss, output: Selector
) -> Tensor:
    """The losses ``[N]`` of the examples of these numbers, in eval mode, in float64 on the CPU.

    Raises:
        ValueError: if the loader does not give one of them.
    """
    found = torch.full((int(numbers.max()) + 1,), torch.nan, dtype=torch.float64)
    seen = torch.zeros(len(found), dtype=torch.bool)
    moving = Covariance.unknown([p for p in model.parameters() if p.requires_grad])
    with torch.inference_mode(False), eval_mode(model), native_recurrence(model.modules()):
        for batch in given:
            inside = batch.index < len(found)
            loss = linearize(model, moving, batch, losses, output).loss.cpu().double()
            found[batch.index[inside]], seen[batch.index[inside]] = loss[inside], True
    if not bool(seen[numbers].all()):
        missing = int(numbers[~seen[numbers]][0])
        raise ValueError(f"the loader did not give example {missing} of the table: pass the loader that was swept.")
    return found[numbers]


def _state_of(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model's weights and buffers are afterwards as they were, whoever changes them."""
    before = _state_of(model)
    try:
        yield
    finally:
        for own, then in zip((*model.parameters(), *model.buffers()), before, strict=True):
            if not torch.equal(own, then):
                own.data.copy_(then)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
