"""Where the noise of a draw comes from: one process, or several that must differ or agree.

Alone, a process takes the noise from the user's generator itself. Of several, each takes one number from it, the
seed of the draw, and mixes its rank in: users seed all processes alike, which would give them all one draw. The
generator's state stays all that decides the next draw, so resuming is bitwise with several processes too.
"""

from __future__ import annotations

from typing import Any

import torch

_MASK = 2**64 - 1


class Noise:
    """Generators for the noise of one draw.

    Args:
        generator: the user's; None for torch's global ones.
        seed: of new generators that are used instead.

    Attributes:
        of_examples: for random numbers that belong to this process's own examples (probes, sampled labels), also where
            the draw is shared.
    """

    def __init__(self, generator: torch.Generator | None, seed: int | None = None):
        self._generator = generator
        self._seed = seed
        self.of_examples = self
        self._streams: dict[torch.device, torch.Generator] = {}

    @classmethod
    def own(cls, generator: torch.Generator | None) -> Noise:
        """Noise that no other process has."""
        return cls(generator, _mixed(int(_number(generator)), torch.distributed.get_rank()))

    @classmethod
    def shared(cls, generator: torch.Generator | None, device: torch.device, group: Any) -> Noise:
        """The noise of a group's first process.

        Args:
            generator: all processes take a number from theirs, the first one's counts.
            device: where the processes can exchange it.
            group: None for the default one.
        """
        seed = _number(generator).to(device)
        first = 0 if group is None else torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(seed, first, group=group)
        noise = cls(generator, int(seed))
        noise.of_examples = cls(generator, _mixed(int(seed), torch.distributed.get_rank()))
        return noise

    def on(self, device: torch.device) -> torch.Generator | None:
        """The generator for noise on a device; None is torch's global one."""
        if self._seed is None:
            return self._generator
        if device not in self._streams:
            seed = _mixed(self._seed, len(self._streams))
            self._streams[device] = torch.Generator(device).manual_seed(seed)
        return self._streams[device]


def _number(generator: torch.Generator | None) -> torch.Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randint(2**62, (1,), generator=generator, device=device)


def _mixed(seed: int, number: int) -> int:
    """A seed for each number, unlike the others in all bits: torch's CPU generator looks at the low 32 alone.

    The output function of SplitMix64 (Steele, Lea, Flood, 2014, doi:10.1145/2660193.2660195).
    """
    state = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
