import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstrata.kernels import warmup
from kvstrata.kernels.warmup import cache_counts, warm_up

START = """
import json, sys, torch
from kvstrata.kernels import warmup
from kvstrata.kernels.warmup import cache_counts, warm_up
assert "numba" not in sys.modules, "importing must not cost what Numba costs"
"""
ONE_OP = """
warmup._OPS = {"exact": warmup._exact}
done = warm_up((32,), (torch.bfloat16,))
print(json.dumps([done.num_compiled, done.num_loaded]))
"""
MODULES = """
warm_up((32,), (torch.bfloat16,))
print(json.dumps([name for name in sys.modules if name.endswith("_numba")]))
"""
# After a warm-up, what codecs do finds every kernel ready.
CODECS = """
done = warm_up((32,), (torch.bfloat16,))
from kvstrata.methods import BlockShape, ExactCodec, FallbackCodec, KVBlocks
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.frame_pb2 import FrameHeader
sys.path.append(sys.argv[1])
from profiles import blocks_of, make_profile
profile = make_profile(first_layer=0)
blocks = blocks_of(profile, 2, torch.bfloat16)
before = cache_counts()
for codec in (CalibratedCodec(profile, 0.1), FallbackCodec(), ExactCodec()):
    frames = [
        {s: Frame.open(encode_frame(FrameHeader(stratum=s, num_layers=2), rows))
         for s, rows in one.items()}
        for one in codec.encode(blocks)
    ]
    for strata in (codec.strata, codec.strata[:1]):
        part = [{s: one[s] for s in strata} for one in frames]
        codec.decode(part, BlockShape(2, 32, torch.bfloat16))
new = [now - old for now, old in zip(cache_counts(), before)]
print(json.dumps([done.num_compiled, done.num_loaded, *new]))
"""


def run(code: str, **env: str) -> list[Any]:
    """Return what a new process prints."""
    made_up = Path(__file__).parents[1] / "methods"
    done = subprocess.run(
        [sys.executable, "-P", "-c", START + code, str(made_up)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_second_process_loads_from_the_folder_that_was_asked_for(tmp_path: Path):
    compiled, loaded = run(ONE_OP, NUMBA_CACHE_DIR=str(tmp_path))
    assert compiled > 0
    assert loaded == 0
    assert any(tmp_path.rglob("*.nbc"))
    assert run(ONE_OP, NUMBA_CACHE_DIR=str(tmp_path)) == [0, compiled]


def test_a_warmed_up_process_compiles_nothing_and_its_codecs_miss_no_kernel():
    warm_up((32,), (torch.bfloat16,))  # into the folder that the process below reads
    compiled, loaded, *new = run(CODECS)
    assert compiled == 0
    assert loaded > 20
    assert new == [0, 0], "a codec needs a kernel that the warm-up leaves out"


def test_a_second_warm_up_in_a_process_does_nothing_new():
    warm_up((64,), (torch.bfloat16,))
    start, before = time.perf_counter(), cache_counts()
    done = warm_up((64,), (torch.bfloat16,))
    assert (done.num_compiled, done.num_loaded) == (0, 0)
    assert cache_counts() == before
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_every_head_dim_can_be_warmed_up(head_dim: int):
    assert set(warm_up((head_dim,), (torch.bfloat16,)).seconds) == set(warmup._OPS)


def test_without_numba_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warmup, "backend_of", lambda *_: "reference")
    assert warm_up() == warmup.WarmUp({}, 0, 0)


def test_every_module_of_compiled_kernels_is_warmed_up():
    warm_up((32,), (torch.bfloat16,))  # into the folder that the process below reads
    used = run(MODULES)  # a new one: the fixtures of this one import every module
    there = [path.stem for path in Path(warmup.__file__).parent.glob("*_numba.py")]
    assert set(used) == {f"kvstrata.kernels.{name}" for name in there}


TWO_OPS = """
warmup._OPS = {name: warmup._OPS[name] for name in ("colsum", "exact")}
done = warm_up((32,), (torch.bfloat16,))
print(json.dumps([done.num_compiled, done.num_loaded]))
"""


def test_processes_that_start_together_compile_each_kernel_once(tmp_path: Path):
    def start(folder: str) -> int:
        env = {"NUMBA_CACHE_DIR": str(tmp_path / folder), "TMPDIR": str(tmp_path)}
        num_compiled: int = run(TWO_OPS, **env)[0]
        return num_compiled

    alone = start("alone")
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(start, ["together"] * 2)) == alone > 0


def test_a_process_that_holds_the_work_up_is_waited_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(warmup, "_PATIENCE_S", 0.3)
    start = time.monotonic()
    with warmup._claim("exact") as claimed:
        assert claimed
        assert any(tmp_path.iterdir())
        assert set(warm_up((32,), (torch.bfloat16,), ("exact",)).seconds) == {"exact"}
    assert time.monotonic() - start >= 0.3
    assert not any(tmp_path.iterdir())


def test_without_a_folder_to_share_every_process_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with warmup._claim("exact") as first, warmup._claim("exact") as second:
        assert (first, second) == (True, True)
