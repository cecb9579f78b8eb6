"""Sweeps in the middle of training, which neither the weights nor the random numbers of the training see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from vlearn.capture.random_state import untouched_random_numbers
from vlearn.gaussians.protocol import Posterior
from vlearn.posterior.adaptive_state import unwrapped
from vlearn.posterior.fit import fit
from vlearn.sensitivity.sweep import SensitivityTable, sweep


class Swept(NamedTuple):
    """One sweep: its table, the place ``[n]`` of each row in the dataset, and the mean loss of test data, if any."""

    table: SensitivityTable
    places: np.ndarray
    test_loss: float | None


@dataclass(frozen=True)
class Sweeps:
    """When and how the training data are swept while a model is trained.

    Args:
        every: a number of epochs, or the epochs themselves, counted from 1.
        part: a number of examples, or a share of them below 1, drawn once and the same in all sweeps; default all.
        posterior: callable (model, optimizer) -> posterior. Default that of an optimizer of vlearn's, of others
            `vlearn.posterior.fit` of Kronecker structure to the swept examples.
        dataset: swept in the place of that of the training loader: the same examples, without random augmentation.
        batch_size: of the sweep; default the training loader's.
        seed: of the part, and of the probes.
        options: further arguments of `vlearn.sweep`, as ``{"leverage": "exact"}``.
        test: loader of held-out data, whose mean loss is recorded beside every sweep; every process goes through it.

    Raises:
        ValueError: if an argument breaks its rule.
    """

    every: int | Collection[int] = 1
    part: float | None = None
    posterior: Callable[[nn.Module, Any], Posterior] | None = None
    dataset: Any = None
    batch_size: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    test: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"every={self.every}, but it must be positive: 1 sweeps after each epoch.")
        if self.part is not None and not self.part > 0:
            raise ValueError(f"part={self.part}, but it must be positive: a number of examples, or a share below 1.")

    def is_due(self, epoch: int) -> bool:
        """Whether the data are swept after an epoch, counted from 1."""
        return epoch % self.every == 0 if isinstance(self.every, int) else epoch in self.every

    def places(self, count: int) -> np.ndarray:
        """The places that are swept, of as many as there are, in their order."""
        if self.part is None:
            return np.arange(count)
        size = max(1, round(self.part * count)) if self.part < 1 else min(count, int(self.part))
        return np.sort(np.random.default_rng(self.seed).permutation(count)[:size])

    def run(
        self,
        model: nn.Module,
        optimizer: Any,
        loader: Any,
        loss_fn: Any,
        output: Any,
        share: tuple[int, int] = (0, 1),
    ) -> Swept:
        """Sweep a share of the examples.

        Args:
            loader: of the training, whose dataset, batch size and collate function are taken.
            share: which of how many shares.
        """
        dataset = loader.dataset if self.dataset is None else self.dataset
        if len(dataset) != len(loader.dataset):
            raise ValueError(
                f"the dataset to sweep has {len(dataset)} examples, but that of the training loader has "
                f"{len(loader.dataset)}: give the same examples, in the same places."
            )
        places = self.places(len(dataset))
        own = places[share[0] :: share[1]]
        with untouched_random_numbers():
            swept, whole = (self._loader(dataset, part, loader) for part in (own, places))
            posterior = self._posterior(model, optimizer, whole, len(dataset), loss_fn, output)
            options = {"loss_fn": loss_fn, "output": output, "progress": False, **self.options}
            options.setdefault("loo_loss", getattr(posterior, "uncalibrated_reason", None) is None)
            options.setdefault("generator", torch.Generator(next(model.parameters()).device).manual_seed(self.seed))
            table = sweep(model, posterior, swept, **options)
            test_loss = None
            if self.test is not None:
                least: dict[str, Any] = {"leverage": None, "loo_loss": False, "deviation": None}
                held_out = sweep(model, posterior, self.test, loss_fn, output=output, progress=False, **least)
                test_loss = held_out.loss.double().mean().item()
        if len(table) != len(own):
            raise ValueError(f"the sweep has {len(table)} rows for {len(own)} examples: an item must be one example.")
        return Swept(table, own, test_loss)

    def _loader(self, dataset: Any, places: np.ndarray, like: Any) -> DataLoader:
        own = like.batch_size or getattr(getattr(like, "batch_sampler", None), "batch_size", None)
        size = self.batch_size or own or 64
        return DataLoader(Subset(dataset, places.tolist()), size, collate_fn=like.collate_fn)

    def _posterior(
        self, model: nn.Module, optimizer: Any, loader: DataLoader, num_data: int, loss_fn: Any, output: Any
    ) -> Posterior:
        if self.posterior is not None:
            return self.posterior(model, optimizer)
        own: Any = unwrapped(optimizer)
        if hasattr(own, "posterior"):
            return own.posterior()
        generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)
        return fit(model, loader, loss_fn, num_data=num_data, output=output, generator=generator, progress=False)
