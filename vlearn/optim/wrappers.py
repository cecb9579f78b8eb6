"""Who averages the gradients of which parameters: DistributedDataParallel, found by what it wraps."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlearn.optim.draw import Slot


class Wrappers:
    """The DistributedDataParallel modules that average the gradients of some parameters."""

    def __init__(self) -> None:
        self._of: dict[Tensor, ReferenceType[DistributedDataParallel]] = {}
        self.searched = False

    def add(self, objects: Iterable[object], parameters: Iterable[Tensor]) -> bool:
        """Note the wrappers among the objects; whether there was one around any of the parameters."""
        wanted, found = set(parameters), False
        for each in objects:
            # Not isinstance, which asks proxies for their __class__.
            if not issubclass(type(each), DistributedDataParallel):
                continue
            assert isinstance(each, DistributedDataParallel)
            for name, p in each.module.named_parameters():
                if p in wanted and name not in each.parameters_to_ignore:
                    self._of[p], found = ref(each), True
        return found

    def check_running(self, parameters: Iterable[Tensor]) -> None:
        """Raise RuntimeError inside `wrapper.join()`: processes that have run out of data would not answer."""
        for wrapper in {self.around(p) for p in parameters}:
            if wrapper is not None and wrapper._join_config.enable:
                raise RuntimeError(
                    "DistributedDataParallel.join() lets processes stop early, but every draw and step needs all of "
                    "them: give all processes the same number of batches (DistributedSampler does)."
                )

    def search(self, parameters: Iterable[Tensor]) -> None:
        """Look for them among all objects there are, which takes a good part of a second in a large program."""
        self.searched = True
        self.add(gc.get_objects(), parameters)

    def first(self, parameters: Iterable[Tensor]) -> DistributedDataParallel | None:
        """The first wrapper around any of the parameters."""
        return next((wrapper for p in parameters if (wrapper := self.around(p)) is not None), None)

    def group_of(self, parameters: Iterable[Tensor]) -> Any:
        """The process group of the first wrapper around any of the parameters; None is the default group."""
        wrapper = self.first(parameters)
        return None if wrapper is None else wrapper.process_group

    def around(self, p: Tensor) -> DistributedDataParallel | None:
        wrapper = self._of.get(p)
        return None if wrapper is None else wrapper()

    def average(self, slots: list[Slot], statistics: list[Tensor]) -> list[Tensor]:
        """Statistics, those of reduced parameters averaged over their processes: one message for a block."""
        statistics = list(statistics)
        together: dict[Any, list[int]] = {}
        for i, slot in enumerate(slots):
            wrapper = self.around(slot.parameter)
            if wrapper is not None:
                together.setdefault(wrapper.process_group, []).append(i)
        for group, where in together.items():
            for i, part in zip(where, averaged([statistics[i] for i in where], group), strict=True):
                statistics[i] = part
        return statistics


def averaged(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Averages over the processes of a group, by one message.

    Args:
        tensors: of one dtype and device.
        group: None for the default one.
    """
    return [total.div_(torch.distributed.get_world_size(group)) for total in summed(tensors, group)]


def summed(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Sums over the processes of a group, as `averaged`."""
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(message, group=group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def named_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """A model's named parameters, with the names that they have without DistributedDataParallel and torch.compile."""
    wrappers = [path for path, module in model.named_modules() if isinstance(module, DistributedDataParallel)]
    prefixes = [f"{path}." if path else "" for path in sorted(wrappers, key=len, reverse=True)]  # inner ones first
    found = []
    for name, p in model.named_parameters():
        for prefix in prefixes:
            if name.startswith(f"{prefix}module."):
                name = prefix + name.removeprefix(f"{prefix}module.")
        found.append((name.replace("_orig_mod.", ""), p))
    return found


def is_sharded(p: Tensor) -> bool:
    """Whether this process has only a part of a parameter: a DTensor, or one that the first FSDP has flattened."""
    return getattr(p, "device_mesh", None) is not None or getattr(p, "_fsdp_flattened", False)
