"""``kvctl bench`` against a real store: what it tells, what it refuses, what it leaves behind."""

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvstrata.client.kvctl import app
from kvstrata.kvstore_service import bench_command
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.testing import LocalStore

SMALL = ["--blocks", "20", "--block-bytes", "8KiB", "--streams", "3", "--rounds", "2"]


async def run(*args: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["bench", *args])


async def test_it_measures_and_leaves_no_block_behind() -> None:
    async with LocalStore() as store:
        done = await run("--address", store.address, "--json", *SMALL)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        assert (found["blocks"], found["block_bytes"], found["streams"]) == (20, 8192, 3)
        assert [result["op"] for result in found["results"]] == ["put", "get", "lookup"]
        for result in found["results"]:
            assert 0 < result["p50_ms"] <= result["p99_ms"]
            assert result["failures"] == {}
        assert all(result["gbps"] > 0 for result in found["results"][:2])
        assert await store.running.store.dram.keys(100) == []
        assert store.running.store.counters.get("puts_total", outcome="committed") == 40


async def test_more_blocks_than_a_call_may_name_are_looked_up_and_deleted_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert StoreLimits().max_hashes == bench_command.NAMES_PER_CALL
    monkeypatch.setattr(bench_command, "NAMES_PER_CALL", 8)
    async with LocalStore(StoreConfig(limits=StoreLimits(max_hashes=8))) as store:
        done = await run("--address", store.address, "--json", *SMALL)
        assert done.exit_code == 0, done.output
        assert [result["failures"] for result in json.loads(done.stdout)["results"]] == [{}] * 3
        assert await store.running.store.dram.keys(100) == []
        counters = store.running.store.counters
        assert counters.get("lookup_blocks_total", result="hit") == 40
        assert counters.get("lookups_total") == 6


async def test_what_the_store_could_not_keep_is_told_and_exits_1() -> None:
    async with LocalStore(StoreConfig(dram_bytes=50_000)) as store:
        done = await run("--address", store.address, *SMALL)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "20 blocks of 8192 bytes, 3 streams, 2 rounds"
    assert "absent" in lines[2] or "evicted" in lines[2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--blocks", "0"], "--blocks is 0"),
        (["--block-bytes", "1"], "--block-bytes is 1"),
        (["--block-bytes", "big"], "not a size"),
        (["--blocks", "100000", "--block-bytes", "1MiB"], "the sum of all bytes"),
        (["--streams", "9999"], "--streams is 9999"),
    ],
)
def test_bad_input_exits_2_before_anything_is_sent(args: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", *args])
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_store_that_is_not_there_is_an_error() -> None:
    done = CliRunner().invoke(app, ["bench", "--address", "127.0.0.1:1", "--timeout", "5", *SMALL])
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
