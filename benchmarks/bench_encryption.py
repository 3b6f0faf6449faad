"""Claim: encryption at rest costs less than the tiers that it is for.

Sealing and opening frames of the sizes that blocks have, beside a copy of the same bytes; and Put
and Get of the store with Redis below, with keys and without, in turn. Dram holds plaintext, so a
read that dram answers costs nothing; here dram is emptied before each Get.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.key_ring import KeyRing
from kvstrata.kvstore_service.seal import seal, unseal
from kvstrata.kvstore_service.tenants import DEFAULT
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.protos.identity import CacheScope

BASE, MID = 1, 2
SCOPE = CacheScope(b"m" * 16, "float32", "sample/1").digest()
SIZES = (65_536, 212_992, 1_048_576)  # the second is a balanced block of SmolLM2-135M
KEYS = f'current = "a"\n[keys]\na = "{"5a" * 32}"\n'


def rate(num_bytes: int, call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Return GB/s of one thread: the median of rounds, and their least and most."""
    rounds = []
    call()
    for _ in range(9):
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds / 9:
            call()
            count += 1
        rounds.append(num_bytes * count / (time.perf_counter() - begin) / 1e9)
    return {
        "gbps": statistics.median(rounds),
        "gbps_low": min(rounds),
        "gbps_high": max(rounds),
    }


def ciphers(ring: KeyRing, seconds: float) -> list[dict[str, Any]]:
    """Return rows of copy, seal and open at each size."""
    rows = []
    for size in SIZES:
        frame = bytes(bytearray(range(256)) * (size // 256))
        session = ring.sealing("default")
        assert session is not None
        key = sample_block(SCOPE)[0]
        value = seal(session, key, BASE, frame)
        for op, call in (
            ("copy", lambda frame=frame: bytearray(frame)),
            ("seal", lambda s=session, key=key, frame=frame: seal(s, key, BASE, frame)),
            ("open", lambda key=key, value=value: unseal(ring, key, BASE, value)),
        ):
            rows.append({"op": op, "bytes": size, **rate(size, call, seconds)})
    return rows


async def stores(key_file: str, rounds: int) -> list[dict[str, Any]]:
    """Return rows of Put and Get through Redis, without keys and with them, in turn."""
    blocks = [
        sample_block(SCOPE, n, strata={BASE: 100_000, MID: 110_000}, num_layers=29)
        for n in range(64)
    ]
    num_bytes = sum(len(f) for _, frames in blocks for f in frames.values())
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for has_keys in (False, True):
            with RedisServer() as redis:
                config = StoreConfig(redis_url=redis.url, key_file=key_file if has_keys else "")
                async with LocalStore(config) as store, StoreClient(store.address, 60) as client:

                    async def get(client: StoreClient = client) -> None:
                        hashes = [key.block_hash for key, _ in blocks]
                        async for piece in client.get(SCOPE, hashes, [BASE, MID]):
                            assert piece.frame is not None

                    put_s = await timed(lambda client=client: client.put(blocks))
                    dram = store.running.store.dram
                    await dram.delete(await dram.keys(len(blocks)))
                    get_s = await timed(get)
            for op, seconds in (("put", put_s), ("get", get_s)):
                found.setdefault((op, has_keys), []).append(num_bytes / seconds / 1e9)
    return [
        {
            "op": op,
            "encrypted": has_keys,
            "bytes": num_bytes // len(blocks),
            "gbps": statistics.median(rates),
            "gbps_low": min(rates),
            "gbps_high": max(rates),
        }
        for (op, has_keys), rates in found.items()
    ]


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    begin = time.perf_counter()
    await call()
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--no-save", action="store_true", help="leave results/ as it is")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.toml"
        path.touch(mode=0o600)
        path.write_text(KEYS)
        rows = ciphers(KeyRing([DEFAULT], str(path)), 0.5 if options.quick else 3.0)
        rows += asyncio.run(stores(str(path), 3 if options.quick else 15))
    rows = [{"bench": "encryption", **row} for row in rows]
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        table = Table("op", "encrypted", "bytes", "GB/s", "least", "most")
        for row in rows:
            rates = (f"{row[name]:.2f}" for name in ("gbps", "gbps_low", "gbps_high"))
            table.add_row(row["op"], str(row.get("encrypted", "")), str(row["bytes"]), *rates)
        Console().print(table)
    if not options.quick and not options.no_save:
        records.save("encryption", rows, **records.machine("cryptography", "redis"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
