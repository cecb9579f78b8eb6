"""Collected only in the process that `tests/test_accelerator.py` makes for it: see `pretend`."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.accelerator import pretend

if "VLEARN_PRETEND" in os.environ:
    pretend.registered()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretend.device() as found:
        yield found
