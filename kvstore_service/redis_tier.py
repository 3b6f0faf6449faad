"""The shared tier: blocks in Redis, one key a stratum, seen by every store process.

A block's values are ``kvs:{<scope>.<block hash>}:<stratum>``; the tag in braces keeps them in one
slot of a cluster, so one MULTI writes them. Every value has a time to live that each read renews.
The accounting is in ``redis_scripts``; it may say too much (Redis evicted a value by itself) and is
corrected when seen. It also says what goes first under pressure: FINE, then MID, of the colder half
of the blocks, then blocks, the last of a prompt first.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from redis.exceptions import NoScriptError

from kvstrata.kvstore_service import redis_scripts as scripts
from kvstrata.kvstore_service.ancestry import Ancestry, ancestry
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_eval import run_script, script_command
from kvstrata.kvstore_service.redis_reads import RedisReads, values_of
from kvstrata.kvstore_service.tier import StratumSizes, TierUnavailableError, TierUsage, Wanted
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.frame import stratum_name
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockKey

STRATA = (
    Stratum.STRATUM_BASE,
    Stratum.STRATUM_MID,
    Stratum.STRATUM_FINE,
    Stratum.STRATUM_EXACT,
)
_MAX_RESERVE_ROUNDS = 64
Shed = tuple[BlockKey, int, int]  # a block, the stratum that it loses, and its bytes


def value_key(key: BlockKey, stratum: int) -> str:
    """Return the Redis key of one stratum of a block."""
    return f"kvs:{{{key.encode()}}}:{stratum_name(stratum)}"


_SUFFIXES = [f":{stratum_name(stratum)}".encode() for stratum in STRATA]


def _value_keys(key: BlockKey) -> list[bytes]:
    """Return the Redis keys of all strata; as bytes, which the client need not encode."""
    tag = f"kvs:{{{key.encode()}}}".encode()
    return [tag + suffix for suffix in _SUFFIXES]


class RedisTier:
    """Blocks in one Redis, bounded over all store processes; keeps ``Tier``'s contract.

    Args:
        connection: The way to Redis; the tier closes it.
        capacity_bytes: Bound on the frames' bytes, the same in every process that shares the Redis.
        ttl_s: How long an unused block stays.
        max_stratum_bytes: No value beyond this is read.

    Attributes:
        connection: The way to Redis.
        on_shed: Called with the bytes of refinements that this process shed.
    """

    name = "redis"
    resident = False
    shared = True

    def __init__(
        self,
        connection: RedisConnection,
        *,
        capacity_bytes: int,
        ttl_s: float,
        max_stratum_bytes: int,
    ) -> None:
        self.connection = connection
        self._capacity_bytes = capacity_bytes
        self._ttl_ms = int(ttl_s * 1000)
        self._reads = RedisReads(connection, _value_keys, self._ttl_ms, max_stratum_bytes)
        self._evictions = 0
        self.on_shed: Callable[[int], None] = _ignore

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return the strata that are here, each in one bounded read; see ``Tier.get``."""
        return (await self.get_all([(key, strata)]))[0]

    async def get_all(self, wanted: Wanted) -> list[dict[int, bytes]]:
        """Return the strata of each that are here; see ``Tier.get_all``."""
        values = await self._reads.read(wanted)
        lost = []
        for (key, strata), (found, entry) in zip(wanted, values, strict=True):
            if len(found) < len(strata):
                recorded = _parse_entry(entry)
                if any(s in recorded and s not in found for s in strata):
                    lost.append(key)
        if lost:
            await self._reconcile(lost)
        return [found for found, _ in values]

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` would, no time to live renewed; see ``Tier.examine``."""
        replies = await self.connection.exchange(self._reads.commands(key, strata))
        return values_of(strata, replies)

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Replace the block in one MULTI; see ``Tier.put``."""
        entry = _entry({stratum: len(frame) for stratum, frame in frames.items()})
        entry += _suffix(standing or ancestry(key, frames))
        victims = await self._reserve(key, entry)
        try:
            if not await self._write(key, frames, entry):
                await self._eval(scripts.RECORD, key.encode(), entry)
        except CapacityError:
            await self._reconcile([key])
            raise
        return victims

    async def _write(self, key: BlockKey, frames: Mapping[int, bytes], entry: str) -> bool:
        """Write the values in one MULTI; return whether they are recorded in it, too.

        They are where values and accounting share a server, which saves a round trip.
        """
        is_recorded = not self.connection.is_cluster
        async with self.connection.use() as redis:
            pipe = redis.pipeline(transaction=True)
            for stratum in STRATA:
                if stratum in frames:
                    pipe.set(value_key(key, stratum), frames[stratum], px=self._ttl_ms)
                else:
                    pipe.execute_command("UNLINK", value_key(key, stratum))
            if is_recorded:
                record = script_command(scripts.RECORD, scripts.INDEX_KEYS, [key.encode(), entry])
                pipe.execute_command(*record)
            try:
                await pipe.execute()
            except NoScriptError:  # all else was done
                is_recorded = False
        return is_recorded

    async def _reserve(self, key: BlockKey, entry: str) -> list[BlockKey]:
        victims: list[BlockKey] = []
        for _ in range(_MAX_RESERVE_ROUNDS):
            status, *losses = await self._eval(
                scripts.RESERVE, key.encode(), entry, self._capacity_bytes, self._ttl_ms
            )
            if status == 1:
                return victims
            if status == 2:
                break
            gone, shed = _losses(losses)
            await self._unlink(gone, shed)
            self._evictions += int(await self._eval(scripts.FORGET, *losses))
            victims += gone
            if shed:
                self.on_shed(sum(num_bytes for _, _, num_bytes in shed))
        raise CapacityError(
            f"tier redis of {self._capacity_bytes} bytes has no room for block {key.encode()}",
            "raise the store's --redis-bytes, or unpin blocks",
            tier=self.name,
            block_key=key.encode(),
        )

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """Return strata and sizes; see ``Tier.contains``. A second round trip only after losses."""
        if not keys:
            return []
        async with self.connection.use() as redis:
            pipe = redis.pipeline(transaction=False)
            pipe.zrange(scripts.DOOMED_KEY, 0, -1)  # few, if any
            pipe.hmget(scripts.SIZES_KEY, [key.encode() for key in keys])
            if self.connection.is_cluster:  # a block's keys share a slot, those of several do not
                for key in keys:
                    pipe.execute_command("EXISTS", *_value_keys(key))
            else:
                pipe.exists(*(name for key in keys for name in _value_keys(key)))
            doomed, entries, *counts = await pipe.execute()
        sizes = [_parse_entry(entry) for entry in entries]
        if sum(map(len, sizes)) != sum(counts):
            sizes = await self._reconcile(keys)
        if doomed:
            sizes = _without(keys, sizes, set(doomed))
        return [found or None for found in sizes]

    async def _reconcile(self, keys: Sequence[BlockKey]) -> list[StratumSizes]:
        """Make the accounting of ``keys`` say what is there, and return it."""
        async with self.connection.use() as redis:
            pipe = redis.pipeline(transaction=False)
            for key in keys:
                for name in _value_keys(key):
                    pipe.strlen(name)
            lengths = await pipe.execute(raise_on_error=False)
        found: list[StratumSizes] = []
        records: list[str] = []
        for i, key in enumerate(keys):
            mine = lengths[i * len(STRATA) : (i + 1) * len(STRATA)]
            sizes = {
                int(s): n for s, n in zip(STRATA, mine, strict=True) if isinstance(n, int) and n
            }
            found.append(sizes)
            records += (key.encode(), _entry(sizes))
        with contextlib.suppress(CapacityError):  # out of memory: too much stays accounted for now
            await self._eval(scripts.RECORD, *records)
        return found

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks; see ``Tier.delete``."""
        if not keys:
            return 0
        await self._unlink(keys)
        return int(await self._eval(scripts.DELETE, *(key.encode() for key in keys)))

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum; see ``Tier.drop``."""
        async with self.connection.use() as redis:
            await redis.unlink(value_key(key, stratum))
        await self._reconcile([key])

    async def keys(self, limit: int) -> list[BlockKey]:
        """Return keys, most recently used first; see ``Tier.keys``."""
        async with self.connection.use() as redis:
            members: Any = await redis.zrevrange(scripts.USED_KEY, 0, limit - 1)
        return [BlockKey.decode(member.decode()) for member in members]

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks from eviction by any process; see ``Tier.pin``."""
        return await self._hold(scripts.PIN, keys, ttl_s)

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins; see ``Tier.unpin``."""
        if keys:
            async with self.connection.use() as redis:
                await redis.zrem(scripts.PINS_KEY, *(key.encode() for key in keys))

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks from eviction by any process; see ``Tier.lease``."""
        return await self._hold(scripts.LEASE, keys, ttl_s)

    async def _hold(self, script: str, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        if not keys:
            return []
        missing = await self._eval(script, int(ttl_s * 1000), *(key.encode() for key in keys))
        return [keys[position - 1] for position in missing]

    async def usage(self) -> TierUsage:
        """Return what is held, and whether Redis answers; see ``Tier.usage``."""
        blocks = num_bytes = 0
        try:
            blocks, num_bytes = await self._eval(scripts.USAGE, self._ttl_ms)
            detail = ""
        except (TierUnavailableError, CapacityError) as error:
            detail = error.message
        return TierUsage(
            blocks, num_bytes, self._capacity_bytes, self._evictions, not detail, detail
        )

    async def check_integrity(self) -> None:
        """Compare the accounting with the values; see ``Tier.check_integrity``."""
        async with self.connection.use() as redis:
            sizes: Any = await redis.hgetall(scripts.SIZES_KEY)
            order: Any = await redis.zrange(scripts.ORDER_KEY, 0, -1)
            used: Any = await redis.zrange(scripts.USED_KEY, 0, -1)
            kids: Any = await redis.hgetall(scripts.KIDS_KEY)
            mid: Any = await redis.zrange(scripts.MID_KEY, 0, -1)
            values = {name.decode() async for name in redis.scan_iter("kvs:{*.*}:*")}
            entries = {member.decode(): entry for member, entry in sizes.items()}
            total = int(entries.pop(scripts.TOTAL_FIELD, b"0"))
            named: dict[str, int] = {}
            for member, entry in entries.items():
                key = BlockKey.decode(member)
                named |= {value_key(key, s): n for s, n in _parse_entry(entry).items()}
            lengths = {name: await redis.strlen(name) for name in values}
        assert named == lengths, f"redis accounts {named}, holds {lengths}"
        for what, members in (("order", order), ("times of use", used)):
            known = {member.decode() for member in members}
            assert known == set(entries), f"redis's {what} does not name the blocks"
        parents = Counter(parent for m, e in entries.items() if (parent := _parent(m, e)))
        counted = {member.decode(): int(n) for member, n in kids.items() if member}
        assert counted == parents, f"redis counts {counted}, blocks have {parents}"
        refined = {m for m, e in entries.items() if {1, 2} <= _parse_entry(e).keys() and b"@" in e}
        assert {member.decode() for member in mid if member} == refined, "redis sheds others' MID"
        assert total == sum(lengths.values()), f"redis accounts {total} bytes"
        assert total <= self._capacity_bytes, f"redis holds {total} of {self._capacity_bytes} bytes"

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()
        await self._reads.close()

    async def _eval(self, script: str, *args: Any) -> Any:
        return await run_script(self.connection, script, scripts.INDEX_KEYS, args)

    async def _unlink(self, keys: Sequence[BlockKey], shed: Sequence[Shed] = ()) -> None:
        async with self.connection.use() as redis:
            pipe = redis.pipeline(transaction=False)
            for key in keys:
                pipe.execute_command("UNLINK", *_value_keys(key))
            for key, stratum, _ in shed:
                pipe.execute_command("UNLINK", value_key(key, stratum))
            await pipe.execute()


def _entry(sizes: Mapping[int, int]) -> str:
    """Return ``sizes`` as ``redis_scripts`` stores them; empty for none."""
    if not sizes:
        return ""
    parts = " ".join(f"{stratum}:{size}" for stratum, size in sorted(sizes.items()))
    return f"{sum(sizes.values())} {parts}"


def _suffix(found: Ancestry | None) -> str:
    """Return what ``redis_scripts`` stores of where a block stands; nothing if it is unknown."""
    if found is None:
        return ""
    return f" @{found.depth}:{found.parent.block_hash.hex() if found.parent else ''}"


def _parse_entry(entry: Any) -> StratumSizes:
    if not isinstance(entry, bytes):
        return {}
    pairs = (part.split(b":") for part in entry.split()[1:] if not part.startswith(b"@"))
    return {int(stratum): int(size) for stratum, size in pairs}


def _without(
    keys: Sequence[BlockKey], sizes: Sequence[StratumSizes], doomed: Set[bytes]
) -> list[StratumSizes]:
    """Return ``sizes`` less the single strata that a process is about to delete."""
    return [
        {s: n for s, n in found.items() if f"{key.encode()}:{s}".encode() not in doomed}
        for key, found in zip(keys, sizes, strict=True)
    ]


def _parent(member: str, entry: bytes) -> str:
    """Return the member of the block before; empty if there is none."""
    parent = entry.partition(b"@")[2].partition(b":")[2].decode()
    return f"{member.partition('.')[0]}.{parent}" if parent else ""


def _losses(reply: Sequence[Any]) -> tuple[list[BlockKey], list[Shed]]:
    """Return the blocks and the single strata that are to go."""
    gone: list[BlockKey] = []
    shed: list[Shed] = []
    for member, _, stratum, num_bytes in zip(*(iter(reply),) * 4, strict=True):
        key = BlockKey.decode(member.decode())
        if stratum:
            shed.append((key, int(stratum), int(num_bytes)))
        else:
            gone.append(key)
    whole = set(gone)
    return gone, [each for each in shed if each[0] not in whole]


def _ignore(num_bytes: int) -> None:
    """Nobody listens."""
