"""Every verb of ``kvctl`` against a real store process, which the tests of this file share."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kvstrata.client.kvctl import COMMANDS, app
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.methods import FallbackCodec
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.protos.identity import BlockKey, CacheScope, ScopeDigest, block_hashes
from kvstrata.protos.retention import HIGH, Retention
from tests.kvstore_service.tenancy import credentials, tenants_file, token
from tests.methods.blocks import random_blocks, seal_all
from tests.methods.profiles import blocks_of, make_profile

BASE, MID = 1, 2
Blocks = list[tuple[BlockKey, Mapping[int, bytes]]]
Run = Callable[..., Result]
_salts = itertools.count()


@dataclass(frozen=True)
class StoreProcess:
    """A store of dram and ssd, with two tenants; the operator is "ops"."""

    process: subprocess.Popen[str]
    address: str
    folder: Path

    def put(self, blocks: Blocks, tenant: str = "ops") -> None:
        async def send() -> None:
            async with StoreClient(self.address, credentials=credentials(tenant)) as client:
                assert {o.outcome for o in await client.put(blocks)} == {"committed"}

        asyncio.run(send())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreProcess]:
    folder = tmp_path_factory.mktemp("store")
    tenants = tenants_file(folder, ops="admin = true", alice="quota_bytes = 1_000_000")
    command = [
        *(sys.executable, "-P", "-m", "kvstrata.kvstore_service", "--dram", "8MiB"),
        *("--ssd-path", str(folder / "ssd"), "--ssd", "64MiB", "--tenants", tenants),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    try:
        yield StoreProcess(process, json.loads(process.stdout.readline())["address"], folder)
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def run(store: StoreProcess, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("KVSTRATA_ADDRESS", store.address)
    monkeypatch.setenv("KVSTRATA_TOKEN", token("ops"))
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *args: CliRunner().invoke(app, list(args))


@pytest.fixture
def scope() -> ScopeDigest:
    """A scope of this test's own."""
    return CacheScope(b"m" * 16, "float32", "sample/1", salt=str(next(_salts)).encode()).digest()


def loads(result: Result, code: int = 0) -> Any:
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def chain(scope: ScopeDigest, length: int, **options: Any) -> Blocks:
    blocks: Blocks = []
    for number in range(length):
        parent = blocks[-1][0].block_hash if blocks else None
        blocks.append(sample_block(scope, number, parent=parent, **options))
    return blocks


def keys_of(run: Run, scope: ScopeDigest, *tenant: str) -> list[str]:
    """Return the stored keys of a chain of four blocks, first block first."""
    ids = ",".join(map(str, range(256)))
    args = ("--token-ids", ids, "--scope", scope.hex(), *tenant)
    return [block["key"] for block in loads(run("explain", *args, "--json"))["blocks"]]


def stored(run: Run, store: StoreProcess, scope: ScopeDigest, **options: Any) -> list[str]:
    """Put a chain of four blocks and return the keys by which an operator names them."""
    store.put(chain(scope, 4, **options))
    return keys_of(run, scope, "--tenant", "ops")


def test_every_verb_has_help_with_an_example(run: Run) -> None:
    for name in COMMANDS:
        text = run(name, "--help").stdout
        assert f"Example: kvctl {name}" in text, name
        assert "--json" in text, name


def test_stats_tell_times_and_counters(run: Run, store: StoreProcess, scope: ScopeDigest) -> None:
    stored(run, store, scope)
    found = loads(run("stats", "--json"))
    assert found["health"] == "ok"
    assert list(found["tiers"]) == ["dram", "ssd"]
    puts = [t for t in found["times"] if t["labels"].get("method") == "KVStore/Put"]
    assert puts[0]["count"] >= 1
    assert puts[0]["p99_s"] is None or puts[0]["p99_s"] > 0
    text = run("stats").stdout
    assert "tier_operation_seconds" in text
    assert "puts_total" in text


