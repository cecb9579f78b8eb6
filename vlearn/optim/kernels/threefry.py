"""Normal numbers from a key and a counter: those of any entry can be made alone, on any process and in any kernel.

A compiled kernel makes them where it needs them, on all cores: torch's come from one, through memory. And the noise of
a parameter does not depend on how it is sharded.

Threefry-2x32 with 20 rounds turns a key and a counter into 64 random bits by additions, rotations and exclusive ors of
32 bits (Salmon et al., 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", doi:10.1145/2063384.2063405). The
normal numbers of the compiler itself take ten times as long, 67 against 6.3 ms for two million.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Entries that are worked through at once: in cache, where out of it the numbers take twice as long.
CPU_CHUNK, ACCELERATOR_CHUNK = 2**16, 2**26

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
    return _box_muller(*threefry(counter, torch.zeros_like(counter), key), torch.float32)


def consecutive_normals(key: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """The standard normal numbers of `count` entries from entry `start` on; the same as `normals_at` gives for each.

    Args:
        key: ``[2]`` int32, on the device of the result; another one gives other numbers.
        dtype: float32 or float64, whose radius and angle have 24 and 32 random bits each.
    """
    noise = torch.empty(count, dtype=dtype, device=key.device)
    step = CPU_CHUNK if key.device.type == "cpu" else ACCELERATOR_CHUNK
    for done in range(0, count, step):
        part, first = noise[done : done + step], start + done
        odd = first % 2
        counter = torch.arange(first // 2, (first + len(part) + 1) // 2, device=key.device)
        part.copy_(torch.stack(_of_counter(key, counter, dtype), 1).flatten()[odd : odd + len(part)])
    return noise


def normals_at(key: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """The standard normal numbers of some entries, in their shape: counter k has those of entries 2k and 2k + 1.

    Args:
        key, dtype: as for `consecutive_normals`.
        entries: their numbers, int64.
    """
    cosines, sines = _of_counter(key, entries // 2, dtype)
    return torch.where(entries % 2 == 0, cosines, sines)


def _of_counter(key: Tensor, counter: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = (counter & 0xFFFFFFFF).to(torch.int32), (counter >> 32).to(torch.int32)
    return _box_muller(*threefry(low, high, key), dtype)


def _box_muller(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two rows of normal numbers from two of random bits: a uniform number in (0, 1], and an angle in [-π, π)."""
    if dtype == torch.float64:
        uniform, angle = first.double().add(2**31 + 1).mul(2**-32), second.double().mul(math.pi * 2**-31)
    else:  # 24 bits each, as torch's own float32 normals
        uniform = ((first >> 8) & 0xFFFFFF).float().add(1).mul(2**-24)
        angle = (second >> 8).float().mul(math.pi * 2**-23)
    radius = (uniform.log() * -2).sqrt()
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
