"""Every method on the same networks, queries and retrainings: its score, its time and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution import retraining, scores
from benchmarks.attribution.retraining import FIRST_SEED
from benchmarks.attribution.tasks import Data, Task
from benchmarks.cost.memory import peak, start_of_peak
from benchmarks.reference.attribution.method import Method, Subject
from benchmarks.report.terminal import Advance
from benchmarks.training.checkpoint import kept

SNAPSHOTS = 6
TUNING = 5  # one query in so many serves to choose a method's setting, and for nothing else
SHARE = 0.01  # of the training examples that is removed
REMOVED_QUERIES, REMOVED_SEEDS = 5, 2
RANDOM = "random"
Row = dict[str, Any]


def trained(task: Task, data: Data, count: int, runs: Path) -> list[Subject]:
    """The networks that are explained: trained alike from other first weights, on all examples."""
    num_data, seeds = len(data.y), list(range(count))
    assert count < FIRST_SEED
    steps = task.steps(num_data)
    wanted = [max(1, round(steps * part / SNAPSHOTS)) for part in range(1, SNAPSHOTS + 1)]
    examples = torch.arange(num_data).expand(1, -1)
    subjects = []
    for seed in seeds:
        settings = {**retraining.identity(task), "seed": seed, "snapshots": wanted}
        file = runs / f"network-{seed}.pt"
        taken = kept(file, settings, lambda s=seed: retraining.train(task, data, examples, [s], wanted)[1])
        snapshots = [{name: p[0] for name, p in each.items()} for each in taken]
        model = task.network(seed).to(data.x)
        first = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(snapshots[-1])
        subjects.append(
            Subject(
                model.eval(),
                snapshots,
                data.x,
                data.y,
                task.loss,
                task.lr,
                task.weight_decay,
                task.training_time(num_data),
                first,
                task.batch,
                task.epochs,
                seed,
            )
        )
    return subjects


class Comparison:
    """One task: its networks, the retrained losses of its queries, and what has been attributed so far.

    Args:
        subsets: ``[M, n]`` numbers of the examples of each subset.
        retrained: ``[M, R, Q]`` losses.
        runs: where attributions are kept.
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        subjects: Sequence[Subject],
        subsets: Tensor,
        retrained: Tensor,
        runs: Path,
        advance: Advance,
    ):
        self.task, self.data, self.subjects, self.subsets = task, data, subjects, subsets
        self.retrained, self.runs, self.advance = retrained.mean(1), runs, advance
        tuning = torch.arange(len(data.y_query)) % TUNING == 0
        self.tuning, self.scored = tuning.nonzero().squeeze(1), (~tuning).nonzero().squeeze(1)

    def row(self, method: Method) -> Row:
        """A method on the first network, at the setting that scores best on the tuning queries."""
        setting = method.settings[0]
        if len(method.settings) > 1:
            prepare = None if method.prepare is None else cache(partial(method.prepare, self.subjects[0]))
            done = [self.attributed(method, each, self.tuning, prepare=prepare) for each in method.settings]
            setting = method.settings[int(np.argmax([self.score(each, self.tuning).mean() for each in done]))]
        return self.row_of(method, setting, 1)

    def row_of(self, method: Method, setting: dict[str, Any], networks: int) -> Row:
        """A method at one setting."""
        done = self.attributed(method, setting, self.scored, networks)
        return {
            "method": method.name,
            "by": method.by,
            "networks": networks,
            "setting": setting,
            "settings tried": len(method.settings) if networks == 1 else 1,
            "score": scores.with_interval(self.score(done, self.scored)),
            "prepare, s": done["prepare"],
            "query, ms": 1000 * done["query"] / len(self.scored),
            "memory, MiB": done["memory"] / 2**20,
        }

    def score(self, done: dict[str, Any], queries: Tensor) -> np.ndarray:
        """The linear datamodelling score of every query."""
        predicted = scores.predicted_losses(done["attributions"], self.subsets)
        return scores.correlations(predicted, self.retrained[:, queries])

    def attributed(
        self,
        method: Method,
        setting: dict[str, Any],
        queries: Tensor,
        networks: int = 1,
        prepare: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """Attributions ``[N, Q]`` of some queries, seconds to prepare and for all of them, and bytes at the peak.

        Args:
            prepare: what the method's own `prepare` gives, made before, where its time does not count.
        """
        label = "-".join([method.by, method.name, *(f"{name}={value}" for name, value in setting.items())])
        used = "tuning" if queries is self.tuning else f"{networks}"
        file = self.runs / "attributions" / f"{label.replace(' ', '_')}-{used}.pt"
        settings = {**retraining.identity(self.task), "queries": queries.tolist(), "networks": networks}
        done = kept(file, settings, lambda: self._attribute(method, setting, queries, networks, prepare))
        self.advance(f"{self.task.title}: {label}, {used}")
        return done

    def _attribute(
        self,
        method: Method,
        setting: dict[str, Any],
        queries: Tensor,
        networks: int,
        prepare: Callable[[], Any] | None,
    ) -> dict[str, Any]:
        prepared = None if prepare is None else prepare()
        before, began = start_of_peak(), time.perf_counter()
        try:
            scorer = method.scorer(self.subjects[:networks], setting, prepared)
        except FloatingPointError:  # a network that it trains itself diverges at this setting
            scorer = lambda x, y: torch.zeros(len(self.data.y), len(y))  # noqa: E731
        ready = time.perf_counter()
        values = scorer(self.data.x_query[queries], self.data.y_query[queries])
        ended = time.perf_counter()
        return {
            # What has become infinite predicts nothing.
            "attributions": torch.where(values.isfinite().all(0), values, 0).float(),
            "prepare": ready - began,
            "query": ended - ready,
            "memory": peak() - before,
        }

    def removals(self, rows: Sequence[Row], methods: Sequence[Method]) -> list[Row]:
        """By how much each query's loss rises after retraining without its top examples.

        Returns:
            For each method, and for random examples, the mean over the queries and its standard error.
        """
        by_name = {(method.by, method.name): method for method in methods if method.removed}
        count = max(1, round(SHARE * len(self.data.y)))
        queries = self.scored[:REMOVED_QUERIES]
        drawn = torch.Generator().manual_seed(0)
        tops = {("", RANDOM): torch.stack([torch.randperm(len(self.data.y), generator=drawn)[:count] for _ in queries])}
        for row in rows:
            if row["networks"] == 1 and (key := (row["by"], row["method"])) in by_name:
                done = self.attributed(by_name[key], row["setting"], self.scored)
                tops[key] = done["attributions"][:, : len(queries)].topk(count, 0).indices.T
        everything = torch.arange(len(self.data.y)).expand(1, -1)
        before = self._losses("nothing", everything)[0, :, queries]  # [seeds, queries]
        found = []
        for (by, name), top in tops.items():
            kept_examples = torch.stack([everything[0][~torch.isin(everything[0], each)] for each in top])
            after = self._losses(f"{by}-{name}", kept_examples)
            rise = torch.stack([after[i, :, query] for i, query in enumerate(queries)], 1) - before
            mean = rise.double().mean(0)
            error = float(mean.std() / len(mean) ** 0.5) if len(mean) > 1 else 0.0
            found.append({"method": name, "by": by, "rise": float(mean.mean()), "standard error": error})
        return found

    def _losses(self, label: str, examples: Tensor) -> Tensor:
        """``[networks, seeds, Q]`` losses after training on some of the examples."""
        seeds = [seed for _ in examples for seed in range(FIRST_SEED, FIRST_SEED + REMOVED_SEEDS)]
        repeated = examples.repeat_interleave(REMOVED_SEEDS, 0)
        parts = []
        for part in torch.arange(len(seeds)).split(self.task.at_once):
            settings = {**retraining.identity(self.task), "examples": repeated[part].tolist()}
            file = self.runs / "removals" / f"{label.replace(' ', '_')}-{int(part[0])}.pt"
            own = [seeds[i] for i in part.tolist()]
            parts.append(
                kept(file, settings, lambda p=part, s=own: retraining.losses_of(self.task, self.data, repeated[p], s))
            )
            self.advance(f"{self.task.title}: retraining without the top of {label}")
        return torch.cat(parts).reshape(len(examples), REMOVED_SEEDS, -1)
