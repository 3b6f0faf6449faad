"""What ``bench_store.py`` compares with: the same bytes over a bare socket, bare gRPC and redis-py.

Run as a program it serves: ``python -P store_wires.py socket|grpc BYTES COUNT`` prints its port and
gives ``COUNT`` times ``BYTES`` bytes to whoever asks, in messages as large as the store's.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import redis.asyncio

from kvstrata.kvstore_service.heap import keep_freed_memory
from kvstrata.protos.service import CHANNEL_OPTIONS, CHUNK_BYTES, SERVER_OPTIONS

METHOD = "/bench.Bytes/Get"


class Peer:
    """A child process that gives bytes."""

    def __init__(self, kind: str, num_bytes: int, count: int) -> None:
        command = [sys.executable, "-P", str(Path(__file__)), kind, str(num_bytes), str(count)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.num_bytes = num_bytes * count

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class SocketPeer(Peer):
    """Bytes over a TCP connection of the loopback, received into one buffer."""

    def __init__(self, num_bytes: int, count: int) -> None:
        super().__init__("socket", num_bytes, count)

    async def call(self) -> None:
        """Receive everything once."""
        await asyncio.to_thread(self._receive)

    def _receive(self) -> None:
        view = memoryview(bytearray(CHUNK_BYTES))
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"!")
            left = self.num_bytes
            while left:
                left -= connection.recv_into(view, min(left, len(view)))


class GrpcPeer(Peer):
    """Bytes over grpcio's asyncio streaming, with nothing of ours but the channel's options."""

    def __init__(self, num_bytes: int, count: int) -> None:
        super().__init__("grpc", num_bytes, count)
        self._channel: Any = None

    async def call(self) -> None:
        """Receive everything once."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(
                f"127.0.0.1:{self.port}", options=CHANNEL_OPTIONS
            )
        left = self.num_bytes
        async for part in self._channel.unary_stream(METHOD)(b"!"):
            left -= len(part)
        if left:
            raise AssertionError(f"{left} bytes are missing")

    async def aclose(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()


class RedisPeer:
    """redis-py's asyncio client: the same values, written and read in one pipeline."""

    def __init__(self, url: str, values: list[bytes]) -> None:
        self._redis = redis.asyncio.Redis.from_url(url)
        self._values = values
        self.num_bytes = sum(map(len, values))

    async def put(self) -> None:
        """Write every value."""
        pipe = self._redis.pipeline(transaction=False)
        for number, value in enumerate(self._values):
            pipe.set(f"bench:{number}", value)
        await pipe.execute()

    async def get(self) -> None:
        """Read every value."""
        pipe = self._redis.pipeline(transaction=False)
        for number in range(len(self._values)):
            pipe.get(f"bench:{number}")
        found = await pipe.execute()
        if sum(map(len, found)) != self.num_bytes:
            raise AssertionError("redis returned other bytes")

    async def aclose(self) -> None:
        """Close the connection."""
        await self._redis.aclose()


class Memcpy:
    """One copy of the bytes in this process."""

    def __init__(self, num_bytes: int) -> None:
        self._source = np.ones(num_bytes, dtype=np.uint8)
        self._target = np.zeros(num_bytes, dtype=np.uint8)

    async def call(self) -> None:
        """Copy everything once."""
        np.copyto(self._target, self._source)


async def _serve_grpc(value: bytes, count: int) -> None:
    async def get(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(count):
            for first in range(0, len(value), CHUNK_BYTES):
                yield value[first : first + CHUNK_BYTES]

    handler = grpc.unary_stream_rpc_method_handler(get)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Bytes", {"Get": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def _serve_socket(value: bytes, count: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                if connection.recv(1):
                    for _ in range(count):
                        connection.sendall(value)


def main() -> None:
    kind, num_bytes, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    value = np.random.default_rng(0).bytes(num_bytes)
    keep_freed_memory()  # as the store does
    if kind == "grpc":
        asyncio.run(_serve_grpc(value, count))
    else:
        _serve_socket(value, count)


if __name__ == "__main__":
    main()
