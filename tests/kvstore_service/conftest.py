"""A Redis and an S3 service shared by this folder's tests, empty for each."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.kvstore_service.object_testing import S3Server
from kvstrata.kvstore_service.testing import RedisServer
from kvstrata.protos.identity import CacheScope, ScopeDigest
from tests.certificates import Authority
from tests.kvstore_service.redis_servers import (
    PASSWORD,
    QUOTED,
    RedisClusterServers,
    TlsFront,
    redis_cluster,
)


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


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[RedisClusterServers]:
    with redis_cluster() as servers:
        yield servers


@pytest.fixture
def cluster(shared_cluster: RedisClusterServers) -> RedisClusterServers:
    """Three masters, emptied."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may kill."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def tls_url(tmp_path: Path) -> Iterator[str]:
    """A Redis behind TLS, with a password of special characters."""
    authority = Authority(tmp_path)
    with RedisServer(PASSWORD) as server:
        front = TlsFront(server.port, authority)
        yield f"rediss://:{QUOTED}@127.0.0.1:{front.port}/0?ssl_ca_certs={authority.ca}"
        front.close()


@pytest.fixture(scope="session")
def shared_s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_url(shared_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; how to reach it is in the environment."""
    for name, value in shared_s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{shared_s3.make_bucket()}/some/prefix"


@pytest.fixture
def scope() -> ScopeDigest:
    return CacheScope(b"m" * 16, "float32", "sample/1").digest()
