"""Normal numbers that a compiled kernel makes where it needs them, on all cores: torch's come from one, through memory.

Threefry-2x32 with 20 rounds turns a key and a counter into 64 random bits by additions, rotations and exclusive ors of
32 bits (Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", doi:10.1145/2063384.2063405). The
normal numbers of the compiler itself take ten times as long, 67 against 6.3 ms for two million.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def new_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A key ``[2]`` for one block of numbers."""
    return torch.randint(-(2**31), 2**31, (2,), generator=generator, dtype=torch.int32, device=device)


def normals(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two rows of `count` independent standard normal numbers in float32, by Box and Muller's transform.

    Args:
        key: ``[2]`` int32; another one gives other numbers.
    """
    counter = torch.arange(count, dtype=torch.int32, device=key.device)
    first, second = threefry(counter, torch.zeros_like(counter), key)
    # 24 bits each, as torch's own float32 normals: uniform in (0, 1], and an angle in [-π, π).
    radius = (((first >> 8) & 0xFFFFFF).float().add(1).mul(2**-24).log() * -2).sqrt()
    angle = (second >> 8).float().mul(math.pi * 2**-23)
    return radius * angle.cos(), radius * angle.sin()


def threefry(first: Tensor, second: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """64 random bits, as two int32, for each counter of two int32; sums wrap around."""
    keys = key[0], key[1], key[0] ^ key[1] ^ _PARITY
    first, second = first + keys[0], second + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            first = first + second
            second = _rotated(second, rotation) ^ first
        first = first + keys[(block + 1) % 3]
        second = second + keys[(block + 2) % 3] + (block + 1)
    return first, second


def _rotated(x: Tensor, bits: int) -> Tensor:
    # int32 shifts to the right copy the sign, which the mask takes away.
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))
