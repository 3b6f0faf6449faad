"""A gateway over a real store and real nodes, all in this process."""

from collections.abc import AsyncIterator

import pytest

from kvstrata.engine import Model
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import WorkerConfig
from tests.cluster.local_workers import Cluster, serving
from tests.prefill_node.nodes import config, load_once, model, model_folder

__all__ = ["config", "load_once", "model", "model_folder"]


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as store:
        yield store


@pytest.fixture
async def cluster(
    config: WorkerConfig,
    model: Model,
    store: LocalStore,
) -> AsyncIterator[Cluster]:
    async with serving(config, model, store.address) as cluster:
        yield cluster
