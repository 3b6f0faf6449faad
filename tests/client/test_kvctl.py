import json
import os
import subprocess
import sys

import pytest
from grpc_health.v1 import health_pb2
from typer.testing import CliRunner

from kvstrata.client.kvctl import app
from kvstrata.protos.errors import CapacityError

SCOPE = bytes(range(16)).hex()
KEYS = [f"{SCOPE}.{bytes([i] * 16).hex()}" for i in range(5)]


@pytest.fixture
def run(gateway, monkeypatch):
    monkeypatch.setenv("KVSTRATA_ADDRESS", gateway.address)
    return lambda *args: CliRunner().invoke(app, list(args))


def loads(result, code=0):
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_stats_json_has_tiers_hits_and_misses_by_reason(run):
    found = loads(run("stats", "--json"))
    assert (found["health"], found["uptime_s"], found["hits"]) == ("ok", 12.5, 10)
    assert found["misses"] == {"absent": 4, "corrupt": 1}
    assert found["tiers"]["dram"] == {
        "healthy": True,
        "blocks": 5,
        "bytes": 500,
        "capacity_bytes": 1 << 20,
        "hits": 7,
        "evictions": 0,
        "detail": "",
        "behind_bytes": 0,
    }
    assert {"name": "hits_total", "labels": {"tier": "dram"}, "value": 7} in found["counters"]
    assert {"name": "puts_total", "labels": {}, "value": 11} in found["counters"]
    assert [found[k] for k in ("pinned_blocks", "pinned_bytes", "in_flight_puts")] == [1, 100, 2]


def test_stats_for_people_names_every_tier(run, gateway):
    gateway.tier_down = "[bold]timeout[/bold]"
    text = run("stats").stdout
    assert "10 hits; misses: 4 absent, 1 corrupt" in text
    assert "down: [bold]timeout[/bold]" in text
    assert "1.0 MiB" in text


def test_ls_follows_the_pages_to_the_end(run):
    found = loads(run("ls", "--limit", "0", "--json"))
    assert [block["key"] for block in found["blocks"]] == KEYS
    assert found["truncated"] is False
    assert found["blocks"][1] == {
        "key": KEYS[1],
        "strata": {"base": 100, "mid": 200},
        "bytes": 300,
        "tiers": ["dram", "redis"],
        "pinned": True,
    }


def test_ls_stops_at_its_limit_and_says_so(run):
    found = loads(run("ls", "--limit", "3", "--json"))
    assert [block["key"] for block in found["blocks"]] == KEYS[:3]
    assert found["truncated"] is True
    assert "3 blocks; there are more" in run("ls", "--limit", "3").stdout


def test_ls_prints_whole_keys(run):
    text = run("ls").stdout
    assert all(key in text for key in KEYS)
    assert "pinned" in text


def test_ls_filters_by_scope(run):
    assert len(loads(run("ls", "--scope", SCOPE, "--json"))["blocks"]) == 5
    assert loads(run("ls", "--scope", "00" * 16, "--json"))["blocks"] == []


def test_inspect_json_has_one_header_per_stratum(run):
    found = loads(run("inspect", KEYS[2], "--json"))
    assert (found["key"], found["strata"]) == (KEYS[2], {"base": 100, "mid": 200})
    base, mid = found["headers"]
    assert (base["stratum"], mid["stratum"]) == ("base", "mid")
    assert base["encoding_id"] == mid["encoding_id"] == "ab" * 16
    assert (base["codec"], base["codec_version"], base["rope"]) == ("fallback", 1, "frame")
    assert (base["num_layers"], base["layers"], base["num_kv_heads"]) == (2, [0, 1], 3)
    assert (base["num_tokens"], base["token_ids"][-1]) == (64, 63)
    assert (base["segment_bytes"], base["attachments"]) == (80, {"rekv[b]": 9})


def test_inspect_for_people_shows_ids_as_hex(run):
    text = run("inspect", KEYS[1]).stdout
    assert KEYS[1] in text
    assert "ab" * 16 in text
    assert "rekv[b]" in text
    assert "(pinned)" in text


@pytest.mark.parametrize("key", ["", "abc", "zz" * 16 + "." + "00" * 16, KEYS[0] + "0"])
@pytest.mark.parametrize("verb", ["inspect", "evict"])
def test_a_bad_key_is_told_before_anything_is_sent(run, verb, key):
    result = run(verb, key)
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert "hint: copy a key from `kvctl ls`" in result.stderr


def test_an_absent_block_fails_with_the_servers_words(run):
    result = run("inspect", f"{SCOPE}.{'ff' * 16}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no tier holds this block\nhint: ")


def test_a_bad_scope_or_limit_is_bad_input(run):
    for args in (("--scope", "zz"), ("--scope", "00"), ("--limit", "-1")):
        assert run("ls", *args).exit_code == 2


def test_health_is_ok_when_the_server_serves(run):
    assert loads(run("health", "--json")) == {
        "ok": True,
        "status": "SERVING",
        "health": "ok",
        "why": [],
    }
    assert run("health").stdout == "ok\n"


def test_degraded_health_exits_1_and_says_why(run, gateway):
    gateway.health, gateway.tier_down = "degraded: redis", "connection refused"
    found = loads(run("health", "--json"), code=1)
    assert (found["ok"], found["status"]) == (False, "SERVING")
    assert found["why"] == ["degraded: redis", "tier redis: connection refused"]
    assert "tier redis: connection refused" in run("health").stdout


def test_a_draining_server_is_not_ok(run, gateway):
    gateway.health = "draining"
    gateway.set_serving(health_pb2.HealthCheckResponse.NOT_SERVING)
    found = loads(run("health", "--json"), code=1)
    assert found["why"] == ["the health service says NOT_SERVING", "draining"]


def test_an_unreachable_server_is_not_ok(run, no_server):
    result = run("health", "--address", no_server, "--json")
    found = loads(result, code=1)
    assert (found["ok"], found["status"]) == (False, "UNREACHABLE")
    assert "hint: " in result.stderr
    result = run("health", "--address", no_server)
    assert (result.exit_code, result.stdout) == (1, "")


def test_evict_removes_the_named_blocks_and_keeps_pinned_ones(run):
    found = loads(run("evict", KEYS[0], KEYS[1], "--json"))
    assert found == {"evicted": 1, "skipped_pinned": 1}
    assert len(loads(run("ls", "--json"))["blocks"]) == 4
    assert run("evict", "--all", "--tier", "dram").stdout == "3 evicted, 1 pinned and kept\n"


def test_evicting_everything_must_be_said(run, gateway):
    for args in ((), (KEYS[0], "--all")):
        result = run("evict", *args)
        assert result.exit_code == 2
        assert "--all" in result.stderr
    assert len(gateway.blocks) == 5


def test_drain_tells_whether_work_still_runs(run, gateway):
    assert loads(run("drain", "--json")) == {"drained": True, "in_flight": 0}
    gateway.in_flight = 2
    result = run("drain", "--timeout", "0.1")
    assert (result.exit_code, result.stdout) == (1, "not drained: 2 in flight\n")
    assert run("drain", "--timeout", "nan").exit_code == 2


def test_a_servers_error_prints_message_and_hint(run, gateway):
    gateway.error = CapacityError("full", "wait")
    result = run("stats", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: full\nhint: wait\n"


def test_the_process_prints_no_traceback(no_server):
    code = "from kvstrata.client.kvctl import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "stats"],
        capture_output=True,
        timeout=240,
        env={**os.environ, "KVSTRATA_ADDRESS": no_server},
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr
