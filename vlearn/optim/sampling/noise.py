"""Where the noise of a draw comes from: one process, or several that must differ or agree.

Alone, a process takes the noise from the user's generator itself. Of several, each takes one number from it, the
seed of the draw, and mixes its rank in: users seed all processes alike, which would give them all one draw. The
generator's state stays all that decides the next draw, so resuming is bitwise with several processes too.

A draw that processes share, in DistributedDataParallel with `shared_noise` or because each holds a shard of the
parameters, is made from one seed by the number of the parameter and the place of the entry in it. So it does not depend
on how many processes there are, nor on how the model is sharded. (torch's own random numbers for distributed tensors
are for CUDA alone, and differ from those of whole ones.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlearn.collectives import process_count
from vlearn.optim.kernels.compiled import flat
from vlearn.optim.kernels.threefry import consecutive_normals, normals_at
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.sampling.positions import fill

_MASK = 2**64 - 1


class Noise:
    """Generators for the noise of one draw.

    Args:
        generator: the user's; None for torch's global ones.
        seed: of new generators that are used instead.
        numbers: the number of each parameter, where the noise of an entry is to depend on its place alone.

    Attributes:
        of_examples: for random numbers that belong to this process's own examples (probes, sampled labels), also where
            the draw is shared.
    """

    def __init__(
        self, generator: torch.Generator | None, seed: int | None = None, numbers: Mapping[Tensor, int] | None = None
    ):
        self._generator = generator
        self._seed = seed
        self._numbers = numbers
        self.of_examples = self
        self._streams: dict[torch.device, torch.Generator] = {}

    @classmethod
    def own(cls, generator: torch.Generator | None) -> Noise:
        """Noise that no other process has."""
        return cls(generator, _mixed(int(_number(generator)), torch.distributed.get_rank()))

    @classmethod
    def shared(
        cls, generator: torch.Generator | None, parameters: list[Tensor], device: torch.device, groups: Iterable[Any]
    ) -> Noise:
        """The noise of the first of several processes, or of one that makes the same as several would.

        Args:
            generator: all processes take a number from theirs, the first one's counts.
            parameters: all that an optimizer has, in one order in all processes.
            device: where the processes can exchange it.
            groups: process groups, None for the default one; each passes on what its first process has by then.
        """
        seed = _number(generator).to(device)
        for group in groups:
            first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
            torch.distributed.broadcast(seed, first, group=group)
        noise = cls(generator, int(seed), {p: number for number, p in enumerate(parameters)})
        rank = torch.distributed.get_rank() if process_count() > 1 else 0
        noise.of_examples = cls(generator, _mixed(int(seed), rank))
        return noise

    def on(self, device: torch.device) -> torch.Generator | None:
        """The generator for noise on a device; None is torch's global one."""
        if self._seed is None:
            return self._generator
        if device not in self._streams:
            seed = _mixed(self._seed, len(self._streams))
            self._streams[device] = torch.Generator(device).manual_seed(seed)
        return self._streams[device]

    @property
    def is_by_place(self) -> bool:
        """Whether the noise of an entry depends on its place in the parameter alone."""
        return self._numbers is not None

    def normal(self, slices: list[ParameterSlice], like: list[Tensor]) -> list[Tensor]:
        """Standard normal noise for slices of one block.

        Args:
            like: tensors of the slices' shapes, which say dtype and device.
        """
        if self._numbers is None:
            return normal(like, self.on(like[0].device))
        noise = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in like]
        for piece, tensor in zip(slices, noise, strict=True):
            assert self._seed is not None
            key = _key(_mixed(self._seed, self._numbers[piece.parameter]), tensor.device)
            fill(
                piece,
                tensor,
                partial(consecutive_normals, key, dtype=tensor.dtype),
                partial(normals_at, key, dtype=tensor.dtype),
            )
        return noise


def normal(like: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Standard normal noise in the shapes of a block, drawn at once; on accelerators in the layouts, too.

    There tensors of different layouts are worked on one by one, as those of a channels-last model would be.
    """
    first = like[0]
    count = sum(tensor.numel() for tensor in like)
    noise = torch.randn(count, dtype=first.dtype, device=first.device, generator=generator)
    parts = noise.split([tensor.numel() for tensor in like])
    if first.device.type == "cpu":
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
    return [_laid_out(part, tensor) for part, tensor in zip(parts, like, strict=True)]


def _laid_out(entries: Tensor, like: Tensor) -> Tensor:
    """A row of entries in shape and layout of a tensor, or in its shape alone where that has gaps."""
    if flat(like) is None:
        return entries.view(like.shape)
    return entries.as_strided(like.shape, like.stride(), entries.storage_offset())


def _number(generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randint(2**62, (1,), generator=generator, device=device)


def _key(seed: int, device: torch.device) -> Tensor:
    """A key of `threefry`: the two halves of a seed of 64 bits."""
    return torch.tensor([seed >> 32, seed & 0xFFFFFFFF], dtype=torch.int64).to(torch.int32).to(device)


def _mixed(seed: int, number: int) -> int:
    """A seed for each number, unlike the others in all bits: torch's CPU generator looks at the low 32 alone.

    The output function of SplitMix64 (Steele, Lea, Flood, 2014, doi:10.1145/2660193.2660195).
    """
    state = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