def test_top_tells_what_happened_in_between(
    run: Run, store: StoreProcess, scope: ScopeDigest
) -> None:
    lines = run("top", "--interval", "0.05", "--count", "2", "--json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 2
    assert found[0]["health"] == "ok"
    assert found[1]["hits_per_s"] == 0
    assert [row["method"] for row in found[1]["calls"]] == ["Admin/Stats"]
    text = run("top", "--interval", "0.05", "--count", "1").stdout
    assert "hit rate -" in text
    assert "Admin/Stats" in text
    assert run("top", "--interval", "0").exit_code == 2


def test_lookup_tells_the_run(run: Run, store: StoreProcess, scope: ScopeDigest) -> None:
    keys = stored(run, store, scope)
    ids = ",".join(map(str, range(300)))
    args = ("lookup", "--token-ids", ids, "--scope", scope.hex())
    found = loads(run(*args, "--tenant", "ops", "--json"))
    assert (found["run"], found["num_blocks"], found["cached_tokens"]) == (4, 4, 256)
    assert [block["key"] for block in found["blocks"]] == keys
    assert found["blocks"][0]["tiers"] == ["dram", "ssd"]
    assert "4 of 4 blocks cached, 256 tokens" in run(*args, "--tenant", "ops").stdout
    assert loads(run(*args, "--json"))["run"] == 0  # as stored keys, they name nothing
    assert loads(run(*args, "--tenant", "alice", "--json"))["run"] == 0


def test_explain_tells_what_evicted_a_block_and_what_lies_behind_it(
    run: Run, store: StoreProcess, scope: ScopeDigest
) -> None:
    keys = stored(run, store, scope)
    run("evict", keys[1])
    run("evict", keys[2], "--tier", "dram")
    args = ("explain", "--token-ids", ",".join(map(str, range(400))), "--scope", scope.hex())
    found = loads(run(*args, "--tenant", "ops", "--json"))
    assert [block["state"] for block in found["blocks"]] == [
        "cached", "missing", "unreachable", "unreachable", "missing", "missing",
    ]  # fmt: skip
    assert found["blocks"][1]["why"].startswith("evicted from all tiers ")
    assert found["blocks"][1]["departures"][0]["reason"] == "admin"
    assert found["blocks"][2]["why"] == "in ssd, but block 1 before it is missing"
    assert found["blocks"][5]["why"].startswith("never stored here")
    assert found["why"].startswith("block 1 (tokens from 64 on): evicted from all tiers")
    text = run(*args, "--tenant", "ops").stdout
    assert "unreachable" in text
    assert found["why"][:60] in text


def test_explain_tells_of_another_scope(run: Run, store: StoreProcess, scope: ScopeDigest) -> None:
    stored(run, store, scope)
    other = ScopeDigest(bytes(16 * [7]))
    ids = ",".join(map(str, range(64)))
    found = loads(run("explain", "--token-ids", ids, "--scope", other.hex(), "--json"))
    assert found["run"] == 0
    assert found["others"]
    assert found["others"][0]["differs"] == ["model, codec settings, adapter or tenant"]
    assert "stored with another" in found["why"]


@pytest.mark.parametrize("args", [
    (), ("a prompt", "--token-ids", "1"), ("--token-ids", "1,x"), ("--token-ids", "1,-2"),
    ("--scope", "00" * 16), ("--token-ids", "1", "--scope", "zz"),
    ("--token-ids", str(2**32), "--scope", "00" * 16),
])  # fmt: skip
@pytest.mark.parametrize("verb", ["lookup", "explain"])
def test_a_bad_question_is_told_before_it_is_sent(
    run: Run, verb: str, args: tuple[str, ...]
) -> None:
    result = run(verb, *args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_a_store_says_that_it_knows_no_prompts(run: Run) -> None:
    result = run("explain", "What is the capital of France?")
    assert result.exit_code == 2
    assert "a store knows no prompts" in result.stderr
    assert "hint: ask a gateway" in result.stderr


def test_pins_keep_blocks_until_they_are_ended(
    run: Run, store: StoreProcess, scope: ScopeDigest
) -> None:
    keys = stored(run, store, scope)
    assert loads(run("pin", *keys[:2], "--ttl", "60", "--json")) == {"pinned": 2, "missing": []}
    evicted = loads(run("evict", *keys, "--json"))
    assert evicted == {"evicted": 2, "skipped_pinned": 2}
    found = loads(run("pin", keys[3], "--json"), code=1)
    assert found == {"pinned": 0, "missing": [keys[3]]}
    assert f"not there: {keys[3]}" in run("pin", keys[3]).stdout
    assert loads(run("unpin", *keys, "--json")) == {"unpinned": 4}
    assert loads(run("evict", *keys, "--json"))["evicted"] == 2
    assert run("pin", keys[0], "--ttl", "0").exit_code == 2


def test_ls_and_inspect_tell_priority_sessions_and_time(
    run: Run, store: StoreProcess, scope: ScopeDigest
) -> None:
    keys = stored(run, store, scope)
    listing = ("ls", "--scope", keys[0].partition(".")[0])
    assert all("retention" not in block for block in loads(run(*listing, "--json"))["blocks"])

    async def hint() -> None:
        async with StoreClient(store.address, credentials=credentials("ops")) as client:
            retention = Retention(HIGH, keep_s=300, session="s")
            await client.lookup(scope, block_hashes(scope, range(64)), retention=retention)

    asyncio.run(hint())
    blocks = loads(run(*listing, "--json"))["blocks"]
    (kept,) = [block["retention"] for block in blocks if "retention" in block]
    assert (kept["priority"], kept["sessions"]) == ("high", 1)
    assert 200 < kept["keep_s"] <= 300
    assert "high for " in run(*listing).stdout
    assert ", 1 sessions" in run("inspect", keys[0]).stdout


def test_blocks_move_between_tiers(run: Run, store: StoreProcess, scope: ScopeDigest) -> None:
    keys = stored(run, store, scope)

    def tiers() -> list[list[str]]:
        ids = ",".join(map(str, range(256)))
        found = run(
            "explain", "--token-ids", ids, "--scope", scope.hex(), "--tenant", "ops", "--json"
        )
        return [block["tiers"] for block in loads(found)["blocks"]]

    moved = loads(run("move", *keys[:2], "--from", "dram", "--to", "ssd", "--json"))
    assert moved == {"moved": 2, "problems": {}}
    assert tiers() == [["ssd"], ["ssd"], ["dram", "ssd"], ["dram", "ssd"]]
    assert loads(run("move", keys[0], "--to", "dram", "--json"))["moved"] == 1
    assert tiers()[0] == ["dram", "ssd"]
    absent = f"{scope.hex()}.{'ee' * 16}"
    found = loads(run("move", absent, "--to", "dram", "--json"), code=1)
    assert found["problems"] == {absent: "absent"}
    result = run("move", keys[0], "--to", "tape")
    assert result.exit_code == 2
    assert "no tier 'tape'" in result.stderr


def test_verify_finds_damage_and_repairs_it(
    run: Run, store: StoreProcess, scope: ScopeDigest
) -> None:
    keys = stored(run, store, scope, strata={BASE: 4000, MID: 2000})
    found = loads(run("verify", *keys, "--json"))
    assert (found["done"], found["checked_strata"], found["damaged"]) == (True, 16, [])
    (file,) = (store.folder / "ssd").rglob(f"*{keys[2].partition('.')[2]}*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = loads(run("verify", "--tier", "ssd", "--json"), code=1)
    assert [(d["key"], d["stratum"], d["tier"]) for d in found["damaged"]] == [
        (keys[2], "mid", "ssd")
    ]
    result = run("verify", "--tier", "ssd", "--repair")
    assert result.exit_code == 1
    assert f"deleted: {keys[2]} mid in ssd: " in result.stdout
    assert loads(run("verify", "--tier", "ssd", "--json"))["num_damaged"] == 0


def test_limits_are_shown_and_set(run: Run, store: StoreProcess, scope: ScopeDigest) -> None:
    found = loads(run("quota", "--json"))
    assert [tenant["tenant"] for tenant in found["tenants"]] == ["ops", "alice"]
    (alice,) = loads(run("quota", "alice", "--bytes", "2MiB", "--requests-per-s", "5", "--json"))[
        "tenants"
    ]
    assert (alice["quota_bytes"], alice["requests_per_s"]) == (2 << 20, 5)
    assert alice["in_flight_bytes"] == 0
    store.put([sample_block(scope)], tenant="alice")
    (alice,) = loads(run("quota", "alice", "--json"))["tenants"]
    assert alice["stored_bytes_now"] > 4000
    assert "2.0 MiB" in run("quota").stdout
    assert "no tenant 'bob'" in run("quota", "bob").stderr
    for args in (("--bytes", "1MiB"), ("alice", "--bytes", "many"), ("alice", "--in-flight", "x")):
        assert run("quota", *args).exit_code == 2


@pytest.mark.parametrize("codec_name", ["fallback", "calibrated"])
def test_inspect_draws_how_each_token_is_kept(
    run: Run, store: StoreProcess, codec_name: str
) -> None:
    if codec_name == "fallback":
        sealed = seal_all(FallbackCodec(sink_tokens=3), random_blocks(2, 3, 32, 1))
    else:
        profile = make_profile(layers=3, heads=2, dim=32)
        sealed = seal_all(CalibratedCodec(profile, 0.05), blocks_of(profile, count=1))
    (block,) = sealed
    run("evict", "--all")
    store.put([(block.identity.key, {int(s): f for s, f in block.frames.items()})])
    (listed,) = loads(run("ls", "--json"))["blocks"]
    found = loads(run("inspect", listed["key"], "--json"))
    assert found["tokens_unknown"] == ""
    assert [len(layer["saliency"]) for layer in found["layers"]] == [64] * len(found["layers"])
    sinks = 0b111 if codec_name == "fallback" else 0b1111
    assert int(found["layers"][0]["escape"][0], 16) & 0b1111 >= sinks
    text = run("inspect", listed["key"]).stdout
    rows = [line for line in text.splitlines() if line.startswith("layer ")]
    assert len(rows) == 2 * len(found["layers"])
    assert any("█" in row for row in rows)
    assert any("EEE" in row for row in rows)
    layer = str(found["layers"][0]["layer"])
    assert "K head 0" in run("inspect", listed["key"], "--layer", layer).stdout
    assert run("inspect", listed["key"], "--layer", "99").exit_code == 2
    assert "layers" not in loads(run("inspect", listed["key"], "--no-tokens", "--json"))


def test_a_block_without_masks_says_so(run: Run, store: StoreProcess, scope: ScopeDigest) -> None:
    keys = stored(run, store, scope)
    assert "tokens: codec 'sample/1' has no token masks" in run("inspect", keys[0]).stdout


def test_without_an_operators_token_no_verb_is_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"{'00' * 16}.{'00' * 16}"
    by_key = ("inspect", "pin", "unpin", "evict", "verify")
    questions: dict[str, tuple[str, ...]] = dict.fromkeys(by_key, (key,))
    questions |= dict.fromkeys(("lookup", "explain"), ("--token-ids", "1", "--scope", "00" * 16))
    questions |= {"move": (key, "--to", "dram"), "top": ("--count", "1", "--interval", "0.01")}
    for name in COMMANDS:
        for secret, told in (("", "no bearer token"), (token("alice"), "is no admin")):
            monkeypatch.setenv("KVSTRATA_TOKEN", secret)
            result = run(name, *questions.get(name, ()))
            assert result.exit_code == 1, name
            assert told in result.stderr, name


def test_drain_comes_last(run: Run, store: StoreProcess) -> None:
    assert loads(run("health", "--json"))["ok"]
    assert loads(run("drain", "--timeout", "10", "--json")) == {"drained": True, "in_flight": 0}
    found = loads(run("health", "--json"), code=1)
    assert found["why"] == ["the health service says NOT_SERVING", "draining"]


def test_hashes_are_those_that_a_store_checks(scope: ScopeDigest) -> None:
    keys = [key.block_hash for key, _ in chain(scope, 4)]
    assert block_hashes(scope, list(range(256))) == keys
