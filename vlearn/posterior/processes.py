"""The processes that fit one posterior together, each to its own share of the data.

Each goes through its own batches, however many it has, and at the end of a round they say what they have summed up. A
process that has met an error says so there, in the place of leaving the others waiting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from vlearn._torch_internals import is_sharded
from vlearn.capture.names import named_parameters
from vlearn.collectives import process_count, summed
from vlearn.per_example.replay import placed

T = TypeVar("T")
Kind = tuple[torch.Size, torch.dtype]


class Key(NamedTuple):
    """What a sum is of: its name, and the places of its parameters among those that are fitted."""

    name: str
    places: tuple[int, ...] = ()


class Share(NamedTuple):
    """What one process has gone through in a round.

    Attributes:
        count: of its examples.
        names: of the parameters that are fitted; None where only a batch would tell.
        sums: the shape and dtype of each sum.
    """

    count: int
    names: tuple[str, ...] | None
    sums: dict[Key, Kind]


class FitProcesses:
    """The processes of one fit.

    Args:
        model: the network, as it was given.
        sync: whether there may be others than this one.

    Attributes:
        model: the network without DistributedDataParallel, which would talk to the others in every forward pass.
        group: their group; None for this process alone.
    """

    def __init__(self, model: nn.Module, sync: bool):
        wrapper = model if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model if wrapper is None else wrapper.module
        self.group: Any = None
        if sync and process_count() > 1:
            self.group = distributed.group.WORLD if wrapper is None else wrapper.process_group
        self._shares_buffers = wrapper is not None and wrapper.broadcast_buffers

    @property
    def rank(self) -> int:
        """This one's place among them."""
        return 0 if self.group is None else distributed.get_rank(self.group)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What a piece of work gives in each process, in their order; it is pickled.

        Raises:
            RuntimeError: if it fails in another process; where it fails, its own error.
        """
        if self.group is None:
            return [work()]
        error, result = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        told: list[Any] = [None] * distributed.get_world_size(self.group)
        message = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(told, (message, result), group=self.group)
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(told):
            if message is not None:
                raise RuntimeError(f"the fit ends here because it failed in process {rank}, by {message}")
        return [result for _, result in told]

    @contextmanager
    def alike(self, settings: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Nothing but the data differs between the processes inside.

        Buffers do where DistributedDataParallel has trained them: it gives all processes the first one's in every
        forward pass, and so they have them inside.

        Args:
            settings: checks the arguments of the fit, and gives those that must agree.
        Raises:
            ValueError: if something differs, in all processes.
        """
        if self.group is None:
            settings()
            yield
            return
        buffers = dict(self.model.named_buffers())

        def own() -> list[dict[str, Any]]:
            if any(isinstance(module, DistributedDataParallel) for module in self.model.modules()):
                raise ValueError(
                    "a DistributedDataParallel module inside the model would talk to the other processes in every "
                    "forward pass: pass that module itself, or the one inside it."
                )
            parameters = {name: (p.requires_grad, *_fingerprint(p)) for name, p in named_parameters(self.model)}
            return [parameters, {name: _fingerprint(buffer) for name, buffer in buffers.items()}, dict(settings())]

        told = self.each(own)
        for values, check in zip(zip(*told, strict=True), (_parameter, self._buffer, _argument), strict=True):
            for name in dict.fromkeys(name for each in values for name in each):
                check(name, [each.get(name) for each in values])
        of_first = {buffer: buffer.detach().clone() for buffer in buffers.values() if self._shares_buffers}
        for copied in of_first.values():
            distributed.broadcast(copied, distributed.get_global_rank(self.group, 0), group=self.group)
        with placed(of_first):
            yield

    def _buffer(self, name: str, values: list[Any]) -> None:
        """Check the buffers of a name of all processes, None where there is none."""
        kinds = [None if value is None else value[0] for value in values]
        if _differ(kinds if self._shares_buffers else values):
            raise ValueError(
                f"the buffer {name!r} differs between the processes: load the same checkpoint in all, or pass the "
                "DistributedDataParallel module itself, which takes the first one's."
            )

    def own_generator(self, given: torch.Generator | None, device: torch.device) -> torch.Generator | None:
        """Of random numbers that no other process has, also where all are seeded alike."""
        if self.group is None:
            return given
        source = torch.device("cpu") if given is None else given.device
        seeds = torch.randint(2**62, (distributed.get_world_size(self.group),), generator=given, device=source)
        return torch.Generator(device).manual_seed(int(seeds[self.rank]))

    def summed(self, own: Mapping[Key, Tensor], shares: list[Share], device: torch.device) -> dict[Key, Tensor]:
        """The sums of all processes, in the same order in each; what a process has not is zero there.

        Args:
            own: this one's.
            shares: what all have.
            device: of what it has not.
        Raises:
            ValueError: if they have different things under one key, in all processes.
        """
        if self.group is None:
            return dict(own)
        kinds: dict[Key, Kind] = {}
        for key, kind in (item for share in shares for item in share.sums.items()):
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(
                    f"the processes have {kinds[key]} and {kind} for {key.name}: give all batches of the same kind."
                )
        return {
            key: summed([own[key] if key in own else torch.zeros(shape, dtype=dtype, device=device)], self.group)[0]
            for key, (shape, dtype) in kinds.items()
        }


def _fingerprint(tensor: Tensor) -> tuple[Kind, str]:
    """What two tensors share if they are equal, bit for bit: shape and dtype, and a hash of the values.

    Raises:
        ValueError: of a part of a parameter.
    """
    if is_sharded(tensor):
        raise ValueError(
            "the parameters are sharded over processes (FSDP, tensor parallelism), but each needs the whole network: "
            "fit one that is not."
        )
    values = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return (tensor.shape, tensor.dtype), hashlib.sha256(values.data).hexdigest()


def _argument(name: str, values: list[Any]) -> None:
    if _differ(values):
        raise ValueError(
            f"{name} is {', '.join(map(repr, values))} in the processes: call fit with the same arguments in all."
        )


def _parameter(name: str, values: list[Any]) -> None:
    if _differ(values):
        raise ValueError(
            f"the parameter {name!r} differs between the processes, which would fit different networks: load the same "
            "checkpoint in all, and freeze the same parameters."
        )


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)
