"""More than one Redis: a cluster, a Sentinel group, and TLS in front of one."""

import contextlib
import selectors
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from kvstrata.kvstore_service.redis_binary import find_redis_server, free_port
from kvstrata.kvstore_service.testing import RedisServer
from tests.certificates import Authority

NUM_SLOTS = 16384
PASSWORD = "s3cret/@?"
QUOTED = "s3cret%2F%40%3F"


def until(is_true: Callable[[], bool], timeout_s: float = 30) -> None:
    """Wait until something holds, at most ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class RedisClusterServers:
    """Three masters that share the slots.

    Attributes:
        servers: The masters.
        url: Names two of them; a client finds the third.
    """

    def __init__(self, servers: list[RedisServer]) -> None:
        self.servers = servers
        first, second, _ = (server.port for server in servers)
        self.url = f"redis+cluster://127.0.0.1:{first},127.0.0.1:{second}"

    def clients(self) -> list[Any]:
        return [redis.Redis(port=server.port, socket_timeout=5) for server in self.servers]

    def is_whole(self) -> bool:
        infos = [client.execute_command("CLUSTER INFO") for client in self.clients()]
        return all(i["cluster_state"] == "ok" and i["cluster_known_nodes"] == "3" for i in infos)

    def flush(self) -> None:
        for client in self.clients():
            client.flushall()


@contextlib.contextmanager
def redis_cluster() -> Iterator[RedisClusterServers]:
    """Start three masters and join them."""
    with contextlib.ExitStack() as stack:
        buses = [free_port() for _ in range(3)]
        options = [("--cluster-enabled", "yes", "--cluster-port", str(bus)) for bus in buses]
        servers = [stack.enter_context(RedisServer(options=given)) for given in options]
        made = RedisClusterServers(servers)
        clients = made.clients()
        borders = [NUM_SLOTS * i // 3 for i in range(4)]
        for client, first, end in zip(clients, borders, borders[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
        for server, bus in zip(servers[1:], buses[1:], strict=True):
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port, bus)
        until(made.is_whole)
        yield made


class SentinelGroup:
    """A master, a replica and a Sentinel that knows them as ``kv``."""

    def __init__(self, master: RedisServer, replica: RedisServer, port: int) -> None:
        self.master = master
        self.replica = replica
        self.url = f"redis+sentinel://127.0.0.1:{port}/kv"
        self._sentinel: Any = redis.Redis(port=port, socket_timeout=5)

    def knows_replica(self) -> bool:
        try:
            return len(self._sentinel.sentinel_slaves("kv")) == 1
        except redis.ConnectionError:  # it is starting
            return False

    def master_port(self) -> int:
        return int(self._sentinel.sentinel_get_master_addr_by_name("kv")[1])


@contextlib.contextmanager
def sentinel_group(folder: Path) -> Iterator[SentinelGroup]:
    """Start the group; Sentinel takes a master for dead after half a second."""
    with RedisServer() as master:
        replica_of = ("--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0")
        with RedisServer(options=replica_of) as replica:
            config = folder / "sentinel.conf"
            config.write_text(
                f"sentinel monitor kv 127.0.0.1 {master.port} 1\n"
                "sentinel down-after-milliseconds kv 500\nsentinel failover-timeout kv 2000\n"
            )
            port = free_port()
            command = [find_redis_server(), config, "--sentinel", "--port", str(port)]
            with subprocess.Popen(
                [*command, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL
            ) as sentinel:
                try:
                    group = SentinelGroup(master, replica, port)
                    until(group.knows_replica)
                    yield group
                finally:
                    sentinel.kill()


class TlsFront:
    """Speaks TLS on a port of its own and passes everything on to a plain one."""

    def __init__(self, port: int, authority: Authority) -> None:
        self._target = port
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("redis"))
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        try:
            outer = self._context.wrap_socket(accepted, server_side=True)
        except (ssl.SSLError, OSError):
            accepted.close()
            return
        with outer, socket.create_connection(("127.0.0.1", self._target)) as inner:
            outer.setblocking(False)
            with contextlib.suppress(OSError):
                _pass_on(outer, inner)


def _pass_on(outer: ssl.SSLSocket, inner: socket.socket) -> None:
    """Copy both ways until one side ends."""
    selector = selectors.DefaultSelector()
    selector.register(outer, selectors.EVENT_READ)
    selector.register(inner, selectors.EVENT_READ)
    while True:
        for ready, _ in selector.select():
            source, target = (inner, outer) if ready.fileobj is inner else (outer, inner)
            try:
                data = source.recv(1 << 16)
                while isinstance(source, ssl.SSLSocket) and source.pending():
                    data += source.recv(1 << 16)
            except ssl.SSLWantReadError:
                continue
            if not data:
                return
            outer.setblocking(True)
            target.sendall(data)
            outer.setblocking(False)
