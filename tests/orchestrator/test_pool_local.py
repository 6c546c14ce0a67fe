"""The local pool."""

from collections.abc import Iterator

import pytest

from fedlora.protocol import ClientPool
from orchestrator.pools.local import LocalPool
from tests.conftest import toy_config
from tests.pools import PoolSuite


class TestLocalPool(PoolSuite):
    @pytest.fixture(scope="class")
    def pool(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientPool]:
        pool = LocalPool(toy_config(tmp_path_factory.mktemp("local")))
        yield pool
        pool.close()
