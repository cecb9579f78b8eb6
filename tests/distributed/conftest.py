from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    both = Ranks(tmp_path_factory.mktemp("ranks"))
    yield both
    both.stop()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    four = Ranks(tmp_path_factory.mktemp("four_ranks"), 4)
    yield four
    four.stop()
