import asyncio
from typing import Any

import bench_store
import pytest

KEYS = {
    "bench", "system", "op", "tier", "streams", "block", "gbps", "effective_gbps", "p50_ms",
    "p99_ms",
}  # fmt: skip


@pytest.mark.parametrize(
    ("tier", "more"), [("dram", set()), ("redis", {"redis-py"}), ("ssd", set())]
)
async def test_every_tier_is_measured_beside_bare_wires(
    tier: str, more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_store.SHAPES, "tiny", (65_536, 8_000, 1_000, 2))
    ticks = []
    rows: list[dict[str, Any]] = []
    async with asyncio.timeout(100):
        async for row in bench_store.measure("tiny", tier, (1, 3), 1, lambda: ticks.append(1)):
            rows.append(row)
    systems = {(row["op"], row["system"]) for row in rows}
    assert {s for op, s in systems if op == "get"} == {
        "kvstrata", "grpcio", "socket", "memcpy", *more
    }  # fmt: skip
    assert {s for op, s in systems if op == "put"} == {"kvstrata", *more}
    for row in rows:
        assert set(row) >= KEYS
        assert row["gbps"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert (row["effective_gbps"] is None) == (row["system"] != "kvstrata")
    assert {row["streams"] for row in rows} == {1, 3}
    assert len(ticks) == 2 * len(rows)


async def test_a_prompt_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_store, "LOOKUP_BLOCKS", 10)
    row = await bench_store.lookup(1)
    assert (row["op"], row["system"]) == ("lookup 10", "kvstrata")
    assert row["p50_ms"] > 0
