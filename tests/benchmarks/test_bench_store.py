import asyncio
import json
from pathlib import Path
from typing import Any

import bench_store
import pytest
import records
import store_marks
import store_peers
from store_calls import Shape

KEYS = {
    "bench", "system", "op", "tier", "streams", "block", "gbps", "effective_gbps", "p50_ms",
    "p99_ms",
}  # fmt: skip
WIRES = {"get": {"grpcio", "socket", "memcpy"}, "put": {"grpcio"}}


@pytest.fixture(autouse=True)
def no_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where `make peers` never ran."""
    monkeypatch.setattr(store_peers, "ENVIRONMENT", tmp_path)


@pytest.mark.parametrize(
    ("tier", "more"), [("dram", set()), ("redis", {"redis-py"}), ("ssd", set()), ("object", set())]
)
async def test_every_tier_is_measured_beside_bare_wires(
    tier: str, more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_store.SHAPES, "tiny", Shape(2, 1, 8, 8_000, 1_000))
    ticks = []
    rows: list[dict[str, Any]] = []
    async with asyncio.timeout(100):
        async for row in bench_store.measure("tiny", tier, (1, 3), 1, lambda: ticks.append(1)):
            rows.append(row)
    for op, wires in WIRES.items():
        assert {r["system"] for r in rows if r["op"] == op} == {"kvstrata", *wires, *more}
    for row in rows:
        assert set(row) >= KEYS
        assert row["gbps"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert (row["effective_gbps"] is None) == (row["system"] != "kvstrata")
        assert (row["of_kvstrata"] == 1) or row["system"] != "kvstrata"
    assert {row["streams"] for row in rows} == {1, 3}
    assert len(ticks) == 2 * len(rows)


async def test_a_prompt_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_store, "LOOKUP_BLOCKS", 10)
    row = await bench_store.lookup(1)
    assert (row["op"], row["system"]) == ("lookup 10", "kvstrata")
    assert row["p50_ms"] > 0


def test_an_index_is_measured() -> None:
    row = bench_store.index(5000)
    assert (row["op"], row["blocks"]) == ("index", 5000)
    assert 0 < row["p50_ms"] <= row["p99_ms"]


def test_a_peer_that_moves_bf16_is_compared_by_the_kv_that_arrives() -> None:
    entries = [
        bench_store.Entry("kvstrata", lambda: asyncio.sleep(0, []), 100, 700),
        bench_store.Entry("grpcio", lambda: asyncio.sleep(0, []), 100),
        bench_store.Entry("lmcache", lambda: asyncio.sleep(0, []), 700, 700),
    ]
    seconds = [([0.1, 0.1], [0.1]), ([0.05, 0.05], [0.05]), ([0.4, 0.4], [0.4])]
    what = {"op": "get", "tier": "redis", "streams": 1, "block": "x"}
    ours, wire, peer = bench_store.rows_of(entries, seconds, **what)
    assert [row["of_kvstrata"] for row in (ours, wire, peer)] == [1, 2, 0.25]
    assert ours["effective_gbps"] == pytest.approx(7000e-9, abs=1e-3)
    (mark,) = store_marks.marks([ours, peer])
    assert mark == "get redis, x: 3.0 of lmcache's; by streams: 4.00 (1): reached"


def test_parts_join_and_those_of_another_machine_are_left_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    machine = {"machine": "this"}
    monkeypatch.setattr(records, "machine", lambda *packages: machine)

    def tell(op: str, tier: str, gbps: float, part: str) -> list[Any]:
        bench_store.save([{"op": op, "tier": tier, "gbps": gbps}], [part])
        head = json.loads((tmp_path / "store.json").read_text())
        return [(row["op"], row["gbps"]) for row in head["rows"]]

    tell("lookup 2048", "dram", 1, "lookup")
    assert tell("get", "redis", 2, "redis") == [("get", 2), ("lookup 2048", 1)]
    assert tell("get", "redis", 3, "redis") == [("get", 3), ("lookup 2048", 1)]
    assert not capsys.readouterr().err
    machine["machine"] = "another"
    assert tell("get", "redis", 4, "redis") == [("get", 4)]
    assert "left out" in capsys.readouterr().err


def test_a_part_that_is_measured_again_replaces_that_part_only() -> None:
    rows = [
        {"op": "get", "tier": "dram"},
        {"op": "put", "tier": "redis"},
        {"op": "lookup 2048", "tier": "dram"},
        {"op": "index", "tier": "dram"},
    ]
    assert [bench_store.part_of(row) for row in rows] == ["dram", "redis", "lookup", "index"]
    assert records.saved("no such benchmark", {}) == []
