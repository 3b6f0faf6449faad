"""A TCP proxy that is slow, stops forwarding, or cuts every connection: the network that fails."""

import asyncio
import contextlib
from typing import Self
from weakref import WeakSet

_CHUNK = 256 << 10


class Proxy:
    """Forwards connections on a port of the loopback to another one.

    Attributes:
        port: Where it listens.
        byte_s: Seconds that a byte of an answer takes, on each connection.
    """

    def __init__(self, target_port: int = 0) -> None:
        self.target_port = target_port
        self.byte_s = 0.0
        self.port = 0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self._writers: WeakSet[asyncio.StreamWriter] = WeakSet()
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """Where it listens, ``host:port``."""
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self._cut()
        for task in self._pumps:
            task.cancel()
        closing = [writer.wait_closed() for writer in self._writers]
        await asyncio.gather(*self._pumps, *closing, return_exceptions=True)

    def hold(self) -> None:
        """Forward nothing more; connections stay, and new ones are taken."""
        self._flowing.clear()

    def refuse(self) -> None:
        """Cut every connection, and each new one at once."""
        self._refusing = True
        self._cut()

    def heal(self) -> None:
        """Forward again; what was held back comes."""
        self._refusing = False
        self._flowing.set()

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self._refusing:
            writer.transport.abort()
            return
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:  # nobody listens there at present
            writer.transport.abort()
            return
        self._writers.add(there[1])
        both = (writer, there[1])
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._pump(source, sink, both, is_answer=sink is writer))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        *,
        is_answer: bool,
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(_CHUNK):
                    if is_answer and self.byte_s:
                        await asyncio.sleep(len(data) * self.byte_s)
                    await self._flowing.wait()
                    sink.write(data)
                    await sink.drain()
        finally:
            for side in both:
                side.transport.abort()
