"""A tiny slice of ``bench_kernels.py``: the keys of its rows, and that it times what it says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import bench_kernels
import kernel_attend
import kernel_calibrated
import numpy as np
import pytest
import records
import torch
from kernel_rounds import Contest, Entry, measure
from kernel_shapes import (
    ESCAPE_SHARE,
    MID_SHARE,
    SHAPES,
    THRESHOLD,
    TINY,
    profile,
    saliency,
    tokens_of,
)

from kvstrata.engine.attention import attend
from kvstrata.kernels.attend_blocks import attend_blocks
from kvstrata.kernels.token_masks import count_tokens
from kvstrata.methods import KVBlocks
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.protos.frame_pb2 import Stratum

SCRIPT = Path(bench_kernels.__file__)
KEYS = {"bench", "op", "impl", "shape", "gbps", "of_memcpy", "of_limit", "seconds", "spread"}


def test_a_tiny_run_prints_rows_with_all_keys():
    command = [sys.executable, "-P", str(SCRIPT), "--json", "--shapes", "tiny", "--ops", "unpack"]
    before = {path: path.stat().st_mtime_ns for path in (SCRIPT.parent / "results").iterdir()}
    done = subprocess.run(
        [*command, "--blocks", "2", "--rounds", "2"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["impl"] for row in rows} == {"memcpy", "ours", "eager torch"}
    for row in rows:
        assert row.keys() >= KEYS
        assert (row["bench"], row["op"]) == ("kernels", "unpack")
        assert row["gbps"] > 0
        assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
    after = {path: path.stat().st_mtime_ns for path in (SCRIPT.parent / "results").iterdir()}
    assert after == before, "a slice must not replace the saved results"


def test_ratios_are_of_one_round_and_of_the_slowest_limit():
    entries = [
        Entry("slow limit", lambda: time.sleep(0.02), 2000),
        Entry("ours", lambda: time.sleep(0.04), 2000, ("memcpy", "slow limit"), is_ours=True),
        Entry("peer on half", lambda: time.sleep(0.04), 1000),
    ]
    rows = {row["impl"]: row for row in measure(Contest("op", "shape", entries), 3)}
    assert rows["memcpy"]["of_memcpy"] == 1
    assert rows["slow limit"]["of_limit"] == rows["slow limit"]["of_memcpy"] < 1
    assert rows["ours"]["of_limit"] == pytest.approx(0.5, rel=0.3)
    assert rows["ours"]["over"]["peer on half"] == pytest.approx(2.0, rel=0.3)
    assert "over" not in rows["peer on half"]


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_kernels.parse(["--ops", "nothing"])
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--quick", "--rounds 2", "--blocks 4", "--threads 1"])
def test_only_a_whole_run_is_saved(options: str):
    assert bench_kernels.parse(options.split()).no_save
    assert not bench_kernels.parse(["--json"]).no_save
    assert bench_kernels.parse(["--ops", "rope"]).no_save
    assert not bench_kernels.parse(["--ops", "rope", "--update"]).no_save
    assert not bench_kernels.parse(["--cpu-time"]).no_save
    assert bench_kernels.parse(["--cpu-time"]).threads == 1


def test_time_is_taken_from_the_clock_that_is_asked_for():
    entries = [Entry("sleeper", lambda: time.sleep(0.03), 2000, is_ours=True)]
    by_wall, by_cpu = (
        measure(Contest("op", "shape", entries), 3, clock)[1]
        for clock in (time.perf_counter, time.process_time)
    )
    assert by_wall["seconds"] >= 0.03 > by_cpu["seconds"]


def test_an_update_keeps_other_rows_of_the_same_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    assert records.saved("kernels", {"machine": "this"}) == []
    records.save("kernels", [{"op": "rope"}], machine="this")
    assert records.saved("kernels", {"machine": "this"}) == [{"op": "rope"}]
    assert records.saved("kernels", {"machine": "that"}) == []


@pytest.mark.parametrize("name", sorted(set(bench_kernels.GROUPS) - {"attend", "unpack"}))
def test_every_contest_has_ours_and_others_in_bf16_bytes(name: str):
    for contest in bench_kernels.GROUPS[name](TINY, 1):
        ours = [entry for entry in contest.entries if entry.is_ours]
        assert ours
        assert len(contest.entries) > len(ours)
        sides = 1 if contest.op in ("split-bytes", "merge-bytes", "rope", "colsum") else 2
        per_side = 2 * TINY.layers * TINY.kv_heads * 64 * TINY.dim
        assert {entry.num_bytes for entry in ours} == {sides * per_side}
        for entry in contest.entries:
            entry.call()


def test_attend_reads_the_same_numbers_as_it_expands():
    layer = kernel_attend.Layer.of(TINY, 3)
    queries, scaling = torch.randn(TINY.heads, TINY.dim), TINY.dim**-0.5
    out, _ = attend_blocks(queries, layer.pages, layer.turns, scaling)
    keys, values = (side.float() for side in layer.expanded())
    wanted = attend(queries[:, None], keys, values, scaling, None)[:, 0]
    # Expanded numbers are rounded to bf16; errors of 128 and more tokens average out.
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())


def test_long_contexts_repeat_their_blocks():
    layer = kernel_attend.Layer.of(TINY, 128)
    keys, values = layer.expanded()
    assert keys.shape == values.shape == (TINY.kv_heads, 128 * 64, TINY.dim)
    assert torch.equal(values[:, : 64 * 64], values[:, 64 * 64 :])
    assert not torch.equal(keys[:, : 64 * 64], keys[:, 64 * 64 :])  # at other positions
    assert len(layer.pages.places(torch.arange(len(layer.pages.offsets))).unique()) > 64 * 9


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_made_up_tables_are_as_wide_as_balanced_has_them(shape: kernel_calibrated.Shape):
    """As `balanced` at 2.2 bits stores a text with the shipped profile, tokens' classes too."""
    layer = kernel_attend.Layer.of(shape, 4)
    elements = 2 * 4 * 64 * shape.kv_heads * shape.dim
    assert 2.1 < 8 * layer.pages.arena.numel() / elements < 2.5
    for side, mean in zip(layer.sides, (1.45, 2.38), strict=True):
        assert side.layout.widths.float().mean().item() == pytest.approx(mean, rel=0.15)
        assert len(side.layout.widths.unique(dim=0)) > 1  # heads differ
    made = profile(shape)
    codec = CalibratedCodec(made, THRESHOLD)
    kv = KVBlocks(tokens_of(made.keys["pre"], 1), tokens_of(made.values, 1), saliency(shape, 1), 64)
    base = codec.encode(kv)[0][Stratum.STRATUM_BASE].values()
    masks = np.stack([np.frombuffer(segment, "<i8", 4 * shape.kv_heads) for segment in base])
    counts = count_tokens(torch.from_numpy(masks)).view(-1, 2, 2, shape.kv_heads)
    escaped, mid = (counts.double().mean((0, 3)) / 64).tolist()
    assert mid == pytest.approx([MID_SHARE[side] for side in "KV"], rel=0.35)
    for share, side in zip(escaped, "KV", strict=True):
        assert 0 < share < ESCAPE_SHARE[side]  # which has sinks, too
