"""The faults of a soak: one after another, each undone before the next."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import redis.asyncio
from soak_history import History
from soak_servers import Arena, StoreProcess

from kvstrata.kvstore_service.ssd_file import SsdFile
from kvstrata.protos.identity import BlockKey

FAULTS = (
    "redis_kill",
    "redis_pause",
    "store_kill",
    "store_pause",
    "disk_flip",
    "redis_flip",
    "disk_full",
    "redis_hold",
    "redis_cut",
    "client_hold",
    "client_cut",
)
_FLIPS = 4
# Flips bits of a value that is there, at a place between 0 and 1 of its length.
_FLIP = """
if redis.call('TYPE', KEYS[1]).ok ~= 'string' then return 0 end
local length = redis.call('STRLEN', KEYS[1])
if length == 0 then return 0 end
local place = math.floor(tonumber(ARGV[1]) * length)
local byte = string.byte(redis.call('GETRANGE', KEYS[1], place, place))
redis.call('SETRANGE', KEYS[1], place, string.char(bit.bxor(byte, tonumber(ARGV[2]))))
return 1
"""


class Faults:
    """Injects faults into an arena until told to stop.

    Args:
        arena: The processes.
        history: Where to record.
        seed: Chooses faults, victims and durations.
        every_s: From the begin of one fault to that of the next.
        names: Of every block that somebody may have put.
        kinds: Which faults.
    """

    def __init__(
        self,
        arena: Arena,
        history: History,
        seed: int,
        every_s: float,
        names: Mapping[BlockKey, str],
        kinds: Sequence[str] = FAULTS,
    ) -> None:
        self._arena = arena
        self._history = history
        self._random = random.Random(f"{seed}/faults")
        self._every_s = every_s
        self._names = names
        self._kinds = kinds
        self.stopping = asyncio.Event()
        self.on_fault: Callable[[str], None] = lambda fault: None

    async def run(self) -> None:
        """Inject faults, every kind once before any comes again."""
        kinds: list[str] = []
        while not self.stopping.is_set():
            begin = self._history.now()
            if not kinds:
                kinds = [f for f in self._kinds if f != "disk_full" or self._can_fill]
                self._random.shuffle(kinds)
            await self._inject(kinds.pop())
            rest = self._every_s - (self._history.now() - begin)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), max(0.1, rest))

    @property
    def _can_fill(self) -> bool:
        return all(store.disk.can_be_filled for store in self._arena.stores.values())

    async def _inject(self, fault: str) -> None:
        self.on_fault(fault)
        choices = ["a", "b"] if fault in ("redis_hold", "redis_cut") else ["a", "b", "c"]
        store = self._arena.stores[self._random.choice(choices)]
        length_s = self._random.uniform(0.3, 0.8) * self._every_s
        whole = fault in ("redis_kill", "redis_pause", "redis_flip")
        begin = self._history.now()
        names: list[str] = []
        if fault == "disk_flip":
            names = self._flip_on_disk(store)
        elif fault == "redis_flip":
            names = await self._flip_in_redis()
        else:
            async with self._broken(fault, store):
                await asyncio.sleep(length_s)
        self._history.add(
            "fault",
            fault=fault,
            store="" if whole else store.name,
            t0=begin,
            t1=self._history.now(),
            names=names,
        )

    @contextlib.asynccontextmanager
    async def _broken(self, fault: str, store: StoreProcess) -> AsyncIterator[None]:
        """Break something for the time of the context."""
        server = self._arena.redis
        if fault == "redis_kill":
            self._arena.redis_is_up = False
            server.kill()
            yield
            await asyncio.to_thread(server.restart)
            self._arena.redis_is_up = True
        elif fault == "redis_pause":
            self._arena.redis_is_up = False
            server.pause()
            yield
            server.resume()
            self._arena.redis_is_up = True
        elif fault == "store_kill":
            store.kill()
            yield
            await store.start()
        elif fault == "store_pause":
            store.signal(signal.SIGSTOP)
            yield
            store.signal(signal.SIGCONT)
        elif fault == "disk_full":
            store.disk.fill()
            yield
            store.disk.free()
        else:
            side, _, how = fault.partition("_")
            proxy = store.front if side == "client" else store.back
            assert proxy is not None
            (proxy.hold if how == "hold" else proxy.refuse)()
            yield
            proxy.heal()

    def _flip_on_disk(self, store: StoreProcess) -> list[str]:
        """Flip a bit of a few files of blocks, in place."""
        damaged = []
        for path in self._some(store.disk.files()):
            found = SsdFile.parse(path.name)
            if found is None:
                continue
            with contextlib.suppress(OSError), path.open("r+b") as file:
                position = self._random.randrange(max(1, found.num_bytes))
                file.seek(position)
                byte = file.read(1)
                if byte:
                    file.seek(position)
                    file.write(bytes([byte[0] ^ 1 << self._random.randrange(8)]))
                    damaged.append(self._names[found.key])
        return damaged

    async def _flip_in_redis(self) -> list[str]:
        """Flip a bit of a few values of blocks, in place."""
        damaged = []
        async with redis.asyncio.Redis(port=self._arena.redis.port, socket_timeout=5) as client:
            keys = sorted([key async for key in client.scan_iter(match="*}:*", count=1000)])
            for name in self._some(keys):
                key = block_of_redis_key(name)
                if key is None:
                    continue
                flip = _FLIP, 1, name, self._random.random(), 1 << self._random.randrange(8)
                if await client.eval(*flip):
                    damaged.append(self._names[key])
        return damaged

    def _some(self, things: list[Any]) -> list[Any]:
        return self._random.sample(things, min(_FLIPS, len(things)))


def block_of_redis_key(name: bytes) -> BlockKey | None:
    """Return the block whose stratum a Redis key holds; None for another key."""
    _, _, rest = name.decode(errors="replace").partition("{")
    try:
        return BlockKey.decode(rest.partition("}")[0])
    except ValueError:
        return None
