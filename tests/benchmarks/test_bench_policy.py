"""``bench_policy.py`` on a made-up trace: keys, optimum, and that it is about the real tier."""

import gzip
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import bench_policy
import pytest
from policy_replay import optimum, replay
from policy_trace import DEFAULT, Request, num_distinct, read_trace

from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.testing import KeyedPolicy, sample_block
from kvstrata.protos.identity import CacheScope

SCRIPT = Path(bench_policy.__file__)
KEYS = {"bench", "policy", "cache_tokens", "token_hit_rate", "block_hit_rate"}


def conversations(seed: int, count: int, num_chats: int = 12) -> list[Request]:
    """Chats that grow by a block a turn under one common first block."""
    source = random.Random(seed)
    chats: list[list[int]] = [[0, 100 * n + 1] for n in range(num_chats)]
    requests = []
    for _ in range(count):
        chat = source.choice(chats)
        chat.append(chat[-1] + 1)
        requests.append(Request(tuple(chat[:20]), 512 * len(chat[:20]) - 100))
    return requests


def write(requests: Sequence[Request], path: Path) -> Path:
    with gzip.open(path, "wt") as out:
        for request in requests:
            row = {"timestamp": 0, "input_length": request.num_tokens, "output_length": 1}
            out.write(json.dumps({**row, "hash_ids": list(request.blocks)}) + "\n")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_a_tiny_trace_gives_rows_with_all_keys(tmp_path: Path):
    requests = conversations(1, 200)
    trace = write(requests, tmp_path / "trace.jsonl.gz")
    assert read_trace(trace) == [Request(list(r.blocks), r.num_tokens) for r in requests]
    done = run("--json", "--no-save", "--trace", str(trace))
    assert done.returncode == 0, done.stderr
    *rows, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["policy"] for row in rows} == {"lru", "s3-fifo", "ours", "optimum"}
    assert all(row.keys() >= KEYS and row["bench"] == "policy" for row in rows)
    assert "ours_over_lru_second_half" in last["summary"]
    rates = {(r["policy"], r["cache_tokens"]): r["block_hit_rate"] for r in rows}
    everything = 512 * num_distinct(requests)
    for (policy, tokens), rate in rates.items():
        assert rate <= rates["optimum", tokens]
        assert rates[policy, everything] == rates["optimum", everything]


def test_without_the_trace_it_says_so_and_fails(tmp_path: Path):
    done = run("--trace", str(tmp_path / "absent.gz"))
    assert done.returncode == bench_policy.NO_TRACE
    assert "absent.gz" in done.stderr


def best_possible(requests: Sequence[Request], num_blocks: int) -> int:
    """Try every choice of blocks to keep after each request; an exponential search."""
    best = {frozenset[int](): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            run = next((i for i, b in enumerate(request.blocks) if b not in held), None)
            hits += len(request.blocks) if run is None else run
            known = sorted(held | set(request.blocks))
            for kept in itertools.combinations(known, min(num_blocks, len(known))):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits)
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_that_of_an_exhaustive_search(seed: int):
    requests = conversations(seed, 9, num_chats=3)
    for num_blocks in (2, 3, 4):
        requests = [Request(r.blocks[:4], r.num_tokens) for r in requests]
        assert sum(optimum(requests, num_blocks)) == best_possible(requests, num_blocks)


async def test_the_tier_hits_what_the_replay_hits():
    """The same class under real frames: the benchmark is about what runs."""
    scope = CacheScope(b"m" * 16, "float32", "sample/1").digest()
    requests, num_blocks = conversations(5, 150), 40
    made = {}
    for request in requests:
        parent = None
        for block in request.blocks:
            made[block] = made.get(block) or sample_block(scope, block, parent=parent, num_layers=1)
            parent = made[block][0].block_hash
    largest = max(len(frames[1]) for _, frames in made.values())
    padded = {b: (key, {1: f[1].ljust(largest, b"\0")}) for b, (key, f) in made.items()}
    tier, hits = DramTier(num_blocks * largest), []
    for request in requests:
        sizes = await tier.contains([padded[b][0] for b in request.blocks])
        run = next((i for i, held in enumerate(sizes) if held is None), len(sizes))
        for block in request.blocks[:run]:
            await tier.get(padded[block][0], [1])
        for block in request.blocks[run:]:
            await tier.put(*padded[block])
        hits.append(run)
    keyed = KeyedPolicy[int](
        bench_policy.POLICIES["ours"], lambda block: hash(padded[block][0].block_hash) % (1 << 64)
    )
    assert hits == replay(keyed, requests, num_blocks)


def test_the_size_at_half_of_the_optimum_is_where_lru_gets_there():
    turns = [[(0, *range(100 * c + 1, 100 * c + n)) for c in range(40)] for n in range(3, 9)]
    requests = [Request(blocks, 512 * len(blocks)) for turn in turns for blocks in turn]
    replays = bench_policy.Replays(requests)
    most = num_distinct(requests)
    half = bench_policy.half_size(replays, bench_policy.sizes(8, 2.0, most), near=1.0)
    share = [replays.rates("lru", n)[0] / replays.rates("optimum", n)[0] for n in (half - 1, half)]
    assert share[0] < 0.5 <= share[1]


@pytest.mark.slow
def test_on_the_real_trace_ours_saves_5_percent_more_tokens_than_lru():
    if not DEFAULT.is_file():
        pytest.skip(f"needs the trace {DEFAULT.name}")
    requests = read_trace(DEFAULT)
    replays = bench_policy.Replays(requests)
    ours, lru = (replays.rates(policy, 8192, len(requests) // 2)[0] for policy in ("ours", "lru"))
    assert ours > 1.05 * lru
