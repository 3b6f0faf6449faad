"""A tiny slice of ``bench_kernels.py``: the keys of its rows, and that it times what it says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import bench_kernels
import kernel_attend
import kernel_calibrated
import pytest
import torch
from kernel_rounds import Contest, Entry, measure
from kernel_shapes import SHAPES, TINY

from kvstrata.engine.attention import attend
from kvstrata.kernels.attend_blocks import attend_blocks

SCRIPT = Path(bench_kernels.__file__)
KEYS = {"bench", "op", "impl", "shape", "gbps", "of_memcpy", "of_limit", "seconds", "spread"}


def test_a_tiny_run_prints_rows_with_all_keys():
    command = [sys.executable, "-P", str(SCRIPT), "--json", "--shapes", "tiny", "--ops", "unpack"]
    before = {path: path.stat().st_mtime_ns for path in (SCRIPT.parent / "results").iterdir()}
    done = subprocess.run(
        [*command, "--blocks", "2", "--rounds", "2"], capture_output=True, text=True, timeout=100
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
    assert (
        rows["memcpy"]["of_memcpy"]
        == rows["slow limit"]["of_limit"] / rows["slow limit"]["of_memcpy"]
    )
    assert rows["ours"]["of_limit"] == pytest.approx(0.5, rel=0.3)
    assert rows["ours"]["over"]["peer on half"] == pytest.approx(2.0, rel=0.3)
    assert "over" not in rows["peer on half"]


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench_kernels.parse(["--ops", "nothing"])
    assert "nothing" in capsys.readouterr().err


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
    assert len(layer.pages.offsets.unique()) > 64 * 9


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_made_up_tables_are_as_narrow_as_balanced(shape: kernel_calibrated.Shape):
    layer = kernel_attend.Layer.of(shape, 4)
    elements = 2 * 4 * 64 * shape.kv_heads * shape.dim
    assert 1.8 < 8 * layer.pages.arena.numel() / elements < 2.4
    for side, mean in zip(layer.sides, (1.2, 1.8), strict=True):
        assert side.layout.widths.float().mean().item() == pytest.approx(mean, rel=0.15)
        assert len(side.layout.widths.unique(dim=0)) > 1  # heads differ
