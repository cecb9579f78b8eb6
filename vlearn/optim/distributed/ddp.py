"""Finding the DistributedDataParallel modules that average the gradients of an optimizer's parameters."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlearn._torch_internals import lets_processes_stop_early
from vlearn.collectives import averaged


class DDPRegistry:
    """The DistributedDataParallel modules that average the gradients of some parameters."""

    def __init__(self) -> None:
        self._of: dict[Tensor, ReferenceType[DistributedDataParallel]] = {}
        self.searched = False

    def add(self, objects: Iterable[object], parameters: Iterable[Tensor]) -> bool:
        """Note the wrappers among the objects; whether there was one around any of the parameters."""
        wanted, any_found = set(parameters), False
        for each in objects:
            # Not isinstance, which asks proxies for their __class__.
            if not issubclass(type(each), DistributedDataParallel):
                continue
            assert isinstance(each, DistributedDataParallel)
            for name, p in each.module.named_parameters():
                if p in wanted and name not in each.parameters_to_ignore:
                    self._of[p], any_found = ref(each), True
        return any_found

    def check_running(self, parameters: Iterable[Tensor]) -> None:
        """Raise RuntimeError inside `wrapper.join()`: processes that have run out of data would not answer."""
        for wrapper in {self.module_of(p) for p in parameters}:
            if wrapper is not None and lets_processes_stop_early(wrapper):
                raise RuntimeError(
                    "DistributedDataParallel.join() lets processes stop early, but every draw and step needs all of "
                    "them: give all processes the same number of batches (DistributedSampler does)."
                )

    def search(self, parameters: Iterable[Tensor]) -> None:
        """Look for wrappers among all objects there are, which takes a good part of a second in a large program."""
        self.searched = True
        self.add(gc.get_objects(), parameters)

    def module_of(self, p: Tensor) -> DistributedDataParallel | None:
        """The wrapper that averages the gradient of a parameter, if there is one."""
        wrapper = self._of.get(p)
        return None if wrapper is None else wrapper()

    def first(self, parameters: Iterable[Tensor]) -> DistributedDataParallel | None:
        """The first wrapper around any of the parameters."""
        return next((wrapper for p in parameters if (wrapper := self.module_of(p)) is not None), None)

    def group_of(self, parameters: Iterable[Tensor]) -> Any:
        """The process group of the first wrapper around any of the parameters; None is the default group."""
        wrapper = self.first(parameters)
        return None if wrapper is None else wrapper.process_group

    def average(self, parameters: list[Tensor], statistics: list[Tensor]) -> list[Tensor]:
        """Statistics of parameters, averaged over the processes of their wrappers: one message for each wrapper."""
        statistics = list(statistics)
        together: dict[Any, list[int]] = {}
        for i, p in enumerate(parameters):
            wrapper = self.module_of(p)
            if wrapper is not None:
                together.setdefault(wrapper.process_group, []).append(i)
        for group, places in together.items():
            for i, average in zip(places, averaged([statistics[i] for i in places], group), strict=True):
                statistics[i] = average
        return statistics
