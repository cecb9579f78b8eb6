"""Arrays and what describes them as one compressed block of bytes, which the page's own code takes apart.

4 bytes    length of the description, little-endian
...        the description, JSON in UTF-8
...        the arrays, each beginning at a multiple of 8 from the start
"""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np

ALIGNMENT = 8
TYPES = ("u1", "u2", "u4", "f4")
MISSING = 65535  # of a value in 16 bits


class Pack:
    """Arrays on their way into a block."""

    def __init__(self) -> None:
        self._arrays: list[bytes] = []
        self._size = 0

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Take an array of one of `TYPES`; what stands for it in the description."""
        kind = array.dtype.str[1:]
        if kind not in TYPES:
            raise TypeError(f"an array of {array.dtype} cannot be packed: make it one of {', '.join(TYPES)}.")
        return {"type": kind, **self._append(np.ascontiguousarray(array).astype(f"<{kind}", copy=False).tobytes())}

    def add_bytes(self, content: bytes) -> dict[str, Any]:
        """Take bytes as they are, as of an image."""
        return {"type": "u1", **self._append(content)}

    def _append(self, content: bytes) -> dict[str, int]:
        entry = {"at": self._size, "bytes": len(content)}
        content += bytes(-len(content) % ALIGNMENT)
        self._arrays.append(content)
        self._size += len(content)
        return entry

    def compressed(self, description: dict[str, Any], level: int = 6) -> bytes:
        """The block; numbers in the description that are not finite become null."""
        head = json.dumps(_finite(description), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        head += b" " * (-(len(head) + 4) % ALIGNMENT)
        content = b"".join([len(head).to_bytes(4, "little"), head, *self._arrays])
        return gzip.compress(content, level, mtime=0)


def in_16_bits(values: np.ndarray, low: float, high: float, log: bool) -> np.ndarray:
    """Values as 0 to 65534 between ``low`` and ``high``, on a logarithmic scale if asked; NaN as `MISSING`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(values / low) / np.log(high / low) if log else (values - low) / (high - low)
    scaled = np.where(np.isnan(values), np.nan, np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0))
    rounded = np.rint(np.clip(scaled, 0, 1) * (MISSING - 1))
    return np.where(np.isfinite(rounded), rounded, MISSING).astype(np.uint16)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
