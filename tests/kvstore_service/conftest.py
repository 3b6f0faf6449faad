"""A Redis shared by this folder's tests, emptied before each."""

import socket
from collections.abc import Iterator

import pytest

from kvstrata.kvstore_service.testing import RedisServer
from kvstrata.protos.identity import CacheScope, ScopeDigest


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    with socket.create_connection(("127.0.0.1", shared_redis.port)) as connection:
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(16).startswith(b"+OK")
    return shared_redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may kill."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def scope() -> ScopeDigest:
    return CacheScope(b"m" * 16, "float32", "sample/1").digest()
