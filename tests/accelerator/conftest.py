from collections.abc import Iterator

import pytest
import torch

from tests.accelerator import pretend


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretend.device() as found:
        yield found
