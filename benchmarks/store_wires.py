"""What ``bench_store.py`` compares with: the same bytes over a bare socket, bare gRPC and redis-py.

Run as a program it serves: ``python -P store_wires.py socket|grpc`` prints its port. A socket gives
as many bytes as it is asked for; gRPC's Get does, too, and Put takes what comes, in messages as
large as the store's.
"""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import redis.asyncio

from kvstrata.protos.heap import keep_freed_memory
from kvstrata.protos.service import CHANNEL_OPTIONS, CHUNK_BYTES, SERVER_OPTIONS

SERVICE = "bench.Bytes"
_CHUNK = np.random.default_rng(0).bytes(CHUNK_BYTES)

Part = TypeVar("Part")


async def over_streams(
    parts: Sequence[Part], streams: int, call: Callable[[Part], Awaitable[None]]
) -> None:
    """Do ``call`` for every part, ``streams`` at a time."""
    waiting = iter(parts)

    async def stream() -> None:
        for part in waiting:
            await call(part)

    await asyncio.gather(*(stream() for _ in range(streams)))


def _chunks(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // CHUNK_BYTES):
        yield _CHUNK
    if rest := num_bytes % CHUNK_BYTES:
        yield _CHUNK[:rest]


class Peer:
    """A child process that gives bytes, and takes some.

    Args:
        kind: "socket" or "grpc".
        parts: Bytes of each request; all of them are one call here.
    """

    def __init__(self, kind: str, parts: Sequence[int]) -> None:
        command = [sys.executable, "-P", str(Path(__file__)), kind]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._parts = parts

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class SocketPeer(Peer):
    """Bytes over TCP connections of the loopback, received into one buffer each."""

    def __init__(self, parts: Sequence[int]) -> None:
        super().__init__("socket", parts)

    async def get(self, streams: int) -> None:
        """Receive everything once, over as many connections."""
        shares = [sum(self._parts[i::streams]) for i in range(streams)]
        await asyncio.gather(*(asyncio.to_thread(self._receive, s) for s in shares if s))

    def _receive(self, num_bytes: int) -> None:
        view = memoryview(bytearray(CHUNK_BYTES))
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(num_bytes.to_bytes(8, "little"))
            left = num_bytes
            while left:
                left -= connection.recv_into(view, min(left, len(view)))


class GrpcPeer(Peer):
    """Bytes over grpcio's asyncio streaming, with nothing of ours but the channel's options."""

    def __init__(self, parts: Sequence[int]) -> None:
        super().__init__("grpc", parts)
        self._channel: Any = None

    def _method(self, kind: str, name: str) -> Any:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(
                f"127.0.0.1:{self.port}", options=CHANNEL_OPTIONS
            )
        return getattr(self._channel, kind)(f"/{SERVICE}/{name}")

    async def get(self, streams: int) -> None:
        """Receive everything once, by as many calls at a time."""
        method = self._method("unary_stream", "Get")

        async def receive(num_bytes: int) -> None:
            left = num_bytes
            async for part in method(num_bytes.to_bytes(8, "little")):
                left -= len(part)
            if left:
                raise AssertionError(f"{left} bytes are missing")

        await over_streams(self._parts, streams, receive)

    async def put(self, streams: int) -> None:
        """Send everything once, by as many calls."""
        method = self._method("stream_unary", "Put")

        async def send(num_bytes: int) -> None:
            reply = await method(_chunks(num_bytes))
            if int.from_bytes(reply, "little") != num_bytes:
                raise AssertionError("bytes are missing")

        shares = [sum(self._parts[i::streams]) for i in range(streams)]
        await over_streams([share for share in shares if share], streams, send)

    async def aclose(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()


class RedisPeer:
    """redis-py's asyncio client: the same values, written and read in a pipeline a stream."""

    def __init__(self, url: str, values: list[bytes]) -> None:
        self._redis = redis.asyncio.Redis.from_url(url)
        self._values = dict(enumerate(values))

    async def _pipelined(
        self, streams: int, command: Callable[[Any, int], None]
    ) -> list[list[Any]]:
        async def stream(numbers: Sequence[int]) -> list[Any]:
            pipe = self._redis.pipeline(transaction=False)
            for number in numbers:
                command(pipe, number)
            return await pipe.execute()

        shares = [range(i, len(self._values), streams) for i in range(streams)]
        return await asyncio.gather(*(stream(share) for share in shares if share))

    async def put(self, streams: int) -> None:
        """Write every value."""
        await self._pipelined(streams, lambda pipe, n: pipe.set(f"bench:{n}", self._values[n]))

    async def get(self, streams: int) -> None:
        """Read every value."""
        found = await self._pipelined(streams, lambda pipe, n: pipe.get(f"bench:{n}"))
        if sum(len(value) for share in found for value in share) != self.num_bytes:
            raise AssertionError("redis returned other bytes")

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return sum(map(len, self._values.values()))

    async def aclose(self) -> None:
        """Close the connection."""
        await self._redis.aclose()


class Memcpy:
    """One copy of the bytes in this process."""

    def __init__(self, num_bytes: int) -> None:
        self._source = np.ones(num_bytes, dtype=np.uint8)
        self._target = np.zeros(num_bytes, dtype=np.uint8)

    async def get(self, streams: int) -> None:
        """Copy everything once."""
        np.copyto(self._target, self._source)


async def _serve_grpc() -> None:
    async def get(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for chunk in _chunks(int.from_bytes(request, "little")):
            yield chunk

    async def put(requests: AsyncIterator[bytes], context: Any) -> bytes:
        taken = 0
        async for chunk in requests:
            taken += len(chunk)
        return taken.to_bytes(8, "little")

    methods = {
        "Get": grpc.unary_stream_rpc_method_handler(get),
        "Put": grpc.stream_unary_rpc_method_handler(put),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def _serve_socket() -> None:
    def give(connection: socket.socket) -> None:
        with connection:
            for chunk in _chunks(int.from_bytes(connection.recv(8), "little")):
                connection.sendall(chunk)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=give, args=(connection,), daemon=True).start()


def main() -> None:
    keep_freed_memory()  # as the store does
    if sys.argv[1] == "grpc":
        asyncio.run(_serve_grpc())
    else:
        _serve_socket()


if __name__ == "__main__":
    main()
