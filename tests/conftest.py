import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub for models, or tells it that it ran

# Under xdist the workers already fill the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Each `torch.manual_seed` keeps two formatted stacks for devices that may still start: 4 ms, often more than the test.
for devices in (torch.cuda, torch.xpu):
    if not devices.is_available():
        devices.manual_seed_all = lambda seed: None


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def finished_runs() -> Iterator[None]:
    yield
    if getattr(sys.modules.get("wandb"), "run", None) is not None:
        sys.modules["wandb"].finish()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: at the end the other processes would wait for them."""
    items.sort(key=lambda item: item.path.name != "test_accelerator.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Many tests collect garbage: what the modules have made is none of it, and takes a tenth of a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # the report imports Hypothesis, which asks who refers to an object
