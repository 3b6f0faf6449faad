"""Making a Redis client from a URL: one server, a Sentinel group or a cluster."""

import dataclasses
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

# Beyond the scheme's "redis" or "rediss": how several hosts of a URL are meant.
CLUSTER, SENTINEL = "cluster", "sentinel"
_DEFAULT_PORTS = {CLUSTER: 6379, SENTINEL: 26379}
_READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Bounds of a client.

    Attributes:
        timeout_s: Time limit of each read and write; half of it for connecting.
        max_connections: Of the pool, for each server.
    """

    timeout_s: float
    max_connections: int


@dataclass(frozen=True, slots=True)
class RedisPlace:
    """Where a Redis is, as its URL says.

    Attributes:
        kind: "" for one server, else "cluster" or "sentinel".
        hosts: (host, port) of each; empty for one server.
        service: Name that the Sentinels know the master by.
        options: Arguments of a connection: secrets, TLS, database. Never shown.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def parse_place(url: str) -> RedisPlace:
    """Return what ``url`` says.

    ``redis://[user:password@]host:port/db``, ``rediss://`` for TLS, ``unix://``;
    ``redis+cluster://[user:password@]host:port,host:port``;
    ``redis+sentinel://[user:password@]host:port,host:port/service[/db]``. A query adds options of
    the connection, such as ``ssl_ca_certs=FILE``.

    Raises:
        ValueError: It is none of these; the message may quote secrets.
    """
    scheme, _, rest = url.partition("://")
    family, plus, kind = scheme.partition("+")
    if not plus:
        return RedisPlace("", options=dict(parse_url(url)))
    if kind not in _DEFAULT_PORTS or family not in ("redis", "rediss"):
        raise ValueError(f"unknown scheme {scheme}")
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    secret, at, places = authority.rpartition("@")
    hosts = tuple(_host(place, _DEFAULT_PORTS[kind]) for place in places.split(","))
    service, _, database = path.partition("/") if kind == SENTINEL else ("", "", path)
    if kind == SENTINEL and not service:
        raise ValueError("the service's name is missing: redis+sentinel://host:port/service")
    if kind == CLUSTER and database not in ("", "0"):
        raise ValueError("a cluster has database 0 only")
    # Everything but the hosts is as in a URL of one server, so the library reads it.
    one = f"{family}://{secret}{at}host/{database or 0}{'?' + query if query else ''}"
    options = dict(parse_url(one))
    options.pop("host", None)
    options.pop("connection_class", None)
    return RedisPlace(kind, hosts, unquote(service), options | {"ssl": family == "rediss"})


def is_cluster(url: str) -> bool:
    """Return whether ``url`` names a cluster."""
    return url.partition("://")[0].endswith(f"+{CLUSTER}")


def _host(place: str, default_port: int) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or "]" in port:
        host, port = place, str(default_port)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError("write host:port,host:port")
    return host.strip("[]"), int(port)


def make_client(url: str, limits: ClientLimits) -> Any:
    """Return a client that is not connected yet.

    Raises:
        ValueError: ``url`` is none; the message may quote secrets.
        TypeError: An option in its query is none.
    """
    place = parse_place(url)
    retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
    common: dict[str, Any] = {
        "socket_timeout": limits.timeout_s,
        "socket_connect_timeout": limits.timeout_s / 2,
        "socket_read_size": _READ_BYTES,
        "protocol": 2,
    }
    if place.kind == CLUSTER:
        nodes = [ClusterNode(host, port) for host, port in place.hosts]
        options = {key: value for key, value in place.options.items() if key != "db"}
        return RedisCluster(
            startup_nodes=nodes,
            max_connections=limits.max_connections,
            retry=Retry(NoBackoff(), 2),
            **common,
            **options,
        )
    if place.kind == SENTINEL:
        tls = {k: v for k, v in place.options.items() if k.startswith("ssl")}
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(place.hosts),
            sentinel_kwargs={**common, **tls},
            max_connections=limits.max_connections,
            retry=retry,
            **common,
            **place.options,
        )
        client = sentinel.master_for(place.service)
    else:
        client = Redis(
            connection_pool=ConnectionPool.from_url(
                url, max_connections=limits.max_connections, retry=retry, **common
            )
        )
    client.connection_pool.make_connection()  # connects nothing, but refuses unknown options
    return client


async def close_client(client: Any) -> None:
    """Close every connection of a client, those to Sentinels too."""
    await client.aclose()
    pool = getattr(client, "connection_pool", None)
    if pool is None:
        return
    await pool.disconnect()
    if manager := getattr(pool, "sentinel_manager", None):
        for sentinel in manager.sentinels:
            await sentinel.aclose()
