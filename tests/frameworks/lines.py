"""The lines that the README and docs/guides/optimizers.md begin with, for a training of 24 examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import vlearn

LINES: dict[str, Callable[[Any], Any]] = {
    "VAdamW": lambda params: vlearn.VAdamW(params, lr=0.01, num_data=24, generator=torch.Generator().manual_seed(7)),
    "EVON": lambda params: vlearn.EVON(
        params, lr=2, ess=24, update_every=2, generator=torch.Generator().manual_seed(7)
    ),
}
